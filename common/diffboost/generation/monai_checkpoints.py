"""Checkpoints of MONAI's generative networks, those that monai-generative wrote among them.

monai-generative 0.2.3 lives on in MONAI; its names of weights are older, and MONAI's networks read
them (``load_old_state_dict``). Two things they leave to the caller, and both would be wrong numbers
without an error (MONAI 1.6.1):

- monai-generative has a projection behind its self-attention (``proj_attn``) that it never applies.
  MONAI loads it and applies it, unless ``include_fc`` is false.
- MONAI's ControlNet does not find the older names of self-attention and keeps what was drawn.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet
from torch import nn

from diffboost.data.weights import read_state
from diffboost.generation.monai_part import MonaiPart

logger = logging.getLogger(__name__)

UNUSED = ".proj_attn."  # monai-generative's projection that its networks never apply
PARALLEL = "module."  # before every name that a network wrapped for several GPUs writes


def read_checkpoint(path: str | Path, key: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without the word that a wrapped network puts before each name.

    Args:
        path: see :func:`diffboost.data.weights.read_state`.
        key: what the file is, for messages.

    Raises:
        FileNotFoundError, ValueError: see ``read_state``; also without any tensor.

    Source: engineering choice.
    """
    state = read_state(path, key=key)
    if not state:
        raise ValueError(
            f"{key}: {path} holds no tensors; the network's state dict is needed, alone or under "
            "state_dict, model or another name that trainers give it"
        )
    if all(name.startswith(PARALLEL) for name in state):
        state = {name.removeprefix(PARALLEL): value for name, value in state.items()}
    return state


def load_checkpoint(
    kind: type[MonaiPart], config: Mapping, state: Mapping, where: str
) -> MonaiPart:
    """A part with the weights of a checkpoint of MONAI or of monai-generative.

    Args:
        kind: the part's class.
        config: its configuration.
        state: name to tensor.
        where: key and file, for the message.

    Returns:
        The part. Where monai-generative wrote the file, its configuration says what that package
        computes, whatever ``config`` says of it: no projection behind self-attention
        (``include_fc``, but for the transformer blocks of a conditioned network), and queries, keys
        and values apart (``use_combined_linear``).

    Raises:
        ValueError: the configuration is refused, or tensors are missing, too many or of another
            shape.

    Source: MONAI's ``load_old_state_dict``.
    """
    part = kind(config)
    if set(state) != set(part.network.state_dict()):
        conditioned = part.config.get("with_conditioning", False)
        part = kind({**config, "include_fc": bool(conditioned), "use_combined_linear": False})
    fill_monai(part.network, state, where)
    return part


def fill_monai(
    network: AutoencoderKL | ControlNet | DiffusionModelUNet, state: Mapping, where: str
) -> None:
    """Puts a checkpoint of MONAI or of monai-generative into a network of MONAI.

    Args:
        network: gets the tensors.
        state: name to tensor.
        where: key and file, for the message.

    Raises:
        ValueError: tensors are missing, too many or of another shape, or are no numbers (NaN).

    Source: MONAI's ``load_old_state_dict``, which reports neither what it does not find nor what it
        leaves.
    """
    try:
        if set(state) == set(network.state_dict()):
            network.load_state_dict(state)
            return
        left = _fill_from_older(network, dict(state))
    except (RuntimeError, KeyError) as error:
        text = " ".join(str(error).split())[:500]
        raise ValueError(f"{where} does not fit the network of its definition: {text}") from error
    missing = [name for name, value in network.state_dict().items() if value.isnan().any()]
    unused = [name for name in state if UNUSED in name]
    left = [name for name in left if UNUSED not in name]
    if missing or left:
        raise ValueError(
            f"{where} does not fit the network of its definition: {_some(missing)} missing or no "
            f"numbers, {_some(left)} too many"
        )
    logger.info(
        "%s: written by monai-generative; %s that it never applies are left out",
        where,
        _some(unused),
    )


@torch.no_grad()
def _fill_from_older(network: nn.Module, state: dict) -> list[str]:
    """Lets MONAI read monai-generative's names; gives those left over.

    What MONAI does not find would keep its drawn values in silence: they are NaN before.
    """
    for parameter in network.parameters():
        parameter.fill_(torch.nan)
    if isinstance(network, ControlNet):
        for name in network.state_dict():
            older = name.replace(".attn.to_", ".to_")
            if older != name and older in state:
                state[name] = state.pop(older)
    network.load_old_state_dict(state)  # takes what it finds out of the mapping
    return list(state)


def _some(names: list[str]) -> str:
    """How many names a list has, and the first of them."""
    shown = f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
    return f"{len(names)} tensors{shown}"

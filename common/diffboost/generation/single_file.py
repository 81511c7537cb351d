"""Single-file checkpoints: original latent diffusion, ControlLDM, ControlNet, our own model.pt.

The layouts are told apart by the groups of their keys and converted by diffusers' own functions.
Files are never unpickled beyond tensors and plain containers, and only the tensors asked for are
read from disk.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils
from huggingface_hub.constants import HF_HUB_CACHE
from torch import nn
from transformers import CLIPTokenizer

from diffboost.data.weights import read_state, tensor_names

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
    "controlnet": "control_model.",
}
BACKBONES = (
    "latent diffusion (model.diffusion_model.*, first_stage_model.*, "
    "cond_stage_model.transformer.*) and ControlLDM (these and control_model.*)"
)
BRANCHES = (
    "our own model.pt (controlnet.*, unet.*), ControlNet (control_model.*, or its input_blocks.*, "
    "input_hint_block.*, zero_convs.*) and diffusers' ControlNetModel (controlnet_down_blocks.*)"
)
# Saved by older versions, made anew by the present ones.
BUFFERS = ("position_ids",)
CLIP = "openai/clip-vit-large-patch14"  # brings Stable Diffusion 1.5's tokenizer


def key_groups(path: str | Path) -> Counter:
    """The first words of the names in a checkpoint and how many tensors have them."""
    stamp = Path(path).stat()
    return Counter(_key_groups(str(path), stamp.st_size, stamp.st_mtime_ns))


@lru_cache(maxsize=8)
def _key_groups(path: str, size: int, changed_ns: int) -> dict[str, int]:
    """Groups of a file that has not changed since: known prefixes first, else the first word."""
    names = tensor_names(path)
    known = tuple(PREFIXES.values())
    groups = [next((p for p in known if n.startswith(p)), n.split(".")[0] + ".") for n in names]
    return dict(Counter(groups))


def holds_unet(path: str | Path) -> bool:
    """Whether weights of a branch bring a UNet with them, in our layout or the original one.

    Args:
        path: the file.

    Source: engineering choice.
    """
    groups = key_groups(path)
    return bool(groups["unet."] or groups[PREFIXES["unet"]])


def refuse_layout(path: str | Path, understood: str, key: str) -> ValueError:
    """The error for a checkpoint of unknown layout: its key groups, and what is understood."""
    groups = ", ".join(f"{name}* ({count})" for name, count in key_groups(path).most_common(12))
    return ValueError(
        f"{key}: the layout of {path} is not known; it holds {groups or 'no tensors'}; "
        f"understood are {understood}"
    )


def parts_of(path: str | Path) -> set[str]:
    """The parts that a single-file backbone holds, of unet, vae, text_encoder and controlnet.

    Raises:
        ValueError: it holds no UNet of a known layout.

    Source: engineering choice.
    """
    groups = key_groups(path)
    parts = {part for part, prefix in PREFIXES.items() if groups[prefix]}
    if "unet" not in parts:
        raise refuse_layout(path, BACKBONES, "backbone")
    return parts


def load_single_file(
    path: str | Path, part: str, build: Callable[[], nn.Module], config: Mapping
) -> nn.Module:
    """A part of a single-file backbone.

    Args:
        path: the checkpoint.
        part: unet, vae, text_encoder or controlnet.
        build: makes the part without weights; called on the meta device, but for the text encoder.
        config: the part's configuration.

    Raises:
        ValueError: unknown layout, or tensors are missing, too many or of another shape.

    Source: diffusers' ``convert_ldm_*_checkpoint``.
    """
    if part not in parts_of(path):
        raise refuse_layout(path, BACKBONES + f", and the part {part!r} is looked for", "backbone")
    if part == "unet" and key_groups(path)["model_ema."]:
        logger.info("%s holds averaged weights (model_ema.*) too; the plain ones are used", path)
    # The text encoder has buffers that no file holds.
    with torch.device("cpu" if part == "text_encoder" else "meta"):
        network = build()
    fill(network, read_state(path, PREFIXES[part], "backbone"), part, config, f"backbone: {path}")
    return network


def read_tokenizer(place: str | Path, subfolder: str = "") -> CLIPTokenizer:
    """A tokenizer from a folder or the hub; transformers gives an empty one where there is none.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.

    Source: engineering choice.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place, subfolder=subfolder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"backbone: the tokenizer in {place} is damaged: {error}") from error
    if tokenizer.vocab_size <= len(set(tokenizer.all_special_tokens)):
        raise OSError(f"no vocabulary in {place}/{subfolder}")
    return tokenizer


def load_tokenizer(path: str | Path) -> CLIPTokenizer:
    """The tokenizer of a single-file backbone: in ``tokenizer/`` beside it, else CLIP's own.

    Raises:
        FileNotFoundError: it is at neither place; the command that gets it is given.

    Source: latent diffusion's text encoder is CLIP ViT-L/14.
    """
    beside = Path(path).parent / "tokenizer"
    try:
        return read_tokenizer(beside if beside.is_dir() else CLIP)
    except OSError as error:
        raise FileNotFoundError(
            f"backbone: the tokenizer of {path} was looked for in {beside} and, as {CLIP}, on the "
            f"hub and in its local cache {HF_HUB_CACHE}; `hf download {CLIP} vocab.json merges.txt "
            f"tokenizer_config.json special_tokens_map.json --local-dir {beside}` on a machine "
            "with a network gets it"
        ) from error


def fill(network: nn.Module, state: dict, part: str, config: Mapping, where: str) -> None:
    """Put a checkpoint's tensors into a network, converted from their original names.

    Args:
        network: gets the tensors; may lie on the meta device.
        state: name to tensor, of this part alone.
        part: unet, vae, text_encoder or controlnet.
        config: the part's configuration.
        where: key and file, for the message.

    Raises:
        ValueError: tensors are missing, too many or of another shape; they are named.

    Source: diffusers' ``convert_ldm_*_checkpoint``.
    """
    state = {name: value for name, value in state.items() if not name.endswith(BUFFERS)}
    converted = {name: v for name, v in _convert(state, part, config).items() if v is not None}
    if part == "text_encoder" and not hasattr(network, "text_model"):
        # transformers 5.6 dropped this level
        converted = {name.removeprefix("text_model."): v for name, v in converted.items()}
    expected = network.state_dict()
    used = {value.data_ptr() for value in converted.values()}  # conversion copies nothing
    left = [name for name, value in state.items() if value.data_ptr() not in used]
    complaints = {
        "missing": sorted(set(expected) - set(converted)),
        "too many": sorted(set(converted) - set(expected)) + left,
        "of another shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
            for name, value in converted.items()
            if name in expected and value.shape != expected[name].shape
        ],
    }
    found = [f"{_some(names)} {what}" for what, names in complaints.items() if names]
    if found:
        raise ValueError(
            f"{where} does not fit the {part}: {'; '.join(found)}; the architecture is that of "
            f"{part}/config.json beside a backbone's file, else Stable Diffusion 1.5's"
        )
    network.load_state_dict(converted, assign=True)


def fill_branch(controlnet: nn.Module, unet: nn.Module, path: str | Path) -> None:
    """Put a ControlNet or ControlLDM file into a branch, and into the UNet if the file holds one.

    Args:
        controlnet: diffusers' ControlNetModel.
        unet: the UNet that it belongs to.
        path: the file; its ``control_model.`` may be left out.

    Raises:
        ValueError: unknown layout, or tensors are missing, too many or of another shape.

    Source: released code's checkpoints (``control_model.*``); diffusers' conversion.
    """
    groups = key_groups(path)
    prefix = PREFIXES["controlnet"] if groups[PREFIXES["controlnet"]] else ""
    if not (prefix or groups["input_hint_block."] or groups["controlnet_down_blocks."]):
        raise refuse_layout(path, BRANCHES, "weights")
    where = f"weights: {path}"
    fill(controlnet, read_state(path, prefix), "controlnet", controlnet.config, where)
    if groups[PREFIXES["unet"]]:
        fill(unet, read_state(path, PREFIXES["unet"]), "unet", unet.config, where)


def _convert(state: dict, part: str, config: Mapping) -> dict[str, torch.Tensor]:
    """Tensors under diffusers' names; where a block is missing, what could be converted."""
    if part == "text_encoder":
        return single_file_utils.convert_ldm_clip_checkpoint(state)
    name = (
        f"convert_ldm_{part}_checkpoint"
        if part != "controlnet"
        else "convert_controlnet_checkpoint"
    )
    return getattr(single_file_utils, name)(state, config)


def _some(names: list[str]) -> str:
    """The first names of a list and how many it has."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} tensors ({shown})"

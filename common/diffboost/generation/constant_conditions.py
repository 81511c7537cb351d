"""What a sampler's passes owe to prompts and edges alone, computed once and not in every step."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from diffboost.generation.monai_part import MonaiPart
from diffboost.generation.networks import ControlledUNet


def different_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a batch that differ, and which of them each row is.

    Args:
        tensor: (B, ...). On the meta device, where nothing can be compared, all rows differ.

    Returns:
        (U, ...) with U <= B, and (B,) integers below U.

    Source: engineering choice.
    """
    if tensor.is_meta:
        return tensor, torch.arange(len(tensor), device=tensor.device)
    rows, places = torch.unique(tensor.flatten(1), dim=0, return_inverse=True)
    return rows.reshape(-1, *tensor.shape[1:]), places


@contextlib.contextmanager
def constant_conditions(
    network: ControlledUNet,
    context: torch.Tensor,
    edge: torch.Tensor,
    negative_context: torch.Tensor | None = None,
) -> Iterator[None]:
    """For its duration, the hint's features and the text's keys and values come from memory.

    Until it ends the network may see these conditions and no others: a batch of them, or twice as
    many rows, the negative half first. The edges pass through the branch's hint net once, each
    different context once through every cross-attention's projections to keys and values, of UNet
    and branch. Contexts pass one by one, edges as a batch of their number: so a variant's rounding
    does not depend on which others share its batch.

    Args:
        network: its modules answer from memory.
        context: prompt embeddings (B, tokens, width).
        edge: hints (B, 1, H, W).
        negative_context: (B, tokens, width), where there is a second half.

    Source: issue 6, "hint features once per edge, not once per step; text keys shared by variants".
    """
    number, hint_net = len(edge), network.controlnet.controlnet_cond_embedding
    hints = edge.expand(-1, network.controlnet.config.conditioning_channels, -1, -1)
    places = torch.arange(number, device=edge.device)
    spread = {number: places, 2 * number: places.repeat(2)}
    forwards = {hint_net: _remembering(hint_net, [hints], spread)}
    halves = [context] if negative_context is None else [negative_context, context]
    contexts, places = different_rows(torch.cat(halves))
    spread = {len(places): places, number: places[-number:]}
    for projection in _text_projections(network):
        forwards[projection] = _remembering(projection, contexts.split(1), spread)
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _text_projections(network: ControlledUNet) -> Iterator[nn.Module]:
    """The projections whose input is the context as it is given to the network."""
    for part in (network.base, network.controlnet):
        if isinstance(part, MonaiPart):
            yield from part.text_projections()
            continue
        if part.encoder_hid_proj is not None:  # the context is changed before it gets to them
            continue
        for module in part.modules():
            crossed = isinstance(module, Attention) and module.is_cross_attention
            if crossed and module.norm_cross is None:
                yield from (module.to_k, module.to_v)


def _remembering(
    module: nn.Module, batches: Sequence[torch.Tensor], spread: dict[int, torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward that computes its outputs at its first call and later gives what it had.

    Args:
        module: whose forward it takes the place of.
        batches: its inputs, in the batches in which they pass.
        spread: number of rows that come to which of the inputs each is.
    """
    compute, outputs = module.forward, []

    def forward(rows: torch.Tensor) -> torch.Tensor:
        if not outputs:
            outputs.append(torch.cat([compute(batch) for batch in batches]))
        return outputs[0][spread[len(rows)]]

    return forward

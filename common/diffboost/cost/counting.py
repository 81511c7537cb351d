"""Counts a step of real modules on the meta device: FLOPs, and the bytes alive at its peak."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

META = torch.device("meta")
PLAIN_ATTENTION = functional.scaled_dot_product_attention
LARGEST_FUSED_HEAD = 256  # wider heads than this have no flash attention on a GPU


@dataclass(frozen=True)
class Count:
    """FLOPs of a step, and bytes of the tensors that it makes, at the moment of most."""

    flops: float = 0.0
    activation_bytes: int = 0

    def __add__(self, other: "Count") -> "Count":
        """One step after the other: FLOPs add up, of the peaks the larger stays."""
        peak = max(self.activation_bytes, other.activation_bytes)
        return Count(self.flops + other.flops, peak)

    def times(self, number: float) -> "Count":
        """The same step so many times."""
        return Count(self.flops * number, self.activation_bytes)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make, until they are freed.

    Args:
        known: tensors that were there before (weights, gradients); their views are not counted.

    Source: engineering choice (the idea of torch's own, private memory tracker)
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.seen = {id(tensor.untyped_storage()): tensor for tensor in known}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator and notes storages not seen before."""
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self.seen:
            return
        self.seen[id(storage)] = None
        weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        del self.seen[key]
        self.bytes -= num_bytes


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """Flash attention in place of torch's choice on the meta device, the plain form."""
    wide = query.shape[-1] > LARGEST_FUSED_HEAD
    if wide or attn_mask is not None or options.get("enable_gqa"):
        return PLAIN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, scale=options.get("scale"))[0]


def _attention_backward_flops(gradient, query, key, value, *others, **options) -> int:
    """Twice the forward's, as of plain attention; what a kernel computes again is its affair."""
    return 2 * sdpa_flop_count(query, key, value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as GPUs run it, which keeps no matrix of all tokens by all tokens.

    Source: engineering choice (a torch function mode would miss what checkpointing recomputes)
    """
    functional.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = PLAIN_ATTENTION


def count(step: Callable[[], object], modules: Iterable[nn.Module]) -> Count:
    """Counts one step.

    Args:
        step: computes on the meta device; it makes its own inputs, and runs backward if it trains.
        modules: what it uses; their weights and gradients are no activations.

    Returns:
        FLOPs by torch's FlopCounterMode (2 a multiply-add of convolutions, linear layers and
        attention, backward and recomputed passes included; norms and the like are not counted),
        and the peak of live bytes in the precision of the modules, with fused attention.

    Source: engineering choice (counted passes instead of formulas)
    """
    modules = list(modules)
    for module in modules:  # there are gradients from the second step on
        for weight in (p for p in module.parameters() if p.requires_grad):
            weight.grad = torch.zeros_like(weight)
    known = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    known += [tensor.grad for tensor in known if tensor.grad is not None]
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    counter = FlopCounterMode(
        display=False, custom_mapping={flash_backward: _attention_backward_flops}
    )
    with fused_attention(), counter, LiveBytes(known) as live:
        step()
    return Count(float(counter.get_total_flops()), live.peak)


def inference(forward: Callable[[], object], modules: Iterable[nn.Module]) -> Count:
    """Counts a forward pass without gradients; see ``count``."""

    def step() -> None:
        with torch.no_grad():
            forward()

    return count(step, modules)


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors take, a shared storage once."""
    storages = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's states after one step, on the meta device.

    Args:
        optimizer: of parameters that have gradients.

    Source: engineering choice (states as the optimizer makes them)
    """
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return num_bytes(value for value in states if isinstance(value, torch.Tensor))

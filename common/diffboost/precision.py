"""Mixed precision on any device: MONAI's own ``amp`` is for CUDA alone."""

import torch
from monai.inferers import SimpleInferer
from torch import nn

from diffboost.knobs import nearest

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast_dtype(precision: str) -> torch.dtype:
    """The type that autocast computes in; float32 stands for no autocast.

    Raises:
        ValueError: ``precision`` is none of float32, bfloat16, float16.

    Source: engineering choice.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not known; {nearest(precision, PRECISIONS)}")
    return PRECISIONS[precision]


def choose_bfloat16(amp: bool | str, device: str | torch.device) -> bool:
    """Whether passes run in bfloat16.

    Args:
        amp: true, false, or ``auto``: where the device is made for it: a GPU with bfloat16, or a
            processor with AVX-512. Others emulate it, ten times slower than float32 (measured on
            an AMD EPYC with AVX2).
        device: where the network runs.

    Raises:
        ValueError: ``amp`` is none of these.

    Source: engineering choice.
    """
    if amp != "auto":
        if not isinstance(amp, bool):
            raise ValueError(f"amp: {amp!r} is not known; allowed: true, false, auto")
        return amp
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


class AutocastInferer(SimpleInferer):
    """Runs a network in half precision where that is asked for, and gives float32 back.

    Args:
        amp: short for the precision bfloat16, which needs no loss scaling.
        precision: float32, bfloat16 or float16.

    Raises:
        ValueError: ``precision`` is unknown.

    Source: engineering choice.
    """

    def __init__(self, amp: bool = False, precision: str = "float32") -> None:
        super().__init__()
        self.dtype = torch.bfloat16 if amp else autocast_dtype(precision)

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs):
        """What the network gives, a tensor or a tuple of tensors, in float32."""
        enabled = self.dtype != torch.float32
        with torch.autocast(inputs.device.type, dtype=self.dtype, enabled=enabled):
            output = super().__call__(inputs, network, *args, **kwargs)
        if isinstance(output, tuple):
            return tuple(part.float() for part in output)
        return output.float()

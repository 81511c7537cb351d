"""Mixed precision on any device: MONAI's own ``amp`` is for CUDA alone."""

import torch
from monai.inferers import Inferer, SimpleInferer
from torch import nn

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


class AutocastInferer(Inferer):
    """Runs a network, or another inferer, under autocast and gives float32 back.

    Args:
        precision: fp32 (no autocast) or bf16; bf16 needs no loss scaling.
        inferer: how the network is run; None calls it with the inputs.

    Raises:
        ValueError: ``precision`` is neither.

    Source: engineering choice.
    """

    def __init__(self, precision: str = "fp32", inferer: Inferer | None = None) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision: {precision!r} is not one of {sorted(PRECISIONS)}")
        self.dtype = PRECISIONS[precision]
        self.inferer = SimpleInferer() if inferer is None else inferer

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs):
        """What the network gives, each tensor in float32."""
        if self.dtype is None:
            return self.inferer(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, dtype=self.dtype):
            output = self.inferer(inputs, network, *args, **kwargs)
        if isinstance(output, tuple):
            return tuple(part.float() for part in output)
        return output.float()

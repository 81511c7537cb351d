"""Mixed precision on any device: MONAI's own ``amp`` is for CUDA alone."""

import torch
from monai.inferers import SimpleInferer
from torch import nn


class AutocastInferer(SimpleInferer):
    """Runs a network in bfloat16 where that is asked for, and gives float32 back.

    Args:
        amp: autocast to bfloat16, which needs no loss scaling.

    Source: engineering choice.
    """

    def __init__(self, amp: bool = False) -> None:
        super().__init__()
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs):
        """What the network gives, a tensor or a tuple of tensors, in float32."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            output = super().__call__(inputs, network, *args, **kwargs)
        if isinstance(output, tuple):
            return tuple(part.float() for part in output)
        return output.float()

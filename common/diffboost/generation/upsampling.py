"""Upsampling convolutions without their double work: nearest neighbors are not convolved twice."""

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.functional import conv_transpose2d, interpolate


def fold_kernel(weight: torch.Tensor) -> torch.Tensor:
    """The kernel that does on an image what ``weight`` does on the image of twice the side.

    Args:
        weight: (O, I, 3, 3) of a convolution with padding 1, behind a nearest-neighbor doubling.

    Returns:
        (I, O, 4, 4) for a transposed convolution of stride 2 and padding 1: 16 multiplications a
        pixel of the image in place of 36. Equal but for rounding; gradients go to ``weight``.

    Source: engineering choice; the doubling is a convolution with a 2 x 2 box, and convolutions
        of convolutions are one (Shi et al. 2016 for the idea of sub-pixel convolution).
    """
    for dim in (-1, -2):
        first, middle, last = weight.unbind(dim)
        weight = torch.stack([last, middle + last, first + middle, first], dim)
    return weight.transpose(0, 1)


class FoldedUpsample(nn.Module):
    """diffusers' ``Upsample2D`` with a 3 x 3 convolution, by the folded kernel.

    The weight keeps its name and is what is trained, moved and saved.

    Args:
        upsample: what it takes the place of; its ``conv`` is kept.
        frozen: fold now, once, for a weight that will not change; otherwise in every call, which
            costs as much as the convolution of one pixel.

    Source: engineering choice (see :func:`fold_kernel`).
    """

    def __init__(self, upsample: Upsample2D, frozen: bool) -> None:
        super().__init__()
        self.conv = upsample.conv
        kernel = fold_kernel(self.conv.weight).detach() if frozen else None
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, hidden_states: torch.Tensor, output_size=None) -> torch.Tensor:
        """Features (B, O, 2 h, 2 w) of features (B, I, h, w).

        Args:
            hidden_states: the features.
            output_size: (height, width) to give instead; an odd one, where the encoder rounded up,
                ends between neighbors and is made the long way.
        """
        doubled = [2 * side for side in hidden_states.shape[-2:]]
        if output_size is not None and list(output_size) != doubled:
            return self.conv(interpolate(hidden_states, size=output_size, mode="nearest"))
        kernel = fold_kernel(self.conv.weight) if self.kernel is None else self.kernel
        return conv_transpose2d(hidden_states, kernel, self.conv.bias, stride=2, padding=1)


def fold_upsampling(network: nn.Module, frozen: bool = False) -> None:
    """Replaces the upsampling convolutions of a diffusers network; names of weights stay.

    Args:
        network: a UNet or an autoencoder.
        frozen: its weights will not change any more.

    Source: engineering choice (see :func:`fold_kernel`).
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Upsample2D) and _can_fold(child):
                setattr(module, name, FoldedUpsample(child, frozen))


def _can_fold(upsample: Upsample2D) -> bool:
    """Whether it is a nearest-neighbor doubling and a 3 x 3 convolution, and nothing else."""
    convolved = upsample.use_conv and not upsample.use_conv_transpose and upsample.name == "conv"
    plain = convolved and upsample.interpolate and upsample.norm is None
    return plain and upsample.conv.kernel_size == (3, 3) and upsample.conv.padding == (1, 1)

"""How a segmenter lies in memory while it is trained: faster steps of the same mathematics."""

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import group_norm, leaky_relu
from torch.nn.modules.batchnorm import _BatchNorm


class _InstanceNorm(Function):
    """(x - mean) / sqrt(variance + eps) over the middle axis of (B, HW, C).

    The output is not kept for the way back: what follows may write into it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, eps: float) -> torch.Tensor:
        share = _share(x)
        mean = torch.bmm(share, x)
        normed = x - mean
        scale = torch.rsqrt(torch.bmm(share, normed * normed) + eps)
        ctx.save_for_backward(x, mean, scale)
        return normed.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, mean, scale = ctx.saved_tensors
        share = _share(grad)
        # scale * (grad - mean of grad - normed * mean of grad * normed), in one buffer
        buffer = (x - mean).mul_(grad)
        along = torch.bmm(share, buffer).mul_(scale**3)
        offset = torch.addcmul(mean * along, scale, torch.bmm(share, grad), value=-1)
        torch.addcmul(offset, x, along, value=-1, out=buffer)
        return buffer.addcmul_(grad, scale), None


class _PReLU(Function):
    """x, or weight * x below zero; the weight's gradient is one dot product."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return leaky_relu(x, weight.item())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        below = x.clamp_max(0)
        slope = torch.dot(_pixels(grad).flatten(), _pixels(below).flatten())
        backward = torch.ops.aten.leaky_relu_backward.grad_input
        return backward(grad, x, weight.item(), False, grad_input=below), slope.reshape(1)


def _share(values: torch.Tensor) -> torch.Tensor:
    """The (B, 1, HW) whose product with (B, HW, C) is the mean over the pixels."""
    batch, count, _ = values.shape
    return values.new_full((batch, 1, count), 1 / count)


def _pixels(image: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as (B, HW, C), in the memory as it is."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


class LaidOutInstanceNorm(nn.InstanceNorm2d):
    """nn.InstanceNorm2d that keeps the layout (B, H, W, C); torch's gives back (B, C, H, W).

    On processors means are matrix products, a third of the time that torch's norms take forth and
    back; elsewhere it is a group norm of one channel each.

    Source: engineering choice (issue 6, "Segmentation"); torch.nn.InstanceNorm2d
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalized input, (B, C, H, W), float32 where it was float32 or bfloat16."""
        if input.device.type != "cpu":
            return group_norm(input, self.num_features, self.weight, self.bias, self.eps)
        with torch.autocast("cpu", enabled=False):
            normed = _InstanceNorm.apply(_pixels(input.float()), self.eps)
        normed = normed.unflatten(1, input.shape[2:]).permute(0, 3, 1, 2)
        if self.weight is None:
            return normed
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class LaidOutPReLU(nn.PReLU):
    """nn.PReLU of one weight; on processors in a third of the time that torch's takes.

    Source: engineering choice (issue 6, "Segmentation"); torch.nn.PReLU
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The input (B, C, …), times the weight where it is below zero."""
        if input.device.type != "cpu" or input.ndim != 4:
            return super().forward(input)
        return _PReLU.apply(input, self.weight.to(input.dtype))


def lay_out(network: nn.Module, channels_last: bool) -> nn.Module:
    """Lays a network out for training, in place; names, values and gradients of weights stay.

    A ReLU that follows a batch norm at once in a Sequential overwrites the norm's output, which
    nothing else reads: the norm's gradient comes from its input, the ReLU's from its output.

    Args:
        network: on its device.
        channels_last: lay convolutions out as (B, H, W, C).

    Returns:
        The same network.

    Source: engineering choice (issue 6, "Segmentation").
    """
    for module in network.modules():
        if not isinstance(module, nn.Sequential):
            continue
        layers = [layer for layer in module if not (isinstance(layer, nn.Dropout) and layer.p == 0)]
        for before, layer in zip(layers, layers[1:], strict=False):
            if isinstance(before, _BatchNorm) and isinstance(layer, nn.ReLU):
                layer.inplace = True
    if channels_last:
        network.to(memory_format=torch.channels_last)
        for module in network.modules():
            if type(module) is nn.InstanceNorm2d and not module.track_running_stats:
                module.__class__ = LaidOutInstanceNorm
            if type(module) is nn.PReLU and module.num_parameters == 1:
                module.__class__ = LaidOutPReLU
    return network

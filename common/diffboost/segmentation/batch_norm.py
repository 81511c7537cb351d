"""Batch norm over the batches of all processes, on any device."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffboost.processes import process_rank_and_count, sum_over_processes


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes whose gradient is summed likewise."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        """The sum, on every process."""
        return sum_over_processes(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """Every process's loss depends on every process's tensor."""
        return sum_over_processes(gradient)


class ProcessBatchNorm(_BatchNorm):
    """nn.BatchNorm1d, 2d or 3d whose statistics in training are those of all processes' batches.

    Batches may differ in size. Deviations are taken from the common mean, not from E[x²] − E[x]²,
    which loses digits.

    Source: torch.nn.SyncBatchNorm, which refuses tensors that are not on a GPU.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any (B, C, …)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalized input, (B, C, …)."""
        if not self.training or process_rank_and_count()[1] == 1:
            return super().forward(input)
        shape = (1, -1, *[1] * (input.ndim - 2))
        axes = [axis for axis in range(input.ndim) if axis != 1]
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        count = values.new_tensor([values.numel() / values.shape[1]])
        total = SumOverProcesses.apply(torch.cat([values.sum(axes), count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()  # at least 2, one a process
        centered = values - mean.view(shape)
        variance = SumOverProcesses.apply(centered.square().sum(axes)) / count
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * count / (count - 1))
        normalized = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(input.dtype)

    def _follow(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Moves the running statistics; momentum None is a plain average, as in torch."""
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def synchronize_batch_norm(network: nn.Module) -> nn.Module:
    """Makes every batch norm of a network one of all processes, in place.

    Parameters, buffers and their names stay. On a GPU these are torch's own, elsewhere ours.

    Args:
        network: on the device on which it is trained.

    Returns:
        The same network.

    Source: engineering choice (two processes with half the batch train as one)
    """
    if next(network.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.__class__ = ProcessBatchNorm  # the parameters are in the optimizer already
    return network

"""Processes of torch.distributed: which one this is, and what all of them do together.

Ranks need no seeds of their own: every draw has an address (``data.addresses``), so that any number
of processes draws what one process would have drawn.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist


def process_rank_and_count() -> tuple[int, int]:
    """This process's number from 0 and how many there are; (0, 1) without torch.distributed.

    Nothing else in this package asks torch.distributed who it is.

    Source: engineering choice.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Whether this process writes the files that there is one of: rank 0, or the only one."""
    return process_rank_and_count()[0] == 0


def wait_for_processes() -> None:
    """Wait until every process is here; nothing where there is one."""
    if process_rank_and_count()[1] > 1:
        dist.barrier()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor, the sum of every process's; without gradient."""
    total = tensor.detach().clone()
    if process_rank_and_count()[1] > 1:
        dist.all_reduce(total)
    return total


def gather_objects(value: object) -> list:
    """Every process's value (it is pickled), in the order of the ranks.

    Source: engineering choice.
    """
    _, count = process_rank_and_count()
    values = [value] * count
    if count > 1:
        dist.all_gather_object(values, value)
    return values


class ShareOfLoss:
    """A loss whose mean over the processes is the loss of all their samples together.

    DistributedDataParallel averages gradients over processes as if all had equally many samples;
    in the last step of an epoch they may not. The process's loss is multiplied by its samples over
    the mean number of samples; equal batches are left as they are.

    Args:
        loss: (prediction, target (B, …)) to a mean over the batch.

    Source: engineering choice.
    """

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        self.loss = loss

    def __call__(self, prediction, target: torch.Tensor) -> torch.Tensor:
        """The loss, weighted."""
        loss = self.loss(prediction, target)
        return loss * self.share(len(target), target.device)

    def share(self, num_samples: int, device: torch.device | str) -> torch.Tensor:
        """This process's samples over the mean number of samples; all processes ask at once."""
        _, count = process_rank_and_count()
        total = sum_over_processes(torch.tensor(float(num_samples), device=device))
        return num_samples * count / total

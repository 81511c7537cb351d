"""Processes of torch.distributed: which one this is, and what all of them do together."""

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

"""Random draws by address: every sample's randomness comes from (seed, epoch, index) alone."""

import hashlib
from collections.abc import Iterator, Sequence, Sized

import numpy as np
from monai.data import CacheDataset
from monai.transforms import Compose, Randomizable, Transform
from torch.utils.data import Sampler

from diffboost.processes import process_rank_and_count


def address_seed(*parts: int | str) -> int:
    """A 32-bit seed for the draw that lives at this address.

    Args:
        parts: what names the draw: ``(seed, epoch, index)``, ``(seed, case, slice, variant)`` …

    Returns:
        An integer in [0, 2**32); equal parts give equal seeds on every machine.

    Source: engineering choice (design, "Randomness").
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def share_state(transform: Transform, state: np.random.RandomState) -> None:
    """All random members of a transform draw from one state, which one seed sets for all of them.

    MONAI gives each member a state of its own for each seed; making one takes a quarter of a
    millisecond, a tenth of a segmenter's training step in all.

    Args:
        transform: one transform, or a Compose of them, at any depth.
        state: what they draw from, in the order in which they act.

    Source: engineering choice
    """
    if isinstance(transform, Compose):
        transform.R = state  # its set_random_state would seed the members first
        for member in transform.transforms:
            share_state(member, state)
    elif isinstance(transform, Randomizable):
        transform.set_random_state(state=state)


class AddressedDataset(CacheDataset):
    """A data set whose random transforms are seeded from (seed, epoch, index) before every item.

    Deterministic transforms at the head of ``transform`` run once and stay in memory. Worker count,
    batch size, number of processes and order of arrival change nothing in what an address gives.

    Args:
        data: items, one dictionary a sample.
        transform: a Compose whose random members draw from MONAI's ``self.R`` only.
        seed: the run's seed.
        cache: keep the output of the deterministic head in memory.

    Raises:
        ValueError: ``data`` is empty.

    Source: engineering choice (design, "Randomness").
    """

    def __init__(
        self,
        data: Sequence[dict],
        transform: Compose | None = None,
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        if len(data) == 0:
            raise ValueError("data: the list of samples is empty; at least one sample is needed")
        self.seed = seed
        transform = transform if isinstance(transform, Compose) else Compose(transform)
        super().__init__(
            data=data, transform=transform, cache_rate=1.0 if cache else 0.0, num_workers=1
        )
        self.state = np.random.RandomState(0)

    def __getitem__(self, address: int | tuple[int, int]) -> dict:
        """The sample at ``(epoch, index)``; a bare index means epoch 0."""
        epoch, index = address if isinstance(address, tuple) else (0, address)
        self.state.seed(address_seed(self.seed, epoch, index))
        share_state(self.transform, self.state)  # each time: loaders set others
        return super().__getitem__(index)


class AddressedSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index); the order of an epoch comes from (seed, epoch) alone.

    With torch.distributed, process r takes positions r, r + processes, r + 2 processes … of each
    step: the union of the processes' batches is the batch that one process with a batch of
    batch_size x processes would have had. What is left for the last step is dealt out in the same
    way, so that its batches may differ by one sample (``processes.ShareOfLoss`` weights them).
    All processes make equally many steps: where fewer samples than processes are left, each process
    that would have none takes one of these samples too.

    Args:
        data_source: the data set, for its length.
        seed: the run's seed.
        shuffle: draw a new order each epoch; otherwise ascending.
        batch_size: samples a step of one process, as the loader has it.
        drop_last: leave out the samples of a last step that would not be full.

    Raises:
        ValueError: ``batch_size`` is below 1, or ``drop_last`` would leave no step.

    Source: engineering choice (design, "Randomness").
    """

    def __init__(
        self,
        data_source: Sized,
        seed: int = 0,
        shuffle: bool = True,
        batch_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.data_source = data_source
        self.seed = seed
        self.shuffle = shuffle
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self.steps_done = 0
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}; at least 1 is needed")
        self.rank, self.num_processes = process_rank_and_count()
        if len(self) == 0:
            raise ValueError(
                f"batch_size: {batch_size} in {self.num_processes} processes is more than the "
                f"{len(data_source)} samples; the last, smaller batch is left out here"
            )

    def __len__(self) -> int:
        """Samples of one epoch on this process."""
        return len(self._share(np.arange(len(self.data_source))))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The addresses of the next epoch on this process."""
        order = np.arange(len(self.data_source))
        if self.shuffle:
            generator = np.random.RandomState(address_seed(self.seed, self.epoch, "order"))
            order = generator.permutation(len(order))
        epoch, self.epoch = self.epoch, self.epoch + 1
        done, self.steps_done = self.steps_done * self.batch_size, 0
        for index in self._share(order)[done:]:
            yield (epoch, int(index))

    def go_on(self, epoch: int, steps_done: int) -> None:
        """Begins with the given epoch, from 0, behind its first steps; for a run that was stopped.

        Source: engineering choice (issue 5, "Exact resume, every stage").
        """
        self.epoch, self.steps_done = epoch, steps_done

    def _share(self, order: np.ndarray) -> np.ndarray:
        """This process's part of an epoch's order."""
        full = len(order) - len(order) % (self.batch_size * self.num_processes)
        share, rest = order[:full][self.rank :: self.num_processes], order[full:]
        if self.drop_last or len(rest) == 0:
            return share
        own = rest[self.rank :: self.num_processes]
        return np.append(share, own if len(own) else rest[self.rank % len(rest)])


class ProcessShare(Sampler[int]):
    """Indices of this process's items, where each is needed once: every count-th one.

    No process may stand idle in an engine, so that with fewer items than processes every process
    has all of them.

    Args:
        data_source: the data set, for its length.

    Source: engineering choice.
    """

    def __init__(self, data_source: Sized) -> None:
        rank, count = process_rank_and_count()
        size = len(data_source)
        self.indices = range(rank, size, count) if size >= count else range(size)

    def __len__(self) -> int:
        """Items of this process."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """Their indices, ascending."""
        return iter(self.indices)


class ProcessBatches(Sampler[list[int]]):
    """Fixed batches of which each process makes whole ones.

    Item i is in batch i // batch_size at place i % batch_size; process k % processes has batch k.
    The last batch is filled up with copies of its last item. A network's rounding depends on the
    size of a batch and the place in it, so that only this gives the same bytes for any number of
    processes (each with as many threads).

    Args:
        data_source: the data set, for its length.
        batch_size: items a pass.

    Source: engineering choice.
    """

    def __init__(self, data_source: Sized, batch_size: int) -> None:
        rank, count = process_rank_and_count()
        last = len(data_source) - 1
        self.batches = [
            [min(start + place, last) for place in range(batch_size)]
            for start in range(rank * batch_size, last + 1, count * batch_size)
        ]

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of each batch."""
        return iter(self.batches)

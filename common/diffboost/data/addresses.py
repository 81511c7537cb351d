"""Random draws by address: every sample's randomness comes from (seed, epoch, index) alone."""

import hashlib
from collections.abc import Iterator, Sequence, Sized

import numpy as np
from monai.data import CacheDataset
from monai.transforms import Compose
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

    def __getitem__(self, address: int | tuple[int, int]) -> dict:
        """The sample at ``(epoch, index)``; a bare index means epoch 0."""
        epoch, index = address if isinstance(address, tuple) else (0, address)
        self.transform.set_random_state(seed=address_seed(self.seed, epoch, index))
        return super().__getitem__(index)


class AddressedSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index); the order of an epoch comes from (seed, epoch) alone.

    With torch.distributed, process r takes positions r, r + world, r + 2 world …: the union of the
    processes' batches is the batch that one process would have had. The order is wrapped around so
    that every process makes the same number of steps.

    Args:
        data_source: the data set, for its length.
        seed: the run's seed.
        shuffle: draw a new order each epoch; otherwise ascending.

    Source: engineering choice (design, "Randomness").
    """

    def __init__(self, data_source: Sized, seed: int = 0, shuffle: bool = True) -> None:
        self.data_source = data_source
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.rank, self.num_processes = process_rank_and_count()

    def __len__(self) -> int:
        """Samples of one epoch on this process."""
        return -(-len(self.data_source) // self.num_processes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The addresses of the next epoch on this process."""
        size = len(self.data_source)
        order = np.arange(size)
        if self.shuffle:
            order = np.random.RandomState(address_seed(self.seed, self.epoch, "order")).permutation(
                size
            )
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = np.resize(order, len(self) * self.num_processes)
        for index in order[self.rank :: self.num_processes]:
            yield (epoch, int(index))

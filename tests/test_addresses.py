"""Draws come from (seed, epoch, index), never from workers, batches or processes."""

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, RandGaussianNoised, RandScaleIntensityd

from diffboost.data import addresses
from diffboost.data.addresses import (
    AddressedDataset,
    AddressedSampler,
    ProcessBatches,
    ProcessShare,
    address_seed,
)


def noisy_dataset(seed: int = 0) -> AddressedDataset:
    data = [{"image": torch.full((1, 4, 4), float(i))} for i in range(7)]
    transform = Compose(
        [
            RandGaussianNoised("image", prob=1.0, std=1.0),
            RandScaleIntensityd("image", factors=0.5, prob=0.5),
        ]
    )
    return AddressedDataset(data, transform, seed=seed)


def one_epoch(num_workers: int, batch_size: int) -> dict[int, np.ndarray]:
    dataset = noisy_dataset()
    sampler = AddressedSampler(dataset, seed=3)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers)
    images = torch.cat([batch["image"] for batch in loader]).numpy()
    order = [index for _, index in AddressedSampler(dataset, seed=3)]
    return {index: images[position] for position, index in enumerate(order)}


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 3), (1, 2), (2, 2)])
def test_workers_and_batch_size_change_nothing(num_workers, batch_size):
    reference = one_epoch(0, 7)
    images = one_epoch(num_workers, batch_size)
    assert all(np.array_equal(reference[i], images[i]) for i in range(7))


def test_epochs_and_seeds_draw_anew():
    dataset = noisy_dataset()
    first = dataset[(0, 2)]["image"]
    assert torch.equal(first, dataset[(0, 2)]["image"])
    assert not torch.equal(first, dataset[(1, 2)]["image"])
    assert not torch.equal(first, noisy_dataset(seed=1)[(0, 2)]["image"])


def test_sampler_is_a_new_permutation_each_epoch():
    sampler = AddressedSampler(range(50), seed=0)
    first, second = list(sampler), list(sampler)
    assert [epoch for epoch, _ in first] == [0] * 50 and [e for e, _ in second] == [1] * 50
    assert sorted(i for _, i in first) == list(range(50)) == sorted(i for _, i in second)
    assert [i for _, i in first] != [i for _, i in second]


def test_two_processes_share_an_epoch():
    samplers = [AddressedSampler(range(9), seed=0) for _ in range(2)]
    for rank, sampler in enumerate(samplers):
        sampler.rank, sampler.num_processes = rank, 2
    parts = [[i for _, i in sampler] for sampler in samplers]
    assert [len(part) for part in parts] == [5, 5]
    whole = [i for _, i in AddressedSampler(range(9), seed=0)]
    assert [i for pair in zip(*parts, strict=True) for i in pair][:9] == whole


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_samples", range(8, 17))
def test_processes_share_each_step_of_one(num_samples, drop_last):
    def steps(num_processes: int, rank: int) -> list[list[int]]:
        options = {"batch_size": 8 // num_processes, "drop_last": drop_last}
        sampler = AddressedSampler(range(num_samples), **options)
        sampler.rank, sampler.num_processes = rank, num_processes
        loader = DataLoader(range(num_samples), sampler=sampler, batch_size=1)
        assert len(loader) == len(order := [index for _, index in sampler])
        return [order[i : i + sampler.batch_size] for i in range(0, len(order), sampler.batch_size)]

    whole = steps(1, 0)
    for num_processes in (2, 4):
        shares = [steps(num_processes, rank) for rank in range(num_processes)]
        assert {len(share) for share in shares} == {len(whole)}
        for number, batch in enumerate(whole):
            joined = [index for share in shares for index in share[number]]
            assert set(joined) == set(batch)
            # a copy only where fewer samples are left than processes
            assert len(joined) == max(len(batch), num_processes)


def test_samples_too_few_for_a_step_are_refused():
    with pytest.raises(ValueError, match="batch_size: 8 in 1 processes is more than the 7 samples"):
        AddressedSampler(range(7), batch_size=8, drop_last=True)


@pytest.mark.parametrize(("num_items", "shares"), [(5, [[0, 2, 4], [1, 3]]), (1, [[0], [0]])])
def test_items_needed_once_are_shared(monkeypatch, num_items, shares):
    for rank in range(2):
        monkeypatch.setattr(addresses, "process_rank_and_count", lambda rank=rank: (rank, 2))
        assert list(ProcessShare(range(num_items))) == shares[rank]


def test_fixed_batches_are_dealt_whole_and_filled_up(monkeypatch):
    assert list(ProcessBatches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    monkeypatch.setattr(addresses, "process_rank_and_count", lambda: (1, 2))
    assert list(ProcessBatches(range(7), 3)) == [[3, 4, 5]]


def test_address_seed_is_stable_and_separates_parts():
    assert address_seed(0, 1, 2) == address_seed(0, 1, 2)
    assert address_seed(1, 12) != address_seed(11, 2)
    assert 0 <= address_seed("case", 5) < 2**32


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size: 0; at least 1"):
        AddressedSampler(range(8), batch_size=0)


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match="data: the list of samples is empty"):
        AddressedDataset([], Compose([]))

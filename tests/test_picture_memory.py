"""Decoded pictures in memory: the bits of the files, within a budget, shared by workers."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose
from PIL import Image
from small_store import write_store, write_variants

from diffboost.data import memory as memory_module
from diffboost.data.addresses import AddressedDataset, AddressedSampler
from diffboost.data.images import read_levels
from diffboost.data.memory import PictureMemory
from diffboost.data.transforms import LoadSliced
from diffboost.segmentation.augmentations import augmentation
from diffboost.segmentation.training import selection_items, training_items

SIZE = 32
SLICE_BYTES = SIZE * SIZE * 3  # 16-bit image and 8-bit label


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> list[dict]:
    """Training slices of a small store, with two variants each."""
    folder = tmp_path_factory.mktemp("memory")
    store = write_store(folder / "store", num_cases=4, image_size=SIZE)
    synthetic = write_variants(store, folder / "synthetic")
    return training_items(store, "diffboost", 0, SIZE, 3, synthetic_dir=synthetic)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that a memory reads."""
    seen: list[str] = []

    def count(path, key):
        seen.append(str(path))
        return read_levels(path, key)

    monkeypatch.setattr(memory_module, "read_levels", count)
    return seen


def samples(items, memory, arm="diffboost+nnunet", epochs=3):
    transform = Compose(
        [LoadSliced(["image", "label"], SIZE, memory=memory), augmentation(arm, memory=memory)]
    )
    dataset = AddressedDataset(items, transform, seed=5, cache=False)
    return [dataset[(epoch, index)] for epoch in range(epochs) for index in range(len(items))]


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key]))
        for a, b in zip(first, second, strict=True)
        for key in a
        if key != "case"
    )


@pytest.mark.parametrize("arm", ["baseline", "synthetic", "diffboost", "diffboost+nnunet"])
def test_remembered_samples_are_those_of_the_files_bit_by_bit(items, arm):
    read = samples(items, None, arm)
    assert same(read, samples(items, PictureMemory([items], SIZE, 1), arm))
    assert same(read, samples(items, PictureMemory([items], SIZE, 0), arm))


def test_levels_of_16_bit_pictures_become_units_exactly(tmp_path):
    levels = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 64 + 7
    Image.fromarray(levels).save(tmp_path / "a.png")
    item = {"image": str(tmp_path / "a.png")}
    load = LoadSliced("image", memory=PictureMemory([[item]], SIZE, 1))
    for _ in range(2):
        image = load(item)["image"][0]
        assert torch.equal(image, torch.from_numpy(levels.astype(np.float32)) / 32767.5 - 1)


def test_every_file_is_read_once(items, reads):
    memory = PictureMemory([items], SIZE, 1)
    samples(items, memory, "diffboost", epochs=8)
    assert len(reads) == len(set(reads)) <= 4 * len(items)
    assert len(reads) > 3 * len(items)  # eight draws of two variants meet nearly all


def test_the_budget_keeps_what_fits_slices_before_variants(items, reads):
    kept = 3
    memory = PictureMemory([items], SIZE, kept * SLICE_BYTES / memory_module.GIB)
    assert memory.size == kept * SLICE_BYTES and len(memory.places) == 2 * kept
    samples(items, memory, "diffboost", epochs=4)
    for number, item in enumerate(items):
        assert (
            reads.count(item["image"]) == reads.count(item["label"]) == (1 if number < kept else 4)
        )
    all_slices = PictureMemory([items], SIZE, len(items) * SLICE_BYTES / memory_module.GIB)
    assert set(all_slices.places) == {item[key] for item in items for key in ("image", "label")}


def test_no_budget_reads_each_time(items, reads):
    memory = PictureMemory([items], SIZE, 0)
    samples(items, memory, "baseline", epochs=2)
    assert memory.size == 0 and len(reads) == 4 * len(items)
    with pytest.raises(ValueError, match="cache_gib: -1; at least 0 is needed"):
        PictureMemory([items], SIZE, -1)


def test_a_sample_that_is_changed_changes_nothing_in_memory(items):
    memory = PictureMemory([items], SIZE, 1)
    load = LoadSliced(["image", "label"], memory=memory)
    first = load(items[0])
    for key in ("image", "label"):
        first[key].zero_()
    again = LoadSliced(["image", "label"])(items[0])
    assert all(torch.equal(load(items[0])[key], again[key]) for key in ("image", "label"))


def test_forked_workers_fill_one_memory(items, reads):
    memory = PictureMemory([items], SIZE, 1)
    transform = Compose([LoadSliced(["image", "label"], memory=memory), augmentation("baseline")])
    dataset = AddressedDataset(items, transform, cache=False)
    loader = DataLoader(
        dataset, batch_size=2, sampler=AddressedSampler(dataset), num_workers=2,
        multiprocessing_context="fork",
    )  # fmt: skip
    batches = list(loader)
    assert sum(len(batch["case"]) for batch in batches) == len(items)
    assert reads == []  # this process has read nothing
    samples(items, memory, "baseline", epochs=1)
    assert reads == []  # and finds all that the workers have read


def test_a_pickled_memory_begins_empty_and_reads_the_same(items):
    memory = PictureMemory([items], SIZE, 1)
    samples(items, memory, "baseline", epochs=1)
    copy = pickle.loads(pickle.dumps(memory))  # as a spawned loader process gets it
    assert sum(copy.filled[:]) == 0 < sum(memory.filled[:]) and copy.places == memory.places
    assert same(samples(items, None, "baseline"), samples(items, copy, "baseline"))


def test_pictures_of_another_kind_are_read_each_time(tmp_path, reads):
    gray = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE)
    Image.fromarray((gray // 4).astype(np.uint8)).save(tmp_path / "eight_bit.png")
    Image.fromarray(gray[:16]).save(tmp_path / "small.png")
    items = [{"image": str(tmp_path / name)} for name in ("eight_bit.png", "small.png")]
    memory = PictureMemory([items], SIZE, 1)
    load, plain = LoadSliced("image", memory=memory), LoadSliced("image")
    for item in items * 2:
        assert torch.equal(load(item)["image"], plain(item)["image"])
    assert len(reads) == 4 and sum(memory.filled[:]) == 0


def test_a_damaged_picture_is_named_as_without_memory(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    memory = PictureMemory([[{"image": str(path)}]], SIZE, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="image: .*broken.png cannot be read"):
            LoadSliced("image", memory=memory)({"image": path})


def test_training_and_selection_share_a_memory(items):
    store = Path(items[0]["image"]).parents[1]
    chosen = selection_items(str(store), 0)
    memory = PictureMemory([items, chosen], SIZE, 1)
    assert set(memory.places) >= {item["image"] for item in chosen}

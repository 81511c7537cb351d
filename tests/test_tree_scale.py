"""A tree of images: its index, its edges in shards, and lists that stay small."""

import pickle
import re
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import raw_data
import torchrun
from PIL import Image
from torch.utils.data import DataLoader

from diffboost import prepare as prepare_module
from diffboost import store_writer
from diffboost.conditions.edges import load_edge_detector
from diffboost.data.addresses import AddressedDataset, AddressedSampler
from diffboost.data.slices import read_store, slice_items
from diffboost.data.tree import check_png, scan_tree
from diffboost.prepare import prepare

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import tree_index  # noqa: E402

PRETRAIN = "radimagenet_controlnet_pretrain"


def write_tree(root: Path, num_images: int = 40) -> Path:
    """Images in four findings of two organs."""
    folders = ("CT/abd/normal", "CT/abd/stone", "US/gb/gb_stone", "US/gb/normal")
    for number in range(num_images):
        path = root / folders[number % 4] / f"image {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(raw_data.picture(number % 20, (30, 64))[0]).save(path)
    return root


def _prepare(root: Path, name: str = "store", **knobs) -> Path:
    knobs = {"edges": "gradient", "num_folds": 1, "validation_fraction": 0.1} | knobs
    return prepare(root, raw_data.store_of(root, name), "radimagenet", 32, **knobs)


def store_bytes(store_dir: Path) -> dict[str, bytes]:
    """Every file of a store."""
    files = sorted(path for path in store_dir.rglob("*") if path.is_file())
    return {str(path.relative_to(store_dir)): path.read_bytes() for path in files}


def png(data: bytes, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG file, 8-bit gray, whose checksums are right, whatever its pixel data."""
    head = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("raw") / "tree")


@pytest.fixture(scope="module")
def whole(root):
    """The store of the tree, made at once."""
    return _prepare(root)


def test_a_tree_is_indexed_by_path_and_its_edges_mirror_it(root, whole):
    store = read_store(whole)
    index = store.index
    assert len(index) == 40 and index["case"].is_unique
    assert index["case"][0] == "CT_abd_normal_image_0"
    assert set(index.prompt) == {
        "CT, abdomen, normal", "CT, abdomen, stone", "US, gallbladder, normal",
        "US, gallbladder, gallbladder stone",
    }  # fmt: skip
    row = index.iloc[5]
    assert row.original_shape.tolist() == [30, 64, 1]
    assert row.sha256 == row.source_sha256 == check_png(root / row.image)[0]
    assert store.source_sha256()[row["case"]] == row.sha256
    edges = sorted(path.relative_to(whole) for path in (whole / "edges").rglob("*.png"))
    assert sorted(map(str, edges)) == sorted(index.edge)
    assert index.edge[0] == "edges/CT/abd/normal/image 0.png"
    assert Image.open(whole / index.edge[0]).size == (32, 32)
    assert not (whole / "wanted.json").exists() and (whole / "contact_sheet.png").is_file()


def test_held_out_images_are_drawn_by_path_and_never_trained_on(root, whole, monkeypatch):
    monkeypatch.setattr(store_writer, "write_contact_sheet", lambda *_: None)  # they take seconds
    held_out = set(slice_items(whole, 0, "test").cases())
    training = set(slice_items(whole, 0, "training", inner_fraction=0).cases())
    assert 1 <= len(held_out) <= 12 and len(held_out) + len(training) == 40
    assert not held_out & training
    header = read_store(whole).header
    assert (header["numTraining"], header["numTest"]) == (len(training), len(held_out))
    other = set(slice_items(_prepare(root, "other", seed=1), 0, "test").cases())
    assert other != held_out
    one = _prepare(root, "one", validation_fraction=1e-9)
    assert len(slice_items(one, 0, "test")) == 1
    none = _prepare(root, "none", validation_fraction=0)
    assert len(slice_items(none, 0, "training", inner_fraction=0)) == 40
    drawn = _prepare(root, "drawn", num_cases=7, validation_fraction=0)
    assert len(read_store(drawn).index) == 7


def test_broken_files_are_listed_with_their_reasons(tmp_path):
    root = write_tree(tmp_path / "tree", 8)
    good = (root / "CT/abd/normal/image 0.png").read_bytes()
    folder = root / "US" / "gb" / "normal"
    contents = {
        "empty.png": (b"", "the file is empty"),
        "jpeg.png": (b"\xff\xd8\xff\xe0", "not a PNG file"),
        "head.png": (good[:20], "broken PNG: it is cut off"),
        "cut.png": (good[:-30], "broken PNG: "),
        "flipped.png": (good[:90] + bytes([good[90] ^ 1]) + good[91:], "broken PNG: .*checksum"),
        "huge.png": (png(b"", (40000, 40000)), "broken PNG: .*(pixels|bomb)"),
        "notes.txt": (b"about", "not a .png file"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "gone.png").symlink_to(root / "nowhere.png")
    (folder / ".hidden.png").write_bytes(b"")
    (root / "US" / "early.png").write_bytes(good)
    with pytest.raises(ValueError, match="9 of 17 cases were rejected, max_rejected_fraction 0.1"):
        _prepare(root)
    assert not list(tmp_path.glob("tree_store*"))
    store = read_store(_prepare(root, max_rejected_fraction=0.6, num_workers=1))
    rejected = pd.read_csv(store.store_dir / "rejected.csv").set_index("file").reason
    for name, (_, reason) in contents.items():
        assert re.search(reason, rejected[f"US/gb/normal/{name}"]), name
    assert "a link that leads out of its folder" in rejected["US/gb/normal/gone.png"]
    assert rejected["US/early.png"] == "images lie at modality/organ/finding/name.png"
    assert len(rejected) == 9 and len(store.index) == 8


def test_images_that_cannot_be_decoded_leave_the_index_when_edges_are_made(tmp_path):
    root = write_tree(tmp_path / "tree", 20)
    folder = root / "CT" / "abd" / "normal"
    (folder / "flat.png").write_bytes(png(zlib.compress(bytes(9 * 8))))
    (folder / "noise.png").write_bytes(png(b"no zlib stream"))
    assert check_png(folder / "noise.png")[1:] == (8, 8)
    store = read_store(_prepare(root))
    assert len(store.index) == 20 and store.header["numTraining"] + store.header["numTest"] == 20
    rejected = pd.read_csv(store.store_dir / "rejected.csv").set_index("file").reason
    assert rejected["CT/abd/normal/flat.png"] == "the image is constant (-1)"
    assert "noise.png cannot be read" in rejected["CT/abd/normal/noise.png"]
    assert not (store.store_dir / "unusable").exists()
    with pytest.raises(ValueError, match="2 of 22 cases were rejected"):
        _prepare(root, "strict", max_rejected_fraction=0.05)


class StoppingDetector:
    """A detector that is interrupted in its k-th batch."""

    def __init__(self, detector, batches: int) -> None:
        self.detector, self.batches = detector, batches
        self.weights_sha256 = detector.weights_sha256

    def __call__(self, images):
        self.batches -= 1
        if self.batches < 0:
            raise KeyboardInterrupt
        return self.detector(images)


def _stop_after(monkeypatch, batches: int) -> None:
    def load(*choice):
        return StoppingDetector(load_edge_detector(*choice), batches)

    monkeypatch.setattr(prepare_module, "load_edge_detector", load)


def test_an_interrupted_run_is_gone_on_with_and_writes_each_file_once(root, whole, monkeypatch):
    partial_dir = raw_data.store_of(root, "resumed.partial")
    for batches, done in ((2, 16), (1, 24)):
        _stop_after(monkeypatch, batches)
        with pytest.raises(KeyboardInterrupt):
            _prepare(root, "resumed")
        files = sorted((partial_dir / "edges").rglob("*.png"))
        assert len(files) == done
    files.append(partial_dir / "index.parquet")
    written = {path.relative_to(partial_dir): path.stat().st_mtime_ns for path in files}
    for path in (files[3], files[7]):  # lost, and half-written when the process was killed
        path.rename(path.with_name(path.name + ".partial"))
        del written[path.relative_to(partial_dir)]
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="holds an unfinished store: seed differ .seed: 0"):
        _prepare(root, "resumed", seed=1)
    store_dir = _prepare(root, "resumed")
    assert store_bytes(store_dir) == store_bytes(whole)
    for path, time in written.items():
        assert (store_dir / path).stat().st_mtime_ns == time, path
    assert not partial_dir.exists()


def test_two_processes_and_workers_write_the_same_bytes(root, whole):
    knobs = {"dataset_dir": str(root), "edges": "gradient", "image_size": 32, "device": "cpu"}
    knobs |= {"validation_fraction": 0.1, "num_workers": 1}
    store_dir = raw_data.store_of(root, "both")
    knobs["store_dir"] = str(store_dir)
    settings = torchrun.bundle_settings(PRETRAIN, ["prepare", "multi_gpu_prepare"], knobs)
    torchrun.run_in_two_processes([settings], root.parent)
    assert store_bytes(store_dir) == store_bytes(whole)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The benchmark's tree and store with 5,000 images; and the seconds that it took."""
    folder = tmp_path_factory.mktemp("large")
    return folder / "store", tree_index.build(folder, 5000, num_workers=0)


def test_five_thousand_images_are_listed_in_a_moment(large):
    store_dir, seconds = large
    assert seconds["build_seconds"] < 600 * 5000 / 1_350_000 * 10  # ten times the share it has
    paths, rejected = scan_tree(store_dir.parent / "tree")
    assert len(paths) == 5000 and rejected == [] and paths == sorted(paths)
    store = read_store(store_dir)
    assert (store.header["numTraining"], store.header["numTest"]) == (4946, 54)
    assert len({path.split("/")[1] for path in paths}) == 9  # two regions in two modalities
    assert len(slice_items(store_dir, 0, "training").unique("prompt")) == 165
    assert len(slice_items(store_dir, 0, "test")) == 54


def test_a_list_of_slices_takes_no_object_a_row(large):
    store_dir, _ = large
    slice_items(store_dir, 0, "training", inner_fraction=0)
    tracemalloc.start()
    items = slice_items(store_dir, 0, "training", inner_fraction=0)
    dataset = AddressedDataset(items, cache=False)
    order = list(zip(range(64), AddressedSampler(dataset), strict=False))
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert items.nbytes / len(items) < 400
    assert highest / len(items) < 100  # a dictionary would take 2,000
    assert len(pickle.dumps(items)) < 20 * len(items)
    for _, address in order[:3]:  # pickled as for a spawned loader process
        assert dataset[address] == pickle.loads(pickle.dumps(items))[address[1]]
    loader = DataLoader(dataset, batch_size=8, sampler=[0, 1, len(items) - 1], num_workers=1)
    assert next(iter(loader))["case"][2] == items[-1]["case"]


def test_items_agree_with_the_index_whichever_way_they_are_read(large):
    store_dir, _ = large
    rows = read_store(store_dir).index.query("section == 'training'").reset_index()
    items = slice_items(store_dir, 0, "training", inner_fraction=0)
    listed = list(items)
    for number in (0, 17, 4096, -1):
        row = rows.iloc[number]
        assert items[number] == listed[number]
        assert items[number] == {
            "image": str(store_dir.parent / "tree" / row.image),
            "edge": str(store_dir / row.edge),
            "prompt": row.prompt, "case": row["case"], "slice": 0, "sha256": row.sha256,
        }  # fmt: skip
    assert list(items[4000:4200]) == listed[4000:4200]
    assert items.cases() == sorted(rows["case"])
    with pytest.raises(IndexError):
        items[len(items)]
    few = slice_items(store_dir, 0, "training", inner_fraction=0.1, num_cases=50)
    assert len(few) == 45 and set(few.cases()) <= set(items.cases())
    hashes = few.case_hashes().to_pydict()
    assert dict(zip(hashes["case"], hashes["sha256"], strict=True)) == {
        item["case"]: item["sha256"] for item in few
    }
    assert set(hashes["image_sha256"]) == {""}  # the other hash is that of the image already
    assert few.fingerprint() != items.fingerprint() == items[:].fingerprint()
    assert few[:20].fingerprint() != few[:21].fingerprint()
    assert np.array_equal(items[10:].rows, items.rows[10:])

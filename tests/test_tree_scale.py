"""A tree of images: its index, its edges in shards, and lists that stay small."""

from pathlib import Path

import pytest
import raw_data
from PIL import Image

from diffboost.data.slices import read_store, slice_items
from diffboost.data.tree import check_png
from diffboost.prepare import prepare


def write_tree(root: Path, num_images: int = 40) -> Path:
    """Images in four findings of two organs."""
    folders = ("CT/abd/normal", "CT/abd/stone", "US/gb/gb_stone", "US/gb/normal")
    for number in range(num_images):
        path = root / folders[number % 4] / f"image {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(raw_data.picture(number, (30, 64))[0]).save(path)
    return root


def _prepare(root: Path, name: str = "store", **knobs) -> Path:
    knobs = {"edges": "gradient", "num_folds": 1, "validation_fraction": 0.1} | knobs
    return prepare(root, raw_data.store_of(root, name), "radimagenet", 32, **knobs)


def store_bytes(store_dir: Path) -> dict[str, bytes]:
    """Every file of a store but its picture of matplotlib's."""
    files = sorted(path for path in store_dir.rglob("*") if path.is_file())
    return {str(path.relative_to(store_dir)): path.read_bytes() for path in files}


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
    edges = sorted(path.relative_to(whole) for path in (whole / "edges").rglob("*.png"))
    assert sorted(map(str, edges)) == sorted(index.edge)
    assert index.edge[0] == "edges/CT/abd/normal/image 0.png"
    assert Image.open(whole / index.edge[0]).size == (32, 32)
    assert not (whole / "wanted.json").exists() and (whole / "contact_sheet.png").is_file()


def test_held_out_images_are_drawn_by_path_and_never_trained_on(root, whole):
    held_out = {item["case"] for item in slice_items(whole, 0, "test")}
    training = {item["case"] for item in slice_items(whole, 0, "training", inner_fraction=0)}
    assert 1 <= len(held_out) <= 12 and len(held_out) + len(training) == 40
    assert not held_out & training
    header = read_store(whole).header
    assert (header["numTraining"], header["numTest"]) == (len(training), len(held_out))
    other = {item["case"] for item in slice_items(_prepare(root, "other", seed=1), 0, "test")}
    assert other != held_out
    one = _prepare(root, "one", validation_fraction=1e-9)
    assert len(slice_items(one, 0, "test")) == 1
    none = _prepare(root, "none", validation_fraction=0)
    assert len(slice_items(none, 0, "training", inner_fraction=0)) == 40
    with pytest.raises(ValueError, match="validation_fraction: 1.5"):
        _prepare(root, "wrong", validation_fraction=1.5)

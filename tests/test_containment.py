"""Names in documents cannot lead out of their folder, and only plain files are opened."""

import json
import os

import pandas as pd
import pyarrow as pa
import pytest
import small_store

from diffboost.data.containment import inside, read_file, refuse_names
from diffboost.data.slices import case_items, read_store, slice_items
from diffboost.data.sources import read_source
from diffboost.data.transforms import LoadSliced
from diffboost.data.tree import scan_tree
from diffboost.segmentation.merging import variants_by_slice

NAMES_OUT = [
    "../secret.png",
    "images/../../secret.png",
    "/etc/passwd",
    "\\secret.png",
    "C:\\secret.png",
    "c:secret.png",
    "a\\..\\..\\secret.png",
    "a\x00.png",
    "",
    ".",
    None,
    3,
]


@pytest.mark.parametrize("name", NAMES_OUT, ids=repr)
def test_names_that_lead_out_are_refused_with_key_and_value(tmp_path, name):
    with pytest.raises(ValueError, match="the_key: ") as caught:
        inside(tmp_path, name, "the_key")
    assert repr(name) in str(caught.value) and "allowed are paths" in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a/b.png", "./a.png", "a..b/c...png", "9:30.png"])
def test_names_inside_are_taken(tmp_path, name):
    assert inside(tmp_path, name, "key") == tmp_path / name
    refuse_names(pa.array([name, ""]), "key")


def test_links_that_lead_out_are_refused_and_others_are_followed(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "real").mkdir(parents=True)
    outside.mkdir()
    for path in (folder / "real/a.png", outside / "a.png"):
        path.write_bytes(b"1")
    (folder / "in").symlink_to(folder / "real")
    (folder / "out").symlink_to(outside)
    (folder / "real/b.png").symlink_to(folder / "real/a.png")
    (folder / "real/c.png").symlink_to(outside / "a.png")
    assert inside(folder, "in/a.png", "key") == folder / "in/a.png"
    assert read_file(folder / "real/b.png", "key") == b"1"
    for name in ("out/a.png", "real/c.png"):
        with pytest.raises(ValueError, match="leads out of the folder through a link"):
            inside(folder, name, "key")
    with pytest.raises(ValueError, match="is a link that leads out of its folder"):
        read_file(folder / "real/c.png", "key")
    (tmp_path / "door").symlink_to(folder)  # the folder itself may be a link
    assert inside(tmp_path / "door", "real/a.png", "key").read_bytes() == b"1"


def test_pipes_folders_and_large_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="image: .* is no plain file"):
            read_file(tmp_path / name, "image")
    with pytest.raises(ValueError, match="image: .*large has 5 bytes; at most 4"):
        read_file(tmp_path / "large", "image", 4)


@pytest.mark.parametrize("column", ["image", "label", "edge"])
@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "images/../../outside.png"])
def test_an_index_cannot_name_files_outside(tmp_path, column, name):
    store_dir = small_store.write_store(tmp_path / "store", num_cases=3)
    index = pd.read_parquet(store_dir / "index.parquet")
    index.loc[2, column] = name
    index.to_parquet(store_dir / "index.parquet")
    for read in (lambda: slice_items(store_dir, 0, "all"), lambda: read_store(store_dir).index):
        with pytest.raises(ValueError, match=f"index.parquet: {column}: '.*leads out") as caught:
            read()
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize("case", ["../../escaped", "a/b", "..", "", "C:x", "a\\b"])
def test_a_case_is_a_part_of_a_files_name(tmp_path, case):
    """Its prediction was written two folders above the results."""
    store_dir = small_store.write_store(tmp_path / "store", num_cases=3)
    synthetic = small_store.write_variants(store_dir, tmp_path / "synthetic")
    for table in (store_dir / "index.parquet", synthetic / "manifest.parquet"):
        rows = pd.read_parquet(table)
        rows.loc[2, "case"] = case
        rows.to_parquet(table)
    for read in (
        lambda: slice_items(store_dir, 0, "all"),
        lambda: read_store(store_dir).index,
        lambda: variants_by_slice(synthetic),
    ):
        with pytest.raises(ValueError, match=r"parquet: case: .* becomes a part of file names"):
            read()


def test_sources_of_an_index_stay_in_the_source_folder(tmp_path):
    store_dir = small_store.write_store(tmp_path / "store", num_cases=3)
    index = pd.read_parquet(store_dir / "index.parquet")
    for column, name in (
        ("source_image", "imagesTr/../../index.parquet"),
        ("source_label", "labelsTr/case_0.nii.gz|../index.parquet"),
    ):
        changed = index.assign(**{column: name})
        changed.to_parquet(store_dir / "index.parquet")
        with pytest.raises(ValueError, match=f"{column}: .*leads out of the folder"):
            case_items(store_dir, 0, "test")
        later = index.assign(**{column: [*index[column][:-1], name]})  # not the case's first slice
        later.to_parquet(store_dir / "index.parquet")
        with pytest.raises(ValueError, match=f"{column}: .*leads out of the folder"):
            read_store(store_dir).index  # noqa: B018


def test_a_store_whose_folder_or_file_is_a_link_out_is_refused(tmp_path):
    store_dir = small_store.write_store(tmp_path / "store", num_cases=3)
    image = store_dir / "images/case_0_0000.png"
    os.replace(store_dir / "edges", tmp_path / "edges")
    (store_dir / "edges").symlink_to(tmp_path / "edges")
    with pytest.raises(ValueError, match="index.parquet: edge: 'edges' leads out .* a link"):
        slice_items(store_dir, 0, "all")[0]
    os.replace(image, tmp_path / "secret.png")
    image.symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="image: .* is a link that leads out of its folder"):
        LoadSliced("image")({"image": str(image)})


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd"])
def test_a_manifest_cannot_name_files_outside(tmp_path, name):
    store_dir = small_store.write_store(tmp_path / "store", num_cases=3)
    synthetic = small_store.write_variants(store_dir, tmp_path / "synthetic")
    manifest = pd.read_parquet(synthetic / "manifest.parquet")
    manifest.loc[1, "image"] = name
    manifest.to_parquet(synthetic / "manifest.parquet")
    with pytest.raises(ValueError, match="manifest.parquet: image: .*leads out"):
        variants_by_slice(synthetic)


def test_folders_of_a_tree_that_are_links_out_are_listed_as_rejected(tmp_path):
    good = tmp_path / "tree/MR/head/normal"
    good.mkdir(parents=True)
    (good / "a.png").write_bytes(b"")
    (tmp_path / "outside/gland").mkdir(parents=True)
    (tmp_path / "tree/US").symlink_to(tmp_path / "outside")
    (tmp_path / "tree/MR/neck").symlink_to(tmp_path / "tree/MR/head")
    paths, rejected = scan_tree(tmp_path / "tree")
    assert paths == ["MR/head/normal/a.png", "MR/neck/normal/a.png"]
    assert rejected == [("US", "a link that leads out of the tree")]


def test_a_million_names_are_checked_in_little_time():
    names = pa.array([f"images/case_{number % 999}_{number}.png" for number in range(100_000)])
    refuse_names(names, "key")  # seconds would be seen in tests of stores
    with pytest.raises(ValueError, match="'images/../../a'"):
        refuse_names(pa.concat_arrays([names, pa.array(["images/../../a"])]), "key")


def test_a_datalist_that_is_a_link_into_the_store_is_no_way_out(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": []}))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/dataset.json").symlink_to(tmp_path / "dataset.json")
    with pytest.raises(ValueError, match="dataset_dir: .* is a link that leads out"):
        read_source(tmp_path / "raw", {"layout": "decathlon"})

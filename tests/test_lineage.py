"""Lineage: hashes of every case, in lineage.json or in a table beside it."""

import json

import pyarrow as pa
import pytest
import small_backbone
import small_store

from diffboost.data.slices import read_store, slice_items
from diffboost.files import sha256_of_files
from diffboost.generation import lineage
from diffboost.generation.backbones import load_part
from diffboost.generation.creation import write_backbone
from diffboost.generation.lineage import read_lineage, write_lineage
from diffboost.generation.saving import trace_lineage


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory):
    return small_store.write_store(tmp_path_factory.mktemp("store") / "store", 6)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(small_backbone.write_backbone(tmp_path_factory.mktemp("backbone") / "small"))


def test_few_cases_stand_in_the_file_itself(store_dir, backbone, tmp_path):
    items = slice_items(store_dir, 1, "training")
    traced = trace_lineage(str(store_dir), items, backbone, False, fold=1, seed=3)
    hashes = read_store(store_dir).source_sha256()
    assert traced["cases"] == {case: hashes[case] for case in items.cases()}
    images = read_store(store_dir).index.set_index("case").image_sha256.to_dict()
    assert traced["images"] == {case: images[case] for case in items.cases()}
    assert traced["prompts"] == ["MR, ball, ball"] and (traced["fold"], traced["seed"]) == (1, 3)
    write_lineage(tmp_path / "lineage.json", traced)
    assert [path.name for path in tmp_path.iterdir()] == ["lineage.json"]
    assert read_lineage(tmp_path / "lineage.json") == traced


def test_many_cases_go_into_a_table_that_descendants_carry(
    store_dir, backbone, tmp_path, monkeypatch
):
    monkeypatch.setattr(lineage, "LARGEST_INLINE", 3)
    every = slice_items(store_dir, 0, "all")
    traced = trace_lineage(str(store_dir), every, backbone, True)
    assert isinstance(traced["cases"], pa.Table)
    vae = {"vae": load_part(backbone, "vae")}
    parent = write_backbone(str(tmp_path / "parent"), vae, backbone, lineage=traced)
    written = json.loads((parent / "lineage.json").read_text())["cases"]
    assert written == {
        "file": "lineage_cases.parquet",
        "num_cases": 6,
        "sha256": sha256_of_files([parent / "lineage_cases.parquet"]),
    }
    few = slice_items(store_dir, 0, "training", num_cases=3)
    child = trace_lineage(str(store_dir), few, str(parent), False, fold=0)
    write_lineage(tmp_path / "child" / "lineage.json", child)
    (found,) = read_lineage(tmp_path / "child" / "lineage.json")["ancestors"]
    hashes = read_store(store_dir).source_sha256()
    table = found["cases"].to_pydict()
    assert dict(zip(table["case"], table["sha256"], strict=True)) == hashes
    assert "" not in table["image_sha256"] and not set(table["image_sha256"]) & set(table["sha256"])
    (tmp_path / "child" / "lineage_cases_1.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="lineage_cases_1.parquet beside it is missing or another"):
        read_lineage(tmp_path / "child" / "lineage.json")

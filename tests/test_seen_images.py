"""An image that a model saw is known by its file, whatever label it had, or none."""

import json
import shutil

import pandas as pd
import pyarrow as pa
import pytest
import raw_data
import small_backbone
import torch
from PIL import Image

from diffboost.audit.guards import guard_evaluation, guard_generator, guard_training
from diffboost.audit.leaks import audit_leaks
from diffboost.audit.memorization import _training_rows
from diffboost.audit.table1 import held_out_items, refuse_seen_images
from diffboost.data.documents import digest_of
from diffboost.data.duplicates import PAIR_COLUMNS
from diffboost.data.hashes import MOVABLE
from diffboost.data.slices import read_store, slice_items
from diffboost.data.splits import select
from diffboost.data.tables import write_table
from diffboost.files import sha256_of_files
from diffboost.generation import lineage as lineages
from diffboost.generation.lineage import read_lineage, write_lineage
from diffboost.generation.saving import trace_lineage
from diffboost.prepare import prepare

KNOBS = {"edges": "gradient", "num_folds": 3, "group_duplicates": False}
NO_PAIRS = pd.DataFrame(columns=list(PAIR_COLUMNS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`store`: six labelled images; `tree_store`: those of fold 0 and another, without labels;
    `corrected`: the labelled images, each with another label."""
    folder = tmp_path_factory.mktemp("seen")
    raw, tree = folder / "raw", folder / "tree" / "US" / "breast" / "lesion"
    tree.mkdir(parents=True)
    raw_data.write_busi(raw, 6)
    store = prepare(raw, folder / "store", "breast_ultrasound", 32, **KNOBS)
    for image in select(read_store(store).index, 0, "test").source_image:
        shutil.copy(raw / image, tree)
    Image.fromarray(raw_data.picture(30)[0]).save(tree / "elsewhere.png")
    prepare(folder / "tree", folder / "tree_store", "radimagenet", 32,
            edges="gradient", num_folds=1)  # fmt: skip
    shutil.copytree(raw, folder / "relabelled")
    for mask in (folder / "relabelled").glob("*/*_mask.png"):
        Image.fromarray(raw_data.picture(9)[1]).save(mask)
    prepare(folder / "relabelled", folder / "corrected", "breast_ultrasound", 32, **KNOBS)
    small_backbone.write_backbone(folder / "backbone")
    return folder


def _trace(folder, store, part="training", fold=0):
    """The lineage of a generator that was trained on a part of a store."""
    items = slice_items(folder / store, fold, part, inner_fraction=0)
    return trace_lineage(str(folder / store), items, str(folder / "backbone"), True)


def _tested(folder):
    return set(select(read_store(folder / "store").index, 0, "test").case)


def _without_column(store_dir, target):
    """A store as it was before its index had the hash of the image alone."""
    shutil.copytree(store_dir, target)
    index = pd.read_parquet(target / "index.parquet").drop(columns="image_sha256")
    write_table(target / "index.parquet", index)
    header = {**read_store(store_dir).header, "store_version": 3}
    header["digest"] = digest_of(header, MOVABLE)
    (target / "dataset.json").write_text(json.dumps(header))
    return target


def test_an_index_has_the_hash_of_the_image_alone(folder):
    store, tree = (read_store(folder / name).index for name in ("store", "tree_store"))
    for row in store.itertuples():
        assert row.image_sha256 == sha256_of_files([folder / "raw" / row.source_image])
        assert row.image_sha256 != row.source_sha256
    assert (tree.image_sha256 == tree.source_sha256).all()
    assert set(tree.image_sha256) & set(store.image_sha256) == set(
        store[store.case.isin(_tested(folder))].image_sha256
    )


def test_a_generator_that_saw_test_images_without_labels_is_refused(folder, tmp_path):
    lineage = _trace(folder, "tree_store")
    assert len(lineage["cases"]) == 3 and lineage["images"] == {}  # the hashes would be the same
    with pytest.raises(ValueError, match="leak: the generator for fold 0 .*the same hash"):
        guard_generator(str(folder / "store"), 0, lineage)
    with pytest.raises(ValueError, match="1 back, in its lineage: the same hash"):
        guard_generator(str(folder / "store"), 0, {"cases": {}, "ancestors": [lineage]})
    guard_generator(str(folder / "store"), 1, lineage)
    write_lineage(tmp_path / "lineage.json", lineage)
    leaks = audit_leaks(folder / "store", generator_dir=tmp_path, fold=0, pairs=NO_PAIRS)
    assert {(leak.kind, leak.second) for leak in leaks} == {
        ("generator", case) for case in _tested(folder)
    }
    assert set(_training_rows(read_store(folder / "store"), lineage).case) == _tested(folder)


def test_table_1_refuses_images_of_a_tree_that_were_seen_with_labels(folder, tmp_path):
    lineage = {"cases": {}, "ancestors": [_trace(folder, "store", part="all")]}
    write_lineage(tmp_path / "generator" / "lineage.json", lineage)
    items = held_out_items(str(folder / "tree_store"), "all", None, 0)
    places = (str(tmp_path / "generator"), str(tmp_path / "pix2pix"), "none")
    with pytest.raises(ValueError, match="2 of 3 images, such as .* training of generator_dir"):
        refuse_seen_images(items, "test", *places)


@pytest.mark.parametrize(
    ("key", "words"),
    [("cases", "a held-out case is trained on"), ("selection", "selected on test cases")],
)
def test_images_that_a_segmenter_met_with_another_label_are_known(folder, tmp_path, key, words):
    store, corrected = (str(folder / name) for name in ("store", "corrected"))
    hashes = [set(read_store(path).source_sha256().values()) for path in (store, corrected)]
    assert not hashes[0] & hashes[1]
    met = [{"case": case} for case in sorted(_tested(folder))]
    parts = {"cases": [met, []], "selection": [[], met]}[key]
    lineage = guard_training(corrected, 1, *parts, lineage_dir=str(tmp_path))
    assert set(lineage["images"]) == set(lineage[key]) == _tested(folder)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=words):
        guard_evaluation(store, 0, "test", str(tmp_path / "model.pt"))
    guard_evaluation(store, 1, "test", str(tmp_path / "model.pt"))


def test_an_image_on_both_sides_with_two_labels_is_refused(folder, tmp_path):
    """Such as a volume whose slices were cut otherwise, so that theirs do not tell it."""
    shutil.copytree(folder / "store", tmp_path / "store")
    path = tmp_path / "store" / "index.parquet"
    index = pd.read_parquet(path)
    first, second = index.case[index.fold == 1].iloc[0], index.case[index.fold == 0].iloc[0]
    same = index.image_sha256[index.case == second].iloc[0]
    index.loc[index.case == first, "image_sha256"] = same
    write_table(path, index)
    items = [{"case": first}]
    with pytest.raises(ValueError, match=f"{first} and {second}: the same image"):
        guard_training(str(tmp_path / "store"), 0, items, [])


def test_lineages_of_many_cases_have_the_hash_of_the_image_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lineages, "LARGEST_INLINE", 3)
    written = _trace(folder, "corrected", part="all")
    assert isinstance(written["cases"], pa.Table) and "images" not in written
    write_lineage(tmp_path / "lineage.json", written)
    with pytest.raises(ValueError, match="the same hash"):
        guard_generator(str(folder / "store"), 0, read_lineage(tmp_path / "lineage.json"))


def test_stores_and_lineages_without_the_hash_of_the_image_are_read(folder, tmp_path):
    """They are checked by the hash of image and labels, which is all that they have."""
    old = _without_column(folder / "store", tmp_path / "old")
    assert list(read_store(old).index.columns) == list(read_store(folder / "store").index.columns)
    assert set(read_store(old).index.image_sha256) == {""}
    items = slice_items(old, 1, "training", inner_fraction=0)
    lineage = trace_lineage(str(old), items, str(folder / "backbone"), True)
    assert lineage["images"] == {} and len(lineage["cases"]) == 4
    for store in (old, folder / "store"):
        for cases in (
            lineage["cases"],
            pa.table({"case": list(lineage["cases"]), "sha256": list(lineage["cases"].values())}),
        ):
            write_lineage(tmp_path / "lineage.json", {"cases": cases, "ancestors": []})
            with pytest.raises(ValueError, match="the same hash"):
                guard_generator(str(store), 0, read_lineage(tmp_path / "lineage.json"))
    guard_generator(str(old), 0, _trace(folder, "tree_store"))  # the store cannot know it
    guard_generator(str(old), 0, {"cases": {"c": ""}, "images": {"c": ""}, "ancestors": []})
    write_lineage(tmp_path / "lineage.json", {"cases": {}, "images": {"c": 3}, "ancestors": []})
    with pytest.raises(ValueError, match="name -> hash is needed"):
        read_lineage(tmp_path / "lineage.json")


def test_a_store_that_should_have_the_hash_is_damaged_without_it(folder, tmp_path):
    path = shutil.copytree(folder / "store", tmp_path / "store") / "index.parquet"
    index = pd.read_parquet(path)
    write_table(path, index.rename(columns={"image_sha256": "image_sha257"}))
    store = read_store(tmp_path / "store")
    items = slice_items(tmp_path / "store", 0, "all")
    for read in (lambda: store.index, lambda: store.columns(["image_sha256"]), items.case_hashes):
        with pytest.raises(ValueError, match="index.parquet lacks the columns image_sha256"):
            read()
    write_table(path, index.assign(image_sha256=7))
    with pytest.raises(ValueError, match="column 'image_sha256' holds int64, no text"):
        read_store(tmp_path / "store").columns(["image_sha256"])

"""Leaks between folds are refused before a training begins, and the pair is named."""

import json

import pandas as pd
import pytest
from small_store import source_sha256, write_store, write_variants

from diffboost.audit.guards import guard_training
from diffboost.data.slices import slice_items


@pytest.fixture
def store_dir(tmp_path):
    return str(write_store(tmp_path / "store"))


def parts(store_dir, training="training", validation="inner_validation"):
    return [list(slice_items(store_dir, 0, part)) for part in (training, validation)]


def test_a_clean_split_passes_and_its_lineage_names_what_was_seen(store_dir, tmp_path):
    lineage = guard_training(store_dir, 0, *parts(store_dir), lineage_dir=str(tmp_path))
    assert sorted([*lineage["cases"], *lineage["selection"]]) == [f"case_{n}" for n in (1, 2, 4, 5)]
    assert json.loads((tmp_path / "lineage.json").read_text())["cases"] == lineage["cases"]


def test_a_test_case_in_training_or_selection_is_refused(store_dir):
    with pytest.raises(ValueError, match="case_0.*held-out case is trained on"):
        guard_training(store_dir, 0, *parts(store_dir, training="all"))
    chosen = parts(store_dir, validation="test")
    with pytest.raises(ValueError, match="case_0.*selected on test cases"):
        guard_training(store_dir, 0, *chosen)
    guard_training(store_dir, 0, *chosen, allow_selection_on_test=True)


@pytest.mark.parametrize(
    ("column", "words"),
    [("source_sha256", "the same image under another name"), ("group", "a near-duplicate")],
)
def test_copies_under_another_name_are_refused(store_dir, column, words):
    path = f"{store_dir}/index.parquet"
    index = pd.read_parquet(path)
    index.loc[index.case == "case_1", column] = index.loc[index.case == "case_0", column].iloc[0]
    index.to_parquet(path)
    with pytest.raises(ValueError, match=f"case_1.*case_0.*{words}"):
        guard_training(store_dir, 0, *parts(store_dir, training="training_fold"))


def test_variants_under_another_lineage_than_their_manifest_names_are_refused(store_dir, tmp_path):
    synthetic_dir = write_variants(tmp_path / "store", tmp_path / "synthetic")
    seen = {"cases": {"elsewhere": source_sha256(0)}, "ancestors": []}  # the hash of case_0
    lineage = synthetic_dir / "lineage.json"
    lineage.write_text(json.dumps(seen))
    with pytest.raises(ValueError, match="is not the lineage that the manifest names"):
        guard_training(store_dir, 0, *parts(store_dir), synthetic_dir=str(synthetic_dir))

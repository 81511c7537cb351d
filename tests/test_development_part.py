"""The development part: the training part of a fold as a data set that prepare takes."""

import sys
from pathlib import Path

from raw_data import TASK_2D, store_of, write_busi

from diffboost.data.slices import read_store
from diffboost.prepare import prepare

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from development_part import copy_cases  # noqa: E402


def test_prepare_takes_the_part_and_no_case_of_the_fold_is_in_it(tmp_path):
    source = write_busi(tmp_path / "scans", num_cases=6)
    settings = {"num_folds": 3, "edges": "gradient"}
    store = read_store(prepare(source, store_of(source), TASK_2D, 32, **settings))
    part = tmp_path / "part"
    assert copy_cases(str(store.store_dir), source, part, fold=1) == 4
    assert not [path for path in part.rglob("*") if path.is_symlink()]
    found = read_store(prepare(part, store_of(part), TASK_2D, 32, **settings)).index
    kept = store.index[store.index.fold != 1]
    assert sorted(found.source_image) == sorted(kept.source_image)
    assert sorted(found.source_sha256) == sorted(kept.source_sha256)

"""Training cases whose labels are not used: a store that holds nothing which was read from one."""

import shutil

import numpy as np
import pytest
import raw_data
import small_backbone
from PIL import Image

from diffboost import unlabelled
from diffboost.audit import memorization
from diffboost.audit.guards import guard_generator
from diffboost.data.slices import read_store, slice_items
from diffboost.data.splits import select
from diffboost.data.tables import write_table
from diffboost.experiments import read_experiment
from diffboost.generation.saving import trace_lineage
from diffboost.plans import finetune_knobs, unlabelled_knobs
from diffboost.prepare import prepare
from diffboost.unlabelled import prepare_unlabelled


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory):
    root = raw_data.write_busi(tmp_path_factory.mktemp("busi"), 9)
    task = "breast_ultrasound"
    return prepare(root, raw_data.store_of(root), task, 32, edges="gradient", num_folds=3)


def _cases(store_dir, part, fold=0, **limits):
    return set(select(read_store(store_dir).index, fold, part, **limits).case)


def _edge(store, row):
    with Image.open(store.path(row.edge)) as picture:
        return np.asarray(picture).astype(int)


def test_it_holds_the_other_training_cases_and_nothing_of_their_labels(store_dir, tmp_path):
    made = read_store(prepare_unlabelled(store_dir, tmp_path / "made", fold=0, num_cases=2))
    store = read_store(store_dir)
    labelled = _cases(store_dir, "training_fold", num_cases=2)
    found = made.index.set_index("case")
    assert set(found.index) == _cases(store_dir, "training_fold") - labelled
    assert not set(found.index) & _cases(store_dir, "test") and len(found) == 4
    assert made.num_classes == 1 and not any((made.store_dir / "labels").iterdir())
    assert set(found.label) | set(found.source_label) == {""} and found.foreground_px.sum() == 0
    assert set(found.prompt) == {"US, breast, lesion"}  # not the folder's benign or malignant
    for row in store.index[store.index.case.isin(found.index)].itertuples():
        own = found.loc[row.case]
        known = ["source_sha256", "image_sha256", "sha256", "group"]
        assert own[known].tolist() == [getattr(row, name) for name in known]
        edges, joined = _edge(made, own), _edge(store, row)
        assert (joined - edges).min() >= -1 and (joined - edges).max() > 50  # the mask's outline
    assert len(slice_items(made.store_dir, 0, "training", inner_fraction=0.0)) == 4


def test_it_goes_on_and_is_done_once(store_dir, tmp_path, monkeypatch):
    whole = prepare_unlabelled(store_dir, tmp_path / "whole", fold=1, num_cases=2)
    write_case, calls = unlabelled._write_case, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_case(*arguments)

    monkeypatch.setattr(unlabelled, "_write_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare_unlabelled(store_dir, tmp_path / "made", fold=1, num_cases=2)
    made = prepare_unlabelled(store_dir, tmp_path / "made", fold=1, num_cases=2)
    assert len(calls) == 3 + 2  # four cases, of which two were done
    for path in whole.rglob("*"):
        if path.is_file():
            assert (made / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    prepare_unlabelled(store_dir, tmp_path / "made", fold=1, num_cases=2)
    assert len(calls) == 5
    with pytest.raises(FileExistsError, match="unlabelled differ"):
        prepare_unlabelled(store_dir, tmp_path / "made", fold=0, num_cases=2)


def test_a_store_of_other_folds_under_the_same_path_is_another(store_dir, tmp_path):
    copy, made = shutil.copytree(store_dir, tmp_path / "store"), tmp_path / "made"
    prepare_unlabelled(copy, made, fold=0, num_cases=2)
    index = read_store(copy).index
    write_table(copy / "index.parquet", index.assign(fold=(index.fold + 1) % 3))
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="holds another store: inputs_sha256 differ"):
        prepare_unlabelled(copy, made, fold=0, num_cases=2)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_duplicates_of_a_selecting_case_stay_out(store_dir, tmp_path):
    store = read_store(store_dir)
    index = store.index
    (selecting,) = _cases(store_dir, "inner_validation", num_cases=3)
    other = min(
        _cases(store_dir, "training_fold") - _cases(store_dir, "training_fold", num_cases=3)
    )
    index.loc[index.case == other, "group"] = index.group[index.case == selecting].iloc[0]
    copy = shutil.copytree(store_dir, tmp_path / "store")
    write_table(copy / "index.parquet", index)
    made = read_store(prepare_unlabelled(copy, tmp_path / "made", fold=0, num_cases=3))
    assert other not in set(made.index.case) and len(made.index) == 2


def test_where_all_are_labelled_it_says_so(store_dir, tmp_path):
    with pytest.raises(ValueError, match="num_cases: 6; fold 0 of .* has no training case beyond"):
        prepare_unlabelled(store_dir, tmp_path / "made", fold=0, num_cases=6)
    assert not list(tmp_path.iterdir())


def test_a_generator_of_another_fold_is_refused(store_dir, tmp_path):
    """Cases keep their hashes: what was learned without labels counts as seen."""
    made = prepare_unlabelled(store_dir, tmp_path / "made", fold=0, num_cases=2)
    backbone = str(small_backbone.write_backbone(tmp_path / "backbone"))
    items = slice_items(made, 0, "training", inner_fraction=0.0)
    lineage = trace_lineage(str(made), items, backbone, True, fold=0)
    guard_generator(str(store_dir), 0, lineage)
    hashes = read_store(store_dir).source_sha256()
    own = {case: hashes[case] for case in _cases(store_dir, "training", num_cases=2)}
    finetuned = {"cases": own, "ancestors": [lineage]}
    searched = set(memorization._training_rows(read_store(store_dir), finetuned).case)
    assert searched == set(items.cases()) | set(own)
    with pytest.raises(ValueError, match="leak: the generator for fold 1"):
        guard_generator(str(store_dir), 1, lineage)


def test_the_section_of_an_experiment(tmp_path):
    text = "name: few\ntask: breast_ultrasound\ndataset_dir: x\narms: [baseline, diffboost]\n"
    path = tmp_path / "few.yaml"
    path.write_text(
        text + "num_cases: 20\nfinetune: {epochs: 9, batch_size: 8, weights: a/model.pt}\n"
        "unlabelled: {epochs: 4}\n"
    )
    study = read_experiment(path)
    assert "weights" not in finetune_knobs(study) and finetune_knobs(study)["epochs"] == 9
    first = unlabelled_knobs(study)
    assert (first["epochs"], first["batch_size"], first["weights"]) == (4, 8, "a/model.pt")
    assert (first["inner_fraction"], first["min_foreground_px"]) == (0.0, 0)
    for more, message in (
        ("unlabelled: {epochs: 4}", "num_cases is not given"),
        ("num_cases: 20\nunlabelled: {inner_fraction: 0.5}", "unlabelled: inner_fraction"),
        ("num_cases: 20\nunlabelled: {epoch: 4}", "unknown key 'epoch'.*did you mean 'epochs'"),
        ("num_cases: 20\nunlabelled: 4", "unlabelled: 4; `key: value` lines are needed"),
    ):
        path.write_text(f"{text}{more}\n")
        with pytest.raises(ValueError, match=message):
            read_experiment(path)

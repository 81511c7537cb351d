"""Leaks between folds are refused before a training begins, and the pair is named."""

import json
from pathlib import Path

import monai
import pandas as pd
import pytest
import torch
import yaml
from small_store import source_sha256, write_store, write_variants

from diffboost.audit.checks import Leak
from diffboost.audit.guards import guard_evaluation, guard_generator, guard_training, refuse_leaks
from diffboost.data.slices import read_store, slice_items
from diffboost.data.tasks import slicing
from diffboost.segmentation.training import training_items

BUNDLES = Path(__file__).parents[1] / "bundles"


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


def test_variants_of_slices_that_were_cut_in_another_way_are_refused(store_dir, tmp_path):
    """Coronal ones were merged with axial ones, and those of another channel."""
    synthetic_dir = write_variants(tmp_path / "store", tmp_path / "synthetic")
    manifest = pd.read_parquet(synthetic_dir / "manifest.parquet")
    own = slicing(read_store(store_dir).header["task"])
    changes = ({}, {"slice_axis": "coronal"}, {"channel": 1}, {"labels": [[2]]})
    for change in (*changes, {"intensity": ["range", 0, 3]}):
        cut = json.dumps(own | change)
        manifest.assign(slicing=cut).to_parquet(synthetic_dir / "manifest.parquet")
        settings = {"arm": "diffboost", "synthetic_dir": str(synthetic_dir)}
        if not change:
            assert training_items(store_dir, fold=0, image_size=32, num_classes=3, **settings)
            continue
        (name,) = change
        with pytest.raises(ValueError, match=f"synthetic_dir: .* are of slices of {name} "):
            training_items(store_dir, fold=0, image_size=32, num_classes=3, **settings)


def test_variants_made_from_test_cases_are_refused_whatever_their_name(store_dir, tmp_path):
    """As in a synthetic store of another slice store, whose cases have the same names."""
    synthetic_dir = write_variants(tmp_path / "store", tmp_path / "synthetic")
    manifest = pd.read_parquet(synthetic_dir / "manifest.parquet")
    manifest = manifest[manifest.case == "case_1"]
    files = [str(synthetic_dir / name) for name in manifest.image]

    def guard(number):
        """With variants of case_1 that were made from the case of this number."""
        changed = manifest.assign(source_sha256=source_sha256(number))
        changed.to_parquet(synthetic_dir / "manifest.parquet")
        training = [{"case": "case_1", "variants": files}]
        guard_training(store_dir, 0, training, [], synthetic_dir=str(synthetic_dir))

    guard(1)
    guard(2)  # no test case
    with pytest.raises(ValueError, match="case_1_0000_000.png and case_0: .*made from case_0"):
        guard(0)
    path = f"{store_dir}/index.parquet"
    index = pd.read_parquet(path)
    index.loc[index.case == "case_2", "group"] = "case_3"
    index.to_parquet(path)
    with pytest.raises(ValueError, match="case_1_0000_000.png and case_3: .*made from case_2"):
        guard(2)


def lineage(*numbers, **more):
    """Of a model that saw the cases of these numbers."""
    return {"cases": {f"seen_{n}": source_sha256(n) for n in numbers}, "ancestors": [], **more}


def test_a_generator_that_saw_test_cases_is_refused_whatever_it_began_from(store_dir):
    guard_generator(store_dir, 0, lineage(1, 2, ancestors=[lineage(4)]))
    guard_generator(store_dir, None, lineage(0))
    with pytest.raises(ValueError, match="leak: the generator for fold 0 .*seen_3 and case_3"):
        guard_generator(store_dir, 0, lineage(1, 3))
    with pytest.raises(ValueError, match="seen_0 and case_0.* 2 back"):
        guard_generator(store_dir, 0, lineage(1, ancestors=[lineage(2, ancestors=[lineage(0)])]))


def test_an_evaluation_without_a_model_names_the_key(store_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"model_path: there is no file {tmp_path}/model"):
        guard_evaluation(store_dir, 0, "test", str(tmp_path / "model.pt"))


def test_weights_that_were_selected_on_test_cases_are_refused(store_dir, tmp_path, caplog):
    weights = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(1)}, weights)
    guard_training(store_dir, 0, *parts(store_dir), weights=str(weights))
    assert "no lineage.json says what they were trained on" in caplog.text
    before = lineage(1, selection={"seen_3": source_sha256(3)})
    weights.with_name("lineage.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match="seen_3 and case_3: the model is selected on test cases"):
        guard_training(store_dir, 0, *parts(store_dir), weights=str(weights))
    with pytest.raises(ValueError, match="seen_3 and case_3: the model is selected on test cases"):
        guard_evaluation(store_dir, 0, "test", str(weights))
    guard_training(
        store_dir, 0, *parts(store_dir), weights=str(weights), allow_selection_on_test=True
    )


def test_five_pairs_are_named_and_the_others_counted():
    leaks = [Leak("case", f"first_{n}", f"second_{n}", "the same name") for n in range(7)]
    with pytest.raises(
        ValueError, match="first_4 and second_4.*; and 2 more.*audit leaks"
    ) as error:
        refuse_leaks(leaks, "here")
    assert "first_5" not in str(error.value)
    refuse_leaks([], "here")


@pytest.mark.parametrize(
    ("config", "guard", "begins"),
    [
        ("diffboost_segmentation/configs/train.yaml", "guard_training",
         "diffboost.runs.run_to_end"),
        ("diffboost_segmentation/configs/evaluate.yaml", "guard_evaluation",
         "$@validate::evaluator.run()"),
        ("diffboost_synthesis/configs/inference.yaml", "guard_generator", "$@evaluator.run()"),
        ("task_finetune/configs/train.yaml", "guard_generator", "diffboost.runs.run_to_end"),
        ("task_finetune/configs/distill.yaml", "guard_generator", "diffboost.runs.run_to_end"),
    ],
)  # fmt: skip
def test_stages_call_their_guard_before_they_begin(config, guard, begins):
    run = yaml.safe_load((BUNDLES / config).read_text())["run"]
    called = [step["_target_"] if isinstance(step, dict) else step for step in run]
    assert called.index(f"diffboost.audit.guards.{guard}") < called.index(begins)


def test_the_bundle_refuses_and_leaves_no_model(store_dir, tmp_path):
    path = f"{store_dir}/index.parquet"
    index = pd.read_parquet(path)
    index.loc[index.case == "case_1", "source_sha256"] = source_sha256(0)
    index.to_parquet(path)
    with pytest.raises(RuntimeError) as error:
        monai.bundle.run(
            config_file=str(BUNDLES / "diffboost_segmentation/configs/train.yaml"),
            bundle_root=str(tmp_path), store_dir=store_dir, output_dir=str(tmp_path / "run"),
            image_size=32, num_classes=3, channels=[4, 8, 8], epochs=1, inner_fraction=0,
            selection="test", allow_selection_on_test=True,
        )  # fmt: skip
    assert "case_1 and case_0: the same image" in str(error.value.__cause__)
    assert not list(tmp_path.glob("run*/model*.pt"))

"""Experiment files: what ships is valid, what is wrong is named."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from diffboost.experiments import bundle_run, read_experiment, task_path

REPOSITORY = Path(__file__).parents[1]
CONFIG = {
    "epochs": 3,
    "inner_fraction": 0.2,
    "learning_rate": 1.0e-3,
    "prompt_weights": {"style": 0.0},
    "merge": "logits",
}
GOOD = {"name": "x", "task": "phantom_organ", "dataset_dir": "phantoms", "arms": ["baseline"]}


@pytest.fixture
def read(tmp_path):
    """Reads GOOD with some keys changed; a key changed to None is left out."""
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(CONFIG))
    sections = ("prepare", "finetune", "synthesis", "segmentation")
    configs = dict.fromkeys(sections, tmp_path / "train.yaml")

    def read(**changes):
        written = {key: value for key, value in (GOOD | changes).items() if value is not None}
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(written))
        return read_experiment(tmp_path / "experiment.yaml", configs)

    return read


def test_defaults_are_filled_in(read):
    experiment = read(segmentation={"epochs": 5})
    assert (experiment.backbone, experiment.folds, experiment.seeds) == ("tiny", [0], [0])
    assert experiment.segmentation == {"epochs": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bakbone": "tiny"}, "unknown key 'bakbone' ('tiny'); did you mean 'backbone'"),
        ({"arms": None}, "`arms` is missing"),
        ({"name": "../x"}, "name: '../x'; allowed: letters"),
        ({"protocol": "paper"}, "protocol: 'paper'; allowed so far: sound"),
        ({"arms": ["baseline", "mirorr"]}, "arm: 'mirorr' is unknown; did you mean 'mirror'"),
        ({"arms": ["mirror"]}, "`baseline` must be one of them"),
        ({"arms": "baseline"}, "arms: 'baseline'; a list"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]; a list of different values"),
        ({"seeds": [-1]}, "seeds: -1; allowed: 0 to"),
        ({"folds": [3]}, "folds: 3; allowed: 0 to 2"),
        ({"image_size": "64"}, "image_size: '64'; a whole number from 8 up"),
        ({"num_folds": 1}, "num_folds: 1; a whole number from 2 up"),
        ({"finetune": {"epoch": 5}}, "finetune: unknown key 'epoch' (5); did you mean 'epochs'"),
        ({"segmentation": {"epochs": [5, 9]}}, "ablations over a list of values are not built yet"),
        ({"segmentation": {"learning_rate": "1e-5"}}, "a number is needed (1.0e-5, not 1e-5)"),
        ({"segmentation": {"merge": {"a": 1}}}, "merge: {'a': 1}; one value is needed"),
        ({"synthesis": 8}, "synthesis: 8; `key: value` lines"),
        ({"segmentation": {"inner_fraction": 0.3}}, "need the same, or the generator sees cases"),
    ],
)
def test_what_is_wrong_is_named(read, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(**changes)


def test_a_knob_that_is_a_mapping_takes_a_mapping(read):
    weights = {"prompt_weights": {"style": 0.1}}
    assert read(synthesis=weights).synthesis == weights


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="`key: value` lines"):
        read_experiment(tmp_path / "list.yaml", {})
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_experiment(tmp_path / "none.yaml", {})


def test_a_task_file_is_found_beside_the_experiment(read, tmp_path):
    assert task_path(read(), tmp_path / "experiment.yaml") == "phantom_organ"
    own = read(task="tasks/own.yaml")
    assert task_path(own, tmp_path / "experiment.yaml") == str(tmp_path / "tasks" / "own.yaml")


def test_bundle_run_quotes_and_leaves_out_what_is_none():
    files = [Path("my bundles/x/configs/train.yaml"), Path("my bundles/x/configs/evaluate.yaml")]
    settings = {"fold": 1, "synthetic_dir": None, "arm": "diffboost+nnunet"}
    words = shlex.split(bundle_run(files, settings, {"prompt_weights": {"style": 0.5}}))
    assert words[:4] == ["python", "-m", "monai.bundle", "run"]
    assert words[4:6] == ["--config_file", repr([str(path) for path in files])]
    assert words[6:8] == ["--bundle_root", "my bundles/x"]
    assert words[8:] == (
        ["--fold", "1", "--arm", "diffboost+nnunet", "--prompt_weights", "{'style': 0.5}"]
    )


def test_bundle_run_refuses_a_knob_that_the_study_sets():
    with pytest.raises(ValueError, match="`fold` .value 2. is set by the study"):
        bundle_run(["x/configs/train.yaml"], {"fold": 1}, {"fold": 2})


@pytest.mark.parametrize("path", sorted((REPOSITORY / "workflow/experiments").glob("*.yaml")))
def test_shipped_experiments_are_valid(path):
    bundles = REPOSITORY / "bundles"
    configs = {
        "prepare": bundles / "task_finetune/configs/prepare.yaml",
        "finetune": bundles / "task_finetune/configs/train.yaml",
        "synthesis": bundles / "diffboost_synthesis/configs/inference.yaml",
        "segmentation": bundles / "diffboost_segmentation/configs/train.yaml",
    }
    experiment = read_experiment(path, configs)
    assert experiment.name == path.stem

"""MLflow offline: losses, executed configs and results of runs; TensorBoard's overlays."""

import json
from pathlib import Path

import pytest
from ignite.engine import Engine
from mlflow import MlflowClient
from small_store import write_store
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_generation_bundles import BUNDLES, FINETUNE, bundle_run, write_study
from test_segmentation_bundle import SMALL

from diffboost import cli
from diffboost.tracking import ListedOutput, log_results, loss_of, name_run, store_report

SEGMENTATION = BUNDLES / "diffboost_segmentation"


def runs_of(database: Path, experiment: str) -> list:
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], order_by=["attributes.start_time"])


def artifacts_of(run) -> set[str]:
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """Training and evaluation with tracking: output_dir as the config has it, and as a path."""
    folder = tmp_path_factory.mktemp("tracked")
    store = write_store(folder / "balls")
    small = SMALL | {"store_dir": str(store), "epochs": 1, "tracking": "mlflow"}
    root = {"output_dir": str(folder / "models")}
    bundle_run(SEGMENTATION, ["train"], **(small | {"output_dir": f"$'{folder / 'models'}'"}))
    bundle_run(SEGMENTATION, ["train", "evaluate"], **small, **root)
    return folder / "models"


@pytest.fixture
def database(segmenter, monkeypatch):
    """The database of the segmenter's runs, for others too: to make one takes seconds."""
    path = segmenter / "mlruns.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path


def test_losses_metrics_and_results_are_stored(segmenter):
    training, evaluation = runs_of(segmenter / "mlruns.db", "diffboost_segmentation")
    assert {run.info.status for run in (training, evaluation)} == {"FINISHED"}
    assert training.data.metrics["train_loss"] > 0 and "val_dice" in training.data.metrics
    assert training.data.params["max_epochs"] == "1"
    assert 0 <= evaluation.data.metrics["val_dice"] <= 1
    results = {"run.json", "lineage.json", "training_log.csv"}
    assert results < artifacts_of(training)
    assert {"run.json", "metrics.csv"} < artifacts_of(evaluation)


def test_executed_configs_are_stored_whatever_names_output_dir(segmenter):
    for run in runs_of(segmenter / "mlruns.db", "diffboost_segmentation"):
        names = [name for name in artifacts_of(run) if name.startswith("config_")]
        assert len(names) == 1
        executed = json.loads((segmenter / names[0]).read_text())
        assert executed["epochs"] == 1 and executed["channels"] == SMALL["channels"]


def test_tracking_changes_no_weight(segmenter, tmp_path):
    plain = SMALL | {"store_dir": str(segmenter.parent / "balls"), "epochs": 1}
    bundle_run(SEGMENTATION, ["train"], **plain, output_dir=str(tmp_path / "models"))
    names = {path.name for path in (tmp_path / "models").iterdir()}
    assert "mlruns.db" not in names and not any(name.startswith("config_") for name in names)
    for name in ("model.pt", "training_log.csv"):
        assert (tmp_path / "models" / name).read_bytes() == (segmenter / name).read_bytes()


def test_a_generator_is_tracked(tmp_path, database):
    study = write_study(tmp_path, num_slices=2)
    knobs = {"store_dir": str(study / "store"), "backbone": str(study / "backbone"), "epochs": 1}
    knobs |= {"image_size": 32, "num_copies": 2, "device": "cpu"}
    knobs |= {"output_dir": str(tmp_path / "models"), "tracking": "mlflow", "val_interval": 1}
    bundle_run(FINETUNE, ["train", "tensorboard"], **knobs)
    (run,) = runs_of(database, "task_finetune")
    assert run.data.metrics["train_loss"] > 0 and run.data.metrics["val_loss"] > 0
    assert len([name for name in artifacts_of(run) if name.startswith("config_")]) == 1
    events = EventAccumulator(str(tmp_path / "models" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= {"train_loss", "val_loss"}


def test_curves_and_pictures_of_a_segmenter(segmenter, tmp_path):
    knobs = SMALL | {"store_dir": str(segmenter.parent / "balls"), "picture_interval": 1}
    bundle_run(SEGMENTATION, ["train", "tensorboard"], **knobs, output_dir=str(tmp_path / "models"))
    events = EventAccumulator(str(tmp_path / "models" / "tensorboard")).Reload()
    assert len(events.Scalars("val_dice")) == 2
    assert set(events.Tags()["images"]) == {
        f"{name}_HW_0" for name in ("input_0", "input_1", "output")
    }


def test_without_tracking_nothing_is_stored(tmp_path):
    log_results(str(tmp_path), ["run.json"], True, "sqlite:///nowhere.db", "x", "y")
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_in_place_already_still_gets_its_files(tmp_path, database):
    (tmp_path / "run.json").write_text("{}")
    for _ in range(2):
        log_results(str(tmp_path), ["run.json", "none.csv"], None, "", "x", "y")
    (run,) = runs_of(database, "x")
    assert artifacts_of(run) == {"run.json"} and run.info.status == "FINISHED"


def test_a_report_is_stored(tmp_path, database):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("page")
    (tmp_path / "summary.json").write_text("{}")
    store_report(tmp_path)
    (run,) = runs_of(database, "diffboost_study")
    assert artifacts_of(run) == {"index.html", "summary.json"}
    with pytest.raises(SystemExit, match="tracking: 'wandb'; allowed: mlflow"):
        cli.report(str(tmp_path), tracking="wandb")


def test_names_of_runs_and_forms_of_output(tmp_path):
    assert name_run(str(tmp_path / "models")).startswith("models_")
    engine = Engine(lambda engine, batch: {"loss": batch})
    ListedOutput().attach(engine)
    engine.run([3])
    assert engine.state.output == [{"loss": 3}]
    assert loss_of(engine.state.output) == loss_of({"loss": 3}) == 3

"""Checkpoints: a training that is stopped anywhere ends with the bytes of one that was not."""

import errno
import json
import logging
import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.transforms import RandomizableTransform
from torch.utils.data import DataLoader

from diffboost import checkpoint_files
from diffboost.checkpoint_files import read_newest, write_checkpoint
from diffboost.checkpoints import Checkpoints
from diffboost.data.addresses import AddressedDataset, AddressedSampler
from diffboost.files import sha256_of_files, write_aside
from diffboost.generation.saving import AveragedWeightsSaver
from diffboost.handlers import BestWeightsSaver, TrainingLog
from diffboost.locks import hold_folder, release_folder
from diffboost.runs import (
    MoveIntoPlace,
    hash_inputs,
    move_into_place,
    refuse_other_run,
    resume_run,
    run_to_end,
)
from diffboost.segmentation.evaluation import CaseDice

EPOCHS, STEPS = 4, 5  # of 2 samples; 9 samples, so that the last batch has one
LAST = EPOCHS * STEPS


class DrawNoised(RandomizableTransform):
    """Adds drawn noise to an image."""

    def __call__(self, data):
        noise = self.R.standard_normal(data["image"].shape).astype("float32")
        return data | {"image": data["image"] + torch.from_numpy(noise)}


class Stopped(BaseException):
    """As a kill: nobody catches it."""


class StopAt:
    """Stops a run when its trainer has made a number of steps."""

    def __init__(self, step, error=Stopped):
        self.step, self.error = step, error

    def attach(self, engine):
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop)

    def _stop(self, engine):
        if engine.state.iteration == self.step:
            raise self.error


def train(folder, handlers=(), interval=3, num_workers=0, loss=None, settings=None, batch_size=2):
    """One run, as a training config makes it: dropout, schedule, average, selection, log."""
    torch.manual_seed(0), np.random.seed(0)
    partial_dir, output_dir = folder / "model.partial", folder / "model"
    settings = settings or {"epochs": EPOCHS}
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Dropout(0.5), torch.nn.Conv2d(4, 2, 1)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, LAST)
    images = np.random.RandomState(1).standard_normal((9, 1, 8, 8)).astype("float32")
    items = [
        {"image": torch.from_numpy(image), "label": torch.from_numpy(image > 0).long(), "case": n}
        for n, image in enumerate(images)
    ]
    data = AddressedDataset(items, DrawNoised(), seed=0)
    sampler = AddressedSampler(data, seed=0, batch_size=batch_size)
    cross_entropy = loss or (
        lambda pred, label: torch.nn.functional.cross_entropy(pred, label[:, 0])
    )
    from monai.transforms import AsDiscreted

    validator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(items[:3], batch_size=2),
        network=network,
        postprocessing=AsDiscreted("pred", argmax=True, dim=1),
        key_val_metric={"val_dice": CaseDice(2)},
        decollate=False,
        val_handlers=[BestWeightsSaver(network, str(partial_dir))],
    )
    log = TrainingLog(str(partial_dir / "training_log.csv"), validator, names=("val_dice",))
    average = AveragedWeightsSaver(network, str(partial_dir / "average"), {"cases": {}})
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=EPOCHS,
        train_data_loader=DataLoader(data, batch_size, sampler=sampler, num_workers=num_workers),
        network=network,
        optimizer=optimizer,
        loss_function=cross_entropy,
        postprocessing=AsDiscreted("pred", argmax=True, dim=1),
        key_train_metric={"train_dice": CaseDice(2)},
        decollate=False,
        train_handlers=[
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            ValidationHandler(1, validator),
            average,
            log,
            *handlers,
            MoveIntoPlace(str(partial_dir), str(output_dir), settings),
        ],
    )
    parts = {"network": network, "optimizer": optimizer, "lr_scheduler": schedule}
    saved = Checkpoints(str(partial_dir / "checkpoints"), parts, interval, validator)
    resume_run(partial_dir, settings)
    run_to_end(trainer, saved, str(partial_dir), str(output_dir), settings)
    return trainer


def hashes(folder):
    """Hash of every file below a folder that says nothing of time."""
    return {
        path.relative_to(folder).as_posix(): sha256_of_files([path])
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.csv"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of a run that nothing disturbed, and its training Dice."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = train(folder)
    return hashes(folder), trainer.state.metrics["train_dice"]


def test_an_undisturbed_run_leaves_its_results_alone(whole):
    names = {"average/lineage.json", "average/model.pt", "model.pt", "run.json", "training_log.csv"}
    assert set(whole[0]) == {f"model/{name}" for name in names}


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7, 9, 10, 13, 16, LAST])
def test_a_run_stopped_at_any_step_ends_with_the_same_bytes(whole, tmp_path, step):
    with pytest.raises(Stopped):
        train(tmp_path, [StopAt(step)])
    assert not (tmp_path / "model").exists()
    trainer = train(tmp_path)
    assert hashes(tmp_path) == whole[0]
    assert trainer.state.metrics["train_dice"] == whole[1]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_workers_change_nothing(whole, tmp_path, num_workers):
    with pytest.raises(Stopped):
        train(tmp_path, [StopAt(8)], num_workers=num_workers)
    train(tmp_path, num_workers=num_workers)
    assert hashes(tmp_path) == whole[0]


def test_at_most_one_interval_is_done_again(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, [StopAt(12)])
    steps = [path.name for path in sorted((tmp_path / "model.partial/checkpoints").iterdir())]
    assert steps == ["step_0000000006", "step_0000000009"]
    count = StopAt(10)
    with pytest.raises(Stopped):
        train(tmp_path, [count])  # begins with step 10: what was saved at 9 is not done again
    trainer = train(tmp_path)
    assert trainer.state.iteration == LAST and trainer.state.epoch == EPOCHS


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, caplog):
    with pytest.raises(Stopped):
        train(tmp_path, [StopAt(12)])
    state = tmp_path / "model.partial/checkpoints/step_0000000009/state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        train(tmp_path)
    assert "step_0000000009 is damaged" in caplog.text
    assert hashes(tmp_path) == whole[0]


def test_a_full_disk_keeps_the_checkpoint_before(whole, tmp_path, monkeypatch):
    save = checkpoint_files.save_tensors

    def fill(content, path):
        if content["step"] == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    monkeypatch.setattr(checkpoint_files, "save_tensors", fill)
    with pytest.raises(OSError, match="checkpoint of step 9 could not be written") as error:
        train(tmp_path)
    assert error.value.errno == errno.ENOSPC
    folder = tmp_path / "model.partial/checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == [
        "step_0000000003",
        "step_0000000006",
    ]
    monkeypatch.undo()
    train(tmp_path)
    assert hashes(tmp_path) == whole[0]


def test_a_diverging_loss_stops_the_run_before_it_is_saved(tmp_path):
    calls = []

    def diverge(pred, label):
        calls.append(1)
        loss = torch.nn.functional.cross_entropy(pred, label[:, 0])
        return loss * float("nan") if len(calls) == 8 else loss

    with pytest.raises(FloatingPointError, match="loss: nan at step 8; .* that of step 6"):
        train(tmp_path, loss=diverge)
    assert not (tmp_path / "model").exists()
    newest = read_newest(tmp_path / "model.partial/checkpoints")
    assert newest["step"] == 6
    assert all(torch.isfinite(value).all() for value in newest["parts"]["network"].values())


def test_divergence_in_the_last_steps_is_seen_too(tmp_path):
    def diverge(pred, label):
        return torch.nn.functional.cross_entropy(pred, label[:, 0]) / 0

    with pytest.raises(FloatingPointError, match="loss: inf at step 1;"):
        train(tmp_path, loss=diverge, interval=1000)
    assert not (tmp_path / "model").exists()


def test_sigterm_ends_at_a_checkpoint(whole, tmp_path):
    class Terminate(StopAt):
        def _stop(self, engine):
            if engine.state.iteration == self.step:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        train(tmp_path, [Terminate(7)], interval=1000)
    assert error.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert read_newest(tmp_path / "model.partial/checkpoints")["step"] == 7
    train(tmp_path)
    assert hashes(tmp_path) == whole[0]


def test_a_finished_run_is_not_done_again(whole, tmp_path, caplog):
    train(tmp_path)
    stamp = (tmp_path / "model/model.pt").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        trainer = train(tmp_path)
    assert "is in place already" in caplog.text and trainer.state.iteration == 0
    assert (tmp_path / "model/model.pt").stat().st_mtime_ns == stamp
    assert hashes(tmp_path) == whole[0]


def test_another_run_of_the_folder_is_refused(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, [StopAt(4)])
    with pytest.raises(ValueError, match=r"holds another run \(epochs 4 instead of 5\)"):
        train(tmp_path, settings={"epochs": 5})


def test_a_run_of_other_steps_an_epoch_does_not_go_on(tmp_path):
    """With two processes for one it left out every second epoch that was still to come."""
    with pytest.raises(Stopped):
        train(tmp_path, [StopAt(7)])
    with pytest.raises(ValueError, match="has 9 steps, one of the training that was stopped 5; go"):
        train(tmp_path, batch_size=1)


def test_a_model_of_no_known_run_is_not_replaced(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.pt").write_text("shipped")
    with pytest.raises(ValueError, match=r"output_dir: .*models holds a model.pt without run.json"):
        refuse_other_run(tmp_path / "models", {"seed": 1})
    (tmp_path / "models/run.json").write_text('{"seed": 1}')
    refuse_other_run(tmp_path / "models", {"seed": 1})


def test_a_move_that_was_stopped_is_ended(tmp_path, monkeypatch):
    partial_dir, output_dir = tmp_path / "a.partial", tmp_path / "a"
    names = ("model.pt", "training_log.csv", "zebra")
    for stopped_at in range(4):
        resume_run(partial_dir, {"seed": 1})
        for name in names:
            (partial_dir / name).write_text(name)
        (partial_dir / "checkpoints").mkdir()
        moves = []

        def replace(source, target, moves=moves, stopped_at=stopped_at):
            if source.parent == partial_dir and not source.name.endswith(".partial"):
                if len(moves) == stopped_at:
                    raise Stopped
                moves.append(source)
            os.rename(source, target)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr("diffboost.runs.os.replace", replace)
            move_into_place(partial_dir, output_dir, {"seed": 1})
        refuse_other_run(output_dir, {"seed": 1})  # its model.pt has no run.json yet
        resume_run(partial_dir, {"seed": 1})
        assert {path.name for path in output_dir.iterdir()} == {*names, "run.json"}
        assert [path.name for path in partial_dir.iterdir()] == ["run.json"]


def _hold_and_wait(folder, told):
    hold_folder(folder)
    told.set()
    signal.pause()


def test_two_runs_into_one_folder_are_refused_and_a_killed_one_lets_go(tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.Event()
    process = context.Process(target=_hold_and_wait, args=(tmp_path / "run", told))
    process.start()
    assert told.wait(60)
    with pytest.raises(BlockingIOError, match=f"process {process.pid} on .* is writing into it"):
        hold_folder(tmp_path / "run")
    process.kill()
    process.join()
    hold_folder(tmp_path / "run")
    assert (tmp_path / "run.lock").is_file()
    release_folder(tmp_path / "run")
    assert not (tmp_path / "run.lock").exists()


def test_reading_passes_over_unfinished_folders(tmp_path):
    assert read_newest(tmp_path / "none") is None
    write_checkpoint(tmp_path, {"step": 5, "parts": {"a": torch.ones(2)}})
    partial = tmp_path / "step_0000000009.partial"
    partial.mkdir()
    (partial / "state.pt").write_text("half")
    (tmp_path / "step_0000000008").mkdir()  # without a manifest
    newest = read_newest(tmp_path)
    assert newest["step"] == 5 and newest["parts"]["a"].tolist() == [1, 1]
    assert not partial.exists()


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = write_checkpoint(tmp_path, {"step": 5})
    torch.save({"step": 5, "parts": Payload()}, path / "state.pt")
    manifest = {"step": 5, "sha256": {"state.pt": sha256_of_files([path / "state.pt"])}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="(?i)weights.only"):
        read_newest(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")

    def fail(partial):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: this file could not be written"):
        write_aside(path, fail)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_inputs_are_told_apart_by_content(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "dataset.json").write_text("{}")
    weights = tmp_path / "model.pt"
    weights.write_text("a")
    before = hash_inputs(store_dir=str(store), weights=str(weights), synthetic_dir=None)
    assert set(before) == {"store_dir", "weights"}
    (store / "index.parquet").write_text("rows")
    after = hash_inputs(store_dir=str(store), weights=str(weights))
    assert before["store_dir"] != after["store_dir"] and before["weights"] == after["weights"]


def test_an_interval_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_interval: 0; at least 1"):
        Checkpoints(str(tmp_path), {}, interval=0)


def test_timing_has_a_row_an_epoch(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, [StopAt(12)])
    train(tmp_path)
    timing = pd.read_csv(tmp_path / "model/timing.csv")
    assert list(timing.epoch) == [1, 2, 3, 4] and timing.seconds.is_monotonic_increasing


def test_a_run_that_got_nowhere_is_not_in_the_way_of_another(tmp_path):
    resume_run(tmp_path / "a.partial", {"seed": 1})
    (tmp_path / "a.partial/training_log.csv").write_text("epoch")
    resume_run(tmp_path / "a.partial", {"seed": 2})
    assert [path.name for path in (tmp_path / "a.partial").iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "a.partial/run.json").read_text()) == {"seed": 2}
    release_folder(tmp_path / "a.partial")

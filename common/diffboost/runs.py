"""The folder of a run: held by one process, taken up when it was stopped, put in place when whole.

A run writes into ``<output_dir>.partial``. What it is stands in run.json, there and, in the end, in
``output_dir``.
"""

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ignite.engine import Engine, Events
from monai.engines import Trainer

from diffboost.checkpoints import Checkpoints
from diffboost.data.documents import read_json
from diffboost.files import flush, flush_folder, sha256_of_files, write_json
from diffboost.locks import hold_folder, release_folder
from diffboost.processes import is_main_process, wait_for_processes

logger = logging.getLogger(__name__)

RECORD = "run.json"
MODEL = "model.pt"
FINISHED = "finished.json"  # in a partial folder: all is there, and where it belongs
CHECKPOINTS = "checkpoints"
IDENTITY = ("dataset.json", "index.parquet", "manifest.parquet", MODEL, "lineage.json")


def hash_inputs(**inputs: str | None) -> dict[str, str]:
    """Hashes of what a run starts from, so that its run.json tells other contents of the same path.

    Args:
        inputs: a file, or a folder by its files that tell the rest (a store's header and index, a
            synthetic store's manifest, a model); None is left out.

    Source: engineering choice.
    """
    hashes = {}
    for name, value in inputs.items():
        if value is not None and Path(value).exists():
            path = Path(value)
            files = [path] if path.is_file() else [path / part for part in IDENTITY]
            hashes[name] = sha256_of_files(file for file in files if file.is_file())
    return hashes


def refuse_other_run(output_dir: str | Path, settings: Mapping) -> None:
    """Refuse an output folder that holds a run of other settings, or a model of no known run.

    First in a run list, where a person started the run: a federated client, which runs no list,
    replaces the model of its ``output_dir``.

    Args:
        output_dir: the folder.
        settings: what the new run is; compared with the folder's ``run.json``.

    Raises:
        ValueError: the folder holds another run, whose differing settings are named; or a model.pt
            without ``run.json``, such as one that ships with a bundle.

    Source: engineering choice (design, "Failure").
    """
    folder = Path(output_dir)
    moving = Path(f"{output_dir}.partial", FINISHED).is_file()  # a kill stopped its move
    if (folder / MODEL).is_file() and not (moving or (folder / RECORD).is_file()):
        raise ValueError(
            f"output_dir: {output_dir} holds a {MODEL} without {RECORD}: one that ships with a "
            "bundle, or of elsewhere, which this run would replace; give another --output_dir"
        )
    _refuse_other_settings(output_dir, settings)


def _refuse_other_settings(output_dir: str | Path, settings: Mapping) -> None:
    """Raises ValueError if a folder's ``run.json`` says other settings."""
    record = Path(output_dir) / RECORD
    if not record.is_file():
        return
    found = read_json(record, "output_dir")
    names = ", ".join(
        f"{key} {found[key]!r} instead of {value!r}"
        if key in found
        else f"{key} {value!r}, of which an older version recorded nothing"
        for key, value in _as_recorded(settings).items()
        if found.get(key) != value
    )
    if names:
        raise ValueError(
            f"output_dir: {output_dir} holds another run ({names}); "
            "name another folder, or remove this one"
        )


def resume_run(partial_dir: str | Path, settings: Mapping) -> None:
    """Hold a partial folder: a new one, or that of a stopped run of the same settings.

    A run that was stopped while its files were moved into place is moved to the end first.

    Args:
        partial_dir: where the run writes; what lies there without a ``run.json``, or of another run
            that got no results, is removed.
        settings: what the run is; written into the folder's ``run.json``.

    Raises:
        ValueError: the folder holds an interrupted run of other settings, with results.
        BlockingIOError: another process is writing into it.

    Source: engineering choice (design, "Failure").
    """
    partial_dir = Path(partial_dir)
    if is_main_process():
        hold_folder(partial_dir)
        if (partial_dir / FINISHED).is_file():
            _move(partial_dir)
        if _has_results(partial_dir):
            _refuse_other_settings(partial_dir, settings)
        if not _is_same_run(partial_dir, settings):
            shutil.rmtree(partial_dir, ignore_errors=True)
            write_json(partial_dir / RECORD, settings)
    wait_for_processes()


def _has_results(partial_dir: Path) -> bool:
    """Whether a run has got so far that another one must not take its folder: a checkpoint, or a
    file in another folder such as images/."""
    folders = [path for path in partial_dir.glob("*") if path.is_dir()]
    return any(path.is_file() for folder in folders for path in folder.rglob("*"))


def _is_same_run(folder: Path, settings: Mapping) -> bool:
    """Whether a folder's ``run.json`` says these settings."""
    record = folder / RECORD
    return record.is_file() and read_json(record, "output_dir") == _as_recorded(settings)


def _as_recorded(settings: Mapping) -> dict:
    """Settings as ``run.json`` gives them back: lists for tuples, text for what JSON lacks."""
    return json.loads(json.dumps(dict(settings), default=str))


def move_into_place(partial_dir: str | Path, output_dir: str | Path, settings: Mapping) -> None:
    """Move a finished run's files from its partial folder into place, ``run.json`` last.

    Checkpoints are removed. A kill at any moment loses nothing: the next ``resume_run`` ends it.

    Args:
        partial_dir: where the run wrote; it is gone afterwards.
        output_dir: where the files belong; files of the same name are replaced.
        settings: what the run is.

    The first process moves while the others wait, so that all find the files in place afterwards.

    Source: engineering choice (design, "Failure").
    """
    if is_main_process():
        partial_dir = Path(partial_dir)
        write_json(partial_dir / RECORD, settings)
        flush_folder(partial_dir)
        write_json(partial_dir / FINISHED, {"output_dir": str(Path(output_dir).absolute())})
        _move(partial_dir)
        release_folder(partial_dir)
    wait_for_processes()


def _move(partial_dir: Path) -> None:
    """Empties a finished partial folder into the folder that it names."""
    marker = partial_dir / FINISHED
    output_dir = Path(read_json(marker, "partial_dir")["output_dir"])
    output_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial_dir / CHECKPOINTS, ignore_errors=True)
    names = sorted(path.name for path in partial_dir.iterdir())
    names = [name for name in names if name not in (FINISHED, RECORD)] + [RECORD]
    for name in names:
        source, target = partial_dir / name, output_dir / name
        if not source.exists():  # the record, moved by a run that was stopped here
            continue
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(source, target)
    flush(output_dir)
    marker.unlink()
    partial_dir.rmdir()


class MoveIntoPlace:
    """Refuses another run's output folder at the start and moves a finished run there at the end.

    Args:
        partial_dir: where the other handlers write.
        output_dir: where their files belong.
        settings: what the run is, see :func:`refuse_other_run`.

    Source: engineering choice (design, "Failure").
    """

    def __init__(self, partial_dir: str, output_dir: str, settings: Mapping) -> None:
        self.partial_dir = partial_dir
        self.output_dir = output_dir
        self.settings = settings

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's start and end; stand last in the list of handlers."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(
            Events.COMPLETED,
            lambda: move_into_place(self.partial_dir, self.output_dir, self.settings),
        )

    def _begin(self) -> None:
        """Refuses another run; makes the partial folder anew when an engine runs a second time."""
        _refuse_other_settings(self.output_dir, self.settings)
        if _has_results(Path(self.partial_dir)):  # of a run that a federated client would wipe out
            _refuse_other_settings(self.partial_dir, self.settings)
        Path(self.partial_dir).mkdir(parents=True, exist_ok=True)


def run_to_end(
    trainer: Trainer,
    checkpoints: Checkpoints,
    partial_dir: str,
    output_dir: str,
    settings: Mapping,
) -> None:
    """Trains: from the start, from where a stopped run was, or not at all if all is in place.

    ``resume_run`` stands before it in a config's run list, ``MoveIntoPlace`` among the handlers.

    Args:
        trainer: MONAI's trainer, whose loader has an ``AddressedSampler``.
        checkpoints: those of this run.
        partial_dir: where the run writes.
        output_dir: where its files belong.
        settings: what the run is.

    Raises:
        FloatingPointError: the loss diverged.
        SystemExit: SIGTERM, behind a checkpoint.

    Source: engineering choice (issue 5, "Exact resume, every stage").
    """
    done = _is_same_run(Path(output_dir), settings)
    wait_for_processes()  # all have looked
    if done and not (Path(partial_dir) / CHECKPOINTS).is_dir():
        logger.info("%s: this run is in place already; remove it to train again", output_dir)
        if is_main_process():
            shutil.rmtree(partial_dir)
            release_folder(partial_dir)
        return
    checkpoints.attach(trainer)
    with _told_to_stop(checkpoints):
        trainer.run()


@contextmanager
def _told_to_stop(checkpoints: Checkpoints) -> Iterator[None]:
    """SIGTERM goes to the checkpoints while a run lasts; only a main thread can listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, checkpoints.stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

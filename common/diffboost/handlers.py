"""Ignite handlers and file writing that every training config shares."""

import csv
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import nn

from diffboost.processes import (
    is_main_process,
    process_rank_and_count,
    sum_over_processes,
    wait_for_processes,
)

__all__ = [  # the first three stand in diffboost.processes
    "is_main_process",
    "process_rank_and_count",
    "wait_for_processes",
    "write_aside",
    "save_weights",
    "TrainingLog",
    "refuse_other_run",
    "resume_run",
    "move_into_place",
    "MoveIntoPlace",
]

logger = logging.getLogger(__name__)


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then move it into place when whole.

    Source: engineering choice (design, "Failure").
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's plain state dict (CPU tensors, loads with ``weights_only=True``)."""
    network = getattr(network, "module", network)
    state = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    write_aside(path, lambda partial: torch.save(state, partial))


class TrainingLog:
    """Writes ``training_log.csv``: epoch, mean training loss, seconds since the start, metrics.

    The loss is the mean over steps and over all processes; batches of unequal size have their right
    weight where the trainer's loss is a ``diffboost.processes.ShareOfLoss``.

    Args:
        path: the CSV file; a new run starts a new one.
        validator: the validation engine whose metrics are added; it must run before this handler.
        names: names of those metrics, one column each.
        losses: column to key of the trainer's output; None is ``train_loss`` from ``loss``.

    Source: engineering choice.
    """

    def __init__(
        self,
        path: str,
        validator: Engine | None = None,
        names: tuple[str, ...] = (),
        losses: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.validator = validator
        self.names = tuple(names)
        self.columns = dict(losses or {"train_loss": "loss"})
        self.rows: list[Mapping[str, float]] = []
        self.losses: list[torch.Tensor] = []
        self.start = 0.0

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _begin(self, engine: Engine) -> None:
        self.start = time.monotonic()
        self.rows, self.losses = [], []

    def _collect(self, engine: Engine) -> None:
        output = engine.state.output
        output = output[0] if isinstance(output, list) else output
        losses = [torch.as_tensor(output[key]).detach() for key in self.columns.values()]
        self.losses.append(torch.stack(losses))

    def _write(self, engine: Engine) -> None:
        total = sum_over_processes(torch.stack(self.losses).mean(dim=0))
        losses = (total / process_rank_and_count()[1]).tolist()
        self.losses = []
        row = {"epoch": engine.state.epoch}
        row |= {name: round(loss, 6) for name, loss in zip(self.columns, losses, strict=True)}
        validated = self.validator and self.validator.state.epoch == engine.state.epoch
        for name in self.names:
            row[name] = self.validator.state.metrics.get(name, "") if validated else ""
        row["seconds"] = round(time.monotonic() - self.start, 2)
        self.rows.append(row)
        if is_main_process():
            write_aside(self.path, self._dump)
            figures = ", ".join(f"{name} {value}" for name, value in row.items() if value != "")
            logger.info("of %d epochs: %s", engine.state.max_epochs, figures)

    def _dump(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def refuse_other_run(output_dir: str | Path, settings: Mapping) -> None:
    """Refuse an output folder that holds a finished run of other settings.

    Args:
        output_dir: the folder.
        settings: what the new run is; compared with the folder's ``run.json``.

    Raises:
        ValueError: the folder holds another run; the differing settings are named.

    Source: engineering choice (design, "Failure").
    """
    record = Path(output_dir) / "run.json"
    if not record.is_file():
        return
    found = json.loads(record.read_text(encoding="utf-8"))
    names = ", ".join(
        f"{key} {found.get(key)!r} instead of {value!r}"
        for key, value in json.loads(json.dumps(dict(settings), default=str)).items()
        if found.get(key) != value
    )
    if names:
        raise ValueError(
            f"output_dir: {output_dir} holds another run ({names}); "
            "name another folder, or remove this one"
        )


def resume_run(partial_dir: str | Path, settings: Mapping) -> None:
    """Start a partial folder, or take up that of an interrupted run of the same settings.

    Args:
        partial_dir: where the run writes; what lies there without a ``run.json`` is removed.
        settings: what the run is; written into the folder's ``run.json``.

    Raises:
        ValueError: the folder holds an interrupted run of other settings.

    Source: engineering choice (design, "Failure").
    """
    refuse_other_run(partial_dir, settings)
    partial_dir = Path(partial_dir)
    if is_main_process() and not (partial_dir / "run.json").is_file():
        shutil.rmtree(partial_dir, ignore_errors=True)
        _write_settings(partial_dir, settings)
    wait_for_processes()


def _write_settings(folder: Path, settings: Mapping) -> None:
    text = json.dumps(dict(settings), indent=1, default=str) + "\n"
    write_aside(folder / "run.json", lambda path: path.write_text(text, encoding="utf-8"))


def move_into_place(partial_dir: str | Path, output_dir: str | Path, settings: Mapping) -> None:
    """Write ``run.json`` and move a finished run's files from its partial folder into place.

    Args:
        partial_dir: where the run wrote; it is gone afterwards.
        output_dir: where the files belong; files of the same name are replaced.
        settings: what the run is.

    The first process moves while the others wait, so that all find the files in place afterwards.

    Source: engineering choice (design, "Failure").
    """
    if is_main_process():
        _move(Path(partial_dir), Path(output_dir), settings)
    wait_for_processes()


def _move(partial_dir: Path, output_dir: Path, settings: Mapping) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial_dir.iterdir()):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    partial_dir.rmdir()
    _write_settings(output_dir, settings)


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
        refuse_other_run(self.output_dir, self.settings)
        Path(self.partial_dir).mkdir(parents=True, exist_ok=True)

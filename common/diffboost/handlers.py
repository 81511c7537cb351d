"""Ignite handlers that every training config shares."""

import csv
import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch import nn

from diffboost.checkpoints import announce
from diffboost.files import save_tensors, write_aside
from diffboost.processes import is_main_process, process_rank_and_count, sum_over_processes

logger = logging.getLogger(__name__)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's plain state dict (CPU tensors, loads with ``weights_only=True``).

    Whatever the network's layout in memory, the file has rows of rows.
    """
    network = getattr(network, "module", network)
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    write_aside(path, functools.partial(save_tensors, state))


class BestWeightsSaver:
    """Writes ``model.pt`` whenever a validation is the best so far, by the validator's key metric.

    MONAI's CheckpointSaver does the same, but forgets the best score when a run is taken up, and a
    kill while it writes leaves half a file.

    Args:
        network: the network in training.
        output_dir: folder for ``model.pt``.

    Source: engineering choice.
    """

    def __init__(self, network: nn.Module, output_dir: str) -> None:
        self.network = network
        self.output_dir = Path(output_dir)

    def attach(self, engine: Evaluator) -> None:
        """Listen to the validator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _save(self, engine: Evaluator) -> None:
        if engine.state.best_metric_epoch == engine.state.epoch and is_main_process():
            save_weights(self.network, self.output_dir / "model.pt")


class TrainingLog:
    """Writes ``training_log.csv``, a row an epoch: mean training loss and metrics; and how long.

    The loss is the mean over steps and over all processes; batches of unequal size have their right
    weight where the trainer's loss is a ``diffboost.processes.ShareOfLoss``. Seconds since the
    start, which no two runs share, stand apart in ``timing.csv``.

    Args:
        path: the CSV file; timing.csv lies beside it. A new run starts new ones; a trainer that
            goes on for some more epochs, as in a federated round, adds rows.
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
        self.rows: list[dict[str, float]] = []
        self.times: list[dict[str, float]] = []
        self.losses: list[torch.Tensor] = []
        self.start = 0.0

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)
        announce(engine, "training_log", self)

    def state_dict(self) -> dict:
        """Rows so far, and the losses of the unfinished epoch, their mean over all processes."""
        seconds = time.monotonic() - self.start
        losses = self._joint_losses() if self.losses else torch.zeros(0, len(self.columns))
        return {"rows": self.rows, "times": self.times, "losses": losses, "seconds": seconds}

    def load_state_dict(self, state: dict) -> None:
        """Takes what ``state_dict`` gave; the time that passed in between does not count."""
        self.rows, self.times = list(state["rows"]), list(state["times"])
        self.losses = list(state["losses"])
        self.start = time.monotonic() - state["seconds"]

    def _begin(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self.start = time.monotonic()
            self.rows, self.times, self.losses = [], [], []

    def _collect(self, engine: Engine) -> None:
        output = engine.state.output
        output = output[0] if isinstance(output, list) else output
        losses = [torch.as_tensor(output[key]).detach() for key in self.columns.values()]
        self.losses.append(torch.stack(losses))

    def _joint_losses(self) -> torch.Tensor:
        """Losses (steps, columns) of the epoch so far, the mean of all processes."""
        device = self.losses[-1].device
        losses = torch.stack([loss.to(device) for loss in self.losses])
        return sum_over_processes(losses) / process_rank_and_count()[1]

    def _write(self, engine: Engine) -> None:
        losses = self._joint_losses().mean(dim=0).tolist()
        self.losses = []
        row = {"epoch": engine.state.epoch}
        row |= {name: round(loss, 6) for name, loss in zip(self.columns, losses, strict=True)}
        validated = self.validator and self.validator.state.epoch == engine.state.epoch
        for name in self.names:
            row[name] = self.validator.state.metrics.get(name, "") if validated else ""
        self.rows.append(row)
        seconds = round(time.monotonic() - self.start, 2)
        self.times.append({"epoch": engine.state.epoch, "seconds": seconds})
        if is_main_process():
            _write_rows(self.path, self.rows)
            _write_rows(self.path.with_name("timing.csv"), self.times)
            shown = row | {"seconds": seconds}
            figures = ", ".join(f"{name} {value}" for name, value in shown.items() if value != "")
            logger.info("of %d epochs: %s", engine.state.max_epochs, figures)


def _write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a CSV whose columns are the keys of the first row."""

    def dump(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_aside(path, dump)

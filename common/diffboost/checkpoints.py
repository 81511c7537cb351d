"""Checkpoints: all that a killed training needs to go on and end with the bytes it would have had.

What a sample or a step draws has an address (``data.addresses``), so that a position and the states
of the generators stand for all draws to come.
"""

import logging
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator, Trainer

from diffboost.checkpoint_files import read_newest, write_checkpoint
from diffboost.processes import (
    gather_objects,
    is_main_process,
    process_rank_and_count,
    sum_over_processes,
    wait_for_processes,
)

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """What a checkpoint can hold; in several processes all of them ask for a state at once."""

    def state_dict(self) -> dict:
        """Tensors and plain values."""

    def load_state_dict(self, state: dict) -> None:
        """Takes what ``state_dict`` gave."""


def announce(engine: Engine, name: str, part: Stateful) -> None:
    """Makes a handler's or metric's state a part of the engine's checkpoints.

    Args:
        engine: what it is attached to.
        name: its name in the checkpoints, the same in every run.
        part: the handler or metric.

    Source: engineering choice.
    """
    engine.state.announced = {**getattr(engine.state, "announced", {}), name: part}


class Checkpoints:
    """Saves a trainer's whole state every few steps, takes it up again, stops where it diverges.

    A checkpoint that would fall on the last step of an epoch waits for what follows the epoch:
    validation, logs. At SIGTERM one is saved at once (of several processes: at the next turn), and
    the process ends with 143.

    Args:
        folder: where they lie, one folder each.
        parts: what has a state by name: network, optimizer, learning rate schedule …; what handlers
            announced is added.
        interval: steps between two; at most so many are done twice.
        validator: the engine that chooses the best epoch; its best score is kept.

    Raises:
        ValueError: the interval is below 1.

    Source: engineering choice (issue 5, "Exact resume, every stage").
    """

    def __init__(
        self,
        folder: str,
        parts: Mapping[str, Stateful],
        interval: int = 200,
        validator: Evaluator | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"checkpoint_interval: {interval}; at least 1 step is needed")
        self.folder = Path(folder)
        self.parts = dict(parts)
        self.interval = interval
        self.validator = validator
        self.pending: dict | None = None
        self.saved = 0  # step of the newest one
        self.losses: list[torch.Tensor] = []  # since then
        self.stopped = False

    def attach(self, trainer: Trainer) -> None:
        """Listens to the trainer, behind all its handlers; takes up the newest whole checkpoint."""
        trainer.add_event_handler(Events.STARTED, self._load_between_epochs)
        trainer.add_event_handler(Events.EPOCH_STARTED, self._load)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._restore_generators)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._complete_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._complete_epoch)
        self.pending = read_newest(self.folder)
        if self.pending is None:
            return
        step = self.saved = self.pending["step"]
        epoch_length = self.pending.get("epoch_length", trainer.state.epoch_length)
        if epoch_length != trainer.state.epoch_length:
            raise ValueError(
                f"{self.folder}: an epoch of this training has {trainer.state.epoch_length} steps, "
                f"one of the training that was stopped {epoch_length}; go on with as many "
                "processes as it had, or begin anew in another output_dir"
            )
        trainer.state.iteration = step
        trainer.state.epoch, done = divmod(step, trainer.state.epoch_length)
        trainer.data_loader.sampler.go_on(trainer.state.epoch, done)
        logger.info("going on from step %d, epoch %d", step, trainer.state.epoch + 1)

    def stop(self, number: int = signal.SIGTERM, frame: object = None) -> None:
        """Signal handler: the run ends behind this step, at its checkpoint."""
        self.stopped = True

    def _load_between_epochs(self, trainer: Trainer) -> None:
        """Fills all parts before the epoch starts, at which metrics forget the epoch before."""
        if self.pending is not None and self.pending["step"] % trainer.state.epoch_length == 0:
            self._load(trainer)

    def _load(self, trainer: Trainer) -> None:
        """Fills all parts; within an epoch after its start, so that metrics keep their counts."""
        if self.pending is None or "parts" not in self.pending:
            return
        states = self.pending.pop("parts")
        for name, part in self._all_parts(trainer).items():
            part.load_state_dict(states[name])
        if trainer.scaler is not None:
            trainer.scaler.load_state_dict(states["scaler"])
        if self.validator is not None:
            vars(self.validator.state).update(states["best"])
        self._set_generators(trainer)

    def _restore_generators(self, trainer: Trainer) -> None:
        """Sets them once more: a loader that begins within an epoch has drawn from them."""
        if self.pending is not None:
            if self.pending["step"] % trainer.state.epoch_length:
                self._set_generators(trainer)
            self.pending = None

    def _set_generators(self, trainer: Trainer) -> None:
        """The states of this process."""
        set_generator_states(self.pending["generators"][process_rank_and_count()[0]])

    def _all_parts(self, trainer: Trainer) -> dict[str, Stateful]:
        return self.parts | getattr(trainer.state, "announced", {})

    def _complete_step(self, trainer: Trainer) -> None:
        output = trainer.state.output
        output = output[0] if isinstance(output, list) else output
        losses = [value for key, value in output.items() if key.endswith("loss")]
        self.losses.append(torch.stack([torch.as_tensor(loss).detach() for loss in losses]).sum())
        if trainer.state.iteration % trainer.state.epoch_length:
            self._take_turn(trainer)

    def _complete_epoch(self, trainer: Trainer) -> None:
        self._take_turn(trainer, last=trainer.state.epoch == trainer.state.max_epochs)

    def _take_turn(self, trainer: Trainer, last: bool = False) -> None:
        """Saves if it is time; refuses to where the loss diverged; ends a run that is to stop."""
        step, alone = trainer.state.iteration, process_rank_and_count()[1] == 1
        due = step - self.saved >= self.interval
        if last or not (due or self.stopped and alone):
            if last:
                self._refuse_divergence(step)
            return
        self._refuse_divergence(step)
        self._save(trainer)
        if sum_over_processes(torch.tensor(float(self.stopped), device=trainer.state.device)) > 0:
            logger.warning("SIGTERM: checkpoint of step %d is in %s", step, self.folder)
            logger.warning("the same command goes on from there")
            raise SystemExit(128 + signal.SIGTERM)

    def _refuse_divergence(self, step: int) -> None:
        """Raises where a loss since the last checkpoint is not finite; asks the device only here.

        Raises:
            FloatingPointError: names the step.
        """
        losses = sum_over_processes(torch.stack(self.losses)) if self.losses else torch.zeros(0)
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if bad:
            first = step - len(losses) + bad[0] + 1
            raise FloatingPointError(
                f"loss: {float(losses[bad[0]])} at step {first}; training diverged. The last good "
                f"state is that of step {self.saved}; a lower learning_rate (or another precision) "
                "may help, in another output_dir"
            )
        self.losses = []

    def _save(self, trainer: Trainer) -> None:
        """Writes a checkpoint of this step; only the first process writes."""
        states = {name: part.state_dict() for name, part in self._all_parts(trainer).items()}
        if trainer.scaler is not None:
            states["scaler"] = trainer.scaler.state_dict()
        if self.validator is not None:
            state = vars(self.validator.state)
            states["best"] = {key: state[key] for key in ("best_metric", "best_metric_epoch")}
        step = self.saved = trainer.state.iteration
        content = {"step": step, "epoch_length": trainer.state.epoch_length, "parts": states}
        content |= {"generators": gather_objects(generator_states())}
        if is_main_process():
            write_checkpoint(self.folder, content)
        wait_for_processes()


def generator_states() -> dict:
    """States of the global random generators of Python, NumPy and torch, as tensors and tuples.

    Source: engineering choice.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_generator_states(states: Mapping) -> None:
    """Sets what :func:`generator_states` gave.

    Source: engineering choice.
    """
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

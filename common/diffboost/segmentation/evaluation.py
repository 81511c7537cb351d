"""Evaluation: case Dice for model selection; whole cases, measured and written, at test."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing

from diffboost.checkpoints import announce
from diffboost.data.slices import read_store, write_label
from diffboost.data.tasks import read_task
from diffboost.knobs import nearest
from diffboost.processes import gather_objects, is_main_process, process_rank_and_count
from diffboost.records import DoneCases, same_command_goes_on
from diffboost.segmentation.case_results import is_open, origin_of
from diffboost.segmentation.metrics import case_metrics, check_rules
from diffboost.segmentation.source_geometry import most_likely, slice_axis_of, stack_slices

VOLUMES = ("whole", "foreground")

logger = logging.getLogger(__name__)


class CaseDice(Metric):
    """Mean over cases and foreground classes of the Dice of a whole case, gathered from its slices.

    Slice Dice would ignore or overrate empty slices; here the pixels of a case are counted first.
    Both empty counts as 1, as in ``case_metrics``. Reads ``pred``, logits (B, classes, H, W) or
    class index (B, 1, H, W), ``label``, class index, or lists of their items, and the batch's
    ``case``; without ``case`` every item is one.
    Processes that share the slices of a case count its pixels together.

    Args:
        num_classes: number of classes with background.

    Source: engineering choice (selection on what is measured at test)
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        super().__init__()

    def attach(self, engine: Engine, name: str, *args, **kwargs) -> None:
        """Listens to an engine; the counts so far are a part of its checkpoints."""
        super().attach(engine, name, *args, **kwargs)
        announce(engine, name, self)

    def reset(self) -> None:
        """Forgets all cases."""
        self.counts: dict[object, torch.Tensor] = {}

    def state_dict(self) -> dict:
        """The counts of all processes by case."""
        return {"counts": self._joint_counts()}

    def load_state_dict(self, state: dict) -> None:
        """Takes what ``state_dict`` gave; the first process keeps it for all."""
        self.counts = dict(state["counts"]) if is_main_process() else {}

    def iteration_completed(self, engine: Engine) -> None:
        """Hands batch and output to ``update``; ignite's own would hand over the output alone."""
        batch, output = engine.state.batch, engine.state.output
        if isinstance(output, Mapping):
            names = batch.get("case", [None] * len(output["pred"]))
            items = zip(names, output["pred"], output["label"], strict=True)
        else:
            names = [item.get("case") for item in batch]
            items = ((name, o["pred"], o["label"]) for name, o in zip(names, output, strict=True))
        for name, pred, label in items:
            self.update((name, pred, label))

    def update(self, output: tuple[str | None, torch.Tensor, torch.Tensor]) -> None:
        """Adds one slice or volume: its case (None: a case of its own), prediction and label."""
        name, pred, label = output
        pred = most_likely(pred) if len(pred) > 1 else pred
        name = (process_rank_and_count()[0], len(self.counts)) if name is None else name
        joint = self.num_classes * label.flatten().long() + pred.flatten().long()
        matrix = torch.bincount(joint, minlength=self.num_classes**2).cpu()
        matrix = matrix.reshape(self.num_classes, self.num_classes)  # rows: truth
        self.counts[name] = self.counts.get(name, 0) + matrix

    def compute(self) -> float:
        """The mean Dice in [0, 1], the same on every process."""
        counts = self._joint_counts()
        dice = []
        for name in sorted(counts, key=str):
            matrix = counts[name]
            both = matrix.diagonal()[1:].double()
            total = (matrix.sum(0) + matrix.sum(1))[1:].double()
            dice.append(torch.where(total > 0, 2 * both / total, 1.0))
        return float(torch.stack(dice).mean())

    def _joint_counts(self) -> dict[object, torch.Tensor]:
        """Counts by case, summed over the processes."""
        counts: dict[object, torch.Tensor] = {}
        for share in gather_objects(self.counts):
            for name, matrix in share.items():
                counts[name] = counts.get(name, 0) + matrix
        return counts


class CaseWriter:
    """Measures every case and writes its prediction and its rows, at once when it is done.

    Reads decollated items: ``pred`` and ``label`` (1, ...) class index in the source's geometry.
    Processes share the cases; ``case_results.write_scores`` joins them. Where no
    ``case_results.open_evaluation`` made the folder, as in federated clients, which run the
    evaluator alone and again in every round, nothing is written.

    Args:
        store_dir: slice store, for the names of the classes and the slices with foreground.
        partial_dir: gets predictions/ and the notes of cases that are done.
        data: the cases that the evaluator runs over, see ``case_results.missing_cases``.
        volumes: "whole" measures cases as they are; "foreground" keeps the slices whose label has
            ``min_foreground_px`` (at least 1) in the store, stacks them and stretches them to the
            case's depth before measuring, as the released code does: false positives elsewhere do
            not count and distances are not in mm. A case without such a slice is left out.
        min_foreground_px: see ``volumes``.
        empty_masks, smooth, distances: see ``case_metrics``.

    Raises:
        ValueError: one of these is unknown.

    Source: design, "Results"; facts 31, 32
    """

    def __init__(
        self,
        store_dir: str,
        partial_dir: str,
        data: Sequence[dict],
        volumes: str = "whole",
        min_foreground_px: int = 0,
        empty_masks: str = "stated",
        smooth: float = 0.0,
        distances: str = "directed",
    ) -> None:
        if volumes not in VOLUMES:
            raise ValueError(f"volumes: {volumes!r} is unknown; {nearest(volumes, VOLUMES)}")
        check_rules(empty_masks, smooth, distances)
        store = read_store(store_dir)
        self.names = {int(index): name for index, name in store.header["labels"].items()}
        self.slice_axis = read_task(store.header["task"])["slice_axis"]
        kept = store.index[store.index.foreground_px >= max(1, min_foreground_px)]
        self.kept = kept.groupby("case")["slice"].apply(sorted).to_dict()
        self.volumes = volumes
        self.rules = {"empty_masks": empty_masks, "smooth": smooth, "distances": distances}
        self.partial_dir = Path(partial_dir)
        self.done = DoneCases(partial_dir)
        rank, count = process_rank_and_count()
        self.origins = {item["case"]: origin_of(item) for item in data[rank::count]}

    def attach(self, engine: Engine) -> None:
        """Listens to the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take_batch)

    def _take_batch(self, engine: Engine) -> None:
        """Scores and writes the cases of one iteration."""
        if not is_open(self.partial_dir):
            return
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            case = item["case"]
            if case not in self.origins:  # several processes have it; another one writes it
                continue
            with same_command_goes_on(self.partial_dir):
                rows = self._measure(case, output["pred"][0], item["label"][0])
                path = self._write_prediction(case, output["pred"])
                self.done.write(case, self.origins[case], rows, [path])

    def _measure(self, case: str, pred: torch.Tensor, label: MetaTensor) -> list[dict]:
        """The rows of a case; ``pred`` and ``label`` are (H, W[, D])."""
        affine = label.affine.cpu()
        pred, label = (torch.as_tensor(x.cpu()).as_subclass(torch.Tensor) for x in (pred, label))
        spacing = [1.0, 1.0] if pred.ndim == 2 else affine_to_spacing(affine)
        if self.volumes == "foreground":
            slices = self.kept.get(case, [])
            if not slices:
                logger.warning(
                    "volumes foreground: %s has no slice with foreground, left out", case
                )
                return []
            if pred.ndim == 3:
                axis, backward = slice_axis_of(affine.numpy(), self.slice_axis)
                last = pred.shape[axis] - 1
                slices = sorted(last - number if backward else number for number in slices)
                pred, label = (stack_slices(x, axis, slices) for x in (pred, label))
        scores = case_metrics(pred, label, spacing, len(self.names), **self.rules)
        return [
            {"case": case, "label": self.names[index], "metric": name, "value": value}
            for index, values in scores.items()
            for name, value in values.items()
        ]

    def _write_prediction(self, case: str, pred: MetaTensor) -> str:
        """Writes a prediction (1, H, W[, D]) as PNG or NIfTI; its path in the partial folder."""
        (self.partial_dir / "predictions").mkdir(parents=True, exist_ok=True)
        if pred.ndim == 3:
            path = f"predictions/{case}.png"
            write_label(self.partial_dir / path, pred[0].cpu().numpy())
            return path
        path = f"predictions/{case}.nii.gz"
        # MONAI's writer would leave out the last axis of a volume of one slice
        volume = nib.Nifti1Image(pred[0].cpu().numpy().astype(np.uint8), pred.affine.cpu().numpy())
        nib.save(volume, self.partial_dir / path)
        return path

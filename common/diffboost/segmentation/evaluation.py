"""Scores of a segmentation: case Dice for model selection, five metrics of whole cases at test."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.data import NibabelWriter
from monai.data.utils import affine_to_spacing
from monai.metrics import (
    compute_average_surface_distance,
    compute_confusion_matrix_metric,
    compute_dice,
    compute_hausdorff_distance,
    get_confusion_matrix,
)
from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd

from diffboost.data.slices import read_store, write_label
from diffboost.data.tasks import read_task
from diffboost.data.transforms import MapLabelsd, case_preprocessing
from diffboost.handlers import write_aside

OVERLAPS = ("dice", "precision", "recall")
DISTANCES = ("hd95_mm", "assd_mm")

logger = logging.getLogger(__name__)


def case_metrics(
    pred: torch.Tensor, label: torch.Tensor, spacing_mm: Sequence[float], num_classes: int
) -> dict[int, dict[str, float]]:
    """Dice, precision, recall, HD95 and ASSD of every foreground class of one case.

    Empty masks: if neither holds the class, overlaps are 1 and distances 0; if one does not,
    overlaps are 0 and distances the length of the case's diagonal. Both are counted in
    ``empty_prediction`` and ``empty_truth``. HD95 is the larger of the two directed 95th
    percentiles, ASSD is symmetric. A case of one slice is measured in 2D.

    Args:
        pred: class index, integer (H, W) or (H, W, D).
        label: class index, same shape.
        spacing_mm: distance of neighbors along each axis (1 where the unit is a pixel).
        num_classes: number of classes with background.

    Returns:
        class -> {dice, precision, recall in [0, 1]; hd95_mm, assd_mm; empty_prediction,
        empty_truth in {0, 1}}.

    Raises:
        ValueError: the shapes differ.

    Source: Sec. 4; facts 31, 32 (what the released evaluation did wrong)
    """
    if pred.shape != label.shape:
        raise ValueError(f"pred: shape {tuple(pred.shape)}, label has {tuple(label.shape)}")
    if pred.ndim == 3 and pred.shape[-1] == 1:
        pred, label = pred[..., 0], label[..., 0]
    spacing = [float(value) for value in spacing_mm[: pred.ndim]]
    diagonal = math.hypot(*(n * mm for n, mm in zip(pred.shape, spacing, strict=True)))
    scores = {}
    for index in range(1, num_classes):
        found, truth = (pred == index)[None, None], (label == index)[None, None]
        empty = {
            "empty_prediction": float(not found.any()),
            "empty_truth": float(not truth.any()),
        }
        if found.any() and truth.any():
            values = _scores(found, truth, spacing)
        else:
            agree = found.any() == truth.any()
            values = dict.fromkeys(OVERLAPS, float(agree))
            values |= dict.fromkeys(DISTANCES, 0.0 if agree else diagonal)
        scores[index] = values | empty
    return scores


def _scores(found: torch.Tensor, truth: torch.Tensor, spacing: list[float]) -> dict[str, float]:
    """The five metrics of two masks, bool (1, 1, H, W[, D]), neither of them empty."""
    pair = {"y_pred": found.float(), "y": truth.float(), "include_background": True}
    confusion = get_confusion_matrix(**pair)
    values = {
        "dice": compute_dice(**pair),
        "precision": compute_confusion_matrix_metric("precision", confusion),
        "recall": compute_confusion_matrix_metric("recall", confusion),
        "hd95_mm": compute_hausdorff_distance(**pair, percentile=95, spacing=spacing),
        "assd_mm": compute_average_surface_distance(**pair, symmetric=True, spacing=spacing),
    }
    return {name: float(value) for name, value in values.items()}


class CaseDice(Metric):
    """Mean over cases and foreground classes of the Dice of a whole case, gathered from its slices.

    Slice Dice would ignore or overrate empty slices; here the pixels of a case are counted first.
    Both empty counts as 1, as in ``case_metrics``. Reads ``pred`` and ``label``, class index
    (B, 1, H, W) or lists of (1, ...), and the batch's ``case``; without ``case`` every item is one.

    Args:
        num_classes: number of classes with background.

    Source: engineering choice (selection on what is measured at test)
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        super().__init__()

    def reset(self) -> None:
        """Forgets all cases."""
        self.counts: dict[object, torch.Tensor] = {}

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
        name = len(self.counts) if name is None else name
        joint = self.num_classes * label.flatten().long() + pred.flatten().long()
        matrix = torch.bincount(joint, minlength=self.num_classes**2).cpu()
        matrix = matrix.reshape(self.num_classes, self.num_classes)  # rows: truth
        self.counts[name] = self.counts.get(name, 0) + matrix

    def compute(self) -> float:
        """The mean Dice in [0, 1]."""
        dice = []
        for matrix in self.counts.values():
            both = matrix.diagonal()[1:].double()
            total = (matrix.sum(0) + matrix.sum(1))[1:].double()
            dice.append(torch.where(total > 0, 2 * both / total, 1.0))
        return float(torch.stack(dice).mean())


def source_preprocessing(store_dir: str) -> Compose:
    """The store's preprocessing of ``image``, with ``label`` as the source has it.

    The label's values are mapped to class indices and its voxels left where they are: metrics are
    taken in the source's geometry, into which Invertd brings the prediction.

    Args:
        store_dir: slice store, for its task and image size.

    Source: facts 31 (whole volumes, not stretched slices)
    """
    header = read_store(store_dir).header
    task, image_size = read_task(header["task"]), header["preprocessing"]["image_size"]
    load = case_preprocessing(task, image_size, with_label=True).transforms[:2]
    prepare = case_preprocessing(task, image_size, with_label=False).transforms[2:]
    return Compose([*load, MapLabelsd("label", task), *prepare])


def source_labels(transform: Compose) -> Compose:
    """Logits of a preprocessed case to class indices in the source's geometry.

    Probabilities, not classes, are interpolated.

    Args:
        transform: what ``image`` went through.

    Returns:
        Transforms of ``pred``: (classes, S, S, D) logits to (1, ...) class index.

    Source: facts 31
    """
    return Compose(
        [
            Activationsd("pred", softmax=True),
            Invertd("pred", transform, orig_keys="image", nearest_interp=False),
            AsDiscreted("pred", argmax=True),
        ]
    )


class CaseWriter:
    """Measures and writes every case: predictions/ while it runs, metrics.csv at the end.

    Reads decollated items: ``pred`` and ``label`` (1, ...) class index in the source's geometry.

    Args:
        store_dir: slice store, for the names of the classes.
        output_dir: folder for metrics.csv and predictions/.

    Source: design, "Results"
    """

    def __init__(self, store_dir: str, output_dir: str) -> None:
        labels = read_store(store_dir).header["labels"]
        self.names = {int(index): name for index, name in labels.items()}
        self.output_dir = Path(output_dir)
        self.rows: list[dict] = []

    def attach(self, engine: Engine) -> None:
        """Listens to the evaluator."""
        engine.add_event_handler(Events.STARTED, self.rows.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _measure(self, engine: Engine) -> None:
        """Scores and writes the cases of one iteration."""
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            pred, case = output["pred"][0].cpu(), item["case"]
            flat = pred.ndim == 2
            spacing = [1.0, 1.0] if flat else affine_to_spacing(item["label"].affine)
            label = item["label"][0].as_tensor().cpu()
            scores = case_metrics(pred.as_tensor(), label, spacing, len(self.names))
            for index, values in scores.items():
                row = {"case": case, "label": self.names[index]}
                self.rows += [row | {"metric": name, "value": values[name]} for name in values]
            folder = self.output_dir / "predictions"
            folder.mkdir(parents=True, exist_ok=True)
            if flat:
                write_label(folder / f"{case}.png", pred.numpy())
            else:
                writer = NibabelWriter(output_dtype="uint8")
                writer.set_data_array(output["pred"].cpu(), channel_dim=0)
                writer.set_metadata(output["pred"].meta, resample=False)
                writer.write(str(folder / f"{case}.nii.gz"))

    def _write(self) -> None:
        """Writes metrics.csv and logs the mean of each metric."""
        table = pd.DataFrame(self.rows)
        path = self.output_dir / "metrics.csv"
        write_aside(path, lambda partial: table.to_csv(partial, index=False))
        means = table.groupby("metric", sort=False)["value"].mean()
        text = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        logger.info("%d cases: %s; written to %s", table["case"].nunique(), text, path)

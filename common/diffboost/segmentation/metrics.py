"""Five metrics of a whole case, the rules for empty masks, and the released code's own ways."""

import math
from collections.abc import Sequence

import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_confusion_matrix_metric,
    compute_hausdorff_distance,
    get_confusion_matrix,
)
from monai.metrics.utils import get_edge_surface_distance

from diffboost.knobs import nearest

OVERLAPS = {"dice": "f1 score", "precision": "precision", "recall": "recall"}  # MONAI's names
SURFACES = ("hd95_mm", "assd_mm")
EMPTY_MASKS = ("stated", "center_pixel")
DISTANCES = ("directed", "pooled")


def check_rules(empty_masks: str, smooth: float, distances: str) -> None:
    """Refuses an unknown way of measuring.

    Args:
        empty_masks, smooth, distances: see ``case_metrics``.

    Raises:
        ValueError: one of them is not allowed.

    Source: engineering choice
    """
    if empty_masks not in EMPTY_MASKS:
        raise ValueError(
            f"empty_masks: {empty_masks!r} is unknown; {nearest(empty_masks, EMPTY_MASKS)}"
        )
    if distances not in DISTANCES:
        raise ValueError(f"distances: {distances!r} is unknown; {nearest(distances, DISTANCES)}")
    if smooth < 0:
        raise ValueError(f"smooth: {smooth} is below 0")


def case_metrics(
    pred: torch.Tensor,
    label: torch.Tensor,
    spacing_mm: Sequence[float],
    num_classes: int,
    empty_masks: str = "stated",
    smooth: float = 0.0,
    distances: str = "directed",
) -> dict[int, dict[str, float]]:
    """Dice, precision, recall, HD95 and ASSD of every foreground class of one case.

    Empty masks: if neither holds the class, overlaps are 1 and distances 0; if one does not,
    overlaps are 0 and distances the length of the case's diagonal. Both are counted in
    ``empty_prediction`` and ``empty_truth``. A case of one slice is measured in 2D.

    Args:
        pred: class index, integer (H, W) or (H, W, D).
        label: class index, same shape.
        spacing_mm: distance of neighbors along each axis (1 where the unit is a pixel).
        num_classes: number of classes with background.
        empty_masks: "stated" is the rule above; "center_pixel" gives a class that was not predicted
            one pixel in the case's center, as the released code does; the rule then holds for empty
            truths alone.
        smooth: added to the counts of true and false positives and negatives (released code 1e-3).
        distances: "directed": HD95 is the larger of the two directed 95th percentiles and ASSD the
            mean over all surface points; "pooled": HD95 is the percentile over all points and ASSD
            the mean of the two directed means, as in medpy, which the released code uses.

    Returns:
        class -> {dice, precision, recall in [0, 1]; hd95_mm, assd_mm; empty_prediction,
        empty_truth in {0, 1}}.

    Raises:
        ValueError: the shapes differ, or a rule is unknown.

    Source: Sec. 4; facts 31, 32 (what the released evaluation did)
    """
    check_rules(empty_masks, smooth, distances)
    if pred.shape != label.shape:
        raise ValueError(f"pred: shape {tuple(pred.shape)}, label has {tuple(label.shape)}")
    spacing = [float(value) for value in spacing_mm[: pred.ndim]]
    if pred.ndim == 3 and 1 in pred.shape:  # one slice has no surface to its sides
        axis = pred.shape.index(1)
        pred, label = pred.squeeze(axis), label.squeeze(axis)
        del spacing[axis]
    diagonal = math.hypot(*(n * mm for n, mm in zip(pred.shape, spacing, strict=True)))
    scores = {}
    for index in range(1, num_classes):
        found, truth = pred == index, label == index
        empty = {
            "empty_prediction": float(not found.any()),
            "empty_truth": float(not truth.any()),
        }
        if empty_masks == "center_pixel" and not found.any():
            found[tuple(side // 2 for side in found.shape)] = True
        if found.any() and truth.any():
            values = _overlaps(found, truth, smooth)
            values |= _surfaces(found, truth, spacing, distances)
        else:
            agree = found.any() == truth.any()
            values = dict.fromkeys(OVERLAPS, float(agree))
            values |= dict.fromkeys(SURFACES, 0.0 if agree else diagonal)
        scores[index] = values | empty
    return scores


def _overlaps(found: torch.Tensor, truth: torch.Tensor, smooth: float) -> dict[str, float]:
    """Dice, precision and recall of two masks, bool (H, W[, D])."""
    pair = {"y_pred": found[None, None].float(), "y": truth[None, None].float()}
    confusion = get_confusion_matrix(**pair, include_background=True).double() + smooth
    return {
        name: float(compute_confusion_matrix_metric(monai_name, confusion))
        for name, monai_name in OVERLAPS.items()
    }


def _surfaces(
    found: torch.Tensor, truth: torch.Tensor, spacing: list[float], distances: str
) -> dict[str, float]:
    """HD95 and ASSD of two masks, bool (H, W[, D]), neither of them empty."""
    if distances == "pooled":
        _, both, _ = get_edge_surface_distance(found, truth, spacing=spacing, symmetric=True)
        hd95 = torch.cat(both).quantile(0.95)
        assd = torch.stack([one_way.mean() for one_way in both]).mean()
    else:
        pair = {"y_pred": found[None, None].float(), "y": truth[None, None].float()}
        pair |= {"include_background": True, "spacing": spacing}
        hd95 = compute_hausdorff_distance(**pair, percentile=95)
        assd = compute_average_surface_distance(**pair, symmetric=True)
    return {"hd95_mm": float(hd95), "assd_mm": float(assd)}

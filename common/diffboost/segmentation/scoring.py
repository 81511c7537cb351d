"""Dice of a trained segmenter on slices and cases of a store, in the store's geometry."""

from collections.abc import Sequence

import pandas as pd
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, SelectItemsd

from diffboost.data.transforms import LoadSliced

KEYS = ["image", "label", "case", "slice"]


def slice_overlaps(
    network: torch.nn.Module,
    items: Sequence[dict],
    num_classes: int,
    image_size: int,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """Pixels that prediction and truth share, slice by slice and class by class.

    Args:
        network: (B, 1, S, S) to logits (B, num_classes, S, S), in evaluation mode.
        items: of ``slice_items``, each with a label.
        num_classes: with background, which is not counted.
        image_size: side of the slices in pixels.
        batch_size: slices a pass.
        device: where the network is.

    Returns:
        A row a slice and class: case (str), slice, label (int); both: pixels of the class in
        prediction and truth; total: those in the prediction plus those in the truth; truth: those
        in the truth.

    Source: engineering choice
    """
    load = Compose([LoadSliced(["image", "label"], image_size=image_size), SelectItemsd(KEYS)])
    rows = []
    for batch in DataLoader(Dataset(items, load), batch_size=batch_size):
        with torch.no_grad():
            found = network(batch["image"].to(device)).argmax(1).cpu()
        truth = batch["label"][:, 0].long()
        for label in range(1, num_classes):
            one, other = (found == label).flatten(1), (truth == label).flatten(1)
            counts = zip(
                batch["case"],
                batch["slice"].tolist(),
                (one & other).sum(1).tolist(),
                (one.sum(1) + other.sum(1)).tolist(),
                other.sum(1).tolist(),
                strict=True,
            )
            rows += [(case, number, label, *pixels) for case, number, *pixels in counts]
    return pd.DataFrame(rows, columns=["case", "slice", "label", "both", "total", "truth"])


def case_dice(overlaps: pd.DataFrame) -> pd.Series:
    """Dice of each whole case, averaged over the classes; both empty counts as 1.

    Args:
        overlaps: of :func:`slice_overlaps`.

    Returns:
        Float in [0, 1], index case.

    Source: engineering choice (as ``CaseDice``, which selects the best epoch)
    """
    sums = overlaps.groupby(["case", "label"])[["both", "total"]].sum()
    return _dice(sums).groupby("case").mean()


def slice_dice(overlaps: pd.DataFrame) -> pd.Series:
    """Dice of each slice and class that has foreground in the truth, averaged over the classes.

    A slice without foreground scores 0 or 1 by a single pixel: it is left out.

    Args:
        overlaps: of :func:`slice_overlaps`.

    Returns:
        Float in [0, 1], index (case, slice).

    Source: engineering choice
    """
    present = overlaps[overlaps["truth"] > 0].set_index(["case", "slice", "label"])
    return _dice(present).groupby(["case", "slice"]).mean()


def _dice(counts: pd.DataFrame) -> pd.Series:
    return (2 * counts["both"] / counts["total"]).where(counts["total"] > 0, 1.0)

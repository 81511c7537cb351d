"""The picture of an audit of memorization: distributions, and the closest pairs side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, cat
from torch.nn.functional import affine_grid, grid_sample

from diffboost.audit.memorization import Audit
from diffboost.data.transforms import LoadSliced

COLORS = {"real": "#7A7F87", "variants": "#0072B2", "held_out": "#E69F00", "planted": "#D55E00"}
SHOWN = {
    "real": "real images", "variants": "variants", "held_out": "held-out variants",
    "planted": "planted copies",
}  # fmt: skip
NUM_PAIRS, NUM_OWN = 4, 2  # closest pairs that are shown: other patients, own sources


def draw_memorization(audit: Audit, figures: Mapping, synthetic_dir: Path) -> Figure:
    """Distributions on top; below, the closest pairs: variant, training image, difference.

    Args:
        audit: judged.
        figures: its figures.
        synthetic_dir: holds the variants.

    Source: engineering choice.
    """
    others = audit.variants.likeness.nlargest(NUM_PAIRS).index
    # one variant of a source is enough to see
    best = audit.variants.sort_values("source_likeness", ascending=False)
    own = best.drop_duplicates(["case", "slice"]).index[:NUM_OWN]
    lines = -(-len(others) // 2) + 1
    figure = Figure(figsize=(12, 3.2 + 2.3 * lines), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.0, 2.3 * lines))
    left, right = top.subplots(1, 2)
    tables = {name: getattr(audit, name) for name in SHOWN}
    threshold = figures["copies"]["threshold"]
    _histogram(left, {n: t.likeness for n, t in tables.items()}, threshold)
    left.set_title("Nearest training image of another patient (planted: of any)", fontsize=9)
    own_values = {n: tables[n].source_likeness for n in ("variants", "held_out")}
    _histogram(right, own_values, figures["own_source"].get("threshold"))
    right.set_title("A variant and its own source, which its edges come from", fontsize=9)
    grid = bottom.subplots(lines, 6, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for number, place in enumerate(others):
        _draw_pair(grid[number // 2, 3 * (number % 2) :][:3], audit, place, synthetic_dir, False)
    for number, place in enumerate(own):
        _draw_pair(grid[lines - 1, 3 * number :][:3], audit, place, synthetic_dir, True)
    figure.suptitle(figures["verdict"].replace("; ", "\n"), fontsize=9)
    return figure


def _histogram(axis, values: Mapping[str, pd.Series], threshold: float | None) -> None:
    """Outlined histograms of likeness, each with an area of 1, and the threshold."""
    bins = np.linspace(-0.2, 1, 49)
    for name, likeness in values.items():
        if len(likeness):
            axis.hist(
                likeness.clip(-0.2, 1), bins, density=True, histtype="stepfilled", alpha=0.35,
                color=COLORS[name], label=f"{SHOWN[name]} ({len(likeness)})",
            )  # fmt: skip
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1)
        axis.text(threshold + 0.01, 0.97 * axis.get_ylim()[1], f"copy from {threshold:.2f} on",
                  fontsize=8, va="top")  # fmt: skip
    axis.set_xlabel("likeness (1: the same details)", fontsize=8)
    axis.set_ylabel("density", fontsize=8)
    axis.legend(fontsize=8, frameon=False)


def _draw_pair(
    axes: Sequence, audit: Audit, place: int, synthetic_dir: Path, own_source: bool
) -> None:
    """A variant laid onto a training image, the image, and their difference."""
    row = audit.variants.loc[place]
    variant = LoadSliced("synthetic")({"synthetic": synthetic_dir / row["image"]})["synthetic"]
    if own_source:
        same = (audit.training["case"] == row["case"]) & (audit.training["slice"] == row["slice"])
        near, map_, likeness = int(np.flatnonzero(same)[0]), None, row.source_likeness
    else:
        match = audit.matches[place]
        near, map_, likeness = match.row, match.map, match.likeness
    training, real = audit.training.iloc[near], audit.images[near]
    laid = variant if map_ is None else lay_onto(variant, map_)
    for axis, image in zip(axes, (laid, real), strict=False):
        axis.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
    axes[2].imshow((laid - real)[0].numpy(), cmap="RdBu", vmin=-1, vmax=1)
    kind = "its source" if own_source else "nearest of others"
    axes[0].set_title(f"variant {row['variant']} of\n{row['case']}, {row['slice']}", fontsize=7)
    axes[1].set_title(f"{kind}\n{training['case']}, {training['slice']}", fontsize=7)
    axes[2].set_title(f"difference\nlikeness {likeness:.2f}", fontsize=7)


def lay_onto(image: Tensor, map_: Tensor) -> Tensor:
    """An image (1, S, S) as it lies on the training image that it was matched with, black outside.

    Args:
        image: float in [-1, 1].
        map_: (2, 3) of a ``Match``.

    Source: engineering choice.
    """
    theta = cat([map_[:, :2], 2 * map_[:, 2:]], dim=1)[None]
    grid = affine_grid(theta, [1, *image.shape], align_corners=False)
    return grid_sample(image[None] + 1, grid, align_corners=False)[0] - 1

"""The contact sheet of a slice store: image, label outline and edges of some slices."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffboost.data.slices import SliceStore
from diffboost.data.transforms import LoadSliced

ROWS = ("image", "label", "edge")
OUTLINE_COLORS = ("#ff4d4d", "#3fc8ff", "#ffd23f", "#7dff6b", "#ff8cf0", "#ffffff")


def choose_slices(index: pd.DataFrame, num_slices: int) -> pd.DataFrame:
    """Slices spread over the cases: of each case those with most foreground, else its middle.

    Args:
        index: a slice store's index.
        num_slices: how many to choose.

    Returns:
        At most ``num_slices`` rows, in the index's order; cases with foreground go first.

    Source: engineering choice.
    """
    best = index.groupby("case").foreground_px.max()
    cases = best.index[best > 0] if (best > 0).any() else best.index
    picked = cases[np.unique(np.linspace(0, len(cases) - 1, num_slices).round().astype(int))]
    per_case = -(-num_slices // len(picked))
    rows = index[index.case.isin(picked)].copy()
    rows["from_middle"] = (rows["slice"] - rows.groupby("case")["slice"].transform("mean")).abs()
    rows = rows.sort_values(["foreground_px", "from_middle"], ascending=[False, True])
    return rows.groupby("case").head(per_case).sort_index().head(num_slices)


def write_contact_sheet(store: SliceStore, path: str | Path, num_slices: int = 8) -> None:
    """Writes a PNG with a column a slice: image, label outline over it, edges; named by case.

    Args:
        store: the slice store.
        path: PNG file to write.
        num_slices: columns.

    Source: engineering choice (issue 2, "Data").
    """
    names = ["case", "slice", "image", "image_root", "label", "edge", "foreground_px"]
    rows = choose_slices(store.columns(names), num_slices)
    size = store.header["preprocessing"]["image_size"]
    load = LoadSliced(["image", "label", "edge"], image_size=size, allow_missing_keys=True)
    figure = Figure(figsize=(1.8 * len(rows), 6), layout="constrained")
    axes = figure.subplots(len(ROWS), len(rows), squeeze=False)
    for column, row in enumerate(rows.to_dict("records")):
        item = {"image": store.image_path(row), "edge": store.path(row["edge"])}
        item |= {"label": store.path(row["label"])} if row["label"] else {}
        item = load(item)
        axes[0, column].set_title(f"{row['case']}\nslice {row['slice']}", fontsize=7)
        for axis, name in zip(axes[:, column], ROWS, strict=True):
            shown = item["edge"][0] if name == "edge" else (item["image"][0] + 1) / 2
            axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
        if "label" in item:
            outline(axes[1, column], item["label"][0].numpy())
    names = [name for number, name in store.header["labels"].items() if number != "0"]
    colors = ("red", "blue", "yellow", "green", "pink", "white")
    legend = ", ".join(f"{name} {color}" for name, color in zip(names, colors, strict=False))
    edges = store.header["preprocessing"]["edges"]
    figure.suptitle(f"{store.header['name']}: image, label ({legend}), edges ({edges})", fontsize=9)
    figure.savefig(path, dpi=110)


def outline(axis, label: np.ndarray) -> None:
    """Draws the outline of every class of a label.

    Args:
        axis: matplotlib's.
        label: integer (H, W), class index.

    Source: engineering choice.
    """
    for number in np.unique(label[label > 0]):
        color = OUTLINE_COLORS[(int(number) - 1) % len(OUTLINE_COLORS)]
        axis.contour(label == number, levels=[0.5], colors=color, linewidths=0.8)

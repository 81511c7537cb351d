"""Contact sheet of a synthetic store: source, edge, variants."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from diffboost.data.transforms import LoadSliced
from diffboost.files import write_aside
from diffboost.generation.variant_store import variant_file
from diffboost.processes import is_main_process


def draw_contact_sheet(
    synthetic_dir: str, data: Sequence[dict], num_slices: int = 8, num_variants: int = 6
) -> None:
    """Write ``contact_sheet.png``: a row a slice, with its image, its hint and its variants.

    Args:
        synthetic_dir: the synthetic store.
        data: the variants' items, see :func:`diffboost.generation.synthesis.variant_items`.
        num_slices: rows at most, evenly spread over the slices.
        num_variants: variants a row at most.

    Source: engineering choice.
    """
    if not is_main_process():
        return
    slices = [item for item in data if item["variant"] == 0]
    chosen = np.unique(np.linspace(0, len(slices) - 1, num_slices).astype(int))
    numbers = sorted({item["variant"] for item in data})[:num_variants]
    load = LoadSliced(["image", "edge"])
    columns = 2 + len(numbers)
    figure = Figure(figsize=(1.6 * columns, 1.8 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        item = slices[index]
        source = load({"image": item["image"], "edge": item["edge"]})
        _show(row[0], source["image"], -1, f"{item['case']}, slice {item['slice']}")
        _show(row[1], source["edge"], 0, "hint")
        for axis, number in zip(row[2:], numbers, strict=True):
            path = Path(synthetic_dir) / variant_file(item["case"], item["slice"], number)
            variant = LoadSliced(["synthetic"])({"synthetic": str(path)})["synthetic"]
            _show(axis, variant, -1, f"variant {number}")
    write_aside(
        Path(synthetic_dir) / "contact_sheet.png",
        lambda path: figure.savefig(path, format="png", dpi=110),
    )


def _show(axis, image, low: float, title: str) -> None:
    axis.imshow(np.asarray(image)[0], cmap="gray", vmin=low, vmax=1)
    axis.set_title(title, fontsize=7)
    axis.set_axis_off()

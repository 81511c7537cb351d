"""A picture of what the quality filter kept and rejected, with label outlines and scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffboost.audit.quality_verdicts import family_of
from diffboost.contact_sheet import outline
from diffboost.data.transforms import LoadSliced
from diffboost.files import write_aside

COLUMNS = 8  # variants a row


def draw_judged(judged: pd.DataFrame, items: Sequence[Mapping], path: str | Path) -> None:
    """Writes a PNG: kept variants, those nearest to the threshold, and rejected ones by reason.

    Args:
        judged: a manifest with the filter's columns.
        items: of the same variants, with the paths of image and label.
        path: PNG file to write.

    Source: engineering choice.
    """
    rows = choose_examples(judged)
    figure = Figure(figsize=(1.7 * COLUMNS, 2.4 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    load = LoadSliced(["image", "label"])
    for line, (title, chosen) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        name = line[0].text(0, 1.32, title, transform=line[0].transAxes, fontsize=9, weight="bold")
        name.set_in_layout(False)  # or its width would push the other columns away
        for axis, (place, row) in zip(line, chosen.iterrows(), strict=False):
            item = load(items[place])
            axis.imshow(item["image"][0].numpy(), cmap="gray", vmin=-1, vmax=1)
            outline(axis, item["label"][0].numpy())
            axis.set_title(
                f"{row['case'][:18]} {row['slice']}/{row['variant']}\n"
                f"segm {row['segmenter_agreement']:.2f} edge {row['edge_agreement']:.2f}\n"
                f"border {row['border_contrast']:.1f} gray {row['intensity_distance']:.1f} "
                f"q {row['quality']:.1f}",
                fontsize=6,
            )
    write_aside(Path(path), lambda partial: figure.savefig(partial, format="png", dpi=100))


def choose_examples(judged: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title of a row of the picture -> its variants, COLUMNS at most.

    Args:
        judged: a manifest with the filter's columns.

    Source: engineering choice.
    """
    kept, rejected = judged[judged.kept], judged[~judged.kept]
    spread = np.unique(np.linspace(0, len(kept) - 1, COLUMNS).astype(int)) if len(kept) else []
    rows = {
        f"kept ({len(kept)} of {len(judged)})": kept.iloc[spread],
        "kept, nearest to the threshold": kept.sort_values("quality").head(COLUMNS),
    }
    for family, group in rejected.groupby(family_of(rejected.reason)):
        places = np.unique(np.linspace(0, len(group) - 1, COLUMNS).astype(int))
        rows[f"rejected, {family} ({len(group)})"] = group.sort_values("quality").iloc[places]
    return rows

"""Pictures of a report: slices with their variants, and predictions against the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from monai.data import PILReader
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation

from diffboost.data.manifest import read_manifest
from diffboost.data.slices import SliceStore, case_items, slice_items
from diffboost.data.tasks import AXCODES
from diffboost.data.transforms import (
    AXIS_LABELS,
    LoadSliced,
    case_preprocessing,
    intensity_step,
)
from diffboost.figures import embed
from diffboost.results import result_dirs
from diffboost.segmentation.merging import RandMergeMaskd

MANIFEST_COLUMNS = ["image", "case", "slice", "variant", "kept"]
TRUTH_COLOR = "#FFD23F"
PREDICTION_COLOR = "#00D1FF"


def variants_picture(
    synthetic_dir: Path, store: SliceStore, num_slices: int = 4, num_variants: int = 5
) -> str:
    """Rows of real slice, its edge, its label's outline and some variants, as a data URI.

    Args:
        synthetic_dir: a synthetic store.
        store: the slice store that it was made from, which shows the sources.
        num_slices: rows, spread over the cases, each the slice with the largest label of its case.
        num_variants: variants a row, at most.

    Source: engineering choice
    """
    manifest, sources = _shown(synthetic_dir), _sources(store)
    num_variants = min(num_variants, int(manifest.groupby(["case", "slice"]).size().max()))
    load = LoadSliced(["image", "edge", "label"])
    rows = []
    cases = manifest["case"].unique()
    for case in cases[np.linspace(0, len(cases) - 1, min(num_slices, len(cases))).astype(int)]:
        slices = [group for _, group in manifest[manifest["case"] == case].groupby("slice")]
        loaded = [load(_source(sources, group.iloc[0])) for group in slices]
        largest = int(np.argmax([int((item["label"] > 0).sum()) for item in loaded]))
        paths = slices[largest]["image"].head(num_variants)
        variants = [load_image(synthetic_dir / path) for path in paths]
        rows.append((case, loaded[largest], variants))
    figure = Figure(figsize=(1.35 * (2 + num_variants), 1.45 * len(rows)))
    grid = figure.subplots(len(rows), 2 + num_variants, squeeze=False)
    for axes, (case, item, variants) in zip(grid, rows, strict=True):
        label = item["label"][0]
        _show(axes[0], item["image"][0], {TRUTH_COLOR: label}, side=case)
        _show(axes[1], item["edge"][0] * 2 - 1)
        for number, place in enumerate(axes[2:]):
            if number < len(variants):
                _show(place, variants[number])
            else:
                place.axis("off")
    word = "variant" if manifest["kept"].all() else "rejected"
    titles = ["real, label", "edge"] + [f"{word} {n}" for n in range(num_variants)]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    return embed(figure, "png")


def merge_picture(
    synthetic_dir: Path, store: SliceStore, alphas: Sequence[float], patch_size: int
) -> Figure:
    """Merge masks and merged images at different alpha, on one slice and its first variant.

    Args:
        synthetic_dir: a synthetic store; its slice with the largest label is shown.
        store: the slice store that it was made from, which shows the source.
        alphas: chances that a patch is real; the same draws are compared with each, so that masks
            grow with alpha.
        patch_size: side of a patch in pixels.

    Source: paper Figure 4
    """
    sources = _sources(store)
    first = _shown(synthetic_dir).drop_duplicates(["case", "slice"])
    load = LoadSliced(["image", "edge", "label"])
    rows = (row for _, row in first.iterrows())
    largest = max(rows, key=lambda row: _area(_source(sources, row)["label"]))
    item = load(_source(sources, largest))
    real, variant = item["image"][0], load_image(synthetic_dir / largest["image"])
    figure = Figure(figsize=(1.35 * (1 + len(alphas)), 3.1))
    grid = figure.subplots(2, 1 + len(alphas), squeeze=False)
    _show(grid[0, 0], real, {TRUTH_COLOR: item["label"][0]}, side="real, mask")
    _show(grid[1, 0], variant, side="variant, merged")
    for column, alpha in enumerate(alphas, start=1):
        draw = RandMergeMaskd(alpha, patch_size).set_random_state(seed=0)
        mask = draw({"image": item["image"]})["merge_mask"][0]
        _show(grid[0, column], mask * 2 - 1)
        _show(grid[1, column], real * mask + variant * (1 - mask))
        grid[0, column].set_title(f"alpha {alpha:g}", fontsize=9)
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    return figure


def _shown(synthetic_dir: Path) -> pd.DataFrame:
    """The variants that the quality filter kept; all, where it kept none."""
    manifest = read_manifest(synthetic_dir, MANIFEST_COLUMNS)
    kept = manifest[manifest["kept"]] if manifest["kept"].any() else manifest
    return kept.sort_values(["case", "slice", "variant"])


def predictions_picture(run_dir: Path, store: SliceStore, metrics: pd.DataFrame, arm: str) -> str:
    """Worst, median and best case of an arm by Dice, truth and prediction outlined, as a data URI.

    The cases are those of the first seed; a case's Dice is the mean over its labels. Of a volume,
    the slice with the largest truth is shown.

    Args:
        run_dir: the study's folder.
        store: its slice store.
        metrics: of all arms.
        arm: the arm to show.

    Source: engineering choice
    """
    chosen = metrics[(metrics["arm"] == arm) & (metrics["metric"] == "dice")]
    chosen = chosen[chosen["seed"] == chosen["seed"].min()]
    ranked = chosen.groupby(["fold", "seed", "case"])["value"].mean().dropna().sort_values()
    places = {"worst": 0, "median": len(ranked) // 2, "best": len(ranked) - 1}
    figure = Figure(figsize=(9.4, 3.4))
    for axes, (word, place) in zip(figure.subplots(1, 3), places.items(), strict=True):
        fold, seed, case = ranked.index[place]
        folder = result_dirs(run_dir)[arm, fold, seed]
        image, truth, prediction = load_case(store, int(fold), case, folder / "predictions")
        _show(axes, image, {TRUTH_COLOR: truth, PREDICTION_COLOR: prediction})
        axes.set_title(f"{word}: {case}\nDice {ranked.iloc[place]:.3f}", fontsize=9)
    figure.subplots_adjust(wspace=0.03)
    return embed(figure, "png")


def load_case(
    store: SliceStore, fold: int, case: str, predictions_dir: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, truth and prediction of a test case at its own resolution, as 2D arrays.

    Args:
        store: the slice store.
        fold: whose test part holds the case.
        case: its name.
        predictions_dir: holds `<case>.nii.gz` or `<case>.png` in the source's geometry.

    Returns:
        Image in [-1, 1], truth and prediction as class index, each (H, W); of a volume the slice
        with the largest truth.

    Raises:
        FileNotFoundError: the case has no prediction.

    Source: engineering choice
    """
    task = store.header["task"]
    item = next(item for item in case_items(store.store_dir, fold, "test") if item["case"] == case)
    steps = case_preprocessing(task, store.header["preprocessing"]["image_size"], with_label=True)
    own_resolution = Compose(steps.transforms[: intensity_step(steps) + 1])
    loaded = own_resolution({"image": item["image"], "label": item["label"]})
    found = sorted(predictions_dir.glob(f"{case}.*"))
    if not found:
        raise FileNotFoundError(f"{predictions_dir} holds no prediction of case {case}")
    prediction = _load_prediction(found[0], task)
    parts = [part.as_tensor() for part in (loaded["image"], loaded["label"], prediction)]
    volumes = [part.reshape(*part.shape[1:3], -1) for part in parts]  # (H, W, D)
    largest = int((volumes[1] > 0).sum(dim=(0, 1)).argmax())
    return tuple(volume[..., largest] for volume in volumes)


def load_image(path: Path) -> torch.Tensor:
    """A stored slice or variant (H, W) in [-1, 1]."""
    return LoadSliced("image")({"image": str(path)})["image"][0]


def _area(path: str) -> int:
    """Labeled pixels of a stored label."""
    return int((LoadSliced("label")({"label": path})["label"] > 0).sum())


def _sources(store: SliceStore) -> dict[tuple[str, int], dict[str, str]]:
    """The slices of a store by case and number: a manifest's own paths are not opened."""
    items = slice_items(store.store_dir, 0, "all")
    return {(item["case"], item["slice"]): item for item in items}


def _source(sources: Mapping, row: pd.Series) -> dict[str, str]:
    """Paths of a variant's source slice."""
    place = (row["case"], int(row["slice"]))
    if place not in sources:
        raise ValueError(
            f"synthetic_dir: a variant of {place}, which the slice store does not have"
        )
    return {key: sources[place][key] for key in ("image", "edge", "label")}


def _load_prediction(path: Path, task: Mapping) -> torch.Tensor:
    """A prediction as (1, H, W[, D]), oriented as the task's slices are."""
    if path.suffix == ".png":
        reader = PILReader(converter=lambda image: image.convert("L"), reverse_indexing=False)
        return Compose([LoadImage(reader=reader), EnsureChannelFirst()])(path)
    axcodes = AXCODES[task["slice_axis"]]
    return Compose(
        [
            LoadImage(reader="NibabelReader"),
            EnsureChannelFirst(),
            Orientation(axcodes=axcodes, labels=AXIS_LABELS),
        ]
    )(path)


def _show(axes, image: torch.Tensor, outlines: Mapping | None = None, side: str = "") -> None:
    """Draws an image in [-1, 1] in gray, with the outline of every class of each label map."""
    axes.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    for color, label in (outlines or {}).items():
        for number in range(1, int(label.max()) + 1):
            mask = (label == number).numpy().astype(float)
            if mask.any():
                axes.contour(mask, levels=[0.5], colors=color, linewidths=1.2)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylabel(side, fontsize=8)

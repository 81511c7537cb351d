"""`diffboost audit memorization`: what a synthetic store gives away of the images behind it.

A variant is made from its source's edges, so that it must be like its source. What is measured is
whether it is more so for sources that the generator was trained on (membership gap), how near it
comes to training images of other patients, and whether it is a copy of one. All thresholds come
from pairs of real images of the store at hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from diffboost.audit.checks import seen_cases
from diffboost.audit.copies import CopySearch, Match, in_place
from diffboost.audit.held_out import held_out_items, synthesize_held_out
from diffboost.audit.image_quality import image_quality
from diffboost.audit.planting import draw_kinds, plant_copy
from diffboost.data.addresses import address_seed
from diffboost.data.manifest import read_manifest
from diffboost.data.slices import SliceStore, read_store
from diffboost.data.transforms import LoadSliced
from diffboost.generation.lineage import read_lineage

FALSE_ALARMS = 0.002  # chance that a real image passes for a copy of another patient's
OWN_FALSE_ALARMS = 0.01  # that a held-out variant passes for a copy of its own source
NUM_REAL = 300  # training images whose nearest other patient is looked up
LEAST_REAL, LEAST_CASES = 30, 10  # with fewer, thresholds and intervals are said to be rough


@dataclass
class Audit:
    """What was measured: tables of variants, held-out variants, real pairs and planted copies.

    Every table has ``likeness`` to the nearest training image of another patient and ``nearest``,
    its row in ``training``; ``matches`` are those of ``variants``. ``own_test_set``: the store's
    test part is given by the data set, and may be of other origin than what was trained on.
    """

    training: pd.DataFrame
    images: Tensor
    variants: pd.DataFrame
    matches: list[Match]
    held_out: pd.DataFrame
    real: pd.DataFrame
    planted: pd.DataFrame
    own_test_set: bool
    notes: list[str]


def measure_memorization(
    synthetic_dir: str | Path,
    store_dir: str | Path,
    generator_dir: str | Path | None,
    output_dir: str | Path,
    num_variants: int | None = None,
    num_held_out: int = 150,
    num_planted: int = 60,
    seed: int = 0,
    device: str = "cpu",
) -> Audit:
    """Looks up every variant, real image and planted copy among the training images.

    Args:
        synthetic_dir: a synthetic store with manifest.parquet and lineage.json.
        store_dir: the slice store that it was made from.
        generator_dir: the generator that made it; None: no held-out variants, so no membership gap.
        output_dir: gets ``held_out/`` with the variants of held-out slices.
        num_variants: of the store, evenly spread; None: all.
        num_held_out: held-out slices of each part of the split, a variant each.
        num_planted: copies of training images that are planted to measure the recall.
        seed: draws the planted copies.
        device: where the generator runs.

    Raises:
        FileNotFoundError: a store or file is missing.
        ValueError: the lineage names no case of the store, or a variant's source is not in it.

    Source: engineering choice (issue 5, "Memorization audit").
    """
    folder, store = Path(synthetic_dir), read_store(store_dir)
    manifest = read_manifest(folder)
    lineage = read_lineage(folder / "lineage.json")
    size = LoadSliced("synthetic")({"synthetic": folder / manifest.image[0]})["synthetic"].shape[-1]
    training = _training_rows(store, lineage)
    images = _load([store.image_path(row) for _, row in training.iterrows()], size)
    search, notes = CopySearch(images, training.case, training.group), []
    places = np.linspace(0, len(training) - 1, min(NUM_REAL, len(training))).round().astype(int)
    real = _look_up(search, images[places], training.group.iloc[places], "real pairs")[0]
    planted = _plant(search, images, training, num_planted, seed)
    if num_variants is not None and num_variants < len(manifest):
        notes.append(f"{num_variants} of {len(manifest)} variants were looked at")
        chosen = np.linspace(0, len(manifest) - 1, num_variants).round().astype(int)
        manifest = manifest.iloc[chosen].reset_index(drop=True)
    variants, matches = _measure(search, store, folder, manifest, size, "variants")
    held_out = None
    if generator_dir is None:
        notes.append("no generator at hand: no held-out variants, so neither a membership gap nor "
                     "copies of the own source were measured")  # fmt: skip
    else:
        held_out = _held_out(
            search, store, manifest, lineage, generator_dir, output_dir, num_held_out, size, device
        )
        if held_out is None:
            notes.append("the generator has seen every case of the store: nothing is held out to "
                         "measure a membership gap or copies of the own source")  # fmt: skip
    if held_out is None:
        held_out = variants.iloc[:0].assign(part="")
    own_test_set = bool((store.index.section == "test").any())
    return Audit(training, images, variants, matches, held_out, real, planted, own_test_set, notes)


def _training_rows(store: SliceStore, lineage: Mapping) -> pd.DataFrame:
    """The store's slices of cases that the generator or an ancestor saw, group by group."""
    taught = (seen for _, kind, seen in seen_cases(lineage) if kind == "generator")
    hashes = {sha256 for seen in taught for _, sha256 in seen}
    index = store.index
    rows = index[index.source_sha256.isin(hashes) | index.image_sha256.isin(hashes)]
    if rows.empty:
        raise ValueError(
            f"store_dir: {store.store_dir} has none of the cases that lineage.json names; the "
            "variants were made from another store"
        )
    return rows.sort_values(["group", "case", "slice"], ignore_index=True)


def _load(paths: Sequence[Path], size: int) -> Tensor:
    """Images (N, 1, S, S) in [-1, 1]."""
    load = LoadSliced("image", image_size=size)
    return torch.stack([load({"image": path})["image"] for path in paths])


def _look_up(
    search: CopySearch, images: Tensor, groups: Sequence[str | None], shown: str
) -> tuple[pd.DataFrame, list[Match]]:
    """The nearest training image of each image outside its group: likeness and row."""
    pairs = zip(tqdm(images, shown, unit="image"), groups, strict=True)
    matches = [search.nearest(image, group) for image, group in pairs]
    table = {"likeness": [m.likeness for m in matches], "nearest": [m.row for m in matches]}
    return pd.DataFrame(table), matches


def _plant(
    search: CopySearch, images: Tensor, training: pd.DataFrame, count: int, seed: int
) -> pd.DataFrame:
    """Planted copies of training images spread over the cases: kinds, likeness, whether found."""
    places = np.linspace(0, len(images) - 1, count).round().astype(int)
    kinds, copies = [], []
    for number, place in enumerate(places):
        rng = np.random.default_rng(address_seed(seed, "planted", number))
        kinds.append(draw_kinds(rng))
        copies.append(torch.from_numpy(plant_copy(images[place, 0].numpy(), kinds[-1], rng))[None])
    table, _ = _look_up(search, torch.stack(copies), [None] * count, "planted copies")
    found = training.group.to_numpy()[table.nearest] == training.group.to_numpy()[places]
    return table.assign(kinds=[" ".join(names) for names in kinds], right=found)


def _measure(
    search: CopySearch,
    store: SliceStore,
    folder: Path,
    manifest: pd.DataFrame,
    size: int,
    shown: str,
) -> tuple[pd.DataFrame, list[Match]]:
    """Variants against training images of other patients, and against their own source."""
    index = store.index.set_index(["case", "slice"])
    keys = list(zip(manifest.case, manifest["slice"], strict=True))
    unknown = sorted({case for case, slice_ in keys if (case, slice_) not in index.index})
    if unknown:
        raise ValueError(
            f"synthetic_dir: {folder} has variants of {unknown[:3]}; {store.store_dir} has no such "
            "slice"
        )
    rows = index.loc[keys]
    images = _load([folder / name for name in manifest.image], size)
    sources = _load([store.image_path(row) for _, row in rows.iterrows()], size)
    table, matches = _look_up(search, images, rows.group.tolist(), shown)
    columns = manifest[["image", "case", "slice", "variant"]].reset_index(drop=True)
    table["source_likeness"] = torch.cat(
        [in_place(*parts) for parts in zip(images.split(64), sources.split(64), strict=True)]
    ).numpy()
    table["source_ssim"] = image_quality(images, sources)["SSIM"]
    return columns.join(table), matches


def _held_out(
    search: CopySearch,
    store: SliceStore,
    manifest: pd.DataFrame,
    lineage: Mapping,
    generator_dir: str | Path,
    output_dir: str | Path,
    num_slices: int,
    size: int,
    device: str,
) -> pd.DataFrame | None:
    """The same table for variants of slices that the generator has not seen; None without any."""
    keys = pd.MultiIndex.from_frame(manifest[["case", "slice"]].drop_duplicates())
    areas = store.index.set_index(["case", "slice"]).foreground_px
    chosen = held_out_items(
        store,
        lineage,
        lineage.get("fold") or 0,
        num_slices,
        int(manifest.variant.max()) + 1,
        int(areas.loc[keys].min()),
    )
    items = [item for part in chosen.values() for item in part]
    if not items:
        return None
    folder = Path(output_dir) / "held_out"
    made = synthesize_held_out(manifest, items, generator_dir, folder, size, device)
    table, _ = _measure(search, store, folder, made, size, "held-out variants")
    part_of = {item["case"]: part for part, items in chosen.items() for item in items}
    return table.assign(part=table.case.map(part_of))


def tail_threshold(values: Sequence[float], rate: float) -> float:
    """What a share ``rate`` of values like these exceeds, by a Gumbel law with their quartiles.

    Quartiles, for a data set holds some patients twice that nobody has found: their likenesses are
    the highest ones, and would raise a threshold that they had a say in.

    Args:
        values: likenesses to the nearest of many, so that the law of maxima is at hand.
        rate: in (0, 1).

    Source: Gumbel 1958.
    """
    low, high = np.quantile(np.asarray(values, dtype=float), (0.25, 0.75))
    unit = stats.gumbel_r.ppf(0.75) - stats.gumbel_r.ppf(0.25)
    scale = (high - low) / unit
    return float(low + scale * (stats.gumbel_r.isf(rate) - stats.gumbel_r.ppf(0.25)))


def own_threshold(values: Sequence[float], rate: float) -> float:
    """What one more likeness to an own source exceeds with a chance ``rate``: normal law of z.

    Args:
        values: correlations in [-1, 1] of held-out variants with their sources, two or more; the
            fewer there are, the higher is the threshold.
        rate: in (0, 1).

    Source: Fisher 1915 (z); Student's prediction interval.
    """
    z = np.arctanh(np.clip(np.asarray(values, dtype=float), -0.999, 0.999))
    spread = z.std(ddof=1) * np.sqrt(1 + 1 / len(z))
    return float(np.tanh(z.mean() + stats.t.isf(rate, len(z) - 1) * spread))


def membership_gap(training: pd.Series, held_out: pd.Series, seed: int = 0) -> dict:
    """How much more alike variants and sources are where the generator saw the source.

    Args:
        training: a value a case, the mean over its variants.
        held_out: the same of cases that the generator has not seen.
        seed: of the resampling.

    Returns:
        gap: difference of the means; ci95: percentile bootstrap over cases, [low, high], None below
        two cases on a side; auc: chance that a training case's value is the higher one; the means
        and numbers of cases.

    Source: Efron and Tibshirani 1993, chapter 13; Mann and Whitney 1947.
    """
    sides = training.to_numpy(dtype=float), held_out.to_numpy(dtype=float)
    found = {
        "training": float(np.mean(sides[0])),
        "held_out": float(np.mean(sides[1])),
        "gap": float(np.mean(sides[0]) - np.mean(sides[1])),
        "ci95": None,
        "auc": float(stats.mannwhitneyu(*sides).statistic / (len(sides[0]) * len(sides[1]))),
        "cases": [len(side) for side in sides],
    }
    if min(found["cases"]) > 1:
        rng = np.random.default_rng(seed)
        interval = stats.bootstrap(
            sides, _mean_difference, method="percentile", rng=rng, vectorized=True
        ).confidence_interval
        found["ci95"] = [float(interval.low), float(interval.high)]
    return found


def _mean_difference(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    return first.mean(axis=axis) - second.mean(axis=axis)

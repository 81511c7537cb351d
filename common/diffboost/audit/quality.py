"""The quality filter: every variant gets scores, and is kept or rejected with a reason."""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from diffboost.audit.guards import guard_segmenter
from diffboost.audit.quality_calibration import calibrate_judges, load_instruments
from diffboost.audit.quality_sheet import draw_judged
from diffboost.audit.quality_verdicts import COLUMNS, count_verdicts, with_verdicts
from diffboost.data.manifest import read_manifest
from diffboost.data.slices import read_store, slice_items
from diffboost.data.tables import write_table
from diffboost.files import sha256_of_files, write_aside, write_json
from diffboost.processes import is_main_process, wait_for_processes
from diffboost.segmentation.loading import read_record

logger = logging.getLogger(__name__)


def filter_variants(
    store_dir: str,
    synthetic_dir: str,
    fold: int,
    quality_filter: bool,
    segmenter_dir: str | None = None,
    segmenter_configs: str | Sequence[str] | None = None,
    max_lost: float = 0.05,
    num_calibrated: int = 200,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    edge_weights: str | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Scores the variants of a synthetic store and marks in its manifest those that are rejected.

    Adds COLUMNS to manifest.parquet and sets ``kept`` and ``reason``; writes quality.json and
    rejected.png beside it. Images stay as they are. The first process does it, the others wait.

    Args:
        store_dir: the slice store.
        synthetic_dir: the synthetic store, with its manifest.
        fold: the fold that is held out; its test part is not looked at.
        quality_filter: whether to; False writes nothing, and the log says so.
        segmenter_dir: a segmenter of arm baseline, trained on the same fold.
        segmenter_configs: the config files that trained it, see ``load_segmenter``.
        max_lost: share of good variants that may be rejected; see ``calibrate``.
        num_calibrated: slices with foreground, and as many without, that it is calibrated on.
        inner_fraction: of the fold's training cases, kept for inner validation.
        num_cases: of the training fold, see ``slice_items``.
        seed: draws the slices and their defects.
        batch_size: images a pass.
        edge_weights: where the store's edge weights are; None: cache, pip or hub.
        device: where segmenter and edge detector run.

    Raises:
        ValueError: no segmenter is named, it knows too much, or there is too little to calibrate
            on.

    Source: engineering choice (issue 5, "Quality filter").
    """
    if not quality_filter:
        logger.info("quality filter off: all variants are kept; segmenter_dir turns it on")
        return
    if segmenter_dir is None:
        raise ValueError("segmenter_dir: a segmenter is needed where quality_filter is on")
    if is_main_process():
        folder = Path(synthetic_dir)
        judged, items, record = judge_variants(
            store_dir,
            synthetic_dir,
            segmenter_dir,
            segmenter_configs,
            fold,
            inner_fraction,
            num_cases,
            max_lost=max_lost,
            num_calibrated=num_calibrated,
            seed=seed,
            batch_size=batch_size,
            edge_weights=edge_weights,
            device=device,
        )
        write_aside(folder / "manifest.parquet", functools.partial(write_table, table=judged))
        _write_record(folder, record)
        draw_judged(judged, items, folder / "rejected.png")
    wait_for_processes()


def audit_quality(
    store_dir: str,
    synthetic_dir: str,
    segmenter_dir: str,
    output_dir: str,
    segmenter_configs: str | Sequence[str],
    max_lost: float = 0.05,
    num_calibrated: int = 200,
    seed: int = 0,
    edge_weights: str | None = None,
) -> dict:
    """Scores the variants of a finished store, which stays as it is.

    Fold, inner split and number of cases are those of the segmenter's run.json.

    Args:
        store_dir, synthetic_dir, segmenter_dir, segmenter_configs, max_lost, num_calibrated, seed:
            see ``filter_variants``.
        edge_weights: the same.
        output_dir: gets quality.parquet (the manifest with scores, ``kept`` and ``reason``),
            quality.json and rejected.png.

    Returns:
        What quality.json says.

    Raises:
        ValueError: as ``filter_variants``, or ``output_dir`` is one of the three folders.

    Source: engineering choice (issue 5, "Quality filter").
    """
    inputs = [Path(folder).resolve() for folder in (store_dir, synthetic_dir, segmenter_dir)]
    output = Path(output_dir).resolve()
    if any(output == folder or folder in output.parents for folder in inputs):
        raise ValueError(f"output_dir: {output_dir} lies in one of the folders that are judged")
    run = read_record(segmenter_dir)
    judged, items, record = judge_variants(
        store_dir,
        synthetic_dir,
        segmenter_dir,
        segmenter_configs,
        run["fold"],
        run["inner_fraction"],
        run["num_cases"],
        max_lost=max_lost,
        num_calibrated=num_calibrated,
        seed=seed,
        edge_weights=edge_weights,
    )
    write_aside(output / "quality.parquet", functools.partial(write_table, table=judged))
    _write_record(output, record)
    draw_judged(judged, items, output / "rejected.png")
    return record


def judge_variants(
    store_dir: str,
    synthetic_dir: str,
    segmenter_dir: str,
    segmenter_configs: str | Sequence[str] | None,
    fold: int,
    inner_fraction: float,
    num_cases: int | None,
    max_lost: float,
    num_calibrated: int,
    seed: int,
    batch_size: int = 32,
    edge_weights: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[pd.DataFrame, list[dict], dict]:
    """The manifest with scores and verdicts, the variants' items, and how all this came about.

    The arguments are those of ``filter_variants``.

    Source: engineering choice.
    """
    if segmenter_configs is None:
        raise ValueError(
            "segmenter_configs: the config files that trained segmenter_dir are needed"
        )
    split = {"inner_fraction": inner_fraction, "num_cases": num_cases}
    guard_segmenter(store_dir, fold, segmenter_dir, **split)
    store = read_store(store_dir)
    parts = {
        part: slice_items(store_dir, fold, part, **split)
        for part in ("training", "inner_validation")
    }
    instruments = load_instruments(
        store,
        segmenter_dir,
        segmenter_configs,
        parts["training"],
        seed,
        device,
        batch_size,
        edge_weights,
    )
    judges = calibrate_judges(
        parts["inner_validation"], instruments, max_lost, num_calibrated, seed
    )
    manifest = read_manifest(synthetic_dir)
    manifest = manifest.drop(columns=list(COLUMNS), errors="ignore").reset_index(drop=True)
    items = items_of(manifest, synthetic_dir, parts["training"])
    scores = pd.DataFrame(instruments.score_items(items), index=manifest.index)
    judged = with_verdicts(manifest, scores, judges)
    record = {
        "segmenter_dir": str(segmenter_dir),
        "model_sha256": sha256_of_files([Path(segmenter_dir) / "model.pt"]),
        "fold": fold,
        "max_lost": max_lost,
        "num_calibrated": num_calibrated,
        "seed": seed,
        "edges": store.header["preprocessing"]["edges"],
        "judges": {name: judge and judge.describe() for name, judge in judges.items()},
        **count_verdicts(judged),
    }
    return judged, items, record


def items_of(
    manifest: pd.DataFrame, synthetic_dir: str | Path, training: Sequence[Mapping]
) -> list[dict]:
    """An item a variant: its image, and what the store has of its slice, or it has of its own.

    Args:
        manifest: image, case, slice of each.
        synthetic_dir: where the images lie.
        training: items of the slices that they were made from.

    Raises:
        ValueError: a variant is of no training slice.
    """
    sources = {(str(item["case"]), int(item["slice"])): item for item in training}
    deformed = (Path(synthetic_dir) / "labels").is_dir()
    items = []
    for image, case, number in zip(manifest.image, manifest.case, manifest.slice, strict=True):
        source = sources.get((str(case), int(number)))
        if source is None:
            raise ValueError(
                f"{image}: case {case}, slice {number} is none of the training slices of the fold"
            )
        name, root = Path(image).name, Path(synthetic_dir)
        own = {key: str(root / f"{key}s" / name) for key in ("edge", "label") if deformed}
        items.append({**source, **own, "image": str(root / image)})
    return items


def _write_record(folder: Path, record: Mapping) -> None:
    """Writes quality.json and says what it says."""
    write_json(folder / "quality.json", record)
    text = "quality filter: %d of %d variants kept; rejected by reason: %s; not judged: %d"
    logger.info(text, *(record[key] for key in ("kept", "variants", "rejected", "not_judged")))

"""Planted leaks of all six kinds in real data: are they refused, with the pair named?

    python benchmarks/reliability/planted_leaks.py [--leaks 120] [--data ../shared/data] [--seed 0]

Rounds of ten leaks. For each a raw folder is made, of links to the real files and of the planted
ones (copies, turned, mirrored, cropped, re-encoded copies, halves of volumes), and prepared as a
user does. Then folds are drawn as if nobody had looked, so that the pairs lie on both sides;
lineages and manifests with held-out cases are put beside the store; and `audit_leaks` has to name
every pair. What it names beside them is a false alarm. On clean random splits of the same data it
must be silent. The last line is JSON.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from plants import Plant, plant_files, plant_models, plant_splits, write_raw

from diffboost.audit.checks import KINDS
from diffboost.audit.guards import guard_training
from diffboost.audit.leaks import audit_leaks
from diffboost.data.duplicates import find_duplicates
from diffboost.data.slices import read_store, slice_items
from diffboost.data.splits import assign_folds
from diffboost.prepare import prepare

logger = logging.getLogger("planted_leaks")

SETS = {
    "busi": ("breast_ultrasound", 96, {"include": ["benign", "malignant", "normal"]}),
    "Task04_Hippocampus": ("hippocampus_mri", 64, {}),
}
A_ROUND = 10
NUM_FOLDS = 3


def plan(num_leaks: int) -> list[tuple[str, list[str]]]:
    """Rounds: a data set and the kinds of its leaks; single images have no other slices."""
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(num_leaks)]
    shares: dict[str, list[str]] = {name: [] for name in SETS}
    for number, kind in enumerate(kinds):
        flat = kind != "volume" and number // len(KINDS) % 2 == 0
        shares["busi" if flat else "Task04_Hippocampus"].append(kind)
    return [
        (name, share[start : start + A_ROUND])
        for name, share in shares.items()
        for start in range(0, len(share), A_ROUND)
    ]


def prepare_store(raw: Path, store: Path, name: str) -> Path:
    """A store of a raw folder, with the edges that need no weights."""
    task, image_size, knobs = SETS[name]
    return prepare(raw, store, task, image_size, edges="gradient", num_folds=NUM_FOLDS, **knobs)


def known_groups(store_dir: Path) -> dict[str, str]:
    """case -> group, of a store's index."""
    index = read_store(store_dir).index
    return dict(zip(index.case, index.group, strict=True))


def run_round(
    name: str, kinds: list[str], folder: Path, data: Path, groups: dict, rng: np.random.Generator
) -> dict:
    """Plants, prepares, audits; counts."""
    raw, store_dir = folder / "raw", folder / "store"
    plants = plant_files(write_raw(data / name, raw), kinds, groups, rng)
    prepare_store(raw, store_dir, name)
    grouped = known_groups(store_dir)
    pairs = [plant for plant in plants if plant.in_files]
    together = sum(grouped[plant.first] == grouped[plant.second] for plant in pairs)
    plant_splits(store_dir, plants, groups, NUM_FOLDS, rng)
    places = plant_models(store_dir, folder, plants)
    start = time.monotonic()
    leaks = audit_leaks(store_dir, **places)
    seconds = time.monotonic() - start
    missed = [plant for plant in plants if not any(plant.is_named(leak) for leak in leaks)]
    right = [plant for plant in plants if any(plant.is_named(leak, plant.kind) for leak in leaks)]
    strange = [leak for leak in leaks if not _explained(leak, plants, groups)]
    for plant in missed:
        logger.warning("missed: %s", plant)
    for leak in strange:
        logger.warning("false alarm: %s", leak)
    return {
        "named": len(plants) - len(missed),
        "of": len(plants),
        "other_kind": len(plants) - len(missed) - len(right),
        "false_alarms": len(strange),
        "pairs": len(pairs),
        "grouped_by_prepare": together,
        "seconds": seconds,
        "guard_refuses": _guard_refuses(store_dir),
        "missed": Counter(plant.kind for plant in missed),
        "strange": sorted({f"{leak.first} = {leak.second}" for leak in strange}),
    }


def _explained(leak, plants: list[Plant], groups: dict) -> bool:
    """Whether a leak is a planted pair, or one of planted copies and the data's own duplicates."""
    if any(plant.is_named(leak) for plant in plants):
        return True
    origin = {plant.first: plant.origin for plant in plants}
    first, second = (origin.get(name, name) for name in (leak.first, leak.second))
    return groups.get(first, first) == groups.get(second, second)


def _guard_refuses(store_dir: Path) -> bool:
    """Whether training on the first fold is refused before it begins."""
    parts = {
        part: slice_items(str(store_dir), 0, part) for part in ("training", "inner_validation")
    }
    try:
        guard_training(str(store_dir), 0, *parts.values())
    except ValueError as error:
        return str(error).startswith("leak: ")
    return False


def clean_splits(store_dir: Path, folder: Path, count: int, rng: np.random.Generator) -> int:
    """Random splits of four fifths of the cases, by groups; how many have an alarm."""
    store = read_store(store_dir)
    index = store.index
    paths = [store.image_path(row) for _, row in index.iterrows()]
    pairs = find_duplicates(index, paths, store.header["task"])
    folder.mkdir()
    shutil.copy(store_dir / "dataset.json", folder)
    (folder / "images").symlink_to(store_dir / "images")
    alarms = 0
    for seed in range(count):
        kept = rng.permutation(index.case.unique())[: int(0.8 * index.case.nunique())]
        part = index[index.case.isin(kept)].reset_index(drop=True)
        groups = dict(zip(part.case, part.group, strict=True))
        part["fold"] = part.case.map(assign_folds(kept, NUM_FOLDS, seed, groups=groups))
        part.to_parquet(folder / "index.parquet")
        found = pairs[pairs.case.isin(kept) & pairs.other.isin(kept)].reset_index(drop=True)
        leaks = audit_leaks(folder, pairs=found)
        for leak in leaks:
            logger.warning("false alarm on a clean split: %s", leak)
        alarms += bool(leaks)
    return alarms


def main() -> None:
    """Runs the rounds and the clean splits, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--leaks", type=int, default=120)
    parser.add_argument("--clean", type=int, default=50, help="clean random splits")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--scratch", type=Path, help="for folders that are removed at the end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(max(1, torch.get_num_threads()))
    rng = np.random.default_rng(options.seed)
    scratch = Path(tempfile.mkdtemp(dir=options.scratch, prefix="planted_leaks_"))
    rounds, duplicates, alarms, bases = [], {}, 0, {}
    try:
        for number, name in enumerate(SETS):
            bases[name] = prepare_store(options.data.resolve() / name, scratch / name, name)
            listed = pd.read_csv(bases[name] / "duplicates.csv")
            duplicates[name] = [f"{a} = {b}" for a, b in zip(listed.case, listed.other)]  # noqa: B905
            share = options.clean // 2 + (options.clean % 2) * (number == 0)
            alarms += clean_splits(bases[name], scratch / f"{name}_clean", share, rng)
        for number, (name, kinds) in enumerate(plan(options.leaks)):
            folder = scratch / f"round_{number}"
            groups = known_groups(bases[name])
            figures = run_round(name, kinds, folder, options.data.resolve(), groups, rng)
            logger.warning("round %d, %s: %s", number, name, figures)
            rounds.append(figures)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(scratch)
    total = {
        key: sum(r[key] for r in rounds) for key in rounds[0] if key not in ("missed", "strange")
    }
    result = {
        "name": "planted_leaks",
        "passed": total["named"],
        "of": total["of"],
        "named_as_another_kind": total["other_kind"],
        "missed": dict(sum((r["missed"] for r in rounds), Counter())),
        "false_alarms": total["false_alarms"],
        "false_alarm_pairs": sorted({pair for r in rounds for pair in r["strange"]}),
        "pairs_that_prepare_keeps_together": f"{total['grouped_by_prepare']} of {total['pairs']}",
        "rounds_that_the_guard_refuses": f"{total['guard_refuses']} of {len(rounds)}",
        "clean_splits": options.clean,
        "clean_splits_with_alarms": alarms,
        "seconds_an_audit": round(max(r["seconds"] for r in rounds), 1),
        "duplicates": duplicates,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

"""Planted leaks of all six kinds in real data: are they refused, with the pair named?

    python benchmarks/reliability/planted_leaks.py [--leaks 120] [--data ../shared/data] [--seed 0]

The data sets are prepared as a user does. Then rounds of twenty leaks: raw files are planted
(copies; turned, mirrored, cropped, re-encoded copies; halves of volumes), prepared, and put among
the others of the store; folds are drawn as if nobody had looked, so that the pairs lie on both
sides; lineages and manifests with held-out cases lie beside the store. `diffboost audit leaks` has
to name every pair, and training or evaluation has to refuse it. What is named beside them is a
false alarm, and so is anything on splits of a random quarter of the data, searched anew each.
The last line is JSON.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from plant_stores import join_stores, plant_models, plant_splits
from plants import Plant, plant_files

from diffboost.audit.checks import KINDS, Leak
from diffboost.audit.guards import guard_evaluation, guard_training
from diffboost.audit.leaks import audit_leaks
from diffboost.data.duplicates import find_duplicates
from diffboost.data.slices import read_store
from diffboost.data.splits import assign_folds, group_cases
from diffboost.data.tasks import change_task, read_task
from diffboost.prepare import prepare

logger = logging.getLogger("planted_leaks")

# Folder -> task, side of a slice in pixels, subfolders (of pairs of image and mask).
SETS = {
    "busi": ("breast_ultrasound", 96, ["benign", "malignant", "normal"]),
    "Task04_Hippocampus": ("hippocampus_mri", 64, None),
}
NUM_FOLDS = 3
CLEAN_SHARE = 0.25


def plan(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Rounds: a data set and the kinds of its leaks; single images have no other slices."""
    shares: dict[str, list[str]] = {name: [] for name in SETS}
    for number in range(options.leaks):
        kind = options.kinds[number % len(options.kinds)]
        flat = kind != "volume" and number // len(options.kinds) % 2 == 0
        shares["busi" if flat else "Task04_Hippocampus"].append(kind)
    return [
        (name, share[start : start + options.a_round])
        for name, share in shares.items()
        for start in range(0, len(share), options.a_round)
    ]


def prepare_store(raw: Path, store: Path, name: str, **knobs) -> Path:
    """A store of a raw folder, with the edges that need no weights."""
    task, image_size, include = SETS[name]
    include = include and [folder for folder in include if (raw / folder).is_dir()]
    return prepare(raw, store, task, image_size, edges="gradient", include=include, **knobs)


def search(store_dir: Path) -> pd.DataFrame:
    """Pairs of cases that show one scan, as prepare and the audit search for them."""
    store = read_store(store_dir)
    index = store.index.sort_values(["case", "slice"], kind="stable").reset_index(drop=True)
    paths = [store.path(name) for name in index.image]
    return find_duplicates(index, paths, store.header["task"])


def run_round(
    name: str, kinds: list[str], folder: Path, data: Path, base: Path, rng: np.random.Generator
) -> dict:
    """Plants, prepares, audits; counts."""
    store_dir, groups = folder / "store", known_groups(base)
    task, _, include = SETS[name]
    task = change_task(read_task(task), include=include)
    plants = plant_files(data / name, folder / "raw", task, kinds, groups, rng)
    knobs = {"num_folds": 1, "group_duplicates": False}
    join_stores(base, prepare_store(folder / "raw", folder / "part", name, **knobs), store_dir)
    plant_splits(store_dir, plants, groups, NUM_FOLDS, rng)
    places = plant_models(store_dir, folder, plants)
    start, start_cpu = time.monotonic(), time.process_time()
    pairs = search(store_dir)
    leaks = audit_leaks(store_dir, pairs=pairs, **places)
    figures = {"seconds": time.monotonic() - start, "cpu": time.process_time() - start_cpu}
    group_pairs(store_dir, pairs)
    return figures | count(plants, leaks, groups) | refusals(store_dir, plants, places)


def known_groups(store_dir: Path) -> dict[str, str]:
    """case -> group, of a store's index."""
    index = read_store(store_dir).index
    return dict(zip(index.case, index.group, strict=True))


def group_pairs(store_dir: Path, pairs: pd.DataFrame) -> None:
    """Writes the groups into a store's index that prepare writes; the folds stay."""
    path = store_dir / "index.parquet"
    index = pd.read_parquet(path)
    groups = group_cases(index.case.unique(), zip(pairs.case, pairs.other, strict=True))
    index.assign(group=index.case.map(groups)).to_parquet(path)


def count(plants: list[Plant], leaks: list[Leak], groups: dict) -> dict:
    """How many plants the audit names, by their own kind too; the rest of what it names."""
    missed = [plant for plant in plants if not any(plant.is_named(leak) for leak in leaks)]
    right = [plant for plant in plants if any(plant.is_named(leak, plant.kind) for leak in leaks)]
    strange = [leak for leak in leaks if not _explained(leak, plants, groups)]
    for plant in missed:
        logger.warning("missed: %s", plant)
    for leak in strange:
        logger.warning("false alarm: %s", leak)
    return {
        "of": len(plants),
        "named": len(plants) - len(missed),
        "other_kind": len(plants) - len(missed) - len(right),
        "false_alarms": len(strange),
        "missed": Counter(plant.kind for plant in missed),
        "strange": sorted({f"{leak.first} = {leak.second}" for leak in strange}),
    }


def _explained(leak: Leak, plants: list[Plant], groups: dict) -> bool:
    """Whether a leak is a planted pair, or one of planted copies and the data's own duplicates."""
    if any(plant.is_named(leak) for plant in plants):
        return True
    origin = {plant.first: plant.origin for plant in plants}
    first, second = (origin.get(name, name) for name in (leak.first, leak.second))
    return groups.get(first, first) == groups.get(second, second)


def refusals(store_dir: Path, plants: list[Plant], places: dict[str, Path]) -> dict:
    """How many plants are refused, the pair named, before training or evaluation begins."""
    images = pd.read_parquet(places["synthetic_dir"] / "manifest.parquet").image.tolist()
    refused = 0
    for plant in plants:
        items = [{"case": plant.first, "variants": images}]
        try:
            if plant.kind == "generator":
                clean = [{"case": "nothing", "variants": images}]
                guard_training(str(store_dir), 0, clean, [], None, places["synthetic_dir"])
            elif plant.kind == "selection":
                guard_evaluation(str(store_dir), 0, "test", places["model_dir"] / "model.pt")
            else:
                guard_training(str(store_dir), 0, items, [])
            logger.warning("not refused: %s", plant)
        except ValueError as error:
            named = f"{plant.first} and {plant.second}: " in str(error)
            named |= plant.kind == "generator" and f".png and {plant.second}: " in str(error)
            refused += named
            if not named:
                logger.warning("refused, the pair not named: %s: %s", plant, error)
    return {"refused": refused}


def clean_splits(base: Path, folder: Path, count: int, rng: np.random.Generator) -> int:
    """Random splits of some of the cases, by groups; how many have an alarm."""
    index = read_store(base).index
    shutil.copytree(base / "images", folder / "images", copy_function=os.link)
    shutil.copyfile(base / "dataset.json", folder / "dataset.json")
    cases, alarms = index.case.unique(), 0
    for seed in range(count):
        kept = rng.permutation(cases)[: round(CLEAN_SHARE * len(cases))]
        part = index[index.case.isin(kept)].reset_index(drop=True)
        groups = dict(zip(part.case, part.group, strict=True))
        part["fold"] = part.case.map(assign_folds(kept, NUM_FOLDS, seed, groups=groups))
        part.to_parquet(folder / "index.parquet")
        leaks = audit_leaks(folder)
        for leak in leaks:
            logger.warning("false alarm on clean split %d: %s", seed, leak)
        alarms += bool(leaks)
    return alarms


def run(options: argparse.Namespace, scratch: Path) -> dict:
    """Both data sets: duplicates, rounds, clean splits. Returns the figures of all."""
    rng = np.random.default_rng(options.seed)
    data, duplicates, bases = options.data.resolve(), {}, {}
    for name in SETS:
        place = (options.stores or scratch).resolve() / name
        bases[name] = prepare_store(data / name, place, name, num_folds=NUM_FOLDS)
        listed = pd.read_csv(bases[name] / "duplicates.csv").itertuples()
        duplicates[name] = [f"{row.case} = {row.other} ({row.likeness:.2f})" for row in listed]
        logger.warning("%s: %d pairs of duplicates", name, len(duplicates[name]))
    rounds = []
    for number, (name, kinds) in enumerate(plan(options)):
        folder = scratch / f"round_{number}"
        rounds.append(run_round(name, kinds, folder, data, bases[name], rng))
        logger.warning("round %d, %s: %s", number, name, rounds[-1])
        shutil.rmtree(folder)
    alarms, share = 0, -(-options.clean // len(SETS))
    for name, base in bases.items():
        some = min(share, options.clean - share * (name != next(iter(SETS))))
        alarms += clean_splits(base, scratch / f"{name}_clean", some, rng)
        logger.warning("%s: %d clean splits, %d alarms so far", name, some, alarms)
    total = {key: sum(r[key] for r in rounds) for key in ("named", "of", "other_kind", "refused")}
    return {
        "name": "planted_leaks",
        "passed": total["named"],
        "of": total["of"],
        "refused_by_the_guards": total["refused"],
        "named_as_another_kind": total["other_kind"],
        "missed": dict(sum((r["missed"] for r in rounds), Counter())),
        "false_alarms": sum(r["false_alarms"] for r in rounds),
        "false_alarm_pairs": sorted({pair for r in rounds for pair in r["strange"]}),
        "clean_splits": options.clean,
        "clean_splits_with_alarms": alarms,
        "seconds_an_audit": round(max(r["seconds"] for r in rounds), 1),
        "cpu_seconds_an_audit": round(max(r["cpu"] for r in rounds), 1),
        "duplicates": duplicates,
    }


def main() -> None:
    """Runs all in a scratch folder, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--leaks", type=int, default=120)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--a_round", type=int, default=20, help="leaks in one store")
    parser.add_argument("--clean", type=int, default=50, help="clean random splits")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--stores", type=Path, help="keeps the prepared data sets; else scratch")
    parser.add_argument("--scratch", type=Path, help="for folders that are removed at the end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    scratch = Path(tempfile.mkdtemp(dir=options.scratch, prefix="planted_leaks_"))
    try:
        result = run(options, scratch)
    finally:
        shutil.rmtree(scratch)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

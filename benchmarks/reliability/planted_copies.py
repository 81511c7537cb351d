"""Planted copies of training images among honest variants: are they found, and nothing else?

    python benchmarks/reliability/planted_copies.py [--copies 360] [--data DIR] [--seed 0]
        [--synthetic_dir DIR --store_dir DIR --generator_dir DIR --output_dir DIR]

BUSI, hippocampus MR and phantoms are prepared as a user does, and fold 0 is split as for a
generator. Of its training images copies are planted, changed in one way or in two or three, and
looked up as the audit looks up variants, with the threshold that the audit takes from real pairs.
Honest ones are images of cases that the generator has not seen and that are no duplicates of its
training images; none may be called a copy. With the stores of studies, the audit itself is run on
each, and their membership gaps and copies are stated. The last line is JSON.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from diffboost.audit.copies import CopySearch
from diffboost.audit.memorization import (
    FALSE_ALARMS,
    NUM_REAL,
    measure_memorization,
    tail_threshold,
)
from diffboost.audit.memorization_report import judge_memorization, write_memorization
from diffboost.audit.planting import KINDS, plant_copy
from diffboost.data.addresses import address_seed
from diffboost.data.slices import read_store
from diffboost.data.splits import select
from diffboost.data.transforms import LoadSliced
from diffboost.prepare import prepare

logger = logging.getLogger("planted_copies")

SIZE = 64
SETS = {
    "busi": ("breast_ultrasound", {"include": ["benign", "malignant", "normal"]}),
    "Task04_Hippocampus": ("hippocampus_mri", {}),
    "phantoms": (
        "phantom_organ",
        {"phantoms": {"num_training": 36, "num_test": 20, "size_px": SIZE, "num_slices": 6}},
    ),
}


def planned_kinds(count: int) -> list[tuple[str, ...]]:
    """Half of the copies are changed in one way, a third in two, the others in three."""
    ways = [list(combinations(KINDS, number)) for number in (1, 2, 3)]
    places = Counter()
    planned = []
    for number in range(count):
        several = (0, 1, 0, 1, 0, 2)[number % 6]
        planned.append(ways[several][places[several] % len(ways[several])])
        places[several] += 1
    return planned


def load_rows(store, rows) -> torch.Tensor:
    """Images (N, 1, S, S) of rows of a store."""
    load = LoadSliced("image", image_size=SIZE)
    return torch.stack([load({"image": store.image_path(r)})["image"] for _, r in rows.iterrows()])


def spread(count: int, number: int) -> np.ndarray:
    """``number`` places spread over ``count``."""
    return np.linspace(0, count - 1, min(count, number)).round().astype(int)


def run_set(name: str, store_dir: Path, num_copies: int, num_honest: int, seed: int) -> dict:
    """Copies and honest images of one data set: what is found, by kind."""
    store = read_store(store_dir)
    training = select(store.index, 0, "training").sort_values(["group", "case", "slice"])
    training = training[(training.foreground_px > 0) | ~training.case.duplicated(keep=False)]
    training = training.reset_index(drop=True)
    images = load_rows(store, training)
    search = CopySearch(images, training.case, training.group)
    groups = training.group.to_numpy()
    start = time.monotonic()
    places = spread(len(images), NUM_REAL)
    real = [search.nearest(images[place], groups[place]).likeness for place in places]
    threshold = tail_threshold(real, FALSE_ALARMS)
    found, of = Counter(), Counter()
    planned = planned_kinds(num_copies)
    drawn = np.random.default_rng(address_seed(seed, name)).integers(len(images), size=num_copies)
    for number, (place, kinds) in enumerate(zip(drawn, planned, strict=True)):
        rng = np.random.default_rng(address_seed(seed, name, "planted", number))
        copy = torch.from_numpy(plant_copy(images[place, 0].numpy(), kinds, rng))[None]
        match = search.nearest(copy)
        right = match.likeness >= threshold and groups[match.row] == groups[place]
        if not right:
            logger.warning(
                "%s missed: %s %s %.2f", name, kinds, training.case[place], match.likeness
            )
        key = kinds[0] if len(kinds) == 1 else f"{len(kinds)} of these"
        of[key] += 1
        found[key] += right
    unseen = select(store.index, 0, "test")
    unseen = unseen[~unseen.group.isin(groups)]
    unseen = unseen[(unseen.foreground_px > 0) | ~unseen.case.duplicated(keep=False)]
    unseen = unseen.iloc[spread(len(unseen), num_honest)].reset_index(drop=True)
    alarms = []
    for place, image in enumerate(load_rows(store, unseen)):
        match = search.nearest(image)
        if match.likeness >= threshold:
            pair = f"{unseen.case[place]} = {training.case[match.row]} ({match.likeness:.2f})"
            alarms.append(pair)
    return {
        "threshold": round(threshold, 3),
        "found": sum(found.values()),
        "of": num_copies,
        "by_kind": {
            kind: f"{found[kind]} of {of[kind]}" for kind in [*KINDS, *sorted(of)] if of[kind]
        },
        "false_alarms": len(alarms),
        "honest": len(unseen),
        "false_alarm_pairs": alarms,
        "highest_of_real_pairs": round(max(real), 3),
        "seconds": round(time.monotonic() - start),
    }


def audit_study(folders: tuple[Path, Path, Path, Path]) -> dict:
    """The audit's own figures of a synthetic store."""
    synthetic_dir, store_dir, generator_dir, output_dir = folders
    audit = measure_memorization(synthetic_dir, store_dir, generator_dir, output_dir)
    figures = judge_memorization(audit)
    write_memorization(audit, figures, synthetic_dir, output_dir)
    return {"synthetic_dir": str(synthetic_dir), **figures}


def main() -> None:
    """Runs the data sets and the audits, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--copies", type=int, default=360, help="over all data sets")
    parser.add_argument("--honest", type=int, default=360, help="over all data sets")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--stores", type=Path, help="keeps the prepared stores for another run")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("synthetic_dir", "store_dir", "generator_dir", "output_dir"):
        parser.add_argument(f"--{name}", type=Path, nargs="*", default=[], help="of studies")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sides = (options.synthetic_dir, options.store_dir, options.generator_dir, options.output_dir)
    studies = [audit_study(folders) for folders in zip(*sides, strict=True)]
    scratch = Path(tempfile.mkdtemp(prefix="planted_copies_"))
    sets = {}
    try:
        for name, (task, knobs) in SETS.items():
            source = "phantoms" if name == "phantoms" else options.data.resolve() / name
            store = (options.stores or scratch) / name
            if not (store / "index.parquet").is_file():
                prepare(source, store, task, SIZE, "gradient", num_folds=3, **knobs)
            counts = (options.copies // len(SETS), options.honest // len(SETS))
            sets[name] = run_set(name, store, *counts, options.seed)
            logger.warning("%s: %s", name, sets[name])
    finally:
        shutil.rmtree(scratch)
    totals = {
        key: sum(s[key] for s in sets.values()) for key in ("found", "of", "false_alarms", "honest")
    }
    result = {
        "name": "planted_copies",
        "passed": totals["found"],
        "of": totals["of"],
        "recall": round(totals["found"] / totals["of"], 4),
        "false_alarms": totals["false_alarms"],
        "honest": totals["honest"],
        "false_alarm_rate": round(totals["false_alarms"] / totals["honest"], 4),
        "sets": sets,
        "studies": studies,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

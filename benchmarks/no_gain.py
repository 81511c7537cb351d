"""A/A trials: variants that are copies of their slices must show no gain.

    python benchmarks/no_gain.py RUN_DIR [--trials 20] [--seeds 3] [--jobs 2]

RUN_DIR is a study with a store (its knobs are kept, its generator is not used). Each trial trains
arm baseline and arm diffboost, the second on a synthetic store whose variants are the slices
themselves, and says by the rule of the report whether a gain is shown. Both arms of a trial have
seeds of their own: with the same seeds, merged images of a slice and its copy are the slice, both
networks are equal to the byte, and no rule could fail. What is done is not done again. --csv FILE
gets a row a trial. The last line is JSON; it fails where more than one trial in 20 shows a gain.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pandas as pd
from sampling_quality import ARM, Comparison

from diffboost.data.slices import read_store, slice_items
from diffboost.data.tables import write_table
from diffboost.files import sha256_of_files
from diffboost.generation.lineage import write_lineage
from diffboost.generation.synthesis import with_source_hashes
from diffboost.generation.variant_store import variant_file
from diffboost.stages import warm_programs
from diffboost.statistics import summarize, verdict

COPIES = "copies"
FALSE_ALARMS = 0.05  # of the trials, the error rate of the report's rule

logger = logging.getLogger("no_gain")


def copy_slices(store_dir: Path, output_dir: Path, fold: int, **split) -> None:
    """A synthetic store of one variant a slice, which is the slice.

    Args:
        store_dir: the slice store.
        output_dir: gets images/, manifest.parquet and a lineage that names no case.
        fold: whose training slices are copied.
        **split: inner_fraction and num_cases of ``slice_items``.
    """
    if (output_dir / "manifest.parquet").is_file():
        return
    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    write_lineage(output_dir / "lineage.json", {"cases": {}, "ancestors": []})
    lineage = sha256_of_files([output_dir / "lineage.json"])
    rows = []
    items = slice_items(store_dir, fold, "training", **split)
    for item in with_source_hashes(store_dir, items):
        image = variant_file(item["case"], item["slice"], 0)
        shutil.copyfile(item["image"], output_dir / image)
        row = {name: item[name] for name in ("case", "slice", "label", "edge", "source_sha256")}
        row |= {"image": image, "source_image": item["image"], "variant": 0, "kept": True}
        row |= {"sha256": sha256_of_files([output_dir / image]), "lineage_sha256": lineage}
        rows.append(row | {"reason": ""})
    write_table(output_dir / "manifest.parquet", pd.DataFrame(rows))


def seeds_of_trial(trial: int, seeds: int) -> dict[str, list[int]]:
    """Each arm's own seeds, so many."""
    first = 2 * seeds * trial
    return {
        "baseline": list(range(first, first + seeds)),
        ARM: list(range(first + seeds, first + 2 * seeds)),
    }


def judge(comparison: Comparison, seeds: dict[str, list[int]]) -> dict:
    """A trial's gain in Dice, its verdict, and what it would be if seeds were not counted."""
    metrics = [
        comparison.metrics(COPIES, [seed], arm).assign(arm=arm, seed=place)
        for arm, numbers in seeds.items()
        for place, seed in enumerate(numbers)
    ]
    found = summarize(pd.concat(metrics), list(seeds))[1][ARM]["dice"]
    over_cases = verdict(found | {"num_seeds": 1})
    return {"seeds": seeds, **found, "verdict": verdict(found), "over_cases_alone": over_cases}


def main() -> None:
    """Copies, trains, judges, prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="a study: runs/NAME")
    parser.add_argument("--output_dir", type=Path, help="default: RUN_DIR.no_gain")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="segmenters an arm, fold and trial")
    parser.add_argument("--jobs", type=int, default=2, help="segmenters trained side by side")
    parser.add_argument("--csv", type=Path, help="a row a trial")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output_dir = options.output_dir or Path(f"{options.run_dir}.no_gain")
    rows = []
    with warm_programs() as warm, ThreadPoolExecutor(options.jobs) as pool:
        programs = f"{warm}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        comparison = Comparison(options.run_dir, output_dir, {COPIES: {}}, programs)
        study = comparison.study
        split = {"num_cases": study.num_cases}
        split["inner_fraction"] = study.segmentation.get("inner_fraction", 0.2)
        for fold in study.folds:
            store_dir = read_store(str(comparison.run_dir / "store")).store_dir
            copy_slices(store_dir, comparison.variants_dir(COPIES, fold), fold, **split)
        for trial in range(options.trials):
            seeds = seeds_of_trial(trial, options.seeds)
            places = [
                (COPIES, fold, seed, arm)
                for fold, (arm, numbers) in product(study.folds, seeds.items())
                for seed in numbers
            ]
            list(pool.map(lambda place: comparison.segment(*place), places))
            rows.append({"trial": trial} | judge(comparison, seeds))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
    if options.csv:
        lists = ["seeds", "ci95", "training_ci95"]
        pd.DataFrame(rows).drop(columns=lists).round(4).to_csv(options.csv, index=False)
    shown = sum(row["verdict"] == "gain shown" for row in rows)
    line = {"name": "no_gain", "ours": shown, "peer": len(rows), "ratio": shown / len(rows)}
    line |= {"unit": "trials with a gain shown", "limit": FALSE_ALARMS}
    line |= {"passed": shown <= FALSE_ALARMS * len(rows)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.exit(0 if line["passed"] else 1)


if __name__ == "__main__":
    main()

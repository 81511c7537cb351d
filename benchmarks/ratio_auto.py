"""Regret and cost of `ratio: auto` on phantoms, against each of 1, 2, 5, 10, 20 variants a slice.

    python benchmarks/ratio_auto.py WORK_DIR [--cases few] [--seeds 1 2 3 4 5] [--segmenters 5]
                                    [--only truth]

Two kinds of phantoms, 64 px, the demo's edges. `few`: 8 training cases of 6 slices, two of them
inner validation, so that no probes are trained; 8 test cases of other scanners. `many`: 40 training
cases of 3 slices, 8 of them inner validation, so that probes choose; 100 test cases, of the same
scanner, for inner validation can only speak for cases that are like it.

For every seed of phantoms a store is prepared, a generator finetuned and 20 variants a slice are
made by the default sampler. Then segmenters (U-Net, `--segmenters` seeds each) are trained on the
first 1, 2, 5, 10 and 20 variants and scored on the test cases: the truth. `ratio: auto` sees none
of that: its own stage grows a store from nothing, trains its probes and chooses, with its default
budget.

Regret: the best mean Dice over the five ratios, less that of the chosen one, in points (1 = 0.01).
The largest of five noisy means is too high by chance. So three figures stand beside it: the
standard error of the difference (over segmenter seeds, paired), the regret against the ratio that
the other seeds call the best, seed by seed, and the regret of always taking 1, 5 or 20. Cost:
FLOPs (counted) and CPU seconds (measured) of the search, over those of 20 variants a slice and one
training on them. A ratio that is none of the five is scored by its own trainings.

All is kept in WORK_DIR: a second call goes on where one stopped. One process and one thread at a
time; each stage in a fork of a process that has imported everything. The last line is JSON.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import monai.bundle
import numpy as np
import torch

from diffboost.data.slices import slice_items
from diffboost.files import write_json
from diffboost.segmentation.loading import load_segmenter
from diffboost.segmentation.scoring import case_dice, slice_overlaps
from diffboost.stages import stage_configs

CONFIGS = stage_configs()
RATIOS = (1, 2, 5, 10, 20)
LARGEST = RATIOS[-1]
SIZE = 64
PHANTOMS = {
    "few": {"num_training": 8, "num_test": 8, "num_slices": 6},
    "many": {"num_training": 40, "num_test": 100, "num_slices": 3, "same_scanner": True},
}
GENERATOR_EPOCHS = 6
SEGMENTER = {"epochs": 40, "alpha": 0.6, "patch_size": 16, "channels": [8, 16, 32, 64]}
SEGMENTER_FILES = [CONFIGS["segmentation"], CONFIGS["segmentation"].with_name("network_unet.yaml")]
MAX_REGRET = 0.5  # Dice points
MAX_SHARE = 0.4
NEEDED = 0.8  # of the seeds: 4 of 5


def bundle(files: Path | list[Path], **settings) -> None:
    """Runs a bundle's configs in this process."""
    files = files if isinstance(files, list) else [files]
    texts = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
    root = str(files[0].parents[1])
    monai.bundle.run(
        config_file=[str(file) for file in files], bundle_root=root, image_size=SIZE, **texts
    )


def once(record: Path, job: Callable[[], dict | None]) -> dict:
    """What a job gave, with its CPU seconds; done in a fork, or read where it was done before."""
    if not record.is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_child, args=(record, job))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{record}: the stage failed; its words are in {_log_of(record)}")
    return json.loads(record.read_text())


def _log_of(record: Path) -> Path:
    return record.with_suffix(".log")


def _child(record: Path, job: Callable[[], dict | None]) -> None:
    """The job with its output in a file, and its record."""
    with _log_of(record).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            start = time.process_time()
            found = job() or {}
            found.setdefault("cpu", time.process_time() - start)
            write_json(record, found)


def make_variants(folder: Path, seed: int, cases: str) -> float:
    """Store, generator and the largest ratio's variants; CPU seconds of the variants."""
    store, generator = folder / "store", folder / "generator"
    once(
        folder / "prepare.json",
        lambda: bundle(CONFIGS["prepare"], store_dir=store, seed=seed, group_duplicates=False,
                       phantoms=PHANTOMS[cases]),
    )  # fmt: skip
    once(
        folder / "finetune.json",
        lambda: bundle(CONFIGS["finetune"], store_dir=store, output_dir=generator, seed=0,
                       epochs=GENERATOR_EPOCHS),
    )  # fmt: skip
    return once(
        folder / "synthesize.json",
        lambda: bundle(CONFIGS["synthesis"], store_dir=store, generator_dir=generator,
                       output_dir=folder / "synthetic_store", ratio=LARGEST, num_measured=16),
    )["cpu"]  # fmt: skip


def train(folder: Path, ratio: int, seed: int) -> dict:
    """A segmenter's Dice of each test case, and the CPU seconds of its training."""
    name = f"ratio{ratio}.seed{seed}.epochs{SEGMENTER['epochs']}"

    def job() -> dict:
        start = time.process_time()
        bundle(SEGMENTER_FILES, store_dir=folder / "store", output_dir=folder / name,
               synthetic_dir=folder / "synthetic_store", arm="diffboost", num_variants=ratio,
               seed=seed, num_classes=2, **SEGMENTER)  # fmt: skip
        found = {"cpu": time.process_time() - start}
        network = load_segmenter(folder / name, SEGMENTER_FILES, 2)
        for part in ("test", "inner_validation"):
            overlaps = slice_overlaps(network, slice_items(folder / "store", 0, part), 2, SIZE)
            found[part] = case_dice(overlaps).to_dict()
        return found

    found = once(folder / f"{name}.json", job)
    shutil.rmtree(folder / name, ignore_errors=True)  # after the record: a kill may come between
    return found


def choose(folder: Path, max_share: float) -> dict:
    """The content of ratio.json of a search from nothing, and its CPU seconds."""
    output_dir = folder / "auto"
    searched = once(
        folder / "auto.json",
        lambda: bundle(CONFIGS["auto_ratio"], store_dir=folder / "store",
                       generator_dir=folder / "generator", output_dir=output_dir,
                       synthesis_knobs={"num_measured": 16}, max_ratio=LARGEST,
                       budget={"share": max_share}, segmenter_knobs=SEGMENTER,
                       segmenter_configs=[str(file) for file in SEGMENTER_FILES]),
    )  # fmt: skip
    return json.loads((output_dir / "ratio.json").read_text()) | {"cpu": searched["cpu"]}


def test_points(folder: Path, ratio: int, num_segmenters: int) -> np.ndarray:
    """Mean Dice over the test cases in points, a segmenter seed each."""
    found = [train(folder, ratio, seed)["test"] for seed in range(num_segmenters)]
    return np.array([100 * np.mean(list(cases.values())) for cases in found])


def regret(truth: dict[int, np.ndarray], ratio: int) -> tuple[float, float]:
    """How far a ratio's mean lies below the best of RATIOS, and the difference's standard error."""
    best = max(RATIOS, key=lambda other: truth[other].mean())
    difference = truth[best] - truth[ratio]
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.nan
    return float(difference.mean()), float(error)


def regret_by_others(truth: dict[int, np.ndarray], ratio: int) -> float:
    """Mean regret where the best ratio for a segmenter seed is that of all the other seeds."""
    if len(truth[ratio]) == 1:
        return float("nan")
    others = {r: (points.sum() - points) / (len(points) - 1) for r, points in truth.items()}
    found = []
    for seed, points in enumerate(truth[ratio]):
        best = max(RATIOS, key=lambda r: others[r][seed])
        found.append(truth[best][seed] - points)
    return float(np.mean(found))


def measure(folder: Path, seed: int, options: argparse.Namespace) -> dict | None:
    """One seed of phantoms: the truth, what auto chose and at what cost; None for truth alone."""
    variants_cpu = make_variants(folder, seed, options.cases)
    truth = {ratio: test_points(folder, ratio, options.segmenters) for ratio in RATIOS}
    means = "  ".join(f"{ratio}: {points.mean():.2f}" for ratio, points in truth.items())
    print(f"phantoms {seed}: test Dice by ratio  {means}", flush=True)
    if options.only == "truth":
        return None
    chosen = choose(folder, options.share)
    ratio = chosen["ratio"]
    if ratio not in truth:
        truth[ratio] = test_points(folder, ratio, options.segmenters)
    trainings = [train(folder, LARGEST, s)["cpu"] for s in range(options.segmenters)]
    points, error = regret(truth, ratio)
    found = {
        "seed": seed,
        "ratio": ratio,
        "enough": chosen["enough"],
        "why": chosen["why"],
        "regret": round(points, 3),
        "regret_se": round(error, 3),
        "regret_by_others": round(regret_by_others(truth, ratio), 3),
        "share_flops": round(chosen["flops"]["share"], 3),
        "share_cpu_seconds": round(chosen["cpu"] / (variants_cpu + np.mean(trainings)), 3),
        "regret_of_always": {r: round(regret(truth, r)[0], 3) for r in (1, 5, 20)},
        "regret_of_enough": round(regret(truth, chosen["enough"] or ratio)[0], 3),  # None: no rung
        "dice": {r: round(float(found.mean()), 3) for r, found in truth.items()},
    }
    print(f"  {chosen['reason']}\n  regret {points:.2f} ± {error:.2f} points, cost "
          f"{found['share_flops']:.0%} of the FLOPs and {found['share_cpu_seconds']:.0%} of the "
          f"CPU seconds of {LARGEST}", flush=True)  # fmt: skip
    return found


def main() -> None:
    """Prints a line a seed and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work_dir", type=Path, help="keeps all that is made")
    parser.add_argument("--cases", choices=PHANTOMS, default="few", help="kind of phantoms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of phantoms")
    parser.add_argument("--segmenters", type=int, default=5, help="segmenter seeds of the truth")
    parser.add_argument("--share", type=float, default=MAX_SHARE, help="auto's budget")
    parser.add_argument("--only", choices=["truth"], help="make the truth, choose nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = {s: options.work_dir / f"{options.cases}{s}" for s in options.seeds}
    found = [measure(folder, s, options) for s, folder in folders.items()]
    if options.only == "truth":
        return
    good = [f["regret"] <= MAX_REGRET and f["share_flops"] <= MAX_SHARE for f in found]
    always = {r: round(float(np.mean([f["regret_of_always"][r] for f in found])), 3)
              for r in (1, 5, 20)}  # fmt: skip
    result = {
        "name": f"ratio_auto, {options.cases} cases",
        "ours": float(np.mean([f["regret"] for f in found])),
        "peer": float(np.mean([f["regret_of_always"][LARGEST] for f in found])),
        "ratio": float(np.mean([f["share_flops"] for f in found])),
        "unit": "mean regret in Dice points (peer: always 20), at this share of 20's FLOPs",
        "limit": MAX_SHARE,
        "max_regret": MAX_REGRET,
        "seeds_within_both": sum(good),
        "seeds": len(found),
        "mean_regret_of_always": always,
        "figures": found,
    }
    print(json.dumps(result))
    sys.exit(sum(good) < NEEDED * len(good))


if __name__ == "__main__":
    main()

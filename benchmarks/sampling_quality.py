"""Whether cheap variants teach a segmenter as well as dear ones: presets side by side.

    python benchmarks/sampling_quality.py RUN_DIR [--seeds 0 1 2] [--jobs 2]

RUN_DIR is a finished study (store and fold*/generator are read, its knobs are kept). Every preset
makes the study's ratio of variants of each fold with the fold's own generator; then a segmenter of
arm diffboost is trained for each preset, fold and seed, and scored on the fold's test cases. What
is done is not done again. Presets are {name: {knob of synthesis: value}}; the first is what the
bundle does by itself. A preset's Dice is compared with the first's, paired by case over folds and
seeds. The last line is JSON.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diffboost import plans
from diffboost.audit.image_quality import image_quality
from diffboost.data.manifest import read_manifest
from diffboost.data.slices import read_store
from diffboost.data.transforms import LoadSliced
from diffboost.results import read_case_metrics, read_experiment_as_run
from diffboost.stages import bundle_run, stage_configs, warm_programs
from diffboost.statistics import case_values, paired_difference

GUIDED = {"scheduler": "ddim", "num_inference_steps": 20, "decoder": "own"}
PRESETS = {
    "fast": {},
    "unipc": {"scheduler": "unipc"},  # the fast one until 0.9.0
    "ddim20_guidance2": GUIDED | {"guidance_scale": 2.0},
    "ddim20_guidance9": GUIDED | {"guidance_scale": 9.0},
}
MARGIN = 0.01  # of Dice: a point
COMPARED = 200  # variants whose distance to their source is measured
ARM = "diffboost"

logger = logging.getLogger("sampling_quality")


class Comparison:
    """The commands that make and score each preset's variants.

    Args:
        run_dir: the study.
        output_dir: gets synthetic stores, segmenters and logs.
        presets: knobs of synthesis by name.
        programs: folders where the program `python` is looked for, as in PATH.
    """

    def __init__(
        self, run_dir: Path, output_dir: Path, presets: dict[str, dict], programs: str
    ) -> None:
        self.run_dir = run_dir.resolve()
        self.output_dir = output_dir.resolve()
        self.presets = presets
        self.environment = os.environ | {"PATH": programs, "OMP_NUM_THREADS": "1"}
        self.study = read_experiment_as_run(self.run_dir)
        self.configs = stage_configs()
        self.header = read_store(str(self.run_dir / "store")).header

    def variants_dir(self, preset: str, fold: int) -> Path:
        """Where a preset's synthetic store of a fold lies."""
        return self.output_dir / preset / f"fold{fold}" / "synthetic_store"

    def results_dir(self, preset: str, fold: int, seed: int, arm: str = ARM) -> Path:
        """Where the segmenter lies that learned from it."""
        return self.output_dir / preset / f"fold{fold}" / arm / f"seed{seed}"

    def synthesize(self, preset: str, fold: int) -> None:
        """Makes a preset's variants of a fold, all of them: a filter would level the presets."""
        knobs = plans.synthesis_knobs(self.study, plans.BASE) | {"quality_filter": False}
        knobs |= self.presets[preset]
        settings = {
            "store_dir": self.run_dir / "store",
            "generator_dir": self.run_dir / f"fold{fold}" / "generator",
            "output_dir": self.variants_dir(preset, fold),
            "backbone": self.study.backbone,
            "image_size": self.study.image_size,
            "fold": fold,
            "num_cases": self.study.num_cases,
        }
        self._run([self.configs["synthesis"]], settings, knobs, f"synthesize.{preset}.fold{fold}")

    def segment(self, preset: str, fold: int, seed: int, arm: str = ARM) -> None:
        """Trains and scores a segmenter, on them if its arm needs variants."""
        knobs = plans.segmentation_knobs(self.study, plans.BASE, arm)
        output_dir = self.results_dir(preset, fold, seed, arm)
        with_variants = plans.uses_variants(arm)
        settings = {
            "store_dir": self.run_dir / "store",
            "output_dir": output_dir,
            "synthetic_dir": self.variants_dir(preset, fold) if with_variants else None,
            "image_size": self.study.image_size,
            "num_classes": len(self.header["labels"]),
            "fold": fold,
            "num_cases": self.study.num_cases,
            "arm": arm,
            "seed": seed,
        }
        files = [self.configs["segmentation"]]
        files += plans.network_overlay(files[0], self.study.networks[0])
        name = f"{preset}.fold{fold}.{arm}.seed{seed}"
        self._run(files, settings, knobs, f"train.{name}")
        if not (output_dir / "metrics.csv").is_file():
            knobs = knobs | self.study.evaluate
            files.insert(1, self.configs["evaluate"])
            self._run(files, settings, knobs, f"evaluate.{name}")

    def _run(self, files: list[Path], settings: dict, knobs: dict, name: str) -> None:
        """One bundle run, its words in a log; ends everything where it fails."""
        log = self.output_dir / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            command = bundle_run(files, settings, knobs)
            done = subprocess.run(
                command, shell=True, stdout=file, stderr=file, env=self.environment
            )
        if done.returncode:
            raise RuntimeError(f"{name} failed; its words are in {log}")
        logger.info("%s: %.0f s", name, time.monotonic() - start)

    def metrics(self, preset: str, seeds: Iterable[int], arm: str = ARM) -> pd.DataFrame:
        """A preset's metrics over folds and seeds, with its name as the arm."""
        places = product(self.study.folds, seeds)
        frames = [
            read_case_metrics(self.results_dir(preset, fold, seed, arm) / "metrics.csv").assign(
                arm=preset, fold=fold, seed=seed
            )
            for fold, seed in places
        ]
        return pd.concat(frames, ignore_index=True)

    def fidelity(self, preset: str) -> dict[str, float]:
        """Edge agreement and likeness to the source of a preset's variants, mean over folds."""
        rows = []
        for fold in self.study.folds:
            folder = self.variants_dir(preset, fold)
            agreement = json.loads((folder / "edge_agreement.json").read_text())
            row = {f"edges_{key}": agreement[key] for key in ("own", "other")}
            rows.append(row | self._likeness(folder))
        return {name: round(float(value), 4) for name, value in pd.DataFrame(rows).mean().items()}

    def _likeness(self, folder: Path) -> dict[str, float]:
        """Mean image quality of variants against the slices that they were made of."""
        manifest = read_manifest(str(folder), ["image", "source_image"])
        manifest = manifest.sample(min(len(manifest), COMPARED), random_state=0)
        load = LoadSliced("image", self.study.image_size)
        pairs = [[folder / path for path in manifest["image"]], manifest["source_image"]]
        stacks = [
            torch.stack([torch.as_tensor(load({"image": str(p)})["image"]) for p in paths])
            for paths in pairs
        ]
        quality = image_quality(*stacks)
        return {name: float(np.mean(quality[name])) for name in ("MAE", "SSIM") if name in quality}


def seconds_a_variant(comparison: Comparison, preset: str, fold: int) -> float:
    """Seconds between a store's first and last file, a variant, without start and audit."""
    files = sorted(
        path.stat().st_mtime for path in comparison.variants_dir(preset, fold).glob("images/*.png")
    )
    return (files[-1] - files[0]) / len(files)


def compare(comparison: Comparison, seeds: list[int]) -> list[dict]:
    """A row a preset: its figures, and the first preset's Dice over its own."""
    metrics = pd.concat([comparison.metrics(preset, seeds) for preset in comparison.presets])
    values = case_values(metrics)
    first = next(iter(comparison.presets))
    rows = []
    for preset in comparison.presets:
        row = {"preset": preset, "dice": round(float(values.loc[preset, "dice"].mean()), 4)}
        row |= comparison.fidelity(preset)
        times = [seconds_a_variant(comparison, preset, fold) for fold in comparison.study.folds]
        row["seconds_a_variant"] = round(float(np.mean(times)), 4)
        if preset != first:
            found = paired_difference(values.loc[first, "dice"], values.loc[preset, "dice"])
            row["fast_minus_it"] = {key: np.round(found[key], 4).tolist() for key in found}
        rows.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
    return rows


def main() -> None:
    """Makes, trains, compares, prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="a finished study: runs/NAME")
    parser.add_argument("--output_dir", type=Path, help="default: RUN_DIR.sampling_quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="segmenters trained side by side")
    parser.add_argument("--presets", type=json.loads, default=PRESETS, help="JSON, as above")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output_dir = options.output_dir or Path(f"{options.run_dir}.sampling_quality")
    with warm_programs() as warm, ThreadPoolExecutor(options.jobs) as pool:
        programs = f"{warm}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        comparison = Comparison(options.run_dir, output_dir, options.presets, programs)
        folds = comparison.study.folds
        list(pool.map(lambda place: comparison.synthesize(*place), product(options.presets, folds)))
        places = product(options.presets, folds, options.seeds)
        list(pool.map(lambda place: comparison.segment(*place), places))
    rows = compare(comparison, options.seeds)
    guided = [row["fast_minus_it"] for row in rows if "fast_minus_it" in row]
    line = {
        "name": "sampling_quality",
        "ours": rows[0]["dice"],
        "peer": max(row["dice"] for row in rows[1:]),
        "unit": "Dice",
        "limit": -MARGIN,
        "passed": all(found["mean"] >= -MARGIN for found in guided),
        "folds": list(folds),
        "seeds": options.seeds,
        "presets": rows,
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""What the guards against leaks cost a segmenter's training and evaluation.

    python benchmarks/reliability/guard_cost.py STORE_DIR [--epochs 3] [--repeats 3]

Trains and evaluates on fold 0 of a store by the bundle's configs, in turn with and without the
guards (their entries of `run` left out), all in this process, and times whole runs. The last line
is JSON.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import monai.bundle
import numpy as np
import yaml

from diffboost.data.slices import read_store

CONFIGS = Path(__file__).parents[2] / "bundles" / "diffboost_segmentation" / "configs"
GUARDS = "diffboost.audit.guards."


def without_guards(name: str, folder: Path) -> str:
    """A copy of a config whose run calls no guard."""
    config = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    config["run"] = [
        step
        for step in config["run"]
        if not (isinstance(step, dict) and step["_target_"].startswith(GUARDS))
    ]
    target = folder / name
    target.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return str(target)


def timed(configs: list[str], output_dir: Path, options: argparse.Namespace) -> float:
    """Seconds of a training and an evaluation."""
    header = read_store(options.store_dir).header
    knobs = {
        "bundle_root": str(output_dir),
        "store_dir": str(options.store_dir),
        "output_dir": str(output_dir / "models"),
        "image_size": header["preprocessing"]["image_size"],
        "num_classes": len(header["labels"]),
        "channels": [8, 16, 32, 32],
        "epochs": options.epochs,
    }
    start = time.monotonic()
    monai.bundle.run(config_file=configs[0], **knobs)
    monai.bundle.run(config_file=configs, **knobs)
    seconds = time.monotonic() - start
    shutil.rmtree(output_dir)
    return seconds


def main() -> None:
    """Runs both kinds in turn, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store_dir", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    scratch = Path(tempfile.mkdtemp(prefix="guard_cost_"))
    names = ["train.yaml", "evaluate.yaml"]
    kinds = {
        "with": [str(CONFIGS / name) for name in names],
        "without": [without_guards(name, scratch) for name in names],
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        timed(kinds["without"], scratch / "warm_up", options)
        for _ in range(options.repeats):
            for kind, configs in kinds.items():
                seconds[kind].append(timed(configs, scratch / kind, options))
    finally:
        shutil.rmtree(scratch)
    medians = {kind: float(np.median(times)) for kind, times in seconds.items()}
    slower = medians["with"] / medians["without"] - 1
    result = {
        "name": "guard_cost",
        "passed": int(slower <= 0.03),
        "of": 1,
        "slower": round(slower, 4),
        "seconds": {kind: [round(value, 2) for value in times] for kind, times in seconds.items()},
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

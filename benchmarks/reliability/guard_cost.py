"""What the guards against leaks cost a segmenter's training and evaluation.

    python benchmarks/reliability/guard_cost.py STORE_DIR [--synthetic_dir DIR] [--epochs 10]

Trains and evaluates on fold 0 of a store by the bundle's configs, all in this process: runs with
the guards and runs whose configs do not call them take turns, and who is first alternates. Other
programs disturb wall time more than the guards do, so that CPU time decides, and what the guards
take of the very runs that call them stands beside it. The last line is JSON.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import monai.bundle
import numpy as np
import yaml

from diffboost.audit import guards
from diffboost.data.slices import read_store

CONFIGS = Path(__file__).parents[2] / "bundles" / "diffboost_segmentation" / "configs"
NAMES = ["train.yaml", "evaluate.yaml"]
GUARDS = ("guard_training", "guard_evaluation")
ALLOWED = 0.03


def without_guards(name: str, folder: Path) -> str:
    """A copy of a config whose run calls no guard."""
    config = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    called = [f"{guards.__name__}.{name}" for name in GUARDS]
    steps = len(config["run"])
    config["run"] = [
        step
        for step in config["run"]
        if not (isinstance(step, dict) and step["_target_"] in called)
    ]
    if len(config["run"]) != steps - 1:
        raise ValueError(f"{name}: run calls {steps - len(config['run'])} guards, not 1")
    target = folder / name
    target.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return str(target)


@contextmanager
def clocked() -> Iterator[list[float]]:
    """A list that gets the CPU seconds of every call of a guard, while it lasts."""
    seconds: list[float] = []

    def timed(guard: Callable) -> Callable:
        @wraps(guard)
        def call(*args, **kwargs):
            start = time.process_time()
            try:
                return guard(*args, **kwargs)
            finally:
                seconds.append(time.process_time() - start)

        return call

    own = {name: getattr(guards, name) for name in GUARDS}
    for name, guard in own.items():
        setattr(guards, name, timed(guard))
    try:
        yield seconds
    finally:
        for name, guard in own.items():
            setattr(guards, name, guard)


def timed_run(configs: list[str], output_dir: Path, options: argparse.Namespace) -> dict:
    """CPU and wall seconds of a training and an evaluation, and of the guards in them."""
    header = read_store(options.store_dir).header
    knobs = {
        "bundle_root": str(output_dir),
        "store_dir": str(options.store_dir),
        "output_dir": str(output_dir / "models"),
        "image_size": header["preprocessing"]["image_size"],
        "num_classes": len(header["labels"]),
        "channels": [8, 16, 32, 32],  # a small network: the guards weigh more than in real runs
        "epochs": options.epochs,
    }
    if options.synthetic_dir is not None:
        knobs |= {"arm": "diffboost", "synthetic_dir": str(options.synthetic_dir)}
    start, start_cpu = time.monotonic(), time.process_time()
    with clocked() as calls:
        monai.bundle.run(config_file=configs[0], **knobs)
        monai.bundle.run(config_file=configs, **knobs)
    figures = {"cpu": time.process_time() - start_cpu, "wall": time.monotonic() - start}
    shutil.rmtree(output_dir)
    return figures | {"guards": sum(calls), "calls": len(calls)}


def summary(runs: dict[str, list[dict]]) -> dict:
    """How much slower runs with guards are by the medians, and the guards' own part of them."""
    medians = {
        (kind, clock): float(np.median([run[clock] for run in runs[kind]]))
        for kind in runs
        for clock in ("cpu", "wall")
    }
    slower = {
        clock: medians["with", clock] / medians["without", clock] - 1 for clock in ("cpu", "wall")
    }
    own = float(np.median([run["guards"] / run["cpu"] for run in runs["with"]]))
    return {
        "name": "guard_cost",
        "passed": int(slower["cpu"] <= ALLOWED and own <= ALLOWED),
        "of": 1,
        "slower_by_cpu": round(slower["cpu"], 4),
        "slower_by_wall": round(slower["wall"], 4),
        "share_of_the_guards": round(own, 4),
        "guard_calls_a_run": runs["with"][0]["calls"],
        "guard_seconds": round(float(np.median([run["guards"] for run in runs["with"]])), 3),
        "seconds": {
            f"{kind}, {clock}": [round(run[clock], 2) for run in runs[kind]]
            for kind in runs
            for clock in ("cpu", "wall")
        },
    }


def main() -> None:
    """Runs both kinds in turn, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store_dir", type=Path)
    parser.add_argument("--synthetic_dir", type=Path, help="arm diffboost with these variants")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    scratch = Path(tempfile.mkdtemp(prefix="guard_cost_"))
    kinds = {
        "with": [str(CONFIGS / name) for name in NAMES],
        "without": [without_guards(name, scratch) for name in NAMES],
    }
    runs: dict[str, list[dict]] = {kind: [] for kind in kinds}
    try:
        timed_run(kinds["with"], scratch / "warm_up", options)
        for repeat in range(options.repeats):
            for kind in sorted(kinds, reverse=bool(repeat % 2)):
                runs[kind].append(timed_run(kinds[kind], scratch / kind, options))
    finally:
        shutil.rmtree(scratch)
    sys.stdout.write(json.dumps(summary(runs)) + "\n")


if __name__ == "__main__":
    main()

"""What the stages' imports cost: a small study with a warm process, and without one.

    python benchmarks/startup.py [--cores 2] [--pairs 1] [--scratch DIR]

Runs one study (phantoms of 64 px, the tiny backbone, a few steps everywhere; seven stages, a table,
a figure and a report) by `diffboost study`, in turn cold (every stage imports for itself, as in
version 0.3.0) and warm, in the same folder. Prints, for each stage, its seconds and how many pass
from its command to MONAI's first line, when its imports are done. The first stage of each
environment waits for its warm process; the studies' times show it, the median of the stages does
not. Every file but logs, times and the report must have the same bytes, or this exits with 1. The
last line is JSON; its ratio is that of the studies' wall times.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import yaml

from diffboost.files import sha256_of_files

STUDY = {
    "name": "startup",
    "task": "phantom_organ",
    "dataset_dir": "phantoms",
    "backbone": "tiny",
    "image_size": 64,
    "edges": "gradient",
    "folds": [0],
    "seeds": [0],
    "protocol": "sound",
    "arms": ["baseline", "diffboost"],
    "prepare": {"phantoms": {"num_training": 6, "num_test": 2, "num_slices": 3}},
    "finetune": {"epochs": 1, "num_copies": 2},
    "synthesis": {"ratio": 1, "num_inference_steps": 2, "guidance_scale": 1.0},
    "segmentation": {"epochs": 2},
}
# Not compared: what says when something happened, and how long it took.
TIMES = ("logs", "benchmarks", ".snakemake", "report", "timing.csv", "summary.json", ".lock")
FIRST_LINE = re.compile(r"^(\S+ \S+),(\d+) - INFO - --- input summary", re.M)


def run_study(scratch: Path, warm: bool, cores: int) -> float:
    """Runs the study into scratch/startup; returns its seconds."""
    path = scratch / "startup.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    command = [sys.executable, "-m", "diffboost.cli", "study", str(path), "--cores", str(cores)]
    command += ["--runs_dir", str(scratch), "--warm", str(warm)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise SystemExit(done.returncode)
    return time.monotonic() - start


def stages(run_dir: Path) -> dict[str, tuple[float, float]]:
    """Seconds of each stage, and of them those before its first line, from Snakemake's files."""
    found = {}
    for table in sorted((run_dir / "benchmarks").rglob("*.tsv")):
        seconds = float(table.read_text().splitlines()[1].split("\t")[0])
        log = run_dir / "logs" / table.with_suffix(".log").name
        stamp, milliseconds = FIRST_LINE.search(log.read_text(errors="replace")).groups()
        begun = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S").timestamp() + int(milliseconds) / 1000
        ended = log.stat().st_mtime
        found[table.stem] = (seconds, begun - (ended - seconds))
    return found


def hashes(run_dir: Path) -> dict[str, str]:
    """Hash of every file that is the same in two runs of a study."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    names = {str(path.relative_to(run_dir)): path for path in files}
    return {
        name: sha256_of_files([path])
        for name, path in sorted(names.items())
        if not set(Path(name).parts) & set(TIMES) and path.name != ".snakemake_timestamp"
    }


def measure(scratch: Path, cores: int, pairs: int) -> dict:
    """Cold and warm studies in turn; medians of their times, and whether their files are equal."""
    seconds, starts, files = {True: [], False: []}, {True: [], False: []}, []
    for number in range(2 * pairs):
        warm = number % 2 == 1
        seconds[warm].append(run_study(scratch, warm, cores))
        run_dir = scratch / STUDY["name"]
        for stage, (whole, start) in stages(run_dir).items():
            kind = "warm" if warm else "cold"
            sys.stdout.write(f"{kind}  {stage:40s} {whole:6.1f} s, imports {start:5.1f} s\n")
            starts[warm].append(start)
        sys.stdout.flush()
        files.append(hashes(run_dir))
        shutil.rmtree(run_dir)
    cold, warm = (statistics.median(seconds[kind]) for kind in (False, True))
    start_cold, start_warm = (statistics.median(starts[kind]) for kind in (False, True))
    names = {name for found in files for name in found}
    differing = {name for name in names if len({found.get(name) for found in files}) > 1}
    for name in sorted(differing):
        sys.stdout.write(f"differs: {name}\n")
    begun = {"name": "stage_start", "ours": start_warm, "peer": start_cold, "unit": "s"}
    return {
        "name": "startup",
        "ours": warm,
        "peer": cold,
        "ratio": warm / cold,
        "unit": "s",
        "limit": 1.0,
        "equal_files": 0 if differing else len(files[0]),
        "figures": [begun | {"ratio": start_warm / start_cold, "limit": 0.25}],
    }


def main() -> None:
    """Reads the command line and prints the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=1, help="cold and warm studies")
    parser.add_argument("--scratch", type=Path, default=None)
    choice = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(dir=choice.scratch) as scratch:
        result = measure(Path(scratch), choice.cores, choice.pairs)
    sys.stdout.write(json.dumps(result) + "\n")
    raise SystemExit(0 if result["equal_files"] else 1)


if __name__ == "__main__":
    main()

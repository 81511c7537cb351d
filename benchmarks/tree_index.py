"""Index and training memory on a tree of RadImageNet's size.

    python benchmarks/tree_index.py SCRATCH_DIR [--rows 1350000] [--num_workers 2] [--steps 4]

Makes a tree of hard-linked PNGs (modality/organ/finding, 11 regions) and a store of it in a new
folder SCRATCH_DIR, opens the store and trains some steps of the pretrain bundle in a process of its
own, prints one line of JSON and removes the folder. Edges are hard links too: their cost is
another matter; here the store finds a million of them in place.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from diffboost.conditions.edges import load_edge_detector
from diffboost.data.slices import slice_items
from diffboost.data.tasks import read_task
from diffboost.tree_writer import TreeWriter

PRETRAIN = Path(__file__).parents[1] / "bundles" / "radimagenet_controlnet_pretrain"
# The 11 regions of RadImageNet, by modality; 15 findings each make its 165 classes.
REGIONS = {
    "CT": ("abd", "lung"),
    "MR": ("abd", "af", "brain", "hip", "knee", "shoulder", "spine"),
    "US": ("abd", "thyroid"),
}
NUM_FINDINGS = 15
SIDE_PX = 32


def folders() -> list[str]:
    """modality/organ/finding of every class."""
    findings = ["normal", *(f"finding_{number}" for number in range(1, NUM_FINDINGS))]
    return [
        f"{modality}/{organ}/{finding}"
        for modality, organs in REGIONS.items()
        for organ in organs
        for finding in findings
    ]


def write_links(root: Path, num_rows: int) -> None:
    """Writes one PNG a folder and hard-links it until there are `num_rows` in all."""
    names = folders()
    for number, folder in enumerate(names):
        (root / folder).mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE_PX, SIDE_PX), np.uint8)
        first = root / folder / f"{folder.replace('/', '-')}000000.png"
        Image.fromarray(pixels).save(first)
        stem = str(first)[: -len("000000.png")]
        for copy in range(1, len(range(number, num_rows, len(names)))):
            os.link(first, f"{stem}{copy:06d}.png")


def build(scratch: Path, num_rows: int, num_workers: int) -> dict:
    """Makes tree and store; returns the seconds of each stage."""
    root, store_dir = scratch / "tree", scratch / "store"
    write_links(root, num_rows)
    wanted = {
        "task": read_task("radimagenet"),
        "source_dir": str(root),
        "preprocessing": {"image_size": SIDE_PX, "edges": "gradient", "hed_size_px": None},
        "num_folds": 1,
        "num_cases": None,
        "phantoms": None,
        "seed": 0,
        "validation_fraction": 0.01,
    }
    store_dir.mkdir()
    writer = TreeWriter(store_dir, root, wanted, load_edge_detector("gradient"))
    seconds = {}
    start = time.monotonic()
    writer.write_index(num_workers, max_rejected_fraction=0)
    seconds["build_seconds"] = time.monotonic() - start
    write_links(store_dir / "edges", num_rows)
    start = time.monotonic()
    writer.write_edges(num_workers=0)
    writer.finish(max_rejected_fraction=0)
    seconds["finish_seconds"] = time.monotonic() - start
    return seconds


def open_store(store_dir: Path) -> dict:
    """Lists the training images; returns the seconds and how many there are."""
    start = time.monotonic()
    items = slice_items(store_dir, 0, "training", inner_fraction=0)
    assert Path(items[0]["image"]).is_file() and Path(items[-1]["edge"]).is_file()
    return {"open_seconds": time.monotonic() - start, "training_rows": len(items)}


def train(store_dir: Path, steps: int) -> dict:
    """Trains some steps without cached latents; returns the most memory that the process held."""
    knobs = {
        "config_file": PRETRAIN / "configs" / "train.yaml",
        "bundle_root": PRETRAIN,
        "store_dir": store_dir,
        "output_dir": store_dir.parent / "models",
        "image_size": SIDE_PX,
        "batch_size": 8,
        "epochs": 1,
        "cache_latents": False,
        "device": "cpu",
        "train::trainer::epoch_length": steps,
    }
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    highest = 0.0
    while process.poll() is None:
        highest = max(highest, highest_mib(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"training_rss_mib": highest}


def highest_mib(process: int | str = "self") -> float:
    """The most memory that a process has held so far, in MiB; 0 once it has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024 if "VmHWM:" in status else 0.0


def measure(scratch: Path, num_rows: int, num_workers: int, steps: int) -> dict:
    """All of it; the folder is removed afterwards."""
    scratch.mkdir(parents=True)
    try:
        result = {"name": "tree_index", "rows": num_rows}
        result |= build(scratch, num_rows, num_workers)
        result["build_rss_mib"] = highest_mib()
        return result | open_store(scratch / "store") | train(scratch / "store", steps)
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    """Reads the command line and prints the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rows", type=int, default=1_350_000)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    choice = parser.parse_args()
    result = measure(choice.scratch, choice.rows, choice.num_workers, choice.steps)
    for key, value in result.items():
        result[key] = round(value, 2) if isinstance(value, float) else value
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

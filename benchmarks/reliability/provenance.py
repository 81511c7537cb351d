"""Whether synthetic files regenerate byte for byte, and whether edits of one byte are found.

    python benchmarks/reliability/provenance.py [--files 200] [--image_size 64] [--seed 0]

Prepares phantoms, makes half of the variants by the bundle's config (tiny backbone, its own
branch), extends the store to all of them, and draws so many files. Each is made again from what it
says; each is copied with one byte changed at a random place and audited alone. The last line is
JSON.
"""

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from pathlib import Path

import monai.bundle
import numpy as np

from diffboost.audit.provenance import FileAudit, audit_provenance
from diffboost.data.slices import slice_items
from diffboost.generation.backbones import backbone_sha256
from diffboost.generation.lineage import write_lineage
from diffboost.generation.networks import ControlledUNet
from diffboost.handlers import save_weights
from diffboost.prepare import prepare

CONFIG = Path(__file__).parents[2] / "bundles/diffboost_synthesis/configs/inference.yaml"
PHANTOMS = {"num_training": 6, "num_test": 1, "num_slices": 8}


def make_ready(folder: Path, image_size: int, seed: int) -> int:
    """A slice store and a generator with the backbone's own branch; how many slices are varied."""
    prepare(
        "phantoms", folder / "store", "phantom_organ", image_size, "gradient", num_folds=3,
        seed=seed, phantoms=PHANTOMS | {"size_px": image_size}, group_duplicates=False,
    )  # fmt: skip
    save_weights(ControlledUNet("tiny"), folder / "generator" / "model.pt")
    lineage = {"fold": 0, "train_base": False, "cases": {}, "ancestors": []}
    lineage |= {"backbone": "tiny", "backbone_sha256": backbone_sha256("tiny")}
    write_lineage(folder / "generator" / "lineage.json", lineage)
    return len(slice_items(folder / "store", 0, "training"))


def synthesize(folder: Path, ratio: int, image_size: int, seed: int) -> dict[str, bytes]:
    """The files of the store, with so many variants a slice."""
    monai.bundle.run(
        config_file=str(CONFIG),
        bundle_root=str(folder),
        store_dir=str(folder / "store"),
        generator_dir=str(folder / "generator"),
        output_dir=str(folder / "synthetic"),
        ratio=ratio,
        image_size=image_size,
        seed=seed,
        num_measured=1,
    )
    images = folder / "synthetic" / "images"
    return {path.name: path.read_bytes() for path in sorted(images.iterdir())}


def audit_edits(files: dict[str, bytes], folder: Path, seed: int) -> list[FileAudit]:
    """The audits of copies with one byte changed, each alone in its folder."""
    generator = np.random.RandomState(seed)
    folder.mkdir()
    for name, data in files.items():
        edited = bytearray(data)
        edited[generator.randint(len(data))] ^= generator.randint(1, 256)
        (folder / name).write_bytes(edited)
    return audit_provenance(folder)


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """The figures."""
    settings = options.image_size, options.seed
    ratio = 2 * math.ceil(options.files / make_ready(folder, *settings) / 2)
    half = synthesize(folder, ratio // 2, *settings)
    start = time.monotonic()
    whole = synthesize(folder, ratio, *settings)
    extending = time.monotonic() - start
    drawn = np.random.RandomState(options.seed).permutation(sorted(whole))[: options.files]
    start = time.monotonic()
    audits = audit_provenance(
        folder / "synthetic", folder / "store", folder / "generator", "tiny", again=True
    )
    again = time.monotonic() - start
    audits = [audit for audit in audits if audit.path.name in set(drawn)]
    start = time.monotonic()
    edits = audit_edits({name: whole[name] for name in drawn}, folder / "edited", options.seed)
    verifying = time.monotonic() - start
    same = sum("made again, the same bytes" in audit.verified for audit in audits)
    found = sum(bool(audit.failures) for audit in edits)
    return {
        "name": "provenance",
        "passed": sum((same, found)),
        "of": 2 * len(drawn),
        "regenerated": same,
        "edits_found": found,
        "false_alarms": sum(bool(audit.failures) for audit in audits),
        "extended_from": len(half),
        "extended_to": len(whole),
        "changed_by_extending": sum(whole.get(name) != data for name, data in half.items()),
        "seconds_extending": round(extending, 1),
        "seconds_regenerating": round(again, 1),
        "ms_verifying_a_file": round(1000 * verifying / len(drawn), 2),
        "image_size": options.image_size,
        "bytes_a_file": round(np.mean([len(data) for data in whole.values()])),
    }


def main() -> None:
    """Prints the figures as JSON; exits with 1 where one is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options)
    sys.stdout.write(json.dumps(figures) + "\n")
    failures = figures["false_alarms"] + figures["changed_by_extending"]
    sys.exit(figures["passed"] < figures["of"] or failures > 0)


if __name__ == "__main__":
    main()

"""Two rounds of NVFlare's simulator on two sites with phantoms of their own, for both bundles.

Run by nvflare.sh: python federated_rounds.py <work folder>. A line a check; exits 1 if one fails.
"""

import csv
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from diffboost.data.weights import read_state
from diffboost.federated import build_network
from diffboost.prepare import prepare

REPOSITORY = Path(__file__).parents[2]
JOB = REPOSITORY / "workflow" / "federated" / "job.py"
SITES = ("site-1", "site-2")
SMALL = {"image_size": 32, "device": "cpu"}
SEGMENTATION = {"channels": [8, 16, 32], "learning_rate": 0.01, "batch_size": 4}
FINETUNE = {"train_base": False, "num_copies": 2, "batch_size": 8, "schedule": "constant"}
BUNDLES = {"diffboost_segmentation": SEGMENTATION, "task_finetune": FINETUNE}


def write_stores(folder: Path) -> None:
    """A slice store a site, of other phantoms."""
    for seed, site in enumerate(SITES):
        phantoms = {"num_training": 8, "num_slices": 6, "num_test": 1, "size_px": 32}
        store = folder / site / "store"
        prepare(
            "phantoms", store, "phantom_organ", 32, "gradient", num_folds=2, seed=seed,
            phantoms=phantoms,
        )  # fmt: skip


def simulate(folder: Path, bundle: str) -> Path:
    """Runs the documented job; its workspace."""
    workspace = folder / bundle
    sites = workspace / "sites"
    sites.mkdir(parents=True)
    root = str(REPOSITORY / "bundles" / bundle)
    for name in SITES:
        site = {"bundle_root": root, "store_dir": str(folder / name / "store")}
        site |= {"output_dir": str(workspace / name)}
        (sites / f"{name}.yaml").write_text(yaml.safe_dump(site))
    knobs = SMALL | BUNDLES[bundle]
    job = {"bundle_root": root, "sites_dir": str(sites), "workspace": str(workspace)}
    job |= {"num_rounds": 2, "local_epochs": 2, "knobs": knobs}
    path = workspace / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    with (folder / f"{bundle}.log").open("w") as log:
        command = [sys.executable, str(JOB), str(path)]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return workspace


def check(bundle: str, workspace: Path) -> dict[str, bool]:
    """What has to hold after the job, by name."""
    network = build_network(REPOSITORY / "bundles" / bundle, SMALL | BUNDLES[bundle])
    final, initial = (read_state(workspace / name) for name in ("model.pt", "initial.pt"))
    keys = set(network.state_dict())
    results = {"keys": set(final) == keys == set(initial)}
    results["moved"] = any(not torch.equal(final[name], initial[name]) for name in keys)
    if bundle == "task_finetune":
        results["branch alone"] = {name.split(".")[0] for name in keys} == {"controlnet"}
    for site in SITES:
        with (workspace / site / "rounds.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        name = "val_dice" if bundle == "diffboost_segmentation" else "val_loss"
        first, last = (float(row[name]) for row in rows)
        print(f"{bundle} {site}: {name} {first:.4f} before, {last:.4f} after a round")
        results[f"{site} two rounds"] = [row["round"] for row in rows] == ["0", "1"]
        results[f"{site} better"] = last >= first if name == "val_dice" else last <= first
        names = {path.name for path in (workspace / site).iterdir()}
        results[f"{site} files"] = {"model.pt", "lineage.json", "run.json"} <= names
    return results


def main(folder: Path) -> int:
    """0 where all checks hold."""
    write_stores(folder)
    failed = 0
    for bundle in BUNDLES:
        for name, holds in check(bundle, simulate(folder, bundle)).items():
            print(f"{'ok' if holds else 'FAILED'}: {bundle}: {name}")
            failed += not holds
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))

"""Reads what a study left in its folder: metrics, times, logs, and the machine it ran on."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
import yaml

PACKAGES = ("diffboost", "torch", "monai", "diffusers", "transformers", "numpy", "snakemake")
STAGES = ("prepare", "finetune", "synthesize", "train_segmentation", "evaluate")
COLUMNS = ["arm", "fold", "seed", "case", "label", "metric", "value"]


def read_experiment_as_run(run_dir: Path) -> dict:
    """The experiment file of a study, with every default filled in.

    Raises:
        FileNotFoundError: the folder is no study's.

    Source: engineering choice
    """
    path = run_dir / "experiment.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"run_dir: {run_dir} holds no experiment.yaml; is it a study's folder?"
        )
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def result_dirs(run_dir: Path) -> dict[tuple[str, int, int], Path]:
    """The folder of each segmenter that the study orders, by (arm, fold, seed).

    Folders that an earlier version of the experiment left behind are not among them.

    Source: engineering choice
    """
    ordered = read_experiment_as_run(run_dir)
    return {
        (arm, fold, seed): run_dir / f"fold{fold}" / arm / f"seed{seed}"
        for arm in ordered["arms"]
        for fold in ordered["folds"]
        for seed in ordered["seeds"]
    }


def read_metrics(run_dir: Path) -> pd.DataFrame:
    """All metrics of a study: columns arm, fold, seed, case, label, metric, value.

    Raises:
        FileNotFoundError: no segmenter of the study has been evaluated.

    Source: engineering choice
    """
    text = {"case": str, "label": str}
    frames = [
        pd.read_csv(path / "metrics.csv", dtype=text).assign(arm=arm, fold=fold, seed=seed)
        for (arm, fold, seed), path in result_dirs(run_dir).items()
        if (path / "metrics.csv").is_file()
    ]
    if not frames:
        raise FileNotFoundError(f"run_dir: {run_dir} has no fold*/ARM/seed*/metrics.csv yet")
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def read_costs(run_dir: Path) -> pd.DataFrame:
    """Cost of each stage, from Snakemake's benchmark files, in the order in which the stages run.

    Returns:
        Index stage; columns jobs (count), seconds (sum over jobs), memory_mib (largest resident set
        of a job with its child processes).

    Source: engineering choice
    """
    rows = []
    for path in sorted((run_dir / "benchmarks").glob("*.tsv")):
        table = pd.read_csv(path, sep="\t", na_values="-")
        stage = path.name.split(".")[0]
        rows.append(
            {"stage": stage, "seconds": table["s"].iloc[-1], "rss": table["max_rss"].iloc[-1]}
        )
    costs = pd.DataFrame(rows, columns=["stage", "seconds", "rss"]).groupby("stage")
    costs = costs.agg(
        jobs=("seconds", "size"), seconds=("seconds", "sum"), memory_mib=("rss", "max")
    )
    return costs.reindex([stage for stage in STAGES if stage in costs.index])


def read_edge_agreement(run_dir: Path) -> dict | None:
    """Correlation of a variant's edges with its own hint and with others', averaged over the folds.

    Returns:
        {"own", "other", "n"}, or None where nothing was synthesized.

    Source: engineering choice
    """
    paths = sorted(run_dir.glob("fold*/synthetic/edge_agreement.json"))
    if not paths:
        return None
    found = pd.DataFrame([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    weights = found["n"] / found["n"].sum()
    means = {key: float((found[key] * weights).sum()) for key in ("own", "other")}
    return means | {"n": int(found["n"].sum())}


def read_training_logs(run_dir: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """training_log.csv of every generator (column fold) and segmenter (arm, fold, seed).

    Source: engineering choice
    """
    generators = [
        pd.read_csv(path).assign(fold=path.parts[-3])
        for path in sorted(run_dir.glob("fold*/generator/training_log.csv"))
    ]
    segmenters = [
        pd.read_csv(path / "training_log.csv").assign(arm=arm, fold=fold, seed=seed)
        for (arm, fold, seed), path in result_dirs(run_dir).items()
        if (path / "training_log.csv").is_file()
    ]
    return tuple(
        pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        for frames in (generators, segmenters)
    )


def describe_machine() -> dict:
    """Processor, cores, memory, accelerator and system of this machine.

    Source: engineering choice
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def describe_versions() -> dict:
    """Versions of Python and the packages that decide the result, and the commit of the checkout.

    Source: engineering choice
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return versions | {"commit": found.stdout.strip() or None}

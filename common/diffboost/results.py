"""Reads what a study left in its folder: metrics, times, logs, and the machine it ran on."""

import os
import platform
import re
import subprocess
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch

from diffboost.data.documents import read_json, read_yaml
from diffboost.data.tables import read_csv
from diffboost.knobs import refuse_unknown
from diffboost.plans import Experiment, ablated_knobs, ablation_segmenters, segmenters
from diffboost.ratio.record import DECISION

PACKAGES = ("diffboost", "torch", "monai", "diffusers", "transformers", "numpy", "snakemake")
STAGES = (
    "prepare",
    "prepare_tree",
    "pretrain",
    "train_pix2pix",
    "evaluate_images",
    "prepare_unlabelled",
    "train_on_unlabelled",
    "finetune",
    "synthesize",
    "train_on_synthetic",
    "train_segmentation",
    "evaluate",
)
MEASURED = ["case", "label", "metric", "value"]
# A case may be called NA; a value may be missing, as pandas or a person writes it.
MISSING = {"keep_default_na": False, "na_values": {"value": ["", "nan", "NaN"]}}
COLUMNS = ["arm", "fold", "seed", "case", "label", "metric", "value", "knob", "knob_value"]


def read_experiment_as_run(run_dir: Path) -> Experiment:
    """The experiment of a study as it was run, with every default filled in.

    Raises:
        FileNotFoundError: the folder is no study's.

    Source: engineering choice
    """
    path = run_dir / "experiment.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"run_dir: {run_dir} holds no experiment.yaml; is it a study's folder?"
        )
    return _as_run(path)


def _as_run(path: Path) -> Experiment:
    """The experiment in a study's own experiment.yaml."""
    written = read_yaml(path, "experiment")
    if not isinstance(written, dict):
        raise ValueError(f"experiment {path}: `key: value` lines are needed")
    refuse_unknown(written, [entry.name for entry in fields(Experiment)], str(path))
    return Experiment(**written)


def result_dirs(run_dir: Path) -> dict[tuple[str, int, int], Path]:
    """The folder of each segmenter that the study orders, by (arm, fold, seed).

    Folders that an earlier version of the experiment left behind are not among them.

    Source: engineering choice
    """
    return {
        (segmenter.arm, segmenter.fold, segmenter.seed): run_dir / segmenter.folder
        for segmenter in segmenters(read_experiment_as_run(run_dir))
    }


def read_metrics(run_dir: Path) -> pd.DataFrame:
    """All metrics of a study: columns as COLUMNS names them.

    knob and knob_value are empty in the rows of the base. Rows that an ablation shares with the
    base stand there a second time, with the knob and the base's value of it.

    Raises:
        FileNotFoundError: no segmenter of the study has been evaluated.

    Source: engineering choice
    """
    experiment = read_experiment_as_run(run_dir)
    ordered = [(segmenter, "", "") for segmenter in segmenters(experiment)]
    for knob in ablated_knobs(experiment):
        for segmenter, value in ablation_segmenters(experiment, knob):
            ordered.append((segmenter, knob, str(value)))
    frames = [
        read_case_metrics(run_dir / segmenter.folder / "metrics.csv").assign(
            arm=segmenter.arm,
            fold=segmenter.fold,
            seed=segmenter.seed,
            knob=knob,
            knob_value=value,
        )
        for segmenter, knob, value in ordered
        if (run_dir / segmenter.folder / "metrics.csv").is_file()
    ]
    if not frames:
        raise FileNotFoundError(f"run_dir: {run_dir} has no fold*/ARM/seed*/metrics.csv yet")
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def read_case_metrics(path: str | Path) -> pd.DataFrame:
    """A segmenter's metrics.csv, as evaluation wrote it; a row a case, label and metric.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table.

    Source: engineering choice
    """
    return read_csv(path, "metrics", MEASURED, dtype={"case": str, "label": str}, **MISSING)


def load_metrics(path: str | Path) -> pd.DataFrame:
    """A study's metrics.csv, as `read_metrics` gave it.

    Source: engineering choice
    """
    text = {"case": str, "label": str, "knob": str, "knob_value": str}
    return read_csv(path, "metrics", COLUMNS, dtype=text, **MISSING)


def read_costs(run_dir: Path) -> pd.DataFrame:
    """Cost of each stage, from Snakemake's benchmark files, in the order in which the stages run.

    The memory of a stage that ran in the study's warm process stands in the last line of its log.

    Stages of folds, arms and seeds that an earlier version of the experiment ordered do not count.

    Returns:
        Index stage; columns jobs (count), seconds (sum over jobs), memory_mib (largest resident set
        of a job with its child processes).

    Source: engineering choice
    """
    rows, experiment = [], read_experiment_as_run(run_dir)
    for path in sorted((run_dir / "benchmarks").rglob("*.tsv")):
        if not _is_ordered(path.name, experiment):
            continue
        table = read_csv(path, "benchmarks", ["s", "max_rss"], sep="\t", na_values="-")
        log = run_dir / "logs" / path.relative_to(run_dir / "benchmarks").with_suffix(".log")
        warm = warm_cost(log)
        rss = warm["memory_mib"] if warm else table["max_rss"].iloc[-1]
        stage = path.name.split(".")[0]
        rows.append({"stage": stage, "seconds": table["s"].iloc[-1], "rss": rss})
    costs = pd.DataFrame(rows, columns=["stage", "seconds", "rss"]).groupby("stage")
    costs = costs.agg(
        jobs=("seconds", "size"), seconds=("seconds", "sum"), memory_mib=("rss", "max")
    )
    return costs.reindex([stage for stage in STAGES if stage in costs.index])


def _is_ordered(benchmark: str, experiment: Experiment) -> bool:
    """Whether a stage's file, by its name, is of a fold, arm and seed that the study orders."""
    found = re.search(r"\.fold(\d+)(?:\.(.+)\.seed(\d+))?\.tsv$", benchmark)
    if not found:
        return True
    fold, arm, seed = found.groups()
    trained = arm is None or (arm in experiment.arms and int(seed) in experiment.seeds)
    return int(fold) in experiment.folds and trained


def warm_cost(log: Path) -> dict[str, float] | None:
    """What a warm stage took, from the line that its log ends with; None of another stage.

    Returns:
        cpu_seconds; memory_mib at its peak.

    Source: engineering choice
    """
    if not log.is_file():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 200))
        end = file.read().decode(errors="replace").rstrip("\n")
    found = re.search(r"^warm process: .* s, (\S+) s of CPU, (\d+) MiB at most$", end, re.M)
    return {"cpu_seconds": float(found[1]), "memory_mib": float(found[2])} if found else None


def read_edge_agreement(run_dir: Path) -> dict | None:
    """Correlation of a variant's edges with its own hint and with others', averaged over the folds.

    Returns:
        {"own", "other", "n"}, or None where nothing was synthesized. own and other are means over
        the folds that have one (a fold of one case has no other), weighed by n; NaN if none has.

    Source: engineering choice
    """
    paths = [path for _, path in _by_fold(run_dir, "synthetic_store/edge_agreement.json")]
    if not paths:
        return None
    found = pd.DataFrame([read_json(path, "edge agreement", nan=True) for path in paths])
    sums = found[["own", "other"]].mul(found["n"], axis=0).sum(min_count=1)
    counts = found[["own", "other"]].notna().mul(found["n"], axis=0).sum()
    return (sums / counts).to_dict() | {"n": int(found["n"].sum())}


def read_ratios(run_dir: Path) -> dict[str, dict]:
    """What each fold's search for the ratio found, ratio.json by the fold's name.

    Source: engineering choice
    """
    found = _by_fold(run_dir, f"synthetic_store/{DECISION}")
    return {fold: read_json(path, "ratio", nan=True) for fold, path in found}


def read_training_logs(run_dir: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """training_log.csv of every generator (column fold) and segmenter (arm, fold, seed).

    The generator that learned from a fold's unlabelled images first is called "fold0, unlabelled".

    Source: engineering choice
    """
    generators = [
        read_csv(path, "training log").assign(fold=fold + suffix)
        for place, suffix in (("generator", ""), ("unlabelled/generator", ", unlabelled"))
        for fold, path in _by_fold(run_dir, f"{place}/training_log.csv")
    ]
    segmenters = [
        read_csv(path / "training_log.csv", "training log").assign(arm=arm, fold=fold, seed=seed)
        for (arm, fold, seed), path in result_dirs(run_dir).items()
        if (path / "training_log.csv").is_file()
    ]
    return tuple(
        pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        for frames in (generators, segmenters)
    )


def _by_fold(run_dir: Path, name: str) -> list[tuple[str, Path]]:
    """(fold's name, file) of every fold that the study orders and that has such a file."""
    names = sorted(f"fold{fold}" for fold in read_experiment_as_run(run_dir).folds)
    return [(fold, path) for fold in names if (path := run_dir / fold / name).is_file()]


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

"""Whether the files that a study names are there, before a stage looks for them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from diffboost.data.documents import read_json, read_yaml
from diffboost.data.tasks import PHANTOM_LAYOUTS, PHANTOMS
from diffboost.plans import Experiment

DATASET_RECORD = ".dataset_dir.json"


def missing_data(
    experiment: Experiment,
    task: Mapping,
    run_dir: Path,
    target: str,
    dataset_dir: str | None = None,
) -> str | None:
    """What a study's first stage would miss, in words; None where all is there.

    Scans that prepare has read already, or that it is to download, may lack, and so may weights
    from which all generators were finetuned.

    Args:
        experiment: the study; its folders are relative to the working directory, as for stages.
        task: as ``read_task`` gives it.
        run_dir: folder of the study.
        target: what is made.
        dataset_dir: used instead of the file's own.

    Returns:
        the key, the folder and how to give another.

    Source: engineering choice
    """
    weights = experiment.finetune.get("weights")
    models = (run_dir / f"fold{fold}/generator/model.pt" for fold in experiment.folds)
    begun = target == "table1" or all(model.is_file() for model in models)
    if weights and not begun and not Path(weights).is_file():
        return f"finetune: weights: there is no file {Path(weights).absolute()}"
    tree = (experiment.pretrain or {}).get("dataset_dir")
    if tree and target in ("report", "table1") and not (run_dir / "pretrain/store").is_dir():
        if not _is_there(tree):
            return f"pretrain: dataset_dir: there is no folder {Path(tree).absolute()}"
    downloads = experiment.prepare.get("download") is True and task["download"] is not None
    unneeded = (tree and target == "table1") or (run_dir / "store").is_dir()
    folder = dataset_dir or experiment.dataset_dir
    if folder == PHANTOMS and task["layout"] not in PHANTOM_LAYOUTS and not unneeded:
        return (
            f"dataset_dir: `{PHANTOMS}` are made in the layouts {', '.join(PHANTOM_LAYOUTS)}; the "
            f"task's is {task['layout']} (phantom_organ is a task for them)"
        )
    if unneeded or downloads or _is_there(folder):
        return None
    return (
        f"dataset_dir: there is no folder {Path(folder).absolute()}; give --dataset_dir, or "
        f"`{PHANTOMS}` for made-up scans"
    )


def settle_dataset(run_dir: Path, dataset_dir: str, dry_run: bool = False) -> str:
    """The folder of scans as the study's first run named it, which is kept in the study's folder.

    Snakemake takes another text for another order: it would remove the store, and with it all that
    was made of it, before the first stage looks whether the folder is there.

    Args:
        run_dir: folder of the study.
        dataset_dir: what is named now; relative to the working directory.
        dry_run: keep nothing.

    Raises:
        ValueError: the store was made from another folder.

    Source: engineering choice
    """
    record, before = run_dir / DATASET_RECORD, run_dir / "experiment.yaml"
    if record.is_file():
        first = read_json(record, "dataset_dir")
    elif before.is_file():
        spelled = read_yaml(before, "experiment").get("dataset_dir")
        first = {"dataset_dir": spelled, "place": os.path.abspath(spelled)}
    else:
        first = {}
    if first.get("dataset_dir") == dataset_dir:
        return dataset_dir
    place = os.path.abspath(dataset_dir)
    if first and (run_dir / "store").is_dir():
        if os.path.realpath(place) == os.path.realpath(first["place"]):
            return first["dataset_dir"]
        raise ValueError(
            f"dataset_dir: {dataset_dir}, but {run_dir / 'store'} was made from "
            f"{first['dataset_dir']} ({first['place']}); name that folder, or give the study "
            "another name or --runs_dir (or remove the store, and all that was made of it is made "
            "again)"
        )
    if not dry_run:
        partial = record.with_suffix(".partial")  # files.write_json would import torch: seconds
        partial.write_text(json.dumps({"dataset_dir": dataset_dir, "place": place}) + "\n")
        partial.replace(record)
    return dataset_dir


def _is_there(folder: str) -> bool:
    return folder == PHANTOMS or Path(folder).is_dir()

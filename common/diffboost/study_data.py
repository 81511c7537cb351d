"""Whether the data that a study names is there, before its first stage looks for it."""

from collections.abc import Mapping
from pathlib import Path

from diffboost.plans import Experiment

PHANTOMS = "phantoms"  # made on the fly, as prepare does


def missing_data(
    experiment: Experiment,
    task: Mapping,
    run_dir: Path,
    target: str,
    dataset_dir: str | None = None,
) -> str | None:
    """What a study's first stage would miss, in words; None where all is there.

    Scans that prepare has read already, or that it is to download, may lack.

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
    tree = (experiment.pretrain or {}).get("dataset_dir")
    if tree and target in ("report", "table1") and not (run_dir / "pretrain/store").is_dir():
        if not _is_there(tree):
            return f"pretrain: dataset_dir: there is no folder {Path(tree).absolute()}"
    downloads = experiment.prepare.get("download") is True and task["download"] is not None
    unneeded = (tree and target == "table1") or (run_dir / "store").is_dir()
    folder = dataset_dir or experiment.dataset_dir
    if unneeded or downloads or _is_there(folder):
        return None
    return (
        f"dataset_dir: there is no folder {Path(folder).absolute()}; give --dataset_dir, or "
        f"`{PHANTOMS}` for made-up scans"
    )


def _is_there(folder: str) -> bool:
    return folder == PHANTOMS or Path(folder).is_dir()

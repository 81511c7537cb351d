"""What `diffboost cost` does: reads an experiment, counts its stages, writes table and JSON."""

import logging
from pathlib import Path

from diffboost.cost import data, devices, report
from diffboost.cost.plan import StudyCost
from diffboost.cost.stage import Stage
from diffboost.data.tasks import PHANTOMS
from diffboost.data.tree import scan_tree
from diffboost.experiments import read_experiment, study_task
from diffboost.plans import Experiment
from diffboost.stages import WORKFLOW, stage_configs

logger = logging.getLogger(__name__)
NUM_PHANTOMS = 6000  # of the pretraining tree, as its prepare.yaml says


def plan_study(
    experiment: str | Path,
    dataset_dir: str | None = None,
    num_slices: int | None = None,
    num_pretraining: int | None = None,
    runs_dir: str | Path | None = None,
) -> tuple[Experiment, list[Stage], str]:
    """Counts the stages of an experiment file; runs none, loads no weights, needs no network.

    Args:
        experiment: the experiment file.
        dataset_dir: used instead of the file's own.
        num_slices: count with so many cases of one slice instead of looking at the data.
        num_pretraining: count with so many images of the pretraining tree.
        runs_dir: where the study's own slice store may be, instead of runs/ beside workflow/.

    Returns:
        The experiment, its stages, and a sentence on where the number of slices comes from.

    Raises:
        FileNotFoundError: no such experiment or data.
        ValueError: a key or value that is not allowed.

    Source: engineering choice
    """
    configs = stage_configs()
    study = read_experiment(experiment, configs)
    task = study_task(study, experiment)
    store_dir = Path(runs_dir or WORKFLOW.parent / "runs") / study.name / "store"
    index, said = data.study_slices(
        study, task, dataset_dir or study.dataset_dir, store_dir, num_slices
    )
    if num_pretraining is None:
        num_pretraining = _tree_size(study)
    if num_pretraining is not None:
        said += f"; {num_pretraining:,} images of pretraining"
    counting = StudyCost(study, configs, index, 1 + len(task["labels"]), num_pretraining)
    return study, counting.stages(), said


def _tree_size(study: Experiment) -> int | None:
    """Images of the pretraining tree; None where the study has none of its own."""
    folder = (study.pretrain or {}).get("dataset_dir")
    if not folder:
        return None
    if folder == PHANTOMS:
        sizes = (study.pretrain.get("prepare") or {}).get("phantoms") or {}
        return sizes.get("num_images", NUM_PHANTOMS)
    try:
        return len(scan_tree(folder)[0])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"pretrain: {error}; --num_pretraining says how many images to count with instead"
        ) from None


def show_cost(
    experiment: str | Path,
    device: str = "cpu",
    json: str | None = None,
    **sizes,
) -> str:
    """The plan of an experiment as text, and as JSON in a file where one is named.

    Args:
        experiment: the experiment file.
        device: cpu (this machine, measured), a6000, a100 or h100.
        json: file to write as well; "-" gives JSON instead of the table.
        **sizes: further arguments of ``plan_study``.

    Raises:
        FileNotFoundError, ValueError: see ``plan_study`` and ``find_device``.

    Source: engineering choice
    """
    found = devices.find_device(device)
    study, stages, said = plan_study(experiment, **sizes)
    runs = report.rows(stages, found)
    stated = report.assumptions(found, said)
    text = report.as_json(runs, found, study.name, stated)
    if json == "-":
        return text
    if json:
        Path(json).write_text(text, encoding="utf-8")
        logger.info("wrote %s", json)
    lines = [f"{study.name} on {found.name}", "", report.table(runs), ""]
    lines += [f"Warning: {line}" for line in report.warnings(runs, found)]
    return "\n".join([*lines, *stated]) + "\n"

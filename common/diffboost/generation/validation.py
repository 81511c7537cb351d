"""The loss of a generator on slices that it was not trained on."""

import logging
from collections.abc import Mapping
from pathlib import Path

from monai.engines import Evaluator

from diffboost.files import sha256_of_files, write_json
from diffboost.generation.lineage import read_lineage_document
from diffboost.generation.schedulers import prediction_of
from diffboost.generation.synthesis import refuse_other_backbone
from diffboost.processes import is_main_process

RESULT = "validation.json"

logger = logging.getLogger(__name__)


def check_generator(model_path: str, backbone: str, objective: str) -> None:
    """Refuses to judge a generator on another backbone, or by another loss, than it was trained on.

    A branch fits every UNet of the same shape, and a loss of either kind looks like one. Nothing is
    known of a model without lineage.json beside it, such as a federated round's.

    Args:
        model_path: the weights that are judged.
        backbone: that they are to be used with.
        objective: noise or flow.

    Raises:
        ValueError: it is another one.

    Source: engineering choice (design, "lineage").
    """
    folder = Path(model_path).parent
    if not (folder / "lineage.json").is_file():
        logger.info("%s has no lineage.json: its backbone and objective are not compared", folder)
        return
    lineage = read_lineage_document(folder / "lineage.json")
    refuse_other_backbone(lineage, str(folder), backbone)
    if prediction_of(lineage) != objective:
        raise ValueError(
            f"objective: {objective!r}, but {model_path} predicts {prediction_of(lineage)!r}, as "
            "its lineage.json says"
        )


def write_losses(
    evaluator: Evaluator, output_dir: str, model_path: str, settings: Mapping[str, object]
) -> None:
    """Writes what an evaluator measured as ``validation.json``, with what it was measured on.

    Args:
        evaluator: has run; its metrics are the losses.
        output_dir: gets the file; one of an earlier evaluation is replaced.
        model_path: the weights that were judged, known by their hash.
        settings: the knobs that the losses depend on.

    Source: engineering choice.
    """
    if not is_main_process():
        return
    metrics = {name: float(value) for name, value in evaluator.state.metrics.items()}
    num_slices = len(evaluator.data_loader.dataset)
    found = {**metrics, "num_slices": num_slices, "model_sha256": sha256_of_files([model_path])}
    write_json(Path(output_dir) / RESULT, {**found, **settings})
    logger.info("%d slices: %s", num_slices, metrics)

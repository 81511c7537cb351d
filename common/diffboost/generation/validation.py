"""The loss of a generator on slices that it was not trained on."""

import logging
from collections.abc import Mapping
from pathlib import Path

from monai.engines import Evaluator

from diffboost.files import sha256_of_files, write_json
from diffboost.processes import is_main_process

RESULT = "validation.json"

logger = logging.getLogger(__name__)


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

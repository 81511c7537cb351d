"""The loss of a generator on slices that it was not trained on."""

import logging
from collections.abc import Mapping
from pathlib import Path

from monai.engines import Evaluator

from diffboost.data.items import SliceItems
from diffboost.data.slices import slice_items
from diffboost.files import sha256_of_files, write_json
from diffboost.processes import is_main_process

RESULT = "validation.json"

logger = logging.getLogger(__name__)


def held_out_slices(
    store_dir: str,
    fold: int,
    min_foreground_px: int = 0,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
) -> SliceItems:
    """The slices of the training fold that are kept for model selection.

    Args:
        store_dir: slice store.
        fold: fold that is held out for test; none of its slices is taken.
        min_foreground_px: slices with fewer labeled pixels are left out.
        inner_fraction: share of the fold's training cases that training leaves out.
        num_cases: of the training fold, as in training.

    Raises:
        ValueError: ``inner_fraction`` is not between 0 and 1, so that no case is kept.

    Source: engineering choice.
    """
    if not 0 < inner_fraction < 1:
        raise ValueError(
            f"inner_fraction: {inner_fraction} keeps no case for validation; it has to lie between "
            "0 and 1"
        )
    knobs = {"inner_fraction": inner_fraction, "num_cases": num_cases}
    return slice_items(
        store_dir, fold, "inner_validation", min_foreground_px=min_foreground_px, **knobs
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

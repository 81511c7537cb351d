"""Consistency of variant volumes: how alike neighboring slices are, beside the real volume's."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffboost.data.transforms import LoadSliced
from diffboost.files import write_json
from diffboost.generation.variant_store import variant_file
from diffboost.processes import is_main_process

logger = logging.getLogger(__name__)


def measure_slice_consistency(
    synthetic_dir: str, data: Sequence[dict], num_variants: int = 200
) -> dict:
    """Mean absolute difference of neighboring slices, of variants and of their sources.

    Writes ``slice_consistency.json`` with ``variants``, ``real`` (gray levels of [-1, 1]), their
    quotient ``ratio`` (1: as smooth from slice to slice as the real volume) and ``pairs``; nothing
    where no case has neighboring slices.

    Args:
        synthetic_dir: the synthetic store.
        data: the variants' items, see :func:`diffboost.generation.synthesis.variant_items`.
        num_variants: pairs that are measured at most, evenly spread over all.

    Returns:
        The figures; nothing on other processes than the first, which alone measures.

    Source: engineering choice (issue 7, "volumes").
    """
    if not is_main_process():
        return {}
    items = {(item["case"], item["slice"], item["variant"]): item for item in data}
    pairs = [key for key in items if (key[0], key[1] + 1, key[2]) in items]
    if not pairs:
        return {}
    chosen = np.unique(np.linspace(0, len(pairs) - 1, num_variants).astype(int))
    load, differences = LoadSliced(["synthetic", "image"]), []
    for case, slice_, variant in (pairs[number] for number in chosen):
        first, second = (
            load({"synthetic": str(Path(synthetic_dir) / variant_file(*key)), "image": image})
            for key in ((case, slice_, variant), (case, slice_ + 1, variant))
            for image in [items[key]["image"]]
        )
        keys = ("synthetic", "image")
        differences.append([float((first[key] - second[key]).abs().mean()) for key in keys])
    variants, real = (float(value) for value in np.mean(differences, axis=0))
    ratio = variants / real if real else float("nan")
    figures = {"variants": variants, "real": real, "ratio": ratio, "pairs": len(differences)}
    write_json(Path(synthetic_dir) / "slice_consistency.json", figures)
    logger.info("neighboring slices differ by %(variants).3f, real ones by %(real).3f", figures)
    return figures

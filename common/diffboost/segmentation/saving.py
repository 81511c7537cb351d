"""A trained segmenter's weights, small enough to be shipped."""

import functools
import shutil
from pathlib import Path

import torch

from diffboost.data.weights import read_state
from diffboost.files import save_tensors, write_aside


def export_weights(segmenter_dir: str, output_dir: str) -> Path:
    """Writes a segmenter's ``model.pt`` in float16, and its ``lineage.json`` beside it.

    Args:
        segmenter_dir: ``output_dir`` of a training.
        output_dir: folder for the two files.

    Returns:
        The written ``model.pt``: half the size; it loads into a network of float32.

    Raises:
        FileNotFoundError: one of the two is not there.
        ValueError: a weight is out of float16's range, or the file is damaged.

    Source: engineering choice.
    """
    source, target = Path(segmenter_dir), Path(output_dir) / "model.pt"
    state = {
        name: value.half() if value.is_floating_point() else value.clone()
        for name, value in read_state(source / "model.pt").items()
    }
    wrong = sorted(name for name, value in state.items() if not torch.isfinite(value).all())
    if wrong:
        raise ValueError(f"segmenter_dir: {source}: {wrong[0]} is out of the range of float16")
    write_aside(target, functools.partial(save_tensors, state))
    lineage = functools.partial(shutil.copyfile, source / "lineage.json")
    write_aside(target.with_name("lineage.json"), lineage)
    return target

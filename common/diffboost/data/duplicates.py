"""Duplicates in a slice store: which cases show one scan, and groups that folds keep together."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from diffboost.data.comparison import SAME_VOLUME, SliceComparison

PAIR_COLUMNS = ("case", "slice", "other", "other_slice", "likeness", "kind")
LARGEST_SEARCH = 5_000_000  # cases x slices: some minutes
_NUMBERED = re.compile(r"^(?P<volume>.+?)_(slice|sl|frame|z)_?\d+$", re.IGNORECASE)


def find_duplicates(index: pd.DataFrame, paths: Sequence[Path], task: Mapping) -> pd.DataFrame:
    """Pairs of cases that show one scan: turned, mirrored, cropped, re-encoded, or other slices.

    Args:
        index: rows of a store (case, slice, foreground_px, original_shape, affine, spacing_mm),
            those of a case one after the other.
        paths: the image of every row.
        task: the store's task.

    Returns:
        A row a pair with :data:`PAIR_COLUMNS`, the most alike first.

    Raises:
        ValueError: the store is too large for the search.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    if is_too_large(index):
        raise ValueError(
            f"{index.case.nunique()} cases with {len(index)} slices are too many to be compared; "
            f"cases times slices may be {LARGEST_SEARCH}"
        )
    slices = SliceComparison(index.reset_index(drop=True), paths, task)
    with torch.inference_mode():
        pairs = slices.near_duplicates()
        pairs += slices.same_volumes()
    pairs += _numbered_slices(slices.names)
    found = pd.DataFrame(pairs, columns=list(PAIR_COLUMNS))
    found = found.sort_values("likeness", ascending=False, kind="stable")
    return found.drop_duplicates(["case", "other"], ignore_index=True)


def is_too_large(index: pd.DataFrame) -> bool:
    """Whether a store has too many slices for :func:`find_duplicates`.

    Source: engineering choice.
    """
    return index.case.nunique() * len(index) > LARGEST_SEARCH


def _numbered_slices(names: Sequence[str]) -> list[tuple]:
    """Pairs of cases that are slices of one volume by their names: liver_7_slice_12, …_13."""
    volumes: dict[str, tuple[str, int]] = {}
    pairs = []
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            first = volumes.setdefault(match["volume"], name)
            if first != name:
                pairs.append((first, 0, name, 0, 1.0, SAME_VOLUME))
    return pairs

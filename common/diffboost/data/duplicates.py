"""Duplicates in a slice store: which cases show one scan, and groups that folds keep together."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from diffboost.data.comparison import SAME_VOLUME, SliceComparison

PAIR_COLUMNS = ("case", "slice", "other", "other_slice", "likeness", "kind")
LARGEST_SEARCH = 5_000_000  # cases x slices: some minutes
_APART = "[^a-z0-9/]"  # what separates the words of a name
_NUMBERED = re.compile(
    rf"^(?P<folder>.*/)?(?P<volume>[^/]+?){_APART}+(?:slice|sl|frame|z){_APART}*"
    rf"(?P<number>\d+){_APART}*?(?:\.[a-z][^/]*)?$",
    re.IGNORECASE,
)


def find_duplicates(index: pd.DataFrame, paths: Sequence[Path], task: Mapping) -> pd.DataFrame:
    """Pairs of cases that show one scan: turned, mirrored, cropped, re-encoded, or other slices.

    Args:
        index: rows of a store (case, slice, foreground_px, original_shape, affine, spacing_mm,
            source_image), those of a case one after the other.
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
    pairs += numbered_slices(index).itertuples(index=False, name=None)
    found = pd.DataFrame(pairs, columns=list(PAIR_COLUMNS))
    found = found.sort_values("likeness", ascending=False, kind="stable")
    return found.drop_duplicates(["case", "other"], ignore_index=True)


def is_too_large(index: pd.DataFrame) -> bool:
    """Whether a store has too many slices for :func:`find_duplicates`.

    Source: engineering choice.
    """
    return index.case.nunique() * len(index) > LARGEST_SEARCH


def numbered_slices(index: pd.DataFrame) -> pd.DataFrame:
    """Pairs of cases that are slices of one volume by their files: liver_7_slice_12.png, …_13.png.

    Where two folders have a file of the same name, a volume is known by its folder, too.

    Args:
        index: rows of a store (case, source_image); a source_image may be empty.

    Returns:
        A row a pair with :data:`PAIR_COLUMNS`: the first case of a volume with each of the others.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    files = index.drop_duplicates("case").set_index("case")["source_image"]
    named = files.str.extract(_NUMBERED).dropna(subset="volume").fillna("")
    repeated = named.volume[named.duplicated(["volume", "number"])]
    named["folder"] = named.folder.where(named.volume.isin(repeated), "")
    pairs = [
        (cases[0], 0, other, 0, 1.0, SAME_VOLUME)
        for cases in named.groupby(["folder", "volume"], sort=False).groups.values()
        for other in cases[1:]
    ]
    return pd.DataFrame(pairs, columns=list(PAIR_COLUMNS))

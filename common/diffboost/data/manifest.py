"""The manifest of a synthetic store, read: a row a variant."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from diffboost.data.containment import check_folder, refuse_cases, refuse_names
from diffboost.data.tables import read_table, to_frame
from diffboost.data.tasks import slicing

KINDS = {
    **dict.fromkeys(("image", "case", "source_image", "edge", "label", "lineage_sha256"), "text"),
    **dict.fromkeys(("sha256", "source_sha256", "slicing"), "text"),
    **dict.fromkeys(("slice", "variant"), "whole number"),
    "kept": "yes or no",
}
EVERY = ("image", "case", "slice", "variant", "kept")  # no manifest lacks them
LATER = ("slicing",)  # stores before 0.9.0 lack them: empty texts where they are asked for


def read_manifest(synthetic_dir: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A synthetic store's manifest, or some of its columns.

    Args:
        synthetic_dir: the store (images/, manifest.parquet).
        columns: some of ``KINDS``; None: all that there are, those of ``EVERY`` at least.

    Returns:
        A row a variant. ``image`` is relative to the store and stays inside it; ``source_image``,
        ``edge`` and ``label`` say where a variant came from and are opened by nobody.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: it is damaged, lacks a column, has no row, or names a file outside the store.

    Source: engineering choice (issue 5, "Hostile input").
    """
    root = Path(synthetic_dir).resolve()
    path = root / "manifest.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"synthetic_dir: {synthetic_dir} holds no manifest.parquet; "
            "write a synthetic store with the bundle diffboost_synthesis"
        )
    kinds = {name: KINDS[name] for name in columns or EVERY}
    table = read_table(path, "synthetic_dir", kinds, others=columns is None, later=LATER)
    if not len(table):
        raise ValueError(f"synthetic_dir: {path} has no row")
    if "case" in kinds:
        refuse_cases(table["case"], f"{path}: case")
    if "image" in kinds:
        refuse_names(table["image"], f"{path}: image")
        for folder in {name.rpartition("/")[0] for name in table["image"].to_pylist()}:
            check_folder(str(root), folder, f"{path}: image")
    return to_frame(table)


def refuse_other_slicing(texts: Iterable[str], task: Mapping, key: str, but: str = "") -> None:
    """Refuses variants of slices that were cut from the same files in another way.

    Args:
        texts: the manifest's column slicing; an empty one says nothing.
        task: of the slices that the variants are for.
        key: what names the synthetic store, for the message.
        but: a key of ``slicing`` that may differ.

    Raises:
        ValueError: names what differs.

    Source: engineering choice (issue 5, "Nothing leaked").
    """
    own = slicing(task)
    for text in sorted({*texts} - {""}):
        found = json.loads(text)
        for name in sorted({*own, *found} - {but}):
            if own.get(name) != found.get(name):
                raise ValueError(
                    f"{key}: its variants are of slices of {name} {found.get(name)}, those of this "
                    f"training are of {name} {own.get(name)}, though the files are the same"
                )

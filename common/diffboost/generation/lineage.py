"""Lineage files: which cases a model has seen, in lineage.json or, when many, in a table beside it.

In memory ``cases`` is a dictionary case -> hash of the source files, with ``images`` (case -> hash
of the image file alone) beside it, or a table with the columns case, sha256 and image_sha256.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from diffboost.data.containment import inside
from diffboost.data.documents import DIGEST, check_digest, digest_of, read_json
from diffboost.data.items import SliceItems
from diffboost.data.tables import read_table, write_table
from diffboost.files import sha256_of_files, write_aside
from diffboost.processes import is_main_process, wait_for_processes

LARGEST_INLINE = 20_000  # cases; a lineage.json of a million would take minutes to open
SIDE_FILE = "lineage_cases"
TABLE_KINDS = dict.fromkeys(("case", "sha256", "image_sha256"), "text")
REFERENCE = {"file", "num_cases", "sha256"}  # keys that stand for a table beside lineage.json


def hash_cases(data: SliceItems) -> dict[str, dict[str, str] | pa.Table]:
    """What a lineage says of the cases that teach a model: the hashes of their source files.

    Args:
        data: slices of a store.

    Returns:
        ``cases``: case -> 64 hexadecimal digits of image and label files; ``images``: the same of
        the image file alone, without the cases where the store knows no other hash. Above 20,000
        cases ``cases`` alone, a table of both hashes that takes a tenth of the memory.

    Source: engineering choice (design, "lineage").
    """
    table = data.case_hashes()
    if len(table) > LARGEST_INLINE:
        return {"cases": table}
    rows = table.to_pylist()
    return {
        "cases": {row["case"]: row["sha256"] for row in rows},
        "images": {row["case"]: row["image_sha256"] for row in rows if row["image_sha256"]},
    }


def read_lineage(path: str | Path) -> dict:
    """Reads lineage.json with the tables of cases that it and its ancestors refer to.

    Args:
        path: a lineage.json.

    Raises:
        ValueError: a table beside it is missing or not the one of the file's hash.

    Source: engineering choice (design, "lineage").
    """
    path = Path(path)
    lineage = read_lineage_document(path)
    for member in _members(lineage):
        reference = member["cases"]
        if set(reference) == REFERENCE:
            table = inside(path.parent, reference["file"], f"lineage: {path}: file")
            if not table.is_file() or sha256_of_files([table]) != reference["sha256"]:
                raise ValueError(f"{path}: {table.name} beside it is missing or another file")
            member["cases"] = read_table(table, "lineage", TABLE_KINDS, later=["image_sha256"])
    return lineage


def read_lineage_document(path: str | Path) -> dict:
    """What lineage.json itself says, without the tables that it refers to.

    Args:
        path: a lineage.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or cases or ancestors are not what they should be.

    Source: engineering choice (issue 5, "Hostile input").
    """
    lineage = read_json(path, "lineage")
    check_digest(lineage, path, "lineage")
    for member in _members(lineage, path):
        optional = (member.get(name, {}) for name in ("images", "selection"))
        for cases in (member.get("cases"), *optional):
            texts = isinstance(cases, dict) and set(cases) != REFERENCE
            if not isinstance(cases, dict) or (
                texts and not all(isinstance(value, str) for value in cases.values())
            ):
                raise ValueError(f"lineage: {path}: cases: {cases!r:.80}; name -> hash is needed")
    lineage.pop(DIGEST, None)
    return lineage


def write_lineage(path: str | Path, lineage: dict) -> None:
    """Writes lineage.json, and beside it a table for every member with many cases.

    Args:
        path: the lineage.json to write.
        lineage: as ``trace_lineage`` or ``read_lineage`` give it; it is not changed.

    Source: engineering choice (design, "lineage").
    """
    path = Path(path)
    document = _with_tables_aside(lineage, path, itertools.count())
    document[DIGEST] = digest_of(document)
    text = json.dumps(document, indent=1, sort_keys=True)
    write_aside(path, functools.partial(Path.write_text, data=text + "\n", encoding="utf-8"))


def copy_lineage(generator_dir: str | Path, output_dir: str | Path) -> None:
    """Copies a generator's lineage, with its tables, to the variants that it made.

    Args:
        generator_dir: folder with lineage.json.
        output_dir: the synthetic store.

    Source: engineering choice (issue 5, "every variant carries its generator's lineage").
    """
    if is_main_process():
        tables = Path(generator_dir).glob(f"{SIDE_FILE}*.parquet")
        for path in (*sorted(tables), Path(generator_dir) / "lineage.json"):
            write_aside(Path(output_dir) / path.name, functools.partial(shutil.copyfile, path))
    wait_for_processes()


def _with_tables_aside(lineage: dict, path: Path, numbers: Iterator[int]) -> dict:
    """A copy in which references stand for tables, which are written beside ``path``."""
    cases, number = lineage["cases"], next(numbers)
    if isinstance(cases, pa.Table):
        file = path.with_name(f"{SIDE_FILE}_{number}.parquet" if number else f"{SIDE_FILE}.parquet")
        write_aside(file, functools.partial(write_table, table=cases))
        cases = {"file": file.name, "num_cases": len(cases), "sha256": sha256_of_files([file])}
    ancestors = [
        _with_tables_aside(ancestor, path, numbers) for ancestor in lineage.get("ancestors", [])
    ]
    return {**lineage, "cases": cases, "ancestors": ancestors}


def _members(lineage: dict, path: str | Path = "") -> list[dict]:
    """A lineage and all its ancestors, itself first."""
    ancestors = lineage.get("ancestors", []) if isinstance(lineage, dict) else None
    if not isinstance(ancestors, list):
        raise ValueError(
            f"lineage: {path}: ancestors: {lineage!r:.80}; a list of lineages is needed"
        )
    return [lineage] + [member for ancestor in ancestors for member in _members(ancestor, path)]

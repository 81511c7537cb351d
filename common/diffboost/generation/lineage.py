"""Lineage files: which cases a model has seen, in lineage.json or, when many, in a table beside it.

In memory ``cases`` is a dictionary case -> hash, or a table with the columns case and sha256.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffboost.data.items import SliceItems
from diffboost.data.slices import sha256_of_files
from diffboost.handlers import write_aside
from diffboost.processes import is_main_process, wait_for_processes

LARGEST_INLINE = 20_000  # cases; a lineage.json of a million would take minutes to open
SIDE_FILE = "lineage_cases"


def hash_cases(data: SliceItems) -> dict[str, str] | pa.Table:
    """The hash of every case's source files.

    Args:
        data: slices of a store.

    Returns:
        case -> 64 hexadecimal digits; above 20,000 cases a table (case, sha256) that takes a tenth
        of the memory.

    Source: engineering choice (design, "lineage").
    """
    table = data.case_hashes()
    if len(table) > LARGEST_INLINE:
        return table
    return dict(zip(table["case"].to_pylist(), table["sha256"].to_pylist(), strict=True))


def read_lineage(path: str | Path) -> dict:
    """Reads lineage.json with the tables of cases that it and its ancestors refer to.

    Args:
        path: a lineage.json.

    Raises:
        ValueError: a table beside it is missing or not the one of the file's hash.

    Source: engineering choice (design, "lineage").
    """
    path = Path(path)
    lineage = json.loads(path.read_text(encoding="utf-8"))
    for member in _members(lineage):
        reference = member["cases"]
        if set(reference) == {"file", "num_cases", "sha256"}:
            table = path.with_name(reference["file"])
            if not table.is_file() or sha256_of_files([table]) != reference["sha256"]:
                raise ValueError(f"{path}: {table.name} beside it is missing or another file")
            member["cases"] = pq.read_table(table)
    return lineage


def write_lineage(path: str | Path, lineage: dict) -> None:
    """Writes lineage.json, and beside it a table for every member with many cases.

    Args:
        path: the lineage.json to write.
        lineage: as ``trace_lineage`` or ``read_lineage`` give it; it is not changed.

    Source: engineering choice (design, "lineage").
    """
    path = Path(path)
    text = json.dumps(
        _with_tables_aside(lineage, path, itertools.count()), indent=1, sort_keys=True
    )
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
        write_aside(file, functools.partial(pq.write_table, cases))
        cases = {"file": file.name, "num_cases": len(cases), "sha256": sha256_of_files([file])}
    ancestors = [
        _with_tables_aside(ancestor, path, numbers) for ancestor in lineage.get("ancestors", [])
    ]
    return {**lineage, "cases": cases, "ancestors": ancestors}


def _members(lineage: dict) -> list[dict]:
    """A lineage and all its ancestors, itself first."""
    return [lineage] + [
        member for ancestor in lineage.get("ancestors", []) for member in _members(ancestor)
    ]

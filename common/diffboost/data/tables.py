"""Tables from outside: parquet and CSV, read within limits, with errors that name file and key."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diffboost.data.containment import refuse_special
from diffboost.data.documents import one_line

LARGEST_TABLE = 1 << 28  # rows; RadImageNet has 1.35 million
# Arrow's own, and Python's, as which some of them come back.
_TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, OverflowError, MemoryError)
_KINDS = {
    "text": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "whole number": pa.types.is_integer,
    "number": lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind),
    "yes or no": pa.types.is_boolean,
    "list": lambda kind: pa.types.is_list(kind) or pa.types.is_large_list(kind),
}


def read_csv(path: str | Path, key: str, columns: Iterable[str] = (), **options) -> pd.DataFrame:
    """Reads a CSV file.

    Args:
        path: the file.
        key: what it is, for messages.
        columns: that must be there.
        **options: of ``pandas.read_csv``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table in UTF-8, or lacks a column.

    Source: engineering choice (issue 5, "Hostile input").
    """
    refuse_special(path, key)
    try:
        table = pd.read_csv(path, **options)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{key}: {path} cannot be read as a CSV table: {one_line(error)}"
        ) from error
    _refuse_missing(table.columns, columns, path, key)
    return table


@contextmanager
def open_table(
    path: str | Path,
    key: str,
    columns: Mapping[str, str],
    dictionaries: Iterable[str] = (),
    later: Collection[str] = (),
) -> Iterator[pq.ParquetFile]:
    """A parquet file, checked by its footer; errors while it is read name it.

    Pages are checked against their checksums, which :func:`write_table` writes.

    Args:
        path: the file.
        key: what it is, for messages.
        columns: names that must be there -> kind of their values: "text", "whole number", "number",
            "yes or no" or "list".
        dictionaries: columns of few different texts, read as such.
        later: those of ``columns`` that the file lacks if an older version wrote it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no parquet file, damaged, has more than ``LARGEST_TABLE`` rows, or a
            column is missing or of another kind.

    Source: engineering choice (issue 5, "Hostile input").
    """
    refuse_special(path, key)
    try:
        with pq.ParquetFile(
            path, read_dictionary=list(dictionaries), page_checksum_verification=True
        ) as file:
            _check_footer(file, columns, later, path, key)
            yield file
    except FileNotFoundError:
        raise
    except _TABLE_ERRORS as error:
        if str(error).startswith(f"{key}: "):
            raise
        raise ValueError(f"{key}: {path} cannot be read as a table: {one_line(error)}") from error


def _check_footer(
    file: pq.ParquetFile,
    columns: Mapping[str, str],
    later: Collection[str],
    path: str | Path,
    key: str,
) -> None:
    """Raises ValueError if the footer contradicts itself, or what is needed."""
    footer = file.metadata
    if not 0 <= footer.num_rows <= LARGEST_TABLE:
        raise ValueError(
            f"{key}: {path} claims {footer.num_rows} rows; at most {LARGEST_TABLE} are allowed"
        )
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    if sum(group.num_rows for group in groups) != footer.num_rows:
        raise ValueError(f"{key}: {path} is damaged: its row groups do not add up")
    schema = file.schema_arrow
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{key}: {path} has two columns of one name")
    _refuse_missing(schema.names, [name for name in columns if name not in later], path, key)
    for name in [name for name in columns if name in schema.names]:
        found = schema.field(name).type
        found = found.value_type if pa.types.is_dictionary(found) else found
        if not _KINDS[columns[name]](found):
            raise ValueError(f"{key}: {path}: column '{name}' holds {found}, no {columns[name]}")


def _refuse_missing(
    found: Iterable[str], columns: Iterable[str], path: str | Path, key: str
) -> None:
    missing = [name for name in columns if name not in set(found)]
    if missing:
        there = ", ".join(str(name) for name in found)
        raise ValueError(f"{key}: {path} lacks the columns {', '.join(missing)}; it has {there}")


def read_table(
    path: str | Path,
    key: str,
    columns: Mapping[str, str],
    dictionaries: Iterable[str] = (),
    others: bool = False,
    later: Collection[str] = (),
) -> pa.Table:
    """Columns of a parquet file; see :func:`open_table`.

    Args:
        path, key, columns, dictionaries: see :func:`open_table`.
        later: see :func:`open_table`; texts, empty where the file lacks the column.
        others: read the other columns too, unchecked.

    Raises:
        FileNotFoundError, ValueError: see :func:`open_table`; also for a cell that holds nothing.

    Source: engineering choice (issue 5, "Hostile input").
    """
    with open_table(path, key, columns, dictionaries, later) as file:
        table = file.read(columns=None if others else list(columns), use_threads=False)
        table = with_texts(table, [name for name in columns if name in later])
        refuse_empty_cells(table.select(list(columns)), path, key)
        if len(table) != file.metadata.num_rows:
            raise ValueError(f"{key}: {path} is damaged: rows are missing")
    return table


def with_texts(table: pa.Table | pa.RecordBatch, names: Iterable[str]) -> pa.Table | pa.RecordBatch:
    """A table with these columns, of empty texts where it lacks one.

    Args:
        table: any.
        names: of columns.

    Source: engineering choice (what an older version wrote stays readable).
    """
    missing = [name for name in names if name not in table.schema.names]
    if not missing:
        return table
    texts = pa.array([""] * len(table), pa.string())
    columns = [*table.columns, *(texts for _ in missing)]
    return type(table).from_arrays(columns, names=[*table.schema.names, *missing])


def to_frame(table: pa.Table, **options) -> pd.DataFrame:
    """A table as data frame; what pandas once wrote beside the columns is not looked at.

    Args:
        table: any.
        **options: of ``pyarrow.Table.to_pandas``.

    Source: engineering choice (pandas' metadata could rename columns, and have no checksum).
    """
    return table.replace_schema_metadata().to_pandas(ignore_metadata=True, **options)


def refuse_empty_cells(table: pa.Table | pa.RecordBatch, path: str | Path, key: str) -> None:
    """Raises ValueError for a column with a cell that holds nothing.

    Args:
        table: some columns.
        path, key: for the message.

    Source: engineering choice.
    """
    for name in table.schema.names:
        if table.column(name).null_count:
            raise ValueError(f"{key}: {path}: column '{name}' has cells that hold nothing")


def write_table(path: str | Path, table: pa.Table | pd.DataFrame) -> None:
    """Writes a parquet file whose pages have checksums.

    Args:
        path: the file.
        table: a table; a data frame's index is left out.

    Source: engineering choice (damage is found when the file is read).
    """
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    pq.write_table(table, path, write_page_checksum=True)

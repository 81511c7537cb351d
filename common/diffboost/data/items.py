"""The slices of a store as a lazy sequence: Arrow columns in memory, a dictionary on demand."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffboost.data.containment import check_folder, refuse_cases, refuse_names
from diffboost.data.tables import open_table, refuse_empty_cells, with_texts

INDEX_KINDS = {
    **dict.fromkeys(("case", "image", "label", "edge", "image_root", "prompt", "section"), "text"),
    **dict.fromkeys(("group", "sha256", "source_image", "source_label", "source_sha256"), "text"),
    "image_sha256": "text",
    **dict.fromkeys(("slice", "fold", "foreground_px"), "whole number"),
    **dict.fromkeys(("spacing_mm", "original_shape", "affine"), "list"),
}
LATER_COLUMNS = {3: ("image_sha256",)}  # store_version -> what its index lacks
FILE_COLUMNS = ("image", "label", "edge")
ITEM_COLUMNS = ("image", "image_root", "edge", "label", "prompt", "case", "slice", "sha256")
REPEATED = ["image_root", "label", "prompt", "section", "source_sha256"]  # few different values
BATCH_ROWS = 1 << 16


class SliceItems(Sequence):
    """Slices of a store, each a dictionary that is made when it is asked for.

    A row takes some 300 bytes of Arrow columns, which forked loader workers share; a pickled copy
    (spawned workers) reads the index again.

    Args:
        store_dir: the store's absolute folder, with ``index.parquet``.
        header: contents of its dataset.json.
        rows: int (N,), rows of the index in ascending order.

    Source: engineering choice (issue 3: memory does not grow with the index).
    """

    def __init__(self, store_dir: Path, header: Mapping, rows: np.ndarray) -> None:
        self.store_dir = Path(store_dir)
        self.header = header
        self.rows = np.asarray(rows)
        _give_back_memory()
        self._table = pa.Table.from_batches(self._read(ITEM_COLUMNS))
        refuse_cases(self._table["case"], f"{self.store_dir}/index.parquet: case")
        for name in FILE_COLUMNS:
            refuse_names(self._table[name], f"{self.store_dir}/index.parquet: {name}")
        _give_back_memory()

    def _read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of the chosen rows, a part of the index at a time."""
        path = self.store_dir / "index.parquet"
        kinds = {name: INDEX_KINDS[name] for name in columns}
        later = [name for name in later_columns(self.header) if name in kinds]
        with open_table(path, "store_dir", kinds, REPEATED, later) as file:
            start = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False):
                batch = with_texts(batch, later)
                refuse_empty_cells(batch, path, "store_dir")
                first, last = np.searchsorted(self.rows, (start, start + len(batch)))
                yield batch.take(pa.array(self.rows[first:last] - start))
                start += len(batch)

    def __reduce__(self) -> tuple:
        """Pickles folder and rows; the columns are read again."""
        return type(self), (self.store_dir, self.header, self.rows)

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> "dict | SliceItems":
        """One item, or the items of a slice of the sequence."""
        if isinstance(index, slice):
            return SliceItems(self.store_dir, self.header, self.rows[index])
        place = range(len(self))[index]
        return self._item({name: self._table[name][place].as_py() for name in ITEM_COLUMNS})

    def __iter__(self) -> Iterator[dict]:
        """All items, some thousand at a time out of Arrow."""
        for batch in self._table.to_batches(max_chunksize=4096):
            for row in batch.to_pylist():
                yield self._item(row)

    def _item(self, row: dict) -> dict:
        root = self.header["source_dir"] if row["image_root"] == "source" else ""
        item = {
            "image": self._path(row["image"], "image", root),
            "edge": self._path(row["edge"], "edge"),
        }
        if row["label"]:
            item["label"] = self._path(row["label"], "label")
        return item | {key: row[key] for key in ("prompt", "case", "slice", "sha256")}

    def _path(self, name: str, column: str, root: str = "") -> str:
        """Absolute path of a file below ``root``, of whose folder no link leads out."""
        folder = str(self.store_dir / root)
        check_folder(folder, name.rpartition("/")[0], f"{self.store_dir}/index.parquet: {column}")
        return f"{folder}/{name}"

    @property
    def nbytes(self) -> int:
        """Bytes of the columns and the row numbers."""
        return self._table.nbytes + self.rows.nbytes

    def unique(self, name: str) -> list:
        """Sorted different values of a column.

        Args:
            name: a column of :data:`ITEM_COLUMNS`.

        Source: engineering choice.
        """
        column = self._table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return pc.unique(column).sort().to_pylist()

    def cases(self) -> list[str]:
        """Sorted names of the cases, each once.

        Source: engineering choice.
        """
        return self.unique("case")

    def case_hashes(self) -> pa.Table:
        """The hashes of every case's source files.

        Returns:
            Columns ``case``, ``sha256`` (of image and label files) and ``image_sha256`` (of the
            image file alone; empty where it is the same, or not known), all str; a row a case, in
            the index's order, which has the slices of a case one after the other.

        Source: engineering choice (design, "lineage").
        """
        parts, last = [], None
        for batch in self._read(["case", "source_sha256", "image_sha256"]):
            cases = pa.concat_arrays([pa.array([last], pa.string()), batch["case"].cast("string")])
            first = pc.fill_null(pc.not_equal(cases[1:], cases[:-1]), True)  # noqa: FBT003
            hashes = batch["source_sha256"].cast("string")
            images = batch["image_sha256"].cast("string")
            images = pc.if_else(pc.equal(images, hashes), "", images)
            columns = {"case": cases[1:], "sha256": hashes, "image_sha256": images}
            parts.append(pa.table(columns).filter(first))
            last = cases[-1].as_py()
        _give_back_memory()
        return pa.concat_tables(parts)

    def fingerprint(self) -> str:
        """Hash of what images and edges hold, from the index alone, as 64 hexadecimal digits.

        An edge map follows from the case's source files, the slice's number, the task and the
        preprocessing; so no file is read again.

        Source: engineering choice.
        """
        described = [self.header[key] for key in ("task", "preprocessing")]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        columns = ["sha256", "source_sha256", "slice", "prompt"]
        for batch in self._read(columns):
            for row in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                digest.update("\x1f".join(map(str, row)).encode() + b"\n")
        return digest.hexdigest()


def later_columns(header: Mapping) -> tuple[str, ...]:
    """Columns that a store's index lacks, since its version had none; they are empty texts.

    Args:
        header: contents of its dataset.json.

    Source: engineering choice.
    """
    return LATER_COLUMNS.get(header.get("store_version"), ())


def _give_back_memory() -> None:
    """Returns to the system what Arrow's pool has freed and would keep for later."""
    pa.default_memory_pool().release_unused()

"""Arrays on disk that processes fill in pieces, the note of which are there, and their items."""

import errno
import os
import tokenize
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from diffboost.data.containment import refuse_special
from diffboost.files import write_aside

DONE = "done_batches_of_"  # name of the note, before the batch's size


# What numpy raises on a damaged head, which it reads as Python's own text.
_NPY_ERRORS = (ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError, LookupError)


def load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    """A .npy file of numbers; Python objects, which could run code, are not loaded.

    Args:
        path: the file.
        mmap_mode: as for numpy's ``load``.

    Raises:
        ValueError: it is damaged or holds objects; remove the cache's folder, it is made again.

    Source: engineering choice (issue 5, "Hostile input").
    """
    refuse_special(path, "cache_dir")
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (*_NPY_ERRORS, tokenize.TokenError) as error:
        raise ValueError(f"cache_dir: {path} is damaged: {error}; remove its folder") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.ndim:
        raise ValueError(f"cache_dir: {path} holds no array of numbers; remove its folder")
    return array


class ArrayFile:
    """Rows of a ``.npy`` file, read and written in place.

    Not a memory map: pages of one stay resident, and a cache is larger than memory.

    Args:
        path: the file.
        writable: whether rows will be written.

    Source: engineering choice.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        header = load_array(path, mmap_mode="r")
        self.shape, self.dtype, self._offset = header.shape, header.dtype, header.offset
        self._row_bytes = header[:1].nbytes
        self._file = open(path, "r+b" if writable else "rb", buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        """A row, as a new array."""
        row = range(len(self))[row]
        values = np.empty(self.shape[1:], self.dtype)
        start = self._offset + row * self._row_bytes
        if os.preadv(self._file.fileno(), [values], start) != self._row_bytes:
            raise OSError(f"{self._file.name} ends before row {row}")
        return values

    def write(self, row: int, part: int, values: np.ndarray) -> None:
        """Writes ``values`` as number ``part`` of the parts of a row."""
        values = np.ascontiguousarray(values, self.dtype)
        start = self._offset + row * self._row_bytes + part * values.nbytes
        if os.pwrite(self._file.fileno(), values, start) != values.nbytes:
            raise OSError(errno.ENOSPC, f"row {row} was not written", self._file.name)

    def flush(self) -> None:
        """Waits until what was written would outlast a power failure."""
        os.fsync(self._file.fileno())


def make_array_file(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Makes a ``.npy`` file of zeros; takes its room on the disk before hours go into filling it.

    Args:
        path: the file.
        dtype: type of its elements.
        shape: its shape, rows first.

    Raises:
        OSError: there is no room.

    Source: engineering choice.
    """
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class DoneBatches:
    """Which batches of a cache are done: a file with a byte a batch, 1 once its data are flushed.

    Processes mark batches of their own. The file is made last, so that a folder which holds it
    holds the others too; its name has the batch's size, on which rounding depends.

    Args:
        folder: the partial cache.
        num_batches: of all processes together.
        batch_size: pictures a batch.

    Source: engineering choice (issue 5, "Exact resume, every stage").
    """

    def __init__(self, folder: Path, num_batches: int, batch_size: int) -> None:
        self.path = folder / f"{DONE}{batch_size}"
        self.num_batches = num_batches

    def is_begun(self) -> bool:
        """Whether an interrupted run of as many batches left its file here."""
        return self.path.is_file() and self.path.stat().st_size == self.num_batches

    def begin(self) -> None:
        """Makes the file; no batch is done."""
        write_aside(self.path, partial(Path.write_bytes, data=bytes(self.num_batches)))

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of the batches that are not done."""
        done = self.path.read_bytes()
        return [number for number in numbers if not done[number]]

    def mark(self, numbers: Iterable[int]) -> None:
        """Notes that these batches are done; their data have been flushed."""
        with open(self.path, "r+b", buffering=0) as file:
            for number in numbers:
                os.pwrite(file.fileno(), b"\1", number)


class CachedItems(Sequence):
    """A finished cache as items for training; nothing is read before it is used.

    Args:
        folder: the cache.

    Source: engineering choice.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._moments = ArrayFile(self.folder / "moments.npy")
        self._edges = ArrayFile(self.folder / "edges.npy")
        self._contexts = load_array(self.folder / "contexts.npy")
        self._rows = load_array(self.folder / "rows.npy")
        fits = self._rows.ndim == 1 and len(self._rows) == len(self._moments) == len(self._edges)
        if not fits or not (0 <= self._rows).all() or not (self._rows < len(self._contexts)).all():
            raise ValueError(
                f"cache_dir: {self.folder}: rows.npy does not fit the others; remove the folder"
            )

    def __reduce__(self) -> tuple:
        """Pickles the folder; spawned workers open the files themselves."""
        return type(self), (self.folder,)

    def __len__(self) -> int:
        """Number of slices."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """``moments``, ``edges``, ``context`` and ``empty_context`` of a slice."""
        return {
            "moments": self._moments[index],
            "edges": self._edges[index],
            "context": self._contexts[self._rows[index]],
            "empty_context": self._contexts[0],
        }

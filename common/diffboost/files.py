"""Files that are whole or not there: written aside, flushed to the disk, renamed."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

FLUSHED_TOGETHER = 8  # files: the journal of the disk is written once for all of them


def flush(path: str | Path) -> None:
    """Asks the system to put a file, or a folder's list of names, on the disk.

    Source: engineering choice (design, "Failure").
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def flush_folder(folder: str | Path) -> None:
    """Puts every file of a folder and of those below it on the disk, and their names.

    Source: engineering choice (design, "Failure").
    """
    with ThreadPoolExecutor(FLUSHED_TOGETHER) as pool:
        for parent, _, names in os.walk(folder):
            for _ in pool.map(flush, (Path(parent) / name for name in names)):
                pass  # raises what a file raised
            flush(parent)


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, flush it, then move it into place when whole.

    Raises:
        OSError: the disk is full, read-only or gone; names the file. What was in place still is.

    Source: engineering choice (design, "Failure").
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        _make_room(partial)
        raise OSError(
            error.errno,
            f"{error.strerror or error}: this file could not be written; with that mended, "
            "the same command goes on",
            str(path),
        ) from error


def _make_room(partial: Path) -> None:
    """Removes what a failed writer left, where that is possible."""
    try:
        partial.unlink(missing_ok=True)
    except OSError:  # the folder itself is read-only or gone, which the first error says
        return


def write_json(path: Path, content: Mapping) -> None:
    """Writes a mapping as indented JSON, whole or not at all; what JSON lacks becomes text."""
    text = json.dumps(dict(content), indent=1, default=str) + "\n"
    write_aside(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def files_behind(paths: Iterable[str | Path]) -> list[str | Path]:
    """The paths, a folder (a DICOM series) replaced by the visible files in it, by their names."""
    files: list[str | Path] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if not entry.is_dir()]
        files += [Path(path) / name for name in sorted(names) if not name.startswith(".")]
    return files


def sha256_of_files(paths: Iterable[str | Path]) -> str:
    """Hash of the files' contents, one after the other, as 64 hexadecimal digits.

    Args:
        paths: files to read; a folder stands for its files, see :func:`files_behind`.

    Source: engineering choice.
    """
    digest = hashlib.sha256()
    for path in files_behind(paths):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def save_tensors(content: object, path: Path) -> None:
    """Writes tensors and plain values as ``torch.load(…, weights_only=True)`` reads them.

    Raises:
        OSError: it could not be written; torch itself would raise a RuntimeError.

    Source: engineering choice.
    """
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            cause = error.__cause__ or error.__context__
            raise cause if isinstance(cause, OSError) else OSError(None, str(error)) from None

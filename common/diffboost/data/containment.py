"""Names that come from outside: they stay inside their folder, and lead to plain files only."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PureWindowsPath

import pyarrow as pa
import pyarrow.compute as pc

ALLOWED = "allowed are paths of files below it, without '..', drive letters and links that lead out"
LARGEST_FILE = 1 << 36  # bytes, 64 GiB
# Every name of a column is refused that has one of these; exact reasons are found for those alone.
_SUSPECT = ("..", ":", "\\", "\x00")


def inside(folder: str | Path, name: object, key: str) -> Path:
    """The path of a file that a document names, below the folder that the document speaks of.

    Args:
        folder: names are relative to it; it may itself be reached through a link.
        name: what stands in the document.
        key: where it stands, for the message.

    Returns:
        ``folder / name``, made absolute; the file need not exist.

    Raises:
        ValueError: ``name`` is no text, is absolute, has a drive letter, ``..`` or a NUL, or leads
            out of the folder through a link.

    Source: engineering choice (issue 5, "Hostile input").
    """
    folder = Path(os.path.abspath(folder))
    reason = refusal(name)
    if not reason:
        path = Path(os.path.abspath(folder / name))
        if path == folder:
            reason = "is the folder itself"
        elif leads_out(folder, path):
            reason = f"leads out of the folder through a link, to {os.path.realpath(path)}"
    if reason:
        raise ValueError(f"{key}: {name!r} {reason}; the folder is {folder}; {ALLOWED}")
    return path


def leads_out(folder: str | Path, path: str | Path) -> bool:
    """Whether a path below a folder leads out of it through a link.

    Args:
        folder: may itself be reached through a link.
        path: below it; need not exist.

    Source: engineering choice.
    """
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def refusal(name: object) -> str:
    """Why a name is refused by what it says alone; "" for a good one.

    Args:
        name: what stands in a document.

    Source: engineering choice (PEP 706's rules for archives, on all systems alike).
    """
    if not isinstance(name, str):
        return "is not a path"
    windows = PureWindowsPath(name)
    if not name or "\x00" in name:
        return "is empty or has a NUL"
    if name.startswith(("/", "\\")) or windows.drive:
        return "is absolute: it leads out of the folder"
    if ".." in windows.parts:
        return "leads out of the folder"
    return ""


def refuse_names(column: pa.Array | pa.ChunkedArray, key: str) -> None:
    """Refuses a column of names if one of them is not relative, or has ``..``.

    A million names take some 0.1 s: texts are searched in Arrow, and links are looked for when
    files are opened (:func:`check_folder`, :func:`read_file`).

    Args:
        column: texts; "" is a file that is not there.
        key: file and column, for the message.

    Raises:
        ValueError: names the first such name.

    Source: engineering choice (issue 5, "Hostile input").
    """
    column = _texts(column)
    suspect = pc.starts_with(column, "/")
    for part in _SUSPECT:
        suspect = pc.or_(suspect, pc.match_substring(column, part))
    for name in pc.filter(column, suspect).to_pylist():
        reason = refusal(name)
        if reason:
            raise ValueError(f"{key}: {name!r} {reason}; {ALLOWED}")


def refuse_cases(column: pa.Array | pa.ChunkedArray, key: str) -> None:
    """Refuses a column of cases if one of them cannot be a part of a file's name, which it becomes.

    Args:
        column: texts.
        key: file and column, for the message.

    Raises:
        ValueError: names the first such case.

    Source: engineering choice (issue 5, "Hostile input").
    """
    column = _texts(column)
    bad = pc.match_substring_regex(column, r"^\.*$|[/\\:\x00]")
    for case in pc.filter(column, bad).to_pylist():
        raise ValueError(
            f"{key}: {case!r} becomes a part of file names; allowed are names without '/', "
            "backslashes and colons that are not empty and not only dots"
        )


def _texts(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column's texts, each once where it is kept as a dictionary."""
    if not pa.types.is_dictionary(column.type):
        return column
    return pc.unique(column.cast(column.type.value_type))


@lru_cache(maxsize=1 << 14)
def check_folder(root: str, folder: str, key: str) -> None:
    """Refuses a folder below ``root`` that leads out of it through a link; looked up once.

    Args:
        root: the store's folder.
        folder: relative to it; "" is the root itself.
        key: file and column, for the message.

    Raises:
        ValueError: it leads out.

    Source: engineering choice (issue 5, "Hostile input").
    """
    if folder:
        inside(root, folder, key)


def read_file(path: str | Path, key: str, largest: int = LARGEST_FILE) -> bytes:
    """The bytes of a plain file.

    Args:
        path: a file; a link is followed where its target lies below the link's own folder.
        key: what the file is, for messages.
        largest: bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plain file (a pipe would never end), larger, or a link that leads out
            of its folder.
        OSError: it cannot be read.

    Source: engineering choice (issue 5, "Hostile input").
    """
    path = os.fspath(path)
    _refuse_link(path, key)
    with _missing_named(path, key):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"{key}: {path} is no plain file")
        if state.st_size > largest:
            raise ValueError(
                f"{key}: {path} has {state.st_size} bytes; at most {largest} are allowed"
            )
        with open(handle, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    finally:
        os.close(handle)


def refuse_special(path: str | Path, key: str) -> None:
    """Refuses what is there but no plain file, such as a pipe, which would never end.

    Args:
        path: a file of a user's choice; links are followed.
        key: what it is, for the message.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is no plain file.

    Source: engineering choice (issue 5, "Hostile input").
    """
    with _missing_named(path, key):
        state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{key}: {path} is no plain file")


@contextmanager
def _missing_named(path: str | Path, key: str) -> Iterator[None]:
    """Says which key names a file that is not there."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{key}: there is no file {path}") from None


def _refuse_link(path: str, key: str) -> None:
    """Raises ValueError for a link to a file that does not lie below the link's folder."""
    if not os.path.islink(path):
        return
    if leads_out(os.path.dirname(path), path):
        target = os.path.realpath(path)
        raise ValueError(f"{key}: {path} is a link that leads out of its folder, to {target}")

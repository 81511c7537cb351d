"""Folders that one process at a time writes into."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

_held: dict[Path, TextIO] = {}


def hold_folder(folder: str | Path) -> None:
    """Makes this process the only one that writes into a folder, until it ends or lets go.

    The lock is the system's, on a file beside the folder: it goes with the process, however that
    ends, and children that the process leaves behind do not keep it.

    Args:
        folder: made if it is not there.

    Raises:
        BlockingIOError: another process holds it; says which.

    Source: engineering choice (issue 5, "a lock that survives a crash").
    """
    folder = Path(folder).absolute()
    if folder in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = _lock_of(folder)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BlockingIOError(
            error.errno, f"{holder} is writing into it; wait, or name another folder", str(folder)
        ) from error
    if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
        file.close()  # its holder let go, and removed it, between our two steps
        return hold_folder(folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[folder] = file


def release_folder(folder: str | Path) -> None:
    """Lets go of a folder that this process holds, if it does; the lock's file is removed.

    Source: engineering choice.
    """
    folder = Path(folder).absolute()
    file = _held.pop(folder, None)
    if file is not None:
        _lock_of(folder).unlink(missing_ok=True)
        file.close()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")

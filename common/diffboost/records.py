"""What is done in a partial folder: notes, a file a case, and what is said when the work stops."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from diffboost.files import files_behind, sha256_of_files, write_aside

logger = logging.getLogger(__name__)

FOLDER = "done"  # in the partial folder; never in a finished one


def state_of(paths: Iterable[str | Path]) -> list[list]:
    """Path, bytes and time of change (ns) of files, to tell later whether they are the same.

    A folder stands for the files in it.

    Raises:
        FileNotFoundError: one of them is gone.

    Source: engineering choice.
    """
    states = ((str(path), Path(path).stat()) for path in files_behind(paths))
    return [[path, state.st_size, state.st_mtime_ns] for path, state in states]


@contextmanager
def same_command_goes_on(partial_dir: str | Path) -> Iterator[None]:
    """Says where work stopped that the same command goes on with.

    It does not after an error of data or parameters (ValueError). An error of the system that
    names no file, such as a full disk, gets the folder's name.

    Args:
        partial_dir: the folder that the work fills.

    Source: engineering choice (design, "Failure").
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, ValueError):
            logger.warning("%s keeps what is done; the same command goes on", partial_dir)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(partial_dir)) from error
        raise


class DoneCases:
    """Which cases of a partial folder are done, each with its rows.

    A case is done if its note is there and of the same origin, and every file that the note lists
    has the hash that it had. So the files themselves need neither be flushed nor written aside: a
    case that was killed half-way, or lost by a power failure, is done again.

    Args:
        partial_dir: the folder that a run fills.

    Source: engineering choice (issue 5, "Exact resume, every stage").
    """

    def __init__(self, partial_dir: str | Path) -> None:
        self.partial_dir = Path(partial_dir)
        self.folder = self.partial_dir / FOLDER

    def read(self, case: str, origin: Sequence) -> list[dict] | None:
        """The rows of a case, or None if it is not done.

        Args:
            case: its name, safe in file names.
            origin: what it is made of, such as :func:`state_of` its source files; JSON.
        """
        try:
            note = json.loads((self.folder / f"{case}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # there is none, or a power failure cut it off
            return None
        if note["origin"] != list(origin):
            return None
        for name, sha256 in note["files"].items():
            path = self.partial_dir / name
            if not path.is_file() or sha256_of_files([path]) != sha256:
                return None
        return note["rows"]

    def write(
        self, case: str, origin: Sequence, rows: Sequence[dict], files: Iterable[str]
    ) -> None:
        """Notes that a case is done.

        Args:
            case, origin: see :meth:`read`; the origin as it was before the case was read.
            rows: what :meth:`read` will return; JSON.
            files: the case's files, relative to the partial folder; they are all there.
        """
        hashes = {name: sha256_of_files([self.partial_dir / name]) for name in files}
        note = {"origin": list(origin), "files": hashes, "rows": list(rows)}
        write_aside(
            self.folder / f"{case}.json",
            partial(Path.write_text, data=json.dumps(note), encoding="utf-8"),
        )

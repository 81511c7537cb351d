"""Notes of what is done in a partial folder: a file a case, written after the case's own files."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from diffboost.data.slices import sha256_of_files
from diffboost.handlers import write_aside

FOLDER = "done"  # in the partial folder; never in a finished one


def state_of(paths: Iterable[str | Path]) -> list[list]:
    """Path, bytes and time of change (ns) of files, to tell later whether they are the same.

    Raises:
        FileNotFoundError: one of them is gone.

    Source: engineering choice.
    """
    states = ((str(path), Path(path).stat()) for path in paths)
    return [[path, state.st_size, state.st_mtime_ns] for path, state in states]


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

"""Zip files of releases: the same bytes for the same files, and taken apart only where safe."""

import functools
import stat
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from diffboost.data.containment import ALLOWED, inside, refusal
from diffboost.files import write_aside

LARGEST_RELEASE = 1 << 36  # bytes, unpacked; 64 GiB
MOST_FILES = 100_000
STAMP = (1980, 1, 1, 0, 0, 0)  # zip's first moment: when it was made does not change a release
# What zipfile raises on damage, encryption (RuntimeError) and compressions that it does not know
# (NotImplementedError).
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)


def write_zip(folder: Path, base: str, path: Path) -> None:
    """Packs a folder's files under ``<base>/``, in order of their names and without their times.

    Args:
        folder: what is packed.
        base: name of the only folder in the zip, which ``monai.bundle download`` takes apart.
        path: the zip to write, whole or not at all.

    Source: engineering choice (equal releases have equal hashes).
    """
    write_aside(path, functools.partial(_write, folder, base))


def _write(folder: Path, base: str, path: Path) -> None:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in names:
            entry = zipfile.ZipInfo(f"{base}/{name}", STAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as source, archive.open(entry, "w") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)


def unpack(path: Path, target: Path) -> Path:
    """Takes a release's zip apart, after every entry was looked at.

    Args:
        path: the zip.
        target: an empty folder.

    Returns:
        The release's folder below ``target``.

    Raises:
        ValueError: it is no whole zip, or an entry would leave its folder, is no plain file, stands
            twice, lies beside the others' folder, or there is too much; names the entry.

    Source: engineering choice (issue 4, "an unsafe zip entry is refused with its name").
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            base = _check_entries(path, archive.infolist(), entries)
            for entry in entries:
                destination = inside(target, entry.filename, f"zip {path}")
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, destination.open("wb") as file:
                    _copy(source, file, entry, path)
    except ZIP_ERRORS as error:
        raise ValueError(f"zip {path} is no whole zip file: {error}") from error
    return target / base


def _check_entries(path: Path, everything: list, files: list) -> str:
    """The one folder that all entries lie in; raises ValueError for an entry that is not safe."""
    names = [entry.filename for entry in files]
    if not names:
        raise ValueError(f"zip {path} holds no files")
    if len(everything) > MOST_FILES or sum(entry.file_size for entry in files) > LARGEST_RELEASE:
        raise ValueError(
            f"zip {path} has {len(everything)} entries of {sum(e.file_size for e in files)} bytes; "
            f"allowed are {MOST_FILES} of {LARGEST_RELEASE} in all"
        )
    for entry in everything:
        reason = refusal(entry.filename.rstrip("/"))
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if not reason and kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            reason = "is no plain file"
        if not reason and entry.flag_bits & 1:
            reason = "is encrypted"
        if reason:
            raise ValueError(f"zip {path}: entry {entry.filename!r} {reason}; {ALLOWED}")
    seen = Counter(name.casefold() for name in names)
    twice = [name for name in names if seen[name.casefold()] > 1]
    if twice:
        raise ValueError(f"zip {path}: entry {twice[0]!r} stands twice")
    bases = {name.partition("/")[0] if "/" in name else "" for name in names}
    if len(bases) != 1 or "" in bases:
        raise ValueError(f"zip {path}: all files must lie in one folder, got {sorted(bases)}")
    return bases.pop()


def _copy(source, file, entry: zipfile.ZipInfo, path: Path) -> None:
    """Writes an entry, no more bytes than it says."""
    left = entry.file_size
    while chunk := source.read(1 << 20):
        left -= len(chunk)
        if left < 0:
            raise ValueError(f"zip {path}: entry {entry.filename!r} is larger than it says")
        file.write(chunk)

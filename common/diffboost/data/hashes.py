"""Hashes of files, and what a slice store says of itself against them."""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from diffboost.data.documents import check_digest
from diffboost.data.images import LARGEST_PIXELS
from diffboost.files import files_behind, sha256_of_files

MOVABLE = ("source_dir",)  # keys of dataset.json that may be changed when folders move
HEADER_KINDS = {"name": str, "labels": dict, "task": dict, "preprocessing": dict, "source_dir": str}


def check_header(header: Mapping, path: Path) -> None:
    """Refuses a store's dataset.json that is damaged or lacks what its readers need.

    Args:
        header: what it holds.
        path: for the message.

    Raises:
        ValueError: names the key.

    Source: engineering choice (issue 5, "Hostile input").
    """
    check_digest(header, path, "store_dir", MOVABLE)
    for name, kind in HEADER_KINDS.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(
                f"store_dir: {path}: {name}: {header.get(name)!r:.80}; {kind.__name__} is needed"
            )
    size = header["preprocessing"].get("image_size")
    if type(size) is not int or not 0 < size * size <= LARGEST_PIXELS:
        raise ValueError(f"store_dir: {path}: preprocessing: image_size: {size!r:.80} pixels")


def check_source(files: Sequence[str], row: Mapping) -> None:
    """Refuses source files of a case that are not those that were prepared.

    Volumes without a checksum of their own are known by their hash from ``prepare`` on.

    Args:
        files: image and labels, absolute.
        row: of the index, with ``case`` and ``source_sha256``.

    Raises:
        FileNotFoundError: one is gone.
        ValueError: their hash is not the index's.

    Source: engineering choice (issue 5: nothing is accepted in silence).
    """
    missing = [path for path in files if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"source files of case '{row['case']}' are gone: {missing[0]}")
    states = tuple(
        (str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns)
        for path in files_behind(files)
    )
    if _unchanged_sha256(states) != row["source_sha256"]:
        raise ValueError(
            f"source files of case '{row['case']}' are damaged or others than those that were "
            f"prepared (their hash does not fit): {', '.join(files)}; run prepare again"
        )


@lru_cache(maxsize=1 << 14)
def _unchanged_sha256(states: tuple[tuple[str, int, int], ...]) -> str:
    """Hash of files of these paths, sizes and times, read once a process."""
    return sha256_of_files([path for path, _, _ in states])

"""Pseudonyms of cases: a store without names of its sources, and the way back, kept at home.

A pseudonym is keyed by a secret, so that it cannot be found by trying names; one secret gives a
case the same pseudonym in every store. Which files a case is stands in a folder beside the store,
which whole-volume evaluation reads and which need not be given away.
"""

import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffboost.data.documents import read_json
from diffboost.data.sources import Case
from diffboost.files import write_json

KEY_BYTES = 32
SOURCES = "sources.json"


def read_key(path: str | Path, store_dir: str | Path) -> bytes:
    """The secret of pseudonyms; a new one, readable by its owner alone, where there is no file.

    Args:
        path: the secret's file, outside of the store.
        store_dir: the store.

    Raises:
        ValueError: the file lies in the store or is too short for a secret.

    Source: engineering choice (issue 5, "file names of sources can be pseudonymized").
    """
    path, store_dir = Path(path).resolve(), Path(store_dir).resolve()
    if path.is_relative_to(store_dir):
        raise ValueError(f"pseudonym_key: {path} lies in the store, whose names it would tell")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
    key = path.read_text(encoding="utf-8").strip()
    if len(key) < KEY_BYTES:
        raise ValueError(f"pseudonym_key: {path} holds fewer than {KEY_BYTES} characters")
    return key.encode()


def pseudonym(kind: str, name: str, key: bytes) -> str:
    """``kind`` and 16 hexadecimal digits, the same for the same name and secret."""
    return f"{kind}_{hmac.new(key, f'{kind}:{name}'.encode(), 'sha256').hexdigest()[:16]}"


def hide_names(cases: Sequence[Case], key: bytes) -> list[Case]:
    """The cases under their pseudonyms, in an order that tells nothing of the names.

    Args:
        cases: of a reader.
        key: the secret.

    Source: engineering choice.
    """
    hidden = [replace(case, name=pseudonym("case", case.name, key)) for case in cases]
    return sorted(hidden, key=lambda case: case.name)


def home_of(store_dir: str | Path) -> Path:
    """The folder beside a store that says which files its cases are."""
    return Path(store_dir).with_name(Path(store_dir).name + ".home")


def write_sources(home: Path, source_dir: str, sources: Mapping[str, Sequence[str]]) -> None:
    """Writes which files the cases are.

    Args:
        home: folder beside the store.
        source_dir: folder of the source files, absolute or relative to the store.
        sources: pseudonym -> image and labels (joined by "|"), relative to ``source_dir``.

    Source: engineering choice.
    """
    write_json(home / SOURCES, {"source_dir": source_dir, "cases": dict(sources)})


def read_sources(store_dir: Path) -> tuple[Path, dict[str, tuple[str, str]]]:
    """Folder of the source files of a store with pseudonyms, and image and labels of its cases.

    Args:
        store_dir: the store's absolute folder.

    Raises:
        FileNotFoundError: what was kept at home is not here.

    Source: engineering choice.
    """
    path = home_of(store_dir) / SOURCES
    if not path.is_file():
        raise FileNotFoundError(
            f"store_dir: the cases of {store_dir} have pseudonyms; {path} says which files they "
            "are and is not here: it stays where the scans are. Training needs it not, evaluation "
            "of whole volumes does"
        )
    kept = read_json(path, "store_dir")
    return store_dir / kept["source_dir"], {name: tuple(two) for name, two in kept["cases"].items()}

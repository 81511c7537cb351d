"""large_files.yml: files too large for the Model Zoo's repository, with address and hash."""

from pathlib import Path

import yaml

from diffboost.data.containment import inside
from diffboost.data.documents import read_config
from diffboost.files import sha256_of_files

NAME = "large_files.yml"
LARGEST = 25 * 1000**2  # bytes of a file in the zoo's repository
KEYS = ("path", "url", "hash_val", "hash_type")


def add_large_files(release: Path, url: str | None) -> list[str]:
    """Adds what is over 25 MB in a release to its large_files.yml.

    Args:
        release: its folder.
        url: address of the folder that the files will lie in; None where there are none.

    Returns:
        Paths of the files that were added.

    Raises:
        ValueError: there are such files and no address.

    Source: model-zoo CONTRIBUTING.md.
    """
    entries = read_entries(release)
    known = {entry["path"] for entry in entries}
    paths = [name for name in _large(release) if name not in known]
    if paths and not url:
        raise ValueError(
            f"url: {', '.join(paths)} is over 25 MB; say the https address of the folder where it "
            "will lie, for large_files.yml (--url)"
        )
    for name in paths:
        digest = sha256_of_files([release / name])
        address = f"{str(url).rstrip('/')}/{name}"
        entries.append(dict(zip(KEYS, (name, address, digest, "sha256"), strict=True)))
    if paths:
        text = yaml.safe_dump({"large_files": entries}, sort_keys=False, width=1000)
        (release / NAME).write_text(text, encoding="utf-8")
    return paths


def _large(release: Path) -> list[str]:
    """Paths of the files over 25 MB."""
    files = (path for path in sorted(release.rglob("*")) if path.is_file())
    return [p.relative_to(release).as_posix() for p in files if p.stat().st_size > LARGEST]


def read_entries(release: Path) -> list[dict]:
    """The entries of large_files.yml.

    Raises:
        ValueError: one lacks a key, or its path leads out of the release.

    Source: MONAI ``download_large_files``.
    """
    entries = read_config(release / NAME, NAME).get("large_files") or []
    for entry in entries:
        lacking = [key for key in KEYS if not isinstance(entry, dict) or not entry.get(key)]
        if lacking or entry["hash_type"] != "sha256":
            raise ValueError(
                f"{NAME}: {entry!r:.200}: {', '.join(KEYS)} are needed, hash_type sha256"
            )
        inside(release, entry["path"], NAME)
    return list(entries)


def check_large_files(release: Path) -> None:
    """Refuses a large file that is missing, changed or not listed.

    Args:
        release: its folder.

    Raises:
        FileNotFoundError: a listed file is not there.
        ValueError: its hash is another, or a file over 25 MB is not listed.

    Source: engineering choice (issue 4, "a missing weight, a stale hash").
    """
    entries = read_entries(release)
    for entry in entries:
        path = release / entry["path"]
        if not path.is_file():
            raise FileNotFoundError(
                f"{NAME}: {entry['path']} is missing; get it with: python -m monai.bundle "
                f"download_large_files --bundle_path {release}"
            )
        found = sha256_of_files([path])
        if found != entry["hash_val"]:
            raise ValueError(
                f"{NAME}: stale hash of {entry['path']}: {entry['hash_val'][:12]}, "
                f"the file has {found[:12]}"
            )
    unlisted = set(_large(release)) - {entry["path"] for entry in entries}
    if unlisted:
        raise ValueError(f"{NAME}: {', '.join(sorted(unlisted))} is over 25 MB and not listed")

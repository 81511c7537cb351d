"""Checks of a release, by whoever made it and whoever receives it."""

import tempfile
from pathlib import Path

from diffboost.data.documents import read_json
from diffboost.files import sha256_of_files, write_json
from diffboost.release.archive import unpack
from diffboost.release.large_files import check_large_files
from diffboost.release.metadata import check_changelog, read_metadata
from diffboost.release.model import check_fit, check_model
from diffboost.release.targets import check_names
from diffboost.release.twins import TWINNED, json_twin

MANIFEST = "manifest.json"
FILES = ("LICENSE", "docs/README.md", "configs/inference.yaml", "large_files.yml")


def write_manifest(release: Path, head: dict) -> None:
    """Writes manifest.json: what the release is, and the sha256 of every file in it.

    Args:
        release: its folder.
        head: what the manifest says beside the files.

    Source: engineering choice.
    """
    hashes = {name: sha256_of_files([release / name]) for name in _files(release)}
    write_json(release / MANIFEST, {**head, "files": hashes})


def _files(release: Path) -> list[str]:
    """All files but the manifest and what Python leaves."""
    found = (path for path in release.rglob("*") if path.is_file() or path.is_symlink())
    names = (path.relative_to(release) for path in found if "__pycache__" not in path.parts)
    return sorted(name.as_posix() for name in names if name.as_posix() != MANIFEST)


def verify(path: str | Path, trust: bool = False) -> dict:
    """Checks a release, a folder or a zip: nothing missing, changed or added. No network is used.

    Args:
        path: the folder, or the zip, which is taken apart aside.
        trust: also build network_def and load model.pt into it, strictly. That evaluates the
            release's own config, as every client does: for releases of those whom you trust.

    Returns:
        What the manifest says.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a hash is stale, there is a file too many, the metadata do not fit the schema or
            the changelog, a twin differs, a config names what the release lacks, weights do not
            fit, or an entry of the zip is not safe. Names what it is.

    Source: engineering choice (issue 4, "Bad input").
    """
    path = Path(path)
    if path.is_dir():
        return check_release(path, trust)
    if not path.is_file():
        raise FileNotFoundError(f"release: {path} is no folder and no zip")
    with tempfile.TemporaryDirectory(prefix="diffboost_release_") as folder:
        return check_release(unpack(path, Path(folder)), trust)


def check_release(release: Path, trust: bool) -> dict:
    """Checks a release's folder, see :func:`verify`; what tells most of the cause comes first."""
    for name in FILES:
        if not (release / name).is_file():
            raise FileNotFoundError(f"release: {release} has no {name}")
    check_large_files(release)
    manifest = _check_manifest(release)
    metadata = read_metadata(release)
    check_changelog(metadata)
    for key in ("name", "version"):
        if manifest.get(key) != metadata[key]:
            raise ValueError(
                f"{MANIFEST}: {key} {manifest.get(key)!r}, metadata.json says {metadata[key]!r}"
            )
    check_twins(release)
    check_model(release)
    check_names(release)
    if trust:
        check_fit(release)
    return manifest


def _check_manifest(release: Path) -> dict:
    """The manifest; raises where it and the files are not the same."""
    manifest = read_json(release / MANIFEST, MANIFEST)
    hashes = manifest.get("files")
    if not isinstance(hashes, dict):
        raise ValueError(f"{MANIFEST}: {release}: files: a mapping is needed")
    there = set(_files(release))
    if missing := sorted(set(hashes) - there):
        raise FileNotFoundError(f"release: {release} lacks {', '.join(missing[:5])}")
    if added := sorted(there - set(hashes)):
        raise ValueError(
            f"release: {release} has files that its {MANIFEST} does not name: "
            f"{', '.join(added[:5])}; verify it before it is run, or verify its zip"
        )
    for name, digest in hashes.items():
        if (release / name).is_symlink():
            raise ValueError(f"release: {name} is a link")
        found = sha256_of_files([release / name])
        if found != digest:
            raise ValueError(
                f"{MANIFEST}: stale hash of {name}: {str(digest)[:12]}, the file has {found[:12]}"
            )
    return manifest


def check_twins(release: Path) -> None:
    """Refuses a release with a config whose JSON twin is missing or says something else.

    Raises:
        ValueError: names the twin.

    Source: engineering choice.
    """
    for name in TWINNED:
        path = release / "configs" / f"{name}.yaml"
        twin = path.with_suffix(".json")
        if path.is_file() and (
            not twin.is_file() or twin.read_text(encoding="utf-8") != json_twin(path)
        ):
            raise ValueError(f"config: {twin} is not the JSON twin of {path.name}")

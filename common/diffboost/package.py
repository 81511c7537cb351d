"""Releases of bundles: the functions behind `diffboost package` and `diffboost verify`."""

import logging
import os
import shutil
from pathlib import Path

from diffboost import __version__
from diffboost.release.archive import write_zip
from diffboost.release.checks import check_release, verify, write_manifest
from diffboost.release.contents import copy_authored, copy_model, copy_package, write_twins
from diffboost.release.large_files import add_large_files
from diffboost.release.metadata import check_changelog, read_metadata
from diffboost.release.model import NAME, write_base_model
from diffboost.release.trained import apply_run
from diffboost.release.twins import json_twin

__all__ = ["json_twin", "package", "verify"]

logger = logging.getLogger(__name__)


def package(
    bundle: str,
    output_dir: str = "dist",
    run: str | None = None,
    license: str | None = None,
    url: str | None = None,
) -> Path:
    """Writes a bundle's release, ``<output_dir>/<name>-<version>/``, and its zip beside it.

    A release holds the authored files byte for byte, JSON twins of the configs that clients read,
    models/model.pt, the package ``diffboost``, and manifest.json with the hash of every file and
    the fields that differ from what was authored. What is there of the same version is replaced.

    Args:
        bundle: folder of the bundle.
        output_dir: folder of the releases.
        run: folder of a trained model (a run's ``output_dir``), or of a study that holds one such;
            its weights, labels, sizes, figures and lineage take the place of the bundle's own.
        license: with ``run``: a text file that says the terms of its data and weights.
        url: https address of the folder that files over 25 MB will lie in.

    Returns:
        The release's folder.

    Raises:
        FileNotFoundError: the bundle or the run lacks a file.
        ValueError: the changelog lacks the version, or the release does not pass ``verify``.

    Source: engineering choice (design, "The house").
    """
    folder = Path(bundle)
    metadata = read_metadata(folder)
    check_changelog(metadata)
    name, version = metadata["name"], metadata["version"]
    if name != folder.resolve().name:
        raise ValueError(f"metadata: name {name!r}, but the bundle's folder is {folder.name!r}")
    release = Path(output_dir) / f"{name}-{version}"
    partial = release.with_name(release.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_authored(folder, partial)
    changed = _add_model(folder, partial, run, license)
    write_twins(partial)
    weights = copy_package(partial)
    changed |= {"large_files.yml": paths} if (paths := add_large_files(partial, url)) else {}
    head = {"name": name, "version": version, "diffboost": __version__, "weights": weights}
    write_manifest(partial, {**head, "changed": changed})
    check_release(partial, trust=True)
    shutil.rmtree(release, ignore_errors=True)
    os.replace(partial, release)
    write_zip(release, name, release.with_name(f"{release.name}.zip"))
    for file, fields in changed.items():
        logger.info("changed in %s: %s", file, ", ".join(fields))
    logger.info("release: %s and %s.zip", release, release.name)
    return release


def _add_model(folder: Path, release: Path, run: str | None, license: str | None) -> dict:
    """Puts model.pt and its lineage into a release; what was changed for it, file by file."""
    if run is not None:
        return apply_run(release, Path(run), license)
    if license is not None:
        raise ValueError(f"license: {license} is of a run's data; it needs run")
    if (folder / "models" / "run.json").is_file():
        raise ValueError(
            f"bundle: {folder}/models holds a run of your own, not the shipped model; release it "
            f"with --run {folder}/models, or move it away"
        )
    if (folder / NAME).is_file():
        copy_model(folder / "models", release)
    else:
        write_base_model(release)
    return {}

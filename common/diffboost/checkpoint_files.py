"""Folders of checkpoints.

Each is written aside, flushed and renamed; its manifest has the hashes of its files. Two are kept.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from diffboost.data.documents import read_json
from diffboost.files import flush, flush_folder, save_tensors, sha256_of_files, write_json
from diffboost.processes import is_main_process, wait_for_processes

logger = logging.getLogger(__name__)

NUM_KEPT = 2
STATE, MANIFEST = "state.pt", "manifest.json"


def write_checkpoint(folder: Path, content: Mapping) -> Path:
    """Writes ``step_<n>/`` whole or not at all, then removes all but the newest two.

    Args:
        folder: where checkpoints lie.
        content: ``step`` and what else belongs to it; tensors and plain values.

    Raises:
        OSError: the disk is full or gone; the checkpoints in place still are.

    Source: engineering choice (issue 5, "A checkpoint is one folder").
    """
    target = folder / f"step_{content['step']:010d}"
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_tensors(dict(content), partial / STATE)
        manifest = {"step": content["step"], "sha256": {STATE: sha256_of_files([partial / STATE])}}
        write_json(partial / MANIFEST, manifest)
        flush_folder(partial)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step
        os.replace(partial, target)
        flush(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno,
            f"{error.strerror or error}: the checkpoint of step {content['step']} could not be "
            "written; with that mended, the same command goes on from the one before",
            str(target),
        ) from error
    for old in _finished(folder)[NUM_KEPT:]:
        shutil.rmtree(old)
    return target


def read_newest(folder: Path) -> dict | None:
    """The newest checkpoint that is whole, by its manifest; None if there is none.

    Unfinished ones are removed; damaged ones are named in a warning and passed over.

    Source: engineering choice (issue 5: "latest" is the newest complete one).
    """
    if is_main_process():
        for partial in folder.glob("*.partial"):
            shutil.rmtree(partial)
    wait_for_processes()
    for path in _finished(folder):
        try:
            manifest = read_json(path / MANIFEST, "checkpoint")
            if manifest["sha256"] != {STATE: sha256_of_files([path / STATE])}:
                raise ValueError("its hash is not the manifest's")
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); the one before is taken", path, error)
            continue
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    return None


def _finished(folder: Path) -> list[Path]:
    """Checkpoints in place, the newest first."""
    return sorted(folder.glob("step_??????????"), reverse=True)

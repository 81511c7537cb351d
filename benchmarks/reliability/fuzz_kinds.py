"""Kinds of input for fuzz_inputs.py: files, what is done to them, and the stage that reads them."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import attacks
import damages
import fuzz_stages as stages
import fuzz_weights
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from damages import BYTES, LINK, PLACES, Damage

EDITS = [*BYTES, *PLACES]


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    ``files``: pattern of files -> damages. ``free``: patterns of files whose format has no
    checksum, or that a person writes: what is changed in them without being hostile says something
    else, and nobody can know. ``read`` gives what was understood, name -> value, and what was
    rejected, (file, reason).
    """

    name: str
    make: Callable[[Path], None]
    files: Mapping[str, list[Damage]]
    read: Callable[[Path, Path], tuple[dict, list]]
    weight: int = 1
    free: tuple[str, ...] = ()


def told(value: object) -> str:
    """Hash of what was understood, whatever it is made of."""
    digest = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(
                f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
            )
        elif isinstance(part, Mapping):
            for name in sorted(part, key=str):
                digest.update(f"{name}:".encode())
                add(part[name])
        elif isinstance(part, list | tuple):
            digest.update(b"[")
            for inner in part:
                add(inner)
        elif isinstance(part, pa.Table | pd.DataFrame):
            add(part.to_pydict() if isinstance(part, pa.Table) else part.to_dict("list"))
        else:
            digest.update(f"{type(part).__name__}{part!r}|".encode())

    add(value)
    return digest.hexdigest()


JSONS = [*EDITS, LINK, *damages.JSON_DAMAGES]
NIFTI = [*EDITS, LINK, *attacks.VOLUME_DAMAGES]
LISTED = [*BYTES, *PLACES[:-1], LINK, *attacks.PICTURE_DAMAGES]  # by the folder itself
PNG = [*LISTED, PLACES[-1]]
TABLES = [*EDITS, *damages.TABLE_DAMAGES]
BUSI = stages.make_pictures(".png", lambda n: (f"benign/a ({n})", f"benign/a ({n})_mask"))
KINDS = [
    Kind(
        "volumes, .nii.gz",
        stages.make_volumes(".nii.gz"),
        {"*Tr/*": [*NIFTI, attacks.GZIP_BOMB]},
        stages.read_raw(stages.VOLUMES),
        4,
    ),
    Kind(
        "volumes, .nii",
        stages.make_volumes(".nii"),
        {"*Tr/*": NIFTI},
        stages.read_raw(stages.VOLUMES),
        2,
        free=("*Tr/*",),
    ),
    Kind(
        "datalist",
        stages.make_volumes(".nii"),
        {"dataset.json": [*JSONS, damages.JSON_ESCAPE]},
        stages.read_raw(stages.VOLUMES),
        2,
        free=("dataset.json",),
    ),
    Kind("pairs of PNG", BUSI, {"benign/*": LISTED}, stages.read_raw(stages.PICTURES), 3),
    Kind(
        "pairs of JPEG",
        stages.make_pictures(".jpg", lambda n: (f"a{n}", f"a{n}_mask")),
        {"*.jpg": LISTED},
        stages.read_raw(stages.PICTURES),
        1,
        free=("*.jpg",),
    ),
    Kind(
        "pairs of TIFF",
        stages.make_pictures(".tif", lambda n: (f"a{n}", f"a{n}_mask")),
        {"*.tif": LISTED},
        stages.read_raw(stages.PICTURES),
        1,
        free=("*.tif",),
    ),
    Kind(
        "whole prepare",
        stages.make_volumes(".nii.gz"),
        {"*Tr/*": NIFTI},
        stages.read_whole(stages.VOLUMES),
        1,
    ),
    Kind(
        "tree",
        stages.make_pictures(".png", lambda n: (f"MR/head/finding/a{n}", "")),
        {"MR/*/*/*": LISTED},
        stages.read_tree,
        3,
    ),
    Kind(
        "task file",
        stages.make_task,
        {"task.yaml": [*EDITS, *damages.YAML_DAMAGES]},
        stages.read_task_file,
        2,
        free=("task.yaml",),
    ),
    Kind(
        "experiment file",
        stages.make_experiment,
        {"experiment.yaml": [*EDITS, *damages.YAML_DAMAGES]},
        stages.read_experiment_file,
        1,
        free=("experiment.yaml",),
    ),
    Kind(
        "slice store, pictures",
        stages.make_store,
        {"store/images/*": PNG, "store/labels/*": PNG, "store/edges/*": PNG},
        stages.read_slices,
        3,
    ),
    Kind(
        "slice store, header",
        stages.make_store,
        {"store/dataset.json": JSONS},
        stages.read_slices,
        2,
    ),
    Kind(
        "slice store, index",
        stages.make_store,
        {"store/index.parquet": TABLES},
        stages.read_slices,
        4,
    ),
    Kind(
        "slice store, its sources", stages.make_store, {"raw/*Tr/*": NIFTI}, stages.read_slices, 2
    ),
    Kind(
        "synthetic store, manifest",
        stages.make_synthetic,
        {"synthetic/manifest.parquet": TABLES},
        stages.read_synthetic,
        4,
    ),
    Kind(
        "synthetic store, pictures",
        stages.make_synthetic,
        {"synthetic/images/*": [*PNG, attacks.TEXT_BOMB]},
        stages.read_synthetic,
        3,
    ),
    Kind(
        "synthetic store, lineage",
        stages.make_synthetic,
        {"synthetic/lineage.json": JSONS},
        stages.read_synthetic,
        2,
    ),
    Kind(
        "lineage with a table",
        stages.make_lineage,
        {"lineage.json": [*JSONS, damages.JSON_ESCAPE], "lineage_cases*": EDITS},
        stages.read_lineage_file,
        2,
    ),
    Kind(
        "weights",
        fuzz_weights.make_weights,
        {
            "model.pt": [*EDITS, *attacks.TORCH_DAMAGES],
            "legacy.pth": [*EDITS, *attacks.PICKLES],
            "*.safetensors": [*EDITS, *attacks.TENSOR_DAMAGES],
        },
        fuzz_weights.read_weights,
        4,
        free=("*.safetensors", "legacy.pth"),
    ),
    Kind(
        "Pix2Pix",
        fuzz_weights.make_translator,
        {"model.pt": [*EDITS, *attacks.TORCH_DAMAGES], "run.json": JSONS},
        fuzz_weights.read_translator,
        2,
    ),
    Kind(
        "generator",
        fuzz_weights.make_generator,
        {"model.pt": [*EDITS, *attacks.TORCH_DAMAGES], "lineage.json": JSONS},
        fuzz_weights.read_generator,
        2,
    ),
    Kind(
        "backbone",
        fuzz_weights.make_backbone,
        {
            "backbone/vae/*": [*EDITS, *attacks.PICKLES],
            "backbone/*/*.json": JSONS,
            "backbone/text_encoder/*": EDITS,
        },
        fuzz_weights.read_backbone,
        2,
        free=("backbone/*/*",),
    ),
    Kind(
        "archive",
        stages.make_archive,
        {"*.tar": [*EDITS, *attacks.ARCHIVE_DAMAGES]},
        stages.read_archive,
        2,
    ),
    Kind(
        "cache",
        stages.make_cache,
        {"*.npy": [*EDITS, *attacks.PICKLES]},
        stages.read_cache,
        1,
        free=("*.npy",),
    ),
    Kind(
        "results",
        stages.make_results,
        {"metrics.csv": [*EDITS, *damages.CSV_DAMAGES]},
        stages.read_results,
        1,
        free=("metrics.csv",),
    ),
]

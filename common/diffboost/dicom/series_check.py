"""`diffboost dicom check`: which folders are whole series of gray slices at equal distances."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffboost.data.dicom_series import TAGS, need_dicom, read_dataset, read_headers


def check_folders(dataset_dir: str | Path) -> dict[str, str]:
    """Why each folder cannot be used; "" for a good one. No pixel is decoded.

    Args:
        dataset_dir: holds a folder a series.

    Raises:
        FileNotFoundError: there is no folder in it.
        ModuleNotFoundError: pydicom is not installed.

    Source: engineering choice.
    """
    need_dicom("dicom check")
    root = Path(dataset_dir)
    folders = sorted(path for path in root.glob("*") if path.is_dir())
    if not folders:
        raise FileNotFoundError(f"dataset_dir: no folder of a series in {root}")
    reasons = {}
    for folder in folders:
        try:
            reasons[folder.name] = _check_numbers(read_headers(folder, "series"))
        except ValueError as error:
            reasons[folder.name] = str(error)
    return reasons


def _check_numbers(headers: Sequence[Any]) -> str:
    """Why MONAI alone, which stacks by InstanceNumber, would stack a good series wrongly; or ""."""
    paths = [Path(each.filename) for each in headers]
    files = [read_dataset(path, "series", TAGS, pixels=False) for path in paths]
    numbers = [int(file.get("InstanceNumber") or 0) for file in files]
    steps = np.sign(np.diff(numbers))
    if abs(steps.sum()) == len(steps):
        return ""
    return (
        "its InstanceNumbers do not follow the places of its slices: prepare goes by places, "
        "inference.yaml by numbers; number the files anew, or convert them to NIfTI (dcm2niix)"
    )

"""Small raw data sets for the tests of prepare: a Decathlon folder and BUSI-like pairs."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

TASK_3D = {
    "name": "small_task",
    "layout": "decathlon",
    "modality": "MR",
    "organ": "head",
    "finding": "body",
    "labels": {"left_part": [1], "right_part": [2]},
}
TASK_2D = {
    "name": "small_pairs",
    "layout": "pairs",
    "modality": "US",
    "organ": "breast",
    "finding": "lesion",
    "labels": {"lesion": [1]},
}
SPACING_MM = (0.5, 1.0, 3.0)


def store_of(root: Path, name: str = "store") -> Path:
    """Where the tests put the store of a raw folder: beside it."""
    return root.with_name(f"{root.name}_{name}")


def volume(number: int, shape: tuple = (20, 24, 5)) -> tuple[np.ndarray, np.ndarray]:
    """An image (R, A, S) with noise and two bright boxes, and their label; `number` moves them."""
    rng = np.random.default_rng(number)
    image = rng.normal(100, 5, shape).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    start = 4 + number % 5
    label[start : start + 4, 6:14, 1:4] = 1
    label[start + 4 : start + 8, 6:14, 1:4] = 2
    image += 50 * label
    return image, label


def write_nifti(path: Path, array: np.ndarray, axcodes: str = "RAS") -> None:
    """Writes an array given as (R, A, S), in another orientation of the file if asked."""
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = (-10, 7, 30)
    target = nib.orientations.axcodes2ornt(axcodes)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine).as_reoriented(turn), path)


def write_decathlon(root: Path, num_cases: int = 4, axcodes: str = "RAS") -> Path:
    """A Decathlon folder of `num_cases` training cases; returns it."""
    entries = []
    for number in range(num_cases):
        name = f"case_{number:03d}.nii.gz"
        for folder, array in zip(("imagesTr", "labelsTr"), volume(number), strict=True):
            write_nifti(root / folder / name, array, axcodes)
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    write_json(root, {"training": entries})
    return root


def write_json(root: Path, header: dict) -> None:
    """Writes dataset.json."""
    (root / "dataset.json").write_text(json.dumps({"name": "Small", **header}))


def picture(number: int, shape: tuple = (30, 40)) -> tuple[np.ndarray, np.ndarray]:
    """A gray image (H, W) uint8 with a bright box, and the box as bool."""
    rng = np.random.default_rng(number)
    mask = np.zeros(shape, bool)
    mask[8:20, 5 + number : 17 + number] = True
    return (rng.integers(20, 90, shape) + 120 * mask).astype(np.uint8), mask


def write_busi(root: Path, num_cases: int = 4) -> Path:
    """BUSI's layout: NAME (1).png, RGB, with 1-bit masks, in folders benign and malignant."""
    for number in range(num_cases):
        finding = ("benign", "malignant")[number % 2]
        image, mask = picture(number)
        folder = root / finding
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([image] * 3, -1)).save(folder / f"{finding} ({number + 1}).png")
        Image.fromarray(mask).save(folder / f"{finding} ({number + 1})_mask.png")
    return root

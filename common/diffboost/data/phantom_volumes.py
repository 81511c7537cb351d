"""A 3D task of phantom volumes in the Decathlon's layout, made on the fly."""

import gzip
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from diffboost.data import bodies
from diffboost.data.anatomy import OVERSAMPLING, Canvas, posed_grid
from diffboost.data.phantoms import RECORD, open_folder
from diffboost.data.scanners import TASK_TEST, TASK_TRAINING, average_down, mr, paint
from diffboost.files import write_aside

ORIENTATIONS = ("LPS", "RAS", "LAS", "PSR")


def phantom_case(
    rng: np.random.Generator, scanners: tuple, size_px: int, num_slices: int
) -> tuple[np.ndarray, np.ndarray]:
    """An MR abdomen and the label of its spleen, axes (left, posterior, superior).

    Args:
        rng: source of every draw.
        scanners: one of them is drawn.
        size_px: side of a slice.
        num_slices: slices along the body axis.

    Returns:
        image (W, H, D) float32 ≥ 0 and label (W, H, D) uint8 in {0, 1}.

    Source: engineering choice.
    """
    grid = posed_grid(
        rng,
        size_px * OVERSAMPLING,
        np.linspace(-1, 1, num_slices),
        zoom=(0.95, 1.15),
        rotation=0.12,
        shift=0.06,
    )
    canvas = Canvas(grid, rng)
    bodies.abdomen(canvas, "normal")
    inside = paint(canvas.layers, {t: t == "spleen" for t, _ in canvas.layers})
    image = mr(rng, canvas.layers, scanners[rng.integers(len(scanners))])
    label = (average_down(inside) > 0.5).astype(np.uint8)
    return 1000 * image.transpose(2, 1, 0), label.transpose(2, 1, 0)


def _write_case(paths: Sequence[Path], rng: np.random.Generator, case: tuple) -> None:
    """Write image and label as .nii.gz in a drawn spacing and orientation."""
    in_plane = rng.uniform(1.1, 1.5)
    spacing_mm = np.array([in_plane, in_plane, rng.uniform(2.5, 4)])
    affine = np.diag([*(spacing_mm * (-1, -1, 1)), 1])
    affine[:3, 3] = rng.uniform(-80, 80, 3)
    axcodes = ORIENTATIONS[rng.integers(len(ORIENTATIONS))]
    target = nib.orientations.axcodes2ornt(axcodes)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), target)
    for path, array in zip(paths, case, strict=True):
        write_aside(path, partial(_save, nib.Nifti1Image(array, affine).as_reoriented(turn)))


def _save(image: nib.Nifti1Image, path: Path) -> None:
    """Write .nii.gz under any name, with the bytes that nibabel gives one of that ending."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
        image.to_stream(packed)


def write_decathlon_task(
    output_dir: Path | str,
    seed: int = 0,
    num_training: int = 8,
    num_test: int = 24,
    size_px: int = 64,
    num_slices: int = 12,
    same_scanner: bool = False,
) -> Path:
    """Write a 3D task in Decathlon layout with a labelled test set, and return the folder.

    Training cases share a scanner; test cases come from other scanners of the same family.

    Args:
        output_dir: new or empty folder; what an interrupted run has made for it is kept.
        seed: each case depends on (seed, section, number) alone.
        num_training: training cases.
        num_test: test cases.
        size_px: side of a slice.
        num_slices: slices of a volume.
        same_scanner: test cases come from the scanner of the training cases, too.

    Raises:
        ValueError: if a count is below 1.
        FileExistsError: if ``output_dir`` holds something.

    Source: engineering choice.
    """
    counts = {"num_training": num_training, "num_test": num_test}
    output_dir = Path(output_dir)
    others = {"seed": seed, "same_scanner": same_scanner}
    partial_dir = open_folder(output_dir, others, **counts, size_px=size_px, num_slices=num_slices)
    header = {
        "name": "PhantomOrgan",
        "description": "Phantom MR abdomen; training and test come from "
        + ("the same scanner" if same_scanner else "different scanners"),
        "modality": {"0": "MR"},
        "labels": {"0": "background", "1": "organ"},
        "numTraining": num_training,
        "numTest": num_test,
        "training": [],
        "test": [],
    }
    test_scanners = TASK_TRAINING if same_scanner else TASK_TEST
    sections = (("training", "Tr", TASK_TRAINING), ("test", "Ts", test_scanners))
    jobs = [
        (number, *section)
        for number, section in enumerate(sections)
        for _ in range(counts[f"num_{section[0]}"])
    ]
    for number, section, suffix, scanners in tqdm(jobs, "phantom cases"):
        index = len(header[section])
        file = f"{suffix}/organ_{section}_{index:03d}.nii.gz"
        entry = {key: f"./{key}s{file}" for key in ("image", "label")}
        header[section].append(entry)
        paths = [partial_dir / name for name in entry.values()]
        if not all(path.is_file() for path in paths):
            rng = np.random.default_rng([seed, number, index])
            _write_case(paths, rng, phantom_case(rng, scanners, size_px, num_slices))
    (partial_dir / "dataset.json").write_text(json.dumps(header, indent=2) + "\n")
    (partial_dir / RECORD).unlink()
    partial_dir.replace(output_dir)
    return output_dir

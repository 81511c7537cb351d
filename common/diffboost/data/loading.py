"""Loading whole cases for prepare: read, check, cut into slices; a bad file gives a reason."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from monai.data import MetaTensor
from torch.utils.data import Dataset

from diffboost.data.dicom_labels import check_segments
from diffboost.data.dicom_series import is_dicom, read_headers
from diffboost.data.images import read_image
from diffboost.data.sources import IMAGE_SUFFIXES, Case
from diffboost.data.transforms import LoadSliced, case_preprocessing, intensity_step
from diffboost.data.volumes import check_volume
from diffboost.files import sha256_of_files

# MONAI's readers say RuntimeError or pass on what NumPy and nibabel raise.
BAD_FILE_ERRORS = (RuntimeError, ValueError, OSError, EOFError, MemoryError)


@dataclass(frozen=True)
class LoadedCase:
    """A case as slices: images (D, 1, S, S) in [-1, 1], labels (D, 1, S, S) uint8.

    ``spacing_mm``: 3 floats, oriented H, W, D; ``original_shape``: 3 ints and ``affine``: 16
    floats, as in the file; ``sha256``: hash of the image file and its label files,
    ``image_sha256``: of the image file alone.
    """

    images: torch.Tensor
    labels: torch.Tensor
    spacing_mm: list[float]
    original_shape: list[int]
    affine: list[float]
    sha256: str
    image_sha256: str


class CaseDataset(Dataset):
    """Loads cases by index; a bad one comes back as the reason (str) why it is rejected.

    A file that has gone since the cases were listed is an error, not a bad case.

    Args:
        cases: what a reader listed.
        task: a task as ``read_task`` gives it.
        image_size: side of a slice in pixels.

    Source: engineering choice (issue 2, "Bad input").
    """

    def __init__(self, cases: Sequence[Case], task: Mapping, image_size: int) -> None:
        self.cases = cases
        self.task = task
        # made once: LoadImage sets up every reader MONAI has, and warns where one lacks parts
        self.preprocessing = case_preprocessing(task, image_size, with_label=True)

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.cases)

    def __getitem__(self, index: int) -> LoadedCase | str:
        """The case at ``index``, or why it cannot be used."""
        case = self.cases[index]
        try:
            return self._load_case(case)
        except BAD_FILE_ERRORS as error:
            refuse_gone([case.image, *case.labels])
            return _reason(error)

    def _load_case(self, case: Case) -> LoadedCase:
        """A volume or a 2D image with its label, preprocessed and cut into slices."""
        _check_files(case)
        names = [str(path) for path in case.labels]
        item = {"image": str(case.image), "label": names if len(names) > 1 else names[0]}
        cut = intensity_step(self.preprocessing)
        item = self.preprocessing(item, end=cut)
        _check_source(item["image"], item["label"], self.task["channel"])
        flat = self.task["layout"] == "pairs"
        image = item["image"]
        spacing = [1.0] * 3 if flat else [float(value) for value in image.pixdim]
        shape = [*image.shape[1:], 1] if flat else image.meta["spatial_shape"]
        affine = np.eye(4) if flat else image.meta["original_affine"]
        item = self.preprocessing(item, start=cut)
        images, labels = (item[key].as_tensor().movedim(-1, 0) for key in ("image", "label"))
        if not images.abs().max() <= 1 + 1e-4 or images.min() == images.max():  # NaN, too
            raise ValueError("the image has no contrast within the task's intensity range")
        return LoadedCase(
            images.contiguous(),
            labels.contiguous().to(torch.uint8),
            spacing,
            [int(side) for side in shape][:3],
            [float(value) for value in np.asarray(affine).ravel()],
            sha256_of_files([case.image, *case.labels]),
            sha256_of_files([case.image]),
        )


class TreeBatches(Dataset):
    """Images of a tree in fixed batches, sized for their edges.

    Which images share a batch depends on nothing but their rows, so that their edges come out the
    same for any number of processes, workers and restarts.

    Args:
        root: the tree.
        paths: path below ``root`` of every row.
        batches: numbers of the batches to load; batch b holds rows [b, b + 1) * ``batch_size``.
        batch_size: rows a batch.
        image_size: side in pixels.

    Source: engineering choice.
    """

    def __init__(
        self,
        root: Path,
        paths: pa.ChunkedArray,
        batches: Sequence[int],
        batch_size: int,
        image_size: int,
    ) -> None:
        self.root = root
        self.paths = paths
        self.batches = batches
        self.batch_size = batch_size
        self.load = LoadSliced("image", image_size)

    def __len__(self) -> int:
        """Number of batches to load."""
        return len(self.batches)

    def __getitem__(self, index: int) -> list[tuple[str, torch.Tensor | str]]:
        """Path and image (1, S, S) in [-1, 1], or the reason against it, of a batch's rows."""
        start = int(self.batches[index]) * self.batch_size
        names = self.paths.slice(start, self.batch_size).to_pylist()
        return [(name, self._load_image(self.root / name)) for name in names]

    def _load_image(self, path: Path) -> torch.Tensor | str:
        try:
            image = self.load({"image": path})["image"]
            _check_image(image)
        except BAD_FILE_ERRORS as error:
            refuse_gone([path])
            return _reason(error)
        return image


def refuse_gone(paths: Iterable[Path]) -> None:
    """Tells a disk or network folder that is gone from a file that is bad, which is only left out.

    Args:
        paths: files that were there when the work began.

    Raises:
        OSError: one of them is not there now.

    Source: engineering choice (issue 5, "Divergence": lost mount).
    """
    for path in paths:
        try:
            path.stat()
        except OSError as error:
            raise OSError(
                f"dataset_dir: {path} was there when the work began and cannot be reached now "
                f"({error.strerror}); is the disk or network folder of {path.parent} still there? "
                "The same command goes on where this one stopped"
            ) from error


def _check_image(image: torch.Tensor) -> None:
    """Raises ValueError for an image with NaN or infinite values, or with one value only."""
    if not torch.isfinite(image).all():
        raise ValueError("the image has NaN or infinite values")
    if image.min() == image.max():
        raise ValueError(f"the image is constant ({float(image.min()):g})")


def _check_source(image: MetaTensor, label: MetaTensor, channel: int) -> None:
    """Raises ValueError if image and label, oriented but not resized, do not fit together."""
    if image.shape[0] == 0:
        raise ValueError(f"the image has no channel {channel}")
    _check_image(image.as_tensor())
    if image.shape[1:] != label.shape[1:]:
        shapes = [" x ".join(str(side) for side in each.shape[1:]) for each in (image, label)]
        raise ValueError(f"the image has the shape {shapes[0]}, its label {shapes[1]}")
    if not torch.allclose(image.affine[:3, :3], label.affine[:3, :3], atol=1e-2):
        raise ValueError("image and label have different directions or spacings in their affines")
    steps = image.affine[:3, :3].double()
    apart = (label.affine[:3, 3] - image.affine[:3, 3]).double()  # mm; pictures have no space: 0
    if torch.linalg.solve(steps, apart).abs().max() > 0.5:
        voxel = " x ".join(f"{float(step):g}" for step in steps.norm(dim=0))
        raise ValueError(
            f"image and label lie {float(apart.norm()):.1f} mm apart in space by their affines; "
            f"half a voxel of {voxel} mm is allowed"
        )


def _check_files(case: Case) -> None:
    """Raises ValueError for a file that is damaged or claims absurd sizes, before it is loaded."""
    for path in (case.image, *case.labels):
        key = "image" if path == case.image else "label"
        if path.suffix.lower() in IMAGE_SUFFIXES:
            read_image(path, key)
        elif is_dicom(path) and key == "image":
            read_headers(path, key)
        elif is_dicom(path):
            check_segments(path, case.image)
        else:
            check_volume(path, key)


def _reason(error: BaseException) -> str:
    """What our own error says, else the innermost cause, on one line."""
    while error.__cause__ is not None and not isinstance(error, ValueError):
        error = error.__cause__
    return (" ".join(str(error).split()) or type(error).__name__)[:300]

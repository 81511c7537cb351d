"""Volumes from outside: what a NIfTI file claims is looked at before a voxel is read."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import GzipFile
from pathlib import Path

import nibabel as nib
import numpy as np

from diffboost.data.containment import refuse_special

SUFFIXES = (".nii", ".nii.gz")
LARGEST_VOXELS = 1 << 30  # 1024 x 1024 x 1024
SPACINGS_MM = (1e-4, 1e4)
HIGHEST_RATIO = 1040  # of deflate's output to its input; 1032 and headers
_SLACK = 1 << 20  # bytes that may follow the voxels
_CHUNK = 1 << 20
# nibabel computes with a header before it checks it: a damaged one ends anywhere.
_HEADER_ERRORS = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    zlib.error, MemoryError,
    nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError,
)  # fmt: skip


def check_volume(path: str | Path, key: str) -> None:
    """Refuses a NIfTI file that is damaged or claims what its bytes cannot hold.

    A .nii.gz is unpacked once, a megabyte at a time, to its end, where its checksum lies: nibabel
    stops before it. A .nii has no checksum.

    Args:
        path: a .nii or .nii.gz file.
        key: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is damaged or cut off, or claims absurd sizes, spacings or
            directions.

    Source: engineering choice (issue 5, "Hostile input").
    """
    path = Path(path)
    with named_volume(path, key):
        volume = _open(path)
        needed, size = _bytes_claimed(volume), path.stat().st_size
        there = size if path.suffix.lower() == ".nii" else _unpacked_size(path, size, needed)
        if there < needed:
            raise ValueError(f"it is cut off: {there} bytes of the {needed} that it claims")
        _check_geometry(volume.header)


def open_volume(path: str | Path, key: str) -> nib.spatialimages.SpatialImage:
    """A NIfTI file of which only the header has been read, and checked.

    Args:
        path: a .nii or .nii.gz file.
        key: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, or claims absurd sizes, spacings or directions.

    Source: engineering choice (issue 5, "Hostile input").
    """
    with named_volume(path, key):
        volume = _open(Path(path))
        _bytes_claimed(volume)
        _check_geometry(volume.header)
    return volume


def _open(path: Path) -> nib.spatialimages.SpatialImage:
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"its name must end in {' or '.join(SUFFIXES)}")
    refuse_special(path, "the volume")
    return nib.load(path)


@contextmanager
def named_volume(path: str | Path, key: str) -> Iterator[None]:
    """Turns what nibabel raises on a damaged file into an error that names it.

    Args:
        path: the file.
        key: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything else.

    Source: engineering choice (issue 5, "Hostile input").
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except _HEADER_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{key}: {path} cannot be read, truncated or of another format: {text[:300]}"
        ) from error


def _bytes_claimed(volume: nib.spatialimages.SpatialImage) -> int:
    """Bytes of a volume, header and all."""
    header, start = volume.header, volume.dataobj.offset
    shape = tuple(int(side) for side in header.get_data_shape())
    voxels = 1
    for side in shape:
        voxels *= side
    if not shape or min(shape) < 1 or voxels > LARGEST_VOXELS:
        sides = " x ".join(str(side) for side in shape) or "no"
        raise ValueError(f"it claims {sides} voxels; 1 to {LARGEST_VOXELS} in all are allowed")
    if not 0 <= start <= _SLACK:
        raise ValueError(f"it claims that voxels begin at byte {start}")
    if header.get_data_dtype().kind not in "biuf":
        raise ValueError(f"its voxels are of type {header.get_data_dtype()}, which are no numbers")
    return start + voxels * header.get_data_dtype().itemsize


def _unpacked_size(path: Path, size: int, needed: int) -> int:
    """Bytes in a gzip file, all of them unpacked and checked; stops where they are too many."""
    if needed > HIGHEST_RATIO * size:
        raise ValueError(f"{size} bytes cannot hold the {needed} that it claims")
    total = 0
    with GzipFile(path) as file:
        while chunk := file.read(_CHUNK):
            total += len(chunk)
            if total > needed + _SLACK:
                raise ValueError(f"it unpacks to more than the {needed} bytes that it claims")
    return total


def _check_geometry(header: nib.nifti1.Nifti1Header) -> None:
    """Raises ValueError for directions or spacings that no scan has."""
    affine = header.get_best_affine()
    if not np.isfinite(affine).all():
        raise ValueError("its affine has NaN or infinite values")
    spacings = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACINGS_MM
    if not ((low <= spacings) & (spacings <= high)).all():
        raise ValueError(f"its spacings are {spacings.tolist()} mm; {low} to {high} are allowed")
    if abs(np.linalg.det(affine[:3, :3] / spacings)) < 1e-3:
        raise ValueError("its directions lie in a plane")

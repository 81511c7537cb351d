"""DICOM series from outside: every header is looked at before a pixel is decoded.

A case is a folder that holds one series of single-frame gray images, one file a slice. Headers are
read for the tags below alone, so that nothing else of a patient gets into memory. pydicom comes
with the extra ``dicom`` (2.4 to 3).
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from diffboost.data.containment import read_file
from diffboost.data.dicom_geometry import REQUIRED, check_image, check_one_series, in_order
from diffboost.data.dicom_pixels import UnusableDicom, refuse_coded_size, refuse_syntax
from diffboost.data.images import LARGEST_PIXELS
from diffboost.data.volumes import LARGEST_VOXELS

pydicom, HAS_PYDICOM = optional_import("pydicom")

LARGEST_DICOM = 1 << 31  # bytes of a file
SUFFIXES = (".dcm", ".ima")
BESIDE = (".csv", ".gz", ".html", ".jpg", ".json", ".md", ".nii", ".pdf", ".png", ".txt", ".xml")
TAGS = [
    *REQUIRED, "SOPClassUID", "Modality", "SeriesNumber", "InstanceNumber", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "HighBit", "PlanarConfiguration",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "FrameOfReferenceUID", "PixelData",
]  # fmt: skip
# pydicom and its decoders of pixels have no common error; a damaged file may end in any of these.
_ERRORS = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError,
    RuntimeError, AssertionError, MemoryError, struct.error, zlib.error,
)  # fmt: skip


def is_dicom(path: str | Path) -> bool:
    """Whether a case's file is for the DICOM readers: a folder, or a file named .dcm or .ima."""
    return Path(path).is_dir() or Path(path).suffix.lower() in SUFFIXES


def need_dicom(what: str) -> None:
    """Raises ModuleNotFoundError, naming the extra, where pydicom is not installed.

    Args:
        what: what it is needed for.

    Source: engineering choice.
    """
    if not HAS_PYDICOM:
        raise ModuleNotFoundError(
            f"{what}: reading DICOM needs pydicom; install the extra: pip install diffboost[dicom]"
        )


@contextmanager
def named_dicom(path: str | Path, key: str) -> Iterator[None]:
    """Turns what pydicom and its decoders raise on damaged files into an error that names them.

    Args:
        path: file or folder.
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
    except UnusableDicom as error:
        raise UnusableDicom(f"{key}: {path} cannot be used: {error}") from error
    except (*_ERRORS, *pydicom_errors()) as error:
        kind = getattr(error, "strerror", None) or type(error).__name__
        raise UnusableDicom(
            f"{key}: {path} cannot be used: damaged, or coded as nothing here reads ({kind})"
        ) from error


def pydicom_errors() -> tuple[type[Exception], ...]:
    """What pydicom raises that is of no more general kind."""
    return pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException


def read_headers(folder: str | Path, key: str, pixels: bool = False) -> list[Any]:
    """The datasets of a folder's series, checked, in the order in which its slices lie in space.

    Args:
        folder: holds one series.
        key: what it is, for messages.
        pixels: keep the coded pixels too; none is decoded.

    Returns:
        Datasets of :data:`TAGS`; ``filename`` is the file's path. Slices follow the normal of their
        plane (rows x columns), and ``InstanceNumber`` counts them so from 1.

    Raises:
        FileNotFoundError: there is no such folder.
        ModuleNotFoundError: pydicom is not installed.
        ValueError: no series, several, or one that is no volume of gray slices at equal distances;
            says which files.

    Source: engineering choice (issue 4, "DICOM in").
    """
    need_dicom(key)
    with named_dicom(folder, key):
        datasets, claimed = [], 0
        for path in _files(Path(folder)):
            dataset = read_dataset(path, key, TAGS, pixels)
            try:
                check_image(dataset)
            except UnusableDicom as error:
                raise UnusableDicom(f"{path.name}: {error}") from error
            claimed += dataset.Rows * dataset.Columns
            if claimed > LARGEST_VOXELS:
                raise UnusableDicom(f"it claims more than {LARGEST_VOXELS} voxels")
            datasets.append(dataset)
        check_one_series(datasets)
        return in_order(datasets)


def read_dataset(path: Path, key: str, tags: list[str] | None, pixels: bool) -> Any:
    """A DICOM file's dataset; a file that would have to be inflated as a whole is refused.

    Args:
        path: the file.
        key: what it is, for messages.
        tags: keywords of what to keep; None keeps all.
        pixels: keep the coded pixels; then their own size is compared with the header's.

    Raises:
        ValueError: a transfer syntax that is not read, or pixels that do not fit.

    Source: engineering choice (issue 5, "Hostile input").
    """
    try:
        content = read_file(path, key, LARGEST_DICOM)
    except ValueError as error:  # no plain file, too large, or a link that leads out
        raise UnusableDicom(str(error)) from error
    if content[128:132] != b"DICM":
        raise UnusableDicom(f"{path.name} is no DICOM file (no DICM at byte 128)")
    refuse_syntax(pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID"))
    dataset = pydicom.dcmread(
        io.BytesIO(content), stop_before_pixels=not pixels, specific_tags=tags
    )
    dataset.filename = str(path)
    _check_size(dataset, path.name, len(content), pixels)
    return dataset


def _check_size(dataset: Any, name: str, size: int, pixels: bool) -> None:
    """Raises ValueError for rows, columns and frames that a file of ``size`` bytes cannot hold."""
    syntax = dataset.file_meta.TransferSyntaxUID
    sides = (dataset.get("Rows"), dataset.get("Columns"), dataset.get("NumberOfFrames") or 1)
    if not all(isinstance(side, int) for side in sides):
        raise UnusableDicom(f"{name}: lacks Rows or Columns, or they are no numbers")
    rows, columns, frames = (int(side) for side in sides)
    bits = frames * rows * columns * dataset.get("BitsAllocated", 1)
    if min(rows, columns, frames) < 1 or rows * columns > LARGEST_PIXELS:
        raise UnusableDicom(
            f"{name}: claims {columns} x {rows} pixels; 1 to {LARGEST_PIXELS} are allowed"
        )
    if not syntax.is_compressed and bits > 8 * size:
        raise UnusableDicom(
            f"{name}: is cut off: {size} bytes cannot hold the {bits // 8} of "
            f"{columns} x {rows} pixels"
        )
    if pixels and not syntax.is_compressed and bits > 8 * len(dataset.get("PixelData") or b""):
        raise UnusableDicom(f"{name}: is cut off: its pixels are not all there")
    if pixels and syntax.is_compressed:
        refuse_coded_size(syntax, dataset.PixelData, (columns, rows), name)


def _files(folder: Path) -> list[Path]:
    """The files of a folder that must be DICOM; what is known to be something else is left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.is_dir())
    files = [
        folder / name
        for name in names
        if not name.startswith(".")
        and name != "DICOMDIR"
        and Path(name).suffix.lower() not in BESIDE
    ]
    if not files:
        raise UnusableDicom("the folder holds no DICOM file; a case is a folder of one series")
    return files

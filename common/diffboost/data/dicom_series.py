"""DICOM series from outside: every header is looked at before a pixel is decoded.

A case is a folder that holds one series of single-frame gray images, one file a slice. Headers are
read for the tags below alone, so that nothing else of a patient gets into memory. pydicom comes
with the extra ``dicom`` (2.4 to 3).
"""

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from diffboost.data.containment import read_file
from diffboost.data.dicom_pixels import refuse_coded_size, refuse_syntax
from diffboost.data.images import LARGEST_PIXELS
from diffboost.data.volumes import LARGEST_VOXELS, SPACINGS_MM

pydicom, HAS_PYDICOM = optional_import("pydicom")

LARGEST_DICOM = 1 << 31  # bytes of a file
SUFFIXES = (".dcm", ".ima")
BESIDE = (".csv", ".gz", ".html", ".jpg", ".json", ".md", ".nii", ".pdf", ".png", ".txt", ".xml")
GEOMETRY = ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
REQUIRED = (
    "SOPInstanceUID", "SeriesInstanceUID", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "PixelRepresentation", *GEOMETRY,
)  # fmt: skip
TAGS = [
    *REQUIRED, "SOPClassUID", "Modality", "SeriesNumber", "InstanceNumber", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "HighBit", "PlanarConfiguration",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "FrameOfReferenceUID", "PixelData",
]  # fmt: skip
UNEQUAL = 0.01  # of the spacing, by which slices may lie off their places (highdicom's limit)
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
    except (*_ERRORS, pydicom.errors.InvalidDicomError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{key}: {path} cannot be used: {text[:400]}") from error


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
                _check_image(dataset)
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}") from error
            claimed += dataset.Rows * dataset.Columns
            if claimed > LARGEST_VOXELS:
                raise ValueError(f"it claims more than {LARGEST_VOXELS} voxels")
            datasets.append(dataset)
        _check_one_series(datasets)
        return _in_order(datasets)


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
    content = read_file(path, key, LARGEST_DICOM)
    refuse_syntax(pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID"))
    dataset = pydicom.dcmread(
        io.BytesIO(content), stop_before_pixels=not pixels, specific_tags=tags
    )
    dataset.filename = str(path)
    syntax = dataset.file_meta.TransferSyntaxUID
    sides = (dataset.get("Rows"), dataset.get("Columns"), dataset.get("NumberOfFrames") or 1)
    if not all(isinstance(side, int) for side in sides):
        raise ValueError(f"{path.name}: lacks Rows or Columns, or they are no numbers")
    rows, columns, frames = (int(side) for side in sides)
    bits = frames * rows * columns * dataset.get("BitsAllocated", 1)
    if min(rows, columns, frames) < 1 or rows * columns > LARGEST_PIXELS:
        raise ValueError(
            f"{path.name}: claims {columns} x {rows} pixels; 1 to {LARGEST_PIXELS} are allowed"
        )
    if not syntax.is_compressed and bits > 8 * len(content):
        raise ValueError(
            f"{path.name}: is cut off: {len(content)} bytes cannot hold the {bits // 8} of "
            f"{columns} x {rows} pixels"
        )
    if pixels and syntax.is_compressed:
        refuse_coded_size(syntax, dataset.PixelData, (columns, rows), path.name)
    return dataset


def series_affine(datasets: Sequence[Any]) -> np.ndarray:
    """Voxel (column, row, slice) to mm in RAS, (4, 4), of what :func:`read_headers` gave.

    The same as that of MONAI's PydicomReader, and of the NIfTI file that holds the volume so.

    Source: DICOM PS3.3 C.7.6.2.1.1.
    """
    first, last = datasets[0], datasets[-1]
    rows, columns = np.reshape(_numbers(first, "ImageOrientationPatient"), (2, 3))
    height, width = _numbers(first, "PixelSpacing")
    start, end = (_numbers(each, "ImagePositionPatient") for each in (first, last))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * width, columns * height
    affine[:3, 2], affine[:3, 3] = (end - start) / (len(datasets) - 1), start
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


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
        raise ValueError("the folder holds no DICOM file; a case is a folder of one series")
    for path in files:
        if not pydicom.misc.is_dicom(path):
            raise ValueError(
                f"{path.name} is no DICOM file (no DICM at byte 128); a folder holds one series"
            )
    return files


def _numbers(dataset: Any, keyword: str) -> np.ndarray:
    """The numbers of a tag, all finite."""
    wanted = {"ImageOrientationPatient": 6, "ImagePositionPatient": 3, "PixelSpacing": 2}
    values = np.array([float(value) for value in dataset[keyword].value], dtype=float)
    if values.shape != (wanted[keyword],) or not np.isfinite(values).all():
        raise ValueError(f"{keyword} {values.tolist()}: {wanted[keyword]} numbers are needed")
    return values


def _check_image(dataset: Any) -> None:
    """Raises ValueError for a file that is no slice of gray values with a place in space."""
    frames, samples = dataset.get("NumberOfFrames") or 1, dataset.get("SamplesPerPixel") or 1
    if int(frames) > 1:
        raise ValueError(
            f"multi-frame, {frames} frames in one file (enhanced DICOM): not read; convert it to "
            "NIfTI (dcm2niix) or to single frames"
        )
    kind = dataset.get("PhotometricInterpretation", "MONOCHROME2")
    if int(samples) != 1 or kind != "MONOCHROME2":
        raise ValueError(
            f"color or inverted values ({samples} samples a pixel, {kind!s:.20}): only gray values "
            "of MONOCHROME2 are read"
        )
    missing = [keyword for keyword in REQUIRED if dataset.get(keyword) in (None, "", [])]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}: no slice with a place in space")
    if dataset.BitsAllocated not in (8, 16, 32):
        raise ValueError(f"BitsAllocated {dataset.BitsAllocated!s:.20}; 8, 16, 32 are read")
    if "ModalityLUTSequence" in dataset:
        raise ValueError("its values go through a table (ModalityLUTSequence), which is not read")
    slope = float(dataset.get("RescaleSlope", 1))
    if not (np.isfinite(slope) and np.isfinite(float(dataset.get("RescaleIntercept", 0)))) or (
        slope == 0
    ):
        raise ValueError(f"RescaleSlope {slope} or RescaleIntercept is no number to rescale by")
    rows, columns = np.reshape(_numbers(dataset, "ImageOrientationPatient"), (2, 3))
    if not np.allclose([rows @ rows, columns @ columns, rows @ columns], [1, 1, 0], atol=1e-3):
        raise ValueError("ImageOrientationPatient: not two directions at a right angle")
    low, high = SPACINGS_MM
    spacing = _numbers(dataset, "PixelSpacing")
    if not ((low <= spacing) & (spacing <= high)).all():
        raise ValueError(f"PixelSpacing {spacing.tolist()} mm; {low} to {high} are allowed")


def _check_one_series(datasets: Sequence[Any]) -> None:
    """Raises ValueError, saying what was found, unless all files are slices of one series."""
    series = Counter(
        (dataset.SeriesInstanceUID, str(dataset.get("Modality")), str(dataset.get("SeriesNumber")))
        for dataset in datasets
    )
    if len({uid for uid, _, _ in series}) > 1:
        found = "; ".join(
            f"number {number:.12} ({modality:.16}), {count} files"
            for (_, modality, number), count in sorted(series.items(), key=lambda one: one[0][2])
        )
        raise ValueError(
            f"holds {len(series)} series: {found}; lay each into a folder of its own and name the "
            "one to use"
        )
    first = datasets[0]
    for dataset in datasets[1:]:
        names = f"{Path(first.filename).name} and {Path(dataset.filename).name}"
        if (dataset.Rows, dataset.Columns) != (first.Rows, first.Columns):
            raise ValueError(f"{names} have different numbers of rows or columns")
        for keyword, what in (
            ("ImageOrientationPatient", "mixed orientations (a localizer among the slices?)"),
            ("PixelSpacing", "different pixel spacings"),
        ):
            if not np.allclose(_numbers(dataset, keyword), _numbers(first, keyword), atol=1e-3):
                raise ValueError(f"{names}: {what}")
    if len({dataset.SOPInstanceUID for dataset in datasets}) < len(datasets):
        raise ValueError("the same image (SOPInstanceUID) lies in it twice")
    if len(datasets) < 2:
        raise ValueError(
            "one slice; a volume has two or more (a single picture: save it as PNG, layout pairs)"
        )


def _in_order(datasets: list[Any]) -> list[Any]:
    """The slices in the order of their places; raises ValueError where these are not even."""
    rows, columns = np.reshape(_numbers(datasets[0], "ImageOrientationPatient"), (2, 3))
    normal = np.cross(rows, columns)
    places = [_numbers(dataset, "ImagePositionPatient") for dataset in datasets]
    order = sorted(range(len(datasets)), key=lambda number: float(places[number] @ normal))
    datasets = [datasets[number] for number in order]
    places = np.stack([places[number] for number in order])
    gaps = np.diff(places @ normal)
    names = [Path(dataset.filename).name for dataset in datasets]
    usual = float(np.median(gaps))
    for number, gap in enumerate(gaps):
        pair = f"{names[number]} and {names[number + 1]}"
        if gap < SPACINGS_MM[0]:
            raise ValueError(
                f"{pair} lie at the same place (several times, echoes or contrasts in one series?)"
            )
        if gap > 1.5 * usual:
            missing = round(gap / usual) - 1
            raise ValueError(
                f"{missing} slices are missing between {pair}: {gap:.4g} mm apart, others "
                f"{usual:.4g} mm"
            )
        if abs(gap - usual) > UNEQUAL * usual:
            raise ValueError(
                f"unequal spacing: {pair} are {gap:.4g} mm apart, others {usual:.4g} mm"
            )
    span = places[-1] - places[0]
    if np.linalg.norm(np.cross(span, normal)) > UNEQUAL * np.linalg.norm(span):
        raise ValueError("its slices are shifted against each other (gantry tilt)")
    for number, dataset in enumerate(datasets, start=1):
        dataset.InstanceNumber = number
    return datasets

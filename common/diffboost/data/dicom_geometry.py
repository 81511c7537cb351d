"""Where the slices of a DICOM series lie, and whether together they are a volume."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffboost.data.dicom_pixels import UnusableDicom
from diffboost.data.volumes import SPACINGS_MM

GEOMETRY = ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
REQUIRED = (
    "SOPInstanceUID", "SeriesInstanceUID", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "PixelRepresentation", *GEOMETRY,
)  # fmt: skip
UNEQUAL = 0.01  # of the spacing, by which slices may lie off their places (highdicom's limit)


def series_affine(datasets: Sequence[Any]) -> np.ndarray:
    """Voxel (column, row, slice) to mm in RAS, (4, 4), of what :func:`read_headers` gave.

    The same as that of MONAI's PydicomReader, and of the NIfTI file that holds the volume so.

    Source: DICOM PS3.3 C.7.6.2.1.1.
    """
    first, last = datasets[0], datasets[-1]
    rows, columns = np.reshape(numbers(first, "ImageOrientationPatient"), (2, 3))
    height, width = numbers(first, "PixelSpacing")
    start, end = (numbers(each, "ImagePositionPatient") for each in (first, last))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * width, columns * height
    affine[:3, 2], affine[:3, 3] = (end - start) / (len(datasets) - 1), start
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def numbers(dataset: Any, keyword: str) -> np.ndarray:
    """The numbers of a tag of :data:`GEOMETRY`.

    Args:
        dataset: of pydicom.
        keyword: the tag's.

    Raises:
        ValueError: too few, too many, or NaN.

    Source: engineering choice.
    """
    wanted = {"ImageOrientationPatient": 6, "ImagePositionPatient": 3, "PixelSpacing": 2}
    values = np.array([float(value) for value in dataset[keyword].value], dtype=float)
    if values.shape != (wanted[keyword],) or not np.isfinite(values).all():
        raise UnusableDicom(f"{keyword} {values.tolist()}: {wanted[keyword]} numbers are needed")
    return values


def check_image(dataset: Any) -> None:
    """Refuses a file that is no slice of gray values with a place in space.

    Args:
        dataset: of pydicom, with ``TAGS``.

    Raises:
        ValueError: says what it is instead.

    Source: engineering choice (issue 4, "Bad input").
    """
    frames, samples = dataset.get("NumberOfFrames") or 1, dataset.get("SamplesPerPixel") or 1
    if int(frames) > 1:
        raise UnusableDicom(
            f"multi-frame, {frames} frames in one file (enhanced DICOM): not read; convert it to "
            "NIfTI (dcm2niix) or to single frames"
        )
    kind = dataset.get("PhotometricInterpretation", "MONOCHROME2")
    if int(samples) != 1 or kind != "MONOCHROME2":
        raise UnusableDicom(
            f"color or inverted values ({samples} samples a pixel, {kind!s:.20}): only gray values "
            "of MONOCHROME2 are read"
        )
    missing = [keyword for keyword in REQUIRED if dataset.get(keyword) in (None, "", [])]
    if missing:
        raise UnusableDicom(f"lacks {', '.join(missing)}: no slice with a place in space")
    if dataset.BitsAllocated not in (8, 16, 32):
        raise UnusableDicom(f"BitsAllocated {dataset.BitsAllocated!s:.20}; 8, 16, 32 are read")
    stored = dataset.get("BitsStored") or dataset.BitsAllocated
    high = dataset.get("HighBit", stored - 1)
    if high != stored - 1:
        raise UnusableDicom(
            f"HighBit {high!s:.20} with BitsStored {stored!s:.20}: only values whose lowest bit is "
            "bit 0 (HighBit = BitsStored - 1) are read"
        )
    if "ModalityLUTSequence" in dataset:
        raise UnusableDicom(
            "its values go through a table (ModalityLUTSequence), which is not read"
        )
    slope, intercept = (
        float(dataset.get(keyword, value))
        for keyword, value in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise UnusableDicom(
            f"RescaleSlope {slope} and RescaleIntercept {intercept}: two numbers are needed, the "
            "slope not 0"
        )
    _check_plane(dataset)


def _check_plane(dataset: Any) -> None:
    """Raises ValueError for directions or spacings that no slice has."""
    rows, columns = np.reshape(numbers(dataset, "ImageOrientationPatient"), (2, 3))
    if not np.allclose([rows @ rows, columns @ columns, rows @ columns], [1, 1, 0], atol=1e-3):
        raise UnusableDicom("ImageOrientationPatient: not two directions at a right angle")
    low, high = SPACINGS_MM
    spacing = numbers(dataset, "PixelSpacing")
    if not ((low <= spacing) & (spacing <= high)).all():
        raise UnusableDicom(f"PixelSpacing {spacing.tolist()} mm; {low} to {high} are allowed")


def check_one_series(datasets: Sequence[Any]) -> None:
    """Refuses files that are not slices of one series.

    Args:
        datasets: that :func:`check_image` took; ``filename`` is the file's path.

    Raises:
        ValueError: says what was found.

    Source: engineering choice (issue 4, "Bad input").
    """
    series = Counter(
        (dataset.SeriesInstanceUID, str(dataset.get("Modality")), str(dataset.get("SeriesNumber")))
        for dataset in datasets
    )
    if len({uid for uid, _, _ in series}) > 1:
        found = "; ".join(
            f"number {number:.12} ({modality:.16}), {count} files"
            for (_, modality, number), count in sorted(series.items(), key=lambda one: one[0][2])
        )
        raise UnusableDicom(
            f"holds {len(series)} series: {found}; lay each into a folder of its own and name the "
            "one to use"
        )
    first = datasets[0]
    for dataset in datasets[1:]:
        names = f"{Path(first.filename).name} and {Path(dataset.filename).name}"
        if (dataset.Rows, dataset.Columns) != (first.Rows, first.Columns):
            raise UnusableDicom(f"{names} have different numbers of rows or columns")
        for keyword, what in (
            ("ImageOrientationPatient", "mixed orientations (a localizer among the slices?)"),
            ("PixelSpacing", "different pixel spacings"),
        ):
            if not np.allclose(numbers(dataset, keyword), numbers(first, keyword), atol=1e-3):
                raise UnusableDicom(f"{names}: {what}")
    if len({dataset.SOPInstanceUID for dataset in datasets}) < len(datasets):
        raise UnusableDicom("the same image (SOPInstanceUID) lies in it twice")
    if len(datasets) < 2:
        raise UnusableDicom(
            "one slice; a volume has two or more (a single picture: save it as PNG, layout pairs)"
        )


def in_order(datasets: list[Any]) -> list[Any]:
    """The slices in the order of their places, along the normal of their plane.

    Args:
        datasets: that :func:`check_one_series` took.

    Returns:
        The same datasets; ``InstanceNumber``, by which MONAI stacks them, counts from 1.

    Raises:
        ValueError: slices are missing, doubled, unevenly spaced or shifted.

    Source: engineering choice (issue 4, "Bad input"); highdicom's limit of 1 %.
    """
    rows, columns = np.reshape(numbers(datasets[0], "ImageOrientationPatient"), (2, 3))
    normal = np.cross(rows, columns)
    places = [numbers(dataset, "ImagePositionPatient") for dataset in datasets]
    order = sorted(range(len(datasets)), key=lambda number: float(places[number] @ normal))
    datasets = [datasets[number] for number in order]
    places = np.stack([places[number] for number in order])
    names = [Path(dataset.filename).name for dataset in datasets]
    _check_gaps(np.diff(places @ normal), names)
    span = places[-1] - places[0]
    if np.linalg.norm(np.cross(span, normal)) > UNEQUAL * np.linalg.norm(span):
        raise UnusableDicom("its slices are shifted against each other (gantry tilt)")
    for number, dataset in enumerate(datasets, start=1):
        dataset.InstanceNumber = number
    return datasets


def _check_gaps(gaps: np.ndarray, names: Sequence[str]) -> None:
    """Raises ValueError, with names of files, where distances of slices (mm) differ."""
    usual = float(np.median(gaps))
    for number, gap in enumerate(gaps):
        pair = f"{names[number]} and {names[number + 1]}"
        if gap < SPACINGS_MM[0]:
            raise UnusableDicom(
                f"{pair} lie at the same place (several times, echoes or contrasts in one series?)"
            )
        if gap > 1.5 * usual:
            missing = round(gap / usual) - 1
            raise UnusableDicom(
                f"{missing} slices are missing between {pair}: {gap:.4g} mm apart, others "
                f"{usual:.4g} mm"
            )
        if abs(gap - usual) > UNEQUAL * usual:
            raise UnusableDicom(
                f"unequal spacing: {pair} are {gap:.4g} mm apart, others {usual:.4g} mm"
            )

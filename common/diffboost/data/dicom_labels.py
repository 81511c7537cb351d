"""Labels as DICOM SEG: read with highdicom, slice by slice of the series that they refer to."""

from pathlib import Path

import numpy as np
from monai.utils import optional_import

from diffboost.data.dicom_pixels import HAS_DECODERS, PLAIN, UnusableDicom
from diffboost.data.dicom_series import (
    BESIDE,
    is_dicom,
    named_dicom,
    need_dicom,
    read_dataset,
    read_headers,
)
from diffboost.data.volumes import LARGEST_VOXELS

highdicom, HAS_HIGHDICOM = optional_import("highdicom")

SEG = "1.2.840.10008.5.1.4.1.1.66.4"  # Segmentation Storage
HEAD = ["SOPClassUID", "Rows", "Columns", "NumberOfFrames", "BitsAllocated"]


def need_highdicom(what: str) -> None:
    """Raises ModuleNotFoundError, naming the extra, where pydicom or highdicom is not installed.

    Args:
        what: what it is needed for.

    Source: engineering choice.
    """
    need_dicom(what)
    if not HAS_HIGHDICOM:
        raise ModuleNotFoundError(
            f"{what}: DICOM SEG needs highdicom; install the extra: pip install diffboost[dicom]"
        )
    if not HAS_DECODERS and not hasattr(np, "float_"):
        raise ModuleNotFoundError(
            f"{what}: highdicom for pydicom 2 needs numpy below 2; install pydicom 3 or numpy 1.26"
        )


def segmentation_file(path: Path) -> Path:
    """The SEG file of a label: the path itself, or the one file of a folder.

    Raises:
        ValueError: a folder with no file, or with several.

    Source: engineering choice.
    """
    if not path.is_dir():
        return path
    files = [
        each
        for each in sorted(path.iterdir())
        if each.is_file() and not each.name.startswith(".") and each.suffix.lower() not in BESIDE
    ]
    if len(files) != 1:
        raise UnusableDicom(f"label: {path} holds {len(files)} files; one DICOM SEG is needed")
    return files[0]


def check_segments(path: Path, image: Path) -> None:
    """Refuses a label that is no DICOM SEG, or claims absurd sizes, before its pixels are read.

    Args:
        path: the file, or a folder that holds it.
        image: the case's series, a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: highdicom is not installed.
        ValueError: says what is wrong.

    Source: engineering choice (issue 5, "Hostile input").
    """
    need_highdicom(f"label: {path}")
    with named_dicom(path, "label"):
        if not is_dicom(image):
            raise UnusableDicom("a DICOM SEG belongs to a DICOM series, and the image is none")
        file = segmentation_file(path)
        head = read_dataset(file, "label", HEAD, pixels=False)
        syntax = head.file_meta.TransferSyntaxUID
        if head.get("SOPClassUID") != SEG:
            raise UnusableDicom("it is no DICOM SEG (Segmentation Storage)")
        if syntax not in PLAIN:
            raise UnusableDicom(f"a SEG of transfer syntax {syntax.name!s:.60} is not read")
        voxels = head.Rows * head.Columns * int(head.get("NumberOfFrames") or 1)
        if voxels > LARGEST_VOXELS:
            raise UnusableDicom(f"it claims {voxels} voxels; at most {LARGEST_VOXELS} are allowed")


def read_segments(path: Path, image: Path) -> np.ndarray:
    """The segments of a SEG on the slices of its series, as numbers of segments.

    Frames are found by the images that they refer to; a slice without a frame is background.

    Args:
        path: the file, or a folder that holds it.
        image: the series, a folder.

    Returns:
        float32 (columns, rows, slices), in the order of ``read_headers``: 0, or SegmentNumber.

    Raises:
        ValueError: it refers to another series, has other rows and columns, segments that overlap,
            or fractions between nothing and all.

    Source: highdicom's ``Segmentation.get_pixels_by_source_instance``.
    """
    check_segments(path, image)
    series = read_headers(image, "image")
    with named_dicom(path, "label"):
        dataset = read_dataset(segmentation_file(path), "label", None, pixels=True)
        if (dataset.Rows, dataset.Columns) != (series[0].Rows, series[0].Columns):
            raise UnusableDicom("it has other rows and columns than the images of the series")
        segments = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
        told = {str(uid) for _, _, uid in segments.get_source_image_uids()}
        names = [str(each.SOPInstanceUID) for each in series]
        if not told <= set(names):
            raise UnusableDicom("it refers to images that are not in the case's series")
        planes = segments.get_pixels_by_source_instance(
            names, combine_segments=True, assert_missing_frames_are_empty=True
        )
    return np.ascontiguousarray(planes.transpose(2, 1, 0)).astype(np.float32)

"""Predictions of volumes as DICOM SEG, in the frame of their series and referring to its images."""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.utils import optional_import

from diffboost import __version__
from diffboost.data.dicom_geometry import series_affine
from diffboost.data.dicom_labels import need_highdicom
from diffboost.data.dicom_series import named_dicom, read_dataset, read_headers
from diffboost.data.documents import read_json
from diffboost.data.volumes import check_volume
from diffboost.files import sha256_of_files, write_aside

highdicom, _ = optional_import("highdicom")
codes, _ = optional_import("pydicom.sr.codedict", name="codes")

logger = logging.getLogger(__name__)

PREDICTION = re.compile(r"(?P<name>.+?)(_seg)?\.nii(\.gz)?")
SERIES_NUMBER = 900  # of the new series in the study; scanners count from 1
LONGEST_LABEL = 64  # characters of a SegmentLabel


def write_segmentations(
    predictions_dir: str, dataset_dir: str, output_dir: str, labels: str, model_path: str
) -> list[Path]:
    """Writes every prediction of a folder as a DICOM SEG.

    Args:
        predictions_dir: holds ``NAME_seg.nii.gz`` or ``NAME.nii.gz``, class indices.
        dataset_dir: holds the folder ``NAME`` of each one's series.
        output_dir: gets ``NAME_seg.dcm``.
        labels: names of the classes: a bundle's ``metadata.json`` or a store's ``dataset.json``.
        model_path: the weights that predicted; their hash is written into the files.

    Returns:
        The files.

    Raises:
        FileNotFoundError: no prediction, or a prediction without a series.
        ModuleNotFoundError: highdicom is not installed.
        ValueError: series and prediction do not fit, or a class has no name.

    Source: engineering choice (issue 4, "DICOM out").
    """
    need_highdicom("dicom seg")
    names = read_labels(labels)
    model_sha256 = sha256_of_files([model_path])
    found = [
        (match["name"], path)
        for path in sorted(Path(predictions_dir).glob("*"))
        if (match := PREDICTION.fullmatch(path.name))
    ]
    if not found:
        raise FileNotFoundError(f"predictions_dir: no .nii or .nii.gz in {predictions_dir}")
    written = []
    for name, path in found:
        folder = Path(dataset_dir) / name
        if not folder.is_dir():
            raise FileNotFoundError(f"dataset_dir: no folder {name} in {dataset_dir} for {path}")
        segmentation = segment_series(path, folder, names, model_sha256)
        target = Path(output_dir) / f"{name}_seg.dcm"
        write_aside(target, partial(_save, segmentation))
        written.append(target)
    logger.info("%s: %d DICOM SEG", output_dir, len(written))
    return written


def read_labels(path: str | Path) -> list[str]:
    """The names of classes 1, 2, … in a bundle's metadata.json or a slice store's dataset.json.

    Args:
        path: of the file; keys ``network_data_format::outputs::pred::channel_def`` or ``labels``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such names, or one that a SEG cannot hold.

    Source: engineering choice.
    """
    found: Any = read_json(path, "labels")
    keys = ("network_data_format", "outputs", "pred", "channel_def")
    for key in keys if "network_data_format" in found else ("labels",):
        found = found.get(key) if isinstance(found, Mapping) else None
    numbers = [str(number) for number in range(len(found or ()))]
    if not isinstance(found, Mapping) or sorted(found, key=str) != sorted(numbers):
        raise ValueError(
            f"labels: {path} names no classes: a mapping of '0', '1', … to names is needed"
        )
    names = [found[number] for number in numbers][1:]
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_LABEL or "\\" in name:
            raise ValueError(
                f"labels: {path}: {name!r:.80}; 1 to {LONGEST_LABEL} characters, no backslash"
            )
    if not names:
        raise ValueError(f"labels: {path} names no class but the background")
    return names


def segment_series(prediction: Path, series: Path, names: Sequence[str], model_sha256: str) -> Any:
    """The SEG of a prediction: a segment a class, a frame where a slice has some of it.

    It has new UIDs, and patient and study of the series, to which it belongs.

    Args:
        prediction: a NIfTI file of class indices on the grid of the series.
        series: folder of the series.
        names: of classes 1, 2, …
        model_sha256: hash of the weights.

    Returns:
        ``highdicom.seg.Segmentation``, type BINARY.

    Raises:
        ValueError: they do not fit.

    Source: DICOM PS3.3 A.51; highdicom.
    """
    check_volume(prediction, "prediction")
    headers = read_headers(series, "series")
    planes = lay_on_series(nib.load(prediction), headers, prediction)
    if planes.max(initial=0) > len(names):
        raise ValueError(f"prediction: {prediction} has class {planes.max()}; named are {names}")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="DiffBoost segmentation",
        family=codes.cid7162.ArtificialIntelligence,
        version=__version__,
        parameters={"model_sha256": model_sha256},
    )
    tissue = codes.SCT.Tissue  # what a class is, is said by its name alone
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=tissue,
            segmented_property_type=tissue,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]
    with named_dicom(series, "series"):
        images = [read_dataset(Path(each.filename), "series", None, False) for each in headers]
        return highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=planes,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="DiffBoost",
            manufacturer_model_name="diffboost_segmentation",
            software_versions=__version__,
            device_serial_number=model_sha256[:16],
            content_label="SEGMENTATION",
            content_description="Predicted by a model, for research",
        )


def lay_on_series(prediction: Any, headers: Sequence[Any], path: Path) -> np.ndarray:
    """A prediction's class indices on the slices of its series.

    Args:
        prediction: nibabel's image; its axes may be turned against those of the series.
        headers: of the series, see ``read_headers``.
        path: the prediction's, for messages.

    Returns:
        uint8 (slices, rows, columns).

    Raises:
        ValueError: it does not lie on the grid of the series, or holds no class indices.

    Source: engineering choice.
    """
    shape = (headers[0].Columns, headers[0].Rows, len(headers))
    to_series = np.linalg.inv(series_affine(headers)) @ prediction.affine
    if prediction.ndim == 3:
        turn = nib.io_orientation(to_series)
        turned = nib.orientations.apply_orientation(np.asarray(prediction.dataobj), turn)
        left = to_series @ nib.orientations.inv_ornt_aff(turn, prediction.shape)
    if prediction.ndim != 3 or turned.shape != shape or not np.allclose(left, np.eye(4), atol=0.01):
        raise ValueError(
            f"prediction: {path} ({' x '.join(map(str, prediction.shape))}) does not lie on the "
            f"grid of {Path(headers[0].filename).parent} ({' x '.join(map(str, shape))})"
        )
    classes = turned.astype(np.uint8)
    if not np.array_equal(classes, turned):
        raise ValueError(f"prediction: {path} holds other values than class indices 0 to 255")
    return np.ascontiguousarray(classes.transpose(2, 1, 0))


def _save(dataset: Any, path: Path) -> None:
    dataset.save_as(path)

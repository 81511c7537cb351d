"""Synthetic images as DICOM: secondary capture, marked as synthetic, without data of a patient."""

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import
from PIL import Image

from diffboost import __version__
from diffboost.data.containment import read_file
from diffboost.data.dicom_labels import need_highdicom
from diffboost.data.images import LARGEST_PICTURE, decode
from diffboost.data.manifest import read_manifest
from diffboost.files import write_aside
from diffboost.generation.provenance import DESCRIPTION, RUN_FACTS, is_intact, read_facts

highdicom, _ = optional_import("highdicom")

logger = logging.getLogger(__name__)

NOBODY = "SYNTHETIC"
NAMING = ("case",)  # facts that are not written: a case is called after its file
ROOT = uuid.uuid5(uuid.NAMESPACE_URL, "diffboost:synthetic")
SYNTHETIC_DATA = 0x0008001C  # pydicom 2.4 does not know the name
UNSTABLE = (  # what says when or with what the file was written
    "ContributingEquipmentSequence",
    "InstanceCreationDate", "InstanceCreationTime", "DateOfSecondaryCapture",
    "TimeOfSecondaryCapture", "ContentDate", "ContentTime",
)  # fmt: skip
MARKS = {
    "ConversionType": "SYN",
    "ImageType": ["DERIVED", "SECONDARY"],
    "ContentQualification": "RESEARCH",
    "BurnedInAnnotation": "NO",
    "PatientIdentityRemoved": "YES",
    "DeidentificationMethod": "Synthetic image: no person was imaged",
    "DerivationDescription": DESCRIPTION,
    "SeriesDescription": "SYNTHETIC, for research, not for diagnosis",
    "SecondaryCaptureDeviceManufacturer": "DiffBoost",
    "SecondaryCaptureDeviceManufacturerModelName": "diffboost_synthesis",
    "SecondaryCaptureDeviceSoftwareVersions": __version__,
    "PatientOrientation": None,
}


def write_synthetic(synthetic_dir: str, output_dir: str) -> list[Path]:
    """Writes the kept variants of a synthetic store as DICOM, one study and one series.

    The same store gives the same bytes: UIDs follow from hashes, and no date is written. Names of
    cases, which come from names of files, are not written; the hash of the PNG is.

    Args:
        synthetic_dir: what ``diffboost_synthesis`` wrote.
        output_dir: gets ``variant_000001.dcm``, …; numbers are rows of the manifest.

    Returns:
        The files.

    Raises:
        FileNotFoundError: no such store, or a variant is gone.
        ModuleNotFoundError: highdicom is not installed.
        ValueError: a variant is damaged, or another than the manifest says.

    Source: engineering choice (issue 4, "DICOM out").
    """
    need_highdicom("dicom synthetic")
    manifest = read_manifest(synthetic_dir)
    written = []
    rows = zip(manifest.image, manifest.get("sha256", manifest.image), manifest.kept, strict=True)
    for number, (name, sha256, kept) in enumerate(rows, start=1):
        if not kept:
            continue
        path = Path(synthetic_dir) / name
        data = read_file(path, "synthetic_dir", LARGEST_PICTURE)
        facts = read_facts(data) if is_intact(data) else None
        if facts is None or hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(
                f"synthetic_dir: {path} is damaged, older, or not the file of the manifest; "
                "run synthesis again"
            )
        target = Path(output_dir) / f"variant_{number:06d}.dcm"
        write_aside(target, partial(_save, synthetic_image(data, facts, number)))
        written.append(target)
    logger.info(
        "%s: %d synthetic images as DICOM, %d that the quality filter rejected left out",
        output_dir, len(written), len(manifest) - len(written),
    )  # fmt: skip
    return written


def synthetic_image(data: bytes, facts: Mapping[str, object], number: int) -> Any:
    """A variant as Secondary Capture Image.

    Args:
        data: bytes of its PNG.
        facts: what these say, see ``read_facts``.
        number: its place in the series.

    Returns:
        ``highdicom.sc.SCImage``, 16 bits, MONOCHROME2, the levels of the PNG.

    Source: DICOM PS3.3 A.8.1, C.8.6.1; (0008,001C) Synthetic Data.
    """
    run = json.dumps({name: facts[name] for name in RUN_FACTS})
    image = highdicom.sc.SCImage(
        pixel_array=_levels(decode(data)),
        photometric_interpretation="MONOCHROME2",
        bits_allocated=16,
        coordinate_system="PATIENT",
        study_instance_uid=derived_uid("study", facts["model_sha256"]),
        series_instance_uid=derived_uid("series", run),
        series_number=1,
        sop_instance_uid=derived_uid("image", hashlib.sha256(data).hexdigest()),
        instance_number=number,
        manufacturer="DiffBoost",
        patient_id=NOBODY,
        patient_name=f"{NOBODY}^",
        patient_orientation=("L", "P"),  # asked for; the slice's is not known, see MARKS
    )
    for keyword in UNSTABLE:
        if keyword in image:
            delattr(image, keyword)
    image.add_new(SYNTHETIC_DATA, "CS", "YES")
    for keyword, value in MARKS.items():
        setattr(image, keyword, value)
    told = {name: value for name, value in facts.items() if name not in NAMING}
    told["png_sha256"] = hashlib.sha256(data).hexdigest()
    image.ImageComments = "\n".join(f"diffboost:{name}: {told[name]}" for name in told)
    return image


def derived_uid(kind: str, text: object) -> str:
    """A UID that follows from a text: 2.25 and the number of a name-based UUID.

    Args:
        kind: study, series or image.
        text: what it follows from.

    Source: DICOM PS3.5 B.2; RFC 9562, version 5.
    """
    return f"2.25.{uuid.uuid5(ROOT, f'{kind}:{text}').int}"


def _levels(picture: Image.Image) -> np.ndarray:
    """The 16-bit levels of a variant's PNG, (H, W)."""
    return np.asarray(picture).astype(np.uint16)


def _save(dataset: Any, path: Path) -> None:
    dataset.save_as(path)

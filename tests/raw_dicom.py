"""Small DICOM data for tests: series of the phantoms of raw_data, and labels as SEG."""

import uuid
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import raw_data
from pydicom.dataset import FileDataset, FileMetaDataset

TASK = {**raw_data.TASK_3D, "layout": "series"}
MR = "1.2.840.10008.5.1.4.1.1.4"
SECRETS = {  # what no output may hold but a SEG, which belongs to the patient's study
    "PatientName": "DOE^JOHN", "PatientID": "MRN4711", "PatientBirthDate": "19610203",
    "AccessionNumber": "ACC0815", "InstitutionName": "General Hospital", "StudyDate": "20210304",
    "SeriesDescription": "ax t1 of Doe", "ReferringPhysicianName": "QUINCY^JACK",
}  # fmt: skip
# Left out of files (R, A, S): columns grow to the left, rows to the back, slices to the head.
TURN = nib.orientations.ornt_transform(
    nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("LPS")
)


def uid(*parts: object) -> str:
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, repr(parts)).int}"


def slices(array: np.ndarray, name: str, slope: float = 0.5, intercept: float = -50.0) -> list:
    """Datasets of an array (R, A, S) whose values are whole numbers once rescaled, in order."""
    affine = np.diag([*raw_data.SPACING_MM, 1.0])
    affine[:3, 3] = (-10, 7, 30)
    turned = nib.Nifti1Image(array, affine).as_reoriented(TURN)
    raw, lps = np.asarray(turned.dataobj), np.diag([-1, -1, 1, 1]) @ turned.affine
    raw = ((raw - intercept) / slope).round().astype(np.int16)
    made = []
    for number in range(raw.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MR, "1.2.840.10008.1.2.1"
        meta.MediaStorageSOPInstanceUID = uid(name, number)
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        for keyword, value in SECRETS.items():
            setattr(ds, keyword, value)
        ds.SOPClassUID, ds.SOPInstanceUID = MR, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(name, "study"), uid(name, "series")
        ds.FrameOfReferenceUID, ds.Modality, ds.SeriesNumber = uid(name, "frame"), "MR", 3
        ds.PatientSex, ds.StudyTime, ds.StudyID, ds.Manufacturer = "O", "120000", "1", "none"
        ds.InstanceNumber, ds.ImageType = number + 1, ["ORIGINAL", "PRIMARY"]
        ds.PositionReferenceIndicator = ""
        steps = np.linalg.norm(lps[:3, :3], axis=0)
        ds.ImageOrientationPatient = [*(lps[:3, 0] / steps[0]), *(lps[:3, 1] / steps[1])]
        ds.ImagePositionPatient = list(lps[:3, 3] + number * lps[:3, 2])
        ds.PixelSpacing, ds.SliceThickness = [steps[1], steps[0]], steps[2]
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = slope, intercept, "US"
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        pixels = np.ascontiguousarray(raw[:, :, number].T)
        ds.Rows, ds.Columns = pixels.shape
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OW"
        made.append(ds)
    return made


def save(ds: FileDataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if pydicom.__version__ < "3":
        ds.is_little_endian, ds.is_implicit_VR = True, ds.file_meta.TransferSyntaxUID.is_implicit_VR
        ds.save_as(path, write_like_original=False)
    else:
        ds.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, number: int, change: Mapping | None = None) -> Path:
    """The series of phantom `number`, its files named out of order; tags of every file changed."""
    image = raw_data.volume(number)[0].round()
    for place, ds in enumerate(slices(image, f"case{number}")):
        for keyword, value in (change or {}).items():
            setattr(ds, keyword, value)
        save(ds, folder / f"{(place * 7) % 10}_{place}.dcm")
    return folder


def write_cases(root: Path, num_cases: int = 3) -> Path:
    """Layout series: images/case_N of DICOM, labels/case_N.nii.gz; returns the folder."""
    for number in range(num_cases):
        name = f"case_{number:03d}"
        write_series(root / "images" / name, number)
        raw_data.write_nifti(
            root / "labels" / f"{name}.nii.gz", raw_data.volume(number)[1], axcodes="LPS"
        )
    return root

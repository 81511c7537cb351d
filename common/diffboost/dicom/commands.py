"""The commands `diffboost dicom …`; each imports its module late, for torch takes seconds."""

import logging

logger = logging.getLogger(__name__)


def check(dataset_dir: str) -> None:
    """Says of every folder whether it is one whole series that can be read; exits with 1 if not.

    Inference with MONAI alone looks at less: a missing slice is not noticed there.

    Args:
        dataset_dir: holds a folder a series.
    """
    from diffboost.dicom.series_check import check_folders  # torch takes seconds

    try:
        reasons = check_folders(dataset_dir)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from None
    for name, reason in reasons.items():
        logger.log(logging.ERROR if reason else logging.INFO, "%s: %s", name, reason or "good")
    if any(reasons.values()):
        raise SystemExit(1)


def seg(
    predictions_dir: str, dataset_dir: str, output_dir: str, labels: str, model_path: str
) -> None:
    """Writes predictions of DICOM series as DICOM SEG, NAME_seg.dcm for NAME_seg.nii.gz.

    A SEG belongs to the patient's study: it bears the patient's name and identifiers.

    Args:
        predictions_dir: holds NAME_seg.nii.gz (or NAME.nii.gz), as inference writes them.
        dataset_dir: holds the folder NAME of each series.
        output_dir: gets the files.
        labels: names of the classes: a bundle's metadata.json or a slice store's dataset.json.
        model_path: the weights that predicted; the files say their hash.
    """
    from diffboost.dicom.segmentations import write_segmentations  # torch takes seconds

    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells of every module it copies
    try:
        write_segmentations(predictions_dir, dataset_dir, output_dir, labels, model_path)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from None


def synthetic(synthetic_dir: str, output_dir: str) -> None:
    """Writes a synthetic store as DICOM, marked as synthetic, without data of a patient.

    Args:
        synthetic_dir: what diffboost_synthesis wrote.
        output_dir: gets variant_000001.dcm, …, all of one series.
    """
    from diffboost.dicom.synthetic_images import write_synthetic  # torch takes seconds

    try:
        write_synthetic(synthetic_dir, output_dir)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from None


DICOM = {"check": check, "seg": seg, "synthetic": synthetic}

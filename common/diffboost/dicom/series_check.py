"""`diffboost dicom check`: which folders are whole series of gray slices at equal distances."""

from pathlib import Path

from diffboost.data.dicom_series import need_dicom, read_headers


def check_folders(dataset_dir: str | Path) -> dict[str, str]:
    """Why each folder cannot be used; "" for a good one. No pixel is decoded.

    Args:
        dataset_dir: holds a folder a series.

    Raises:
        FileNotFoundError: there is no folder in it.
        ModuleNotFoundError: pydicom is not installed.

    Source: engineering choice.
    """
    need_dicom("dicom check")
    root = Path(dataset_dir)
    folders = sorted(path for path in root.glob("*") if path.is_dir())
    if not folders:
        raise FileNotFoundError(f"dataset_dir: no folder of a series in {root}")
    reasons = {}
    for folder in folders:
        try:
            read_headers(folder, "series")
            reasons[folder.name] = ""
        except ValueError as error:
            reasons[folder.name] = str(error)
    return reasons

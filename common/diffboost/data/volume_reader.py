"""Reading volumes with MONAI's readers: NIfTI files, and folders of one DICOM series."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader, PydicomReader
from monai.transforms import MapTransform

from diffboost.data.dicom_labels import read_segments
from diffboost.data.dicom_series import is_dicom, named_dicom, need_dicom, read_headers
from diffboost.data.volumes import named_volume

AXES = (3, 4)  # of a volume; the fourth are channels
_NAME = "filename_or_obj"


class LoadVolumesd(MapTransform):
    """Loads ``image`` and ``label`` of a case; a DICOM SEG is laid onto the image's series.

    MONAI's LoadImage tries one reader after the other and hides what they raise; its plain DICOM
    reader, the last, checks nothing. Here the path decides (``is_dicom``).

    Args:
        keys: ``image``, or ``image`` and ``label``.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_volume` and ``read_segments``.

    Source: engineering choice (MONAI's reader of SEG needs every segment in every frame).
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, str]) -> dict[Hashable, object]:
        """A copy of ``data`` with MetaTensors in place of the paths."""
        item = dict(data)
        for key in self.key_iterator(item):
            name = item[key]
            if key == "label" and isinstance(name, str) and is_dicom(name):
                labels = torch.from_numpy(read_segments(Path(name), Path(data["image"])))
                item[key] = MetaTensor(labels, meta={**item["image"].meta, _NAME: name})
            else:
                item[key] = load_volume(name, str(key))
        return item


def load_volume(path: str | Sequence[str], key: str) -> MetaTensor:
    """A volume as MONAI's readers give it, float32 (columns, rows, slices), affine to RAS.

    Gray values of DICOM are rescaled by RescaleSlope and RescaleIntercept of their slice.

    Args:
        path: a NIfTI file, or the folder of a DICOM series; several NIfTI files are stacked as
            channels.
        key: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: it is DICOM, and pydicom is not installed.
        ValueError: it is damaged, or no volume of gray values; see ``read_headers``.

    Source: MONAI's NibabelReader and PydicomReader.
    """
    name = path if isinstance(path, str) else path[0]
    if is_dicom(name):
        need_dicom(f"{key}: {name}")
        reader = PydicomReader()
        datasets = read_headers(name, key, pixels=True)
        with named_dicom(name, key):
            reader.has_series, reader.filenames = True, [[each.filename for each in datasets]]
            voxels, header = reader.get_data(datasets)
    else:
        reader = NibabelReader()
        with named_volume(name, key):
            voxels, header = reader.get_data(reader.read(path))
    if np.ndim(voxels) not in AXES:
        raise ValueError(
            f"{key}: {name} has {np.ndim(voxels)} axes; three are needed, or four, channels last"
        )
    header[_NAME] = name
    return MetaTensor.ensure_torch_and_prune_meta(np.asarray(voxels, np.float32), header)

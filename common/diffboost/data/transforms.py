"""Transforms: reading stored slices, and the one preprocessing of a whole case."""

import operator
from collections.abc import Hashable, Mapping
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import PILReader
from monai.networks.layers import GaussianFilter
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    MapTransform,
    Orientationd,
    Resized,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Transform,
    Transposed,
)
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch.nn.functional import interpolate

from diffboost.data.images import read_levels
from diffboost.data.memory import PictureMemory
from diffboost.data.tasks import AXCODES, INTENSITY_KEYS, VOLUMES
from diffboost.data.volume_reader import LoadVolumesd

AXIS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))
_LOSSY = (".jpg", ".jpeg")


class LoadSliced(MapTransform):
    """Loads a stored slice: PNG paths become tensors (1, H, W) in the units of the design.

    ``image`` and ``synthetic``: float32 in [-1, 1] (16-bit PNG: x / 32767.5 - 1; 8-bit gray or RGB,
    by luminance: x / 127.5 - 1). ``label``: uint8 class index. ``edge``: float32 in [0, 1].

    Args:
        keys: some of ``image``, ``synthetic``, ``label``, ``edge``.
        image_size: side to which slices of another size are resized, in pixels (bilinear with
            anti-aliasing; labels nearest); None keeps the size on disk.
        allow_missing_keys: skip keys that an item does not have.
        memory: keeps decoded pictures; None reads their files each time.

    Raises:
        ValueError: a key outside this vocabulary; when called, a picture that is damaged.

    Source: engineering choice (design, "Slice store").
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_size: int | None = None,
        allow_missing_keys: bool = False,
        memory: PictureMemory | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        unknown = set(self.keys) - {"image", "synthetic", "label", "edge"}
        if unknown:
            raise ValueError(f"keys: {sorted(unknown)}; allowed: image, synthetic, label, edge")
        self.image_size = image_size
        self.read = read_levels if memory is None else memory.read

    def __call__(self, data: Mapping[Hashable, str]) -> dict[Hashable, torch.Tensor]:
        """A copy of ``data`` with tensors in place of the paths."""
        item = dict(data)
        for key in self.key_iterator(item):
            pixels = _to_units(self.read(item[key], str(key)), key)
            item[key] = self._resize(pixels, nearest=key == "label")
        return item

    def _resize(self, pixels: torch.Tensor, nearest: bool) -> torch.Tensor:
        """(1, H, W) to (1, S, S)."""
        size = (self.image_size, self.image_size)
        if self.image_size is None or tuple(pixels.shape[-2:]) == size:
            return pixels
        if nearest:
            return interpolate(pixels[None], size, mode="nearest-exact")[0]
        return interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


def _to_units(levels: np.ndarray, key: Hashable) -> torch.Tensor:
    """Levels (H, W) as tensor (1, H, W), scaled by what the key stands for."""
    if key == "label":
        return torch.from_numpy(levels)[None]
    pixels = torch.from_numpy(levels.astype(np.float32))[None]
    if key == "edge":
        return pixels / 255
    eight_bit = levels.dtype in (np.uint8, np.float32)  # gray; luminance of RGB
    return pixels / (127.5 if eight_bit else 32767.5) - 1


class MapLabelsd(MapTransform):
    """Turns source labels into class indices: several masks are united, values are mapped.

    A task of layout ``pairs`` with one class and nothing to drop has binary masks: any nonzero
    value is class 1 (in JPEG masks values up to 127 are compression noise). Otherwise every value
    must be 0, stand in the task's label map, or in ``drop``, which goes to the background.

    Args:
        keys: keys of labels (N, …), N masks of one image.
        task: a task as ``read_task`` gives it.

    Raises:
        ValueError: a value that the task does not name.

    Source: DiffBoost Sec. 4.1; facts, item 15.
    """

    def __init__(self, keys: KeysCollection, task: Mapping) -> None:
        super().__init__(keys)
        self.classes = {0: 0} | {value: 0 for value in task["drop"]}
        for number, values in enumerate(task["labels"].values(), start=1):
            self.classes |= {value: number for value in values}
        one_class = len(task["labels"]) == 1 and not task["drop"]
        self.binary = task["layout"] == "pairs" and one_class

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """A copy of ``data`` with labels (1, …) of class indices, float32."""
        item = dict(data)
        for key in self.keys:
            label = item[key]
            if self.binary:
                name = str(label.meta.get("filename_or_obj", ""))
                threshold = 127 if Path(name).suffix.lower() in _LOSSY else 0
                item[key] = (label > threshold).amax(dim=0, keepdim=True).float()
                continue
            values = [float(value) for value in torch.unique(label.as_tensor())]
            wrong = [f"{value:g}" for value in values if value not in self.classes]
            if wrong:
                known = ", ".join(str(value) for value in sorted(self.classes))
                raise ValueError(
                    f"label values {', '.join(wrong[:5])} are not in the map: {known} (of the "
                    "task's keys `labels` and `drop`)"
                )
            mapped = torch.zeros_like(label)
            for value, number in self.classes.items():
                mapped[label == value] = number
            item[key] = mapped.amax(dim=0, keepdim=True)
        return item


class OrientLikeImaged(MapTransform):
    """Turns volumes so that their axes run as those of ``image`` do; no value changes.

    A label's file may hold the same voxels in another order of axes than its image's.

    Args:
        keys: MetaTensors (1, H, W, D) of the same place as ``image``.

    Source: engineering choice
    """

    def __call__(self, data: Mapping) -> dict:
        """The data with the volumes turned."""
        codes = "".join(nib.aff2axcodes(data["image"].affine.numpy()))
        return Orientationd(self.keys, axcodes=codes, labels=AXIS_LABELS)(data)


class SmoothSlicesd(MapTransform):
    """Smooths slices that are about to be made smaller, as ``Resize(anti_aliasing=True)`` does.

    That one convolves the whole volume with three kernels, of which the third, across slices that
    keep their number, is 1. Here each slice is convolved with two: a tenth of the time, the same
    values to 1e-6. Like that one it takes what is outside the image for 0, which is mid-gray: the
    frame of a black slice of 512 px has -0.87 at 64 px, in training as in MONAI's inference.

    Args:
        keys: images (1, H, W, D) or (1, H, W), MetaTensor or tensor.
        image_size: side that the slices will get, in pixels; sides at most as long stay sharp.

    Source: engineering choice (MONAI 1.6.1: sigma of (side / image_size - 1) / 2 pixels).
    """

    def __init__(self, keys: KeysCollection, image_size: int) -> None:
        super().__init__(keys)
        self.image_size = image_size

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """A copy of ``data`` with smoothed images, float32 where they are smoothed."""
        out = dict(data)
        for key in self.key_iterator(out):
            sigma = [max(0.0, (side / self.image_size - 1) / 2) for side in out[key].shape[1:3]]
            if any(sigma):
                image = convert_to_tensor(out[key], dtype=torch.float32, track_meta=False)
                slices = image.reshape(*image.shape[:3], -1).movedim(-1, 0)  # (D, 1, H, W)
                smoothed = GaussianFilter(2, sigma)(slices).movedim(0, -1).reshape(image.shape)
                out[key] = convert_to_dst_type(smoothed, out[key], dtype=torch.float32)[0]
        return out


def case_preprocessing(task: Mapping, image_size: int, with_label: bool) -> Compose:
    """The preprocessing of a whole case, shared by prepare, evaluation and inference.

    Its geometric steps can be undone with ``monai.transforms.Invertd``: a prediction comes back
    with the shape and affine of the source.

    Args:
        task: a task as ``read_task`` gives it.
        image_size: side of a slice, S, in pixels.
        with_label: load and map ``label`` too (a path, or a list of paths of masks to unite).
            Volumes are NIfTI, or folders of one DICOM series; their labels NIfTI or DICOM SEG.

    Returns:
        Transforms from ``{"image": path, "label": path}`` to MetaTensors ``image`` (1, S, S, D),
        float32 in [-1, 1], and ``label`` (1, S, S, D), float32 class index. A 2D image is a volume
        with D = 1 and keeps its rows and columns; RGB becomes gray by luminance (ITU-R 601).

    Source: DiffBoost Sec. 4.1; facts, item 13 (the task's ``intensity_per``: percentiles of the
        case in protocol ``sound``, of each slice in protocol ``paper``).
    """
    keys = ["image", "label"] if with_label else ["image"]
    flat = task["layout"] not in VOLUMES
    to_gray = operator.methodcaller("convert", "F")
    pictures = PILReader(converter=to_gray, reverse_indexing=False)
    channel = slice(task["channel"], task["channel"] + 1)
    steps = [
        LoadImaged(keys, reader=pictures) if flat else LoadVolumesd(keys),
        EnsureChannelFirstd(keys),
        Lambdad("image", func=operator.itemgetter(channel)),
    ]
    if not flat:
        steps += [Orientationd(keys, axcodes=AXCODES[task["slice_axis"]], labels=AXIS_LABELS)]
    if with_label:
        steps += [MapLabelsd("label", task)]
    mode = ["trilinear", "nearest-exact"][: len(keys)]  # D is kept: bilinear within a slice
    size = (image_size, image_size, -1)
    steps += [
        _intensity(task["intensity"], per_slice=not flat and task["intensity_per"] == "slice"),
        SmoothSlicesd("image", image_size),
        Resized(keys, spatial_size=size, mode=mode),
    ]
    return Compose(steps)


def intensity_step(preprocessing: Compose) -> int:
    """Position of the intensity transform: the steps before it only load, orient and map labels.

    Args:
        preprocessing: what ``case_preprocessing`` returned.

    Source: engineering choice (prepare checks the source's own values there).
    """
    kinds = [type(transform) for transform in preprocessing.transforms]
    return kinds.index(SmoothSlicesd) - 1


def _intensity(intensity: Mapping, per_slice: bool) -> Transform:
    """The task's intensity policy as a transform of ``image`` to [-1, 1], clipped."""
    low, high = (intensity[key] for key in INTENSITY_KEYS[intensity["policy"]])
    target = {"b_min": -1, "b_max": 1, "clip": True}
    if intensity["policy"] != "percentile":
        return ScaleIntensityRanged("image", low, high, **target)
    scale = ScaleIntensityRangePercentilesd("image", low, high, channel_wise=per_slice, **target)
    if not per_slice:
        return scale
    turn = Transposed("image", (3, 1, 2, 0))  # slices in the place of channels, and back
    # MONAI does not clip a slice that is nearly all of one value, whose percentiles are equal.
    clip = Lambdad("image", func=partial(torch.clamp, min=-1, max=1))
    return Compose([turn, scale, turn, clip])

"""The arms: what a training slice goes through, drawn anew each epoch from its address."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.transforms import (
    Compose,
    EnsureTyped,
    MapTransform,
    OneOf,
    RandAdjustContrastd,
    RandFlipd,
    RandGaussianNoised,
    RandomizableTransform,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    SelectItemsd,
    Transform,
)
from scipy.ndimage import gaussian_filter

from diffboost.data.memory import PictureMemory
from diffboost.segmentation.arms import SYNTHETIC_ARM, split_arm
from diffboost.segmentation.merging import PickVariantd, RandMergeMaskd
from diffboost.segmentation.spatial import RandWarpd

IMAGE_STD = 0.5  # standard deviation of a slice in [-1, 1]; nnU-Net's unit of noise is one of these


class RandLowResolutiond(RandSimulateLowResolutiond):
    """MONAI's, with one zoom for all keys: its own draws one for each (1.6.1).

    Source: engineering choice; see ``augmentation``, which shares draws by slice and variant.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """The items, all shrunk and enlarged by the drawn zoom, or none."""
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        self.sim_lowres_tfm.randomize()
        for key in self.key_iterator(d):
            d[key] = self.sim_lowres_tfm(d[key], randomize=False)
        return d


class RandBrightnessd(RandomizableTransform, MapTransform):
    """Adds one N(0, std) constant to all keys; the range is free afterwards.

    Args:
        keys: images, float (1, H, W).
        std: standard deviation of the constant, in units of the image ([-1, 1] is 2 wide).
        prob: chance to act.

    Source: facts 28, 29 (the released arm undid itself by a min-max rescaling; this one acts).
    """

    def __init__(self, keys: Sequence[str], std: float, prob: float = 1.0) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.std = std

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """The items with the drawn constant added to each key."""
        d = dict(data)
        self.randomize(None)
        if self._do_transform:
            offset = float(self.R.normal(0.0, self.std))
            for key in self.key_iterator(d):
                d[key] = d[key] + offset
        return d


class RandBlurd(RandomizableTransform, MapTransform):
    """Gaussian blur, a sigma drawn per axis and shared by the keys.

    MONAI's RandGaussianSmoothd pads with zeros, which is mid-gray in [-1, 1] and brightens dark
    borders; here the border is repeated.

    Args:
        keys: images, float (1, H, W).
        sigma_px: lowest and highest sigma in pixels.
        prob: chance to act.

    Source: facts 29; nnU-Net v2 GaussianBlurTransform.
    """

    def __init__(self, keys: Sequence[str], sigma_px: Sequence[float], prob: float) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.sigma_px = sigma_px

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """The items with each key blurred by the drawn sigmas."""
        d = dict(data)
        self.randomize(None)
        if self._do_transform:
            sigma = (0.0, *self.R.uniform(*self.sigma_px, size=2))
            for key in self.key_iterator(d):
                blurred = gaussian_filter(np.asarray(d[key]), sigma, mode="nearest")
                d[key] = torch.as_tensor(blurred)
        return d


def _gamma(keys: Sequence[str], prob: float, **options: bool) -> Transform:
    """Gamma 0.7 to 1.5, below and above 1 equally often, as nnU-Net and batchgenerators draw it."""
    halves = [RandAdjustContrastd(keys, 1.0, g, **options) for g in ((0.7, 1.0), (1.0, 1.5))]
    return OneOf([*halves, Compose([])], weights=[prob / 2, prob / 2, 1 - prob])


def _contrast(keys: Sequence[str], prob: float, preserve_range: bool = True) -> Transform:
    """Distance from the slice's mean times 0.75 to 1.25."""
    return RandScaleIntensityFixedMeand(
        keys, factors=0.25, prob=prob, fixed_mean=True, preserve_range=preserve_range
    )


def _mirror(keys: Sequence[str]) -> Transform:
    """Each axis mirrored with chance 0.5, in three of four samples."""
    flips = Compose([RandFlipd(keys, 0.5, spatial_axis=axis) for axis in (0, 1)])
    return OneOf([flips, Compose([])], weights=[0.75, 0.25])


def _nnunet(images: list[str], spatial: list[str], modes: list[str]) -> list[Transform]:
    """nnU-Net v2's 2D training augmentation in its order and with its chances.

    nnU-Net works on z-scored slices. Contrast, gamma, blur and low resolution do not depend on
    offset and scale; its multiplicative brightness is a multiplication about the mean; its noise,
    U(0, 0.1) and used as a standard deviation, is in units of the slice's standard deviation,
    which is taken as IMAGE_STD. Blur and low resolution act per channel with chance 0.5 on top.
    Outside the slice the border is repeated (nnU-Net: zero, its mean).

    Source: nnU-Net v2 nnUNetTrainer.get_training_transforms, batchgeneratorsv2.
    """
    return [
        RandWarpd(spatial, modes, 180, (0.7, 1.4), prob_rotate=0.2, prob_scale=0.2),
        RandGaussianNoised(images, prob=0.1, std=0.1 * IMAGE_STD, sample_std=True),
        RandBlurd(images, (0.5, 1.0), prob=0.2 * 0.5),
        _contrast(images, 0.15, preserve_range=False),
        _contrast(images, 0.15),
        RandLowResolutiond(
            images, prob=0.25 * 0.5, zoom_range=(0.5, 1.0), upsample_mode="bilinear"
        ),
        _gamma(images, 0.1, invert_image=True, retain_stats=True),
        _gamma(images, 0.3, invert_image=False, retain_stats=True),
        *(RandFlipd(spatial, 0.5, spatial_axis=axis) for axis in (0, 1)),
    ]


def _deepstack(images: list[str], spatial: list[str], modes: list[str]) -> list[Transform]:
    """nnU-Net v1's default 2D augmentation, which the released "DeepStack" meant and never called.

    Displacements are in pixels of the slice whatever its size, as in nnU-Net.

    Source: facts 27, 30; nnU-Net v1 default_2D_augmentation_params, batchgenerators.
    """
    return [
        RandWarpd(
            spatial,
            modes,
            degrees=180,
            scale=(0.85, 1.25),
            even_scale=True,
            elastic_alpha=(0, 200),
            elastic_sigma_px=(9, 13),
            prob_rotate=0.2,
            prob_scale=0.2,
            prob_elastic=0.2,
        ),
        _gamma(images, 0.3, invert_image=False, retain_stats=True),
        *(RandFlipd(spatial, 0.5, spatial_axis=axis) for axis in (0, 1)),
    ]


def _classical(name: str, images: list[str]) -> list[Transform]:
    """The transforms of one classical arm.

    Source: facts 29, 30; each one acts (facts 27, 28), and none is followed by a min-max rescaling.
    """
    spatial = [*images, "label"]
    modes = ["bilinear"] * len(images) + ["nearest"]
    match name:
        case "contrast":
            return [_contrast(images, 1.0)]
        case "gamma":
            return [_gamma(images, 1.0)]
        case "brightness":
            return [RandBrightnessd(images, std=0.5)]
        case "noise":
            return [RandGaussianNoised(images, prob=1.0, std=0.05, sample_std=True)]
        case "resolution":
            return [RandBlurd(images, (0.5, 1.5), prob=0.5)]
        case "mirror":
            return [_mirror(spatial)]
        case "rotate":
            return [RandWarpd(spatial, modes, degrees=5, prob_rotate=1.0)]
        case "scale":
            return [RandWarpd(spatial, modes, scale=(0.95, 1.05), prob_scale=1.0)]
        case "deepstack":
            return _deepstack(images, spatial, modes)
        case "nnunet":
            return _nnunet(images, spatial, modes)
    return []  # baseline


def augmentation(
    arm: str, alpha: float = 0.6, patch_size: int = 16, memory: PictureMemory | None = None
) -> Compose:
    """The random transforms of an arm, from a loaded slice to a training sample.

    In: ``image`` float32 and ``label`` uint8, both (1, H, W); with variants also ``variants``, the
    files of the slice's variants. Out: ``image``, ``label``, ``case`` and, in a diffboost arm,
    ``synthetic`` float32 (1, H, W) and ``merge_mask`` float32 (1, H, W). Spatial draws are shared
    by image, synthetic and label, intensity draws by image and synthetic. In the arm "synthetic"
    ``image`` is a variant, and the real slice is not seen.

    Args:
        arm: one of ARMS.
        alpha: chance in [0, 1] that a patch of the merge mask is real (paper: 0.6).
        patch_size: side of such a patch in pixels (paper: 64 of 384).
        memory: keeps decoded variants; None reads their files each time.

    Raises:
        ValueError: unknown arm.

    Source: Sec. 4; facts 22, 23, 27 to 30.
    """
    needs_variants, classical = split_arm(arm)
    merges = needs_variants and arm != SYNTHETIC_ARM
    images = ["image", "synthetic"] if merges else ["image"]
    extra = ["merge_mask"] if merges else []
    variant = "synthetic" if merges else "image"
    return Compose(
        [
            *([PickVariantd(variant, memory)] if needs_variants else []),
            *_classical(classical, images),
            *([RandMergeMaskd(alpha, patch_size)] if merges else []),
            SelectItemsd([*images, *extra, "label", "case"], allow_missing_keys=True),
            EnsureTyped([*images, *extra], dtype=torch.float32, track_meta=False),
            EnsureTyped("label", dtype=torch.uint8, track_meta=False),
        ]
    )

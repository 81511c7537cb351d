"""Spatial augmentation: one drawn map for image, variant and label."""

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.transforms import AffineGrid, MapTransform, RandomizableTransform, Resample
from monai.transforms.utils import create_grid
from scipy.ndimage import gaussian_filter


class RandWarpd(RandomizableTransform, MapTransform):
    """Elastic deformation, rotation and isotropic scaling, each with its own chance, in one go.

    A grid of positions is displaced, rotated and scaled about the center, in this order, and all
    keys are resampled on it once. Images are interpolated bilinearly, labels by nearest neighbor;
    outside the slice the border is repeated in both, so that they stay aligned. MONAI's RandAffined
    has one chance for all and draws a scale per axis; its Rand2DElasticd interpolates a coarse grid
    of displacements where nnU-Net smooths a dense one. Hence this class around AffineGrid and
    Resample.

    Args:
        keys: images and label, (1, H, W); all share the draw.
        modes: interpolation per key, "bilinear" or "nearest".
        degrees: angles are uniform in [-degrees, degrees].
        scale: lowest and highest factor of the sampling grid; above 1 objects get smaller.
        even_scale: draw below and above 1 equally often (nnU-Net v1), not uniformly.
        elastic_alpha: lowest and highest factor of the displacements, which are uniform in
            [-1, 1] px per pixel and axis before they are smoothed.
        elastic_sigma_px: lowest and highest sigma of that Gaussian smoothing, in pixels.
        prob_rotate: chance to rotate.
        prob_scale: chance to scale.
        prob_elastic: chance to deform.

    Source: facts 29, 30; nnU-Net v2 SpatialTransform, v1 (batchgenerators) augment_spatial.
    """

    def __init__(
        self,
        keys: Sequence[str],
        modes: Sequence[str],
        degrees: float = 0.0,
        scale: Sequence[float] = (1.0, 1.0),
        even_scale: bool = False,
        elastic_alpha: Sequence[float] = (0.0, 0.0),
        elastic_sigma_px: Sequence[float] = (1.0, 1.0),
        prob_rotate: float = 0.0,
        prob_scale: float = 0.0,
        prob_elastic: float = 0.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        self.modes = modes
        self.radians = math.radians(degrees)
        self.scale = scale
        self.even_scale = even_scale
        self.elastic_alpha = elastic_alpha
        self.elastic_sigma_px = elastic_sigma_px
        self.probs = (prob_rotate, prob_scale, prob_elastic)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """The items with all keys resampled on one drawn grid; types are kept."""
        d = dict(data)
        rotates, scales, deforms = self.R.uniform(size=3) < self.probs
        if not (rotates or scales or deforms):
            return d
        size = tuple(d[self.first_key(d)].shape[-2:])
        grid = create_grid(size, backend="torch")  # (3, H, W): rows, columns, 1; center 0
        if deforms:
            grid[:2] += self._displacements(size)
        angle = self.R.uniform(-self.radians, self.radians) if rotates else 0.0
        factor = self._factor() if scales else 1.0
        grid, _ = AffineGrid(rotate_params=angle, scale_params=(factor, factor))(grid=grid)
        resample = Resample(padding_mode="border")
        for key, mode in self.key_iterator(d, self.modes):
            moved = resample(d[key], grid, mode=mode)
            d[key] = torch.as_tensor(moved).as_subclass(torch.Tensor).to(d[key].dtype)
        return d

    def _displacements(self, size: tuple[int, int]) -> torch.Tensor:
        """Smooth displacements of rows and columns in pixels, (2, H, W)."""
        alpha = self.R.uniform(*self.elastic_alpha)
        sigma = self.R.uniform(*self.elastic_sigma_px)
        noise = self.R.uniform(-1, 1, size=(2, *size))
        smooth = [gaussian_filter(axis, sigma, mode="constant") for axis in noise]
        return torch.from_numpy(alpha * np.stack(smooth)).float()

    def _factor(self) -> float:
        """The scale factor."""
        low, high = self.scale
        if self.even_scale:
            low, high = (low, 1.0) if self.R.uniform() < 0.5 else (1.0, high)
        return self.R.uniform(low, high)

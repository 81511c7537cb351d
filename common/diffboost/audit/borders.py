"""Borders of labels: moved labels, the rims on both sides, and what differs between them."""

import itertools

import numpy as np
from scipy import ndimage


def half_width_shifts(foreground: np.ndarray) -> list[tuple[int, int]]:
    """The eight moves by half the height or width (two pixels at least) of a mask (H, W)."""
    rows, columns = (np.flatnonzero(foreground.any(axis)) for axis in (1, 0))
    high, wide = (max(2, (line[-1] - line[0] + 2) // 2) for line in (rows, columns))
    return [
        (dy, dx) for dy, dx in itertools.product((-high, 0, high), (-wide, 0, wide)) if dy or dx
    ]


def shifted(maps: np.ndarray, down: int, right: int) -> np.ndarray:
    """Maps (..., H, W), moved; what comes in from outside is 0."""
    moved = np.zeros_like(maps)
    height, width = maps.shape[-2:]
    source = [
        slice(max(-step, 0), size - max(step, 0)) for step, size in ((down, height), (right, width))
    ]
    target = [
        slice(max(step, 0), size - max(-step, 0)) for step, size in ((down, height), (right, width))
    ]
    moved[..., target[0], target[1]] = maps[..., source[0], source[1]]
    return moved


def rims(foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks (H, W) of the pixels just inside and just outside a foreground (H, W)."""
    width = max(1, round(min(foreground.shape) / 24))
    inner = foreground & ~ndimage.binary_erosion(foreground, iterations=width, border_value=1)
    outer = ndimage.binary_dilation(foreground, iterations=width) & ~foreground
    return (inner if inner.any() else foreground), outer


def label_contrast(image: np.ndarray, label: np.ndarray) -> float:
    """How much darker or brighter a foreground is along its border, in standard deviations.

    Args:
        image: float (H, W).
        label: integer (H, W), with foreground.

    Source: engineering choice.
    """
    return abs(rim_contrast(image, *rims(label > 0)))


def rim_contrast(image: np.ndarray, inner: np.ndarray, outer: np.ndarray) -> float:
    """Outside less inside of a border, over the spread there; positive: the inside is darker."""
    inside, outside = image[inner], image[outer]
    if min(len(inside), len(outside)) < 3:
        return 0.0
    spread = np.sqrt((inside.var() + outside.var()) / 2) + 0.05
    return float((outside.mean() - inside.mean()) / spread)


def local_steps(image: np.ndarray, inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Outside less inside of the border near each pixel of the inner rim, (pixels,)."""
    width = min(image.shape) / 32
    sides = []
    for rim in (inner, outer):
        weight = ndimage.gaussian_filter(rim.astype(float), width)
        sides.append(ndimage.gaussian_filter(image * rim, width) / np.maximum(weight, 1e-6))
    return (sides[1] - sides[0])[inner]

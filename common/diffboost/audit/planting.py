"""Planted copies: a training image as a generator might give it away, by which the audit is judged.

Source: engineering choice (issue 5, "Memorization audit").
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

BLACK = -1.0


def plant_copy(image: np.ndarray, kinds: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """A copy of an image, changed in one way or in several, one after the other.

    Args:
        image: float (H, W) in [-1, 1].
        kinds: keys of :data:`KINDS`; they act in its order, whatever theirs.
        rng: draws how much.

    Returns:
        float32 of the same shape and range.

    Source: engineering choice.
    """
    for name, change in KINDS.items():
        if name in kinds:
            image = change(image, rng)
    return np.ascontiguousarray(np.clip(image, -1, 1), dtype=np.float32)


def draw_kinds(rng: np.random.Generator) -> tuple[str, ...]:
    """One, two or three kinds of change, drawn.

    Source: engineering choice.
    """
    return tuple(rng.permutation(list(KINDS))[: rng.integers(1, 4)].tolist())


def _mirror(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.flip(image, int(rng.integers(2)))


def _crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part of 80 to 95 % of each side, anywhere, blown up to the whole."""
    sides = [round(rng.uniform(0.8, 0.95) * image.shape[0])] * 2
    starts = [int(rng.integers(length - side + 1)) for length, side in zip(image.shape, sides)]  # noqa: B905
    part = image[tuple(slice(s, s + side) for s, side in zip(starts, sides, strict=True))]
    zoom = [length / side for length, side in zip(image.shape, sides, strict=True)]
    return ndimage.zoom(part, zoom, order=1, grid_mode=True, mode="nearest")


def _turn(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """By up to 10 degrees either way; the corners stay black or show the mirrored image."""
    mode = ("constant", "reflect")[int(rng.integers(2))]
    degrees = float(rng.uniform(-10, 10))
    return ndimage.rotate(image, degrees, reshape=False, order=1, mode=mode, cval=BLACK)


def _blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As an autoencoder does: a standard deviation of 0.8 to 1.6 % of the side."""
    return ndimage.gaussian_filter(image, rng.uniform(0.008, 0.016) * len(image))


def _gamma(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exponents of 0.6 to 1.65."""
    return 2 * ((image + 1) / 2) ** float(np.exp(rng.uniform(-0.5, 0.5))) - 1


def _noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A standard deviation of 2.5 to 10 % of the range."""
    return image + rng.normal(0, rng.uniform(0.05, 0.2), image.shape)


KINDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "mirrored": _mirror,
    "cropped": _crop,
    "turned": _turn,
    "blurred": _blur,
    "gamma": _gamma,
    "noisy": _noise,
}

"""Defects planted on slices and their labels, and changes that a good variant may show."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from diffboost.audit.borders import half_width_shifts, label_contrast, shifted
from diffboost.conditions.edges import join_edges, mask_edges

KINDS = {
    "shifted": "the label moved by half its width or more",
    "erased": "a visible lesion painted over",
    "stranger": "another case's label",
    "noise": "noise in place of the image",
    "emptied": "an empty label where a lesion is visible",
}
SAME_LABEL = 0.5  # Dice above which another case's label is rather imprecise than wrong
VISIBLE = 0.5  # contrast along the border, in standard deviations, of a lesion worth erasing
LARGEST_SHIFT = 1.5  # in half widths
STAYS_INSIDE = 0.9  # share of a label that a move leaves in the picture


@dataclass(frozen=True)
class Sample:
    """A slice with its label and the edges that it is said to follow.

    Args:
        case: its case.
        image: float (H, W) in [-1, 1].
        label: integer (H, W), class index.
        hint: float (H, W) in [0, 1].
        edges: float (H, W) in [0, 1], found in the image; the hint of another label is made of it.
        kind: what is wrong with it; empty: nothing.

    Source: engineering choice.
    """

    case: str
    image: np.ndarray
    label: np.ndarray
    hint: np.ndarray
    edges: np.ndarray
    kind: str = ""


def plant(
    kind: str, sample: Sample, strangers: list[np.ndarray], rng: np.random.RandomState
) -> Sample | None:
    """A defective copy of a good sample.

    A wrong label brings its own outline into the hint, as prepare would have drawn it: the hint
    alone does not betray it.

    Args:
        kind: one of KINDS.
        sample: a good one.
        strangers: labels of other cases, drawn from for ``stranger``.
        rng: draws direction, length, noise.

    Returns:
        The copy; None where the change would be no defect: the slice has no foreground (but for
        noise), the label fills the picture, its lesion is not visible, all strangers say the same.

    Source: engineering choice (issue 5, "planted_defects").
    """
    if kind == "noise":
        noise = rng.normal(sample.image.mean(), max(sample.image.std(), 0.1), sample.image.shape)
        return replace(sample, image=np.clip(noise, -1, 1).astype(np.float32), kind=kind)
    if not sample.label.any():
        return None
    if kind == "erased":
        if label_contrast(sample.image, sample.label) < VISIBLE:
            return None
        painted = paint_over(sample.image, sample.label > 0, rng)
        if label_contrast(painted, sample.label) > label_contrast(sample.image, sample.label) / 2:
            return None
        return replace(sample, image=painted, kind=kind)
    if kind == "emptied":
        visible = label_contrast(sample.image, sample.label) >= VISIBLE
        label = np.zeros_like(sample.label) if visible else None
    elif kind == "shifted":
        label = _shift(sample.label, rng)
    else:
        label = _strange(sample, strangers, rng)
    if label is None:
        return None
    return replace(sample, label=label, hint=_hint(sample.edges, label), kind=kind)


def _hint(edges: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The hint that ``prepare`` would draw for an image with this label."""
    maps = torch.from_numpy(np.stack([edges, label]).astype(np.float32))[:, None, None]
    return join_edges(maps[0], mask_edges(maps[1]))[0, 0].numpy()


def _shift(label: np.ndarray, rng: np.random.RandomState) -> np.ndarray | None:
    """The label, moved by 1 to LARGEST_SHIFT half widths; None if no move stays inside."""
    moves = half_width_shifts(label > 0)
    for place in rng.permutation(len(moves)):
        length = rng.uniform(1, LARGEST_SHIFT)
        moved = shifted(
            label, *(int(np.sign(step) * np.ceil(abs(step) * length)) for step in moves[place])
        )
        if (moved > 0).sum() >= STAYS_INSIDE * (label > 0).sum():
            return moved
    return None


def _strange(
    sample: Sample, strangers: list[np.ndarray], rng: np.random.RandomState
) -> np.ndarray | None:
    """A label of another case that says something else; None if there is none."""
    for place in rng.permutation(len(strangers)):
        label = strangers[place]
        if label.any() and overlap(label > 0, sample.label > 0) <= SAME_LABEL:
            return label
    return None


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Dice of two masks of one shape, of which one at least has foreground."""
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def paint_over(image: np.ndarray, foreground: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """An image without its lesion: gray levels of the surroundings, texture of another place.

    Args:
        image: float (H, W) in [-1, 1].
        foreground: bool (H, W); a rim around it is painted over too.
        rng: draws where the texture comes from.

    Returns:
        float32 (H, W) in [-1, 1].

    Source: engineering choice.
    """
    width = max(2, round(min(image.shape) / 24))
    hole = ndimage.binary_dilation(foreground, iterations=width)
    if hole.all():
        hole = foreground
    smooth = ndimage.gaussian_filter(image, 2.0)
    nearest = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
    filled = np.where(hole, smooth[tuple(nearest)], smooth)
    filled = ndimage.gaussian_filter(filled, width * 1.5)
    texture = image - smooth
    moves = [tuple(rng.randint(0, side, 2)) for side in [min(image.shape)] * 16]
    best = min(moves, key=lambda move: (np.roll(hole, move, (0, 1)) & hole).sum())
    soft = np.clip(ndimage.gaussian_filter(hole.astype(float), 1.0) * 2, 0, 1) * hole
    painted = filled + np.roll(texture, best, (0, 1))
    return np.clip(soft * painted + (1 - soft) * image, -1, 1).astype(np.float32)


def change_gray_levels(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """An image that shows the same in other gray levels, a little blurred, with a little noise.

    Args:
        image: float (H, W) in [-1, 1].
        rng: draws gamma in [0.7, 1.4], gain in [0.7, 1.1], offset, blur up to 0.8 px, noise.

    Returns:
        float32 (H, W) in [-1, 1].

    Source: engineering choice.
    """
    gray = ((image + 1) / 2) ** np.exp(rng.uniform(np.log(0.7), np.log(1.4)))
    gray = 0.5 + (gray - 0.5) * rng.uniform(0.7, 1.1) + rng.uniform(-0.08, 0.08)
    gray = ndimage.gaussian_filter(gray, rng.uniform(0, 0.8))
    gray = gray + rng.normal(0, rng.uniform(0, 0.03), gray.shape)
    return np.clip(2 * gray - 1, -1, 1).astype(np.float32)

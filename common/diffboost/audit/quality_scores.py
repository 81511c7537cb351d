"""Scores of a slice beside its label: a segmenter's agreement, edges, and plausible gray levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from diffboost.audit.borders import half_width_shifts, local_steps, rim_contrast, rims, shifted
from diffboost.audit.fidelity import correlation

# What each score is about; a rejection's reason is the family that speaks most against a variant.
FAMILIES = {
    "segmenter": (
        "soft_agreement",
        "agreement_over_shifts",
        "agreement_over_near",
        "found_inside",
        "found_border",
        "weakest_found",
    ),
    "border": (
        "contrast",
        "contrast_over_shifts",
        "weakest_contrast",
        "outline_edges",
        "outline_edges_over_shifts",
        "weakest_edges",
    ),
    "edges": ("edge_agreement",),
    "intensity": ("intensity_distance", "texture_distance"),
}
SMALL_SHARE = 0.01  # of a slice; smaller labels are judged apart: they show little to go by
# Slices that are judged apart, by their foreground.
GROUPS = ("large", "small", "empty")
EMPTY_FAMILIES = FAMILIES | {"segmenter": ("found_share", "found_peak"), "border": ()}
WEAKEST = 15  # percentile along a border: a label that is half right has a side without contrast
FARTHEST = 10.0  # robust standard deviations; beyond, a distance says nothing more


def group_of(foreground_share: float) -> str:
    """That of GROUPS to which a label with this share of foreground belongs.

    Source: engineering choice.
    """
    if foreground_share == 0:
        return "empty"
    return "small" if foreground_share < SMALL_SHARE else "large"


@dataclass(frozen=True)
class View:
    """What is seen of an image without its label.

    Args:
        image: float (H, W) in [-1, 1].
        probabilities: float (classes, H, W), the segmenter's.
        edges: float (H, W) in [0, 1], as the store's detector finds them.

    Source: engineering choice.
    """

    image: np.ndarray
    probabilities: np.ndarray
    edges: np.ndarray


@torch.inference_mode()
def view_images(
    images: Sequence[np.ndarray],
    segmenter: Callable[[torch.Tensor], torch.Tensor],
    detector: Callable[[torch.Tensor], torch.Tensor],
    device: str | torch.device = "cpu",
    batch_size: int = 32,
) -> list[View]:
    """Segments images and finds their edges.

    Args:
        images: float (H, W) in [-1, 1], of one size.
        segmenter: (B, 1, H, W) to logits (B, classes, H, W).
        detector: (B, 1, H, W) to edges (B, 1, H, W) in [0, 1].
        device: where both run.
        batch_size: images a pass.

    Source: engineering choice.
    """
    views = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        batch = torch.from_numpy(np.stack(part)[:, None].astype(np.float32)).to(device)
        probabilities = segmenter(batch).float().softmax(1).cpu().numpy()
        edges = detector(batch).cpu().numpy()[:, 0]
        views += [View(*seen) for seen in zip(part, probabilities, edges, strict=True)]
    return views


@dataclass(frozen=True)
class Reference:
    """What is usual in real training slices.

    Args:
        middle: statistic -> median.
        spread: statistic -> half the distance of the 10th and 90th percentile over 1.2816: a
            standard deviation, were they normal.
        darker: whether the foreground is mostly darker than what surrounds it.

    Source: engineering choice.
    """

    middle: dict[str, float]
    spread: dict[str, float]
    darker: bool

    def distance(self, statistics: dict[str, float]) -> float:
        """Root mean square of the robust z-scores of some statistics, FARTHEST at most.

        Those that no real slice has (of the inside, where no slice is labelled) are passed over.
        """
        scores = [
            (value - self.middle[name]) / self.spread[name]
            for name, value in statistics.items()
            if name in self.middle
        ]
        return float(min(np.sqrt(np.mean(np.square(scores))), FARTHEST)) if scores else FARTHEST


def describe_reference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Reference:
    """What is usual in real slices.

    Args:
        pairs: images float (H, W) in [-1, 1] and their labels, integer (H, W).

    Raises:
        ValueError: there is no pair.

    Source: engineering choice.
    """
    if not pairs:
        raise ValueError("pairs: there is no training slice to compare with")
    columns: dict[str, list[float]] = {}
    darker = []
    for image, label in pairs:
        found = _gray_levels(image, label) | _texture(image)
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
        if label.any() and not label.all():
            inner, outer = rims(label > 0)
            darker.append(image[inner].mean() < image[outer].mean())
    low, middle, high = (
        {name: float(np.percentile(values, share)) for name, values in columns.items()}
        for share in (10, 50, 90)
    )
    spread = {name: max((high[name] - low[name]) / (2 * 1.2816), 0.01) for name in columns}
    return Reference(middle, spread, bool(np.mean(darker or [True]) >= 0.5))


def _gray_levels(image: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Mean and spread of the gray levels outside of the label and inside, where there are any."""
    found = {}
    for name, part in (("outside", image[label == 0]), ("inside", image[label > 0])):
        if part.size:
            found |= {f"{name}_mean": float(part.mean()), f"{name}_std": float(part.std())}
    return found


def _texture(image: np.ndarray) -> dict[str, float]:
    """Logarithms of what is left of an image when it is smoothed by 1 and by 2 pixels."""
    fine = image - ndimage.gaussian_filter(image, 1.0)
    coarse = ndimage.gaussian_filter(image, 1.0) - ndimage.gaussian_filter(image, 2.0)
    return {
        "fine_texture": float(np.log(fine.std() + 1e-3)),
        "coarse_texture": float(np.log(coarse.std() + 1e-3)),
    }


def score_sample(
    view: View, label: np.ndarray, hint: np.ndarray, reference: Reference
) -> dict[str, float]:
    """All scores of a slice and its label.

    Args:
        view: the slice as it is seen.
        label: integer (H, W), class index.
        hint: float (H, W) in [0, 1], the edges that it was made from.
        reference: what is usual.

    Returns:
        The scores of FAMILIES; of EMPTY_FAMILIES where the label has no foreground. Larger is
        better except for distances and for what is found where nothing is. ``dice`` beside them.

    Source: engineering choice.
    """
    edge_agreement = np.nan_to_num(correlation(view.edges, hint))
    intensity = reference.distance(_gray_levels(view.image, label))
    found = {
        "edge_agreement": float(edge_agreement),
        "intensity_distance": intensity,
        "texture_distance": reference.distance(_texture(view.image)),
    }
    foreground = 1 - view.probabilities[0]
    if not label.any():
        return found | {
            "dice": float("nan"),
            "found_share": float(foreground.mean()),
            "found_peak": float(np.percentile(foreground, 99)),
        }
    return found | _agreement(view.probabilities, label) | _border(view, label, reference)


def _agreement(probabilities: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Dice of the segmenter with the label, hard and soft, and the latter over altered labels."""
    classes = [number for number in range(1, len(probabilities)) if (label == number).any()]
    masks = np.stack([label == number for number in classes])
    soft = probabilities[classes]
    hard = np.stack([probabilities.argmax(0) == number for number in classes])
    own = _soft_dice(soft, masks)
    shifts = [_soft_dice(soft, shifted(masks, *shift)) for shift in half_width_shifts(label > 0)]
    near = [(dy // 2, dx // 2) for dy, dx in half_width_shifts(label > 0)]
    near = [_soft_dice(soft, shifted(masks, *shift)) for shift in near]
    return {
        "dice": _soft_dice(hard, masks),
        "soft_agreement": own,
        "agreement_over_shifts": own - max(shifts),
        "agreement_over_near": own - max(near),
        "found_inside": float(soft.max(0)[masks.any(0)].mean()),
    }


def _soft_dice(soft: np.ndarray, masks: np.ndarray) -> float:
    """Mean over classes of 2 sum(p m) / (sum p + sum m); of (classes, H, W)."""
    both = (soft * masks).sum((1, 2))
    return float(np.mean(2 * both / (soft.sum((1, 2)) + masks.sum((1, 2)) + 1e-6)))


def _border(view: View, label: np.ndarray, reference: Reference) -> dict[str, float]:
    """Contrast and edges along the label's border, and the same less the best of moved labels.

    NaN where the label has no border within the picture: it fills it.
    """
    foreground = label > 0
    if foreground.all():
        return dict.fromkeys((*FAMILIES["border"], "found_border", "weakest_found"), float("nan"))
    inner, outer = rims(foreground)
    line = ndimage.binary_dilation(foreground) & ~ndimage.binary_erosion(foreground, border_value=1)
    sign = 1 if reference.darker else -1
    shifts = [(0, 0), *half_width_shifts(foreground)]
    contrasts, edges = [], []
    for shift in shifts:
        inside, outside, along = (shifted(mask, *shift) for mask in (inner, outer, line))
        if along.any():
            contrasts.append(sign * rim_contrast(view.image, inside, outside))
            edges.append(float(view.edges[along].mean() - view.edges.mean()))
    spread = view.image[inner | outer].std() + 0.05
    steps = sign * local_steps(view.image, inner, outer) / spread
    found = -local_steps(1 - view.probabilities[0], inner, outer)
    near = ndimage.maximum_filter(view.edges, 3)
    return {
        "contrast": contrasts[0],
        "contrast_over_shifts": contrasts[0] - max(contrasts[1:], default=0.0),
        "weakest_contrast": float(np.percentile(steps, WEAKEST)),
        "found_border": float(found.mean()),
        "weakest_found": float(np.percentile(found, WEAKEST)),
        "weakest_edges": float(np.percentile(near[line], WEAKEST) - view.edges.mean()),
        "outline_edges": edges[0],
        "outline_edges_over_shifts": edges[0] - max(edges[1:], default=0.0),
    }

"""Copies of training images: the nearest one of any image, once turned, mirrored or cropped.

Images are compared in the square frame in which a generator saw them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffboost.data.comparison import (
    LARGEST_COMMON,
    MEASURE_BAND,
    MEASURE_PX,
    NUM_COMMON,
    SEARCH_BAND,
    SEARCH_PX,
    SLICES_A_COMPONENT,
)
from diffboost.data.registration import Likeness, TurnSearch, align, invert, texture

TURNS = (-10, -5, 0, 5, 10, 170, 175, 180, 185, 190)  # degrees; mirrored too, so either axis flips
SCALES = (0.83, 0.91, 1.0, 1.1, 1.22)
SHIFTS = (-0.1, -0.05, 0.0, 0.05, 0.1)  # in sides
NUM_EXAMPLES = 40  # training images from which the search learns its components
NUM_COARSE, NUM_STARTS = 24, 2  # groups that are aligned coarsely, from so many starts
NUM_FINE = 4  # groups that are aligned finely
RING = 0.03  # of the side
LEAST_OVERLAP = 0.5
NOT_FOUND = -1.0  # likeness where nothing overlaps enough


@dataclass(frozen=True)
class Match:
    """The training image that is most like an image.

    ``row`` of the training images; ``likeness`` in [-1, 1]; ``map`` (2, 3): where the image shows
    what the training image shows, in sides from the middle.
    """

    row: int
    likeness: float
    map: Tensor


class CopySearch:
    """Finds the training image, of another patient, that an image is most like.

    Args:
        images: float (N, 1, S, S) in [-1, 1], those of a case one after the other, in their order.
        cases: N names.
        groups: N names; the cases of a group show one patient and stand together.

    Raises:
        ValueError: the images of a case or group do not stand together, or there is one group only.

    Source: engineering choice (issue 5, "Memorization audit").
    """

    def __init__(self, images: Tensor, cases: Sequence[str], groups: Sequence[str]) -> None:
        self.cases, self.groups = np.asarray(cases), np.asarray(groups)
        self.starts = np.flatnonzero(np.r_[True, self.groups[1:] != self.groups[:-1]])
        self.names = self.groups[self.starts]
        for key, names in (("cases", self.cases), ("groups", self.groups)):
            runs = 1 + int((names[1:] != names[:-1]).sum())
            if runs != len(set(names)):
                raise ValueError(f"{key}: the images of one do not stand together")
        if len(self.names) < 2:
            raise ValueError(f"groups: {list(self.names)}; images of two patients are needed")
        self.ends = np.r_[self.starts[1:], len(self.groups)]
        self.coarse, self.fine = _textures(images)
        rows = np.linspace(0, len(images) - 1, min(NUM_EXAMPLES, len(images))).round().astype(int)
        self.search = TurnSearch(self.coarse, SEARCH_PX, rows, TURNS, SCALES, SHIFTS)
        rows = np.arange(len(images))[:: -(-len(images) // LARGEST_COMMON)]
        self.num_components = min(NUM_COMMON, len(rows) // SLICES_A_COMPONENT)
        self.likeness = Likeness(self.fine[rows], self.num_components, MEASURE_PX)
        self.plain = Likeness(self.coarse[:1], 0, SEARCH_PX)

    def nearest(self, image: Tensor, other_than: str | None = None) -> Match:
        """The training image that is most like an image.

        Args:
            image: float (1, S, S) in [-1, 1].
            other_than: a group that does not count; None: all count.

        Source: engineering choice.
        """
        with torch.inference_mode():
            coarse, fine = (textures[0] for textures in _textures(image[None]))
            found = self._align_coarsely(coarse, self._starts(coarse, other_than))
            rows, maps = zip(
                *(near for one in found for near in self._neighbors(*one)), strict=True
            )
            fixed = self.fine[list(rows)]
            moving = fine.expand_as(fixed)
            maps = align(fixed, moving, torch.stack(maps), MEASURE_PX)
            likeness = self._measure(fixed, moving, maps)
        best = int(likeness.argmax())
        return Match(rows[best], float(likeness[best]), maps[best])

    def _measure(self, fixed: Tensor, moving: Tensor, maps: Tensor) -> Tensor:
        """Likeness of aligned pairs; what is common lies right in one of the two only."""
        _, one, overlap = self.likeness.measure(fixed, moving, maps)
        two = self.likeness.measure(moving, fixed, invert(maps))[1]
        return torch.where(overlap < LEAST_OVERLAP, NOT_FOUND, torch.minimum(one, two))

    def _starts(self, coarse: Tensor, other_than: str | None) -> list[tuple[int, Tensor]]:
        """Rows of training images and maps to start from: the best ways of the best groups."""
        scores, maps = (values.numpy() for values in self.search.find(coarse))
        by_group = np.maximum.reduceat(scores, self.starts, axis=1)
        by_group[:, self.names == other_than] = -np.inf
        count = min(NUM_COARSE, len(self.names) - (other_than in set(self.names)))
        starts = []
        for group in np.argsort(-by_group.max(axis=0), kind="stable")[:count]:
            first, end = self.starts[group], self.ends[group]
            for way in np.argsort(-by_group[:, group], kind="stable")[:NUM_STARTS]:
                row = first + int(scores[way, first:end].argmax())
                starts.append((row, self.search.maps[maps[way, row]]))
        return starts

    def _align_coarsely(self, coarse: Tensor, starts: list) -> list[tuple[int, Tensor]]:
        """The best start of each of the best groups, aligned."""
        rows, maps = zip(*starts, strict=True)
        fixed = self.coarse[list(rows)]
        moving = coarse.expand_as(fixed)
        maps = align(fixed, moving, torch.stack(maps), SEARCH_PX)
        scores, _, overlap = self.plain.measure(fixed, moving, maps)
        scores = torch.where(overlap < LEAST_OVERLAP, NOT_FOUND, scores)
        best: dict[str, tuple[int, Tensor]] = {}
        for place in scores.argsort(descending=True).tolist():
            best.setdefault(self.groups[rows[place]], (rows[place], maps[place]))
        return list(best.values())[:NUM_FINE]

    def _neighbors(self, row: int, map_: Tensor) -> list[tuple[int, Tensor]]:
        """A row and the slices beside it in its volume, with the same map."""
        last = len(self.cases) - 1
        near = (n for n in (row - 1, row, row + 1) if 0 <= n <= last)
        return [(n, map_) for n in near if self.cases[n] == self.cases[row]]


def in_place(images: Tensor, others: Tensor) -> Tensor:
    """Correlation (B,) of the textures of images (B, 1, S, S) and of others, as they lie.

    Nothing common is taken out: learned from training images, it would make these less like their
    variants than held-out ones.

    Source: engineering choice.
    """
    with torch.inference_mode():
        first, second = _textures(images)[1], _textures(others)[1]
        maps = torch.eye(2, 3).expand(len(first), -1, -1)
        return Likeness(first[:1], 0, MEASURE_PX).measure(first, second, maps)[0]


def _textures(images: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse and fine textures of images (B, 1, S, S), without the canvas around them."""
    sizes = ((SEARCH_PX, SEARCH_BAND), (MEASURE_PX, MEASURE_BAND))
    return tuple(
        torch.stack([_inside(texture(image, 1.0, side, band), side) for image in images])
        for side, band in sizes
    )


def _inside(canvas: Tensor, side: int) -> Tensor:
    """The middle of a canvas (2, P, P), its mask without a ring in which sampling mixes in zeros.

    With it, alignment is drawn away from crops: of 60 turned crops of BUSI 9 were lost, without 0.
    """
    margin, ring = (canvas.shape[-1] - side) // 2, round(RING * side)
    inside = canvas[:, margin : margin + side, margin : margin + side].clone()
    inside[1] = 0
    inside[1, ring : side - ring, ring : side - ring] = 1
    return inside

"""Likeness of two slices that may be turned, mirrored, cropped or re-encoded copies of each other.

Slices are compared by their texture: the band of details above a slice's coarse forms, with local
contrast evened out. Brightness, gamma and compression hardly change it, while two scans of the same
anatomy differ in it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, interpolate, pad

CANVAS = 1.5  # side of a texture's canvas over ``root_px``: room for an aspect of up to 2.25
FLOOR = 0.03  # of the local contrast, in intensities of [-1, 1]: what is flatter stays flat
TURNS = range(0, 360, 15)  # degrees
SCALES = (0.83, 0.91, 1.0, 1.1, 1.2)  # a crop of 80 % shows things 1.25 times as large
SHIFTS = (-0.075, 0.0, 0.075)  # in roots of the area
DISC = 0.62  # diameter of what the search compares, in roots of the area
NUM_COMPONENTS = 64  # numbers a disc; 99 % of its energy
EVERY = 97  # of the turned discs of a slice, this one goes into the choice of components


def texture(image: Tensor, aspect: float, root_px: int, band: tuple[float, float]) -> Tensor:
    """Texture of a slice, free of its stretch, in the middle of a canvas.

    Args:
        image: float (1, S, S) in [-1, 1].
        aspect: width over height of what was stretched to S x S.
        root_px: root of the slice's area on the canvas, pixels.
        band: standard deviations of the two blurs whose difference is taken, pixels.

    Returns:
        float (2, P, P), P = 1.5 ``root_px``: the texture, 0 outside of the slice, and a mask.

    Source: engineering choice.
    """
    side = 2 * round(root_px * CANVAS / 2)
    # Even sides keep the middle of the slice in that of the canvas, also when it is turned.
    sides = [min(side, max(8, 2 * round(root_px * x / 2))) for x in (aspect**-0.5, aspect**0.5)]
    image = interpolate(image[None], sides, mode="bilinear", antialias=True)
    details = _blur(image, band[0]) - _blur(image, band[1])
    details = details / (_blur(details**2, 4.0).clamp_min(0).sqrt() + FLOOR)
    canvas = torch.zeros(2, side, side)
    row, column = ((side - length) // 2 for length in sides)
    place = canvas[:, row : row + sides[0], column : column + sides[1]]
    place[0], place[1] = details[0, 0], 1
    return canvas


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (1, 1, H, W), mirrored at the borders."""
    radius = min(math.ceil(3 * sigma), *(side - 1 for side in images.shape[-2:]))
    steps = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = torch.softmax(-(steps**2) / (2 * sigma**2), dim=0)
    images = conv2d(pad(images, (radius, radius, 0, 0), "reflect"), kernel.view(1, 1, 1, -1))
    return conv2d(pad(images, (0, 0, radius, radius), "reflect"), kernel.view(1, 1, -1, 1))


def _sample(textures: Tensor, points: Tensor, root_px: int) -> Tensor:
    """(B, C, P, P) at points (B, 2, N), in roots of the area from the middle, as (B, C, N)."""
    grid = points.movedim(1, 2)[:, None] * (2 * root_px / textures.shape[-1])
    return grid_sample(textures, grid, align_corners=False)[:, :, 0]


def _unit(values: Tensor) -> Tensor:
    """Mean 0 and length 1 along the last axis."""
    values = values - values.mean(-1, keepdim=True)
    return values / values.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def _turned_maps(turns: Sequence[int], scales: Sequence[float], shifts: Sequence[float]) -> Tensor:
    """All maps of the search, (T, 2, 3): mirrored or not, turned, scaled, shifted."""
    maps = []
    for mirror in (1, -1):
        for degrees in turns:
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            turn = torch.tensor([[mirror * cos, -sin], [mirror * sin, cos]])
            for scale in scales:
                for shift in ((x, y) for x in shifts for y in shifts):
                    maps.append(torch.cat([scale * turn, torch.tensor(shift)[:, None]], dim=1))
    return torch.stack(maps)


class TurnSearch:
    """Says of any slice which others may be copies of it, and how they would be turned.

    Discs in the middle of slices, as they are, are compared with discs cut out of a slice by every
    map of a grid of turns, scales, shifts and mirrorings.

    Args:
        textures: float (N, 2, P, P), see :func:`texture`.
        root_px: root of the area, pixels.
        examples: slices from which the components of discs are learned.
        turns: degrees; each also of the mirrored slice.
        scales: of a turned slice's details.
        shifts: along both axes, in roots of the area.

    Source: engineering choice; principal components of patches, whitened.
    """

    def __init__(
        self,
        textures: Tensor,
        root_px: int,
        examples: Sequence[int],
        turns: Sequence[int] = TURNS,
        scales: Sequence[float] = SCALES,
        shifts: Sequence[float] = SHIFTS,
    ) -> None:
        self.root_px, self.num_ways = root_px, 2 * len(turns)
        count = round(root_px * DISC)
        line = (torch.arange(count) - (count - 1) / 2) / root_px
        y, x = torch.meshgrid(line, line, indexing="ij")
        inside = x**2 + y**2 <= (DISC / 2) ** 2
        disc = torch.stack([x[inside], y[inside], torch.ones(int(inside.sum()))])
        self.maps = _turned_maps(turns, scales, shifts)
        self.points = (self.maps @ disc).movedim(1, 0)  # (2, T, D)
        turned = torch.cat([self._turned(textures[number])[::EVERY] for number in examples])
        spread, axes = torch.linalg.eigh(turned.T @ turned)  # ascending
        spread, axes = spread[-NUM_COMPONENTS:], axes[:, -NUM_COMPONENTS:]
        self.components = axes / (spread.clamp_min(0) + 1e-3 * spread[-1] + 1e-6).sqrt()
        discs = _sample(textures[:, :1], disc[:2].expand(len(textures), -1, -1), root_px)
        self.discs = self._project(_unit(discs[:, 0]))

    def _turned(self, slice_: Tensor) -> Tensor:
        """The discs that all maps cut out of a slice's texture, (T, D)."""
        values = _sample(slice_[None, :1], self.points.flatten(1)[None], self.root_px)
        return _unit(values.view(self.points.shape[1:]))

    def _project(self, discs: Tensor) -> Tensor:
        values = discs @ self.components
        return values / values.norm(dim=1, keepdim=True).clamp_min(1e-6)

    def find(self, slice_: Tensor) -> tuple[Tensor, Tensor]:
        """How well every slice correlates with this one, for each way of turning it.

        Args:
            slice_: float (2, P, P), texture of the slice to turn; it need not be one of the store.

        Returns:
            (W, N) the best correlations over scales and shifts, for W angles and mirrorings, and
            (W, N) the rows of ``maps`` that give them.

        Source: engineering choice.
        """
        scores = self._project(self._turned(slice_)) @ self.discs.T
        ways = scores.view(self.num_ways, -1, scores.shape[1])
        best, rows = ways.max(dim=1)
        return best, rows + ways.shape[1] * torch.arange(len(ways))[:, None]


def align(fixed: Tensor, moving: Tensor, maps: Tensor, root_px: int, steps: int = 8) -> Tensor:
    """Affine maps that lay ``moving`` onto ``fixed``, by Gauss-Newton on standardized textures.

    Args:
        fixed: float (B, 2, P, P), textures with masks.
        moving: the same.
        maps: float (B, 2, 3), where to start: ``moving`` at map(p) should look like ``fixed`` at p;
            in roots of the area from the middle.
        root_px: root of the area, pixels.
        steps: how often the maps are bettered.

    Returns:
        float (B, 2, 3).

    Source: Baker and Matthews, Lucas-Kanade 20 years on (2004), forward additive.
    """
    shown = fixed[:, 1].flatten(1).any(0)  # the other places of the canvas count for none
    places = _places(fixed.shape[-1], root_px)[:, shown]
    rows, columns = torch.gradient(moving[:, 0], dim=(1, 2))
    stack = torch.cat([moving, torch.stack([columns, rows], dim=1) * root_px], dim=1)
    target, inside = fixed.flatten(2)[:, :, shown].unbind(1)
    for _ in range(steps):
        warped, mask, *slopes = _sample(stack, maps @ places, root_px).unbind(1)
        mask = inside * (mask > 0.5)
        wanted, _ = _standardize(target, mask)
        found, spread = _standardize(warped, mask)
        slopes = torch.stack(slopes, dim=1) / spread[:, None]
        jacobian = (slopes[:, :, None] * places * mask[:, None, None]).flatten(1, 2)  # (B, 6, N)
        hessian = jacobian @ jacobian.mT
        hessian += torch.diag_embed(1e-3 * hessian.diagonal(dim1=1, dim2=2) + 1e-3)
        step = torch.linalg.solve(hessian, jacobian @ (wanted - found)[..., None])
        maps = maps + step.view(-1, 2, 3).clamp(-0.05, 0.05)
    return maps


def _places(side: int, root_px: int) -> Tensor:
    """Homogeneous coordinates of a canvas's pixels, (3, P * P), in roots of the area."""
    line = (torch.arange(side) + 0.5 - side / 2) / root_px
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten(), torch.ones(side * side)])


def _standardize(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B, N) with mean 0 and deviation 1 on the mask, 0 outside; the deviations (B, 1)."""
    count = mask.sum(1, keepdim=True).clamp_min(1)
    values = (values - (values * mask).sum(1, keepdim=True) / count) * mask
    spread = ((values**2).sum(1, keepdim=True) / count).sqrt().clamp_min(1e-4)
    return values / spread, spread


def invert(maps: Tensor) -> Tensor:
    """The inverse of affine maps (B, 2, 3).

    Source: engineering choice.
    """
    turn = torch.linalg.pinv(maps[:, :, :2])
    return torch.cat([turn, -turn @ maps[:, :, 2:]], dim=2)


class Likeness:
    """Correlation of aligned textures, without what the slices of a data set have in common.

    Scans of one organ in one position resemble each other. The mean and the principal components of
    the data set's slices, where they lie, are taken out of both before they are compared.

    Args:
        common: float (N, 2, P, P), slices from which they are learned, none twice.
        num_components: how many; 0 takes nothing out.
        root_px: root of the area, pixels.

    Source: engineering choice.
    """

    def __init__(self, common: Tensor, num_components: int, root_px: int) -> None:
        values = common[:, 0].flatten(1).float()
        self.root_px = root_px
        self.mean = values.mean(0) * (num_components > 0)
        values = values - self.mean
        spread, axes = torch.linalg.eigh(values @ values.T)  # ascending
        first = len(spread) - num_components
        axes = values.T @ axes[:, first:]
        self.components = axes / spread[first:].clamp_min(1e-6).sqrt()

    def measure(self, fixed: Tensor, moving: Tensor, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Plain correlation, likeness and overlap of pairs.

        Args:
            fixed: float (B, 2, P, P).
            moving: the same.
            maps: float (B, 2, 3) of :func:`align`.

        Returns:
            Three float (B,): correlation with everything in, in [-1, 1]; likeness in [-1, 1]; the
            part of the smaller slice that both show.

        Source: engineering choice.
        """
        places = _places(fixed.shape[-1], self.root_px)
        warped, mask = _sample(moving, maps @ places, self.root_px).unbind(1)
        target, inside = fixed.flatten(2).unbind(1)
        mask = inside * (mask > 0.5)
        plain = _correlate(target, warped, mask)
        area = torch.minimum(inside.sum(1), moving[:, 1].flatten(1).sum(1))
        likeness = _correlate(self.remainder(target, mask), self.remainder(warped, mask), mask)
        return plain, likeness, mask.sum(1) / area.clamp_min(1)

    def remainder(self, values: Tensor, mask: Tensor) -> Tensor:
        """Textures (B, N) minus what is common, fitted on the mask."""
        values = (values - self.mean) * mask
        if not self.components.shape[1]:
            return values
        rest = []
        for value, inside in zip(values, mask, strict=True):
            axes = self.components * inside[:, None]
            gram = axes.T @ axes + 1e-2 * torch.eye(axes.shape[1])
            rest.append((value - axes @ torch.linalg.solve(gram, axes.T @ value)) * inside)
        return torch.stack(rest)


def _correlate(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Pearson correlation (B,) of (B, N) on the mask; 0 where one of them is flat."""
    first, second = (_standardize(values, mask)[0] for values in (first, second))
    return (first * second).sum(1) / mask.sum(1).clamp_min(1)

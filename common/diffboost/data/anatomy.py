"""Smooth random shapes on a warped grid: the pen that draws every phantom."""

from dataclasses import dataclass, field

import numpy as np
from scipy import fft

from diffboost.data.tissues import FINDING_TISSUES

OVERSAMPLING = (
    2  # shapes are drawn this much finer than the image, so that borders hold mixed pixels
)


@dataclass
class Grid:
    """Coordinates of a stack of slices, warped and posed.

    Args:
        x: (D, H, W) float32, patient left is positive; the body spans about [-1, 1].
        y: (D, H, W) float32, down (posterior, or depth below the probe) is positive.
        z: (D, 1, 1) float32 slice position in [-1, 1].

    Source: engineering choice.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray


def smooth_field(rng: np.random.Generator, shape: tuple, sigma: tuple) -> np.ndarray:
    """Gaussian random field of zero mean and unit standard deviation.

    Args:
        rng: source of the draw.
        shape: shape of the field.
        sigma: correlation length along each axis, in samples.

    Returns:
        float32 array of ``shape``.

    Source: engineering choice.
    """
    spectrum = fft.rfftn(rng.standard_normal(shape, dtype=np.float32))
    for axis, (size, length) in enumerate(zip(shape, sigma, strict=True)):
        last = axis == len(shape) - 1
        frequency = (fft.rfftfreq if last else fft.fftfreq)(size)
        decay = np.exp(-2 * (np.pi * frequency * length) ** 2).astype(np.float32)
        spectrum *= decay.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    values = fft.irfftn(spectrum, s=shape)
    values -= values.mean()
    return values / (values.std() + 1e-6)


def posed_grid(
    rng: np.random.Generator,
    size: int,
    z: np.ndarray,
    zoom: tuple = (0.85, 1.15),
    rotation: float = 0.2,
    shift: float = 0.1,
    warp: float = 0.03,
) -> Grid:
    """A grid in a random pose under a smooth random warp, which bends all shapes alike.

    Args:
        rng: source of the draw.
        size: samples along a side (image size times ``OVERSAMPLING``).
        z: (D,) slice positions in [-1, 1].
        zoom: range of magnification; above 1 the anatomy is larger than the image.
        rotation: largest angle either way, radians.
        shift: largest move either way, in half image sides.
        warp: standard deviation of the displacement, in half image sides.

    Source: engineering choice.
    """
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    shape = (len(z), size, size)
    length = size * rng.uniform(0.07, 0.2)
    bends = [smooth_field(rng, shape, (len(z) / 4, length, length)) for _ in range(2)]
    x = axis[None, None, :] + rng.uniform(-shift, shift) + warp * bends[0]
    y = axis[None, :, None] + rng.uniform(-shift, shift) + warp * bends[1]
    angle = rng.uniform(-rotation, rotation)
    scale = rng.uniform(*zoom) * np.exp(rng.uniform(-0.1, 0.1, 2))
    turned_x = (np.cos(angle) * x + np.sin(angle) * y) / scale[0]
    turned_y = (np.cos(angle) * y - np.sin(angle) * x) / scale[1]
    return Grid(
        turned_x.astype(np.float32),
        turned_y.astype(np.float32),
        np.asarray(z, np.float32)[:, None, None],
    )


def step(distance: np.ndarray, soft: float) -> np.ndarray:
    """Cover in [0, 1] of points at a signed ``distance`` inside a border of width ``soft``."""
    t = np.clip(distance / soft + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


@dataclass
class Canvas:
    """A scene under construction: tissues painted over one another.

    Args:
        grid: where the samples lie.
        rng: source of every draw.
        layers: (tissue, cover (D, H, W) in [0, 1]) in painting order.
        soft: width of an ordinary border, in half image sides.

    Source: engineering choice.
    """

    grid: Grid
    rng: np.random.Generator
    layers: list = field(default_factory=list)
    soft: float = 0.03

    def near(self, value: float, spread: float) -> float:
        """A draw from ``value`` - ``spread`` to ``value`` + ``spread``."""
        return self.rng.uniform(value - spread, value + spread)

    def add(self, tissue: str, cover: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
        """Paint a cover (D, H, W) in [0, 1], cut to ``inside``; returns what was painted."""
        cover = cover if inside is None else cover * inside
        self.layers.append((tissue, np.broadcast_to(cover, self.grid.x.shape)))
        return cover

    def fill(self, tissue: str) -> np.ndarray:
        """Paint everywhere."""
        return self.add(tissue, np.ones(self.grid.x.shape, np.float32))

    def blob(
        self,
        tissue: str | None,
        center: tuple,
        radii: tuple,
        angle: float = 0.0,
        wobble: float = 0.1,
        bend: float = 0.0,
        z_span: tuple = (0.0, 9.0),
        drift: float = 0.0,
        soft: float | None = None,
        inside: np.ndarray | None = None,
        capsule: float = 0.0,
    ) -> np.ndarray:
        """Paint an ellipsoid with a Fourier-perturbed outline (``tissue`` None: only compute it).

        Args:
            tissue: what it is made of.
            center: (x, y).
            radii: half axes before ``angle`` (radians) turns them.
            wobble: relative size of the outline's harmonics.
            bend: curvature of the long axis; 1 makes a banana.
            z_span: center and half height along z; the radius shrinks to 0 at the ends.
            drift: largest sideways move along z.
            soft: width of the border (None: the canvas's).
            inside: cover to cut with.
            capsule: thickness of a layer of fat around it.

        Returns:
            Cover (D, H, W) float32 in [0, 1].
        """
        grid, rng = self.grid, self.rng
        height = grid.z - z_span[0]
        moves = rng.uniform(-drift, drift, 2)
        dx, dy = grid.x - center[0] - moves[0] * height, grid.y - center[1] - moves[1] * height
        u = (np.cos(angle) * dx + np.sin(angle) * dy) / radii[0]
        v = (np.cos(angle) * dy - np.sin(angle) * dx) / radii[1]
        v = v + bend * radii[0] / radii[1] * (u * u - 0.4)
        point = u + 1j * v
        rho = np.abs(point)
        direction = point / (rho + 1e-6)
        outline, power = np.float32(1), direction
        for k in range(2, 7):
            size = wobble * rng.normal() / np.sqrt(k)
            turn = np.exp(1j * (rng.uniform(0, 2 * np.pi) + rng.normal() * height))
            power = power * direction
            outline = outline + (size * turn.astype(np.complex64) * power).real
        flat = np.sqrt(np.clip(1 - (height / z_span[1]) ** 2, 0, None))
        distance = (outline * flat - rho) * np.float32(np.sqrt(radii[0] * radii[1]))
        if capsule:
            self.add("fat", step(distance + capsule - (flat <= 0), self.soft), inside)
        cover = step(distance - (flat <= 0), soft or self.soft).astype(np.float32)
        if tissue is None:
            return cover if inside is None else cover * inside
        return self.add(tissue, cover, inside)

    def below(self, level: float, waves: float, soft: float | None = None) -> np.ndarray:
        """Cover (D, H, W) of all below a wavy surface at depth ``level`` (waves: its height)."""
        surface = level
        for k in range(1, 5):
            phase = self.rng.uniform(0, 2 * np.pi) + self.rng.normal() * self.grid.z
            surface = surface + waves * self.rng.normal() / k * np.sin(
                1.6 * k * self.grid.x + phase
            )
        return step(self.grid.y - surface, soft or self.soft)

    def clumps(self, sigma: tuple, fraction: float, soft: float = 0.5) -> np.ndarray:
        """Cover (D, H, W) of a thresholded random field: ``fraction`` of the area, ragged patches.

        ``sigma`` is the correlation length (y, x) in half image sides, ``soft`` a field's spread.
        """
        depth, size, _ = self.grid.x.shape
        lengths = (depth / 6, sigma[0] * size / 2, sigma[1] * size / 2)
        values = smooth_field(self.rng, self.grid.x.shape, lengths)
        return step(values - np.quantile(values, 1 - fraction), soft)

    def finding(self, kind: str, center: tuple, radius: float, inside: np.ndarray | None) -> None:
        """Paint a finding of a kind (a key of ``FINDING_TISSUES``) of about ``radius``."""
        rng = self.rng
        tissue = FINDING_TISSUES[kind]
        angle, radii = rng.uniform(0, np.pi), radius * np.exp(rng.normal(0, 0.2, 2))
        if kind in ("calcification", "stone"):
            for _ in range(rng.integers(1, 3) if kind == "stone" else rng.integers(3, 8)):
                at = np.array(center) + rng.normal(0, radius * 0.6, 2)
                self.blob(tissue, at, radius * rng.uniform(0.15, 0.4, 2), inside=inside, soft=0.02)
        elif kind in ("cyst", "nodule"):
            self.blob(tissue, center, radii, angle, 0.05, inside=inside)
        elif kind == "mass":
            rim = self.blob(tissue, center, 1.25 * radii, angle, 0.15, inside=inside)
            self.blob("necrosis", center, radii * rng.uniform(0.3, 0.7), angle, 0.2, inside=rim)
        else:
            soft = rng.uniform(0.02, 0.12)
            self.blob(tissue, center, radii, angle, rng.uniform(0.1, 0.3), soft=soft, inside=inside)

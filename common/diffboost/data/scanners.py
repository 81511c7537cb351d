"""The physics that makes modalities look different: CT, MR and ultrasound of one painted scene."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from diffboost.data.anatomy import OVERSAMPLING, smooth_field
from diffboost.data.tissues import TISSUES


@dataclass(frozen=True)
class MRScanner:
    """Ranges from which one MR acquisition is drawn.

    Args:
        tr_ms, te_ms: repetition and echo time.
        ti_ms: inversion time, (0, 0) without inversion.
        fat_suppression: chance that fat's signal is suppressed.
        scatter: log spread of the tissues' relaxation times and density between patients.
        bias: log spread of the smooth coil sensitivity.
        noise: Rician noise, relative to the brightest tissue.
        blur_px: point spread (standard deviation), image pixels.
        arbitrary: chance that tissues answer with any brightness at all.

    Source: engineering choice.
    """

    tr_ms: tuple
    te_ms: tuple
    ti_ms: tuple = (0, 0)
    fat_suppression: float = 0.25
    scatter: float = 0.12
    bias: tuple = (0.05, 0.35)
    noise: tuple = (0.005, 0.05)
    blur_px: tuple = (0.2, 0.8)
    arbitrary: float = 0.25


MR_FAMILY = {
    "t1": MRScanner((250, 800), (5, 20)),
    "t2": MRScanner((2500, 6000), (60, 130)),
    "pd": MRScanner((1500, 4000), (8, 35)),
    "inversion": MRScanner((1800, 4000), (3, 15), (350, 1100)),
    "flair": MRScanner((7000, 10000), (70, 130), (2000, 2600)),
}


# The 3D task's training scanner is one narrow T1 weighting; its test scanners are the rest of the
# family. Each stands for a range that the tree's MR images are drawn from, too.
TASK_TRAINING = (
    MRScanner((420, 520), (9, 12), (0, 0), 0.0, 0.04, (0.05, 0.15), (0.015, 0.03), (0.3, 0.4), 0.0),
)
TASK_TEST = tuple(
    replace(
        MR_FAMILY[name],
        scatter=0.06,
        arbitrary=0.0,
        bias=(0.05, 0.25),
        noise=(0.01, 0.035),
        blur_px=(0.2, 0.6),
    )
    for name in ("pd", "inversion", "t1", "t1", "t2")
)


def paint(layers: list, values: dict) -> np.ndarray:
    """Lay the layers' values over one another.

    Args:
        layers: (tissue, cover (D, H, W) in [0, 1]), the first at the bottom.
        values: a number for every tissue in use.

    Returns:
        (D, H, W) float32.

    Source: engineering choice.
    """
    image = np.zeros(layers[0][1].shape, np.float32)
    for tissue, cover in layers:
        image += cover * (np.float32(values[tissue]) - image)
    return image


TAKE_UP_CONTRAST = ("vessel", "kidney", "spleen", "liver", "tumor")  # of a CT's contrast agent


def average_down(image: np.ndarray) -> np.ndarray:
    """Area average (D, H, W) -> (D, H / OVERSAMPLING, W / OVERSAMPLING)."""
    depth, height, width = image.shape
    k = OVERSAMPLING
    return image.reshape(depth, height // k, k, width // k, k).mean((2, 4))


def _texture(rng: np.random.Generator, layers: list) -> np.ndarray:
    """Inner variation (D, H, W): a fine and a coarse field, as strong as each tissue says."""
    shape = layers[0][1].shape
    used = {name for name, _ in layers}
    image = np.zeros(shape, np.float32)
    for low, high in ((0.008, 0.025), (0.03, 0.09)):
        gains = {t: TISSUES[t].texture * np.exp(rng.normal(0, 0.5)) for t in sorted(used)}
        length = shape[-1] * rng.uniform(low, high)
        image += paint(layers, gains) * smooth_field(rng, shape, (0.5, length, length))
    return image


def ct(rng: np.random.Generator, layers: list, window_hu: tuple) -> np.ndarray:
    """CT image: densities, streaks, quantum noise, display window.

    Args:
        rng: source of the draw.
        layers: the scene, (tissue, cover (D, H, W)).
        window_hu: level and width, varied a little.

    Returns:
        (D, H / 2, W / 2) float32 in [0, 1].

    Source: engineering choice.
    """
    used = sorted({name for name, _ in layers})
    hu = {t: TISSUES[t].hu + rng.normal(0, 8) for t in used}
    if rng.random() < 0.5:  # contrast agent
        for t in used:  # sorted: the order of a set is another one in every process
            if t in TAKE_UP_CONTRAST:
                hu[t] += rng.uniform(20, 120)
    density = paint(layers, hu) + 90 * _texture(rng, layers)
    image = gaussian_filter(average_down(density), (0, *[rng.uniform(0.2, 0.7)] * 2))
    size = image.shape[-1]
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise = noise - rng.uniform(0.3, 0.9) * gaussian_filter(noise, (0, 1, 1))
    image += rng.uniform(4, 28) * noise * np.exp(-3 * (x**2 + y**2))
    if rng.random() < 0.35:  # photon starvation and metal: rays from a dense point
        cy, cx = rng.uniform(-0.35, 0.35, 2)
        rays = smooth_field(rng, (256,), (rng.uniform(0.8, 3),))
        angle = np.arctan2(y - cy, x - cx) % np.pi / np.pi * 255
        streaks = map_coordinates(rays, [angle], order=1, mode="wrap")
        image += rng.uniform(8, 35) * streaks * np.exp(-3 * np.hypot(y - cy, x - cx))
    level = window_hu[0] + window_hu[1] * rng.uniform(-0.08, 0.08)
    width = window_hu[1] * rng.uniform(0.7, 1.3)
    return np.clip((image - level) / width + 0.5, 0, 1)


def mr_signals(rng: np.random.Generator, tissues: list, scanner: MRScanner) -> dict:
    """Brightness of every tissue in one acquisition, the brightest body tissue at 1.

    Args:
        rng: source of the draw.
        tissues: names, in a fixed order.
        scanner: ranges of the sequence.

    Source: engineering choice (spin echo and inversion recovery equations).
    """
    tr, te, ti = (rng.uniform(*r) for r in (scanner.tr_ms, scanner.te_ms, scanner.ti_ms))
    suppressed = rng.random() < scanner.fat_suppression
    arbitrary = rng.random() < scanner.arbitrary
    flow_void = rng.random() < 0.5
    signals = {}
    for name in tissues:
        tissue = TISSUES[name]
        t1, t2, density = np.array([tissue.t1_ms, tissue.t2_ms, tissue.density]) * np.exp(
            rng.normal(0, scanner.scatter, 3) * (1, 1, 0.5)
        )
        inversion = 2 * np.exp(-ti / t1) if ti > 0 else 0
        signal = density * abs(1 - inversion + (2 * (ti > 0) - 1) * np.exp(-tr / t1))
        signal *= np.exp(-te / t2)
        if suppressed and name in ("fat", "marrow", "sinus"):
            signal *= 0.2
        if flow_void and name == "vessel":
            signal *= 0.1
        if arbitrary and tissue.density > 0.2:
            signal = rng.uniform(0.05, 1)
        signals[name] = signal
    top = max(signals.values())
    return {name: signal / top for name, signal in signals.items()}


def mr(rng: np.random.Generator, layers: list, scanner: MRScanner) -> np.ndarray:
    """MR image: contrast weighting, coil bias, blur, ghosts, Rician noise.

    Args:
        rng: source of the draw.
        layers: the scene, (tissue, cover (D, H, W)).
        scanner: ranges of the acquisition.

    Returns:
        (D, H / 2, W / 2) float32 ≥ 0, scaled so that 1 is its 99.5th percentile.

    Source: engineering choice.
    """
    signals = mr_signals(rng, sorted({name for name, _ in layers}), scanner)
    image = average_down(paint(layers, signals) * np.clip(1 + 1.4 * _texture(rng, layers), 0, None))
    depth, size, _ = image.shape
    length = size * rng.uniform(0.2, 0.5)
    coil = smooth_field(rng, (depth, size, size), (depth / 2, length, length))
    image *= np.exp(rng.uniform(*scanner.bias) * coil)
    image = gaussian_filter(image, (0, *[rng.uniform(*scanner.blur_px)] * 2))
    if rng.random() < 0.15:  # motion along the phase direction
        image += rng.uniform(0.03, 0.12) * np.roll(
            image, rng.integers(4, size - 4), rng.integers(1, 3)
        )
    noise = rng.uniform(*scanner.noise) * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + noise[0], noise[1])
    return (image / np.percentile(image, 99.5)).astype(np.float32)


def _fan(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """A (1, H, W) beam image as a convex probe shows it: curved, black outside the sector."""
    size = image.shape[-1]
    y, x = np.mgrid[:size, :size].astype(np.float32) / (size - 1)
    radius, half_angle = rng.uniform(0.25, 0.8), rng.uniform(0.45, 0.8)
    dx, dy = x - rng.uniform(0.45, 0.55), y + radius * np.cos(half_angle)
    rows = (np.hypot(dx, dy) - radius) * (size - 1)
    columns = (np.arctan2(dx, dy) / half_angle + 1) * (size - 1) / 2
    return map_coordinates(image[0], [rows, columns], order=1, mode="constant")[None]


def us(rng: np.random.Generator, layers: list, fan: float = 0.0) -> np.ndarray:
    """Ultrasound image: speckle, attenuation and gain, shadow, enhancement, log compression.

    Args:
        rng: source of the draw.
        layers: the scene, (tissue, cover (1, H, W)), the probe at the top.
        fan: chance of a convex probe.

    Returns:
        (1, H / 2, W / 2) float32 in [0, 1].

    Source: engineering choice.
    """
    shape = layers[0][1].shape
    size = shape[-1]
    used = sorted({name for name, _ in layers})
    echo = paint(layers, {t: TISSUES[t].echo_db + rng.normal(0, 2.5) for t in used})
    echo += 16 * _texture(rng, layers)
    sheets = smooth_field(
        rng, shape, (0, size * rng.uniform(0.01, 0.025), size * rng.uniform(0.06, 0.2))
    )
    ridges = np.exp(-((sheets / rng.uniform(0.15, 0.4)) ** 2))
    echo += paint(layers, {t: TISSUES[t].strands_db * rng.uniform(0.6, 1.5) for t in used}) * ridges
    edge = gaussian_filter(echo, (0, 1, 3), order=(0, 1, 0))
    echo += rng.uniform(0.3, 1.5) * np.clip(np.abs(edge), 0, 8)  # interfaces across the beam
    loss = paint(layers, {t: TISSUES[t].attenuation_db * rng.uniform(0.5, 1.3) for t in used})
    shadow = np.cumsum(gaussian_filter(loss, (0, 0, 2)), 1) * 2 / size
    depth = np.linspace(0, 1, size, dtype=np.float32)[None, :, None]
    gain = rng.uniform(-4, 12) * depth + rng.uniform(0, 6) * np.exp(
        -((depth - rng.random()) ** 2) * 20
    )
    amplitude = 10 ** ((echo - shadow + gain - 14 * depth) / 20)
    axial, lateral = size * rng.uniform(0.004, 0.009), size * rng.uniform(0.008, 0.022)
    power = np.zeros(shape, np.float32)
    looks = rng.integers(2, 8)
    for _ in range(looks):
        field = rng.standard_normal((2, *shape), dtype=np.float32) * amplitude
        near = gaussian_filter(field, (0, 0, axial, lateral * 0.6), truncate=3)
        far = gaussian_filter(field, (0, 0, axial, lateral * 1.6), truncate=3)
        power += ((near * (1 - depth) + far * depth * 1.5) ** 2).sum(0) / looks
    level = 10 * np.log10(power + 1e-8)
    span = rng.uniform(38, 58)
    image = np.clip((level - np.percentile(level, rng.uniform(98, 99.8))) / span + 1, 0, 1)
    image = average_down(_fan(rng, image) if rng.random() < fan else image)
    return image ** rng.uniform(1.0, 2.2)

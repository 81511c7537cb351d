"""A tree of phantom images in RadImageNet's layout, made on the fly."""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffboost.data import bodies, bodies_us
from diffboost.data.anatomy import OVERSAMPLING, Canvas, posed_grid
from diffboost.data.scanners import MR_FAMILY, ct, mr, us
from diffboost.files import write_aside

logger = logging.getLogger(__name__)

RECORD = "parameters.json"  # of the phantoms, while their folder is not whole


@dataclass(frozen=True)
class Region:
    """A region of the body as one modality shows it.

    Args:
        body: paints the anatomy with a finding on a canvas.
        findings: names of the findings, "normal" first.
        pose: keyword arguments of ``posed_grid``.
        windows_hu: (level, width) choices, CT only.
        fan: chance of a convex probe, US only.
        scanners: keys of ``MR_FAMILY`` to draw from, MR only.

    Source: engineering choice.
    """

    body: Callable
    findings: tuple
    pose: dict
    windows_hu: tuple = ()
    fan: float = 0.0
    scanners: tuple = tuple(MR_FAMILY)


AXIAL = {"zoom": (0.95, 1.6), "rotation": 0.3, "shift": 0.12, "warp": 0.025}
CLOSE = {"zoom": (0.8, 1.8), "rotation": np.pi, "shift": 0.25, "warp": 0.06}
PROBE = {"zoom": (0.8, 1.3), "rotation": 0.05, "shift": 0.05, "warp": 0.025}
SOFT_HU, LUNG_HU = ((40, 400), (50, 250), (50, 700)), ((-500, 1400), (-600, 1000), (40, 450))
HEAD_HU = ((35, 90), (40, 150), (60, 300))
MASSES = ("normal", "lesion", "cyst", "mass")
# A finding named twice gets twice the images: breast lesions are a task.
BREAST = ("normal", "lesion", "mass", "cyst", "lesion", "calcification")
HIPPOCAMPUS = ("normal", "atrophy", "sclerosis", "cyst")
THYROID = ("normal", "nodule", "cyst", "calcification")
CRISP = ("inversion", "inversion", "t1", "t2")  # gray and white matter differ
CHEST = ("normal", "nodule", "consolidation", "effusion")

REGIONS = {
    ("CT", "abdomen"): Region(bodies.abdomen, (*MASSES[:3], "calcification"), AXIAL, SOFT_HU),
    ("CT", "chest"): Region(bodies.chest, CHEST, AXIAL, LUNG_HU),
    ("CT", "brain"): Region(bodies.brain, ("normal", "hemorrhage", "infarct"), AXIAL, HEAD_HU),
    ("MR", "abdomen"): Region(bodies.abdomen, MASSES, AXIAL),
    ("MR", "brain"): Region(bodies.brain, ("normal", "lesion", "infarct", "mass"), AXIAL),
    ("MR", "hippocampus"): Region(bodies.hippocampus, HIPPOCAMPUS, CLOSE, scanners=CRISP),
    ("MR", "knee"): Region(bodies.knee, ("normal", "effusion", "lesion", "tear"), AXIAL),
    ("MR", "prostate"): Region(bodies.pelvis, MASSES[:3], AXIAL),
    ("US", "breast"): Region(bodies_us.breast, BREAST, PROBE),
    ("US", "thyroid"): Region(bodies_us.thyroid, THYROID, PROBE, fan=0.1),
    ("US", "abdomen"): Region(bodies_us.flank, ("normal", "cyst", "mass", "stone"), PROBE, fan=0.6),
}
CATEGORIES = [(*key, finding) for key, region in REGIONS.items() for finding in region.findings]


def phantom_image(seed: int, index: int, image_size_px: int) -> tuple[np.ndarray, tuple]:
    """Image ``index`` of the tree.

    Args:
        seed: the tree's seed.
        index: number of the image; the category goes round with it.
        image_size_px: side.

    Returns:
        uint8 gray (H, W) and its (modality, organ, finding).

    Source: engineering choice.
    """
    rng = np.random.default_rng([seed, index])
    modality, organ, finding = CATEGORIES[index % len(CATEGORIES)]
    region = REGIONS[modality, organ]
    grid = posed_grid(rng, image_size_px * OVERSAMPLING, [rng.uniform(-0.6, 0.6)], **region.pose)
    canvas = Canvas(grid, rng, soft=rng.uniform(0.015, 0.06))
    region.body(canvas, finding)
    if modality == "CT":
        image = ct(rng, canvas.layers, region.windows_hu[rng.integers(len(region.windows_hu))])
    elif modality == "MR":
        image = mr(rng, canvas.layers, MR_FAMILY[rng.choice(region.scanners)])
        low = np.percentile(image, 0.5)  # as percentile scaling does with scans
        image = (image - low) / (1 - low)
    else:
        image = us(rng, canvas.layers, region.fan)
    image = image[0]
    if modality != "US" and rng.random() < 0.5:  # files come in every orientation
        image = np.rot90(image, rng.integers(4))
    if rng.random() < 0.5:
        image = image[:, ::-1]
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), (modality, organ, finding)


def _write_image(index: int, output_dir: Path, seed: int, image_size_px: int) -> None:
    """Write image ``index`` as <modality>/<organ>/<finding>/<number>.png, if it is not there."""
    parts = CATEGORIES[index % len(CATEGORIES)]
    path = output_dir.joinpath(*parts, f"{index:06d}.png")
    if not path.is_file():
        image = Image.fromarray(phantom_image(seed, index, image_size_px)[0])
        write_aside(path, partial(image.save, format="PNG"))


def open_folder(output_dir: Path, others: dict, **counts: int) -> Path:
    """The folder to write phantoms in, as an interrupted run with the same parameters left it.

    Args:
        output_dir: new or empty folder, which takes its place in the end.
        others, counts: parameters; those of ``counts`` are at least 1.

    Raises:
        ValueError: if a count is below 1.
        FileExistsError: if ``output_dir`` holds something.

    Source: engineering choice.
    """
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"{key} is {value}; it must be at least 1")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"output_dir {output_dir} is not empty; phantoms need a new folder")
    partial_dir = output_dir.with_name(output_dir.name + ".partial")
    record, wanted = partial_dir / RECORD, json.dumps({**others, **counts})
    if not record.is_file() or record.read_text() != wanted:
        shutil.rmtree(partial_dir, ignore_errors=True)
        write_aside(record, partial(Path.write_text, data=wanted))
    return partial_dir


def write_radimagenet_tree(
    output_dir: Path | str,
    num_images: int,
    image_size_px: int = 64,
    seed: int = 0,
    num_workers: int = 0,
) -> Path:
    """Write <modality>/<organ>/<finding>/<number>.png, 8-bit gray, and return the folder.

    Args:
        output_dir: new or empty folder; what an interrupted run has made for it is kept.
        num_images: how many; categories take turns.
        image_size_px: side of an image.
        seed: each image depends on (seed, number) alone.
        num_workers: processes beside this one (0: none).

    Raises:
        ValueError: if ``num_images`` or ``image_size_px`` is below 1.
        FileExistsError: if ``output_dir`` holds something.

    Source: engineering choice.
    """
    output_dir, counts = Path(output_dir), {"num_images": num_images}
    partial_dir = open_folder(output_dir, {"seed": seed}, **counts, image_size_px=image_size_px)
    write = partial(_write_image, output_dir=partial_dir, seed=seed, image_size_px=image_size_px)
    numbers = range(num_images)
    if num_workers > 0:
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            jobs = pool.map(write, numbers, chunksize=32)
            list(tqdm(jobs, "phantom images", num_images))
    else:
        for index in tqdm(numbers, "phantom images"):
            write(index)
    (partial_dir / RECORD).unlink()
    partial_dir.replace(output_dir)
    logger.info("wrote %d phantom images to %s", num_images, output_dir)
    return output_dir

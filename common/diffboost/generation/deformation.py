"""Deformed anatomy: label and edges of a slice displaced together by one smooth random field."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from torch.nn.functional import interpolate
from tqdm import tqdm

from diffboost.conditions.edges import mask_edges
from diffboost.data.addresses import address_seed
from diffboost.data.slices import write_edge, write_label
from diffboost.data.transforms import LoadSliced
from diffboost.files import write_aside
from diffboost.generation.sampling import variant_place
from diffboost.generation.variant_store import variant_file
from diffboost.processes import is_main_process, wait_for_processes


def deform_slice(
    item: Mapping,
    deformation_px: float,
    deformation_spacing_px: int,
    image_size: int,
    noise_address: str = "case",
) -> tuple[np.ndarray, np.ndarray]:
    """Edges and label of a variant's slice, displaced by the variant's own field.

    Points of a grid are displaced by up to ``deformation_px`` along each axis, uniformly; between
    them the field is bicubic, which overshoots by up to a third (MONAI's Rand2DElastic would shift
    all by half a pixel). The label's outline is drawn anew into the displaced edges, for
    interpolation dims it.

    Args:
        item: ``edge`` and ``label`` (paths), ``seed``, ``case``, ``slice``, ``variant``.
        deformation_px: largest displacement of a grid point in pixels.
        deformation_spacing_px: distance of grid points in pixels.
        image_size: side S of the slice in pixels.
        noise_address: the field's address, as the noise's (``variant_noise``).

    Returns:
        Edges, float32 (S, S) in [0, 1], and class index, uint8 (S, S).

    Raises:
        ValueError: a displacement below 0 or a spacing below 2 pixels.

    Source: engineering choice (issue 7; the paper's limits ask for new anatomy).
    """
    if deformation_px < 0 or deformation_spacing_px < 2:
        raise ValueError(
            f"deformation_px: {deformation_px}, deformation_spacing_px: {deformation_spacing_px}; "
            "0 or more, and 2 or more, are needed"
        )
    loaded = LoadSliced(["edge", "label"], image_size)({k: item[k] for k in ("edge", "label")})
    place = variant_place(item["case"], item["slice"], item["variant"], noise_address)
    seed = address_seed(item["seed"], "deformation", *place)
    points = _displaced_grid(seed, deformation_px, deformation_spacing_px, image_size)
    label = map_coordinates(loaded["label"][0].numpy(), points, order=0, mode="nearest")
    edges = map_coordinates(loaded["edge"][0].numpy(), points, order=1, mode="nearest")
    outline = mask_edges(torch.from_numpy(label)[None, None])[0, 0].numpy()
    return np.maximum(edges, outline), label


def _displaced_grid(seed: int, largest_px: float, spacing_px: int, image_size: int) -> np.ndarray:
    """Where each pixel of a displaced slice comes from, (2, S, S) in pixels."""
    number = math.ceil(image_size / spacing_px) + 1
    drawn = np.random.RandomState(seed).uniform(-largest_px, largest_px, (1, 2, number, number))
    size = (image_size, image_size)
    field = interpolate(torch.from_numpy(drawn), size, mode="bicubic", align_corners=True)
    return np.mgrid[:image_size, :image_size] + field[0].numpy()


def deform_items(
    data: Sequence[dict],
    output_dir: str,
    deformation_px: float,
    deformation_spacing_px: int,
    image_size: int,
    noise_address: str = "case",
) -> list[dict]:
    """Gives every variant edges and a label of its own; without displacement, items as they are.

    They are written beside the variants, under the same names: ``edges/`` and ``labels/`` for
    ``images/``. The first process writes what is missing, the others wait.

    Args:
        data: the variants' items, see ``variant_items``.
        output_dir: the synthetic store.
        deformation_px, deformation_spacing_px, image_size, noise_address: see
            :func:`deform_slice`; 0 pixels is no deformation.

    Returns:
        The items, ``edge`` and ``label`` those of the displaced slice.

    Source: engineering choice.
    """
    if deformation_px == 0:
        return list(data)
    deformed = []
    for item in tqdm(data, "deformed anatomy", disable=not is_main_process()):
        name = Path(variant_file(item["case"], item["slice"], item["variant"])).name
        paths = {key: Path(output_dir) / f"{key}s" / name for key in ("edge", "label")}
        if is_main_process() and not all(path.is_file() for path in paths.values()):
            options = (deformation_px, deformation_spacing_px, image_size, noise_address)
            edges, label = deform_slice(item, *options)
            write_aside(paths["edge"], functools.partial(write_edge, edge=edges))
            write_aside(paths["label"], functools.partial(write_label, label=label))
        deformed.append({**item, **{key: str(path) for key, path in paths.items()}})
    wait_for_processes()
    return deformed

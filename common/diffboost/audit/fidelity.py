"""Fidelity: whether variants follow their edges."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffboost.conditions.edges import load_edge_detector_of
from diffboost.data.addresses import address_seed
from diffboost.data.slices import read_store
from diffboost.data.transforms import LoadSliced
from diffboost.files import write_aside
from diffboost.generation.variant_store import variant_file
from diffboost.processes import is_main_process

logger = logging.getLogger(__name__)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of two maps of equal shape; NaN where one of them is constant.

    Source: engineering choice.
    """
    first, second = (values.ravel().astype("float64") for values in (first, second))
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def measure_edge_agreement(
    store_dir: str,
    synthetic_dir: str,
    data: Sequence[dict],
    num_variants: int = 200,
    seed: int = 0,
    batch_size: int = 16,
    edge_weights: str | None = None,
    device: str | torch.device = "cpu",
) -> dict:
    """Correlation of the variants' edge maps with their own hints and with those of other cases.

    The edges are found by the detector that the store was prepared with. Writes
    ``edge_agreement.json`` with ``own``, ``other`` (means), ``n`` and ``edges``.

    Args:
        store_dir: the slice store.
        synthetic_dir: the synthetic store.
        data: the variants' items, see :func:`diffboost.generation.synthesis.variant_items`.
        num_variants: how many are measured, drawn from ``seed``.
        seed: draws the variants and the other cases.
        batch_size: images a pass of the detector.
        edge_weights: where the store's edge weights are; None: cache, pip or hub.
        device: where the detector runs.

    Returns:
        The figures that were written; ``other`` is NaN where there is one case only. Nothing on
        other processes than the first, which alone measures.

    Source: engineering choice (``reference/prototype.md``: only such a figure tells a generator
        that follows its edges from one that ignores them).
    """
    if not is_main_process():
        return {}
    preprocessing = read_store(store_dir).header["preprocessing"]
    detector = load_edge_detector_of(preprocessing, edge_weights, device)
    generator = np.random.RandomState(address_seed(seed, "edge agreement"))
    chosen = generator.permutation(len(data))[:num_variants]
    items = [data[i] for i in chosen]
    load = LoadSliced(["image", "edge"], preprocessing["image_size"], allow_missing_keys=True)
    own, other = [], []
    for start in tqdm(range(0, len(items), batch_size), desc="edge agreement"):
        batch = items[start : start + batch_size]
        loaded = [load({"image": _path(synthetic_dir, i), "edge": i["edge"]}) for i in batch]
        images = torch.stack([torch.as_tensor(sample["image"]) for sample in loaded])
        found = detector(images.to(device)).cpu().numpy()
        for item, edges, sample in zip(batch, found, loaded, strict=True):
            own.append(correlation(edges, np.asarray(sample["edge"])))
            strangers = [candidate for candidate in data if candidate["case"] != item["case"]]
            if strangers:
                stranger = strangers[generator.randint(len(strangers))]
                hint = load({"edge": stranger["edge"]})["edge"]
                other.append(correlation(edges, np.asarray(hint)))
    figures = {
        "own": float(np.nanmean(own)),
        "other": float(np.nanmean(other)) if other else float("nan"),
        "n": int(np.isfinite(own).sum()),
        "edges": preprocessing["edges"],
    }
    text = json.dumps(figures, indent=1) + "\n"
    target = Path(synthetic_dir) / "edge_agreement.json"
    write_aside(target, lambda path: path.write_text(text))
    logger.info("edge agreement of %(n)d variants: own %(own).3f, other %(other).3f", figures)
    return figures


def _path(synthetic_dir: str, item: dict) -> str:
    return str(Path(synthetic_dir) / variant_file(item["case"], item["slice"], item["variant"]))

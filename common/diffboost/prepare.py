"""prepare: raw images in, slice store out (images, labels, edges, folds, index, contact sheet)."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from diffboost.conditions.edges import detection_size, load_edge_detector
from diffboost.data.addresses import address_seed
from diffboost.data.phantoms import write_decathlon_task, write_radimagenet_tree
from diffboost.data.slices import read_store
from diffboost.data.sources import Case, read_source
from diffboost.data.splits import assign_folds
from diffboost.data.tasks import read_task
from diffboost.store_writer import StoreWriter

logger = logging.getLogger(__name__)

PHANTOMS = "phantoms"
PHANTOM_WRITERS = {"decathlon": write_decathlon_task, "radimagenet": write_radimagenet_tree}
SMALLEST_PX = 16  # HED halves its input four times


def prepare(
    dataset_dir: str | Path,
    store_dir: str | Path,
    task: str | Path | Mapping,
    image_size: int,
    edges: str = "hed-bsds500",
    edge_weights: str | Path | None = None,
    hed_size_px: int | None = None,
    num_folds: int = 3,
    seed: int = 0,
    num_workers: int = 0,
    max_rejected_fraction: float = 0.1,
    num_cases: int | None = None,
    include: list[str] | None = None,
    phantoms: Mapping | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Turns a folder of raw images into a slice store.

    Everything is written into ``<store_dir>.partial`` and renamed when whole. A store in place
    with the same task, source and parameters is left as it is.

    Args:
        dataset_dir: folder of raw data in the task's layout; ``phantoms`` makes the embedded
            phantom data in ``<store_dir>/source``.
        store_dir: folder to write.
        task: a shipped task's name, a task file or the mapping itself.
        image_size: side of a slice in pixels.
        edges: ``hed-bsds500``, ``controlnet-hed`` or ``gradient``.
        edge_weights: local file or hub id of the edge weights; None: cache, pip or hub.
        hed_size_px: side at which HED looks at a slice; None: twice ``image_size``, at most 512.
        num_folds: folds over the cases.
        seed: seed of the folds, of ``num_cases`` and of phantoms.
        num_workers: processes that load cases beside this one.
        max_rejected_fraction: share of cases in [0, 1] that may be rejected.
        num_cases: prepare this many cases of section training, drawn by seed; None: all.
        include: subfolders to read (layout pairs) in place of the task's; None: the task's.
        phantoms: arguments of the phantoms' writer (``num_images``, ``num_training``, …).
        device: where edges are computed.

    Returns:
        The store's absolute path.

    Raises:
        FileNotFoundError: no such data folder, task or edge weights.
        FileExistsError: ``store_dir`` holds something else.
        ValueError: wrong data or parameters, fewer cases than folds, or too many rejected files.

    Source: DiffBoost Sec. 3.2, 3.3; engineering choice (design, "Slice store").
    """
    task = read_task(task)
    if include is not None:
        task["include"] = list(include)
    if image_size < SMALLEST_PX:
        raise ValueError(f"image_size: {image_size}; at least {SMALLEST_PX} pixels are needed")
    made = str(dataset_dir) == PHANTOMS
    wanted = {
        "task": task,
        "source_dir": "source" if made else os.path.abspath(dataset_dir),
        "preprocessing": {
            "image_size": image_size,
            "edges": edges,
            "hed_size_px": _hed_size(edges, hed_size_px, image_size),
        },
        "num_folds": num_folds,
        "num_cases": num_cases,
        "phantoms": dict(phantoms or {}) if made else None,
        "seed": seed,
    }
    store_dir = Path(store_dir).resolve()
    if _in_place(store_dir, wanted):
        return store_dir
    if not made:
        if store_dir.is_relative_to(Path(dataset_dir).resolve()):
            raise ValueError(
                f"store_dir: {store_dir} lies inside dataset_dir, where the next run would take "
                "its pictures for raw data; choose a folder outside"
            )
        read_source(dataset_dir, task)  # a wrong folder is named before weights are fetched
    detector = load_edge_detector(
        edges, edge_weights, wanted["preprocessing"]["hed_size_px"], device
    )
    partial_dir = _new_partial(store_dir)
    try:
        if made:
            _make_phantoms(partial_dir / "source", wanted)
        root = partial_dir / wanted["source_dir"]
        source = read_source(root, task)
        source.cases = _limit(source.cases, num_cases, num_folds, seed)
        writer = StoreWriter(partial_dir, root, wanted, detector)
        writer.write_slices(source, num_workers)
        writer.write_index(max_rejected_fraction)
        partial_dir.rename(store_dir)
    except BaseException:
        shutil.rmtree(partial_dir)
        raise
    rows = len(writer.rows)
    logger.info("%s: %d slices of %d cases", store_dir, rows, len(writer.hashes))
    return store_dir


def _hed_size(edges: str, hed_size_px: int | None, image_size: int) -> int | None:
    """The side at which edges are detected; None for ``gradient``, which works at image size."""
    if edges == "gradient":
        return None
    if hed_size_px is not None and hed_size_px < image_size:
        raise ValueError(f"hed_size_px: {hed_size_px} is below image_size {image_size}")
    return hed_size_px or detection_size(image_size)


def _in_place(store_dir: Path, wanted: Mapping) -> bool:
    """Whether this very store is there already; raises for anything else that is there."""
    if not store_dir.exists() or not any(store_dir.iterdir()):
        return False
    if not (store_dir / "dataset.json").is_file():
        raise FileExistsError(f"store_dir: {store_dir} holds something that is no slice store")
    header = read_store(store_dir).header
    found = {key: header.get(key) for key in wanted}
    found["preprocessing"] = {
        key: (header.get("preprocessing") or {}).get(key) for key in wanted["preprocessing"]
    }
    different = [key for key in wanted if found[key] != json.loads(json.dumps(wanted[key]))]
    if different:
        first = different[0]
        raise FileExistsError(
            f"store_dir: {store_dir} holds another store: {', '.join(different)} differ "
            f"({first}: {found[first]} there, {wanted[first]} asked for); choose a new folder"
        )
    logger.info("%s: this store is in place already, nothing to do", store_dir)
    return True


def _new_partial(store_dir: Path) -> Path:
    """An empty folder beside the store's place."""
    partial_dir = store_dir.with_name(store_dir.name + ".partial")
    if partial_dir.exists():
        logger.warning("removing %s, left by a run that was stopped", partial_dir)
        shutil.rmtree(partial_dir)
    partial_dir.mkdir(parents=True)
    return partial_dir


def _make_phantoms(source_dir: Path, wanted: Mapping) -> None:
    """Writes the phantom data of the task's layout."""
    layout = wanted["task"]["layout"]
    if layout not in PHANTOM_WRITERS:
        allowed = ", ".join(PHANTOM_WRITERS)
        raise ValueError(f"dataset_dir: no phantoms of layout '{layout}'; allowed: {allowed}")
    try:
        PHANTOM_WRITERS[layout](source_dir, seed=wanted["seed"], **wanted["phantoms"])
    except TypeError as error:
        raise ValueError(f"phantoms: {wanted['phantoms']}: {error}") from error


def _limit(cases: list[Case], num_cases: int | None, num_folds: int, seed: int) -> list[Case]:
    """``num_cases`` cases of section training, drawn by seed; those of section test stay."""
    training = [case.name for case in cases if case.section == "training"]
    if num_cases is not None:
        if not 0 < num_cases <= len(training):
            raise ValueError(f"num_cases: {num_cases}; there are {len(training)} training cases")
        drawn = sorted(training, key=lambda name: (address_seed(seed, "prepare", name), name))
        training = drawn[:num_cases]
    if len(training) == len(cases):
        assign_folds(training, num_folds, seed)  # raises early if there are too few
    kept = set(training)
    return [case for case in cases if case.section == "test" or case.name in kept]

"""prepare: raw images in, slice store out (images, labels, edges, folds, index, contact sheet)."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from diffboost.conditions.edges import EdgeDetector, detection_size, load_edge_detector
from diffboost.data.addresses import address_seed
from diffboost.data.documents import read_json
from diffboost.data.downloads import decathlon_folder, decathlon_places
from diffboost.data.phantom_volumes import write_decathlon_task
from diffboost.data.phantoms import write_radimagenet_tree
from diffboost.data.pseudonyms import hide_names, home_of, pseudonym, read_key
from diffboost.data.slices import read_store
from diffboost.data.sources import Case, read_source
from diffboost.data.splits import assign_folds
from diffboost.data.tasks import PHANTOM_LAYOUTS, PHANTOMS, change_task, read_task
from diffboost.processes import is_main_process, wait_for_processes
from diffboost.store_folders import in_place, move_store, partial_store
from diffboost.store_writer import StoreWriter
from diffboost.tree_writer import TreeWriter

logger = logging.getLogger(__name__)

PHANTOM_WRITERS = dict(
    zip(PHANTOM_LAYOUTS, (write_decathlon_task, write_radimagenet_tree), strict=True)
)
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
    channel: int | None = None,
    labels: Mapping[str, list[int]] | None = None,
    intensity_per: str | None = None,
    prompt_order: str | None = None,
    fold_order: str = "drawn",
    group_duplicates: bool = True,
    validation_fraction: float = 0.0,
    pseudonym_key: str | Path | None = None,
    download: bool = False,
    phantoms: Mapping | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Turns a folder of raw images into a slice store.

    Everything is written into ``<store_dir>.partial`` and renamed when whole. A store in place
    with the same task, source and parameters is left as it is. An interrupted run is gone on with,
    case by case; cases whose source files have changed, and bad ones, are tried again. Of a tree
    (layout radimagenet) all processes of torch.distributed write edges; a store of labelled cases
    is written by the first process.

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
        channel: channel to read in place of the task's; None: the task's.
        labels: name -> source values in place of the task's, see ``change_task``; None: the task's.
        intensity_per, prompt_order: in place of the task's, see ``change_task``; None: the task's.
        fold_order: "drawn" or "listed", see ``assign_folds``.
        group_duplicates: look for cases that show the same scan and keep them in one fold; not in
            a tree.
        validation_fraction: share of a tree's images in [0, 1) that become section test, drawn by
            seed and path; at least one image unless it is 0.
        pseudonym_key: file of a secret, made where there is none: cases get pseudonyms, and what
            names their files goes to ``<store_dir>.home``; not for a tree. None: own names.
        download: get the task's data set by MONAI if ``dataset_dir`` does not hold it.
        phantoms: arguments of the phantoms' writer (``num_images``, ``num_training``, …).
        device: where edges are computed.

    Returns:
        The store's absolute path.

    Raises:
        FileNotFoundError: no such data folder, task or edge weights.
        FileExistsError: ``store_dir`` holds something else, or its partial folder does.
        BlockingIOError: another process is writing it.
        ValueError: wrong data or parameters, fewer cases than folds, or too many rejected files.

    Source: DiffBoost Sec. 3.2, 3.3; engineering choice (design, "Slice store").
    """
    task = change_task(read_task(task), channel, labels, include, intensity_per, prompt_order)
    in_tree = task["layout"] == "radimagenet"
    if image_size < SMALLEST_PX:
        raise ValueError(f"image_size: {image_size}; at least {SMALLEST_PX} pixels are needed")
    if validation_fraction and not in_tree or not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction: {validation_fraction}; in [0, 1) for layout radimagenet, "
            "0 for others, whose folds hold cases out"
        )
    named = in_tree or str(dataset_dir) == PHANTOMS or fold_order == "listed"
    if pseudonym_key is not None and named:
        raise ValueError(
            "pseudonym_key: not for trees, whose images keep their places, for phantoms, or with "
            "fold_order listed, which follows the names"
        )
    if num_folds < 1:
        raise ValueError(f"num_folds: {num_folds}; at least 1 is needed")
    store_dir = Path(store_dir).resolve()
    wanted = {
        "task": task,
        "source_dir": "source",
        "preprocessing": {
            "image_size": image_size,
            "edges": edges,
            "hed_size_px": _hed_size(edges, hed_size_px, image_size),
        },
        "num_folds": num_folds,
        "fold_order": fold_order,
        "group_duplicates": group_duplicates and not in_tree,
        "num_cases": num_cases,
        "pseudonyms": None,
        "phantoms": dict(phantoms or {}) if str(dataset_dir) == PHANTOMS else None,
        "seed": seed,
    }
    limits = {"num_workers": num_workers, "max_rejected_fraction": max_rejected_fraction}
    if in_tree:
        wanted["validation_fraction"] = validation_fraction
    if in_tree or is_main_process():
        if wanted["phantoms"] is None:
            wanted["source_dir"] = os.path.abspath(
                _find_source(dataset_dir, task, store_dir, download)
            )
        key = None if pseudonym_key is None else read_key(pseudonym_key, store_dir)
        if in_place(store_dir, _shown(wanted, key)):
            _refuse_other_weights(store_dir, wanted, edge_weights)
        else:
            _check_source(store_dir, wanted)
            if in_tree:
                _write_tree(store_dir, wanted, (edge_weights, device), limits)
            else:
                _write_cases(store_dir, wanted, (edge_weights, device), limits, key)
    wait_for_processes()
    return store_dir


def _shown(wanted: Mapping, key: bytes | None) -> Mapping:
    """What dataset.json says: with pseudonyms no source folder, but by which secret they are."""
    if key is None:
        return wanted
    hidden = pseudonym("folder", wanted["source_dir"], key)
    return {**wanted, "source_dir": hidden, "pseudonyms": pseudonym("key", "", key)}


def _find_source(dataset_dir: str | Path, task: Mapping, store_dir: Path, download: bool) -> Path:
    """The folder of source files; where the store is in place already, the one that it names."""
    header_path = store_dir / "dataset.json"
    if header_path.is_file():
        found = read_json(header_path, "store_dir").get("source_dir")
        for place in decathlon_places(dataset_dir, task):
            if os.path.abspath(place) == found:
                return place
    return decathlon_folder(dataset_dir, task, download)


def _check_source(store_dir: Path, wanted: Mapping) -> None:
    """Names a wrong source folder before weights are fetched."""
    if wanted["phantoms"] is not None:
        return
    root = Path(wanted["source_dir"])
    if store_dir.is_relative_to(root.resolve()):
        raise ValueError(
            f"store_dir: {store_dir} lies inside dataset_dir, where the next run would take "
            "its pictures for raw data; choose a folder outside"
        )
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir: no such folder: {root}")
    if wanted["task"]["layout"] != "radimagenet":
        read_source(root, wanted["task"])


def _refuse_other_weights(store_dir: Path, wanted: Mapping, weights: str | Path | None) -> None:
    """Raises FileExistsError where a finished store's edges were made by other weights."""
    if weights is None:  # whatever the cache or the hub has: the store is not made anew for it
        return
    made_by = read_store(store_dir).header["preprocessing"]["edge_weights_sha256"]
    found = _load_detector(wanted, weights, "cpu").weights_sha256
    if found != made_by:
        raise FileExistsError(
            f"store_dir: {store_dir} holds another store: its edges were made by weights of hash "
            f"{made_by[:12]}, edge_weights {weights} has {found[:12]}; choose a new folder"
        )


def _load_detector(wanted: Mapping, weights: str | Path | None, device) -> EdgeDetector:
    """The edge detector that is wanted."""
    choice = wanted["preprocessing"]
    return load_edge_detector(choice["edges"], weights, choice["hed_size_px"], device)


def _write_cases(
    store_dir: Path, wanted: Mapping, edges: tuple, limits: Mapping, key: bytes | None
) -> None:
    """Writes a store of labelled cases, in this process; goes on with one that was interrupted.

    With a key its cases have pseudonyms.
    """
    detector = _load_detector(wanted, *edges)
    weights = {"weights": detector.weights_sha256}
    with partial_store(store_dir, {**_shown(wanted, key), **weights}) as partial_dir:
        root = partial_dir / wanted["source_dir"]
        _make_phantoms(root, wanted)
        source = read_source(root, wanted["task"])
        if key is not None:
            source.cases = hide_names(source.cases, key)
        source.cases = _limit(
            source.cases, *(wanted[n] for n in ("num_cases", "num_folds", "seed", "fold_order"))
        )
        home = None if key is None else home_of(store_dir)
        writer = StoreWriter(partial_dir, root, _shown(wanted, key), detector, home)
        writer.write_slices(source, limits["num_workers"])
        writer.write_index(limits["max_rejected_fraction"])
        move_store(partial_dir, store_dir)
    logger.info("%s: %d slices of %d cases", store_dir, len(writer.rows), writer.num_cases)


def _write_tree(store_dir: Path, wanted: Mapping, edges: tuple, limits: Mapping) -> None:
    """Writes a tree's store together with all processes; goes on with one that was interrupted."""
    # one process fetches its weights before the others look for them
    detector = _load_detector(wanted, *edges) if is_main_process() else None
    wait_for_processes()
    detector = detector or _load_detector(wanted, *edges)
    weights = {"weights": detector.weights_sha256}
    with partial_store(store_dir, {**wanted, **weights}) as partial_dir:
        root = partial_dir / wanted["source_dir"]
        writer = TreeWriter(partial_dir, root, wanted, detector)
        if is_main_process():
            _make_phantoms(root, wanted)
            writer.write_index(**limits)
        wait_for_processes()
        writer.write_edges(limits["num_workers"])
        wait_for_processes()
        if is_main_process():
            num_images = writer.finish(limits["max_rejected_fraction"])
            move_store(partial_dir, store_dir)
            logger.info("%s: %d images of a tree", store_dir, num_images)


def _hed_size(edges: str, hed_size_px: int | None, image_size: int) -> int | None:
    """The side at which edges are detected; None for ``gradient``, which works at image size."""
    if edges == "gradient":
        return None
    if hed_size_px is not None and hed_size_px < image_size:
        raise ValueError(f"hed_size_px: {hed_size_px} is below image_size {image_size}")
    return hed_size_px or detection_size(image_size)


def _make_phantoms(source_dir: Path, wanted: Mapping) -> None:
    """Writes the phantom data of the task's layout, if phantoms are wanted and not there."""
    if wanted["phantoms"] is None or source_dir.is_dir():
        return
    layout = wanted["task"]["layout"]
    if layout not in PHANTOM_WRITERS:
        allowed = ", ".join(PHANTOM_WRITERS)
        raise ValueError(f"dataset_dir: no phantoms of layout '{layout}'; allowed: {allowed}")
    try:
        PHANTOM_WRITERS[layout](source_dir, seed=wanted["seed"], **wanted["phantoms"])
    except TypeError as error:
        raise ValueError(f"phantoms: {wanted['phantoms']}: {error}") from error


def _limit(
    cases: list[Case], num_cases: int | None, num_folds: int, seed: int, fold_order: str
) -> list[Case]:
    """``num_cases`` cases of section training, drawn by seed; those of section test stay."""
    training = [case.name for case in cases if case.section == "training"]
    if num_cases is not None:
        if not 0 < num_cases <= len(training):
            raise ValueError(f"num_cases: {num_cases}; there are {len(training)} training cases")
        drawn = sorted(training, key=lambda name: (address_seed(seed, "prepare", name), name))
        training = drawn[:num_cases]
    if len(training) == len(cases):
        assign_folds(training, num_folds, seed, fold_order)  # raises early if there are too few
    kept = set(training)
    return [case for case in cases if case.section == "test" or case.name in kept]

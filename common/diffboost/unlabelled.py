"""Cases of a training fold whose labels are not used, as a store that a generator learns from."""

import logging
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from diffboost.conditions.edges import EdgeDetector, load_edge_detector_of
from diffboost.conditions.prompts import task_prompt
from diffboost.data.slices import INDEX_COLUMNS, SliceStore, read_store, write_edge
from diffboost.data.splits import select
from diffboost.data.tables import write_table
from diffboost.data.transforms import LoadSliced
from diffboost.files import sha256_of_files
from diffboost.records import DoneCases
from diffboost.runs import hash_inputs
from diffboost.store_folders import in_place, move_store, partial_store
from diffboost.store_writer import EDGE_BATCH, FOLDERS, finish_store

logger = logging.getLogger(__name__)

OF_THE_STORE = ("source_dir", "fold_order", "group_duplicates", "pseudonyms", "phantoms", "seed")


def prepare_unlabelled(
    store_dir: str | Path,
    unlabelled_dir: str | Path,
    fold: int,
    num_cases: int,
    inner_fraction: float = 0.2,
    edge_weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Writes a slice store of a training fold's cases beyond ``num_cases``, as if unlabelled.

    Its slices have edges of the image alone and the task's own finding in the prompt; no label and
    nothing that was read from one. Cases keep their names, groups and hashes, so that lineages and
    leak guards know them. Test cases, and duplicates of a case that selects models, are left out.
    An interrupted run is gone on with, case by case.

    Args:
        store_dir: the slice store of a task with labels.
        unlabelled_dir: folder to write.
        fold: the fold that is held out.
        num_cases: labelled cases of the training fold, as for training; the others are taken.
        inner_fraction: share of these for inner validation, as for training.
        edge_weights: local file or hub id of the edge weights; None: cache, pip or hub.
        device: where edges are computed.

    Returns:
        The absolute path of the new store; all its slices are in part ``training`` of any fold.

    Raises:
        FileNotFoundError: no slice store, or no edge weights.
        FileExistsError: ``unlabelled_dir`` holds something else, such as what was made of a
            ``store_dir`` of other contents.
        ValueError: no case is left, or the edge weights are not those of the store.

    Source: DiffBoost Sec. 3.2 in small (a generator needs images, not labels); engineering choice.
    """
    store = read_store(store_dir)
    unlabelled_dir = Path(unlabelled_dir).resolve()
    settings = {"fold": fold, "num_cases": num_cases, "inner_fraction": inner_fraction}
    rows = _unlabelled_rows(store, **settings)
    preprocessing = dict(store.header["preprocessing"])
    preprocessing.pop("edge_weights_sha256")  # comes back when the store is written
    wanted = {name: store.header.get(name) for name in OF_THE_STORE} | {
        "task": {**store.header["task"], "labels": {}},
        "preprocessing": preprocessing,
        "num_folds": 0,
        "num_cases": None,
        "unlabelled": {**settings, "of": store.header["name"]},
        "inputs_sha256": hash_inputs(store_dir=str(store.store_dir)),
    }
    if in_place(unlabelled_dir, wanted):
        return unlabelled_dir
    detector = load_edge_detector_of(store.header["preprocessing"], edge_weights, device)
    with partial_store(unlabelled_dir, wanted) as partial_dir:
        for name in FOLDERS:
            (partial_dir / name).mkdir(exist_ok=True)
        done, written = DoneCases(partial_dir), []
        for case, slices in tqdm(rows.groupby("case", sort=False), "unlabelled", unit="case"):
            origin = [*slices.sha256]
            found = done.read(case, origin)
            if found is None:
                found = _write_case(partial_dir, store, detector, slices)
                files = [row[key] for row in found for key in ("image", "edge")]
                done.write(case, origin, found, files)
            written += found
        write_table(partial_dir / "index.parquet", pd.DataFrame(written)[list(INDEX_COLUMNS)])
        finish_store(partial_dir, wanted, detector, {"training": rows.case.nunique()})
        move_store(partial_dir, unlabelled_dir)
    logger.info("%s: %d slices without labels", unlabelled_dir, len(rows))
    return unlabelled_dir


def _unlabelled_rows(
    store: SliceStore, fold: int, num_cases: int, inner_fraction: float
) -> pd.DataFrame:
    """The rows of the index whose labels are not used."""
    labelled = {"inner_fraction": inner_fraction, "num_cases": num_cases}
    taken = select(store.index, fold, "training_fold", **labelled)
    selecting = select(store.index, fold, "inner_validation", **labelled)
    rows = select(store.index, fold, "training_fold", inner_fraction)
    rows = rows[~rows.case.isin(taken.case) & ~rows.group.isin(selecting.group)]
    if rows.empty:
        raise ValueError(
            f"num_cases: {num_cases}; fold {fold} of {store.store_dir} has no training case beyond"
        )
    return rows


def _write_case(
    folder: Path, store: SliceStore, detector: EdgeDetector, slices: pd.DataFrame
) -> list[dict]:
    """Copies a case's images, writes their edges; its rows.

    Edges are detected in batches of the case alone, as in the store itself.
    """
    size = store.header["preprocessing"]["image_size"]
    load = LoadSliced("image", size)
    own = {"label": "", "source_label": "", "foreground_px": 0, "section": "training", "fold": -1}
    own |= {"prompt": task_prompt(store.header["task"]), "image_root": "store"}
    records, rows = slices.to_dict("records"), []
    for start in range(0, len(records), EDGE_BATCH):
        batch = records[start : start + EDGE_BATCH]
        paths = [store.image_path(record) for record in batch]
        edges = detector(torch.stack([load({"image": str(path)})["image"] for path in paths]))
        for record, path, edge in zip(batch, paths, edges, strict=True):
            row = {key: _plain(record[key]) for key in INDEX_COLUMNS} | own
            (folder / row["image"]).write_bytes(path.read_bytes())
            write_edge(folder / row["edge"], edge[0].numpy())
            if sha256_of_files([folder / row["image"]]) != row["sha256"]:
                raise ValueError(f"{path}: is not the image that was prepared; its hash differs")
            rows.append(row)
    return rows


def _plain(value: object) -> object:
    """A cell as JSON knows it."""
    return value.tolist() if hasattr(value, "tolist") else value

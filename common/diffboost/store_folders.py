"""The folder of a store: in place already, begun anew, or kept from a run that was stopped."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from diffboost.data.documents import read_json
from diffboost.data.slices import STORE_VERSION, read_store

logger = logging.getLogger(__name__)

RECORD = "wanted.json"  # in a tree's partial folder: what it will be


def in_place(store_dir: Path, wanted: Mapping) -> bool:
    """Whether this very store is there already.

    Args:
        store_dir: where it belongs.
        wanted: task and parameters, as they go into dataset.json.

    Raises:
        FileExistsError: the folder holds another store (what differs is named) or other things.

    Source: engineering choice (design, "Failure").
    """
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


def new_partial(store_dir: Path) -> Path:
    """Makes an empty folder beside the store's place.

    Args:
        store_dir: where the store belongs.

    Returns:
        ``<store_dir>.partial``; what a stopped run left there is gone.

    Source: engineering choice (design, "Failure").
    """
    partial_dir = store_dir.with_name(store_dir.name + ".partial")
    if partial_dir.exists():
        logger.warning("removing %s, left by a run that was stopped", partial_dir)
        shutil.rmtree(partial_dir)
    partial_dir.mkdir(parents=True)
    return partial_dir


def open_partial(store_dir: Path, wanted: Mapping) -> None:
    """Makes a tree's partial folder, or accepts one that an interrupted run of the same left.

    Args:
        store_dir: where the store belongs.
        wanted: task, parameters and hash of the edges' weights; kept in the folder.

    Raises:
        FileExistsError: a run with other parameters left it; what differs is named.

    Source: engineering choice (issue 3, "RadImageNet": resumable).
    """
    wanted = json.loads(json.dumps({**wanted, "store_version": STORE_VERSION}))
    record = store_dir.with_name(store_dir.name + ".partial") / RECORD
    if not record.is_file():
        new_partial(store_dir)
        record.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        return
    found = read_json(record, "store_dir")
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        first = different[0]
        raise FileExistsError(
            f"store_dir: {record.parent} holds an unfinished store: {', '.join(different)} differ "
            f"({first}: {found.get(first)} there, {wanted[first]} asked for); finish that one, "
            "remove it, or choose a new folder"
        )
    logger.info("%s: going on with what an interrupted run left", record.parent)

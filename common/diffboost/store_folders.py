"""The folder of a store: in place already, begun anew, or kept from a run that was stopped."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffboost.data.documents import read_json
from diffboost.data.slices import STORE_VERSION, read_store
from diffboost.files import flush, flush_folder, write_json
from diffboost.locks import hold_folder, release_folder
from diffboost.processes import is_main_process
from diffboost.records import FOLDER, same_command_goes_on

logger = logging.getLogger(__name__)

RECORD = "wanted.json"  # in a partial folder: what it will be
FAILURE = "failed"  # key of the record after an error of data or parameters


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
    _remove_records(store_dir)  # left if a run was killed right after the renaming
    logger.info("%s: this store is in place already, nothing to do", store_dir)
    return True


@contextmanager
def partial_store(store_dir: Path, wanted: Mapping) -> Iterator[Path]:
    """The partial folder of a store, held by this run: a new one, or one of a run that was stopped.

    One of other parameters is begun anew if no case or edge of it is done, or if the run that left
    it failed because of its data or parameters; that is logged. Whatever stops the work, what is
    done is kept for the same command. After an error of data or parameters (ValueError) nothing
    stands in the way of a corrected command: the folder is marked as one that failed, or removed if
    no case or edge is done.

    Args:
        store_dir: where the store belongs.
        wanted: task, parameters and hash of the edges' weights; kept in the folder.

    Raises:
        FileExistsError: a stopped run with other parameters left it; what differs is named.
        BlockingIOError: another process is writing into it.

    Source: engineering choice (issue 5, "Exact resume, every stage").
    """
    partial_dir = store_dir.with_name(store_dir.name + ".partial")
    try:
        if is_main_process():
            hold_folder(partial_dir)
            _open(partial_dir, json.loads(json.dumps({**wanted, "store_version": STORE_VERSION})))
        with same_command_goes_on(partial_dir):
            yield partial_dir
    except ValueError as error:
        if is_main_process():
            _mark_failed(partial_dir, str(error))
        raise
    finally:
        release_folder(partial_dir)


def _open(partial_dir: Path, wanted: dict) -> None:
    """Accepts, empties or refuses what lies in a partial folder."""
    found = _read_record(partial_dir)
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if not different:
        logger.info("%s: going on with what an interrupted run left", partial_dir)
    elif found and _has_results(partial_dir) and FAILURE not in found:
        first = different[0]
        raise FileExistsError(
            f"store_dir: {partial_dir} holds an unfinished store: {', '.join(different)} differ "
            f"({first}: {found.get(first)} there, {wanted[first]} asked for); finish that one, "
            "remove it, or choose a new folder"
        )
    else:
        if any(partial_dir.iterdir()):
            logger.warning("emptying %s, left by a run of another kind", partial_dir)
        shutil.rmtree(partial_dir)
    write_json(partial_dir / RECORD, wanted)


def _mark_failed(partial_dir: Path, message: str) -> None:
    """Keeps what is done for the next run, whatever its parameters, or removes an empty folder."""
    if _has_results(partial_dir):
        write_json(partial_dir / RECORD, _read_record(partial_dir) | {FAILURE: message})
        logger.warning("%s keeps what is good for the next run", partial_dir)
    else:
        shutil.rmtree(partial_dir)


def move_store(partial_dir: Path, store_dir: Path) -> None:
    """Flushes a whole partial folder, renames it into place and removes the records of its making.

    Args:
        partial_dir: the folder, whole.
        store_dir: where the store belongs; not there, or empty.

    Source: engineering choice (design, "Failure").
    """
    flush_folder(partial_dir)
    partial_dir.rename(store_dir)
    flush(store_dir.parent)
    _remove_records(store_dir)


def _has_results(partial_dir: Path) -> bool:
    """Whether a case or an edge is done."""
    return any(
        path.is_file() for name in (FOLDER, "edges") for path in (partial_dir / name).rglob("*")
    )


def _read_record(partial_dir: Path) -> dict:
    """What the folder will be; empty if it does not say."""
    path = partial_dir / RECORD
    return read_json(path, "store_dir") if path.is_file() else {}


def _remove_records(store_dir: Path) -> None:
    shutil.rmtree(store_dir / FOLDER, ignore_errors=True)
    (store_dir / RECORD).unlink(missing_ok=True)

"""Results of whole cases: kept case by case while an evaluation runs, put in place at its end."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from diffboost.data.documents import read_json
from diffboost.data.slices import read_store
from diffboost.files import flush, flush_folder, sha256_of_files, write_aside, write_json
from diffboost.locks import hold_folder, release_folder
from diffboost.processes import is_main_process, wait_for_processes
from diffboost.records import DoneCases, same_command_goes_on, state_of

SETTINGS = "settings.json"
TABLE = "metrics.csv"
PREDICTIONS = "predictions"

logger = logging.getLogger(__name__)


def open_evaluation(
    partial_dir: str, store_dir: str, model_path: str, settings: Mapping[str, object]
) -> None:
    """Makes the partial folder of an evaluation, or keeps what an interrupted run of it left.

    Results of another model, store or of other knobs are removed and the evaluation is begun anew.

    Args:
        partial_dir: the folder.
        store_dir: slice store; its header and index are known by their hashes.
        model_path: the model; it is known by its hash.
        settings: the knobs that results depend on; JSON.

    Raises:
        FileNotFoundError: no such store or model.
        BlockingIOError: another process is writing into the folder.

    Source: engineering choice (issue 5, "Exact resume, every stage").
    """
    if is_main_process():
        store = read_store(store_dir)
        wanted = {
            "model_sha256": sha256_of_files([model_path]),
            "store_sha256": sha256_of_files(
                [store.path("dataset.json"), store.path("index.parquet")]
            ),
            **settings,
        }
        hold_folder(partial_dir)
        _open(Path(partial_dir), json.loads(json.dumps(wanted)))
    wait_for_processes()


def _open(folder: Path, wanted: dict) -> None:
    record = folder / SETTINGS
    found = read_json(record, "output_dir") if record.is_file() else None
    if found == wanted:
        logger.info("%s: going on with what an interrupted run left", folder)
        return
    if found is not None:
        logger.warning("removing %s, results of another model, store or other knobs", folder)
    shutil.rmtree(folder)
    write_json(record, wanted)


def is_open(partial_dir: str | Path) -> bool:
    """Whether :func:`open_evaluation` has made the folder.

    Source: engineering choice.
    """
    return (Path(partial_dir) / SETTINGS).is_file()


def origin_of(item: Mapping) -> list:
    """What a case's results are made of, for :class:`diffboost.records.DoneCases`.

    Source: engineering choice.
    """
    labels = item["label"] if isinstance(item["label"], list) else [item["label"]]
    return state_of([item["image"], *labels])


def missing_cases(data: Sequence[dict], partial_dir: str) -> list[dict]:
    """The cases whose results are not there yet; all processes ask at once.

    Args:
        data: the cases to evaluate, see ``data.slices.case_items``.
        partial_dir: the folder that :func:`open_evaluation` made.

    Source: engineering choice (issue 5, "Exact resume, every stage").
    """
    done = DoneCases(partial_dir)
    missing = []
    if not (Path(partial_dir) / TABLE).is_file():  # else all are there, and may be in place
        missing = [item for item in data if done.read(item["case"], origin_of(item)) is None]
    wait_for_processes()  # all have looked before one of them writes a result
    if len(missing) < len(data):
        logger.info("%d of %d cases are left to evaluate", len(missing), len(data))
    return missing


def write_scores(data: Sequence[dict], partial_dir: str, output_dir: str) -> None:
    """Joins the results of all cases and puts them in place: predictions/, then metrics.csv.

    The first process does it while the others wait. The rows are in the order of the cases.

    Args:
        data: the cases that were to be evaluated.
        partial_dir: holds their results; it is gone afterwards.
        output_dir: gets them; those of an earlier evaluation are replaced.

    Raises:
        FileNotFoundError: a case has no result.
        ValueError: no case was scored.

    Source: design, "Results".
    """
    wait_for_processes()
    if is_main_process():
        with same_command_goes_on(partial_dir):
            _put_in_place(data, Path(partial_dir), Path(output_dir))
        release_folder(partial_dir)
    wait_for_processes()


def _put_in_place(data: Sequence[dict], partial_dir: Path, output_dir: Path) -> None:
    """A kill between any two steps leaves what the next run does the rest with."""
    table = partial_dir / TABLE
    if not table.is_file():
        rows = pd.DataFrame(_join(data, partial_dir), columns=["case", "label", "metric", "value"])
        write_aside(table, partial(rows.to_csv, index=False))
        means = rows.groupby("metric", sort=False)["value"].mean()
        text = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        logger.info("%d cases: %s", rows["case"].nunique(), text)
    output_dir.mkdir(parents=True, exist_ok=True)
    if (partial_dir / PREDICTIONS).is_dir():
        (output_dir / TABLE).unlink(missing_ok=True)
        if (output_dir / PREDICTIONS).is_dir():
            shutil.rmtree(output_dir / PREDICTIONS)
        flush_folder(partial_dir / PREDICTIONS)
        (partial_dir / PREDICTIONS).rename(output_dir / PREDICTIONS)
    os.replace(table, output_dir / TABLE)
    flush(output_dir)
    shutil.rmtree(partial_dir)
    logger.info("predictions and %s are in %s", TABLE, output_dir)


def _join(data: Sequence[dict], partial_dir: Path) -> list[dict]:
    """The rows of all cases."""
    done = DoneCases(partial_dir)
    joined = []
    for item in data:
        rows = done.read(item["case"], origin_of(item))
        if rows is None:
            raise FileNotFoundError(
                f"{partial_dir} lacks the results of {item['case']}; run the evaluation again"
            )
        joined += rows
    if not joined:
        raise ValueError(f"volumes: 'foreground' leaves none of {len(data)} cases to score")
    return joined

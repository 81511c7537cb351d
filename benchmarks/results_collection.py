"""Copies what the results page is made of out of the runs of studies; see results_page.py."""

import gzip
import logging
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from diffboost import results
from diffboost.data.documents import read_json

logger = logging.getLogger("results_page")


def collect(runs_dir: Path, data_dir: Path, studies: Iterable[str]) -> None:
    """Copies metrics and costs of those studies that have been evaluated, whole or in part."""
    data_dir.mkdir(parents=True, exist_ok=True)
    chosen, seconds = [], []
    for name in studies:
        try:
            metrics = results.read_metrics(runs_dir / name)
        except FileNotFoundError:
            logger.info("%s: not run", name)
            continue
        text = metrics.round({"value": 4}).to_csv(index=False).encode()
        (data_dir / f"{name}.csv.gz").write_bytes(gzip.compress(text, mtime=0))
        costs = results.read_costs(runs_dir / name).round(1)
        costs.to_csv(data_dir / f"{name}.costs.csv")
        log = results.read_training_logs(runs_dir / name)[1]
        best = log.groupby(["arm", "fold", "seed"]).val_dice.max().groupby("arm", sort=False).mean()
        chosen.append(best.reset_index().assign(study=name))
        seconds.append(training_seconds(runs_dir / name).reset_index().assign(study=name))
        logger.info("%s: %d rows", name, len(metrics))
    replace_rows(data_dir / "slice_consistency.csv", [slice_consistency(runs_dir)])
    replace_rows(data_dir / "inner_validation.csv", [table.round(4) for table in chosen])
    replace_rows(data_dir / "training_seconds.csv", [table.round(1) for table in seconds])


def replace_rows(path: Path, tables: list[pd.DataFrame]) -> None:
    """Writes tables with a column study into one file, which keeps its rows of other studies."""
    new = pd.concat(tables) if tables else pd.DataFrame()
    if new.empty:
        return
    if path.is_file():
        old = pd.read_csv(path)
        new = pd.concat([old[~old.study.isin(new.study)], new])
    new.to_csv(path, index=False)


def slice_consistency(runs_dir: Path) -> pd.DataFrame:
    """How far neighboring slices of variants differ, a row a study and way of drawing noise."""
    rows = []
    for path in sorted(runs_dir.glob("*/**/fold*/synthetic_store/slice_consistency.json")):
        study, *setting = path.relative_to(runs_dir).parts[:-3]
        figures = read_json(path, "slice consistency", nan=True)
        noise = setting[-1].removeprefix("noise_address=") if setting else "case"
        if noise in ("case", "variant", "volume"):
            rows.append({"study": study, "noise": noise} | figures)
    table = pd.DataFrame(rows, columns=["study", "noise", "variants", "real", "ratio", "pairs"])
    means = {"variants": "mean", "real": "mean", "ratio": "mean", "pairs": "sum"}
    return table.groupby(["study", "noise"], as_index=False).agg(means).round(4)


def training_seconds(run_dir: Path) -> pd.DataFrame:
    """Mean CPU seconds of a segmenter's training by arm, from the end of the stages' logs.

    Wall-clock is not compared: other work on the machine changes it.
    """
    rows = []
    for path in sorted((run_dir / "logs").glob("train_segmentation.fold*.seed*.log")):
        found = results.warm_cost(path)
        if found:
            rows.append({"arm": path.name.split(".")[2], "cpu_seconds": found["cpu_seconds"]})
    return pd.DataFrame(rows, columns=["arm", "cpu_seconds"]).groupby("arm").mean()

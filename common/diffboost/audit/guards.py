"""Guards against leaks that cost no pixel: names, hashes and groups of cases, and lineages.

Training and evaluation of segmenters call them before they begin; ``audit.leaks`` adds the search
in the images themselves.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from diffboost.audit.checks import (
    Leak,
    lineage_leaks,
    model_leaks,
    selected_on_test,
    split_leaks,
    variant_leaks,
)
from diffboost.data.slices import read_store
from diffboost.data.splits import select
from diffboost.data.weights import check_weights
from diffboost.generation.lineage import read_lineage, write_lineage
from diffboost.processes import is_main_process
from diffboost.segmentation.loading import read_record

logger = logging.getLogger(__name__)

CASE_COLUMNS = ["case", "section", "fold", "group", "source_sha256", "image_sha256"]
SLICE_COLUMNS = ["sha256", "foreground_px"]
SHOWN = 5


def refuse_leaks(leaks: Sequence[Leak], where: str) -> None:
    """Raises if there is a leak.

    Args:
        leaks: what was found.
        where: the run or store, for the message.

    Raises:
        ValueError: names the pairs.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    if leaks:
        shown = "; ".join(str(leak) for leak in leaks[:SHOWN])
        more = f"; and {len(leaks) - SHOWN} more" if len(leaks) > SHOWN else ""
        raise ValueError(
            f"leak: {where}: {shown}{more}. See them all with: diffboost audit leaks STORE"
        )


def guard_training(
    store_dir: str,
    fold: int,
    training: Sequence[Mapping],
    validation: Sequence[Mapping],
    lineage_dir: str | None = None,
    synthetic_dir: str | None = None,
    weights: str | None = None,
    allow_selection_on_test: bool = False,
) -> dict:
    """Refuses a segmenter's training that would leak; writes its lineage.

    Args:
        store_dir: slice store.
        fold: the fold that is held out.
        training: items that are trained on, with ``case``.
        validation: items that choose the model.
        lineage_dir: folder that gets lineage.json; None writes none.
        synthetic_dir: synthetic store of an arm with variants.
        weights: model.pt that training starts from; a lineage.json beside it is an ancestor.
        allow_selection_on_test: do not refuse that test cases choose the model (protocol paper).

    Returns:
        The lineage: what ``trace_lineage`` says of a generator, and ``selection``: case -> hash;
        ``images`` has the cases of both.

    Raises:
        ValueError: there is a leak; the pair is named. Or ``weights`` hold code or are damaged.
        FileNotFoundError: the synthetic store has no lineage.json.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    store = read_store(store_dir)
    index = store.columns([*CASE_COLUMNS, *SLICE_COLUMNS, "image"])
    trained, chosen = ({str(item["case"]) for item in part} for part in (training, validation))
    parts = {
        "training": index[index.case.isin(trained)],
        "validation": index[index.case.isin(chosen)],
        "test": select(index, fold, "test"),
    }
    leaks, ancestors = split_leaks(parts), []
    if synthetic_dir is not None:
        used = (file for item in training for file in item.get("variants", ()))
        leaks += variant_leaks(synthetic_dir, parts["test"], index, used)
        ancestors.append(read_lineage(Path(synthetic_dir) / "lineage.json"))
    if weights is not None:
        check_weights(weights)
    before = _lineage_beside(weights)
    if before is not None:
        leaks += lineage_leaks(before, parts["test"], index)
        ancestors.append(before)
    if allow_selection_on_test:
        leaks = [leak for leak in leaks if leak.kind != "selection"]
    refuse_leaks(leaks, f"training on fold {fold} of {store.store_dir}")
    lineage = {
        "store": store.header["name"],
        "fold": fold,
        "cases": _hashes(parts["training"], "source_sha256"),
        "selection": _hashes(parts["validation"], "source_sha256"),
        "images": _hashes(index[index.case.isin(trained | chosen)], "image_sha256"),
        "ancestors": ancestors,
    }
    if lineage_dir is not None and is_main_process():
        write_lineage(Path(lineage_dir) / "lineage.json", lineage)
    return lineage


def _lineage_beside(weights: str | None) -> dict | None:
    """The lineage of weights that training starts from; None, with a warning, if they have none."""
    if weights is None:
        return None
    path = Path(weights).with_name("lineage.json")
    if path.is_file():
        return read_lineage(path)
    logger.warning("weights: %s: no lineage.json says what they were trained on", weights)
    return None


def _hashes(rows: pd.DataFrame, column: str) -> dict[str, str]:
    """case -> hash in a column of the index, where the store knows it."""
    rows = rows[rows[column] != ""].drop_duplicates("case").astype(str)
    return dict(sorted(zip(rows["case"], rows[column], strict=True)))


def guard_generator(store_dir: str, fold: int | None, lineage: Mapping) -> None:
    """Refuses a generator that saw test cases of the fold, itself or what it was trained from.

    Args:
        store_dir: slice store whose training part is varied.
        fold: the fold that is held out; None: no fold is, as in pretraining.
        lineage: of the generator, with backbone and weights that it began from as ancestors.

    Raises:
        ValueError: there is a leak; the pair is named.

    Source: engineering choice (issue 5, "a generator that saw a test case").
    """
    if fold is None:
        return
    store = read_store(store_dir)
    index = store.columns(CASE_COLUMNS)
    leaks = lineage_leaks(lineage, select(index, fold, "test"), index)
    refuse_leaks(leaks, f"the generator for fold {fold} of {store.store_dir}")


def guard_evaluation(
    store_dir: str,
    fold: int,
    part: str,
    model_path: str,
    allow_selection_on_test: bool = False,
) -> None:
    """Refuses to judge a model by test cases that it was trained or selected on.

    Args:
        store_dir: slice store.
        fold: the fold that is held out.
        part: only ``test`` claims to be held out; others are not checked.
        model_path: model.pt, with lineage.json beside it. Without one a warning says so.
        allow_selection_on_test: do not refuse that test cases chose the model (protocol paper).

    Raises:
        ValueError: there is a leak; the pair is named. Or the model holds code or is damaged.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    check_weights(model_path, "model_path")
    if part != "test":
        return
    path = Path(model_path).with_name("lineage.json")
    if not path.is_file():
        logger.warning("%s: no lineage.json says what this model was trained on", model_path)
        return
    store = read_store(store_dir)
    index = store.columns(CASE_COLUMNS)
    leaks = model_leaks(read_lineage(path), select(index, fold, "test"), index)
    if allow_selection_on_test:
        leaks = [leak for leak in leaks if leak.kind != "selection"]
    refuse_leaks(leaks, f"{model_path} on fold {fold} of {store.store_dir}")


def guard_segmenter(
    store_dir: str,
    fold: int,
    segmenter_dir: str,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
) -> None:
    """Refuses a segmenter for the quality filter that knows more than the inner training split.

    Args:
        store_dir: slice store.
        fold: the fold that is held out.
        segmenter_dir: folder with run.json and lineage.json of the segmenter.
        inner_fraction: part of the fold's training cases kept for inner validation, on which the
            filter is calibrated.
        num_cases: of the training fold, as for ``slice_items``.

    Raises:
        FileNotFoundError: run.json or lineage.json is missing.
        ValueError: it is of another arm than baseline, or it saw or was selected on test cases, or
            was trained on cases of the inner validation; the pair is named.

    Source: engineering choice (issue 5, "Quality filter").
    """
    arm = read_record(segmenter_dir).get("arm")
    if arm != "baseline":
        raise ValueError(
            f"segmenter_dir: {segmenter_dir} is of arm {arm!r}; the quality filter needs one of "
            "arm 'baseline', which no variant has taught"
        )
    store = read_store(store_dir)
    index = store.columns(CASE_COLUMNS)
    lineage = read_lineage(Path(segmenter_dir) / "lineage.json")
    leaks = model_leaks(lineage, select(index, fold, "test"), index)
    inner = select(index, fold, "inner_validation", inner_fraction, num_cases=num_cases)
    leaks += model_leaks({**lineage, "selection": {}}, inner, index)
    if selected_on_test(segmenter_dir):
        raise ValueError(f"leak: segmenter_dir: {segmenter_dir} was selected on test cases")
    refuse_leaks(leaks, f"{segmenter_dir} for the quality filter of fold {fold}")

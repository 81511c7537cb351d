"""Guards against leaks that cost no pixel: names, hashes and groups of cases, and lineages.

Training and evaluation of segmenters call them before they begin; ``audit.leaks`` adds the search
in the images themselves.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from diffboost.audit.checks import Leak, lineage_leaks, model_leaks, split_leaks, variant_leaks
from diffboost.data.slices import read_store
from diffboost.data.splits import select
from diffboost.data.weights import check_weights
from diffboost.generation.lineage import read_lineage, write_lineage
from diffboost.processes import is_main_process

logger = logging.getLogger(__name__)

CASE_COLUMNS = ["case", "section", "fold", "group", "source_sha256"]
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
        The lineage: what ``trace_lineage`` says of a generator, and ``selection``: case -> hash.

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
    leaks = split_leaks(parts)
    ancestors = []
    if synthetic_dir is not None:
        used = (file for item in training for file in item.get("variants", ()))
        leaks += variant_leaks(synthetic_dir, parts["test"], index, used)
        ancestors.append(read_lineage(Path(synthetic_dir) / "lineage.json"))
    if weights is not None:
        check_weights(weights)
    before = Path(weights).with_name("lineage.json") if weights else None
    if before is not None and before.is_file():
        ancestors.append(read_lineage(before))
        leaks += lineage_leaks(ancestors[-1], parts["test"], index)
    if allow_selection_on_test:
        leaks = [leak for leak in leaks if leak.kind != "selection"]
    refuse_leaks(leaks, f"training on fold {fold} of {store.store_dir}")
    lineage = {
        "store": store.header["name"],
        "fold": fold,
        "cases": _hashes(parts["training"]),
        "selection": _hashes(parts["validation"]),
        "ancestors": ancestors,
    }
    if lineage_dir is not None and is_main_process():
        write_lineage(Path(lineage_dir) / "lineage.json", lineage)
    return lineage


def _hashes(rows: pd.DataFrame) -> dict[str, str]:
    """case -> hash of its source files."""
    rows = rows.drop_duplicates("case").astype(str)
    return dict(sorted(zip(rows["case"], rows.source_sha256, strict=True)))


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

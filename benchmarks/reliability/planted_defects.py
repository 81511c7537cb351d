"""Planted defects of four kinds: does the quality filter reject them, and what good does it lose?

    python benchmarks/reliability/planted_defects.py [--data ../shared/data] [--seed 0]

Of each set (phantoms, BUSI, hippocampus) a store is prepared at 64 px, a segmenter (U-Net, arm
baseline) is trained on the inner training split of fold 0, and slices of the inner validation are
scored: as they are, in other gray levels (both are good), and with defects planted on them. A
fifth of the cases at a time is judged by judges that were calibrated on the others' slices alone.

What counts, in labels of 1 % of the slice or more (`diffboost.audit.defects` does the planting):
- shifted: the label, moved by 1 to 1.5 times half its height, half its width, or both, of which
  90 % stay in the picture;
- erased: a lesion that was visible (its rim differs from its surroundings by half a standard
  deviation or more), painted over so that at most half of that contrast is left;
- stranger: the label of another case, whose Dice with the slice's own is 0.5 at most;
- noise: white noise of the image's mean and spread.
A wrong label brings its outline into the hint, as if the store had been prepared with it. Smaller
and empty labels are counted apart and stand in the last line, but not in its `passed`.

The last line is JSON. The folder of --work keeps stores and segmenters for another run.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import monai
import pandas as pd

from diffboost.audit.quality_calibration import calibration_scores, judges_of, load_instruments
from diffboost.data.slices import read_store, slice_items
from diffboost.data.tasks import PHANTOMS
from diffboost.prepare import prepare

logger = logging.getLogger("planted_defects")

BUNDLE = Path(__file__).parents[2] / "bundles" / "diffboost_segmentation"
CONFIGS = [str(BUNDLE / "configs" / name) for name in ("train.yaml", "network_unet.yaml")]
SIZE = 64
PARTS = 5
ISSUE_KINDS = ("shifted", "erased", "stranger", "noise")
# set: folder, task, what prepare takes, epochs of the segmenter
SETS = {
    "phantoms": (
        None,
        "phantom_organ",
        {"phantoms": {"num_training": 12, "num_test": 2, "size_px": 64, "num_slices": 16}},
        40,
    ),
    "busi": (
        "busi",
        "breast_ultrasound",
        {"include": ["benign", "malignant", "normal"], "num_folds": 10},
        60,
    ),
    "hippocampus": ("Task04_Hippocampus", "hippocampus_mri", {"num_cases": 40}, 12),
}
INNER = 0.4  # of the training cases: as many as it takes to judge


def score_set(name: str, data: Path, work: Path, num_slices: int, seed: int) -> pd.DataFrame:
    """Prepares, trains and scores a set."""
    folder, task, knobs, epochs = SETS[name]
    source = data / folder if folder else PHANTOMS
    store_dir = prepare(source, work / name / "store", task, SIZE, "gradient", **knobs)
    store, segmenter_dir = read_store(store_dir), work / name / "segmenter"
    if not (segmenter_dir / "model.pt").is_file():
        monai.bundle.run(
            config_file=CONFIGS,
            bundle_root=str(BUNDLE),
            store_dir=str(store_dir),
            output_dir=str(segmenter_dir),
            num_classes=store.num_classes,
            epochs=epochs,
            inner_fraction=INNER,
            val_interval=2,
        )
    parts = {
        part: slice_items(store_dir, 0, part, inner_fraction=INNER)
        for part in ("training", "inner_validation")
    }
    instruments = load_instruments(store, str(segmenter_dir), CONFIGS, parts["training"], seed)
    return calibration_scores(parts["inner_validation"], instruments, num_slices, seed)


def judge(scores: pd.DataFrame, max_lost: float) -> pd.DataFrame:
    """The scores with ``rejected``, by judges that saw other cases alone; None: not judged."""
    cases = {case: number % PARTS for number, case in enumerate(sorted(scores.case.unique()))}
    part = scores.case.map(cases)
    scores["rejected"] = None
    for number in range(PARTS):
        judges = judges_of(scores[part != number], max_lost)
        for group, rows in scores[part == number].groupby("group"):
            if judges[group] is not None:
                scores.loc[rows.index, "rejected"] = judges[group].verdict(rows) < 0
    return scores


def count(rows: pd.DataFrame) -> dict:
    """{kind: [rejected, of]}; good slices as they are, and in other gray levels, by themselves."""
    rows = rows[rows.rejected.notna()]
    kinds = rows.kind.where(rows.kind != "", "good_changed").where(~rows.as_it_is, "good")
    return {
        kind: [int(part.rejected.sum()), len(part)] for kind, part in rows.groupby(kinds.to_numpy())
    }


def total(counts: dict, kinds: tuple[str, ...]) -> tuple[int, int]:
    """Rejected and all of some kinds."""
    found = [counts.get(kind, [0, 0]) for kind in kinds]
    return sum(rejected for rejected, _ in found), sum(of for _, of in found)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--slices", type=int, default=120, help="with label, and as many without")
    parser.add_argument("--max_lost", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    start, by_set, apart, pooled = time.monotonic(), {}, {}, []
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        for name in options.sets:
            scores = score_set(name, options.data.resolve(), work, options.slices, options.seed)
            judged = judge(scores, options.max_lost)
            by_set[name] = count(judged[judged.group == "large"])
            apart[name] = {
                group: count(judged[judged.group == group]) for group in ("small", "empty")
            }
            pooled.append(judged[judged.group == "large"])
            logger.warning("%s: %s", name, json.dumps(by_set[name]))
    counts = count(pd.concat(pooled))
    rejected, planted = total(counts, ISSUE_KINDS)
    lost, good = total(counts, ("good", "good_changed"))
    figures = {
        "name": "planted_defects",
        "passed": rejected,
        "of": planted,
        "rejected_share": round(rejected / planted, 4),
        "good_lost": lost,
        "good": good,
        "good_lost_share": round(lost / good, 4),
        "met": bool(rejected >= 0.99 * planted and lost <= 0.05 * good),
        "rejected_by_kind": counts,
        "rejected_by_set": by_set,
        "small_and_empty_labels": apart,
        "max_lost": options.max_lost,
        "seconds": round(time.monotonic() - start),
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    raise SystemExit(not figures["met"])


if __name__ == "__main__":
    main()

"""The best classical arm of a study, and how far the arms with variants lie from it."""

import pandas as pd

from diffboost import statistics
from diffboost.plans import Experiment, uses_variants


def against_best_classical(
    metrics: pd.DataFrame, logs: pd.DataFrame, experiment: Experiment
) -> dict | None:
    """What variants add to the best that is had without them; a gain over baseline says less.

    The arm is chosen by the mean over trainings of the best Dice that chose an epoch, which is of
    inner validation unless the study selects on test cases.

    Args:
        metrics: of the base, see `results.load_metrics`.
        logs: of segmenters, as `results.read_training_logs` gives them.
        experiment: the study.

    Returns:
        arm; selection, what it was chosen on; val_dice, {classical arm: mean}; and for each arm
        with variants differences {arm: paired difference in Dice, as `statistics.summarize` has it}
        and verdicts. None below two classical arms, or without an arm with variants.

    Source: engineering choice (docs/results/protocol.md)
    """
    done = set(metrics["arm"])
    variants = [arm for arm in experiment.arms if uses_variants(arm) and arm in done]
    if not variants or "val_dice" not in logs:
        return None
    ordered = logs[logs["fold"].isin(experiment.folds) & logs["seed"].isin(experiment.seeds)]
    best = ordered.groupby(["arm", "fold", "seed"])["val_dice"].max().groupby("arm").mean().dropna()
    classical = [arm for arm in experiment.arms if arm in set(best.index) & done - set(variants)]
    if len(classical) < 2:
        return None
    arm = best[classical].idxmax()
    found = statistics.summarize(metrics, [arm, *variants], arm)[1]
    differences = {name: by[statistics.VERDICT_METRIC] for name, by in found.items()}
    return {
        "arm": arm,
        "selection": experiment.segmentation.get("selection", "inner_validation"),
        "val_dice": {name: float(best[name]) for name in classical},
        "differences": differences,
        "verdicts": {name: statistics.verdict(by) for name, by in differences.items()},
    }

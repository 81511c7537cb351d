"""Mean, spread and paired differences of segmentation metrics; the unit is a case."""

import numpy as np
import pandas as pd
from scipy import stats

METRICS = ("dice", "precision", "recall", "hd95_mm", "assd_mm")
LOWER_IS_BETTER = ("hd95_mm", "assd_mm")
NUM_RESAMPLES = 9999


def case_values(metrics: pd.DataFrame) -> pd.DataFrame:
    """One value per arm, metric and case: first the mean over labels and seeds (and folds).

    A case counts once however often it was tested, so that seeds do not pass for patients. Values
    that do not exist (a distance to an empty mask) are left out of their case's mean.

    Args:
        metrics: columns arm, fold, seed, case, label, metric, value.

    Returns:
        Index (arm, metric), a column a case, float; NaN where a case has no value.

    Source: engineering choice
    """
    finite = metrics.assign(value=metrics["value"].replace([np.inf, -np.inf], np.nan))
    return finite.groupby(["arm", "metric", "case"])["value"].mean().unstack("case")


def describe(values: pd.Series) -> dict:
    """Mean, sample standard deviation and count of the values that exist; NaN if there are none.

    Source: engineering choice
    """
    values = values.dropna()
    return {"mean": float(values.mean()), "sd": float(values.std(ddof=1)), "n": len(values)}


def paired_difference(values: pd.Series, reference: pd.Series, seed: int = 0) -> dict:
    """How far `values` lie above `reference`, case by case.

    Args:
        values: one value a case.
        reference: the same, of the arm that is compared with.
        seed: of the resampling.

    Returns:
        mean: of the differences; ci95: its 95 % percentile bootstrap interval over cases, [low,
        high]; p: two-sided Wilcoxon signed-rank test, not adjusted for the number of arms; n: cases
        that have both values. NaN where fewer than two cases have both.

    Source: Efron and Tibshirani 1993, chapter 13; evaluation facts, "Uncertainty"
    """
    both = pd.concat([values, reference], axis=1).dropna().to_numpy(dtype=float)
    difference = both[:, 0] - both[:, 1]
    if len(difference) < 2:
        return {"mean": np.nan, "ci95": [np.nan, np.nan], "p": np.nan, "n": len(difference)}
    interval = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    p = stats.wilcoxon(difference).pvalue if difference.any() else 1.0
    ci95 = [float(interval.low), float(interval.high)]
    return {"mean": float(difference.mean()), "ci95": ci95, "p": float(p), "n": len(difference)}


def summarize(metrics: pd.DataFrame, arms: list[str]) -> tuple[dict, dict]:
    """Every arm's figures, and its paired differences to `baseline`.

    Args:
        metrics: columns arm, fold, seed, case, label, metric, value.
        arms: in the order of the report; those without a row are left out.

    Returns:
        {arm: {metric: {"mean", "sd", "n"}}} and {arm: {metric: {"mean", "ci95", "p", "n"}}}, the
        second without baseline.

    Source: engineering choice
    """
    values = case_values(metrics)
    present = [arm for arm in arms if arm in values.index.get_level_values("arm")]
    named = [name for name in METRICS if name in values.index.get_level_values("metric")]
    figures = {arm: {name: describe(values.loc[arm, name]) for name in named} for arm in present}
    differences = {
        arm: {
            name: paired_difference(values.loc[arm, name], values.loc["baseline", name])
            for name in named
        }
        for arm in present
        if arm != "baseline" and "baseline" in present
    }
    return figures, differences


def seed_means(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over cases per arm (rows) and seed (columns): what training anew changes.

    Source: engineering choice
    """
    chosen = metrics[metrics["metric"] == metric]
    by_case = chosen.groupby(["arm", "seed", "case"])["value"].mean()
    return by_case.groupby(["arm", "seed"]).mean().unstack("seed")

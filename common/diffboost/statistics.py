"""Mean, spread and paired differences of segmentation metrics; the unit is a case."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats

METRICS = ("dice", "precision", "recall", "hd95_mm", "assd_mm")
LOWER_IS_BETTER = ("hd95_mm", "assd_mm")
NUM_RESAMPLES = 9999
# When an arm's verdict is "gain shown": by this metric, with this error rate over all arms.
VERDICT_METRIC = "dice"
SIGNIFICANCE = 0.05


def case_values(metrics: pd.DataFrame) -> pd.DataFrame:
    """One value per arm, metric and case: first the mean over labels and seeds (and folds).

    A case counts once however often it was tested, so that seeds do not pass for patients. Values
    that do not exist (NaN, infinite) are left out of their case's mean.

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


def mean_interval(values: np.ndarray, seed: int = 0, confidence: float = 0.95) -> list[float]:
    """Percentile bootstrap interval of a mean over cases, [low, high]; NaN below two cases.

    Args:
        values: one a case.
        seed: of the resampling.
        confidence: share of such intervals that hold the true mean.

    Source: Efron and Tibshirani 1993, chapter 13
    """
    if len(values) < 2:
        return [np.nan, np.nan]
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


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
    p = stats.wilcoxon(difference).pvalue if difference.any() else 1.0
    ci95 = mean_interval(difference, seed)
    return {"mean": float(difference.mean()), "ci95": ci95, "p": float(p), "n": len(difference)}


def crossed_interval(differences: np.ndarray, confidence: float = 0.95) -> dict:
    """Mean of differences that vary with the training's seed and with the unit that is scored.

    Both are draws: other seeds and other units would give other means. The squared standard error
    is the sum of those of the seeds' means and of the units' means, which counts what is left over
    twice and so is on the safe side; degrees of freedom are Satterthwaite's. One seed, or one unit,
    says nothing about others: then there is no interval.

    Args:
        differences: (seeds, units), finite.
        confidence: share of such intervals that hold the true mean.

    Returns:
        mean, se (standard error), interval ([low, high], by Student's t); se and interval are NaN
        below two seeds or two units.

    Source: Searle, Casella, McCulloch 1992, two crossed random factors; Satterthwaite 1946
    """
    mean = float(differences.mean())
    counts = differences.shape
    if min(counts) < 2:
        return {"mean": mean, "se": np.nan, "interval": [np.nan, np.nan]}
    parts = [differences.mean(1 - axis).var(ddof=1) / n for axis, n in enumerate(counts)]
    square = sum(parts)
    if square == 0:
        return {"mean": mean, "se": 0.0, "interval": [mean, mean]}
    freedom = square**2 / sum(part**2 / (n - 1) for part, n in zip(parts, counts, strict=True))
    se = float(np.sqrt(square))
    reach = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * se
    return {"mean": mean, "se": se, "interval": [mean - reach, mean + reach]}


def training_interval(
    metrics: pd.DataFrame, arm: str, reference: str, metric: str, confidence: float = 0.95
) -> list[float]:
    """Interval of a paired difference whose trainings, too, are draws, as its cases are.

    An interval over cases alone says that these segmenters differ on other cases; segmenters of
    other seeds could turn it round.

    Args:
        metrics: columns arm, fold, seed, case, label, metric, value.
        arm: whose values are looked at.
        reference: the arm that it is compared with, at the same seeds.
        metric: as the column metric names it.
        confidence: share of such intervals that hold the true difference.

    Returns:
        [low, high]; NaN below two seeds or two cases.

    Source: see `crossed_interval`
    """
    finite = metrics[(metrics["metric"] == metric) & np.isfinite(metrics["value"])]
    values = finite.groupby(["arm", "seed", "case"])["value"].mean()
    values = values.unstack("arm").reindex(columns=[arm, reference])  # NaN where one has none
    difference = (values[arm] - values[reference]).unstack("case")
    difference = difference.dropna(how="all").dropna(axis="columns")  # seeds of both, then cases
    return crossed_interval(difference.to_numpy(), confidence)["interval"]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: how many tests are made together raises every p.

    Args:
        p_values: p of each test by name; NaN (no test was possible) is not counted.

    Returns:
        Adjusted p by name, at most 1; NaN stays.

    Source: Holm 1979
    """
    made = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    adjusted, largest = dict.fromkeys(p_values, np.nan), 0.0
    for rank, (p, name) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p))
        adjusted[name] = largest
    return adjusted


def verdict(difference: Mapping) -> str:
    """Says "gain shown" if both intervals lie above 0 and Holm's p is below 0.05, else not.

    Args:
        difference: of the Dice, with the keys ci95, p_holm and training_ci95, of which NaN shows
            nothing; the last is passed over where num_seeds is 1, for then there is none.

    Source: engineering choice
    """
    shown = difference["ci95"][0] > 0 and difference["p_holm"] < SIGNIFICANCE
    over_seeds = difference["num_seeds"] == 1 or difference["training_ci95"][0] > 0
    return "gain shown" if shown and over_seeds else "no gain shown"


def _compare(metrics: pd.DataFrame, arm: str, reference: str, names: list[str]) -> dict:
    """Each metric's paired difference of two arms, at the folds and seeds that both have."""
    pair = metrics[metrics["arm"].isin([arm, reference])]
    shared = pair[pair.groupby(["fold", "seed"])["arm"].transform("nunique") == 2]
    values = case_values(shared).reindex(pd.MultiIndex.from_product([[arm, reference], names]))
    return {
        name: paired_difference(values.loc[(arm, name)], values.loc[(reference, name)])
        | {"num_seeds": pair["seed"].nunique()}
        | {"training_ci95": training_interval(shared, arm, reference, name)}
        for name in names
    }


def summarize(
    metrics: pd.DataFrame, arms: list[str], reference: str = "baseline"
) -> tuple[dict, dict]:
    """Every arm's figures, and its paired differences to a reference.

    Args:
        metrics: columns arm, fold, seed, case, label, metric, value.
        arms: in the order of the report; those without a row are left out.
        reference: the arm that the others are compared with.

    Returns:
        {arm: {metric: {"mean", "sd", "n"}}} and {arm: {metric: {"mean", "ci95", "p", "n",
        "p_holm", "training_ci95", "num_seeds"}}}, the second without the reference: over the folds
        and seeds that both arms have, num_seeds being those of either; Holm's p counts the arms of
        one metric.

    Source: engineering choice
    """
    values = case_values(metrics)
    present = [arm for arm in arms if arm in values.index.get_level_values("arm")]
    named = [name for name in METRICS if name in values.index.get_level_values("metric")]
    figures = {arm: {name: describe(values.loc[arm, name]) for name in named} for arm in present}
    differences = {
        arm: _compare(metrics, arm, reference, named)
        for arm in present
        if arm != reference and reference in present
    }
    for name in named:
        adjusted = holm({arm: found[name]["p"] for arm, found in differences.items()})
        for arm, p in adjusted.items():
            differences[arm][name]["p_holm"] = p
    return figures, differences


def over_folds(metrics: pd.DataFrame, arms: list[str]) -> dict:
    """Mean of the folds' means, and the root of their mean variance: the paper's "mean ± sd".

    Args:
        metrics: columns arm, fold, seed, case, label, metric, value.
        arms: in the order of the report; those without a row are left out.

    Returns:
        {arm: {metric: {"mean", "sd", "num_folds"}}}; sd is within folds, over their cases.

    Source: facts 33
    """
    folds = {fold: case_values(rows) for fold, rows in metrics.groupby("fold")}
    found = {}
    for arm in arms:
        for name in METRICS:
            parts = [describe(v.loc[arm, name]) for v in folds.values() if (arm, name) in v.index]
            if parts:
                mean = np.nanmean([part["mean"] for part in parts])
                sd = np.sqrt(np.nanmean([part["sd"] ** 2 for part in parts]))
                figures = {"mean": float(mean), "sd": float(sd), "num_folds": len(parts)}
                found.setdefault(arm, {})[name] = figures
    return found


def ablation_points(metrics: pd.DataFrame, knob: str, metric: str = "dice") -> list[dict]:
    """What each value of an ablated knob gives, and how far that lies above baseline.

    Baseline is that of the same value where it was trained (networks), else the study's own, on
    the folds of the ablation.

    Args:
        metrics: of a whole study; columns knob and knob_value, both empty for the base.
        knob: as the column knob names it.
        metric: as the column metric names it.

    Returns:
        A dictionary a value and arm: value (text), arm, mean, ci95, n, and difference, as
        `paired_difference` gives it (None for baseline itself).

    Source: paper Sec. 5.1, Figures 6 and 7
    """
    chosen = metrics[metrics["knob"] == knob]
    base = metrics[(metrics["knob"] == "") & metrics["fold"].isin(chosen["fold"].unique())]
    own = case_values(base).loc["baseline", metric]
    points = []
    for value in chosen["knob_value"].unique():
        values = case_values(chosen[chosen["knob_value"] == value])
        arms = [arm for arm in chosen["arm"].unique() if (arm, metric) in values.index]
        reference = values.loc["baseline", metric] if "baseline" in arms else own
        for arm in arms:
            cases = values.loc[arm, metric].dropna()
            difference = None if arm == "baseline" else paired_difference(cases, reference)
            point = {"value": value, "arm": arm, "mean": float(cases.mean()), "n": len(cases)}
            point |= {"ci95": mean_interval(cases.to_numpy()), "difference": difference}
            points.append(point)
    return points


def seed_means(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over cases per arm (rows) and seed (columns): what training anew changes.

    Source: engineering choice
    """
    chosen = metrics[metrics["metric"] == metric]
    by_case = chosen.groupby(["arm", "seed", "case"])["value"].mean()
    return by_case.groupby(["arm", "seed"]).mean().unstack("seed")

"""How many variants a slice are worth making: what a rung costs, what it gains, when to stop."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from diffboost.ratio.budget import Price
from diffboost.statistics import crossed_interval

# Two rungs in a row that add nothing end the search: one of them may be bad luck.
PATIENCE = 2
# Below so many cases the slices of the inner validation are scored, not its cases.
MIN_CASES = 8


def probe_epochs(ordered: int | None, whole: int) -> int:
    """Epochs of a probe: those ordered, or a whole training's, for variants pay late in it.

    Raises:
        ValueError: more than a whole training has, or below 1.

    Source: engineering choice
    """
    if ordered is None:
        return whole
    if type(ordered) is not int or not 1 <= ordered <= whole:
        raise ValueError(f"epochs: {ordered!r}; allowed: 1 to {whole}, those of the segmenter")
    return ordered


def next_step(
    rungs: Sequence[int], last: int, spent: float, price: Price, limit: float, num_seeds: int
) -> tuple[int, str | None]:
    """The ratio to go to, and why the search ends there; None: it is a rung, with probes.

    Probes are bought where they may pay: a rung that ends the search saves the variants up to the
    largest ratio that the budget lasts for. The first that can end it comes ``PATIENCE`` after the
    smallest. Where the probes up to there cost as much as is saved, the rest goes into variants.

    Args:
        rungs: of ``rungs_up_to``.
        last: the ratio so far; 0 before the first rung.
        spent: so far, in the budget's unit.
        price: in the same.
        limit: of the budget, in the same.
        num_seeds: probes a rung; 0: the inner validation has too few cases for any.

    Returns:
        The ratio (at least 1) and ``max_ratio``, ``few_cases`` (no probes could tell), ``cheap``
        (all variants cost less than probes) or ``budget`` (those that it pays for do).

    Source: engineering choice
    """
    if last == rungs[-1]:
        return last, "max_ratio"
    number = next(n for n, rung in enumerate(rungs) if rung > last)
    paid = min(max(0.0, limit - spent) / price.variants, rungs[-1])  # the limit may be infinite
    most = max(1, min(last + int(paid), rungs[-1]))
    if num_seeds == 0:
        return most, "few_cases"
    end = min(max(number, PATIENCE), len(rungs) - 1)  # the first rung that can end the search
    probes = price.probe * num_seeds * (end + 1 - number)
    if probes >= price.variants * (most - rungs[end]):
        return most, "cheap" if most == rungs[-1] else "budget"
    return rungs[number], None


def reach(
    rungs: Sequence[int], price: Price, limit: float, num_seeds: int
) -> tuple[int, list[int]]:
    """The ratio that a search ends with if no rung ends it, and the rungs that get probes.

    Args:
        rungs, price, limit, num_seeds: see ``next_step``.

    Source: engineering choice
    """
    probed: list[int] = []
    while True:
        last = probed[-1] if probed else 0
        spent = price.variants * last + price.probe * num_seeds * len(probed)
        ratio, why = next_step(rungs, last, spent, price, limit, num_seeds)
        if why is not None:
            return ratio, probed
        probed.append(ratio)


def judge(rungs: Sequence[Mapping], min_gain: float) -> dict:
    """What the rungs so far show: which of them is enough, and whether more are worth trying.

    A rung gains if its mean Dice lies above that of the last rung that gained (first: of the
    smallest) by at least ``min_gain`` and by more than one standard error of the difference, which
    is paired by seed and unit. Not a test: with few cases no gain would pass one.

    Args:
        rungs: in growing order, each with ``ratio`` and ``scores``: {seed: {unit: Dice in
            [0, 1]}}, the same seeds and units everywhere.
        min_gain: in Dice points (1 = 0.01).

    Returns:
        enough: the smallest ratio whose score is within noise of all that came after it; gains: for
        each rung after the first {ratio, over, mean, se, ci95 (Dice points; None where there is
        none), gained}; exhausted: the last ``PATIENCE`` rungs did not gain. Of no rungs: None.

    Source: engineering choice; Breiman et al. 1984, the one-standard-error rule
    """
    if not rungs:
        return {"enough": None, "gains": [], "exhausted": False}
    enough, without, gains = rungs[0], 0, []
    for rung in rungs[1:]:
        found = crossed_interval(100 * (score_matrix(rung) - score_matrix(enough)))
        found["ci95"] = found.pop("interval")
        if math.isnan(found["se"]):  # one seed or one unit: its mean alone decides
            found |= {"se": None, "ci95": None}
        gained = found["mean"] >= min_gain and found["mean"] > (found["se"] or 0.0)
        gains.append({"ratio": rung["ratio"], "over": enough["ratio"], **found, "gained": gained})
        enough, without = (rung, 0) if gained else (enough, without + 1)
    return {"enough": enough["ratio"], "gains": gains, "exhausted": without >= PATIENCE}


def score_matrix(rung: Mapping) -> np.ndarray:
    """The scores of a rung, (seeds, units), both in the order of their names."""
    return pd.DataFrame(rung["scores"]).sort_index(axis=0).sort_index(axis=1).to_numpy().T


def search(
    rungs: Sequence[int],
    done: Sequence[Mapping],
    try_rung: Callable[[int], Mapping],
    step: Callable[[int], tuple[int, str | None]],
    min_gain: float,
) -> tuple[int, list[Mapping], dict, str]:
    """Tries one ratio after the other until more variants gain nothing or cost too much.

    Args:
        rungs: of ``rungs_up_to``.
        done: rungs that an interrupted search has tried; they are not tried again.
        try_rung: makes the variants of a ratio, trains and scores the probes; gives ``ratio`` and
            ``scores``, see ``judge``.
        step: the last ratio to what follows, see ``next_step``.
        min_gain: see ``judge``.

    Returns:
        The ratio to make, the rungs tried, what ``judge`` says of them, and why no more were:
        ``noise``, or what ``next_step`` says.

    Source: engineering choice (issue 6, "How many variants")
    """
    tried = list(done)
    while True:
        found = judge(tried, min_gain)
        last = tried[-1]["ratio"] if tried else 0
        if found["exhausted"]:
            return last, tried, found, "noise"
        ratio, why = step(last)
        if why is not None:
            return ratio, tried, found, why
        tried.append(try_rung(ratio))

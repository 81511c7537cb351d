"""How many variants a slice are worth making: what a rung costs, what it gains, when to stop."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diffboost.knobs import nearest
from diffboost.statistics import crossed_interval

# Ratios grow by about two a rung, as an ablation over them does (paper Figure 6: 1 to 50).
SERIES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
# Two rungs in a row that add nothing end the search: one of them may be bad luck.
PATIENCE = 2
# Below so many cases the slices of the inner validation are scored, not its cases.
MIN_CASES = 8
PROBE_SHARE = 4  # a probe has a quarter of the epochs of a whole training
# Budgets by name: how many of the unit on the right one of them is.
BUDGETS = {
    "share": ("share", 1.0),
    "hours": ("seconds", 3600.0),
    "tflop": ("flops", 1e12),
    "pflop": ("flops", 1e15),
}


@dataclass(frozen=True)
class Price:
    """What the parts of a search cost, all in one unit (FLOPs or seconds).

    Args:
        variants: one more variant of every training slice.
        probe: one short training of a segmenter, scored.
        training: one whole training of it.

    Source: engineering choice
    """

    variants: float
    probe: float
    training: float

    def rung(self, last_ratio: int, ratio: int, num_seeds: int) -> float:
        """Growing a store from one ratio to the next, with a probe a seed."""
        return self.variants * (ratio - last_ratio) + self.probe * num_seeds

    def whole(self, ratio: int) -> float:
        """All variants of a ratio, and one training on them."""
        return self.variants * ratio + self.training


@dataclass(frozen=True)
class Budget:
    """What a search may cost.

    Args:
        amount: in ``unit``; for ``share`` in (0, 1].
        unit: ``seconds`` of this machine, ``flops``, or ``share`` of the FLOPs of the largest
            ratio's variants and one training on them.

    Source: engineering choice
    """

    amount: float
    unit: str

    @property
    def counts(self) -> str:
        """What is added up: ``seconds`` or ``flops``."""
        return "seconds" if self.unit == "seconds" else "flops"

    def limit(self, price: Price, max_ratio: int) -> float:
        """The budget in ``counts``; ``price`` in the same."""
        return self.amount * price.whole(max_ratio) if self.unit == "share" else self.amount


def read_budget(value: object) -> Budget:
    """A budget as people write it.

    Args:
        value: one of {share: x} with x in (0, 1], {hours: x}, {tflop: x}, {pflop: x}.

    Raises:
        ValueError: another value.

    Source: engineering choice
    """
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"budget: {value!r}; one of {{{': x}, {'.join(BUDGETS)}: x}} is needed")
    name, amount = next(iter(value.items()))
    if name not in BUDGETS:
        raise ValueError(f"budget: {name!r} is unknown; {nearest(name, BUDGETS)}")
    highest = 1 if name == "share" else math.inf
    if type(amount) not in (int, float) or not 0 < amount <= highest or math.isinf(amount):
        raise ValueError(f"budget: {name}: {amount!r}; a number above 0 is needed, a share up to 1")
    unit, factor = BUDGETS[name]
    return Budget(amount * factor, unit)


def rungs_up_to(max_ratio: int) -> list[int]:
    """The ratios that a search tries: 1, 2, 5, 10, 20 … and the largest.

    Raises:
        ValueError: the largest is not a whole number from 2 up.

    Source: engineering choice
    """
    if type(max_ratio) is not int or max_ratio < 2:
        raise ValueError(f"max_ratio: {max_ratio!r}; a whole number from 2 up is needed")
    return [ratio for ratio in SERIES if ratio < max_ratio] + [max_ratio]


def probe_epochs(ordered: int | None, whole: int) -> int:
    """Epochs of a probe: those ordered, or a share of a whole training's.

    Raises:
        ValueError: more than a whole training has, or below 1.

    Source: engineering choice
    """
    if ordered is None:
        return math.ceil(whole / PROBE_SHARE)
    if type(ordered) is not int or not 1 <= ordered <= whole:
        raise ValueError(f"epochs: {ordered!r}; allowed: 1 to {whole}, those of the segmenter")
    return ordered


def next_step(
    rungs: Sequence[int], last: int, spent: float, price: Price, limit: float, num_seeds: int
) -> tuple[int, str | None]:
    """The ratio to go to, and why the search ends there; None: it is a rung, with probes.

    Probes are bought where they may pay: a rung that ends the search saves the variants up to the
    largest ratio that the budget lasts for. Where its probes cost more than those, or more than is
    left, the rest of the budget goes into variants.

    Args:
        rungs: of ``rungs_up_to``.
        last: the ratio so far; 0 before the first rung.
        spent: so far, in the budget's unit.
        price: in the same.
        limit: of the budget, in the same.
        num_seeds: probes a rung.

    Returns:
        The ratio (at least 1) and ``max_ratio``, ``budget`` (too little is left for probes) or
        ``cheap`` (variants cost less than probes).

    Source: engineering choice
    """
    if last == rungs[-1]:
        return last, "max_ratio"
    ratio = next(rung for rung in rungs if rung > last)
    paid = min(max(0.0, limit - spent) / price.variants, rungs[-1])  # the limit may be infinite
    most = max(1, min(last + int(paid), rungs[-1]))
    if spent + price.rung(last, ratio, num_seeds) > limit:
        return most, "budget"
    if price.probe * num_seeds >= price.variants * (most - ratio):
        return most, "cheap"
    return ratio, None


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

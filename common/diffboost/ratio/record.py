"""What a search for the ratio found, in figures and in a sentence: the content of ratio.json."""

from collections.abc import Mapping, Sequence

from diffboost.ratio.budget import Budget, Price
from diffboost.ratio.rule import PATIENCE, score_matrix

DECISION = "ratio.json"  # in the synthetic store
SECONDS = "ratio_seconds.json"  # beside it: what a clock said, which differs from run to run


def spent_flops(price: Price, ratio: int, num_rungs: int, num_seeds: int) -> float:
    """FLOPs of a search so far.

    Args:
        price: in FLOPs.
        ratio: variants a slice that were made.
        num_rungs: that were probed.
        num_seeds: probes a rung.

    Source: engineering choice
    """
    return price.variants * ratio + price.probe * num_seeds * num_rungs


def unit_name(unit: str | tuple[str, int]) -> str:
    """A case by its name, a slice by its case and number: ``case_3:12``."""
    return unit if isinstance(unit, str) else f"{unit[0]}:{unit[1]}"


def decision(
    ratio: int,
    rungs: Sequence[Mapping],
    found: Mapping,
    why: str,
    settings: Mapping,
    price: Price,
    budget: Budget,
) -> dict:
    """The content of ratio.json.

    Args:
        ratio: variants a slice that were made.
        rungs: that were tried, with their scores (Dice in [0, 1]); maybe none.
        found: what ``ratio.judge`` says of them.
        why: the search ended, see ``ratio.search``.
        settings: what the search is.
        price: in FLOPs.
        budget: of the search.

    Returns:
        ratio (variants a slice in the store), enough (the smallest rung within noise of the
        largest; None without rungs), why,
        reason (why, in a sentence), unit (``case`` or ``slice``), num_units, num_cases, num_seeds,
        rungs, gains (Dice points), flops, limit_seconds, settings.

    Source: engineering choice
    """
    num_seeds, max_ratio = len(settings["seeds"]), settings["max_ratio"]
    spent = spent_flops(price, ratio, len(rungs), num_seeds)
    whole = price.whole(max_ratio)
    units = list(next(iter(rungs[0]["scores"].values()))) if rungs else []
    cases = {name.rpartition(":")[0] or name for name in units}
    content = {
        "ratio": ratio,
        "enough": found["enough"],
        "why": why,
        "unit": "slice" if any(":" in name for name in units) else "case",
        "num_units": len(units),
        "num_cases": len(cases),
        "num_seeds": num_seeds,
        "rungs": [
            {
                "ratio": rung["ratio"],
                "dice": float(score_matrix(rung).mean()),
                "scores": rung["scores"],
            }
            for rung in rungs
        ],
        "gains": found["gains"],
        "flops": {
            "variants": price.variants,
            "probe": price.probe,
            "training": price.training,
            "spent": spent,
            "whole": whole,
            "share": spent / whole,
            "limit": budget.limit(price, max_ratio) if budget.counts == "flops" else None,
        },
        "limit_seconds": budget.amount if budget.counts == "seconds" else None,
        "settings": settings,
    }
    return {"reason": reason(content), **content}


def reason(content: Mapping) -> str:
    """Why the search ended with its ratio, for people.

    Args:
        content: of :func:`decision`.

    Source: engineering choice
    """
    ended = {
        "noise": f"the last {PATIENCE} steps to more variants gained nothing beyond noise",
        "budget": "the budget pays for no more; trainings that tell whether fewer are enough would "
        "have left too little",
        "cheap": "the budget pays for these, and trainings that tell whether fewer are enough "
        "would have cost as much as the variants that they could save",
        "few_cases": "as many as budget and max_ratio allow, for the inner validation has fewer "
        f"than {content['settings']['min_cases']} cases, too few to tell a gain from chance",
        "max_ratio": "these are the most that were asked for",
    }[content["why"]]
    sentence = f"{content['ratio']} variants a slice were made: {ended}"
    if content["gains"]:
        sentence += f"; {_change(content['gains'][-1], content)}"
        if content["why"] == "noise" or content["enough"] < content["rungs"][-1]["ratio"]:
            sentence += f". By these probes {content['enough']} would have been enough"
    return sentence + "."


def _change(gain: Mapping, content: Mapping) -> str:
    """The last gain in words."""
    text = f"from {gain['over']} to {gain['ratio']} the probes' Dice changed by "
    text += f"{gain['mean']:+.1f} points"
    interval = "no interval"
    if gain["ci95"] is not None:
        interval = "95 % interval {:+.1f} to {:+.1f}".format(*gain["ci95"])
    return f"{text} ({interval}; {_counted(content['num_seeds'], 'seed')}, {_tested(content)})"


def _tested(content: Mapping) -> str:
    """What was scored, in words."""
    cases = _counted(content["num_cases"], "case")
    if content["unit"] == "case":
        return cases
    return f"{_counted(content['num_units'], 'slice')} of {cases}, which say little of other cases"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

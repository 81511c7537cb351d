"""The figures of the results page; see results_page.py."""

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from diffboost.figures import STYLE, arm_colors
from diffboost.plans import uses_variants
from diffboost.statistics import case_values, mean_interval


def draw_curves(studies: dict[str, pd.DataFrame], path: Path, sizes: dict[str, str]) -> None:
    """Mean Dice of each arm over the number of labelled cases, with intervals over test cases."""
    arms = [arm for arm in ("baseline", "mirror", "rotate", "nnunet", "diffboost",
            "diffboost+mirror", "diffboost+rotate", "diffboost+nnunet")
            if any(arm in set(metrics.arm) for metrics in studies.values())]  # fmt: skip
    colors = arm_colors(arms)
    apart = 0.008 * len(studies)  # of a size's arms, so that their bars can be told apart
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axis = figure.subplots()
        for number, arm in enumerate(arms):
            points = []
            for place, metrics in enumerate(studies.values()):
                if arm in set(metrics.arm):
                    values = case_values(metrics).loc[arm, "dice"].dropna().to_numpy()
                    points.append((place, values.mean(), *mean_interval(values)))
            if points:
                x, mean, low, high = (list(column) for column in zip(*points, strict=True))
                x = [value + apart * (number - len(arms) / 2) for value in x]
                axis.plot(x, mean, marker="o", markersize=3.5, color=colors[arm], label=arm,
                          linestyle="-" if uses_variants(arm) else "--")  # fmt: skip
                axis.vlines(x, low, high, color=colors[arm], linewidth=0.8, alpha=0.6)
        axis.set_xticks(range(len(studies)), [sizes[name] for name in studies])
        axis.set_xlabel("labelled cases of a fold (bars: 95 % interval over test cases)")
        axis.set_ylabel("Dice")
        figure.legend(frameon=False, fontsize=8, loc="outside right upper")
        figure.savefig(path, metadata={"Date": None})


def draw_cases(metrics: pd.DataFrame, arm: str, reference: str, path: Path) -> None:
    """Every test case's Dice with an arm over that with the reference; three cases are named.

    These are the greatest gain, the greatest loss, and the median of the gains.
    """
    values = case_values(metrics)
    pair = pd.DataFrame({"x": values.loc[reference, "dice"], "y": values.loc[arm, "dice"]}).dropna()
    ordered = (pair.y - pair.x).sort_values(kind="stable").index
    named = {"greatest loss": ordered[0], "median gain": ordered[len(ordered) // 2],
             "greatest gain": ordered[-1]}  # fmt: skip
    color = arm_colors(list(metrics.arm.unique()))[arm]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.4), layout="constrained")
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        axis.plot(pair.x, pair.y, ".", color=color, markersize=5, alpha=0.5)
        # The words stand in the corners that a gain leaves empty, and their lines leave at an end.
        places = {"greatest loss": (0.85, 0.07), "median gain": (1, 0), "greatest gain": (0, 1)}
        for what, case in named.items():
            axis.annotate(
                f"{what}: {case}", pair.loc[case], xytext=places[what], fontsize=7,
                ha="left" if what == "greatest gain" else "right",
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "0.4",
                            "relpos": (0.5 if what == "greatest loss" else 1, 0.5)},
            )  # fmt: skip
        axis.set_xlabel(f"Dice with {reference}")
        axis.set_ylabel(f"Dice with {arm}")
        axis.set_aspect("equal")
        figure.savefig(path, metadata={"Date": None})

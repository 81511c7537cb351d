"""Charts of a report: paired differences, training curves, time and memory."""

import base64
import io
import itertools

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, which the color-blind can tell apart; baseline is gray.
# Darker shades follow for studies of many arms.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6BB1")
COLORS += ("#003F63", "#8A5F00", "#00563F", "#7D3F62", "#7A3600", "#22668C", "#4C3566")
BASELINE_COLOR = "#7A7F87"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#B8BDC6",
    "axes.labelcolor": "#3C434D",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#3C434D",
    "ytick.color": "#3C434D",
    "svg.hashsalt": "diffboost",
}


def arm_colors(arms: list[str]) -> dict[str, str]:
    """The color of each arm, the same in every chart of a report.

    Source: engineering choice
    """
    colors = itertools.cycle(COLORS)
    return {arm: BASELINE_COLOR if arm == "baseline" else next(colors) for arm in arms}


def embed(figure: Figure, form: str = "svg", dpi: int = 130) -> str:
    """A figure as a data URI, so that a page needs no other file.

    Args:
        figure: what to draw.
        form: `svg` for charts, `png` for pictures of pixels.
        dpi: of a PNG.

    Source: engineering choice
    """
    buffer = io.BytesIO()
    keywords = {"metadata": {"Date": None}} if form == "svg" else {"dpi": dpi}
    with rc_context(STYLE):
        figure.savefig(buffer, format=form, bbox_inches="tight", **keywords)
    kind = {"svg": "image/svg+xml", "png": "image/png"}[form]
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def difference_chart(differences: dict, colors: dict[str, str]) -> str:
    """Paired Dice difference to baseline of each arm with its 95 % interval, as a data URI.

    Args:
        differences: {arm: {"dice": {"mean", "ci95", …}, …}}.
        colors: of each arm.

    Source: engineering choice
    """
    arms = list(differences)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.8 + 0.38 * len(arms)))
        axes = figure.subplots()
        axes.axvline(0, color=BASELINE_COLOR, linewidth=1)
        for row, arm in enumerate(arms):
            found = differences[arm]["dice"]
            axes.plot(found["ci95"], [row, row], color=colors[arm], linewidth=2.5, alpha=0.7)
            axes.plot(found["mean"], row, "o", color=colors[arm], markersize=7)
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlabel("Dice above baseline, paired by case (mean, 95 % interval)")
        axes.grid(axis="x", color="#E8EAEE", linewidth=0.8)
        axes.set_axisbelow(True)
        return embed(figure)


def generator_chart(log: pd.DataFrame) -> str:
    """Training loss of the generator of each fold by epoch, as a data URI.

    Args:
        log: columns fold, epoch, train_loss.

    Source: engineering choice
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9))
        axes = figure.subplots()
        for (fold, rows), color in zip(log.groupby("fold"), itertools.cycle(COLORS), strict=False):
            axes.plot(rows["epoch"], rows["train_loss"], ".-", color=color, label=fold)
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("noise loss")
        axes.set_title("Generator, fine-tuning", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        return embed(figure)


def segmenter_chart(log: pd.DataFrame, colors: dict[str, str]) -> str:
    """Inner-validation Dice by epoch: a thin line a run, a thick one the arm's mean, as a data URI.

    Args:
        log: columns arm, fold, seed, epoch, val_dice (NaN in epochs without validation).
        colors: of each arm.

    Source: engineering choice
    """
    validated = log.dropna(subset="val_dice")
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9))
        axes = figure.subplots()
        for arm, color in colors.items():
            rows = validated[validated["arm"] == arm]
            if rows.empty:
                continue
            for _, run in rows.groupby(["fold", "seed"]):
                axes.plot(run["epoch"], run["val_dice"], color=color, alpha=0.25, linewidth=0.8)
            mean = rows.groupby("epoch")["val_dice"].mean()
            axes.plot(mean.index, mean, color=color, linewidth=2, label=arm)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("inner-validation Dice")
        axes.set_title("Segmenters", loc="left", fontsize=10)
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1.05)} if len(colors) > 4 else {}
        axes.legend(frameon=False, fontsize=8 if len(colors) < 12 else 7, **beside)
        return embed(figure)


def cost_chart(costs: pd.DataFrame) -> str:
    """Seconds and largest memory of each stage as two bar charts, as a data URI.

    Args:
        costs: index stage; columns seconds, memory_mib.

    Source: engineering choice
    """
    rows = np.arange(len(costs))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.4, 0.7 + 0.34 * len(costs)))
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, values, color, label in (
            (left, costs["seconds"], COLORS[0], "seconds, all jobs of the stage added"),
            (right, costs["memory_mib"] / 1024, COLORS[2], "GiB, largest job"),
        ):
            bars = axes.barh(rows, values, color=color, height=0.6)
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
            axes.set_xlabel(label)
            axes.margins(x=0.15)
        left.set_yticks(rows, [stage.replace("_", " ") for stage in costs.index])
        left.invert_yaxis()
        return embed(figure)


def ratio_chart(found: dict) -> str:
    """Dice of the probes of each ratio, seed by seed and their mean, as a data URI.

    Args:
        found: a search's ratio.json.

    Source: engineering choice
    """
    ratios = [rung["ratio"] for rung in found["rungs"]]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7))
        axes = figure.subplots()
        seeds = pd.DataFrame(
            [
                {seed: np.mean(list(units.values())) for seed, units in rung["scores"].items()}
                for rung in found["rungs"]
            ]
        )
        axes.plot(ratios, seeds, "-", color=BASELINE_COLOR, linewidth=0.8, alpha=0.7)
        axes.plot(ratios, [rung["dice"] for rung in found["rungs"]], "o-", color=COLORS[0])
        axes.axvline(found["enough"], color=COLORS[1], linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
        axes.minorticks_off()
        axes.set_xlabel("variants a slice (dotted: enough)")
        axes.set_ylabel("Dice of the probes\n(mean; gray: each seed)")
        axes.grid(axis="y", color="#E8EAEE", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.tight_layout()
        return embed(figure)

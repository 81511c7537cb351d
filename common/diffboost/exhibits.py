"""The paper's tables and figures of a study: Table 2, Figures 4, 6 and 7, as files."""

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from monai.bundle import ConfigParser

from diffboost import plans, results, statistics
from diffboost.data.slices import read_store
from diffboost.data.tasks import length_unit
from diffboost.figures import BASELINE_COLOR, STYLE, arm_colors
from diffboost.files import write_aside
from diffboost.pictures import merge_picture
from diffboost.stages import stage_configs

logger = logging.getLogger(__name__)

METRIC_NAMES = {
    "dice": "Dice",
    "precision": "Precision",
    "recall": "Recall",
    "hd95_mm": "HD95",
    "assd_mm": "ASSD",
}
FIGURE_4_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def table2_rows(metrics: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    """Table 2 as numbers: a row an arm and metric.

    Args:
        metrics: of the base, see `results.read_metrics`.
        arms: in the order of the table.

    Returns:
        Columns arm, metric; mean, sd, n over cases; fold_mean, fold_sd, num_folds as the paper
        aggregates; difference to baseline, ci95_low, ci95_high, over cases and seeds
        training_ci95_low, training_ci95_high, p, p_holm, and the verdict in the rows of Dice.

    Source: paper Table 2; facts 33
    """
    figures, differences = statistics.summarize(metrics, arms)
    folds = statistics.over_folds(metrics, arms)
    rows = []
    for arm, by_metric in figures.items():
        for name, found in by_metric.items():
            fold = folds[arm][name]
            row = {"arm": arm, "metric": name} | found
            row |= {"fold_mean": fold["mean"], "fold_sd": fold["sd"]}
            row |= {"num_folds": fold["num_folds"]}
            if arm in differences:
                to_baseline = differences[arm][name]
                row |= {"difference": to_baseline["mean"], "p": to_baseline["p"]}
                for interval in ("ci95", "training_ci95"):
                    low, high = to_baseline[interval]
                    row |= {f"{interval}_low": low, f"{interval}_high": high}
                row |= {"p_holm": to_baseline["p_holm"]}
                if name == statistics.VERDICT_METRIC:
                    row |= {"verdict": statistics.verdict(to_baseline)}
            rows.append(row)
    return pd.DataFrame(rows)


def table2_text(rows: pd.DataFrame, unit: str) -> str:
    """Table 2 for people, in Markdown: over cases, against baseline, and as the paper aggregates.

    Args:
        rows: as `table2_rows` gives them.
        unit: of distances.

    Source: engineering choice
    """
    names = {
        key: f"{name} ({unit})" if key in statistics.LOWER_IS_BETTER else name
        for key, name in METRIC_NAMES.items()
        if key in set(rows["metric"])
    }
    digits = {key: 2 if key in statistics.LOWER_IS_BETTER else 3 for key in names}
    tables = {
        "Mean ± standard deviation over cases (labels, seeds and folds averaged first)": "",
        f"As the paper aggregates, {int(rows['num_folds'].max())} fold(s): mean of fold means ± "
        "root of the mean variance within folds": "fold_",
    }
    lines = []
    for title, prefix in tables.items():
        lines += ["", title + ":", "", "| arm | " + " | ".join(names.values()) + " |"]
        lines.append("|---" * (1 + len(names)) + "|")
        for arm, found in rows.groupby("arm", sort=False):
            found = found.set_index("metric")
            cells = [
                f"{found.loc[key, prefix + 'mean']:.{digits[key]}f} ± "
                f"{found.loc[key, prefix + 'sd']:.{digits[key]}f}"
                for key in names
            ]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(["# Table 2", *lines, "", *_verdict_lines(rows)]) + "\n"


def ablation_figure(metrics: pd.DataFrame, knobs: list[str]) -> Figure:
    """Figure 6: Dice above baseline for each value of each ablated knob, a panel a knob.

    Args:
        metrics: of a whole study, see `results.load_metrics`.
        knobs: those to draw.

    Source: paper Figure 6
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(knobs) + 0.4, 3.1))
        panels = figure.subplots(1, len(knobs), sharey=True, squeeze=False)[0]
        for axes, knob in zip(panels, knobs, strict=True):
            points = [
                point
                for point in statistics.ablation_points(metrics, knob)
                if point["difference"] is not None
            ]
            ticks = in_order([point["value"] for point in points])
            base = points[0]["value"]
            colors = arm_colors(["baseline", *dict.fromkeys(point["arm"] for point in points)])
            axes.axhline(0, color=BASELINE_COLOR, linewidth=1)
            for point in points:
                place, found = ticks.index(point["value"]), point["difference"]
                color = colors[point["arm"]]
                axes.plot([place, place], found["ci95"], color=color, linewidth=2, alpha=0.6)
                face = color if point["value"] == base else "white"
                axes.plot(place, found["mean"], "o", color=color, markerfacecolor=face)
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlim(-0.5, len(ticks) - 0.5)
            axes.set_xlabel(knob.replace("_", " "))
            axes.grid(axis="y", color="#E8EAEE", linewidth=0.8)
            axes.set_axisbelow(True)
        panels[0].set_ylabel("Dice above baseline\n(mean, 95 % interval)")
        figure.tight_layout()
        return figure


def network_figure(metrics: pd.DataFrame) -> Figure:
    """Figure 7: Dice of each network, with and without DiffBoost.

    Args:
        metrics: of a whole study, see `results.load_metrics`.

    Source: paper Figure 7
    """
    points = statistics.ablation_points(metrics, "network")
    networks = list(dict.fromkeys(point["value"] for point in points))
    arms = list(dict.fromkeys(point["arm"] for point in points))
    colors = arm_colors(["baseline", *(arm for arm in arms if arm != "baseline")])
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 1.45 * len(networks), 3.4))
        axes = figure.subplots()
        for point in points:
            shift = 0.16 * (2 * arms.index(point["arm"]) - len(arms) + 1)
            place, color = networks.index(point["value"]) + shift, colors[point["arm"]]
            axes.plot([place, place], point["ci95"], color=color, linewidth=2.5, alpha=0.6)
            first = point["value"] == networks[0]
            axes.plot(place, point["mean"], "o", color=color, label=point["arm"] if first else None)
            axes.annotate(
                f"{point['mean']:.3f}",
                (place, point["mean"]),
                xytext=(6 if shift > 0 else -6, 0),
                textcoords="offset points",
                ha="left" if shift > 0 else "right",
                va="center",
                fontsize=7.5,
                color="#3C434D",
            )
        axes.set_xticks(range(len(networks)), [name.replace("_", " ") for name in networks])
        axes.set_xlim(-0.6, len(networks) - 0.4)
        axes.set_ylabel("Dice over cases\n(mean, 95 % interval)")
        axes.grid(axis="y", color="#E8EAEE", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        return figure


def merge_figure(run_dir: Path) -> Figure:
    """Figure 4: merge masks of different alpha on a slice and its first variant.

    Args:
        run_dir: a study's folder with the synthetic store of its first fold.

    Source: paper Figure 4
    """
    experiment = results.read_experiment_as_run(run_dir)
    own = ConfigParser.load_config_file(stage_configs()["segmentation"])["patch_size"]
    patch_size = experiment.segmentation.get("patch_size", own)
    folder = plans.synthetic_dir(plans.BASE, experiment.folds[0])
    return merge_picture(
        run_dir / folder, read_store(run_dir / "store"), FIGURE_4_ALPHAS, patch_size
    )


def in_order(values: list[str]) -> list[str]:
    """Different values in the order of an axis: numbers by size, words as they come.

    Source: engineering choice
    """
    values = list(dict.fromkeys(values))
    try:
        return sorted(values, key=float)
    except ValueError:
        return values


def figure6_knobs(experiment: plans.Experiment) -> list[str]:
    """The knobs of Figure 6: every ablated one but the network, which is Figure 7."""
    return [knob for knob in plans.ablated_knobs(experiment) if knob != "network"]


def _verdict_lines(rows: pd.DataFrame) -> list[str]:
    """A line an arm: its Dice against baseline, and what that shows."""
    if "verdict" not in rows:
        return []
    lines = [
        "Dice against baseline, paired by case. Gain shown: the 95 % interval over cases and, with "
        "two seeds or more, that over cases and seeds lie above 0, and Holm's p over all arms is "
        f"below {statistics.SIGNIFICANCE}.",
        "",
        "| arm | difference | 95 %, cases | 95 %, cases and seeds | p | Holm's p | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.dropna(subset="verdict").itertuples():
        cases = f"{row.ci95_low:+.3f} to {row.ci95_high:+.3f}"
        seeds = f"{row.training_ci95_low:+.3f} to {row.training_ci95_high:+.3f}"
        lines.append(
            f"| {row.arm} | {row.difference:+.3f} | {cases} "
            f"| {'–' if pd.isna(row.training_ci95_low) else seeds} "
            f"| {row.p:.3g} | {row.p_holm:.3g} | {row.verdict} |"
        )
    return lines


def _write_table2(run_dir: Path) -> None:
    """tables/table2.csv and table2.md of a study's folder."""
    metrics = results.read_metrics(run_dir)
    arms = results.read_experiment_as_run(run_dir).arms
    rows = table2_rows(metrics[metrics["knob"] == ""], arms)
    write_aside(run_dir / "tables/table2.csv", lambda path: rows.to_csv(path, index=False))
    text = table2_text(rows, length_unit(read_store(run_dir / "store").header["task"]))
    write_aside(run_dir / "tables/table2.md", lambda path: path.write_text(text, "utf-8"))


def save(figure: Figure, path: Path) -> None:
    """A figure as a file of the kind that its name says."""
    form = path.suffix[1:]
    keywords = {"metadata": {"Date": None}} if form == "svg" else {"dpi": 200}

    def write(partial: Path) -> None:
        figure.savefig(partial, format=form, bbox_inches="tight", **keywords)

    with rc_context(STYLE):
        write_aside(path, write)
    logger.info("wrote %s", path)


def _write_figure4(run_dir: Path) -> None:
    """figures/figure4.png of a study's folder."""
    save(merge_figure(run_dir), run_dir / "figures/figure4.png")


def _write_figure6(run_dir: Path) -> None:
    """figures/figure6.svg of a study's folder."""
    knobs = figure6_knobs(results.read_experiment_as_run(run_dir))
    save(ablation_figure(results.read_metrics(run_dir), knobs), run_dir / "figures/figure6.svg")


def _write_figure7(run_dir: Path) -> None:
    """figures/figure7.svg of a study's folder."""
    save(network_figure(results.read_metrics(run_dir)), run_dir / "figures/figure7.svg")


EXHIBITS: dict[str, Callable[[Path], None]] = {
    "table2": _write_table2,
    "figure4": _write_figure4,
    "figure6": _write_figure6,
    "figure7": _write_figure7,
}

"""The report of a study: metrics.csv, summary.json and a page that needs no other file."""

import base64
import dataclasses
import json
import logging
import math
from pathlib import Path

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from diffboost import exhibits, figures, pictures, results, statistics
from diffboost.classical import against_best_classical
from diffboost.data.slices import SliceStore, read_store
from diffboost.data.tables import read_csv
from diffboost.data.tasks import length_unit
from diffboost.exhibits import METRIC_NAMES
from diffboost.plans import BASE, Experiment, ablated_knobs, segmenters, settings, synthetic_dir

logger = logging.getLogger(__name__)


def write_report(run_dir: str | Path) -> Path:
    """Writes metrics.csv, summary.json and report/index.html into a study's folder.

    Args:
        run_dir: the folder, such as `runs/demo`; arms that are not evaluated yet are left out.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: the folder is no study's, or nothing in it has been evaluated.

    Source: engineering choice
    """
    run_dir = Path(run_dir)
    experiment = results.read_experiment_as_run(run_dir)
    metrics = results.read_metrics(run_dir)
    summary = summarize(run_dir, experiment, metrics)
    store = read_store(run_dir / "store")
    page = render(run_dir, experiment, metrics, summary, store)
    metrics.to_csv(run_dir / "metrics.csv", index=False)
    text = json.dumps(without_nan(summary), indent=2, allow_nan=False)
    (run_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    path = run_dir / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page, encoding="utf-8")
    logger.info("wrote %s", path)
    return path


def summarize(run_dir: Path, experiment: Experiment, metrics: pd.DataFrame) -> dict:
    """The report's facts for machines.

    Args:
        run_dir: the study's folder.
        experiment: as `read_experiment_as_run` gives it.
        metrics: as `read_metrics` gives it.

    Returns:
        The content of summary.json; NaN where a figure does not exist.

    Raises:
        ValueError: arm baseline was not evaluated yet.

    Source: engineering choice
    """
    base = metrics[metrics["knob"] == ""]
    if "baseline" not in set(base["arm"]):
        raise ValueError(
            f"run_dir: {run_dir}: no segmenter of arm baseline, with which all are compared, has "
            "been evaluated yet"
        )
    arms, differences = statistics.summarize(base, experiment.arms)
    costs = results.read_costs(run_dir)
    empty = base[base["metric"].str.startswith("empty_")]
    counts = empty.groupby(["arm", "metric"])["value"].sum().astype(int)
    by_seed = statistics.seed_means(base, "dice")
    primary = statistics.VERDICT_METRIC
    knobs = [knob for knob in ablated_knobs(experiment) if knob in set(metrics["knob"])]
    return {
        "name": experiment.name,
        "protocol": experiment.protocol,
        "arms": arms,
        "paired_difference_to_baseline": differences,
        "verdicts": {arm: statistics.verdict(by[primary]) for arm, by in differences.items()},
        "best_classical": against_best_classical(
            base, results.read_training_logs(run_dir)[1], experiment
        ),
        "over_folds": statistics.over_folds(base, experiment.arms),
        "ablations": {knob: statistics.ablation_points(metrics, knob) for knob in knobs},
        "unit": "case: mean over labels, seeds and folds; sd and n are over cases",
        "dice_by_seed": {
            arm: {str(seed): float(value) for seed, value in by_seed.loc[arm].items()}
            for arm in arms
        },
        "empty": {arm: counts[arm].to_dict() for arm in arms if arm in counts.index},
        "seconds": costs["seconds"].round(2).to_dict(),
        "memory_mib": costs["memory_mib"].round(1).to_dict(),
        "edge_agreement": results.read_edge_agreement(run_dir),
        "auto_ratio": {
            fold: {key: value for key, value in found.items() if key not in ("rungs", "settings")}
            for fold, found in results.read_ratios(run_dir).items()
        },
        "versions": results.describe_versions(),
        "machine": results.describe_machine(),
    }


def render(
    run_dir: Path, experiment: Experiment, metrics: pd.DataFrame, summary: dict, store: SliceStore
) -> str:
    """The page: HTML with every picture inside.

    Source: engineering choice
    """
    arms = list(summary["arms"])
    base = metrics[metrics["knob"] == ""]
    colors = figures.arm_colors(arms)
    costs = results.read_costs(run_dir)
    stores = [run_dir / synthetic_dir(BASE, fold) for fold in sorted(experiment.folds)]
    synthetic_dirs = [path for path in stores if (path / "manifest.parquet").is_file()]
    has_variants = (run_dir / synthetic_dir(BASE, experiment.folds[0])).is_dir()
    return _template().render(
        experiment=experiment,
        experiment_text=yaml.safe_dump(dataclasses.asdict(experiment), sort_keys=False),
        summary=summary,
        header=store.header,
        length_unit=length_unit(store.header["task"]),
        num_runs=sum(len(segmenters(experiment, setting)) for setting in settings(experiment)),
        metric_names={
            key: name for key, name in METRIC_NAMES.items() if key in summary["arms"][arms[0]]
        },
        lower_is_better=statistics.LOWER_IS_BETTER,
        colors=colors,
        by_label=dice_by_label(base, arms),
        differences=_chart_of_differences(summary, colors),
        outline_colors={"truth": pictures.TRUTH_COLOR, "prediction": pictures.PREDICTION_COLOR},
        variants={
            path.parts[-2]: pictures.variants_picture(path, store) for path in synthetic_dirs[:1]
        },
        ratios={
            fold: {**found, "chart": figures.ratio_chart(found) if found["rungs"] else None}
            for fold, found in results.read_ratios(run_dir).items()
        },
        predictions={arm: pictures.predictions_picture(run_dir, store, base, arm) for arm in arms},
        table1=_table1(run_dir),
        figure4=figures.embed(exhibits.merge_figure(run_dir), "png") if has_variants else None,
        **_charts_of_ablations(metrics, summary),
        curves=_charts_of_training(run_dir, colors),
        costs=costs.reset_index().to_dict("records"),
        cost_chart=figures.cost_chart(costs) if len(costs) else None,
    )


def _template() -> Template:
    """The page's template with its filters."""
    environment = Environment(
        loader=PackageLoader("diffboost", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"number": number, "signed": signed, "seconds": seconds}
    environment.filters |= {"probability": probability}
    return environment.get_template("report.html.j2")


def dice_by_label(metrics: pd.DataFrame, arms: list[str]) -> dict[str, dict[str, float]]:
    """Mean Dice per label and arm; empty for a task with one label.

    Source: engineering choice
    """
    dice = metrics[metrics["metric"] == "dice"]
    if dice["label"].nunique() < 2:
        return {}
    by_case = dice.groupby(["label", "arm", "case"])["value"].mean()
    table = by_case.groupby(["label", "arm"]).mean().unstack("arm")[arms]
    return table.to_dict("index")


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people; a dash if it does not exist."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference for people, with a true minus sign; a dash if it does not exist."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", "−")


def probability(value: float) -> str:
    """A p for people: three digits, or that it is smaller; a dash if it does not exist."""
    return "< 0.001" if value < 0.001 else number(value)


def seconds(value: float) -> str:
    """A duration for people: `48 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def without_nan(value: object) -> object:
    """The same nested value with None for every NaN, as JSON needs it."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _chart_of_differences(summary: dict, colors: dict[str, str]) -> str | None:
    """The chart of paired differences, if an arm stands beside baseline."""
    differences = summary["paired_difference_to_baseline"]
    return figures.difference_chart(differences, colors) if differences else None


def _charts_of_ablations(metrics: pd.DataFrame, summary: dict) -> dict[str, str | None]:
    """Figures 6 and 7, where the study has what they show."""
    knobs = [
        knob
        for knob, points in summary["ablations"].items()
        if knob != "network" and any(point["difference"] for point in points)  # figure 6's
    ]
    networks = "network" in summary["ablations"]
    return {
        "figure6": figures.embed(exhibits.ablation_figure(metrics, knobs)) if knobs else None,
        "figure7": figures.embed(exhibits.network_figure(metrics)) if networks else None,
    }


def _table1(run_dir: Path) -> dict | None:
    """Table 1 as {method: {metric: (mean, sd)}} with its picture, if it was made."""
    folder = run_dir / "pretrain" / "evaluation"
    if not (folder / "table1.csv").is_file():
        return None
    rows = read_csv(folder / "table1.csv", "table 1")
    methods = {
        method: {row.metric: (row.mean, row.sd) for row in found.itertuples()}
        for method, found in rows.groupby("method", sort=False)
    }
    picture = base64.b64encode((folder / "table1.png").read_bytes()).decode("ascii")
    return {
        "methods": methods,
        "num_images": int(rows["n"].max()),
        "picture": f"data:image/png;base64,{picture}",
    }


def _charts_of_training(run_dir: Path, colors: dict[str, str]) -> list[str]:
    """Curves of the generators and of the segmenters, where there are logs."""
    generators, segmenters = results.read_training_logs(run_dir)
    charts = [] if generators.empty else [figures.generator_chart(generators)]
    return charts if segmenters.empty else [*charts, figures.segmenter_chart(segmenters, colors)]

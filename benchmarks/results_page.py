"""Makes docs/results/index.md, with tables and figures, from committed metrics; collects these.

    python benchmarks/results_page.py [--runs RUNS_DIR] [--output_dir docs/results]

With --runs, every study real_* of RUNS_DIR gives its metrics (`data/STUDY.csv.gz`, without times),
the seconds of its stages (`data/STUDY.costs.csv`), the CPU seconds of a training of each arm
(`data/training_seconds.csv`) and its best Dice on inner validation (`data/inner_validation.csv`),
which chooses the classical arm that all are compared with, one for breast and one for hippocampus,
from the study with most labelled cases (the study of all arms chooses its own). The page is then
written from what lies in data/ alone, so that it can be made again without the runs, and from
results_reading.md beside this file, which says what the figures mean and is written by hand. A
study, trial or table that is not there is said to be not run. Rules: docs/results/protocol.md.
"""

import argparse
import logging
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from results_collection import collect
from results_figures import draw_cases, draw_curves

from diffboost import results
from diffboost.exhibits import METRIC_NAMES, in_order
from diffboost.experiments import read_experiment
from diffboost.plans import uses_variants
from diffboost.stages import WORKFLOW
from diffboost.statistics import (
    LOWER_IS_BETTER,
    case_values,
    mean_interval,
    paired_difference,
    summarize,
    training_interval,
    verdict,
)

PRIMARY = "real_breast_all"
LONGER = (  # longer segmentation training
    "real_breast_20_longer",
    "real_breast_40_longer",
    "real_breast_80_longer",
    "real_breast_all_longer",
)
GENERATOR = "real_breast_all_generator"  # and longer finetuning
SAMPLER = "real_breast_all_sampler"  # or, instead, variants at other noise levels
LOOKS = {GENERATOR: 3, LONGER[-1]: 4, SAMPLER: 5}  # which look at the primary comparison a study is
CURVES = {
    "breast": ("real_breast_20", PRIMARY),
    "breast_longer": LONGER,
    "hippocampus": ("real_hippocampus_5", "real_hippocampus_10", "real_hippocampus_20"),
}
MORE_CASES = ("real_hippocampus_10", "real_hippocampus_20")
DEVELOPMENT = "real_breast_dev"
JOINED = "real_breast_joined"  # what helped there, together
UNLABELLED = "real_breast_20_unlabelled"  # its generator saw the other images first
UNFILTERED = "real_breast_40_unfiltered"  # all variants kept
ALL_ARMS = "real_hippocampus_10_arms"  # every single transform; chooses its best classical arm
MORE_TIME = {  # a study, and one whose classical arms train as long as all of its stages took
    UNLABELLED: "real_breast_20_total",
    LONGER[0]: "real_breast_20_total",
    LONGER[-1]: "real_breast_all_total",
    "real_hippocampus_10": "real_hippocampus_10_total",
}
VARIED = (GENERATOR, SAMPLER, UNFILTERED, UNLABELLED)  # compared with the primary study's best arm
STUDIES = tuple(dict.fromkeys((*sum(CURVES.values(), ()), ALL_ARMS, *VARIED, *MORE_TIME.values())))
ORDERED = (*STUDIES, DEVELOPMENT, JOINED)
MISSED = 0.1  # a mean Dice below it: what is looked for was not found


def read(data_dir: Path, name: str) -> pd.DataFrame | None:
    """A study's metrics; None if it is not there."""
    path = data_dir / f"{name}.csv.gz"
    return results.load_metrics(path) if path.is_file() else None


def best_classical(data_dir: Path, study: str) -> str:
    """The arm without variants that is best on inner validation; baseline where none was run."""
    path = data_dir / "inner_validation.csv"
    if not path.is_file():
        return "baseline"
    means = pd.read_csv(path).query("study == @study").set_index("arm").val_dice
    plain = [arm for arm in means.index if not uses_variants(arm)]
    return means[plain].idxmax() if plain else "baseline"


def longer_arms(metrics: pd.DataFrame, study: str) -> pd.DataFrame:
    """The metrics of those arms of a study that its experiment file gives epochs of their own."""
    longer = read_experiment(WORKFLOW / f"experiments/{study}.yaml").arm_epochs
    return metrics[metrics.arm.isin(longer)]


def over_more_time(few: pd.DataFrame, total: pd.DataFrame, best: str) -> tuple[list[dict], str]:
    """Arms with variants beside classical ones that trained as long as all the others' stages.

    Args:
        few: metrics of a study, its base alone.
        total: of one with the same folds and cases: its arms that train longer.
        best: the arm of ``total`` that the others are compared with.

    Returns:
        What :func:`table` gives, for the seeds of ``total``, and the name of ``best`` in it.
    """
    named = {arm: f"{arm}, long" for arm in total.arm.unique()}
    shown = few[few.seed.isin(total.seed.unique())]
    joined = pd.concat([shown, total.assign(arm=total.arm.map(named))], ignore_index=True)
    return table(joined, named[best]), named[best]


def table(metrics: pd.DataFrame, reference: str) -> list[dict]:
    """A row an arm: mean and interval of each metric, and the paired gain in Dice over `reference`.

    Args:
        metrics: of a study, its base alone.
        reference: an arm without variants.

    Returns:
        arm; n (cases); missed (those below a Dice of ``MISSED``); runs (folds x seeds); metrics,
        {name: (mean, low, high)}; gain, None of the reference itself.
    """
    arms = list(metrics.arm.unique())
    values, differences = case_values(metrics), summarize(metrics, arms, reference)[1]
    rows = []
    for arm in arms:
        shown = {
            name: (values.loc[arm, name].mean(), *mean_interval(
                values.loc[arm, name].dropna().to_numpy()))
            for name in METRIC_NAMES
        }  # fmt: skip
        gain = None
        if arm != reference:
            gain = differences[arm]["dice"] | {"verdict": verdict(differences[arm]["dice"])}
        trained = metrics[metrics.arm == arm][["fold", "seed"]].drop_duplicates()
        dice = values.loc[arm, "dice"].dropna()
        row = {"arm": arm, "metrics": shown, "gain": gain, "runs": len(trained)}
        rows.append(row | {"n": len(dice), "missed": int((dice < MISSED).sum())})
    return rows


def joined_arm(reference: str) -> str:
    """The arm that joins variants with a classical arm."""
    return "diffboost" if reference == "baseline" else f"diffboost+{reference}"


def repeated_look(metrics: pd.DataFrame, reference: str, number: int) -> dict:
    """The paired gain in Dice of the joined arm at the level that an n-th look leaves, 0.05 / n.

    Args:
        metrics: of a study, its base alone.
        reference: the best classical arm.
        number: n.

    Returns:
        arm; number; confidence (percent); ci (over cases) and training_ci (over cases and seeds).
    """
    arm, confidence = joined_arm(reference), 1 - 0.05 / number
    values = case_values(metrics)
    gains = (values.loc[arm, "dice"] - values.loc[reference, "dice"]).dropna().to_numpy()
    over_seeds = training_interval(metrics, arm, reference, "dice", confidence)
    found = {"ci": mean_interval(gains, confidence=confidence), "training_ci": over_seeds}
    return {"arm": arm, "number": number, "confidence": 100 * confidence} | found


def over_more_cases(few: pd.DataFrame, many: pd.DataFrame) -> dict:
    """How far each arm with few labelled cases lies from each arm without variants with many.

    Args:
        few: metrics of a study, its base alone.
        many: of one with the same folds and more labelled cases.

    Returns:
        means, {arm of `many`: Dice}; rows, for each arm of `few` its arm, dice and gains, {arm of
        `many`: paired difference}.
    """
    values, others = case_values(few), case_values(many)
    plain = [arm for arm in many.arm.unique() if not uses_variants(arm)]
    rows = []
    for arm in few.arm.unique():
        own = values.loc[arm, "dice"]
        gains = {other: paired_difference(own, others.loc[other, "dice"]) for other in plain}
        rows.append({"arm": arm, "dice": float(own.mean()), "gains": gains})
    return {"means": {arm: float(others.loc[arm, "dice"].mean()) for arm in plain}, "rows": rows}


def levers(metrics: pd.DataFrame) -> list[dict]:
    """A row a knob and value of the development study: gain of diffboost over the base's value."""
    rows = []
    for knob in [name for name in metrics.knob.unique() if name]:
        chosen = metrics[(metrics.knob == knob) & (metrics.arm == "diffboost")]
        ordered = list(dict.fromkeys(chosen.knob_value))
        base = case_values(chosen[chosen.knob_value == ordered[0]]).loc["diffboost", "dice"]
        for value in in_order(ordered):
            found = case_values(chosen[chosen.knob_value == value]).loc["diffboost", "dice"]
            row = {"knob": knob, "value": value, "dice": float(found.mean())}
            is_base = value == ordered[0]
            rows.append(row | {"gain": None if is_base else paired_difference(found, base)})
    return rows


def write_page(output_dir: Path) -> None:
    """Writes index.md and the figures beside it."""
    data_dir = output_dir / "data"
    found = {name: read(data_dir, name) for name in STUDIES}
    studies = {name: m[m.knob == ""] for name, m in found.items() if m is not None}
    references = {
        name: best_classical(data_dir, present[-1])
        for names in CURVES.values()
        if (present := [name for name in names if name in studies])
        for name in present
    }
    choosers = dict.fromkeys(VARIED, PRIMARY) | {ALL_ARMS: ALL_ARMS}
    references |= {
        study: best_classical(data_dir, chooser)
        for study, chooser in choosers.items()
        if study in studies
    }
    tables = {name: table(studies[name], references[name]) for name in references}
    looks = {
        study: repeated_look(studies[study], references[study], number)
        for study, number in LOOKS.items()
        if study in studies
    }
    for study in (PRIMARY, LONGER[-1], GENERATOR, SAMPLER):
        if study in studies and studies[study].fold.nunique() > 1:
            alone, name = studies[study][studies[study].fold == 0], f"{study}, fold 0 alone"
            references[name] = references[study]
            tables[name] = table(alone, references[name])
    totals = {
        (name, long): over_more_time(
            studies[name], longer_arms(studies[long], long), best_classical(data_dir, long)
        )
        for name, long in MORE_TIME.items()
        if {name, long} <= set(studies)
    }
    figures = {}
    for organ, names in CURVES.items():
        present = {name: studies[name] for name in names if name in studies}
        if len(present) > 1:
            sizes = {name: name.split("_")[2] for name in names}
            figures[organ] = f"curve_{organ}.svg"
            draw_curves(present, output_dir / figures[organ], sizes)
    cases = {}
    for name, reference in references.items():
        arm = joined_arm(reference)
        if name in studies and {arm, reference} <= set(studies[name].arm):
            cases[name] = f"cases_{name}.svg"
            draw_cases(studies[name], arm, reference, output_dir / cases[name])
    development, joined = (read(data_dir, name) for name in (DEVELOPMENT, JOINED))
    reading = Path(__file__).with_name("results_reading.md")
    small = {path.stem: pd.read_csv(path) for path in sorted(data_dir.glob("*.csv"))}
    seconds = {}
    if "training_seconds" in small:
        seconds = small["training_seconds"].set_index(["study", "arm"]).cpu_seconds.to_dict()
        seconds |= {
            (f"{few}, {long}", arm if study == few else f"{arm}, long"): taken
            for few, long in MORE_TIME.items()
            for (study, arm), taken in seconds.items()
            if study in (few, long)
        }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    text = environment.get_template("results_page.md.j2").render(
        tables=tables, looks=looks, cases=cases, missed=MISSED, figures=figures,
        missing=[name for name in ORDERED if not (data_dir / f"{name}.csv.gz").is_file()],
        levers=None if development is None else levers(development),
        development=None if development is None else table(
            development[development.knob == ""], "baseline"),
        more_cases=over_more_cases(*(studies[name] for name in MORE_CASES))
        if set(MORE_CASES) <= set(studies) else None,
        joined=None if joined is None else table(joined, "mirror"),
        reading=reading.read_text(encoding="utf-8"),
        small=small, seconds=seconds, references=references, totals=totals,
        metric_names=METRIC_NAMES, lower=LOWER_IS_BETTER,
    )  # fmt: skip
    (output_dir / "index.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Collects if asked to, then writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, help="folder of the studies")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.runs:
        collect(options.runs, options.output_dir / "data", ORDERED)
    write_page(options.output_dir)


if __name__ == "__main__":
    main()

"""The report: hand-computed statistics, and the page of a small made-up study."""

import html
import json
import re
import shutil
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from small_store import write_store, write_variants

from diffboost import cli, pictures
from diffboost.data.slices import read_store
from diffboost.ratio.budget import Budget, Price
from diffboost.ratio.record import decision
from diffboost.ratio.rule import judge
from diffboost.report import (
    _charts_of_ablations,
    number,
    probability,
    seconds,
    signed,
    write_report,
)
from diffboost.results import (
    load_metrics,
    read_costs,
    read_edge_agreement,
    read_training_logs,
)
from diffboost.statistics import (
    ablation_points,
    case_values,
    describe,
    paired_difference,
    summarize,
)

ARMS = ["baseline", "diffboost"]
GAIN = {"baseline": 0.0, "diffboost": 0.1}
TEST_CASES = ["case_0", "case_3"]  # fold 0 of the small store


def metric_rows(arm: str, seed: int) -> pd.DataFrame:
    """What evaluate writes for two cases with two labels, better by 0.1 with diffboost."""
    rows = []
    for number_of_case, case in enumerate(TEST_CASES):
        for label in ("shell", "core"):
            dice = 0.5 + 0.2 * number_of_case + GAIN[arm] + 0.01 * seed
            values = {"dice": dice, "precision": dice, "recall": dice}
            values |= {"hd95_mm": 10 - 10 * dice, "assd_mm": 5 - 5 * dice}
            values |= {"empty_prediction": 0, "empty_truth": 0}
            rows += [(case, label, metric, value) for metric, value in values.items()]
    return pd.DataFrame(rows, columns=["case", "label", "metric", "value"])


def write_variants_of_store(store_dir, synthetic_dir) -> None:
    """The small store's variants, with the columns that synthesis writes."""
    write_variants(store_dir, synthetic_dir)
    manifest = pd.read_parquet(synthetic_dir / "manifest.parquet")
    names = manifest["case"] + "_" + manifest["slice"].astype(str).str.zfill(4) + ".png"
    manifest["source_image"] = str(store_dir / "images") + "/" + names
    for column, folder in (("label", "labels"), ("edge", "edges")):
        manifest[column] = str(store_dir / folder) + "/" + names
    manifest.to_parquet(synthetic_dir / "manifest.parquet")
    agreement = {"own": 0.8, "other": 0.2, "n": 10}
    (synthetic_dir / "edge_agreement.json").write_text(json.dumps(agreement))


def write_results(run_dir, arm: str, seed: int, setting: str = "") -> None:
    """One evaluated segmenter, whose predictions are the truth."""
    folder = run_dir / setting / "fold0" / arm / f"seed{seed}"
    (folder / "predictions").mkdir(parents=True)
    metric_rows(arm, seed).to_csv(folder / "metrics.csv", index=False)
    log = {"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_dice": [0.2, 0.4], "seconds": [1, 2]}
    pd.DataFrame(log).to_csv(folder / "training_log.csv", index=False)
    for case in TEST_CASES:
        label = nib.load(run_dir / "store" / "source" / "labelsTr" / f"{case}.nii.gz")
        nib.save(label, folder / "predictions" / f"{case}.nii.gz")


def write_table1(folder) -> None:
    """What evaluate of the pretraining bundle leaves."""
    folder.mkdir(parents=True)
    rows = [("Pix2Pix", "MAE", 0.1469, 0.05, 30), ("Ours", "MAE", 0.0873, 0.03, 30)]
    columns = ["method", "metric", "mean", "sd", "n"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "table1.csv", index=False)
    Image.new("L", (8, 8)).save(folder / "table1.png")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A study of one fold, two arms and two seeds, as the workflow leaves it."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    run_dir.mkdir()
    write_store(run_dir / "store")
    write_variants_of_store(run_dir / "store", run_dir / "fold0" / "synthetic_store")
    (run_dir / "fold0" / "generator").mkdir()
    log = pd.DataFrame({"epoch": [1, 2], "train_loss": [0.3, 0.2], "seconds": [1, 2]})
    log.to_csv(run_dir / "fold0" / "generator" / "training_log.csv", index=False)
    for arm in ARMS:
        for seed in (0, 1):
            write_results(run_dir, arm, seed)
        write_results(run_dir, "diffboost", int(arm == "diffboost"), "ablation/alpha=0.2")
        for seed in (0, 1):
            write_results(run_dir, arm, seed, "ablation/network=unet")
    write_table1(run_dir / "pretrain" / "evaluation")
    write_results(run_dir, "baseline", 2)  # of an earlier order: not in the experiment file
    (run_dir / "benchmarks").mkdir()
    for name, time, memory in (
        ("prepare", 3.5, 100),
        ("evaluate.a", 60, 900),
        ("evaluate.b", 62, "-"),
    ):
        text = f"s\th:m:s\tmax_rss\n{time}\t0:00:03\t{memory}\n"
        (run_dir / "benchmarks" / f"{name}.tsv").write_text(text)
    experiment = {"name": "small <b>", "protocol": "sound", "task": "balls", "arms": ARMS}
    experiment |= {"dataset_dir": "balls", "folds": [0], "seeds": [0, 1]}
    experiment |= {"network": ["attention_unet", "unet"]}
    experiment |= {"ablations": {"segmentation": {"alpha": [0.6, 0.2]}}}
    (run_dir / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    write_report(run_dir)
    return run_dir


def order_folds(run_dir, other, folds):
    """Another folder with the study's experiment, for these folds."""
    written = yaml.safe_load((run_dir / "experiment.yaml").read_text())
    (other / "experiment.yaml").write_text(yaml.safe_dump(written | {"folds": folds}))


def test_the_generator_of_unlabelled_images_has_its_curve(run_dir, tmp_path):
    order_folds(run_dir, tmp_path, [0, 1])
    for place in ("fold0/generator", "fold0/unlabelled/generator", "fold1/generator"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "training_log.csv").write_text("epoch,train_loss\n1,0.5\n")
    generators = read_training_logs(tmp_path)[0]
    assert list(generators.fold) == ["fold0", "fold1", "fold0, unlabelled"]


def test_what_an_earlier_experiment_ordered_does_not_count(run_dir, tmp_path):
    """Folds, arms and seeds that were struck off stayed in curves, agreement and costs."""
    order_folds(run_dir, tmp_path, [1])
    (tmp_path / "benchmarks").mkdir()
    for name in ("prepare", "finetune.fold0", "finetune.fold1", "evaluate.fold1.baseline.seed0",
                 "evaluate.fold1.baseline.seed2", "evaluate.fold1.mirror.seed0"):  # fmt: skip
        (tmp_path / "benchmarks" / f"{name}.tsv").write_text("s\tmax_rss\n3.5\t12.0\n")
    for fold, own in ((0, 0.1), (1, 0.8)):
        for place in ("generator", "synthetic_store"):
            (tmp_path / f"fold{fold}" / place).mkdir(parents=True)
        log = tmp_path / f"fold{fold}" / "generator" / "training_log.csv"
        log.write_text("epoch,train_loss\n1,0.5\n")
        path = tmp_path / f"fold{fold}" / "synthetic_store" / "edge_agreement.json"
        path.write_text(json.dumps({"own": own, "other": 0.2, "n": 10}))
    assert read_costs(tmp_path)["jobs"].to_dict() == {"prepare": 1, "finetune": 1, "evaluate": 1}
    assert list(read_training_logs(tmp_path)[0].fold) == ["fold1"]
    assert read_edge_agreement(tmp_path)["own"] == 0.8


def test_a_fold_of_one_case_has_no_part_in_the_agreement_with_other_cases(run_dir, tmp_path):
    """Its NaN counted as 0, which looks like variants that follow their own edges alone."""
    order_folds(run_dir, tmp_path, [0, 1])
    for fold, other in (("fold0", float("nan")), ("fold1", 0.2)):
        (tmp_path / fold / "synthetic_store").mkdir(parents=True)
        path = tmp_path / fold / "synthetic_store" / "edge_agreement.json"
        path.write_text(json.dumps({"own": 0.8, "other": other, "n": 10}))
    found = read_edge_agreement(tmp_path)
    assert found == pytest.approx({"own": 0.8, "other": 0.2, "n": 20})
    path.unlink()
    assert np.isnan(read_edge_agreement(tmp_path)["other"])


def test_a_case_counts_once_whatever_the_seeds_and_labels():
    rows = [
        ("baseline", 0, 0, "a", "x", "dice", 0.2),
        ("baseline", 0, 0, "a", "y", "dice", 0.4),
        ("baseline", 0, 1, "a", "x", "dice", 0.6),
        ("baseline", 0, 0, "b", "x", "dice", 0.8),
        ("baseline", 0, 0, "b", "x", "hd95_mm", np.inf),
    ]
    columns = ["arm", "fold", "seed", "case", "label", "metric", "value"]
    values = case_values(pd.DataFrame(rows, columns=columns))
    assert values.loc["baseline", "dice"].to_dict() == pytest.approx({"a": 0.4, "b": 0.8})
    found = describe(values.loc["baseline", "dice"])
    assert found == pytest.approx({"mean": 0.6, "sd": np.sqrt(0.08), "n": 2})
    assert describe(values.loc["baseline", "hd95_mm"])["n"] == 0


def test_the_paired_difference_is_by_case_and_repeatable():
    cases = [f"c{n}" for n in range(30)]
    reference = pd.Series(np.linspace(0.1, 0.9, 30), cases)
    better = reference + np.where(np.arange(30) % 2, 0.04, 0.02)
    found = paired_difference(better, reference)
    assert found["mean"] == pytest.approx(0.03)
    low, high = found["ci95"]
    assert 0.02 < low < 0.03 < high < 0.04
    assert high - low == pytest.approx(2 * 1.96 * 0.01 / np.sqrt(30), rel=0.1)
    assert found["p"] < 1e-4
    assert found == paired_difference(better, reference)
    assert paired_difference(better.drop("c0"), reference)["n"] == 29


def test_too_few_cases_have_no_interval():
    one = pd.Series([0.5], ["a"])
    found = paired_difference(one, one)
    assert found["n"] == 1
    assert np.isnan(found["ci95"]).all()


def test_the_summary_has_the_form_that_machines_read(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["name"] == "small <b>"
    assert summary["protocol"] == "sound"
    assert list(summary["arms"]) == ARMS
    for figures in summary["arms"].values():
        assert list(figures) == ["dice", "precision", "recall", "hd95_mm", "assd_mm"]
        assert all(set(found) == {"mean", "sd", "n"} for found in figures.values())
    expected = {"mean": 0.605, "sd": np.sqrt(0.02), "n": 2}
    assert summary["arms"]["baseline"]["dice"] == pytest.approx(expected)
    difference = summary["paired_difference_to_baseline"]["diffboost"]
    assert difference["dice"]["ci95"] == pytest.approx([0.1, 0.1])
    assert difference["hd95_mm"]["mean"] == pytest.approx(-1)
    assert summary["dice_by_seed"]["diffboost"] == pytest.approx({"0": 0.7, "1": 0.71})
    assert summary["seconds"] == {"prepare": 3.5, "evaluate": 122.0}
    assert summary["memory_mib"] == {"prepare": 100.0, "evaluate": 900.0}
    assert summary["edge_agreement"] == {"own": 0.8, "other": 0.2, "n": 10}
    assert summary["empty"]["baseline"] == {"empty_prediction": 0, "empty_truth": 0}
    assert summary["versions"]["torch"] and summary["machine"]["cores"] >= 1


def test_all_metrics_stand_in_one_file(run_dir):
    metrics = pd.read_csv(run_dir / "metrics.csv")
    columns = ["arm", "fold", "seed", "case", "label", "metric", "value", "knob", "knob_value"]
    assert list(metrics) == columns
    runs = 2 * 2 + 2 * 2 + 2 * 4  # base; alpha, shared and 0.2; network, shared and unet
    assert len(metrics) == runs * len(metric_rows("baseline", 0))
    figures, _ = summarize(load_metrics(run_dir / "metrics.csv").query("knob == ''"), ARMS)
    assert figures["diffboost"]["dice"]["mean"] == pytest.approx(0.705)


def test_a_case_or_label_may_be_called_na(tmp_path):
    """It was read as a missing value, and its rows were lost."""
    rows = pd.DataFrame({"arm": "baseline", "fold": 0, "seed": 0, "case": ["NA", "null"],
                         "label": "None", "metric": "dice", "value": [0.25, np.nan],
                         "knob": "", "knob_value": ""})  # fmt: skip
    rows.to_csv(tmp_path / "metrics.csv", index=False)
    pd.testing.assert_frame_equal(load_metrics(tmp_path / "metrics.csv"), rows, check_dtype=False)
    assert list(case_values(rows[:1])) == ["NA"]


def test_the_page_stands_alone_and_says_what_was_found(run_dir):
    page = (run_dir / "report" / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") == 3 + len(
        ARMS
    )  # variants, masks, table 1; predictions
    assert (
        page.count("data:image/svg+xml;base64,") == 6
    )  # differences, figures 6, 7, two curves, costs
    assert "small &lt;b&gt;" in page and "<b>small" not in page
    assert page.count("no gain shown") == 2 + 1  # two cases show nothing; and the rule itself
    for words in (
        "0.605 ± 0.141",
        "+0.100",
        "0.80 with their own hint",
        "2 min 02 s",
        "Worst, median",
        "10 segmenters",
        "0.1469 ± 0.0500",
        "<td>alpha</td><td>0.2</td><td>diffboost</td><td>0.705</td>",
        "<td>network</td><td>unet</td><td>baseline</td><td>0.605</td>",
    ):
        assert words in page


def test_a_report_says_what_is_missing(tmp_path, run_dir):
    with pytest.raises(FileNotFoundError, match="holds no experiment.yaml"):
        write_report(tmp_path)
    shutil.copy(run_dir / "experiment.yaml", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no fold.*metrics.csv yet"):
        write_report(tmp_path)
    shutil.copytree(run_dir / "fold0" / "diffboost", tmp_path / "fold0" / "diffboost")
    with pytest.raises(ValueError, match="no segmenter of arm baseline, .* has been evaluated yet"):
        write_report(tmp_path)


def test_the_command_writes_the_report(monkeypatch, run_dir):
    shutil.rmtree(run_dir / "report")
    monkeypatch.setattr(sys, "argv", ["diffboost", "report", str(run_dir)])
    cli.main()
    assert (run_dir / "report" / "index.html").is_file()


def test_a_figure_that_the_study_does_not_order_is_refused(run_dir, tmp_path):
    """Figures 6 and 7 ended in a traceback where there is nothing to draw."""
    written = yaml.safe_load((run_dir / "experiment.yaml").read_text())
    written |= {"ablations": {}, "network": "unet"}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(written))
    for only, needed in (("figure6", "a list in synthesis"), ("figure7", "a list of networks")):
        with pytest.raises(SystemExit, match=f"target: {only} needs {needed}"):
            cli.report(str(tmp_path), only)


@pytest.mark.parametrize("arms", [["baseline"], ["baseline", "nnunet"]])
def test_a_list_that_reaches_baseline_alone_has_no_figure_6(arms):
    """The report ended with an IndexError where another arm stood beside it."""
    trained = [(arm, "", "") for arm in arms] + [("baseline", "epochs", value) for value in "24"]
    metrics = pd.concat(
        metric_rows("baseline", 0).assign(arm=arm, fold=0, seed=0, knob=knob, knob_value=value)
        for arm, knob, value in trained
    )
    points = ablation_points(metrics, "epochs")
    assert [(point["value"], point["arm"]) for point in points] == [
        ("2", "baseline"), ("4", "baseline"),
    ]  # fmt: skip
    assert _charts_of_ablations(metrics, {"ablations": {"epochs": points}})["figure6"] is None


def test_pictures_of_a_store_whose_variants_were_all_rejected_show_them(tmp_path, monkeypatch):
    """The report ended with a ValueError."""
    store = read_store(write_store(tmp_path / "store"))
    synthetic = write_variants(tmp_path / "store", tmp_path / "synthetic")
    manifest = pd.read_parquet(synthetic / "manifest.parquet")
    manifest.assign(kept=False).to_parquet(synthetic / "manifest.parquet")
    drawn = []
    monkeypatch.setattr(pictures, "embed", lambda figure, kind: drawn.append(figure))
    pictures.variants_picture(synthetic, store)
    titles = [axes.get_title() for axes in drawn[0].axes[:4]]
    assert titles == ["real, label", "edge", "rejected 0", "rejected 1"]
    assert len(pictures.merge_picture(synthetic, store, (0.0, 0.6), 4).axes) == 6


def test_figures_for_people():
    assert (number(0.12345), number(float("nan")), number(None)) == ("0.123", "–", "–")
    assert (signed(-0.5), signed(0.25, 2)) == ("−0.500", "+0.25")
    assert [probability(p) for p in (1e-9, 0.04, float("nan"))] == ["< 0.001", "0.040", "–"]
    assert [seconds(value) for value in (47.6, 200, 3900)] == ["48 s", "3 min 20 s", "1 h 05 min"]


def test_the_report_says_how_many_variants_are_worth_making_and_why(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    scores = [{str(s): {"a:0": d + s / 10, "a:1": d} for s in range(2)} for d in (0.5, 0.7)]
    rungs = [{"ratio": r, "scores": found} for r, found in zip((1, 2), scores, strict=True)]
    settings = {"seeds": [0, 1], "max_ratio": 20, "epochs": 10, "min_cases": 2}
    price, budget = Price(variants=10, probe=1, training=50), Budget(0.1, "share")
    content = decision(2, rungs, judge(rungs, 0.5), "budget", settings, price, budget)
    path = tmp_path / "run/fold0/synthetic_store/ratio.json"
    path.write_text(json.dumps(content))
    page = write_report(tmp_path / "run").read_text()
    assert "How many variants (fold0)" in page and content["reason"] in html.unescape(page)
    assert "+0.200 over 1" in page and "10 % of the FLOPs of 20" in page
    found = json.loads((tmp_path / "run/summary.json").read_text())["auto_ratio"]["fold0"]
    assert (found["ratio"], found["enough"], found["why"]) == (2, 2, "budget")
    assert found["gains"][0]["mean"] == pytest.approx(20) and "rungs" not in found

"""Studies: what lists, networks and protocols plan, and the tables and figures made of it."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from test_bundles import bundle_commands, check_flags

from diffboost import cli, exhibits, plans, targets
from diffboost.data.tasks import PHANTOM_LAYOUTS
from diffboost.plans import BASE, Experiment, Setting
from diffboost.prepare import PHANTOM_WRITERS
from diffboost.results import COLUMNS, load_metrics, read_metrics
from diffboost.statistics import ablation_points, holm, over_folds, summarize, verdict

REPOSITORY = Path(__file__).parents[1]
STUDY = Experiment(
    name="x",
    task="phantom_organ",
    dataset_dir="phantoms",
    arms=["baseline", "nnunet", "diffboost", "synthetic_then_real"],
    folds=[0, 1],
    ablation_folds=[0],
    network=["attention_unet", "unet"],
    synthesis={"ratio": 4, "guidance_scale": 1.0},
    segmentation={"epochs": 5, "alpha": 0.6},
    ablations={
        "synthesis": {"ratio": [4, 1, 8], "guidance_scale": [1.0, 3.0]},
        "segmentation": {"alpha": [0.6, 0.2], "learning_rate": [1.0e-3, 1.0e-4]},
    },
)


# --- what is planned ----------------------------------------------------------------------------


def test_each_value_but_the_first_is_a_setting_of_its_own():
    folders = [setting.folder for setting in plans.settings(STUDY)]
    assert folders == [
        "",
        "ablation/ratio=1/",
        "ablation/ratio=8/",
        "ablation/guidance_scale=3.0/",
        "ablation/alpha=0.2/",
        "ablation/learning_rate=0.0001/",
        "ablation/network=unet/",
    ]


def test_an_ablation_trains_the_arms_that_its_knob_reaches_on_its_folds():
    planned = {
        setting.knob: [segmenter.folder for segmenter in plans.segmenters(STUDY, setting)]
        for setting in plans.settings(STUDY)
        if setting != BASE
    }
    assert len(plans.segmenters(STUDY)) == 2 * 4
    assert planned["alpha"] == ["ablation/alpha=0.2/fold0/diffboost/seed0"]
    assert planned["guidance_scale"] == ["ablation/guidance_scale=3.0/fold0/diffboost/seed0"]
    for knob, value in (("learning_rate", "0.0001"), ("network", "unet")):
        folders = [
            f"ablation/{knob}={value}/fold0/{arm}/seed0" for arm in ("baseline", "diffboost")
        ]
        assert planned[knob] == folders


def test_the_first_value_is_read_from_the_base():
    found = {
        value: segmenter.folder for segmenter, value in plans.ablation_segmenters(STUDY, "ratio")
    }
    assert found == {
        4: "fold0/diffboost/seed0",
        1: "ablation/ratio=1/fold0/diffboost/seed0",
        8: "ablation/ratio=8/fold0/diffboost/seed0",
    }


def test_ratios_share_one_synthesis_and_differ_in_num_variants():
    one = Setting("synthesis", "ratio", 1)
    assert plans.synthetic_dir(one, 0) == plans.synthetic_dir(BASE, 0) == "fold0/synthetic_store"
    assert plans.synthesis_knobs(STUDY, BASE) == {"ratio": 8, "guidance_scale": 1.0}
    assert plans.segmentation_knobs(STUDY, one, "diffboost")["num_variants"] == 1
    assert plans.segmentation_knobs(STUDY, BASE, "diffboost")["num_variants"] == 4
    assert "num_variants" not in plans.segmentation_knobs(STUDY, BASE, "nnunet")


def test_an_arm_may_train_epochs_of_its_own():
    study = replace(STUDY, segmentation={"epochs": 6}, arm_epochs={"baseline": 12})
    assert plans.segmentation_knobs(study, BASE, "baseline")["epochs"] == 12
    assert plans.segmentation_knobs(study, BASE, "diffboost")["epochs"] == 6


def test_folds_share_the_cores_but_not_a_gpu():
    three = replace(STUDY, folds=(0, 1, 2))
    assert [plans.fold_cores(three, cores, gpu=False) for cores in (1, 2, 8)] == [1, 1, 2]
    assert plans.fold_cores(replace(STUDY, folds=(0,)), 2, gpu=False) == 2
    assert plans.fold_cores(three, 8, gpu=True) == 8
    assert plans.fold_cores(replace(three, scale="sd15"), 8, gpu=False) == 8


def test_another_knob_of_synthesis_has_a_store_of_its_own_at_the_ratio_of_the_base():
    strong = Setting("synthesis", "guidance_scale", 3.0)
    assert plans.synthetic_dir(strong, 1) == "ablation/guidance_scale=3.0/fold1/synthetic_store"
    assert plans.synthesis_knobs(STUDY, strong) == {"ratio": 4, "guidance_scale": 3.0}


def test_a_network_is_an_overlay_beside_the_config():
    unet = Setting("network", "network", "unet")
    config = Path("configs/train.yaml")
    assert plans.segmentation_network(STUDY, BASE) == "attention_unet"
    assert plans.network_overlay(config, plans.segmentation_network(STUDY, BASE)) == []
    overlays = plans.network_overlay(config, plans.segmentation_network(STUDY, unet))
    assert overlays == [Path("configs/network_unet.yaml")]


def test_a_target_that_the_experiment_lacks_is_refused():
    assert targets.ordered_targets(STUDY) == ["table2", "figure4", "figure6", "figure7"]
    targets.check_target(STUDY, "report")
    with pytest.raises(ValueError, match="target: table1 needs a section pretrain in the exp"):
        targets.check_target(STUDY, "table1")
    with pytest.raises(ValueError, match="target: 'figur6' is unknown; did you mean 'figure6'"):
        targets.check_target(STUDY, "figur6")
    plain = replace(STUDY, arms=["baseline"], network="unet", ablations={}, pretrain={})
    assert targets.ordered_targets(plain) == ["table1", "table2"]
    alone = replace(STUDY, arms=["baseline"], network="unet")  # figure 6 ended with an IndexError
    assert targets.ordered_targets(alone) == ["table2"]
    classical = replace(
        alone, arms=["baseline", "nnunet"], ablations={"segmentation": {"epochs": [2, 4]}}
    )
    assert targets.ordered_targets(classical) == ["table2"]


def dry_run(experiment: Path, folder: Path, target: str = "report") -> tuple[Counter, str]:
    """Plans an experiment with Snakemake: how many jobs each rule has, and what it printed."""
    words = [sys.executable, "-m", "snakemake", target, "--dry-run", "--printshellcmds"]
    words += ["--snakefile", str(REPOSITORY / "workflow" / "Snakefile"), "--cores", "2"]
    words += ["--directory", str(folder), "--nolock"]
    words += ["--config", f"experiment={experiment}", f"started_in={folder}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    table = output.partition("Job stats:")[2].partition("total")[0]
    return Counter({n: int(c) for n, c in re.findall(r"^(\w+) +(\d+)$", table, re.M)}), output


def words_of(commands: list[list[str]], knob: str) -> list[str]:
    """The values that commands give a knob."""
    return [words[words.index(f"--{knob}") + 1] for words in commands if f"--{knob}" in words]


def test_paper_small_plans_every_table_and_figure_with_one_synthesis_a_fold(tmp_path):
    jobs, output = dry_run(REPOSITORY / "workflow/experiments/paper_small.yaml", tmp_path)
    segmenters = 2 * 15 + 3 + 2 + 2 + 4 * 2  # arms in 2 folds; ratios, alphas, patches, networks
    assert jobs == {
        "prepare": 1,
        "pretrain": 1,
        "train_pix2pix": 1,
        "evaluate_images": 1,
        "finetune": 2,
        "synthesize": 2,
        "train_on_synthetic": 2,
        "train_segmentation": segmenters,
        "evaluate": segmenters,
        "table1": 1,
        "table2": 1,
        "figure4": 1,
        "figure6": 1,
        "figure7": 1,
        "record": 1,
        "report": 1,
    }
    commands = bundle_commands(output)
    for words in commands:
        check_flags(words, [REPOSITORY], "Snakefile")
    assert Counter(words_of(commands, "ratio")) == {"8": 2}
    used = Counter(words_of(commands, "num_variants"))
    assert set(used) == {"8", "4", "2", "1"} and used["1"] == 2  # its training and its evaluation
    # synthetic_then_real: half of the epochs on variants alone, the rest on real slices from there
    place = f"{tmp_path}/fold0/synthetic_then_real/seed0"
    first = [words for words in commands if f"{place}/on_synthetic" in words]
    assert words_of(first, "arm") + words_of(first, "epochs") == ["synthetic", "7"]
    both = [words for words in commands if place in words]  # training and evaluation
    assert words_of(both, "arm") + words_of(both, "epochs") == ["baseline"] * 2 + ["8"] * 2
    assert words_of(both, "weights") == [f"{place}/on_synthetic/model.pt"] * 2


def test_arms_own_epochs_reach_both_halves_of_synthetic_then_real(tmp_path):
    """It took baseline's."""
    experiment = yaml.safe_load((REPOSITORY / "workflow/experiments/demo.yaml").read_text())
    experiment |= {"arms": ["baseline", "synthetic_then_real"], "folds": [0], "seeds": [0]}
    experiment |= {"arm_epochs": {"baseline": 200, "synthetic_then_real": 11}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(experiment))
    commands = bundle_commands(dry_run(path, tmp_path / "run")[1])
    place = f"{tmp_path}/run/fold0/synthetic_then_real/seed0"
    first = [words for words in commands if f"{place}/on_synthetic" in words]
    both = [words for words in commands if place in words]
    assert words_of(first, "epochs") + words_of(both, "epochs") == ["5", "6", "6"]


def test_segmenters_have_the_classes_that_prepare_makes(tmp_path):
    """They had the task's, and every training was refused."""
    experiment = {"name": "zones", "task": "prostate_mri", "dataset_dir": "phantoms"}
    experiment |= {"prepare": {"labels": {"peripheral": [1], "transition": [2]}}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(experiment | {"arms": ["baseline"]}))
    commands = bundle_commands(dry_run(path, tmp_path / "run")[1])
    assert words_of(commands, "num_classes") == ["3", "3"]  # training, evaluation


def test_filter_ratio_and_edge_weights_reach_synthesis(tmp_path):
    """The edge weights that prepare was given did not: it looked for them where none were."""
    experiment = {"name": "filtered", "task": "phantom_organ", "dataset_dir": "phantoms"}
    experiment |= {"arms": ["baseline", "diffboost"], "folds": [1], "seeds": [3], "network": "unet"}
    experiment |= {"edges": "hed-bsds500", "prepare": {"edge_weights": "hed.whl"}}
    experiment |= {"synthesis": {"quality_filter": True, "max_lost": 0.1}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(experiment))
    jobs, output = dry_run(path, tmp_path / "run")
    (words,) = [words for words in bundle_commands(output) if "--generator_dir" in words]
    segmenter = f"{tmp_path}/run/fold1/baseline/seed3"
    assert words_of([words], "segmenter_dir") == [segmenter]
    assert "network_unet.yaml" in words_of([words], "segmenter_configs")[0]
    assert words_of([words], "max_lost") + words_of([words], "edge_weights") == ["0.1", "hed.whl"]
    experiment["synthesis"] |= {"ratio": "auto"}
    path.write_text(yaml.safe_dump(experiment | {"auto_ratio": {"max_ratio": 4}}))
    jobs, output = dry_run(path, tmp_path / "auto")
    (words,) = [words for words in bundle_commands(output) if "--generator_dir" in words]
    assert words_of([words], "config_file")[0].endswith("auto_ratio.yaml")
    assert words_of([words], "max_ratio") == ["4"] and not words_of([words], "segmenter_dir")
    knobs = yaml.safe_load(words_of([words], "synthesis_knobs")[0])
    expected = {"quality_filter": True, "max_lost": 0.1, "edge_weights": "hed.whl"}
    assert knobs.items() >= expected.items() and "ratio" not in knobs
    assert knobs["segmenter_dir"] == f"{tmp_path}/auto/fold1/baseline/seed3"


def test_unlabelled_images_teach_each_folds_generator_first(tmp_path):
    name = "real_breast_20_unlabelled"
    jobs, output = dry_run(REPOSITORY / f"workflow/experiments/{name}.yaml", tmp_path)
    stages = ("prepare_unlabelled", "train_on_unlabelled", "finetune", "synthesize")
    assert [jobs[stage] for stage in stages] == [3] * 4 and jobs["train_segmentation"] == 36
    commands = bundle_commands(output)
    for words in commands:
        check_flags(words, [REPOSITORY], "Snakefile")
    for fold in "012":
        folder = f"{tmp_path}/fold{fold}/unlabelled"
        (first,) = [words for words in commands if f"{folder}/generator" in words]
        assert words_of([first], "store_dir") == [f"{folder}/store"]
        assert words_of([first], "inner_fraction") == ["0.0"]
        assert words_of([first], "epochs") == ["100"] and not words_of([first], "num_cases")
        (then,) = [words for words in commands if f"{folder}/generator/model.pt" in words]
        assert words_of([then], "weights") == [f"{folder}/generator/model.pt"]
        assert words_of([then], "num_cases") + words_of([then], "epochs") == ["20", "300"]


def test_paper_prostate_plans_the_papers_scale_and_protocol_on_many_gpus(tmp_path):
    written = (REPOSITORY / "workflow/experiments/paper_prostate.yaml").read_text()
    (tmp_path / "prostate.yaml").write_text(written + "processes: 4\n")
    jobs, output = dry_run(tmp_path / "prostate.yaml", tmp_path)
    assert (jobs["synthesize"], jobs["finetune"], jobs["pretrain"]) == (3, 3, 0)
    segmenters = 3 * (15 + 5 + 5 + 6 + 4 * 2)
    assert jobs["train_segmentation"] == jobs["evaluate"] == segmenters
    commands = bundle_commands(output)
    for words in commands:
        check_flags(words, [REPOSITORY], "Snakefile")
    diffusion = [words for words in commands if "sd15.yaml" in " ".join(words)]
    assert len(diffusion) == 3 + 3
    assert set(words_of(diffusion, "image_size")) == {"384"}
    assert words_of(diffusion, "ratio") == ["50"] * 3
    many = [words for words in commands if "multi_gpu" in " ".join(words)]
    assert len(many) == output.count("--nproc_per_node=4") == len(commands) - 1  # but prepare
    protocol = yaml.safe_load((REPOSITORY / "workflow/protocols/paper.yaml").read_text())
    for knob, value in protocol["segmentation"].items():
        found = set(words_of([words for words in commands if "--arm" in words], knob))
        assert found == {str(value)}, knob


# --- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task", "breast_ultrasond", "did you mean 'breast_ultrasound'"),
        ("backbone", "notes.ckpt", "backbone: 'notes.ckpt' is no folder and no file"),
        ("backbone", "{folder}", "has no folder unet"),
    ],
)
def test_a_study_refuses_what_its_later_stages_would(tmp_path, key, value, message):
    written = {"name": "bad", "task": "breast_ultrasound", "dataset_dir": "/nowhere"}
    written |= {"arms": ["baseline"], key: value.format(folder=tmp_path)}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(SystemExit, match=message):
        cli.study(str(path), runs_dir=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_study_without_its_data_ends_at_once_and_a_dry_run_warns(tmp_path, monkeypatch, caplog):
    ran = []
    monkeypatch.setattr(cli, "_run", lambda *words: ran.append(words) or 0)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"

    def study(**options):
        cli.study(str(path), runs_dir=str(tmp_path / "runs"), **options)

    def write(**keys):
        written = {"name": "x", "task": "hippocampus_mri", "dataset_dir": "scans"}
        path.write_text(yaml.safe_dump(written | {"arms": ["baseline"]} | keys))

    write()
    with pytest.raises(SystemExit, match=f"dataset_dir: there is no folder {tmp_path}/scans; give"):
        study()
    write(pretrain={"dataset_dir": "tree"}, dataset_dir="phantoms")
    with pytest.raises(
        SystemExit, match=f"pretrain: dataset_dir: there is no folder {tmp_path}/tr"
    ):
        study()
    assert PHANTOM_LAYOUTS == tuple(PHANTOM_WRITERS)
    write(task="breast_ultrasound", dataset_dir="phantoms")
    with pytest.raises(SystemExit, match="made in the layouts decathlon, radimagenet; .* is pairs"):
        study()
    write(dataset_dir="phantoms", finetune={"weights": "pretrained/model.pt"})
    with pytest.raises(SystemExit, match=f"weights: there is no file {tmp_path}/pretrained/model"):
        study()
    assert not ran and not (tmp_path / "runs").exists()
    write()
    study(dry_run=True)
    assert f"there is no folder {tmp_path}/scans" in caplog.text
    study(dataset_dir="phantoms")
    write(prepare={"download": True})
    study()
    write()
    (tmp_path / "runs/x/store").mkdir()
    study()
    (tmp_path / "runs/x/store").rmdir()
    (tmp_path / "scans").mkdir()  # relative to the working directory, as stages take it
    study()
    assert len(ran) == 5


def test_holm_by_hand():
    # sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 (lifted to 0.06), 0.5 x 1
    found = holm({"a": 0.03, "b": 0.01, "c": 0.5, "d": 0.02, "e": float("nan")})
    assert found == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06, "e": float("nan")}, nan_ok=True
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("low", "training_low", "num_seeds", "p", "words"),
    [
        (0.01, 0.01, 2, 0.04, "gain shown"),
        (0.01, np.nan, 1, 0.04, "gain shown"),
        (0.01, np.nan, 2, 0.04, "no gain shown"),  # seeds without a case in common
        (0.01, -0.01, 2, 0.04, "no gain shown"),
        (0.01, 0.01, 2, 0.06, "no gain shown"),
        (-0.01, 0.01, 2, 0.01, "no gain shown"),
        (np.nan, np.nan, 1, np.nan, "no gain shown"),
    ],
)
def test_a_gain_needs_both_intervals_and_holms_p(low, training_low, num_seeds, p, words):
    found = {"ci95": [low, low + 0.05], "training_ci95": [training_low, 0.1], "p_holm": p}
    assert verdict(found | {"num_seeds": num_seeds}) == words


def test_arms_are_paired_at_the_folds_and_seeds_that_both_have():
    """A seed of one arm alone moved its mean, and no interval over seeds passed for one seed."""
    rows = metric_rows("baseline", 0, seed=0) + metric_rows("mirror", 0.06, seed=0)
    rows += metric_rows("baseline", -0.2, seed=1)
    found = summarize(pd.DataFrame(rows, columns=COLUMNS), ["baseline", "mirror"])[1]["mirror"]
    assert found["dice"]["mean"] == pytest.approx(0.06, abs=0.02)
    assert np.isnan(found["dice"]["training_ci95"][0])
    assert verdict(found["dice"]) == "no gain shown"  # two seeds were ordered
    rows = metric_rows("baseline", 0, seed=0) + metric_rows("mirror", 0.06, seed=1)
    apart = summarize(pd.DataFrame(rows, columns=COLUMNS), ["baseline", "mirror"])[1]["mirror"]
    assert apart["dice"]["n"] == 0 and verdict(apart["dice"]) == "no gain shown"


def test_a_gain_that_another_seed_turns_round_is_not_shown():
    """The interval over cases alone called it a gain."""
    rows = []
    for seed, gain in enumerate((0.06, -0.02, 0.02)):
        rows += metric_rows("baseline", 0, 0, seed=seed) + metric_rows("mirror", gain, 0, seed=seed)
    found = summarize(pd.DataFrame(rows, columns=COLUMNS), ["baseline", "mirror"])[1]["mirror"]
    assert found["dice"]["ci95"][0] > 0.01 and found["dice"]["p_holm"] < 0.001
    low, high = found["dice"]["training_ci95"]
    assert low < -0.05 and high > 0.09  # t of two degrees of freedom over means 0.04 apart
    assert verdict(found["dice"]) == "no gain shown"


def test_a_seed_that_one_arm_lacks_leaves_the_rule_as_strict():
    """The interval over seeds vanished, and the verdict passed it over as that of one seed."""
    rows = []
    for seed, gain in enumerate((0.06, 0.0)):
        rows += metric_rows("baseline", 0, 0, seed=seed) + metric_rows("mirror", gain, 0, seed=seed)
    both = pd.DataFrame(rows, columns=COLUMNS)
    rows += metric_rows("baseline", 0, 0, seed=2)
    unfinished = pd.DataFrame(rows, columns=COLUMNS)
    found, more = (
        summarize(metrics, ["baseline", "mirror"])[1]["mirror"]["dice"]
        for metrics in (both, unfinished)
    )
    assert more["training_ci95"] == found["training_ci95"] and found["training_ci95"][0] < 0
    assert verdict(found) == verdict(more) == "no gain shown"


def metric_rows(
    arm: str, gain: float, fold: int = 0, knob: str = "", value: str = "", seed: int = 0
) -> list:
    """Dice of 12 cases, `gain` above baseline's, in the columns of metrics.csv."""
    rng = np.random.default_rng(fold)
    rows = []
    for number, dice in enumerate(np.linspace(0.4, 0.7, 12) + 0.1 * fold):
        dice += gain + (0.01 * rng.standard_normal() if gain else 0)
        rows.append((arm, fold, seed, f"f{fold}c{number}", "x", "dice", dice, knob, value))
    return rows


@pytest.fixture(scope="module")
def metrics() -> pd.DataFrame:
    """A study of two folds with ablations of alpha and network on the first."""
    rows = []
    for fold in (0, 1):
        rows += metric_rows("baseline", 0, fold) + metric_rows("diffboost", 0.1, fold)
        rows += metric_rows("mirror", -0.05, fold)
    for value, gain in (("0.6", 0.1), ("0.2", 0.04), ("1.0", 0.02)):
        rows += metric_rows("diffboost", gain, 0, "alpha", value)
    for value, gain in (("attention_unet", 0.1), ("unet", 0.06)):
        rows += metric_rows("baseline", 0, 0, "network", value)
        rows += metric_rows("diffboost", gain, 0, "network", value)
    return pd.DataFrame(rows, columns=COLUMNS)


def test_the_papers_aggregate_is_over_folds(metrics):
    found = over_folds(metrics[metrics["knob"] == ""], ["baseline", "nnunet"])
    assert list(found) == ["baseline"]
    sd = np.std(np.linspace(0.4, 0.7, 12), ddof=1)  # the same in both folds
    expected = {"mean": (0.55 + 0.65) / 2, "sd": sd, "num_folds": 2}
    assert found["baseline"]["dice"] == pytest.approx(expected)


def test_an_ablation_is_compared_with_baseline_of_its_folds_and_network(metrics):
    points = {point["value"]: point for point in ablation_points(metrics, "alpha")}
    assert list(points) == ["0.6", "0.2", "1.0"]
    assert points["0.2"]["difference"]["mean"] == pytest.approx(0.04, abs=0.01)
    assert points["0.2"]["n"] == points["0.2"]["difference"]["n"] == 12
    low, high = points["0.2"]["difference"]["ci95"]
    assert 0.03 < low < points["0.2"]["difference"]["mean"] < high < 0.05
    networks = {(p["value"], p["arm"]): p for p in ablation_points(metrics, "network")}
    assert networks["unet", "baseline"]["difference"] is None
    assert networks["unet", "diffboost"]["difference"]["mean"] == pytest.approx(0.06, abs=0.01)


# --- tables and figures -------------------------------------------------------------------------


def test_table_2_has_both_aggregates_and_a_verdict(metrics):
    rows = exhibits.table2_rows(metrics[metrics["knob"] == ""], ["baseline", "mirror", "diffboost"])
    rows = rows.set_index("arm")
    assert rows.loc["baseline", ["mean", "fold_mean", "n"]].tolist() == pytest.approx(
        [0.6, 0.6, 24]
    )
    assert rows.loc["diffboost", "verdict"] == "gain shown"
    assert rows.loc["mirror", "verdict"] == "no gain shown"  # worse, and surely so
    assert rows.loc["mirror", "p_holm"] == pytest.approx(2 * rows.loc["mirror", "p"], rel=1e-6)
    text = exhibits.table2_text(rows.reset_index(), "mm")
    assert "| arm | Dice |" in text
    cases = np.concatenate([np.linspace(0.4, 0.7, 12), np.linspace(0.5, 0.8, 12)])
    assert f"| baseline | 0.600 ± {cases.std(ddof=1):.3f} |" in text
    assert re.search(r"\| diffboost \| \+0\.10\d \| .* \| gain shown \|", text)
    low, high = rows.loc["diffboost", ["training_ci95_low", "training_ci95_high"]]
    assert np.isnan(low) or f"| {low:+.3f} to {high:+.3f} |" in text


def texts(svg: Path) -> str:
    """Everything that an SVG says; matplotlib notes each text in a comment."""
    return " ".join(re.findall(r"<!-- (.*?) -->", svg.read_text()))


def test_figures_6_and_7_are_drawn_from_metrics_csv_alone(metrics, tmp_path):
    metrics.to_csv(tmp_path / "metrics.csv", index=False)
    loaded = load_metrics(tmp_path / "metrics.csv")
    pd.testing.assert_frame_equal(loaded, metrics)
    exhibits.save(exhibits.ablation_figure(loaded, ["alpha"]), tmp_path / "figure6.svg")
    exhibits.save(exhibits.network_figure(loaded), tmp_path / "figure7.svg")
    for name, words in (
        ("figure6", ["alpha", "0.2", "0.6", "1.0"]),
        ("figure7", ["unet", "0.550"]),
    ):
        ElementTree.parse(tmp_path / f"{name}.svg")
        for word in words:
            assert word in texts(tmp_path / f"{name}.svg"), (name, word)


def test_an_axis_is_in_the_order_of_numbers():
    assert exhibits.in_order(["8", "16", "8", "1"]) == ["1", "8", "16"]
    assert exhibits.in_order(["unet", "a"]) == ["unet", "a"]


def test_metrics_name_the_knob_and_shared_runs_stand_twice(tmp_path):
    study = replace(STUDY, arms=["baseline", "diffboost"], folds=[0], network="attention_unet")
    study = replace(study, ablations={"segmentation": {"alpha": [0.6, 0.2]}})
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(asdict(study)))
    runs = {
        "fold0/baseline": 0.5,
        "fold0/diffboost": 0.6,
        "ablation/alpha=0.2/fold0/diffboost": 0.7,
    }
    for folder, dice in runs.items():
        (tmp_path / folder / "seed0").mkdir(parents=True)
        row = pd.DataFrame([("c", "x", "dice", dice)], columns=["case", "label", "metric", "value"])
        row.to_csv(tmp_path / folder / "seed0" / "metrics.csv", index=False)
    found = read_metrics(tmp_path)[["arm", "knob", "knob_value", "value"]].to_records(index=False)
    assert found.tolist() == [
        ("baseline", "", "", 0.5),
        ("diffboost", "", "", 0.6),
        ("diffboost", "alpha", "0.6", 0.6),
        ("diffboost", "alpha", "0.2", 0.7),
    ]

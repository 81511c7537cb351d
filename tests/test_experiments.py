"""Experiment files: what ships is valid, what is wrong is named."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from fire.parser import DefaultParseValue

from diffboost import precision
from diffboost.conditions import edges
from diffboost.data import splits, tasks
from diffboost.experiments import read_experiment, task_path
from diffboost.generation import cache, objective, optimization, sampling, schedulers
from diffboost.knob_values import WORDS, set_by_study
from diffboost.segmentation import evaluation, merging, metrics, training
from diffboost.stages import bundle_run, stage_configs
from diffboost.study_data import settle_dataset

REPOSITORY = Path(__file__).parents[1]
CONFIG = {
    "epochs": 3,
    "inner_fraction": 0.2,
    "learning_rate": 1.0e-3,
    "prompt_weights": {"style": 0.0},
    "merge": "logits",
    "alpha": 0.6,
    "ratio": 8,
    "num_variants": None,
    "channels": [16, 32],
    "quality_filter": False,
    "selection": "inner_validation",
    "scheduler": "unipc",
    "amp": False,
    "shuffle": True,
    "distances": "directed",
    "intensity_per": "volume",
    "weights": None,
    "seed": 0,
    "fold": 0,
    "store_dir": "data",
    "image_size": 64,
}
PAPER = {"segmentation": {"epochs": 100, "alpha": 0.5}, "synthesis": {"ratio": 50}}
BOTH = {"arms": ["baseline", "diffboost"]}
GOOD = {"name": "x", "task": "phantom_organ", "dataset_dir": "phantoms", "arms": ["baseline"]}


@pytest.fixture
def read(tmp_path):
    """Reads GOOD with some keys changed; a key changed to None is left out."""
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(CONFIG))
    for network, overlay in (("unet", "{}"), ("swin_unetr", "size_divisor: 32")):
        (tmp_path / f"network_{network}.yaml").write_text(overlay)
    protocols = tmp_path / "protocols"
    protocols.mkdir()
    for name, knobs in (("sound", {}), ("paper", PAPER)):
        (protocols / f"{name}.yaml").write_text(yaml.safe_dump(knobs))
    sections = ("prepare", "finetune", "synthesis", "segmentation", "evaluate", "pretrain.train")
    configs = dict.fromkeys(sections, tmp_path / "train.yaml")

    def read(**changes):
        written = {key: value for key, value in (GOOD | changes).items() if value is not None}
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(written))
        return read_experiment(tmp_path / "experiment.yaml", configs, protocols)

    return read


def test_defaults_are_filled_in(read):
    experiment = read(segmentation={"epochs": 5})
    assert (experiment.backbone, experiment.folds, experiment.seeds) == ("tiny", [0], [0])
    assert experiment.segmentation == {"epochs": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bakbone": "tiny"}, "unknown key 'bakbone' ('tiny'); did you mean 'backbone'"),
        ({"arms": None}, "`arms` is missing"),
        ({"name": "../x"}, "name: '../x'; allowed: letters"),
        ({"protocol": "papr"}, "protocol: 'papr' is unknown; did you mean 'paper'?"),
        ({"arms": ["baseline", "synthetic_then"]}, "did you mean 'synthetic_then_real'"),
        ({"network": "swinunetr"}, "did you mean 'swin_unetr'? allowed: attention_unet, swin"),
        ({"network": ["unet", "unet"]}, "network: ['unet', 'unet']; a name or different names"),
        ({"scale": "sd"}, "scale: 'sd'; did you mean 'sd15'? allowed: sd15, tiny"),
        ({"arm_epochs": {"mirror": 4}}, "arm_epochs: mirror: 4; arms of the study (baseline)"),
        ({"arm_epochs": {"baseline": 0}}, "arm_epochs: baseline: 0; arms of the study"),
        (
            {"arm_epochs": {"baseline": 4}, "segmentation": {"epochs": [2, 3]}},
            "arm_epochs: beside a list of segmentation: epochs",
        ),
        ({"processes": 0}, "processes: 0; a whole number from 1 up"),
        ({"ablation_folds": [1]}, "ablation_folds: 1 is none of folds"),
        ({"pretrain": {"trian": {}}}, "pretrain: unknown key 'trian' ({}); did you mean 'train'"),
        ({"pretrain": {"train": {"epoch": 1}}}, "pretrain: train: unknown key 'epoch' (1)"),
        ({"synthesis": {"ratio": [8, 8]}}, "ratio: [8, 8]; an ablation is a list of different"),
        ({"synthesis": {"ratio": []}}, "ratio: []; an ablation is a list of different"),
        (BOTH | {"synthesis": {"ratio": [8, "2"]}}, "ratio: '2'; a number is needed"),
        ({"synthesis": {"ratio": [8, 2]}}, "arm diffboost, which is not among the arms: baseline"),
        ({"segmentation": {"epochs": [8, 2]}}, "arm diffboost, which is not among the arms"),
        ({"name": ".."}, "name: '..'; allowed: letters, digits"),
        (
            BOTH | {"synthesis": {"ratio": [8, 2]}, "segmentation": {"num_variants": 2}},
            "num_variants: is decided by the list of ratio",
        ),
        (
            BOTH | {"synthesis": {"epochs": [1, 2]}, "segmentation": {"epochs": [1, 2]}},
            "epochs: a list in synthesis and in segmentation",
        ),
        (
            BOTH | {"segmentation": {"merge": ["logits", "a b", "a/b"]}},
            "would share the folder ablation/merge=a_b/",
        ),
        ({"arms": ["baseline", "mirorr"]}, "arm: 'mirorr' is unknown; did you mean 'mirror'"),
        ({"arms": ["mirror"]}, "`baseline` must be one of them"),
        ({"arms": "baseline"}, "arms: 'baseline'; a list"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]; a list of different values"),
        ({"seeds": [-1]}, "seeds: -1; allowed: 0 to"),
        ({"folds": [3]}, "folds: 3; allowed: 0 to 2"),
        ({"image_size": "64"}, "image_size: '64'; a whole number from 8 up"),
        ({"image_size": 100}, "image_size: 100; a multiple of 32 is needed"),
        ({"image_size": 40}, "image_size: 40; a multiple of 32 is needed"),
        (
            {"image_size": 96, "segmentation": {"channels": [4] * 7}},
            "image_size: 96; network attention_unet needs a multiple of 64 from 128 up",
        ),
        (
            BOTH | {"image_size": 96, "segmentation": {"channels": [[4] * 3, [4] * 7]}},
            "image_size: 96; network attention_unet needs a multiple of 64 from 128 up",
        ),
        (
            BOTH | {"image_size": 32, "network": ["unet", "swin_unetr"]},
            "image_size: 32; network swin_unetr needs a multiple of 32 from 64 up",
        ),
        ({"pretrain": {"image_size": 40}}, "pretrain: image_size: 40; a multiple of 32 is needed"),
        ({"finetune": {"fold": 1}}, "finetune: fold: 1; the study sets it: use the key `folds`"),
        (
            {"segmentation": {"seed": 3}},
            "segmentation: seed: 3; the study sets it: use the key `se",
        ),
        ({"synthesis": {"store_dir": "a"}}, "store_dir: 'a'; the study sets it: leave it out"),
        (BOTH | {"segmentation": {"seed": [1, 2]}}, "the study sets it: use the key `seeds`"),
        (
            {"pretrain": {"train": {"image_size": 32}}},
            "pretrain: train: image_size: 32; the study sets it: use the key `image_size` of pret",
        ),
        (
            {"arms": ["baseline", "synthetic_then_real"], "segmentation": {"weights": "a"}},
            "segmentation: weights: 'a'; the study sets it: leave it out",
        ),
        ({"edges": "hed"}, "edges: 'hed' is unknown; allowed: controlnet-hed"),
        ({"synthesis": {"scheduler": "dpm"}}, "scheduler: 'dpm' is unknown; did you mean 'dpm++'?"),
        ({"synthesis": {"ratio": 0}}, "synthesis: ratio: 0; a whole number from 1 up"),
        (BOTH | {"synthesis": {"ratio": [8, 0]}}, "ratio: 0; a whole number from 1 up"),
        ({"segmentation": {"merge": "image"}}, "merge: 'image' is unknown; did you mean 'images'?"),
        (BOTH | {"segmentation": {"merge": ["images", "logit"]}}, "'logit' is unknown; did you"),
        ({"segmentation": {"selection": "tset"}}, "selection: 'tset' is unknown; did you mean"),
        ({"segmentation": {"amp": "yes please"}}, "amp: 'yes please'; allowed: true, false, auto"),
        ({"segmentation": {"epochs": -3}}, "epochs: -3; a whole number from 1 up"),
        ({"segmentation": {"epochs": 2.5}}, "epochs: 2.5; a whole number from 1 up"),
        ({"segmentation": {"alpha": 1.5}}, "alpha: 1.5; a number from 0 to 1"),
        ({"finetune": {"shuffle": "yes"}}, "finetune: shuffle: 'yes'; allowed: true, false"),
        ({"evaluate": {"distances": "polled"}}, "distances: 'polled' is unknown; did you mean"),
        ({"prepare": {"intensity_per": "slices"}}, "'slices' is unknown; did you mean 'slice'?"),
        ({"num_folds": 1}, "num_folds: 1; a whole number from 2 up"),
        ({"finetune": {"epoch": 5}}, "finetune: unknown key 'epoch' (5); did you mean 'epochs'"),
        (
            {"finetune": {"epochs": [5, 9]}},
            "lists are ablations in synthesis and segmentation only",
        ),
        ({"segmentation": {"learning_rate": "1e-5"}}, "a number is needed (1.0e-5, not 1e-5)"),
        ({"segmentation": {"merge": {"a": 1}}}, "merge: {'a': 1}; one value is needed"),
        ({"synthesis": 8}, "synthesis: 8; `key: value` lines"),
        (
            {"arms": ["baseline", "synthetic_then_real"], "segmentation": {"epochs": 1}},
            "epochs: 1; arm synthetic_then_real trains half of them",
        ),
        ({"name": 2024}, "name: 2024; a text is needed"),
        ({"dataset_dir": " "}, "dataset_dir: ' '; a text is needed"),
        ({"segmentation": {"inner_fraction": 0.3}}, "need the same, or the generator sees cases"),
        ({"synthesis": {"quality_filter": 1}}, "quality_filter: 1; allowed: true, false"),
        (
            {"synthesis": {"quality_filter": True}, "segmentation": {"selection": "test"}},
            "a segmenter that test cases chose may not filter variants",
        ),
        (
            {"segmentation": {"selection": "test"}},
            "segmentation: selection: 'test' is refused as a leak, unless allow_selection_on_test",
        ),
        (
            BOTH | {"segmentation": {"selection": ["inner_validation", "test"]}},
            "selection: 'test' is refused as a leak",
        ),
    ],
)
def test_what_is_wrong_is_named(read, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(**changes)


def test_an_empty_heading_is_named(read, tmp_path):
    read()
    path = tmp_path / "experiment.yaml"
    path.write_text(path.read_text() + "arm_epochs:\n")
    with pytest.raises(ValueError, match="arm_epochs: None; `key: value` lines are needed"):
        read_experiment(path)


def test_knobs_that_the_study_sets_are_not_offered(read):
    with pytest.raises(ValueError, match="unknown key 'fol'") as error:
        read(finetune={"fol": 1})
    allowed = str(error.value).partition("allowed: ")[2].split(", ")
    assert "epochs" in allowed and not {"fold", "store_dir", "image_size"} & set(allowed)


def test_what_the_rules_set_is_what_a_section_may_not():
    rules = "".join(path.read_text() for path in (REPOSITORY / "workflow/rules").glob("*.smk"))
    experiment = read_experiment(REPOSITORY / "workflow/experiments/demo.yaml")
    given = set(re.findall(r'^ +"(\w+)": ', rules, re.M)) - {"weights"}
    known = set().union(*(set_by_study(section, experiment) for section in stage_configs()))
    assert given - known - {"unlabelled_dir", "edge_weights", "inner_fraction"} == set()


def test_allowed_words_are_those_of_the_stages():
    stages = {
        "edges": edges.EDGE_NAMES,
        "fold_order": splits.FOLD_ORDERS,
        "intensity_per": tasks.INTENSITY_PER,
        "prompt_order": tasks.PROMPT_ORDERS,
        "objective": objective.OBJECTIVES,
        "schedule": optimization.SCHEDULES,
        "optimizer_name": optimization.OPTIMIZERS,
        "precision": precision.PRECISIONS,
        "latent_precision": cache.LATENT_PRECISIONS,
        "scheduler": schedulers.SCHEDULERS,
        "noise_address": sampling.NOISE_ADDRESSES,
        "merge": merging.MERGES,
        "selection": training.SELECTIONS,
        "part": splits.PARTS,
        "volumes": evaluation.VOLUMES,
        "empty_masks": metrics.EMPTY_MASKS,
        "distances": metrics.DISTANCES,
    }
    assert {knob: tuple(words) for knob, words in stages.items()} == WORDS


def test_a_knob_that_is_a_mapping_takes_a_mapping(read):
    weights = {"prompt_weights": {"style": 0.1}}
    assert read(synthesis=weights).synthesis == weights


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="`key: value` lines"):
        read_experiment(tmp_path / "list.yaml", {})
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_experiment(tmp_path / "none.yaml", {})


def test_a_task_file_is_found_beside_the_experiment(read, tmp_path):
    assert task_path(read(), tmp_path / "experiment.yaml") == "phantom_organ"
    own = read(task="tasks/own.yaml")
    assert task_path(own, tmp_path / "experiment.yaml") == str(tmp_path / "tasks" / "own.yaml")


def test_bundle_run_quotes_and_leaves_out_what_is_none():
    files = [Path("my bundles/x/configs/train.yaml"), Path("my bundles/x/configs/evaluate.yaml")]
    settings = {"fold": 1, "synthetic_dir": None, "arm": "diffboost+nnunet"}
    words = shlex.split(bundle_run(files, settings, {"prompt_weights": {"style": 0.5}}))
    assert words[:4] == ["python", "-m", "monai.bundle", "run"]
    assert words[4:6] == ["--config_file", repr([str(path) for path in files])]
    assert words[6:8] == ["--bundle_root", "my bundles/x"]
    assert words[8:] == (
        ["--fold", "1", "--arm", "diffboost+nnunet", "--prompt_weights", "{'style': 0.5}"]
    )


def test_the_file_wins_over_its_protocol_and_that_over_the_config(read):
    experiment = read(protocol="paper", segmentation={"alpha": 0.7})
    assert experiment.segmentation == {"epochs": 100, "alpha": 0.7}
    assert experiment.synthesis == {"ratio": 50}
    assert read(segmentation={"alpha": 0.7}).segmentation == {"alpha": 0.7}


def test_lists_become_ablations_and_their_first_value_the_base(read):
    written = BOTH | {"synthesis": {"ratio": [8, 2]}, "network": ["unet", "attention_unet"]}
    experiment = read(**written, segmentation={"alpha": [0.2, 0.6], "epochs": 4})
    assert experiment.segmentation == {"alpha": 0.2, "epochs": 4}
    assert experiment.synthesis == {"ratio": 8}
    assert experiment.ablations == {
        "synthesis": {"ratio": [8, 2]},
        "segmentation": {"alpha": [0.2, 0.6]},
    }
    assert experiment.networks == ["unet", "attention_unet"]


def test_a_knob_that_is_a_list_is_ablated_by_a_list_of_lists(read):
    assert read(segmentation={"channels": [8, 16]}).segmentation == {"channels": [8, 16]}
    experiment = read(**BOTH | {"segmentation": {"channels": [[8, 16], [4, 8]]}})
    assert experiment.segmentation == {"channels": [8, 16]}
    assert experiment.ablations == {"segmentation": {"channels": [[8, 16], [4, 8]]}}


def test_what_is_recorded_reads_the_same_again(read):
    written = BOTH | {
        "synthesis": {"ratio": [8, 2]},
        "segmentation": {"channels": [[8, 16], [4, 8]]},
    }
    experiment = read(**written)
    recorded = {key: value for key, value in asdict(experiment).items() if value is not None}
    assert read(**recorded) == experiment


def test_bundle_run_refuses_a_knob_that_the_study_sets():
    with pytest.raises(ValueError, match="`fold` .value 2. is set by the study"):
        bundle_run(["x/configs/train.yaml"], {"fold": 1}, {"fold": 2})


@pytest.mark.parametrize("path", sorted((REPOSITORY / "workflow/experiments").glob("*.yaml")))
def test_shipped_experiments_are_valid(path):
    assert read_experiment(path, stage_configs()).name == path.stem


@pytest.mark.parametrize(
    "value", ["blurry, dark", "scans #2", "(gray)", "2024", "None", "a b", "x"]
)
def test_a_text_reaches_its_stage_as_it_is(value):
    """fire made a tuple, a number or a shorter text of it."""
    words = shlex.split(bundle_run(["bundles/b/configs/c.yaml"], {"dataset_dir": value}, {}))
    assert DefaultParseValue(words[words.index("--dataset_dir") + 1]) == value


def test_prepare_takes_a_list_of_folders(tmp_path):
    experiment = {"name": "a", "task": "breast_ultrasound", "dataset_dir": "x"}
    experiment |= {"arms": ["baseline"], "prepare": {"include": ["malignant"]}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(experiment))
    assert read_experiment(path).prepare["include"] == ["malignant"]


@pytest.mark.parametrize("other", ["same", "link", "another"])
def test_a_finished_store_keeps_its_folder_of_scans(tmp_path, monkeypatch, other):
    """Another spelling removed the store and all that was made of it; a wrong folder did, too."""
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "small"
    for folder in ("scans", "others"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("scans")
    run_dir.mkdir(parents=True)
    assert settle_dataset(run_dir, "others", dry_run=True) == "others"
    assert settle_dataset(run_dir, "others") == "others"
    assert settle_dataset(run_dir, "scans") == "scans"  # nothing was made of the others
    (run_dir / "store").mkdir()
    named = {"same": str(tmp_path / "scans"), "link": "link", "another": "others"}[other]
    if other != "another":
        assert settle_dataset(run_dir, named) == "scans"
        return
    with pytest.raises(ValueError, match="dataset_dir: others, but .*store was made from scans"):
        settle_dataset(run_dir, named)
    with pytest.raises(ValueError, match="dataset_dir: nowhere, but .*made from scans"):
        settle_dataset(run_dir, "nowhere")


def test_a_study_of_an_older_version_knows_its_folder_of_scans(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "experiment.yaml").write_text("dataset_dir: ../scans\n")
    assert settle_dataset(tmp_path, "../scans") == "../scans"
    with pytest.raises(ValueError, match=r"made from \.\./scans"):
        settle_dataset(tmp_path, "../other")

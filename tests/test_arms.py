"""Every arm and every network trains an epoch; every knob of an ablation changes the outcome."""

import functools
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from small_store import write_store, write_variants

from diffboost.data.slices import slice_items
from diffboost.segmentation.arms import ARMS, split_arm
from diffboost.segmentation.merging import variants_by_slice
from diffboost.segmentation.training import selection_items, training_items

CONFIGS = Path(__file__).parents[1] / "bundles" / "diffboost_segmentation" / "configs"
TRAIN, EVALUATE, INFERENCE = (
    str(CONFIGS / f"{name}.yaml") for name in ("train", "evaluate", "inference")
)
SMALL = {"image_size": 32, "num_classes": 3, "channels": [4, 8, 8], "batch_size": 4}
SMALL |= {"epochs": 1, "learning_rate": 0.01, "device": "$torch.device('cpu')"}
# overlay -> class, parameters with one channel and three classes, its own keys
NETWORKS = {
    "unet": ("UNet", {"channels", "strides"}),
    "residual_unet": ("UNet", {"channels", "strides", "num_res_units"}),
    "resnet50_unet": ("FlexibleUNet", {"backbone"}),
    "swin_unetr": ("SwinUNETR", {"feature_size"}),
}
SHARED = {"_target_", "spatial_dims", "in_channels", "out_channels"}
PREFIXES = {"train": [TRAIN], "evaluate": [TRAIN, EVALUATE], "inference": [INFERENCE]}


def overlay(name: str) -> str:
    return str(CONFIGS / f"network_{name}.yaml")


def run(config_file, **settings) -> None:
    monai.bundle.run(config_file=config_file, bundle_root=str(CONFIGS.parent), **(SMALL | settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of volumes and three variants of each slice."""
    folder = tmp_path_factory.mktemp("arms")
    write_variants(write_store(folder / "store"), folder / "synthetic", ratio=3)
    return folder


def train(folder: Path, name: str, config_file=TRAIN, **settings) -> dict[str, torch.Tensor]:
    """Weights of a run of its own."""
    settings = {"store_dir": str(folder / "store"), "output_dir": str(folder / name)} | settings
    if split_arm(settings.get("arm", "baseline"))[0]:
        settings["synthetic_dir"] = str(folder / "synthetic")
    run(config_file, **settings)
    return torch.load(folder / name / "model.pt", weights_only=True)


def innermost(error: BaseException) -> str:
    """What the first of a chain of errors says."""
    while error.__cause__:
        error = error.__cause__
    return str(error)


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def reference(folder):
    """Weights of an arm as its knobs are, trained once."""
    return functools.cache(lambda arm: train(folder, f"reference_{arm}", arm=arm))


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "baseline"])
def test_every_arm_trains_an_epoch_and_differs(folder, reference, arm):
    found = reference(arm)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not same(found, reference("baseline"))
    if arm.startswith("diffboost+"):
        assert not same(found, reference("diffboost"))


def network_of(prefix: str, name: str, **settings) -> tuple[dict, torch.nn.Module, int]:
    parser = ConfigParser(ConfigParser.load_config_files([*PREFIXES[prefix], overlay(name)]))
    parser.update(SMALL | settings)
    network = parser.get_parsed_content("network_def")
    return parser["network_def"], network, parser.get_parsed_content("size_divisor")


@pytest.mark.parametrize("name", NETWORKS)
def test_overlays_replace_the_whole_network_in_every_config(name):
    kind, own = NETWORKS[name]
    states = []
    for prefix in PREFIXES:
        config, network, divisor = network_of(prefix, name, image_size=64)
        assert set(config) == SHARED | own and type(network).__name__ == kind
        assert divisor == (4 if "channels" in own else 32)
        states.append({key: value.shape for key, value in network.state_dict().items()})
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("name", [None, *NETWORKS])
def test_networks_take_one_and_several_channels(name):
    for in_channels in (1, 2):
        files = [TRAIN] if name is None else [TRAIN, overlay(name)]
        parser = ConfigParser(ConfigParser.load_config_files(files))
        parser.update(SMALL | {"in_channels": in_channels})
        network = parser.get_parsed_content("network_def").eval()
        with torch.no_grad():
            logits = network(torch.randn(1, in_channels, 64, 64))
        assert logits.shape == (1, 3, 64, 64) and torch.isfinite(logits).all()
        with pytest.raises(RuntimeError):
            network(torch.zeros(1, 3 - in_channels, 64, 64))


def test_residual_units_and_the_real_resnet50():
    _, plain, _ = network_of("train", "unet")
    _, residual, _ = network_of("train", "residual_unet")
    units = [type(module).__name__ for module in residual.modules()].count("ResidualUnit")
    assert units == 5 and "ResidualUnit" not in {type(m).__name__ for m in plain.modules()}
    _, network, _ = network_of("train", "resnet50_unet")
    encoder = network.encoder
    stages = [getattr(encoder, f"layer{number}") for number in (1, 2, 3, 4)]
    assert [len(stage) for stage in stages] == [3, 4, 6, 3]
    assert {type(block).__name__ for stage in stages for block in stage} == {"ResNetBottleneck"}
    # torchvision's resnet50 has 25,557,032: less the classifier and two of three input channels
    expected = 25_557_032 - 2048 * 1000 - 1000 - 2 * 64 * 7 * 7
    assert sum(p.numel() for p in encoder.parameters()) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_an_epoch_and_is_evaluated_and_used(tmp_path, name):
    size = 64 if name in ("resnet50_unet", "swin_unetr") else 32
    write_store(tmp_path / "store", num_cases=3, image_size=size)
    settings = {"image_size": size, "store_dir": str(tmp_path / "store"), "num_cases": 2}
    settings |= {"inner_fraction": 0.5, "output_dir": str(tmp_path / "run"), "batch_size": 5}
    run([TRAIN, overlay(name)], **settings)
    run([TRAIN, EVALUATE, overlay(name)], **settings)
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert np.isfinite(table.value).all() and set(table.case) == {"case_0"}
    places = {"output_dir": str(tmp_path / "seg"), "image_size": size}
    places |= {"dataset_dir": str(tmp_path / "store" / "source" / "imagesTr")}
    run([INFERENCE, overlay(name)], model_path=str(tmp_path / "run" / "model.pt"), **places)
    pred = nib.load(tmp_path / "seg" / "case_0_seg.nii.gz")
    evaluated = nib.load(tmp_path / "run" / "predictions" / "case_0.nii.gz")
    assert np.array_equal(np.asarray(pred.dataobj), np.asarray(evaluated.dataobj))
    (tmp_path / "run" / "model.pt").unlink()  # 128 MB of a ResNet-50


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("unet", 34, "image_size: 34; this network needs a multiple of 4 from 8 up"),
        ("residual_unet", 4, "image_size: 4; this network needs a multiple of 4 from 8 up"),
        ("resnet50_unet", 48, "image_size: 48; this network needs a multiple of 32 from 64 up"),
        ("swin_unetr", 32, "image_size: 32; this network needs a multiple of 32 from 64 up"),
    ],
)
def test_networks_refuse_images_that_do_not_fit(folder, name, image_size, message):
    with pytest.raises(RuntimeError) as error:
        train(folder, "refused", [TRAIN, overlay(name)], image_size=image_size)
    assert message in innermost(error.value)
    with pytest.raises(RuntimeError) as error:
        places = {"dataset_dir": str(folder), "image_size": image_size + 1}
        run([INFERENCE, overlay(name)], model_path="none.pt", output_dir=str(folder), **places)
    assert f"image_size: {image_size + 1} is no multiple of" in innermost(error.value)


# knob -> (arm, value): those of the ablations, each compared with the arm's reference
KNOBS = {
    "alpha": ("diffboost", 0.1),
    "patch_size": ("diffboost", 1),
    "merge": ("diffboost", "logits"),
    "num_variants": ("diffboost", 1),
    "seed": ("baseline", 1),
    "fold": ("baseline", 1),
    "shuffle": ("baseline", False),
    "num_cases": ("baseline", 3),
    "min_foreground_px": ("baseline", 200),
    "inner_fraction": ("baseline", 0.6),
    "epochs": ("baseline", 2),
    "channels": ("baseline", [4, 8, 16]),
}


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_of_an_ablation_changes_the_weights(folder, reference, knob):
    arm, value = KNOBS[knob]
    changed, plain = train(folder, f"knob_{knob}", arm=arm, **{knob: value}), reference(arm)
    shapes = [{key: value.shape for key, value in each.items()} for each in (changed, plain)]
    assert (shapes[0] != shapes[1]) == (knob == "channels")
    assert knob == "channels" or not same(changed, plain)


def test_networks_differ_in_what_run_json_says(folder):
    train(folder, "network", [TRAIN, overlay("unet")])
    with pytest.raises(RuntimeError) as error:
        train(folder, "network", [TRAIN, overlay("residual_unet")])
    assert "num_parameters" in innermost(error.value)


def test_weights_are_where_training_starts(folder, reference):
    plain, model = reference("baseline"), str(folder / "reference_baseline" / "model.pt")
    still = train(folder, "weights_still", weights=model, learning_rate=0.0)
    learned = [name for name in plain if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(still[name], plain[name]) for name in learned)
    assert not same(train(folder, "weights_on", weights=model), plain)
    with pytest.raises(RuntimeError) as error:
        train(folder, "weights_none", weights=str(folder / "none.pt"))
    assert "none.pt" in innermost(error.value)


def test_unshuffled_slices_come_in_the_order_of_the_store(folder):
    parser = ConfigParser(ConfigParser.load_config_file(TRAIN))
    parser.update(SMALL | {"store_dir": str(folder / "store"), "shuffle": False})
    loader = parser.get_parsed_content("train::dataloader")
    cases = [[case for batch in loader for case in batch["case"]] for _ in range(2)]
    assert cases[0] == cases[1] == sorted(cases[0])


def test_selection_on_the_test_part_sees_its_slices_with_foreground(folder, reference):
    store = str(folder / "store")
    chosen = selection_items(store, 0, "test", min_foreground_px=200)
    test = slice_items(store, 0, "test")
    assert {item["case"] for item in chosen} == {"case_0", "case_3"}
    assert 0 < len(chosen) < len(test)
    inner = selection_items(store, 0, min_foreground_px=200)
    trained = training_items(store, "baseline", 0, 32, 3)
    assert not {item["case"] for item in inner} & {item["case"] for item in (*test, *trained)}
    assert len(inner) == len({item["slice"] for item in inner})  # all slices of one case
    reference("baseline")
    chosen = {"selection": "test", "allow_selection_on_test": True, "inner_fraction": 0.0}
    train(folder, "selection", **chosen)
    logs = [pd.read_csv(folder / name / "training_log.csv") for name in ("reference_baseline",
                                                                        "selection")]  # fmt: skip
    assert logs[0].val_dice.tolist() != logs[1].val_dice.tolist()
    with pytest.raises(ValueError, match="selection: 'tests' is unknown; did you mean 'test'"):
        selection_items(store, 0, "tests")
    with pytest.raises(ValueError, match="inner_fraction: 0 keeps no case"):
        selection_items(store, 0, inner_fraction=0)


def test_the_first_variants_are_what_a_smaller_synthesis_would_have_made(folder):
    synthetic = folder / "synthetic"
    names = {len(paths): paths for paths in variants_by_slice(synthetic, 2).values()}
    assert list(names) == [2] and [path[-7:-4] for path in names[2]] == ["000", "001"]
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"num_variants: {number}; .* has 1 to 3 a slice"):
            variants_by_slice(synthetic, number)


@pytest.fixture(scope="module")
def evaluated(folder, reference):
    """metrics.csv of the baseline by each rule of evaluation, indexed by its three keys."""

    def measure(name: str, **settings) -> pd.Series:
        output = folder / f"evaluate_{name}"
        output.mkdir()
        model = folder / "reference_baseline" / "model.pt"
        settings = {"model_path": str(model), "output_dir": str(output)} | settings
        run([TRAIN, EVALUATE], store_dir=str(folder / "store"), **settings)
        return pd.read_csv(output / "metrics.csv").set_index(["case", "label", "metric"]).value

    reference("baseline")
    return measure


def test_every_knob_of_evaluation_changes_the_metrics(evaluated):
    plain = evaluated("plain")
    for knob, value, metrics in (
        ("volumes", "foreground", {"dice", "hd95_mm"}),
        ("smooth", 50.0, {"dice", "precision", "recall"}),
        ("distances", "pooled", {"hd95_mm", "assd_mm"}),
    ):
        options = {"min_foreground_px": 300} if knob == "volumes" else {}
        other = evaluated(knob, **{knob: value}, **options)
        changed = set(other[other != plain].index.get_level_values("metric"))
        assert changed and (knob == "volumes" or changed <= metrics), knob
    with pytest.raises(RuntimeError) as error:
        evaluated("none", volumes="foreground", min_foreground_px=9999)
    assert "'foreground' leaves none of 2 cases to score" in innermost(error.value)
    with pytest.raises(RuntimeError) as error:
        evaluated("wrong", volumes="full")
    assert "volumes: 'full' is unknown" in innermost(error.value)


def test_foreground_volumes_by_hand(folder, evaluated):
    """Precision counts the false positives of the slices with foreground alone, stretched."""
    table = evaluated("hand", volumes="foreground", min_foreground_px=300)
    index = pd.read_parquet(folder / "store" / "index.parquet")
    for case in ("case_0", "case_3"):
        rows = index[(index.case == case) & (index.foreground_px >= 300)]
        assert 0 < len(rows) < 5
        kept = [4 - number for number in reversed(rows.slice.tolist())]  # first axis: to inferior
        found = nib.load(folder / "evaluate_hand" / "predictions" / f"{case}.nii.gz").get_fdata()
        truth = nib.load(folder / "store" / "source" / "labelsTr" / f"{case}.nii.gz").get_fdata()
        times = np.bincount([place * len(kept) // 5 for place in range(5)])
        found, truth = (np.repeat(x[kept], times, axis=0) for x in (found, truth // 100))
        for number, label in ((1, "shell"), (2, "core")):
            both = ((found == number) & (truth == number)).sum()
            if (found == number).any() and (truth == number).any():
                dice = 2 * both / ((found == number).sum() + (truth == number).sum())
                assert table[case, label, "dice"] == pytest.approx(dice, abs=1e-6)


def test_an_empty_prediction_is_stated_or_painted(folder, evaluated):
    weights = torch.load(folder / "reference_baseline" / "model.pt", weights_only=True)
    bias = [name for name, value in weights.items() if value.shape == (3,) and "bias" in name][-1]
    weights[bias] = torch.tensor([100.0, 0.0, 0.0])
    torch.save(weights, folder / "nothing.pt")
    tables = {
        rule: evaluated(rule, empty_masks=rule, model_path=str(folder / "nothing.pt"))
        for rule in ("stated", "center_pixel")
    }
    stated, painted = tables["stated"], tables["center_pixel"]
    assert (stated.xs("empty_prediction", level="metric") == 1).all()
    assert (painted.xs("empty_prediction", level="metric") == 1).all()
    assert (stated.xs("dice", level="metric") == 0).all()
    hd95 = [table.xs("hd95_mm", level="metric") for table in (stated, painted)]
    diagonal = np.linalg.norm([5 * 3, 40 * 0.8, 36 * 0.9])
    assert np.allclose(hd95[0], diagonal) and (hd95[1] < 0.8 * diagonal).all()


def test_protocol_paper_runs_as_a_whole(folder, reference):
    protocol = yaml.safe_load((CONFIGS.parents[2] / "workflow/protocols/paper.yaml").read_text())
    knobs = protocol["segmentation"] | {"arm": "diffboost"}
    assert not same(train(folder, "paper", **knobs), reference("diffboost"))
    settings = {"store_dir": str(folder / "store"), "output_dir": str(folder / "paper")}
    run([TRAIN, EVALUATE], **settings, **knobs, **protocol["evaluate"])
    table = pd.read_csv(folder / "paper" / "metrics.csv")
    assert np.isfinite(table.value).all() and set(table.case) == {"case_0", "case_3"}
    overlaps = table[table.metric.isin(["dice", "precision", "recall"])].value
    assert ((overlaps > 0) & (overlaps < 1)).all()  # smooth keeps them off both ends


def test_overlays_say_what_they_are_for():
    for name in NETWORKS:
        text = Path(overlay(name)).read_text()
        assert text.startswith("# Overlay on train.yaml, evaluate.yaml or inference.yaml: ")
        assert set(yaml.safe_load(text)) <= {"network_def", "size_divisor"}

"""Rounds of MONAI's federated client on both trainable bundles, as NVFlare's client drives them."""

import importlib
import json
import logging
from pathlib import Path

import pandas as pd
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.fl.client import MonaiAlgo, MonaiAlgoStats
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from small_store import write_store
from test_generation_bundles import bundle_run, refused, write_study

from diffboost.data.documents import read_json
from diffboost.data.slices import read_store, slice_items
from diffboost.federated import (
    build_client,
    build_network,
    describe_network,
    play_round,
    read_site,
    record_round,
    save_global_weights,
)
from diffboost.handlers import save_weights
from diffboost.package import json_twin

BUNDLES = Path(__file__).parents[1] / "bundles"
SEGMENTATION, FINETUNE = "diffboost_segmentation", "task_finetune"
PRETRAIN = "radimagenet_controlnet_pretrain"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stores, a backbone and the configs of both bundles as a release has them: JSON."""
    folder = write_study(tmp_path_factory.mktemp("federated"))
    write_store(folder / "balls")
    for name in (SEGMENTATION, FINETUNE):
        for config in ("train", "evaluate"):
            target = folder / name / "configs" / f"{config}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json_twin(BUNDLES / name / "configs" / f"{config}.yaml"))
    return folder


def knobs(folder: Path, bundle: str) -> dict:
    """Knobs that make a round last a second."""
    common = {"image_size": 32, "batch_size": 4, "device": "cpu", "epochs": 4}
    if bundle == SEGMENTATION:
        small = {"num_classes": 3, "channels": [4, 8, 8], "learning_rate": 0.01}
        return common | small | {"store_dir": str(folder / "balls")}
    small = {"backbone": str(folder / "backbone"), "num_copies": 2, "train_base": False}
    return common | small | {"store_dir": str(folder / "store")}


def client(folder: Path, bundle: str, name: str, train: dict | None = None, **options):
    """A client of its own output folder, and the weights that its network begins with."""
    settings = knobs(folder, bundle) | {"output_dir": str(folder / name)}
    algo = MonaiAlgo(
        bundle_root=str(folder / bundle),
        train_kwargs=settings | (train or {}),
        eval_kwargs=settings | ({"part": "inner_validation"} if bundle == SEGMENTATION else {}),
        best_model_filepath=str(folder / name / "model.pt"),
        **options,
    )
    algo.initialize({ExtraItems.CLIENT_NAME: name})
    start = {key: value.clone() for key, value in algo.trainer.network.state_dict().items()}
    return algo, start


def play(algo: MonaiAlgo, weights: dict) -> tuple[dict, dict]:
    """Metrics of the global weights, and the difference that a round of training made."""
    sent = ExchangeObject(weights={name: value.clone() for name, value in weights.items()})
    metrics = dict(algo.evaluate(sent).metrics)  # the engine goes on using its own
    algo.train(sent)
    found = algo.get_weights()
    assert found.weight_type == WeightType.WEIGHT_DIFF
    assert found.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] > 0
    return metrics, found.weights


def plus(weights: dict, difference: dict) -> dict:
    return {name: value + difference[name] for name, value in weights.items()}


@pytest.mark.parametrize("bundle", [SEGMENTATION, FINETUNE])
def test_two_rounds_from_global_weights(folder, bundle):
    algo, start = client(folder, bundle, f"{bundle}_rounds")
    metrics, difference = play(algo, start)
    key = "val_dice" if bundle == SEGMENTATION else "val_loss"
    assert list(metrics) == [key] and 0 <= metrics[key] < 10
    assert set(difference) == set(start)
    assert any(value.abs().max() > 0 for value in difference.values())
    changed = plus(start, difference)
    better, _ = play(algo, changed)
    assert better[key] != metrics[key]
    again = algo.evaluate(ExchangeObject(weights=start)).metrics
    assert again[key] == metrics[key]  # from the global weights alone, whatever was trained since
    log = pd.read_csv(folder / f"{bundle}_rounds" / "training_log.csv")
    assert list(log.epoch) == [1, 2]
    best = algo.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
    assert set(best) == set(start)
    algo.finalize()
    assert not list(folder.glob(f"{bundle}_rounds*.partial"))
    assert not (folder / f"{bundle}_rounds" / "evaluation.partial").exists()


@pytest.mark.parametrize(
    ("bundle", "knob"),
    [(SEGMENTATION, "optimizer#lr"), (SEGMENTATION, "learning_rate"), (FINETUNE, "optimizer#lr")],
)
def test_without_a_learning_rate_weights_come_back_as_sent(folder, bundle, knob):
    algo, start = client(folder, bundle, f"{bundle}_{knob}", {knob: 0})
    sent = {n: v + 0.01 if n.endswith("weight") else v for n, v in start.items()}
    _, difference = play(algo, sent)
    moved = {name for name, value in difference.items() if value.any()}
    statistics = {name for name in start if name.endswith(BUFFERS)}
    assert moved == statistics  # of batch norm, which see the client's images; finetune has none
    assert bool(statistics) == (bundle == SEGMENTATION)


def test_weights_that_a_client_starts_from_do_not_replace_the_global_ones(folder):
    model = folder / "start" / "model.pt"
    bundle_run(BUNDLES / SEGMENTATION, ["train"], **knobs(folder, SEGMENTATION),
               output_dir=str(model.parent))  # fmt: skip
    train = {"weights": str(model), "optimizer#lr": 0}
    algo, start = client(folder, SEGMENTATION, "continued", train)
    saved = torch.load(model, weights_only=True)
    assert all(torch.equal(start[name], value) for name, value in saved.items())
    _, difference = play(algo, {name: value * 2 for name, value in start.items()})
    assert not any(v.any() for name, v in difference.items() if not name.endswith(BUFFERS))


def test_only_the_branch_travels_and_the_unet_where_it_is_trained(folder):
    for train_base, parts in ((False, {"controlnet"}), (True, {"controlnet", "unet"})):
        algo, start = client(folder, FINETUNE, f"scope_{train_base}", {"train_base": train_base},
                             config_evaluate_filename=None)  # fmt: skip
        assert {name.split(".")[0] for name in start} == parts
        trained = sum(p.numel() for p in algo.trainer.network.controlnet.parameters())
        count = sum(value.numel() for value in start.values())
        assert (count == trained) == (not train_base)


def test_the_average_of_a_round_begins_with_the_global_weights(folder):
    algo, start = client(folder, FINETUNE, "averaged", {"ema_decay": 0.999, "optimizer#lr": 0})
    play(algo, start)
    sent = {name: value + 1 for name, value in start.items()}
    play(algo, sent)
    saved = torch.load(folder / "averaged" / "model.pt", weights_only=True)
    for name, value in sent.items():
        torch.testing.assert_close(saved[name], value)


@pytest.mark.parametrize("bundle", [SEGMENTATION, FINETUNE])
def test_statistics_of_the_images(folder, bundle):
    overrides = {}
    if bundle == FINETUNE:  # its items are latents
        overrides = {f"{part}#dataset#data": f"@{part}#data" for part in ("train", "validate")}
    workflow = ConfigWorkflow(
        str(folder / bundle / "configs" / "train.json"),
        workflow_type="train",
        logging_file=False,
        **knobs(folder, bundle),
        **overrides,
    )
    algo = MonaiAlgoStats(str(folder / bundle), workflow=workflow)
    algo.initialize({ExtraItems.APP_ROOT: str(folder)})
    ranges = {FlStatistics.HIST_BINS: [20], FlStatistics.HIST_RANGE: [[0, 65535]]}
    stats = algo.get_data_stats(ranges).statistics
    store = folder / ("balls" if bundle == SEGMENTATION else "store")
    for part, section in (("train", "training"), ("eval", "inner_validation")):
        assert stats[part][FlStatistics.DATA_COUNT] == len(slice_items(store, 0, section))
        assert stats[part][FlStatistics.FAIL_COUNT] == 0
    total = stats[FlStatistics.TOTAL_DATA][FlStatistics.DATA_COUNT]
    assert total == sum(stats[part][FlStatistics.DATA_COUNT] for part in ("train", "eval"))


def test_a_round_leaves_an_interrupted_run_alone(folder):
    algo, start = client(folder, SEGMENTATION, "taken", config_evaluate_filename=None)
    checkpoint = folder / "taken.partial" / "checkpoints" / "step_0000000001" / "state.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (folder / "taken.partial" / "run.json").write_text('{"arm": "gamma"}')
    with refused("holds another run"):
        algo.train(ExchangeObject(weights=start))
    assert checkpoint.is_file()


def test_the_loss_of_a_generator_on_held_out_slices(folder, caplog):
    caplog.set_level(logging.INFO)
    settings = knobs(folder, FINETUNE) | {"output_dir": str(folder / "judged"), "epochs": 1}
    bundle_run(BUNDLES / FINETUNE, ["train"], **settings)
    found = []
    for _ in range(2):
        bundle_run(BUNDLES / FINETUNE, ["train", "evaluate"], **settings)
        found.append(read_json(folder / "judged" / "validation.json", "validation"))
    assert found[0] == found[1]  # the same draws
    assert found[0]["num_slices"] == len(slice_items(folder / "store", 0, "inner_validation"))
    assert 0 < found[0]["val_loss"] < 3
    with refused("inner_fraction: 0 keeps no case for inner validation"):
        bundle_run(BUNDLES / FINETUNE, ["train", "evaluate"], **settings, inner_fraction=0)


def site(folder: Path, bundle: str, name: str) -> dict:
    """A site's own knobs, from the configs that people read."""
    store = folder / ("balls" if bundle == SEGMENTATION else "store")
    root = BUNDLES / bundle
    return {"bundle_root": root, "store_dir": str(store), "output_dir": str(folder / name)}


def shared(folder: Path, bundle: str) -> dict:
    """Knobs of all sites."""
    return {
        key: value
        for key, value in knobs(folder, bundle).items()
        if key not in ("store_dir", "epochs")
    }


@pytest.mark.parametrize("bundle", [SEGMENTATION, FINETUNE])
def test_a_site_plays_what_the_server_sends(folder, bundle):
    common = shared(folder, bundle)
    described = describe_network(BUNDLES / bundle, common)
    module, _, name = described.class_path.rpartition(".")
    server = getattr(importlib.import_module(module), name)(**described.args)
    network = build_network(BUNDLES / bundle, common)
    assert set(server.state_dict()) == set(network.state_dict())
    assert json.loads(json.dumps(described.args)) == described.args
    own = site(folder, bundle, f"{bundle}_site")
    algo = build_client(own, common, 2, 1, "site-1")
    played = play_round(algo, network.state_dict())
    assert set(played.difference) == set(server.state_dict()) and played.num_steps > 0
    assert list(played.metrics) == [described.key_metric]
    assert described.key_metric_mode == ("max" if bundle == SEGMENTATION else "min")
    path = record_round(own["output_dir"], 0, played.metrics)
    assert record_round(own["output_dir"], 1, played.metrics) == path
    assert list(pd.read_csv(path)["round"]) == [0, 1]
    lineage = read_json(Path(own["output_dir"]) / "lineage.json", "lineage")
    assert lineage["cases"]
    averaged = {n: v + played.difference[n].float() / 2 for n, v in network.state_dict().items()}
    torch.save({"model": averaged}, folder / "global.pt")
    saved = save_global_weights(
        folder / "global.pt", BUNDLES / bundle, common, folder / f"{bundle}.pt"
    )
    network.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    with pytest.raises(ValueError, match="does not fit the bundle"):
        torch.save({"model": {"other": torch.zeros(1)}}, folder / "global.pt")
        save_global_weights(folder / "global.pt", BUNDLES / bundle, common, saved)


def test_a_site_whose_weights_saw_its_test_cases_is_refused(folder):
    model = folder / "leaking" / "model.pt"
    network = build_network(BUNDLES / SEGMENTATION, shared(folder, SEGMENTATION))
    save_weights(network, model)
    tested = slice_items(folder / "balls", 0, "test")[0]["case"]
    hashes = read_store(folder / "balls").source_sha256()
    lineage = {"cases": {tested: hashes[tested]}, "ancestors": []}
    (model.parent / "lineage.json").write_text(json.dumps(lineage))
    own = site(folder, SEGMENTATION, "refused") | {"weights": str(model)}
    with refused(f"leak: .*{tested}"):
        build_client(own, shared(folder, SEGMENTATION), 2, 1, "site-1")


def test_a_sites_file_says_its_paths(tmp_path):
    path = tmp_path / "site-1.yaml"
    path.write_text("bundle_root: a\nstore_dir: b\n")
    with pytest.raises(ValueError, match="lacks output_dir; needed: bundle_root, store_dir"):
        read_site(path)
    path.write_text("bundle_root: a\nstore_dir: /b\noutput_dir: c\ndevice: cpu\n")
    found = read_site(path)
    assert found["bundle_root"] == str(tmp_path / "a") and found["store_dir"] == "/b"
    assert found["device"] == "cpu"


@pytest.mark.parametrize(
    ("bundle", "configs", "kind"),
    [
        (SEGMENTATION, ["train"], "train"),
        (SEGMENTATION, ["train", "evaluate"], "train"),
        (FINETUNE, ["train"], "train"),
        (FINETUNE, ["train", "evaluate"], "train"),
        (PRETRAIN, ["train"], "train"),
        (PRETRAIN, ["evaluate"], "infer"),
    ],
)
def test_clients_find_every_property(folder, bundle, configs, kind):
    root = BUNDLES / bundle
    workflow = ConfigWorkflow(
        [str(root / "configs" / f"{name}.yaml") for name in configs],
        meta_file=str(root / "configs" / "metadata.json"),
        workflow_type=kind,
        logging_file=False,
        bundle_root=str(root),
        output_dir=str(folder / "properties"),
        **(knobs(folder, SEGMENTATION if bundle == SEGMENTATION else FINETUNE)),
    )
    workflow.initialize()
    assert workflow.check_properties() == []

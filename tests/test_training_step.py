"""The training step: caches that round nothing, its optimizer, its average, and its peer."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import small_backbone
import small_store
import torch
import yaml
from ignite.engine import Engine, Events
from torch import nn

from diffboost.data.slices import slice_items
from diffboost.data.transforms import LoadSliced
from diffboost.generation.backbones import load_part
from diffboost.generation.cache import build_cache
from diffboost.generation.networks import ControlledUNet, GrayscaleAutoencoder
from diffboost.generation.optimization import build_optimizer
from diffboost.generation.saving import AveragedWeightsSaver
from diffboost.prepare import prepare

ROOT = Path(__file__).parents[1]
TRAIN = [
    ROOT / "bundles" / bundle / "configs" / "train.yaml"
    for bundle in ("radimagenet_controlnet_pretrain", "task_finetune")
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return small_backbone.write_backbone(tmp_path_factory.mktemp("step") / "small", 0.03)


def test_float32_latents_are_those_of_the_encoder(backbone, tmp_path):
    store = small_store.write_store(tmp_path / "store", num_cases=1)
    data = slice_items(store, fold=2, part="all")
    cached = {
        precision: build_cache(
            data, backbone, str(tmp_path / "cache"), 32, latent_precision=precision
        )
        for precision in ("float16", "float32")
    }
    assert cached["float16"].folder != cached["float32"].folder
    images = [LoadSliced("image", 32)({"image": item["image"]})["image"] for item in data]
    with torch.no_grad():
        moments = GrayscaleAutoencoder(load_part(backbone, "vae")).encode(torch.stack(images))
    for index, expected in enumerate(moments.numpy()):
        exact, rounded = (cached[name][index]["moments"][0] for name in ("float32", "float16"))
        assert (exact.dtype, rounded.dtype) == (np.float32, np.float16)
        np.testing.assert_allclose(exact, expected, atol=1e-6)
        np.testing.assert_array_equal(exact.astype(np.float16), rounded)
    with pytest.raises(ValueError, match="latent_precision: 'float23' .*did you mean 'float32'"):
        build_cache(data, backbone, str(tmp_path), 32, latent_precision="float23")


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.parts[-3])
def test_the_latents_precision_stands_in_a_runs_settings(path):
    config = yaml.safe_load(path.read_text())
    assert config["latent_precision"] == "float16"
    assert config["train"]["settings"]["latent_precision"] == "@latent_precision"
    assert config["train"]["items"]["latent_precision"] == "@latent_precision"


def test_the_fused_optimizer_steps_as_torchs_plain_one():
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(3)]
    trained = []
    for build in (
        lambda network: build_optimizer(network, "adamw", 1e-2),
        lambda network: torch.optim.AdamW(network.parameters(), lr=1e-2, foreach=False),
    ):
        network = nn.ParameterList([nn.Parameter(value.clone()) for value in start])
        optimizer = build(network)
        for step in range(1, 6):
            for parameter in network:
                parameter.grad = torch.cos(step * parameter.detach())
            optimizer.step()
        trained.append([parameter.detach() for parameter in network])
        fused = optimizer.defaults["fused"]
        assert fused is (True if len(trained) == 1 else None)
    for ours, theirs, before in zip(*trained, start, strict=True):
        assert (theirs - before).abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_without_decay_there_is_no_average_and_the_last_weights_are_saved(backbone, tmp_path):
    network = ControlledUNet(backbone)
    saver = AveragedWeightsSaver(network, str(tmp_path), {"cases": {}}, decay=0.0)
    engine = Engine(lambda engine, batch: None)
    saver.attach(engine)
    assert not engine.has_event_handler(saver._update, Events.ITERATION_COMPLETED)
    assert "average" not in getattr(engine.state, "announced", {})
    with torch.no_grad():
        next(network.controlnet.parameters()).add_(1)
    engine.run([0], max_epochs=1)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, value in network.state_dict().items():
        assert torch.equal(saved[name], value)


def test_losses_are_those_of_train_controlnet(backbone, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("training_step")
    phantoms = {"num_images": 4, "image_size_px": 32}
    prepare("phantoms", tmp_path / "store", "radimagenet", 32, "gradient", num_folds=1,
            validation_fraction=0.0, phantoms=phantoms)  # fmt: skip
    run = benchmark.fight(backbone, 32, 2, 6, tmp_path)  # three epochs
    losses = torch.tensor([run["losses"][side] for side in ("ours", "peer")], dtype=torch.float64)
    assert losses.shape == (2, 6) and losses[0].unique().numel() == 6
    assert (losses[0] - losses[1]).abs().max() < 1e-6
    assert all(len(seconds) == 6 for seconds in run["seconds"].values())

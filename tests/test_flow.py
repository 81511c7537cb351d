"""Rectified flow: its target and its steps in closed form, and a generator that learns it."""

import json

import pytest
import torch
from test_generation_bundles import finetune, refused, synthesize, write_study

from diffboost.generation.networks import ControlledUNet
from diffboost.generation.objective import ControlPrepareBatch
from diffboost.generation.sampling import VariantInferer
from diffboost.generation.saving import export_backbone
from diffboost.generation.schedulers import (
    SCHEDULERS,
    SCHEDULERS_OF,
    load_scheduler,
    refuse_other_scheduler,
)

SHAPE = (2, 4, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("flow"), num_training=2, num_slices=3)


@pytest.fixture(scope="module")
def backbone(folder):
    return str(folder / "backbone")


@pytest.fixture(scope="module")
def generator(folder):
    return finetune(folder, "generator", objective="flow", epochs=1, inner_fraction=0)


class Oracle(ControlledUNet):
    """Knows the noise and the clean latent, and keeps when it was asked."""

    def __init__(self, backbone, noise, clean):
        super().__init__(backbone)
        self.velocity, self.asked = noise - clean, []

    def forward(self, image, timesteps, context, edge, control_scale=1.0):
        self.asked.append(float(timesteps[0]))
        return self.velocity


@pytest.mark.parametrize(("timestep", "time"), [(0, 0.001), (499, 0.5), (999, 1.0)])
def test_the_target_is_the_way_from_latent_to_noise(backbone, timestep, time):
    batch = {"latent": torch.randn(SHAPE), "noise": torch.randn(SHAPE)}
    batch |= {"timestep": torch.full((2,), timestep), "context": torch.zeros(2, 12, 16)}
    batch |= {"edge": torch.zeros(2, 1, 32, 32)}
    noisy, target, _, conditions = ControlPrepareBatch(backbone, "flow")(batch, "cpu")
    expected = (1 - time) * batch["latent"] + time * batch["noise"]
    torch.testing.assert_close(noisy, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(target, batch["noise"] - batch["latent"])
    assert conditions["timesteps"].tolist() == [round(1000 * time)] * 2


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_an_oracle_is_sampled_exactly_in_any_number_of_equal_steps(backbone, num_steps):
    noise, clean = torch.randn(SHAPE), torch.randn(SHAPE)
    oracle = Oracle(backbone, noise, clean)
    scheduler = load_scheduler(backbone, "flow")
    scheduler.set_timesteps(num_steps)
    latent = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        latent = scheduler.step(oracle.velocity, timestep, latent, return_dict=False)[0]
    torch.testing.assert_close(latent, clean, atol=1e-5, rtol=1e-5)
    images = VariantInferer(backbone, "flow", num_steps)
    with torch.no_grad():
        found = images(noise, oracle, torch.zeros(2, 12, 16), torch.zeros(2, 1, 32, 32))
        expected = images.decoder.decode_scaled(clean)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    expected = [1000 * (1 - step / num_steps) for step in range(num_steps)]
    assert oracle.asked == pytest.approx(expected)


def test_a_flow_generator_says_so_and_is_sampled_by_flow_alone(folder, generator):
    assert json.loads((generator / "lineage.json").read_text())["prediction"] == "flow"
    assert json.loads((generator / "run.json").read_text())["objective"] == "flow"
    noise = finetune(folder, "noise", epochs=1, inner_fraction=0)
    assert (noise / "model.pt").read_bytes() != (generator / "model.pt").read_bytes()
    knobs = {"scheduler": "flow", "ratio": 1, "inner_fraction": 0}
    store = synthesize(folder, generator, "synthetic", **knobs)
    assert len(list((store / "images").iterdir())) == 2 * 3
    with refused("'unipc_karras' does not fit .* which predicts flow; allowed: flow"):
        synthesize(folder, generator, "wrong", inner_fraction=0)
    with refused("'flow' does not fit .* which predicts noise; allowed: ddim"):
        synthesize(folder, noise, "wrong", **knobs)


def test_an_unknown_objective_says_what_is_allowed(folder, backbone):
    with pytest.raises(ValueError, match="objective: 'flwo'; did you mean 'flow'"):
        ControlPrepareBatch(backbone, "flwo")


def test_flow_starts_from_weights_of_noise_but_not_the_other_way(folder, generator):
    with refused("weights: .*generator/model.pt predict flow; training that learns noise can"):
        finetune(folder, "back", weights=str(generator / "model.pt"), epochs=1)


def test_a_backbone_predicts_noise(folder, backbone, generator, tmp_path):
    with pytest.raises(ValueError, match="predicts flow; a backbone's own weights predict noise"):
        export_backbone(str(generator), backbone, str(tmp_path / "exported"))
    with pytest.raises(ValueError, match="'flow' does not fit the generator in the backbone"):
        refuse_other_scheduler("flow", {}, None)


def test_every_scheduler_belongs_to_one_prediction():
    assert sorted(name for names in SCHEDULERS_OF.values() for name in names) == sorted(SCHEDULERS)

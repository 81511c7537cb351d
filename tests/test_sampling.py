"""The sampler: no needless pass, nothing constant computed twice, and the plain loop's images."""

import pytest
import small_backbone
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffboost.cost import units
from diffboost.cost.configs import parse
from diffboost.generation.constant_conditions import constant_conditions, different_rows
from diffboost.generation.networks import ControlledUNet, GrayscaleAutoencoder, load_part
from diffboost.generation.sampling import (
    VariantInferer,
    steps_inside,
    variant_step_seed,
)
from diffboost.generation.schedulers import load_scheduler
from diffboost.stages import stage_configs

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A small untrained backbone whose branch acts."""
    return small_backbone.write_backbone(tmp_path_factory.mktemp("backbone") / "small", 0.3)


@pytest.fixture(scope="module")
def network(backbone):
    return ControlledUNet(backbone).requires_grad_(False).eval()


def batch(size: int = 4) -> dict[str, torch.Tensor]:
    """Noise and conditions; two variants share both."""
    draw = torch.Generator().manual_seed(7)
    context = torch.randn(size, 12, 16, generator=draw)
    edge = torch.rand(size, 1, 32, 32, generator=draw)
    context[1], edge[1] = context[0], edge[0]
    negative = torch.randn(1, 12, 16, generator=draw).expand(size, -1, -1)
    noise = torch.randn(size, *SHAPE, generator=draw)
    return {"inputs": noise, "context": context, "edge": edge, "negative_context": negative}


def plain_loop(backbone, network, conditions, scheduler, number, scale, guided, control):
    """Every half, branch and projection anew in each step; ``guided`` and ``control`` a step."""
    steps = load_scheduler(backbone, scheduler)
    steps.set_timesteps(number)
    latent = conditions["inputs"] * steps.init_noise_sigma
    for place, timestep in enumerate(steps.timesteps):
        scaled = steps.scale_model_input(latent, timestep)
        edge = conditions["edge"] if control[place] else None
        times = timestep.expand(len(scaled))
        noise = network(scaled, times, conditions["context"], edge)
        if guided[place]:
            other = network(scaled, times, conditions["negative_context"], edge)
            noise = other + scale * (noise - other)
        latent = steps.step(noise, timestep, latent).prev_sample
    return GrayscaleAutoencoder(load_part(backbone, "vae")).decode_scaled(latent)


def counted(run) -> int:
    """FLOPs of what really runs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "unipc", "unipc_karras", "euler"])
@pytest.mark.parametrize(
    ("scale", "guidance", "control"),
    [(1.0, (0, 1), (0, 1)), (5.0, (0, 1), (0, 1)), (5.0, (0.25, 0.75), (0, 0.5))],
)
def test_images_are_those_of_the_plain_loop(backbone, network, scheduler, scale, guidance, control):
    conditions = batch()
    guided = [scale > 1 and inside for inside in steps_inside(guidance, 4)]
    expected = plain_loop(
        backbone, network, conditions, scheduler, 4, scale, guided, steps_inside(control, 4)
    )
    inferer = VariantInferer(backbone, scheduler, 4, scale, guidance, control_interval=control)
    torch.testing.assert_close(inferer(network=network, **conditions), expected, atol=1e-5, rtol=0)


def test_karras_spaces_noise_levels_by_the_seventh_root(backbone):
    """Karras et al. 2022, equation 5, over the levels that the generator was trained on."""
    scheduler = load_scheduler(backbone, "unipc_karras")
    trained = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    roots = torch.linspace(trained[-1] ** (1 / 7), trained[0] ** (1 / 7), 5)
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas[:-1], roots**7, rtol=1e-4, atol=0)
    assert scheduler.sigmas[-1] == 0 and scheduler.timesteps[0] == 999
    assert VariantInferer(backbone).scheduler == "unipc_karras"


def test_no_flop_of_hint_and_text_is_spent_twice(backbone, network):
    conditions = batch()
    context, edge = conditions["context"], conditions["edge"]
    hint_net = network.controlnet.controlnet_cond_embedding
    projections = [
        getattr(module.attn2, name)
        for part in (network.base, network.controlnet)
        for module in part.modules()
        if hasattr(module, "attn2")
        for name in ("to_k", "to_v")
    ]
    hint = counted(lambda: hint_net(edge[:1].expand(-1, 3, -1, -1)))
    text = counted(lambda: [projection(context[:1]) for projection in projections])
    times = torch.zeros(4, dtype=torch.long)
    step = counted(lambda: network(conditions["inputs"], times, context, edge))
    decoder = VariantInferer(backbone).decoder
    decoding = counted(lambda: decoder.decode_scaled(conditions["inputs"]))
    varied = step - 4 * (hint + text)
    assert hint > 0 and text > 0 and varied > 0
    for scale, passes, contexts in ((1.0, 5, 3), (9.0, 10, 4)):
        inferer = VariantInferer(backbone, "ddim", 5, scale)
        found = counted(lambda inferer=inferer: inferer(network=network, **conditions))
        # 4 variants with 3 prompts, and one negative prompt
        assert found == passes * varied + 4 * hint + contexts * text + decoding


def test_halves_and_branch_are_not_run_outside_their_intervals(backbone, network, monkeypatch):
    seen = []
    forward = ControlledUNet.forward

    def noted(self, image, timesteps, context, edge, control_scale):
        seen.append((len(image), edge is not None))
        return forward(self, image, timesteps, context, edge, control_scale)

    monkeypatch.setattr(ControlledUNet, "forward", noted)
    VariantInferer(backbone, "ddim", 5, 3.0, (0.2, 0.6), control_interval=(0.4, 1.0))(
        network=network, **batch()
    )
    assert seen == [(4, False), (8, False), (8, True), (4, True), (4, True)]
    seen.clear()
    VariantInferer(backbone, "ddim", 2, 3.0, control_scale=0.0)(network=network, **batch())
    assert seen == [(8, False), (8, False)]


@pytest.mark.parametrize("name", ["guidance_interval", "control_interval"])
@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.5), (0.5,), (0.8, 0.2)])
def test_intervals_that_are_none_are_named(backbone, name, interval):
    with pytest.raises(ValueError, match=f"{name}: .* is not .start, end"):
        VariantInferer(backbone, **{name: interval})


def test_what_else_is_in_a_batch_changes_no_bit(backbone, network):
    conditions = batch()
    inferer = VariantInferer(backbone, "unipc", 3, 3.0)
    whole = inferer(network=network, **conditions)
    others = {name: tensor.clone() for name, tensor in conditions.items()}
    for tensor in others.values():
        tensor[1:] = tensor[:1]  # one edge and one prompt instead of three
    assert torch.equal(inferer(network=network, **others)[0], whole[0])


def test_modules_are_as_they_were_after_a_call_and_after_an_error(backbone, network):
    before = network(batch()["inputs"], None, batch()["context"], batch()["edge"])
    VariantInferer(backbone, num_inference_steps=1)(network=network, **batch())
    with pytest.raises(RuntimeError), constant_conditions(network, torch.zeros(2, 12, 16),
                                                          torch.zeros(2, 1, 32, 32)):  # fmt: skip
        raise RuntimeError
    assert not any("forward" in vars(m) for m in (*network.modules(), *network.base.modules()))
    assert torch.equal(
        network(batch()["inputs"], None, batch()["context"], batch()["edge"]), before
    )


def test_rows_that_differ_are_found():
    rows, places = different_rows(torch.tensor([[[2.0]], [[1.0]], [[2.0]]]))
    assert len(rows) == 2 and torch.equal(rows[places], torch.tensor([[[2.0]], [[1.0]], [[2.0]]]))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"guidance_scale": 5.0, "guidance_interval": [0.5, 1.0], "control_interval": [0.0, 0.5]},
    ],
)
def test_cost_is_what_a_run_counts(backbone, network, knobs):
    conditions = batch(3)
    conditions["context"][1] = conditions["edge"][1] = 1.0  # all differ
    conditions["negative_context"] = torch.randn(3, 12, 16)
    knobs = {"num_inference_steps": 4, "backbone": backbone, "decoder": "own"} | knobs
    settings = {"image_size": 32, "batch_size": 3} | knobs
    unit = units.sampling(parse([stage_configs()["synthesis"]], settings))
    run = counted(lambda: VariantInferer(**knobs)(network=network, **conditions))
    assert 3 * unit.flops == pytest.approx(run, rel=1e-3)


def test_default_preset_costs_less_than_3_tflop_at_the_papers_size():
    synthesis = stage_configs()["synthesis"]
    files = [synthesis, str(synthesis).replace("inference.yaml", "sd15.yaml")]
    assert units.sampling(parse(files, {"batch_size": 1})).flops < 3.0e12  # released code: 24.3


def test_variants_know_the_seed_of_their_steps():
    first = variant_step_seed(0, "a", 1, 2)
    for other in [(1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 2), (0, "a", 1, 3)]:
        assert variant_step_seed(*other) != first
    shared = variant_step_seed(0, "a", 1, 2, "variant")
    assert shared == variant_step_seed(0, "b", 5, 2, "variant") != first


def test_a_scheduler_that_draws_gives_each_variant_its_own(backbone, network):
    conditions, seeds = batch(), torch.tensor([5, 6, 7, 8])
    inferer = VariantInferer(backbone, "lcm", 3)
    whole = inferer(network=network, **conditions, step_seeds=seeds)
    assert torch.equal(inferer(network=network, **conditions, step_seeds=seeds), whole)
    turned = {name: tensor.flip(0) for name, tensor in conditions.items()}
    again = inferer(network=network, **turned, step_seeds=seeds.flip(0)).flip(0)
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)
    assert (inferer(network=network, **conditions, step_seeds=seeds + 9) - whole).abs().max() > 0.01

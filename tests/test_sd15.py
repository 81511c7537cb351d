"""The true Stable Diffusion 1.5 on the meta device, and training at its scale on a small one."""

from pathlib import Path

import pytest
import small_backbone
import torch
import yaml
from ignite.engine import Events
from monai.data import DataLoader
from small_store import write_store
from torch import nn
from torch.utils.data import default_collate

from diffboost.data.slices import slice_items
from diffboost.generation.backbones import PARTS, backbone_sha256, load_config
from diffboost.generation.cache import Jitterd
from diffboost.generation.networks import ControlledUNet
from diffboost.generation.objective import ControlPrepareBatch, DrawDiffusionTargetsd
from diffboost.generation.optimization import (
    AccumulatingTrainer,
    build_optimizer,
    build_schedule,
    check_scale,
    trained_parameters,
)
from diffboost.generation.streaming import training_items
from diffboost.precision import AutocastInferer
from diffboost.processes import ShareOfLoss

BUNDLES = Path(__file__).parents[1] / "bundles"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return small_backbone.write_backbone(
        tmp_path_factory.mktemp("sd15") / "backbone", zero_convolution_std=0.03
    )


def count(parameters) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in parameters) / 1e6


def test_the_true_configurations_have_the_published_sizes():
    with torch.device("meta"):
        network = ControlledUNet("sd15")
        autoencoder = PARTS["vae"].from_config(load_config("sd15", "vae"))
        text_encoder = PARTS["text_encoder"](
            PARTS["text_encoder"].config_class(**load_config("sd15", "text_encoder"))
        )
        branch = PARTS["controlnet"].from_config(load_config("sd15", "controlnet"))
    assert round(count(network.base.parameters()), 2) == 859.52
    assert round(count(network.controlnet.parameters()), 2) == 361.28
    assert round(count(branch.parameters()), 2) == 361.28
    assert round(count(autoencoder.parameters()), 2) == 83.65
    assert round(count(text_encoder.parameters()), 2) == 123.06
    assert round(count(trained_parameters(network)), 2) == 361.28
    assert all(parameter.requires_grad for parameter in network.controlnet.parameters())
    assert not any(parameter.requires_grad for parameter in network.base.parameters())
    assert set(name.split(".")[0] for name in network.state_dict()) == {"controlnet"}
    schedule = load_config("sd15", "scheduler")
    assert (schedule["beta_start"], schedule["beta_end"]) == (0.00085, 0.012)
    assert load_config("sd15", "vae")["scaling_factor"] == 0.18215


def test_a_hub_id_and_its_short_name_are_one_backbone():
    full = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert backbone_sha256("sd15") == backbone_sha256(full) != backbone_sha256("some/other")


@pytest.mark.parametrize(
    "bundle", ["radimagenet_controlnet_pretrain", "task_finetune", "diffboost_synthesis"]
)
def test_overlays_change_knobs_that_exist_and_say_where_each_number_is_from(bundle):
    folder = BUNDLES / bundle / "configs"
    path = folder / "sd15.yaml"
    base = folder / ("inference.yaml" if bundle == "diffboost_synthesis" else "train.yaml")
    knobs = set(yaml.safe_load(base.read_text()))
    lines = path.read_text().splitlines()
    assert len(lines) <= 30
    assert {key.lstrip("+") for key in yaml.safe_load(path.read_text())} <= knobs
    assert all("#" in line for line in lines if not line.startswith("+"))


def samples(network: ControlledUNet, num: int) -> list[dict]:
    """Training samples as `DrawDiffusionTargetsd` gives them."""
    generator = torch.Generator().manual_seed(0)
    width = network.base.config.cross_attention_dim
    return [
        {
            "latent": torch.randn(4, 8, 8, generator=generator),
            "noise": torch.randn(4, 8, 8, generator=generator),
            "timestep": 100 * number,
            "context": torch.randn(12, width, generator=generator),
            "edge": torch.rand(1, 32, 32, generator=generator),
        }
        for number in range(num)
    ]


def train(backbone: str, loss=None, accumulation: int = 1, precision: str = "float32", **options):
    """An epoch of 10 samples in steps of 4, 4 and 2 by SGD; (losses, weights)."""
    network = ControlledUNet(backbone, train_base=True, precision=precision, **options)
    losses = []
    trainer = AccumulatingTrainer(
        accumulation=accumulation,
        device="cpu",
        max_epochs=1,
        train_data_loader=DataLoader(samples(network, 10), batch_size=4),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=loss or nn.MSELoss(),
        prepare_batch=ControlPrepareBatch(backbone),
        inferer=AutocastInferer(precision=precision),
        decollate=False,
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item())
    )
    trainer.run()
    return losses, torch.cat([value.flatten() for value in network.state_dict().values()])


@pytest.fixture(scope="module")
def reference(backbone):
    return train(backbone)


@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_accumulated_parts_make_the_step_of_the_whole_batch(backbone, reference, accumulation):
    start = ControlledUNet(backbone, train_base=True).state_dict().values()
    moved = (torch.cat([value.flatten() for value in start]) - reference[1]).abs().max()
    for loss in (nn.MSELoss(), ShareOfLoss(nn.MSELoss())):
        losses, weights = train(backbone, loss, accumulation)
        assert losses == pytest.approx(reference[0], abs=1e-6)
        assert (weights - reference[1]).abs().max() < 1e-4 * moved


@pytest.mark.parametrize("option", ["gradient_checkpointing", "channels_last"])
def test_memory_and_layout_change_nothing_but_rounding(backbone, reference, option):
    losses, weights = train(backbone, **{option: True})
    assert losses == pytest.approx(reference[0], abs=1e-5)
    assert (weights - reference[1]).abs().max() < 1e-5


def kept_activations(backbone: str, gradient_checkpointing: bool) -> int:
    """Numbers that a forward pass keeps for the backward pass."""
    network = ControlledUNet(backbone, gradient_checkpointing=gradient_checkpointing)
    batch = default_collate(samples(network, 2))
    noisy, _, _, conditions = ControlPrepareBatch(backbone)(batch, "cpu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        network(noisy, **conditions)
    return sum(kept)


def test_checkpointing_keeps_fewer_activations_and_channels_last_lays_out(backbone):
    plain, checkpointed = (kept_activations(backbone, choice) for choice in (False, True))
    assert checkpointed < 0.6 * plain
    laid = ControlledUNet(backbone, channels_last=True)
    for convolution in (laid.base.conv_in, laid.controlnet.conv_in):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_trains_float32_weights_above_a_bfloat16_base(backbone, reference):
    losses, weights = train(backbone, precision="bfloat16")
    assert losses == pytest.approx(reference[0], rel=0.02) and losses != reference[0]
    assert weights.dtype == torch.float32
    network = ControlledUNet(backbone, precision="bfloat16")
    assert {p.dtype for p in network.base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    frozen = ControlledUNet(backbone)
    noisy, _, _, conditions = ControlPrepareBatch(backbone)(
        default_collate(samples(network, 2)), "cpu"
    )
    with torch.inference_mode():
        exact = frozen(noisy, **conditions)
        rounded = AutocastInferer(precision="bfloat16")(noisy, network, **conditions)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_schedules_and_optimizers(backbone):
    network = ControlledUNet(backbone)
    rates = {}
    for schedule in ("one_cycle", "constant"):
        optimizer = build_optimizer(network, "adamw", 1e-3)
        assert isinstance(optimizer, torch.optim.AdamW)
        scheduler = build_schedule(optimizer, schedule, 1e-3, 100)
        rates[schedule] = []
        for _ in range(100):
            rates[schedule].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert set(rates["constant"]) == {1e-3}
    assert max(rates["one_cycle"]) == pytest.approx(1e-3) and rates["one_cycle"].index(
        max(rates["one_cycle"])
    ) in (4, 5)
    assert rates["one_cycle"][-1] < 1e-8


@pytest.mark.parametrize("num_steps", [1, 2, 3, 19, 20, 21, 40])
def test_the_shortest_runs_warm_up_too(num_steps):
    """20 steps divided by zero, and fewer began at the peak."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    scheduler = build_schedule(optimizer, "one_cycle", 1e-3, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-3 / 25) and max(rates[:2]) > 0
    assert num_steps == 1 or max(rates) == rates[1] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "wish, message",
    [
        (
            {"precision": "float16"},
            "precision: float16 needs a CUDA device.*cpu can float32 and bf",
        ),
        ({"precision": "bflot16"}, "precision: 'bflot16' .*did you mean 'bfloat16'"),
        ({"optimizer_name": "adam8bit"}, "optimizer_name: .*did you mean 'adamw8bit'"),
        ({"optimizer_name": "adamw8bit"}, "adamw8bit needs (bitsandbytes|a CUDA device)"),
        ({"schedule": "constnt"}, "schedule: 'constnt' .*did you mean 'constant'"),
        ({"accumulation": 0}, "accumulation: 0 is no whole number"),
        ({"accumulation": 1.5}, "accumulation: 1.5 is no whole number"),
    ],
)
def test_wishes_the_device_cannot_meet_are_refused(wish, message):
    with pytest.raises(ValueError, match=message):
        check_scale("cpu", **wish)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no_such_compiler",))
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        with pytest.raises(ValueError, match="compile: torch.compile does not work for cpu"):
            check_scale("cpu", compile=True)


def test_streamed_slices_give_the_loss_of_cached_ones(backbone, tmp_path):
    store = write_store(tmp_path / "store", num_cases=2)
    data = slice_items(store, fold=2, part="all")
    loss = {}
    for cached in (True, False):
        items = training_items(cached, data, backbone, str(tmp_path / "cache"), image_size=32)
        draw = DrawDiffusionTargetsd(backbone, empty_prompt=0.5, image_size=32)
        batch = []
        for index in range(4):
            draw.set_random_state(seed=index)
            batch.append(draw(items[index]))
        assert ("image" in batch[0]) == (not cached)
        network = ControlledUNet(backbone)
        noisy, target, _, conditions = ControlPrepareBatch(backbone)(default_collate(batch), "cpu")
        assert not noisy.requires_grad
        with torch.inference_mode():
            loss[cached] = nn.functional.mse_loss(network(noisy, **conditions), target).item()
    assert loss[True] == pytest.approx(loss[False], abs=1e-3)
    assert (tmp_path / "cache").is_dir()


def test_streamed_slices_are_jittered_anew(backbone, tmp_path):
    data = slice_items(write_store(tmp_path / "store", num_cases=1), fold=2, part="all")
    items = training_items(False, data, backbone, str(tmp_path / "cache"), image_size=32)
    draw = DrawDiffusionTargetsd(backbone, 0.0, 32, Jitterd(20, (0.75, 1.05)))
    drawn = []
    for seed in (0, 1, 0):
        draw.set_random_state(seed=seed)
        drawn.append(draw(items[2]))
    assert (drawn[0]["image"] - drawn[1]["image"]).abs().max() > 0.1
    for key in ("image", "edge", "noise", "posterior_noise"):
        assert type(drawn[0][key]) is torch.Tensor  # what torch.compile takes
        assert torch.equal(drawn[0][key], drawn[2][key]), key
    still = DrawDiffusionTargetsd(backbone, 0.0, 32)
    still.set_random_state(seed=0)
    assert torch.equal(still(items[2])["noise"], drawn[0]["noise"])
    assert not (tmp_path / "cache").exists()

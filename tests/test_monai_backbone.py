"""Networks of MONAI and checkpoints of monai-generative as a backbone, by the real package."""

import copy
import json
import logging
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser, run
from monai.networks.nets import DiffusionModelUNet
from monai_team import SCALE, SCHEDULE, Team, drawn
from torchrun import bundle_settings

from diffboost.audit.provenance import audit_provenance
from diffboost.cost import units
from diffboost.generation.backbones import load_config, load_part
from diffboost.generation.constant_conditions import constant_conditions
from diffboost.generation.creation import write_backbone
from diffboost.generation.decoding import load_decoder
from diffboost.generation.monai_checkpoints import fill_monai, read_checkpoint
from diffboost.generation.monai_networks import MonaiUNet
from diffboost.generation.networks import ControlledUNet, GrayscaleAutoencoder
from diffboost.generation.saving import AveragedWeightsSaver
from diffboost.generation.text import embed_prompts
from diffboost.prepare import prepare

KINDS = ["unconditioned", "conditioned"]


@pytest.fixture(scope="module")
def teams(tmp_path_factory):
    """The files of two teams, and their backbones."""
    found = {}
    for kind in KINDS:
        found[kind] = Team(tmp_path_factory.mktemp(kind), conditioned=kind == "conditioned")
        found[kind].backbone = found[kind].bring()
    return found


@pytest.fixture(params=KINDS)
def team(teams, request):
    return teams[request.param]


@pytest.fixture
def files(teams, tmp_path):
    """A team's files alone, to be changed."""
    team = copy.copy(teams["unconditioned"])
    team.folder = tmp_path
    for path in filter(Path.is_file, teams["unconditioned"].folder.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return team


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Latent, timesteps, context and edge of a batch."""
    torch.manual_seed(1)
    latent, context = torch.randn(batch, 3, 8, 8), torch.randn(batch, 12, 16)
    return latent, torch.tensor([3, 700, 40, 999])[:batch], context, torch.rand(batch, 1, 32, 32)


# numbers: what monai-generative's own networks compute


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_a_checkpoint_predicts_what_its_network_predicts(team, scale):
    latent, timesteps, context, edge = inputs()
    texts = context if team.text_from else None
    down, middle = team.controlnet(latent, timesteps, edge, scale, texts)
    expected = team.unet(latent, timesteps, texts, None, down, middle)
    network = ControlledUNet(team.backbone).eval()
    found = network(latent, timesteps, context, edge, scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (network(latent, timesteps, context) - expected).abs().max() > 1e-3  # branch acts
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(
        network(latent, timesteps, context), team.unet(latent, timesteps, texts), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_an_autoencoder_encodes_and_decodes_as_its_network(team):
    torch.manual_seed(1)
    image, latent = torch.rand(2, 1, 32, 32), torch.randn(2, 3, 8, 8)
    network = GrayscaleAutoencoder(load_part(team.backbone, "vae"))
    mean, deviation = team.autoencoder.encode(image)
    found = network.encode(2 * image - 1).chunk(2, dim=1)
    torch.testing.assert_close(found[0], mean, atol=1e-5, rtol=0)
    torch.testing.assert_close((found[1] / 2).exp(), deviation, atol=1e-5, rtol=0)
    expected = 2 * team.autoencoder.decode(latent / SCALE) - 1
    torch.testing.assert_close(network.decode(latent / SCALE), expected, atol=1e-5, rtol=0)
    assert torch.equal(network.decode_scaled(latent), network.decode(latent / SCALE).clamp(-1, 1))


def test_the_noise_schedule_is_the_same(team):
    scheduler = load_part(team.backbone, "scheduler")
    torch.testing.assert_close(scheduler.alphas_cumprod, team.scheduler.alphas_cumprod)
    latent, timesteps, _, _ = inputs()
    noise = torch.randn_like(latent)
    for name in ("add_noise", "get_velocity"):
        found, expected = (
            getattr(s, name)(latent, noise, timesteps) for s in (scheduler, team.scheduler)
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_monais_own_files_load_as_they_are(files):
    names = {"num_channels": "channels"}
    files.arguments = {
        part: {names.get(name, name): value for name, value in arguments.items()}
        for part, arguments in files.arguments.items()
    }
    files.arguments["diffusion_unet"] |= {"include_fc": True, "use_combined_linear": True}
    network = drawn(DiffusionModelUNet(**files.arguments["diffusion_unet"]))
    torch.save({"model": network.state_dict()}, files.folder / "diffusion_unet.pt")
    files.write_definitions("monai.networks.nets")
    backbone = files.bring("own")
    latent, timesteps, context, _ = inputs()
    assert load_config(backbone, "unet")["include_fc"] is True
    expected = network(latent, timesteps)
    assert torch.equal(load_part(backbone, "unet")(latent, timesteps, context)[0], expected)


@torch.no_grad()
def test_a_backbone_without_a_controlnet_starts_a_branch_from_its_unet(team):
    backbone = team.bring("no_branch", controlnet=None)
    network, (latent, timesteps, context, edge) = ControlledUNet(backbone), inputs()
    torch.testing.assert_close(
        network(latent, timesteps, context, edge), network(latent, timesteps, context)
    )
    branch, unet = network.controlnet.network, network.base.network
    for name in ("conv_in", "time_embed", "down_blocks", "middle_block"):
        pairs = zip(
            getattr(branch, name).parameters(), getattr(unet, name).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs), name
    widths = load_config(backbone, "controlnet")["conditioning_embedding_num_channels"]
    assert widths == [16, 32, 96]  # two halvings, as the autoencoder's


@torch.no_grad()
def test_a_controlnet_file_can_be_what_training_starts_from(team):
    backbone = team.bring("bare", controlnet=None)
    path = Path(backbone, "unet", "config.json")
    with pytest.raises(ValueError, match="weights: .*diffusion_unet.pt does not fit"):
        ControlledUNet(backbone, weights=str(team.folder / "diffusion_unet.pt"))
    config = json.loads(path.read_text())
    assert config["_class_name"] == "monai.networks.nets.DiffusionModelUNet"
    branch = ControlledUNet(team.backbone)
    reference = copy.deepcopy(branch.controlnet.state_dict())
    drawn(branch.controlnet)
    torch.save(branch.state_dict(), team.folder / "model.pt")
    for file, same in (("controlnet.pt", True), ("model.pt", False)):
        found = ControlledUNet(team.backbone, weights=str(team.folder / file)).controlnet
        pairs = [torch.equal(v, reference[name]) for name, v in found.state_dict().items()]
        assert all(pairs) == same


@torch.no_grad()
def test_constant_conditions_change_nothing(team):
    network, (latent, timesteps, context, edge) = ControlledUNet(team.backbone).eval(), inputs()
    expected = network(latent, timesteps, context, edge)
    calls = []
    encoder = network.controlnet.controlnet_cond_embedding
    encoder.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with constant_conditions(network, context, edge):
        for _ in range(2):
            found = network(latent, timesteps, context, edge)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert len(calls) == 1
    projections = [*network.base.text_projections(), *network.controlnet.text_projections()]
    assert len(projections) == (2 * (4 + 2) if team.text_from else 0)


def test_prompts_reach_a_conditioned_unet_alone_and_the_log_says_so_once(teams, caplog):
    texts = ["CT, abdomen, normal", "MR, brain, cyst"]
    found = embed_prompts(teams["conditioned"].backbone, texts)
    assert found.shape == (2, 12, 16) and not torch.equal(*found) and not caplog.text
    backbone = teams["unconditioned"].bring("logged")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(embed_prompts(backbone, texts), torch.zeros(2, 1, 1))
    assert caplog.text.count("prompts and guidance change nothing") == 1
    latent, timesteps, context, edge = inputs()
    network = ControlledUNet(backbone)
    assert torch.equal(
        network(latent, timesteps, context, edge), network(latent, timesteps, None, edge)
    )


def test_a_written_backbone_is_the_same_again(team, tmp_path):
    parts = {name: load_part(team.backbone, name) for name in ("unet", "vae")}
    again = write_backbone(str(tmp_path / "again"), parts, team.backbone)
    for path in Path(team.backbone).rglob("*.*"):
        other = again / path.relative_to(team.backbone)
        assert other.read_bytes() == path.read_bytes(), path
    write_backbone(str(tmp_path / "half"), parts, team.backbone, half=True)
    assert (
        load_part(str(tmp_path / "half"), "unet").network.conv_in.conv.weight.dtype == torch.float32
    )


def test_cost_counts_monais_networks(teams):
    parser = {
        "backbone": teams["conditioned"].backbone, "image_size": 32, "batch_size": 2,
        "scheduler": "unipc", "num_inference_steps": 1, "guidance_scale": 1.0, "decoder": "own",
        "precision": "float32",
    }  # fmt: skip
    unit = units.sampling(ConfigParser(parser))
    network = ControlledUNet(parser["backbone"])
    parts = [network, network.base, load_part(parser["backbone"], "vae")]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    assert unit.weight_bytes == pytest.approx(4 * parameters, rel=0.01)
    convolution = 2 * 9 * 8 * 8 * 32 * 32  # one of the decoder at full size
    assert 6 * convolution < unit.flops < 1e8
    assert units.embedding(teams["unconditioned"].backbone).flops == 0
    assert units.context_shape(teams["unconditioned"].backbone) == (1, 1)


# through the bundles


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    phantoms = {"num_training": 4, "num_test": 1, "size_px": 32, "num_slices": 4}
    knobs = {"num_folds": 2, "phantoms": phantoms, "group_duplicates": False}
    return prepare("phantoms", folder / "store", "phantom_organ", 32, "gradient", **knobs)


def finetune(team: Team, store: Path, name: str, **knobs) -> Path:
    """A generator after two epochs."""
    settings = {"store_dir": str(store), "backbone": team.backbone, "image_size": 32, "epochs": 2}
    settings |= {"output_dir": str(team.folder / name), "batch_size": 4, "num_copies": 2}
    settings |= {"device": "cpu", "checkpoint_interval": 2, "seed": 1}
    run(**bundle_settings("task_finetune", ["train"], settings | knobs))
    return team.folder / name


def kill_in_training(*arguments) -> None:
    """A training that is killed after its fourth step."""
    update, steps = AveragedWeightsSaver._update, []

    def kill(self, engine):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, engine)

    AveragedWeightsSaver._update = kill
    finetune(*arguments)


def synthesize(team: Team, store: Path, generator: Path, name: str, **knobs) -> Path:
    """Two variants of each slice."""
    settings = {"store_dir": str(store), "backbone": team.backbone, "generator_dir": str(generator)}
    settings |= {"output_dir": str(team.folder / name), "image_size": 32, "ratio": 2}
    settings |= {"num_inference_steps": 2, "batch_size": 5, "device": "cpu", "num_measured": 2}
    run(**bundle_settings("diffboost_synthesis", ["inference"], settings | knobs))
    return team.folder / name


def test_a_generator_trains_is_killed_and_goes_on_and_its_variants_are_verified(teams, store):
    torch.set_num_threads(1)
    team = teams["conditioned"]
    whole = finetune(team, store, "whole")
    log = pd.read_csv(whole / "training_log.csv")
    assert len(log) == 2 and log.train_loss.iloc[1] < log.train_loss.iloc[0]
    process = multiprocessing.get_context("fork").Process(
        target=kill_in_training, args=(team, store, "killed")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (team.folder / "killed").exists()
    killed = finetune(team, store, "killed")
    for name in ("model.pt", "lineage.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    names = {n.split(".")[0] for n in torch.load(whole / "model.pt", weights_only=True)}
    assert names == {"controlnet", "unet"}
    synthetic = synthesize(team, store, whole, "synthetic", guidance_scale=2.0)
    assert len(list((synthetic / "images").iterdir())) == 24
    audits = audit_provenance(synthetic, store, whole, team.backbone, again=True)
    assert not [failure for each in audits for failure in each.failures]
    assert len(audits) == 24
    assert all(each.verified[-1] == "made again, the same bytes" for each in audits)


def test_an_unconditioned_branch_trains_without_a_cache_and_makes_variants(teams, store):
    team = teams["unconditioned"]
    generator = finetune(team, store, "branch", train_base=False, cache_latents=False, epochs=1)
    state = torch.load(generator / "model.pt", weights_only=True)
    assert {name.split(".")[0] for name in state} == {"controlnet"}
    before = ControlledUNet(team.backbone).state_dict()
    assert set(before) == set(state) and any(not torch.equal(before[k], state[k]) for k in state)
    manifest = pd.read_parquet(
        synthesize(team, store, generator, "synthetic", ratio=1) / "manifest.parquet"
    )
    assert len(manifest) == 12 and manifest.kept.all()


def test_an_autoencoder_and_a_generator_are_pretrained_on_it(teams, store):
    team = teams["conditioned"]
    settings = {"store_dir": str(store), "backbone": team.backbone, "image_size": 32}
    settings |= {"batch_size": 4, "epochs": 1, "device": "cpu"}
    paths = {name: str(team.folder / name) for name in ("autoencoder", "pretrained")}
    bundle = "radimagenet_controlnet_pretrain"
    knobs = {"output_dir": paths["autoencoder"], "latent_channels": 3}
    run(**bundle_settings(bundle, ["train_autoencoder"], settings | knobs))
    backbone = f"{paths['autoencoder']}/backbone"
    assert load_config(backbone, "vae")["scaling_factor"] != SCALE
    with pytest.raises(ValueError, match="decoder: 'tiny_decoder' enlarges latents of 4 channels"):
        load_decoder("tiny_decoder", backbone)
    knobs = {"output_dir": paths["pretrained"], "backbone": backbone}
    run(**bundle_settings(bundle, ["train"], settings | knobs))
    state = torch.load(f"{paths['pretrained']}/model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


def test_a_config_imports(files):
    names = ("autoencoder", "diffusion_unet", "controlnet")
    settings = {name: str(files.folder / f"{name}.pt") for name in names}
    settings |= {"checkpoints_dir": str(files.folder), "output_dir": str(files.folder / "made")}
    settings["scale_factor"] = SCALE
    bundle = "radimagenet_controlnet_pretrain"
    run(**bundle_settings(bundle, ["import_monai_backbone"], settings))
    assert {path.name for path in (files.folder / "made").iterdir()} == {
        "vae", "unet", "controlnet", "scheduler",
    }  # fmt: skip
    assert load_config(str(files.folder / "made"), "vae")["scaling_factor"] == SCALE
    assert load_config(str(files.folder / "made"), "scheduler")["beta_end"] == SCHEDULE["beta_end"]


# what has no counterpart


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"autoencoder_def__spatial_dims": 3}, "spatial_dims: 3; only 2 is allowed"),
        ({"diffusion_unet_def__num_class_embeds": 4}, "num_class_embeds: 4; only null"),
        ({"autoencoder_def__in_channels": 2}, "in_channels: 2; 1 or 3 is allowed"),
        ({"autoencoder_def__num_channels": [8, 8, 1 << 30]}, "at most 1048576"),
        (
            {"autoencoder_def__latent_channels": "$__import__('os').abort()"},
            "plain value is needed",
        ),
        ({"autoencoder_def__latent_channels": "@nowhere"}, "'@nowhere'; a plain value"),
        ({"autoencoder_def__latent_chanels": 3}, "did you mean 'latent_channels'"),
        ({"autoencoder_def___target_": "generative.networks.nets.VQVAE"}, "VQVAE'; for the vae"),
        ({"autoencoder_def__norm_num_groups": 3}, "MONAI refuses its arguments: .*norm_num_groups"),
        ({"autoencoder_def__norm_num_groups": "x"}, "AutoencoderKL: MONAI refuses its arguments"),
        ({"diffusion_unet_def__num_channels": [8, 8]}, "diffusion_unet: .* does not fit"),
        ({"noise_scheduler__schedule": "cosine"}, "schedule: 'cosine' has no counterpart"),
        ({"noise_scheduler__prediction_type": "sample"}, "'sample' has no counterpart"),
    ],
)
def test_definitions_without_a_counterpart_are_refused(files, changed, message):
    files.write_definitions(**changed)
    with pytest.raises(ValueError, match=message):
        files.bring("refused")
    assert not (files.folder / "refused").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale_factor": None}, "scale_factor: not given"),
        ({"scale_factor": 0}, "scale_factor: 0.0 is not above 0"),
        ({"image_range": [1, 0]}, "image_range: .* is not .lowest, highest."),
        ({"text_from": "tiny"}, "text_from: 'tiny'; the UNet is not conditioned"),
        ({"controlnet_def": "control_def"}, "'control_def' is no definition .* 'controlnet_def'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(files, changed, message):
    with pytest.raises(ValueError, match=message):
        files.bring("refused", **changed)


def test_texts_of_another_width_are_refused(teams):
    for text_from, message in ((None, "not given; .* width 16"), ("tiny", "are 64 wide, .* is 16")):
        with pytest.raises(ValueError, match=f"text_from: {message}|{message}"):
            teams["conditioned"].bring("refused", text_from=text_from)


def test_a_hint_of_another_size_is_refused(files):
    files.arguments = {**files.arguments}
    files.arguments["controlnet"] = files.arguments["controlnet"] | {
        "conditioning_embedding_num_channels": [4, 8]
    }
    files.write_definitions()
    state = read_checkpoint(files.folder / "controlnet.pt", "controlnet")
    state = {k: v.clone() for k, v in state.items() if not re.search(r"embedding.blocks.[23]", k)}
    torch.save(state, files.folder / "controlnet.pt")
    with pytest.raises(ValueError, match="levels of conditioning_.*: 2; 3 is needed"):
        files.bring("refused")


@pytest.mark.parametrize(
    ("part", "name"),
    [("vae", "autoencoder"), ("unet", "diffusion_unet"), ("controlnet", "controlnet")],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(team, part, name):
    state = read_checkpoint(team.folder / f"{name}.pt", name)
    network = load_part(team.backbone, part).network
    fill_monai(network, state, name)
    needed = [k for k in state if "proj_attn" not in k]
    assert len(needed) > 40
    for gone in needed[::5]:
        with pytest.raises(ValueError, match=f"{name} does not fit"):
            fill_monai(network, {k: v for k, v in state.items() if k != gone}, name)
    with pytest.raises(ValueError, match="extra.weight. too many"):
        fill_monai(network, state | {"extra.weight": torch.zeros(1)}, name)


def test_a_pickled_network_is_not_run(files):
    torch.save(files.unet, files.folder / "diffusion_unet.pt")
    with pytest.raises(ValueError, match="holds more than tensors and plain containers"):
        files.bring("refused")


def test_nan_is_no_weight(files):
    state = read_checkpoint(files.folder / "diffusion_unet.pt", "weights")
    state["conv_in.conv.bias"] = state["conv_in.conv.bias"] * torch.nan
    network = load_part(files.bring(), "unet").network
    with pytest.raises(ValueError, match="1 tensors .conv_in.conv.bias. missing or no numbers"):
        fill_monai(network, state, "here")


def test_a_folder_of_another_class_and_gradient_checkpointing_are_refused(files):
    backbone = files.bring()
    with pytest.raises(ValueError, match="gradient_checkpointing: true; MONAI's"):
        ControlledUNet(backbone, gradient_checkpointing=True)
    assert isinstance(load_part(backbone, "unet"), MonaiUNet)
    path = Path(backbone, "unet", "config.json")
    for old, new, message in (
        ("nets.DiffusionModelUNet", "nets.VQVAE", "allowed is monai.networks.nets.Diffusion"),
        ('"num_res_blocks": 1', '"num_res_blocks": 5000', "num_res_blocks: 5000; at most 1024"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            load_part(backbone, "unet")
        path.write_text(text)
    Path(backbone, "unet", "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="the part 'unet' of"):
        load_part(backbone, "unet")

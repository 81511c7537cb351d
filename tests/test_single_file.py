"""Stable Diffusion 1.5 at reduced width, from a diffusers folder and from single files."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import original_layout
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
from safetensors.torch import save_file
from small_store import write_store

from diffboost.generation.backbones import SD15_DIR, backbone_sha256, load_config, load_part
from diffboost.generation.creation import write_backbone, write_part
from diffboost.generation.networks import ControlledUNet
from diffboost.generation.schedulers import load_scheduler
from diffboost.generation.text import embed_prompts

BUNDLES = Path(__file__).parents[1] / "bundles"


@pytest.fixture(scope="module")
def parts():
    return original_layout.reduced_parts()


@pytest.fixture(scope="module")
def state(parts):
    return original_layout.original_state(parts)


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """`whole/` and `bare/` (no branch) in diffusers' layout, `single/` in the original one."""
    folder = tmp_path_factory.mktemp("sd15")
    original_layout.write_folder(folder / "whole", parts, branch=True)
    original_layout.write_folder(folder / "bare", parts, branch=False)
    original_layout.write_configs(folder / "single", parts)
    return folder


@pytest.fixture(scope="module")
def files(folder, state):
    """The same weights as ControlLDM, latent diffusion and ControlNet files."""
    single = folder / "single"
    plain = {name: v for name, v in state.items() if not name.startswith("control_model.")}
    branch = {name: v for name, v in state.items() if name.startswith("control_model.")}
    bare = {name.removeprefix("control_model."): v for name, v in branch.items()}
    save_file(state, single / "control_ldm.safetensors")
    extras = {"betas": torch.ones(1000), "model_ema.decay": torch.ones(())}
    extras["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(20)
    torch.save({"state_dict": plain | extras, "global_step": 7}, single / "ldm.ckpt")
    torch.save(branch, single / "branch.pth")
    save_file(bare, single / "bare_branch.safetensors")
    return {path.stem: str(path) for path in single.iterdir() if path.is_file()}


def inputs(parts) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "image": torch.randn(2, 4, 8, 8),
        "timesteps": torch.tensor([500, 500]),
        "context": torch.randn(2, 20, 32),
        "edge": torch.rand(2, 1, 64, 64),
    }


@torch.inference_mode()
def predict(parts, *args, **kwargs) -> torch.Tensor:
    return ControlledUNet(*args, **kwargs)(**inputs(parts))


@torch.inference_mode()
def pipeline_prediction(parts) -> torch.Tensor:
    """The noise that diffusers' own pipeline predicts in its first step."""
    scheduler = DDIMScheduler.from_config(parts["scheduler"].config)
    pipeline = StableDiffusionControlNetPipeline(
        **{name: part for name, part in parts.items() if name != "scheduler"},
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    found = []
    hook = parts["unet"].register_forward_hook(lambda module, args, output: found.append(output[0]))
    given = inputs(parts)
    pipeline(
        prompt_embeds=given["context"],
        image=given["edge"].expand(-1, 3, -1, -1),
        latents=given["image"],
        timesteps=None,
        num_inference_steps=2,  # at 501 and 1 of 1000
        guidance_scale=1.0,
        output_type="latent",
    )
    hook.remove()
    return found[0]


def test_every_layout_predicts_the_same_noise_as_diffusers_pipeline(parts, folder, files):
    reference = predict(parts, str(folder / "whole"))
    without = ControlledUNet(str(folder / "whole"))
    with torch.inference_mode():
        assert (without(**inputs(parts), control_scale=0.0) - reference).abs().max() > 0.01
    for name, found in {
        "ControlLDM": predict(parts, files["control_ldm"]),
        "latent diffusion and a branch": predict(parts, files["ldm"], weights=files["branch"]),
        "folder and a bare branch": predict(
            parts, str(folder / "bare"), weights=files["bare_branch"]
        ),
        "ControlLDM as weights": predict(parts, str(folder / "bare"), weights=files["control_ldm"]),
        "diffusers' branch": predict(
            parts,
            str(folder / "bare"),
            weights=str(folder / "whole/controlnet/diffusion_pytorch_model.safetensors"),
        ),
    }.items():
        assert (found - reference).abs().max() < 1e-5, name
    given = inputs(parts)
    given["timesteps"] = torch.tensor([501, 501])
    with torch.inference_mode():
        ours = ControlledUNet(files["control_ldm"])(**given)
    assert (ours - pipeline_prediction(parts)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["control_ldm", "ldm"])
def test_single_file_holds_what_the_folder_holds(parts, folder, files, name):
    with torch.inference_mode():
        images = torch.rand(1, 3, 64, 64) * 2 - 1
        moments = [
            load_part(backbone, "vae").encode(images).latent_dist.parameters
            for backbone in (files[name], str(folder / "whole"))
        ]
    assert (moments[0] - moments[1]).abs().max() < 1e-5
    prompts = ["MR, organ, normal", ""]
    texts = [embed_prompts(b, prompts) for b in (files[name], str(folder / "whole"))]
    assert (texts[0] - texts[1]).abs().max() < 1e-5
    assert (texts[0][0] - texts[0][1]).abs().max() > 0.1
    assert load_part(files[name], "scheduler").config.beta_end == 0.012
    assert (
        len({backbone_sha256(backbone) for backbone in (files[name], str(folder / "whole"))}) == 2
    )


def test_latent_diffusion_file_gets_a_new_branch_from_its_encoder(parts, files):
    network = ControlledUNet(files["ldm"])
    new, unet = network.controlnet.state_dict(), parts["unet"].state_dict()
    for name, value in new.items():
        if name in unet:
            assert torch.equal(value, unet[name]), name
    zero = [name for name in new if name.startswith(("controlnet_down", "controlnet_mid"))]
    assert len(zero) == 26 and not any(new[name].any() for name in zero)
    with torch.inference_mode():
        given = inputs(parts)
        plain = parts["unet"](given["image"], given["timesteps"], given["context"]).sample
        assert (network(**given) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc", "unipc_karras", "euler"])
def test_a_backbone_is_sampled_at_the_same_timesteps_in_every_layout(tmp_path, sampler):
    """As a single file its schedule's defaults passed for its own choices."""
    folder, single = tmp_path / "folder", tmp_path / "single" / "model.safetensors"
    shutil.copytree(SD15_DIR / "scheduler", single.parent / "scheduler")
    shutil.copytree(SD15_DIR / "scheduler", folder / "scheduler")
    config = folder / "scheduler" / "config.json"
    config.rename(folder / "scheduler" / "scheduler_config.json")
    single.touch()
    write_part(load_part(str(folder), "scheduler"), tmp_path / "again" / "scheduler")
    found = []
    for backbone in (str(folder), str(tmp_path / "again"), str(single)):
        scheduler = load_scheduler(backbone, sampler)
        scheduler.set_timesteps(5)
        found.append(scheduler.timesteps.tolist())
    assert found[0] == found[1] == found[2] and len(found[0]) == 5


def test_single_file_becomes_a_folder(files, tmp_path):
    parts = {"vae": load_part(files["control_ldm"], "vae")}
    written = str(write_backbone(str(tmp_path / "folder"), parts, base=files["control_ldm"]))
    for part in ("unet", "controlnet", "text_encoder"):
        first, second = (load_part(b, part).state_dict() for b in (written, files["control_ldm"]))
        assert all(torch.equal(first[name], second[name]) for name in second)
    assert load_config(written, "unet")["block_out_channels"] == original_layout.WIDTHS


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_planted_code_is_refused_and_not_run(tmp_path, zipped):
    trace, path = tmp_path / "trace", tmp_path / "model.ckpt"
    content = {"state_dict": {"model.diffusion_model.x": torch.ones(1)}, "more": Planted(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="which could run code: .*safetensors"):
        load_part(str(path), "unet")
    assert not trace.exists()


def test_lightnings_own_classes_are_read_as_shells(folder, state, parts):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    path = folder / "single" / "lightning.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": state, "callbacks": {callback: {"best": torch.ones(1)}}}, path)
    assert torch.equal(load_part(str(path), "unet").conv_in.weight, parts["unet"].conv_in.weight)


def test_unknown_layouts_list_their_key_groups(tmp_path, folder, state):
    path = tmp_path / "other.safetensors"
    save_file(
        {"encoder.a": torch.ones(1), "encoder.b": torch.ones(1), "head.c": torch.ones(1)}, path
    )
    with pytest.raises(
        ValueError, match=r"backbone: .* encoder\.\* \(2\), head\.\* \(1\); understood are latent"
    ):
        load_part(str(path), "unet")
    with pytest.raises(ValueError, match=r"weights: .* encoder\.\* \(2\).*understood are our own"):
        ControlledUNet(str(folder / "bare"), weights=str(path))
    unet = {n: v for n, v in state.items() if n.startswith("model.diffusion_model.")}
    save_file(unet, path)
    with pytest.raises(ValueError, match="the part 'vae' is looked for"):
        load_part(str(path), "vae")
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="cannot be read"):
        load_part(str(path), "unet")


def test_misfitting_tensors_are_named(folder, state):
    path = folder / "single" / "wrong.safetensors"
    prefix = "model.diffusion_model."
    changed = {name: value for name, value in state.items() if not name.startswith(prefix + "out.")}
    changed[prefix + "surplus.weight"] = torch.ones(2)
    changed[prefix + "input_blocks.0.0.bias"] = torch.ones(5)
    save_file(changed, path)
    with pytest.raises(ValueError) as caught:
        load_part(str(path), "unet")
    message = str(caught.value)
    assert "4 tensors (conv_norm_out.bias, conv_norm_out.weight, conv_out.bias, conv_out" in message
    assert "1 tensors (model.diffusion_model.surplus.weight) too many" in message
    assert "conv_in.bias (5,) instead of (32,)" in message


def test_missing_parts_say_where_they_were_looked_for(tmp_path, state, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    path = tmp_path / "alone.safetensors"
    save_file(state, path)
    with pytest.raises(
        ValueError, match=r"conv_in.weight \(32, 4, 3, 3\) instead of \(320, 4, 3, 3\)"
    ):
        load_part(str(path), "unet")  # no configuration beside it: Stable Diffusion 1.5's
    with pytest.raises(
        FileNotFoundError, match="tokenizer of .*`hf download openai/clip-vit-large"
    ):
        load_part(str(path), "tokenizer")
    with pytest.raises(
        FileNotFoundError, match=r"'unet' of 'sd15' .*HF_HUB_OFFLINE=1.*`hf download"
    ):
        load_part("sd15", "unet")
    with pytest.raises(FileNotFoundError, match="no file that ends in .safetensors"):
        load_part(str(tmp_path / "none.safetensors"), "unet")


def bundle_run(bundle: str, config: str, **knobs) -> None:
    """`python -m monai.bundle run` with the sd15 overlay, on a CPU."""
    files = [str(BUNDLES / bundle / "configs" / f"{name}.yaml") for name in (config, "sd15")]
    knobs |= {"device": "cpu", "image_size": 64, "num_workers": 0}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    command += [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def test_the_bundles_run_with_sd15_overlays_on_a_single_file(files, tmp_path):
    store = write_store(tmp_path / "store", num_cases=3)
    header = json.loads((store / "dataset.json").read_text())
    header["preprocessing"] |= {"edges": "gradient", "hed_size_px": 64}  # for the agreement
    (store / "dataset.json").write_text(json.dumps(header))
    common = {"store_dir": store, "backbone": files["ldm"]}
    short = {"epochs": 1, "batch_size": 2, "accumulation": 2}
    pretrained, finetuned = tmp_path / "pretrained", tmp_path / "finetuned"
    bundle_run("radimagenet_controlnet_pretrain", "train", output_dir=pretrained, **common, **short)
    weights = {"weights": pretrained / "model.pt"}
    bundle_run("task_finetune", "train", output_dir=finetuned, **common, **short, **weights)
    bundle_run(
        "diffboost_synthesis",
        "inference",
        output_dir=tmp_path / "synthetic",
        generator_dir=finetuned,
        ratio=1,
        num_inference_steps=2,
        decoder="own",  # the overlay's is on the hub
        **common,
    )
    for folder, steps in ((pretrained, 2), (finetuned, 2)):
        log = pd.read_csv(folder / "training_log.csv")
        assert 0.5 < log.train_loss[0] < 2
        assert json.loads((folder / "lineage.json").read_text())["steps"] == steps
        run = json.loads((folder / "run.json").read_text())
        assert (run["precision"], run["schedule"], run["accumulation"]) == (
            "bfloat16",
            "constant",
            2,
        )
        state = torch.load(folder / "model.pt", weights_only=True)
        assert {name.split(".")[0] for name in state} == {"controlnet"}
        assert state["controlnet.controlnet_mid_block.weight"].any()  # was a zero convolution
        assert {value.dtype for value in state.values()} == {torch.float32}
    manifest = pd.read_parquet(tmp_path / "synthetic" / "manifest.parquet")
    assert len(manifest) == 5 and manifest.num_inference_steps[0] == 2
    assert not list(tmp_path.glob("*.cache"))

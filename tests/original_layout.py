"""Stable Diffusion 1.5 at reduced width, as diffusers folder and in the original layout."""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from transformers import CLIPTextModel

from diffboost.generation.backbones import load_config
from diffboost.generation.creation import train_tokenizer, write_backbone
from diffboost.generation.single_file import PREFIXES

WIDTHS = [32, 64, 128, 128]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def reduced_parts() -> dict[str, object]:
    """All parts with SD 1.5's own configurations but narrow; random weights, no zero convolution
    is zero."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["MR, organ, normal", "US, breast, lesion"], 400, 20)
    text = load_config("sd15", "text_encoder") | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    narrow = {"block_out_channels": WIDTHS, "cross_attention_dim": 32}
    vae = load_config("sd15", "vae") | {"block_out_channels": [32, 32, 32, 32]}
    branch = ControlNetModel.from_config(load_config("sd15", "controlnet") | narrow)
    for parameter in branch.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(CLIPTextModel.config_class(**text)),
        "vae": AutoencoderKL.from_config(vae),
        "unet": UNet2DConditionModel.from_config(load_config("sd15", "unet") | narrow),
        "controlnet": branch,
        "scheduler": DDPMScheduler.from_config(load_config("sd15", "scheduler")),
    }


def write_folder(folder: Path, parts: dict[str, object], branch: bool) -> str:
    """The parts as a diffusers folder, with or without the branch."""
    chosen = {name: part for name, part in parts.items() if branch or name != "controlnet"}
    return str(write_backbone(str(folder), chosen))


def write_configs(folder: Path, parts: dict[str, object]) -> None:
    """What stands beside a single file of another width than SD 1.5: configurations, tokenizer."""
    for name, part in parts.items():
        if name == "tokenizer":
            part.save_pretrained(folder / name)
        elif name != "scheduler":
            (folder / name).mkdir(parents=True)
            config = part.config.to_dict() if name == "text_encoder" else dict(part.config)
            (folder / name / "config.json").write_text(json.dumps(config))


def original_state(parts: dict[str, object]) -> dict[str, torch.Tensor]:
    """The networks' tensors under the names of the original code, which diffusers reads back."""
    state = {}
    for part, rename in {
        "unet": _unet_name,
        "controlnet": _branch_name,
        "vae": _autoencoder_name,
        "text_encoder": _text_name,
    }.items():
        for name, value in parts[part].state_dict().items() if part in parts else ():
            value = value.clone()
            if part == "vae" and ".attentions." in name and value.ndim == 2:
                value = value[:, :, None, None]  # the original has convolutions there
            state[PREFIXES[part] + rename(name)] = value
    return state


def _replace(name: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        name = name.replace(new, old)
    return name


def _unet_name(name: str, kind: str = "unet") -> str:
    table = DIFFUSERS_TO_LDM_MAPPING[kind]["layers"]
    if name in table:
        return table[name]
    where, block, layer, rest = re.match(
        r"(\w+?)_blocks?\.(?:(\d+)\.)?(.*?\.\d+)(.*)", name
    ).groups()
    kind, index = layer.split(".")
    if kind == "resnets":
        rest = _replace(rest, RESNET)
    if where == "mid":
        number = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{number}{rest}"
    block, index = int(block), int(index)
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}{rest}"
    place = int(kind == "attentions")
    if where == "down":
        return f"input_blocks.{3 * block + index + 1}.{place}{rest}"
    return f"output_blocks.{3 * block + index}.{place}{rest}"


def _branch_name(name: str) -> str:
    if match := re.match(r"controlnet_down_blocks\.(\d+)(.*)", name):
        return f"zero_convs.{match[1]}.0{match[2]}"
    if match := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)(.*)", name):
        return f"input_hint_block.{2 * int(match[1]) + 2}{match[2]}"
    if name.startswith("controlnet_mid_block"):
        return name.replace("controlnet_mid_block", "middle_block_out.0")
    return _unet_name(name, "controlnet")


def _autoencoder_name(name: str) -> str:
    name = re.sub(
        r"up_blocks\.(\d+)", lambda m: f"up.{len(WIDTHS) - 1 - int(m[1])}", name
    )  # counted from the other end
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = _replace(name.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
    table = {"down_blocks.": "down.", ".resnets.": ".block.", "samplers.0.conv": "sample.conv"}
    table |= {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
    return _replace(name, table)


def _text_name(name: str) -> str:
    return "text_model." + name.removeprefix("text_model.")

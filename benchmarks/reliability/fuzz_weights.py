"""Weights for fuzz_inputs.py: valid ones, and the code that reads them; see fuzz_stages.py."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from diffboost.data.weights import load_weights
from diffboost.generation import lineage as lineages
from diffboost.generation import synthesis
from diffboost.generation.backbones import load_part
from diffboost.generation.creation import create_backbone
from diffboost.generation.pix2pix import EdgeTranslator, load_translator
from diffboost.handlers import save_weights


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def make_weights(folder: Path) -> None:
    network = small_network()
    save_weights(network, folder / "model.pt")
    torch.save(network.state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(network.state_dict(), folder / "model.safetensors")


def read_weights(folder: Path, output: Path) -> tuple[dict, list]:
    good = {}
    for name in ("model.pt", "legacy.pth", "model.safetensors"):
        network = small_network()
        load_weights(network, folder / name)
        good[name] = network.state_dict()
    return good, []


def make_translator(folder: Path) -> None:
    torch.manual_seed(0)
    save_weights(EdgeTranslator([4, 8, 8]), folder / "model.pt")
    (folder / "run.json").write_text(
        json.dumps({"channels": [4, 8, 8], "discriminator_channels": 4})
    )


def make_generator(folder: Path) -> None:
    torch.manual_seed(0)
    save_weights(small_network(), folder / "model.pt")
    document = {"store": "fuzz", "fold": 0, "train_base": False, "cases": {"a": "ab" * 32}}
    lineages.write_lineage(folder / "lineage.json", {**document, "ancestors": []})


def read_generator(folder: Path, output: Path) -> tuple[dict, list]:
    facts = synthesis.read_generator(str(folder))
    network = small_network()
    load_weights(network, folder / "model.pt")
    hashes = ("model_sha256", "lineage_sha256")
    return {k: v for k, v in facts.items() if k not in hashes} | network.state_dict(), []


def make_backbone(folder: Path) -> None:
    create_backbone(
        str(folder / "backbone"), image_size=32, autoencoder_channels=[8, 8], autoencoder_layers=1,
        latent_channels=4, unet_channels=[16, 16], unet_layers=1, attention_heads=2,
        hint_channels=[8, 8], zero_convolution_std=0.0, text_width=16, text_layers=1,
        max_tokens=12, vocab_size=600, seed=0,
    )  # fmt: skip


def read_backbone(folder: Path, output: Path) -> tuple[dict, list]:
    good = {}
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        loaded = load_part(str(folder / "backbone"), part)
        if isinstance(loaded, nn.Module):
            good[part] = loaded.state_dict()
        elif part == "scheduler":
            good[part] = dict(loaded.config)
        else:
            good[part] = loaded("MR, head, lesion").input_ids
    return good, []


def read_translator(folder: Path, output: Path) -> tuple[dict, list]:
    return load_translator(str(folder)).state_dict(), []

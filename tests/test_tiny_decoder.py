"""Tiny decoders: distilled by the bundle, refused where they do not fit, known to provenance."""

import hashlib
import shutil

import pandas as pd
import pytest
import small_backbone
import torch
from diffusers import AutoencoderTiny
from monai.bundle import run
from torchrun import bundle_settings

from diffboost.audit.provenance import audit_provenance
from diffboost.cost.configs import parse, value
from diffboost.generation.backbones import backbone_sha256, part_sha256
from diffboost.generation.decoder_training import create_tiny_decoder
from diffboost.generation.decoding import (
    TAESD,
    decoder_lineage,
    decoder_sha256,
    load_decoder,
    resolve_decoder,
    with_decoder_lineage,
)
from diffboost.stages import stage_configs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of 12 slices, a backbone, an untrained generator, and a distilled decoder."""
    folder = small_backbone.write_study(tmp_path_factory.mktemp("decoder"))
    train(folder, "trained")
    return folder


def train(folder, name: str, **knobs) -> None:
    """The bundle's training, two epochs of 32 px."""
    settings = {key: str(folder / key) for key in ("store", "backbone")}
    settings = {"store_dir": settings["store"], "backbone": settings["backbone"]}
    settings |= {"output_dir": str(folder / name), "device": "cpu", "image_size": 32, "epochs": 2}
    settings |= {"channels": 8, "num_blocks": [1, 1, 0], "batch_size": 4} | knobs
    config = bundle_settings("radimagenet_controlnet_pretrain", ["train_tiny_decoder"], settings)
    run(**config)


def test_training_ends_with_a_folder_that_diffusers_reads(folder):
    decoder = folder / "trained" / "decoder"
    network = AutoencoderTiny.from_pretrained(decoder)
    assert network.config.decoder_block_out_channels == [8, 8, 8]
    state = torch.load(folder / "trained" / "model.pt", weights_only=True)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, state[f"autoencoder.{name}"])
    lineage = decoder_lineage(str(decoder))
    assert len(lineage["cases"]) == 4 and lineage["ancestors"] == []  # of fold 0, no test case
    assert lineage["autoencoder_sha256"] == part_sha256(str(folder / "backbone"), "vae")
    log = pd.read_csv(folder / "trained" / "training_log.csv")
    assert list(log.epoch) == [1, 2] and log.train_loss[1] < log.train_loss[0]


def test_all_that_is_trained_has_a_gradient(folder):
    """DDP stopped at the second step, waiting for those of an encoder that is never used."""
    network = create_tiny_decoder(str(folder / "backbone"), 8, [1, 1, 0])
    network(torch.zeros(1, 4, 8, 8)).sum().backward()
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert trained == {
        name for name, weight in network.named_parameters() if weight.grad is not None
    }


def test_training_gives_the_same_bytes_again_with_and_without_memory(folder):
    train(folder, "again", cache=False, num_workers=1)
    first, second = (folder / name / "model.pt" for name in ("trained", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_synthesis_with_it_is_told_and_made_again(folder):
    paths = {"store_dir": "store", "backbone": "backbone", "generator_dir": "generator",
             "decoder": "trained/decoder", "output_dir": "synthetic"}  # fmt: skip
    settings = {key: str(folder / name) for key, name in paths.items()}
    settings |= {"image_size": 32, "ratio": 1, "num_inference_steps": 2, "batch_size": 5}
    settings |= {"device": "cpu", "num_measured": 2, "guidance_interval": [0.0, 0.5]}
    run(**bundle_settings("diffboost_synthesis", ["inference"], settings | {"guidance_scale": 2.0}))
    manifest = pd.read_parquet(folder / "synthetic" / "manifest.parquet")
    assert set(manifest.decoder) == {settings["decoder"]}
    assert set(manifest.guidance_interval) == {"[0.0, 0.5]"}
    assert set(manifest.decoder_sha256) == {decoder_sha256(settings["decoder"], "tiny")}
    places = (folder / "synthetic", folder / "store", folder / "generator")
    backbone = settings["backbone"]
    audits = audit_provenance(*places, backbone, True, settings["decoder"])
    assert all(each.verified[-1] == "made again, the same bytes" for each in audits)
    assert {each.facts["decoder"] for each in audits} == {"decoder"}  # no path of this machine
    failures = audit_provenance(*places, backbone, True)[0].failures
    assert failures == ["not made again: no decoder by the name 'decoder' is here; give its folder"]
    shutil.copytree(settings["decoder"], folder / "other")
    (folder / "other" / "config.json").open("a").write(" ")
    failures = audit_provenance(*places, backbone, True, str(folder / "other"))[0].failures
    assert failures == ["not made again: the decoder here is another"]


def test_what_does_not_fit_is_refused_by_name(folder, tmp_path):
    backbone, decoder = str(folder / "backbone"), str(folder / "trained" / "decoder")
    with pytest.raises(FileNotFoundError, match="decoder: 'nowhere' is no folder; allowed are own"):
        resolve_decoder("nowhere")
    with pytest.raises(FileNotFoundError, match="no AutoencoderTiny .config.json"):
        load_decoder(str(tmp_path), backbone)
    with pytest.raises(ValueError, match="enlarges latents of 4 channels 8 times, those .* 4 time"):
        load_decoder(TAESD, backbone)
    with pytest.raises(ValueError, match=r"num_blocks: \[1, 1\] has 2 levels, the autoenc.* has 3"):
        create_tiny_decoder(backbone, 8, [1, 1])
    other = small_backbone.write_backbone(tmp_path / "backbone", seed=1)
    with pytest.raises(ValueError, match="distilled from another autoencoder"):
        load_decoder(decoder, other)
    shutil.copytree(decoder, tmp_path / "cut")
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="decoder: .*cut': its weights are missing, dam"):
        load_decoder(str(tmp_path / "cut"), backbone)


def test_hashes_and_lineages_name_what_decodes(folder):
    backbone, decoder = str(folder / "backbone"), str(folder / "trained" / "decoder")
    assert decoder_sha256(None, backbone) == backbone_sha256(backbone)
    assert decoder_sha256(TAESD, "sd15") == hashlib.sha256(TAESD.encode()).hexdigest()
    path = str(folder / "generator" / "lineage.json")
    assert with_decoder_lineage(path, None)["ancestors"] == []
    assert with_decoder_lineage(path, decoder)["ancestors"] == [decoder_lineage(decoder)]


def test_paper_sampling_uses_the_backbones_own_decoder_at_every_size():
    synthesis = str(stage_configs()["synthesis"])
    overlays = [synthesis.replace("inference", name) for name in ("sd15", "paper_sampling")]
    assert value(parse([synthesis, overlays[0]], {}), "decoder") == TAESD
    assert value(parse([synthesis, *overlays], {}), "decoder") == "own"

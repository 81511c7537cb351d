"""A tiny decoder for a backbone: made, distilled from the backbone's own, written as a folder."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from monai.engines import PrepareBatch
from monai.transforms import Transform
from torch import nn

from diffboost.data.weights import load_weights
from diffboost.files import flush, flush_folder, sha256_of_files
from diffboost.generation.backbones import load_config, load_part, part_sha256
from diffboost.generation.creation import write_part
from diffboost.generation.decoding import TinyDecoder
from diffboost.generation.lineage import read_lineage, write_lineage
from diffboost.generation.networks import GrayscaleAutoencoder
from diffboost.generation.objective import sharp_error
from diffboost.processes import is_main_process, wait_for_processes

logger = logging.getLogger(__name__)

# AutoencoderTiny writes its block_out_channels and warns of them when it reads them.
NOT_CONFIGURATION = ("_name_or_path", "block_out_channels")


def create_tiny_decoder(
    backbone: str, channels: int, num_blocks: Sequence[int], seed: int = 0
) -> TinyDecoder:
    """An untrained tiny decoder for a backbone's latents, with one gray output channel.

    Args:
        backbone: its autoencoder says the latent's channels and by how much it is enlarged.
        channels: width of all layers.
        num_blocks: residual blocks a level, from the latent's side to the image's.
        seed: draws every weight.

    Raises:
        ValueError: there are not as many levels as the autoencoder has.

    Source: AutoencoderTiny of diffusers (TAESD: 64 channels, blocks 3, 3, 3, 1).
    """
    config = load_config(backbone, "vae")
    levels = len(config["block_out_channels"])
    if len(num_blocks) != levels:
        raise ValueError(
            f"num_blocks: {list(num_blocks)} has {len(num_blocks)} levels, the autoencoder of "
            f"{backbone!r} has {levels}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = AutoencoderTiny(
            out_channels=1,
            latent_channels=config["latent_channels"],
            decoder_block_out_channels=(channels,) * levels,
            num_decoder_blocks=tuple(num_blocks),
            encoder_block_out_channels=(1,) * levels,  # never used, but of the class
            num_encoder_blocks=(0,) * levels,
        )
    autoencoder.encoder.requires_grad_(False)  # DDP would wait for its gradients
    return TinyDecoder(autoencoder)


class DistillationPaird(Transform):
    """An image's latent and what the backbone's own decoder makes of it.

    Args:
        backbone: brings the frozen autoencoder.
        device: where it runs.

    Source: issue 6, "a tiny decoder distilled for the backbone".
    """

    def __init__(self, backbone: str, device: str | torch.device = "cpu") -> None:
        self.autoencoder = GrayscaleAutoencoder(load_part(backbone, "vae")).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, data: dict) -> dict:
        """``latent`` (C, h, w) of unit variance, the posterior's mean, and ``target`` (1, H, W) in
        [-1, 1]; of an item with ``image`` (1, H, W)."""
        image = torch.as_tensor(data["image"])[None].float().to(self.device)
        mean = self.autoencoder.encode(image).chunk(2, dim=1)[0]
        latent = mean * self.autoencoder.autoencoder.config.scaling_factor
        target = self.autoencoder.decode_scaled(latent)
        return {"latent": latent[0].cpu(), "target": target[0].cpu()}


class DecoderPrepareBatch(PrepareBatch):
    """The latent as input, the own decoder's image as target."""

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        """(latent, target, (), {}) on ``device``."""
        latent, target = (
            batchdata[key].to(device, non_blocking=non_blocking) for key in ("latent", "target")
        )
        return latent, target, (), {}


class DecoderLoss(nn.Module):
    """Absolute error of intensities and of their finite differences, as of the autoencoder.

    Args:
        gradient_weight: weight of the differences, which keeps boundaries sharp.

    Source: engineering choice; see :class:`diffboost.generation.objective.AutoencoderLoss`.
    """

    def __init__(self, gradient_weight: float) -> None:
        super().__init__()
        self.gradient_weight = gradient_weight

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of images (B, 1, H, W) against the own decoder's."""
        return sharp_error(prediction, target, self.gradient_weight)


def export_decoder(
    network: TinyDecoder, weights: str, backbone: str, output_dir: str, lineage: dict
) -> Path:
    """Write a trained tiny decoder as a folder that the knob ``decoder`` takes.

    Its lineage names no ancestors: the backbone's own are those of every generator on it.

    Args:
        network: the trained network's architecture.
        weights: its ``model.pt``.
        backbone: the one whose autoencoder it was distilled from.
        output_dir: the decoder's folder; what was written from these weights stays as it is.
        lineage: what the decoder has seen.

    Raises:
        FileExistsError: ``output_dir`` holds another decoder.

    Source: engineering choice.
    """
    target, weights_sha256 = Path(output_dir), sha256_of_files([weights])
    record = target / "lineage.json"
    there = record.is_file() and read_lineage(record).get("weights_sha256") == weights_sha256
    wait_for_processes()  # all have looked
    if is_main_process() and not there:
        if target.exists():
            raise FileExistsError(f"output_dir: {target} exists; remove it or name another folder")
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        network = getattr(network, "module", network)
        load_weights(network, weights)
        write_part(network.autoencoder, partial, NOT_CONFIGURATION)
        made = {"ancestors": [], "weights_sha256": weights_sha256}
        made["autoencoder_sha256"] = part_sha256(backbone, "vae")
        write_lineage(partial / "lineage.json", {**lineage, **made})
        flush_folder(partial)
        partial.rename(target)
        flush(target.parent)
        logger.info("wrote decoder %s", target)
    wait_for_processes()
    return target

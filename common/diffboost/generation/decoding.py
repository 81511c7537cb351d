"""Decoders: from a latent of the diffusion to a gray image, by the backbone's own or a tiny one."""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from huggingface_hub import hf_hub_download
from torch import nn

from diffboost.data.documents import read_json
from diffboost.files import sha256_of_files
from diffboost.generation.backbones import (
    MISFITS,
    TINY_DIR,
    backbone_sha256,
    load_config,
    load_part,
    part_sha256,
)
from diffboost.generation.config_limits import refuse_absurd
from diffboost.generation.latents import downsampling
from diffboost.generation.lineage import read_lineage
from diffboost.generation.networks import GrayscaleAutoencoder

OWN = "own"  # the backbone's; a word, because MONAI takes no null from the command line
SHIPPED = "tiny_decoder"  # for the backbone tiny
SHIPPED_DIR = TINY_DIR.with_name(SHIPPED)
TAESD = "madebyollin/taesd"  # for Stable Diffusion 1.5
TAESD_DIR = TINY_DIR.with_name("taesd")  # configuration alone, no weights


class TinyDecoder(nn.Module):
    """The decoder of an AutoencoderTiny for grayscale images: the mean of its output channels.

    Args:
        autoencoder: its encoder is not used.

    Source: TAESD (madebyollin); the mean as in paper Sec. 3.1.
    """

    def __init__(self, autoencoder: AutoencoderTiny) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Gray images (B, 1, H, W), about [-1, 1], of unit-variance latents (B, C, h, w)."""
        scaled = latent / self.autoencoder.config.scaling_factor
        return self.autoencoder.decode(scaled).sample.mean(dim=1, keepdim=True)

    def decode_scaled(self, latent: torch.Tensor) -> torch.Tensor:
        """Gray images (B, 1, H, W) in [-1, 1] of the diffusion's unit-variance latents."""
        return self(latent).clamp(-1, 1)


def resolve_decoder(decoder: str) -> str:
    """The folder or hub id that a tiny decoder's name stands for.

    Args:
        decoder: ``tiny_decoder``, the one shipped for the backbone ``tiny``; a local folder that
            holds an AutoencoderTiny in the layout of diffusers (config.json and its weights); or a
            hub id of one, such as ``madebyollin/taesd`` for Stable Diffusion 1.5.

    Raises:
        FileNotFoundError: it is none of these.

    Source: engineering choice.
    """
    if decoder == SHIPPED:
        return str(SHIPPED_DIR)
    path = Path(decoder).expanduser()
    if path.is_dir():
        return str(path)
    if decoder.count("/") != 1 or decoder.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"decoder: {decoder!r} is no folder; allowed are own (the backbone's), "
            f"'{SHIPPED}' (for the backbone 'tiny'), a folder with an AutoencoderTiny in the "
            f"layout of diffusers, and a hub id such as '{TAESD}'"
        )
    return decoder


def load_decoder(decoder: str | None, backbone: str) -> GrayscaleAutoencoder | TinyDecoder:
    """What decodes a backbone's latents, in float32, in evaluation mode and without gradients.

    Args:
        decoder: see :func:`resolve_decoder`; own or None: the backbone's own.
        backbone: whose latents are decoded.

    Returns:
        A network with ``decode_scaled``. Under ``torch.device("meta")`` it has no weights.

    Raises:
        ValueError: the decoder is for latents of another shape or of another autoencoder, or its
            weights are missing or damaged.
        FileNotFoundError: it is not in the folder, nor on the hub or in its local cache.

    Source: engineering choice; ``performance_facts.md`` 3.1 (the decoder is 22 to 39 % of a few
        steps).
    """
    if decoder in (None, OWN):
        return GrayscaleAutoencoder(load_part(backbone, "vae"))
    root = resolve_decoder(decoder)
    config = _config(decoder, root)
    _refuse_misfit(config, decoder, backbone)
    if torch.get_default_device().type == "meta":
        return TinyDecoder(AutoencoderTiny.from_config(config)).eval().requires_grad_(False)
    try:
        loaded = AutoencoderTiny.from_pretrained(root, use_safetensors=True)
    except (OSError, *MISFITS) as error:
        raise ValueError(
            f"decoder: {decoder!r}: its weights are missing, damaged or not of its configuration: "
            f"{' '.join(str(error).split())[:500]}"
        ) from error
    network = TinyDecoder(loaded.float()).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # a third less time on a CPU


def _config(decoder: str, root: str) -> dict:
    """The configuration of a tiny decoder; that of TAESD needs no hub."""
    folder = TAESD_DIR if root == TAESD else Path(root)
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir():
            raise _missing(decoder)
        try:
            path = Path(hf_hub_download(root, "config.json"))
        except OSError as error:
            raise _missing(decoder) from error
    config = read_json(path, "decoder")
    refuse_absurd(config, path)
    return dict(AutoencoderTiny.load_config(path.parent)) if folder.is_dir() else config


def _missing(decoder: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"decoder: {decoder!r}: no AutoencoderTiny (config.json, "
        "diffusion_pytorch_model.safetensors) is in that folder, nor on the hub or in its local "
        f"cache; `hf download {TAESD}` on a machine with a network gets that of "
        "Stable Diffusion 1.5"
    )


def _refuse_misfit(config: dict, decoder: str, backbone: str) -> None:
    """Raises ValueError where a decoder is not one for the latents of a backbone."""
    own = load_config(backbone, "vae")
    channels, blocks = config.get("latent_channels", 4), config.get("num_decoder_blocks", [0] * 4)
    factor = config.get("upsampling_scaling_factor", 2) ** (len(blocks) - 1)
    expected = own["latent_channels"], downsampling(backbone)
    if (channels, factor) != expected:
        raise ValueError(
            f"decoder: {decoder!r} enlarges latents of {channels} channels {factor} times, those "
            f"of backbone {backbone!r} have {expected[0]} and need {expected[1]} times; own is "
            "the backbone's decoder"
        )
    made_for = (decoder_lineage(decoder) or {}).get("autoencoder_sha256")
    here = part_sha256(backbone, "vae")
    if made_for and here and made_for != here:
        raise ValueError(
            f"decoder: {decoder!r} was distilled from another autoencoder ({made_for[:12]}) than "
            f"that of backbone {backbone!r} ({here[:12]}); own is the backbone's decoder"
        )


def decoder_lineage(decoder: str | None) -> dict | None:
    """What a tiny decoder was trained on, as ``read_lineage`` gives it; None if nothing says it."""
    if decoder in (None, OWN):
        return None
    path = Path(resolve_decoder(decoder)) / "lineage.json"
    return read_lineage(path) if path.is_file() else None


def with_decoder_lineage(path: str, decoder: str | None) -> dict:
    """A generator's lineage, with that of a tiny decoder among its ancestors.

    Args:
        path: the generator's lineage.json.
        decoder: see :func:`resolve_decoder`; one that says nothing of its training adds nothing.

    Source: engineering choice (issue 5, "a generator that saw a test case").
    """
    lineage, seen = read_lineage(path), decoder_lineage(decoder)
    return {**lineage, "ancestors": [*lineage["ancestors"], *([seen] if seen else [])]}


def decoder_sha256(decoder: str | None, backbone: str) -> str:
    """Hash of what decodes: a tiny decoder's configuration and weights, or the backbone's files.

    Args:
        decoder: see :func:`resolve_decoder`; a hub id hashes its name, as a backbone's does.
        backbone: whose own decoder None stands for.

    Source: engineering choice.
    """
    if decoder in (None, OWN):
        return backbone_sha256(backbone)
    root = Path(resolve_decoder(decoder))
    if not root.is_dir():
        return hashlib.sha256(str(root).encode()).hexdigest()
    return sha256_of_files(
        path for path in sorted(root.iterdir()) if path.suffix in (".json", ".safetensors")
    )

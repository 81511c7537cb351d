"""A backbone of a second for tests: the classes of Stable Diffusion 1.5 at the smallest widths."""

from pathlib import Path

from diffboost.generation.creation import create_backbone

SMALL = {
    "image_size": 32,
    "autoencoder_channels": [8, 8, 8],
    "autoencoder_layers": 1,
    "latent_channels": 4,
    "unet_channels": [16, 16],
    "unet_layers": 1,
    "attention_heads": 2,
    "hint_channels": [8, 8, 8],
    "text_width": 16,
    "text_layers": 1,
    "max_tokens": 12,
    "vocab_size": 600,
    "seed": 0,
}


def write_backbone(folder: Path, zero_convolution_std: float = 0.0, seed: int = 0) -> str:
    """An untrained backbone in `folder`, its zero convolutions zero as ControlNet's by default."""
    settings = SMALL | {"seed": seed}
    return str(create_backbone(str(folder), zero_convolution_std=zero_convolution_std, **settings))

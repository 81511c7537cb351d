"""A backbone of a second for tests: the classes of Stable Diffusion 1.5 at the smallest widths."""

from pathlib import Path

from diffboost.generation.backbones import backbone_sha256
from diffboost.generation.creation import create_backbone
from diffboost.generation.lineage import write_lineage
from diffboost.generation.networks import ControlledUNet
from diffboost.handlers import save_weights
from diffboost.prepare import prepare

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


def write_study(folder: Path, num_slices: int = 4) -> Path:
    """`store` (five phantoms at 32 px, two folds), `backbone`, and an untrained `generator`."""
    phantoms = {"num_training": 4, "num_test": 1, "size_px": 32, "num_slices": num_slices}
    prepare(
        "phantoms", folder / "store", "phantom_organ", 32, "gradient", num_folds=2,
        phantoms=phantoms, group_duplicates=False,
    )  # fmt: skip
    write_backbone(folder / "backbone", zero_convolution_std=0.03)
    save_weights(ControlledUNet(str(folder / "backbone")), folder / "generator" / "model.pt")
    lineage = {"fold": 0, "train_base": False, "cases": {}, "ancestors": []}
    lineage["backbone_sha256"] = backbone_sha256(str(folder / "backbone"))
    write_lineage(folder / "generator" / "lineage.json", lineage)
    return folder

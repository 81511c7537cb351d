"""Pix2Pix, the baseline of Table 1: a conditional GAN from edges to images, of MONAI's parts."""

from pathlib import Path

import torch
from monai.engines import PrepareBatch
from monai.inferers import Inferer
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import UNet
from monai.networks.utils import normal_init
from torch import nn

from diffboost.data.documents import read_json
from diffboost.data.items import SliceItems
from diffboost.data.slices import read_store
from diffboost.data.weights import load_weights
from diffboost.generation.lineage import hash_cases

LARGEST_WIDTH = 1 << 12


class EdgeTranslator(nn.Sequential):
    """Pix2Pix's generator: MONAI's UNet and a hyperbolic tangent; edges in, gray images out.

    Instance normalization is what Pix2Pix's batch normalization does at its batch of one image, and
    keeps images apart from the batch they stand in. There is no dropout: its authors found that the
    generator ignores such noise.

    Args:
        channels: width of each level; every level after the first halves the side.

    Raises:
        ValueError: fewer than two levels.

    Source: Isola et al. 2017, Sec. 3.2.1 (the paper's reference 44).
    """

    def __init__(self, channels: list[int]) -> None:
        unet = UNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=channels,
            strides=[2] * (len(channels) - 1),
            act=("LeakyReLU", {"negative_slope": 0.2}),
            norm="instance",
        )
        super().__init__(unet.apply(normal_init), nn.Tanh())
        self.divisor = 2 ** (len(channels) - 1)

    def forward(self, edge: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, H, W) in [-1, 1] of hints (B, 1, H, W) in [0, 1].

        Raises:
            ValueError: the bottom level would have less than 2 px a side.
        """
        if any(side % self.divisor or side < 2 * self.divisor for side in edge.shape[-2:]):
            raise ValueError(
                f"image_size: {edge.shape[-1]} px; Pix2Pix's {self.divisor.bit_length()} levels "
                f"need a multiple of {self.divisor} px, at least {2 * self.divisor} "
                "(channels has a width a level)"
            )
        return super().forward(edge)


class EdgePrepareBatch(PrepareBatch):
    """The image as input and target; its edge for both networks.

    ``AdversarialTrainer`` shows its input to the discriminator as the real thing, so the input must
    be the image; the edge goes to the two inferers.
    """

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        """(image, image, (), {edge}) on ``device``."""
        image, edge = (
            batchdata[key].to(device, non_blocking=non_blocking) for key in ("image", "edge")
        )
        return image, image, (), {"edge": edge}


class EdgeInferer(Inferer):
    """Runs an :class:`EdgeTranslator` on the edge alone, whatever else is given."""

    def __call__(self, inputs: torch.Tensor, network: nn.Module, edge: torch.Tensor, **conditions):
        """Images (B, 1, H, W) in [-1, 1]; ``inputs`` and other conditions are not looked at."""
        return network(edge)


class PairInferer(Inferer):
    """Shows MONAI's PatchDiscriminator an image together with its edge."""

    def __call__(self, inputs: torch.Tensor, network: nn.Module, edge: torch.Tensor):
        """Logits (B, 1, h, w), a patch each, of images (B, 1, H, W) with ``edge`` (B, 1, H, W)."""
        return network(torch.cat([edge, inputs], dim=1))[-1]


class GeneratorLoss(PatchAdversarialLoss):
    """How far the discriminator is from taking the generator's images for real ones."""

    def __init__(self) -> None:
        super().__init__(criterion="bce")

    def forward(self, fake_logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of ``fake_logits`` (B, 1, h, w) against "real"."""
        return super().forward(fake_logits, target_is_real=True, for_discriminator=False)


class DiscriminatorLoss(PatchAdversarialLoss):
    """How well real and generated images are told apart; halved, which slows this side down.

    Source: Isola et al. 2017, Sec. 3.3.
    """

    def __init__(self) -> None:
        super().__init__(criterion="bce")

    def forward(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """Mean of the cross-entropies of the logits (B, 1, h, w) against "real" and "fake"."""
        real = super().forward(real_logits, target_is_real=True, for_discriminator=True)
        fake = super().forward(fake_logits, target_is_real=False, for_discriminator=True)
        return (real + fake) / 2


class WeightedL1Loss(nn.L1Loss):
    """Mean absolute error times a weight.

    Args:
        weight: against the adversarial loss; Pix2Pix 100.

    Source: Isola et al. 2017, Sec. 3.1.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Weighted error of images (B, 1, H, W)."""
        return self.weight * super().forward(prediction, target)


def trace_translator(store_dir: str, data: SliceItems, seed: int) -> dict:
    """What a Pix2Pix model will have seen: a lineage without backbone, prompts and ancestors.

    Args:
        store_dir: the slice store.
        data: the training slices.
        seed: the run's seed.

    Source: engineering choice (design, "lineage").
    """
    store = read_store(store_dir).header["name"]
    return {"store": store, "seed": seed, **hash_cases(data), "ancestors": []}


def load_translator(pix2pix_dir: str) -> EdgeTranslator:
    """A trained Pix2Pix generator, in evaluation mode and without gradients.

    Args:
        pix2pix_dir: folder with ``model.pt`` and ``run.json``, which says the widths.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: the folder holds another kind of model.

    Source: engineering choice.
    """
    folder = Path(pix2pix_dir)
    for name in ("model.pt", "run.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"pix2pix_dir: {folder} has no {name}; train_pix2pix.yaml of "
                "radimagenet_controlnet_pretrain writes both into its output_dir"
            )
    settings = read_json(folder / "run.json", "pix2pix_dir")
    if "discriminator_channels" not in settings:
        raise ValueError(
            f"pix2pix_dir: {folder} holds a model of another training; "
            "name the output_dir of train_pix2pix.yaml"
        )
    channels = settings.get("channels")
    widths = channels if isinstance(channels, list) else []
    if not all(type(width) is int and 0 < width <= LARGEST_WIDTH for width in widths or [0]):
        raise ValueError(
            f"pix2pix_dir: {folder / 'run.json'}: channels: {channels!r:.80}; a list of widths "
            f"from 1 to {LARGEST_WIDTH} is needed"
        )
    network = EdgeTranslator(channels)
    load_weights(network, folder / "model.pt", "pix2pix_dir")
    return network.requires_grad_(False).eval()

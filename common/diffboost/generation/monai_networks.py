"""MONAI's own generative networks as parts of a backbone: MONAI computes, diffusers' calls ask.

A part of kind ``monai`` is a folder as any other. Its ``config.json`` names the class of
``monai.networks.nets`` and the arguments of that class, the weights beside it have MONAI's names.
:mod:`diffboost.generation.monai_import` makes such folders of a team's files.
"""

import math
from collections.abc import Mapping

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet
from torch import nn

from diffboost.generation.monai_part import MonaiPart

HINT_CHANNELS = (16, 32, 96, 256)  # of a new branch, a level; MONAI's default


class MonaiUNet(MonaiPart):
    """MONAI's DiffusionModelUNet.

    Without ``with_conditioning`` it takes no prompts, and leaves those that it is given.

    Args:
        config: see :class:`MonaiPart`.

    Source: MONAI's DiffusionModelUNet.
    """

    network_class = DiffusionModelUNet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        down_block_additional_residuals: list[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """As diffusers' UNet2DConditionModel, whose output it gives as a tuple alone.

        Args:
            sample: noisy latent (B, C, h, w).
            timestep: (B,).
            encoder_hidden_states: prompt embeddings (B, tokens, width).
            down_block_additional_residuals, mid_block_additional_residual: the branch's features.
            return_dict: only False.

        Returns:
            (prediction (B, C, h, w),).
        """
        context = encoder_hidden_states if self.config.with_conditioning else None
        prediction = self.network(
            sample,
            timestep,
            context,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
        )
        return (prediction,)


class MonaiControlNet(MonaiPart):
    """MONAI's ControlNet.

    Args:
        config: see :class:`MonaiPart`.

    Source: MONAI's ControlNet.
    """

    network_class = ControlNet

    @classmethod
    def complete(cls, config: Mapping) -> dict:
        """See :meth:`MonaiPart.complete`; with diffusers' name for the channels of the hint."""
        whole = super().complete(config)
        channels = whole["conditioning_embedding_in_channels"]
        if channels not in (1, 3):
            raise ValueError(
                f"backbone: {cls.class_name()}: conditioning_embedding_in_channels: {channels!r}; "
                "1 or 3 is allowed: the hint is an edge map"
            )
        return {**whole, "conditioning_channels": channels}

    @classmethod
    def from_unet(cls, unet: MonaiUNet, levels: int) -> "MonaiControlNet":
        """A new branch that starts from the UNet's encoder, with zero convolutions.

        Args:
            unet: the UNet.
            levels: of the edge encoder, which halves the edge map between two of them: as many as
                the autoencoder has.

        Source: ControlNet (Zhang et al. 2023); the edge encoder's widths are MONAI's default.
        """
        config = {name: value for name, value in unet.config.items() if name in cls.names()}
        widths = [*HINT_CHANNELS, *HINT_CHANNELS[-1:] * levels][:levels]
        branch = cls({**config, "conditioning_embedding_num_channels": widths})
        state = branch.network.state_dict()
        shared = {name: v for name, v in unet.network.state_dict().items() if name in state}
        branch.network.load_state_dict({**state, **shared})
        return branch

    @property
    def controlnet_cond_embedding(self) -> nn.Module:
        """The edge encoder."""
        return self.network.controlnet_cond_embedding

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        return_dict: bool = False,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As diffusers' ControlNetModel, whose output it gives as a tuple alone.

        Args:
            sample, timestep, encoder_hidden_states, return_dict: see :meth:`MonaiUNet.forward`.
            controlnet_cond: hint (B, 1 or 3, H, W).
            conditioning_scale: weight of the features.

        Returns:
            Features for the UNet's encoder, and for its middle.
        """
        context = encoder_hidden_states if self.config.with_conditioning else None
        return self.network(sample, timestep, controlnet_cond, conditioning_scale, context)


class MonaiAutoencoder(MonaiPart):
    """MONAI's AutoencoderKL, for images in [-1, 1] as all parts here have them.

    Args:
        config: see :class:`MonaiPart`. Beside MONAI's arguments ``image_range``, the intensities
            that the network was trained on, and ``scaling_factor``, which makes the diffusion's
            latents of its own.

    Source: MONAI's AutoencoderKL.
    """

    network_class = AutoencoderKL
    own_defaults = {"image_range": (-1.0, 1.0), "scaling_factor": 1.0}

    @classmethod
    def complete(cls, config: Mapping) -> dict:
        """See :meth:`MonaiPart.complete`; with diffusers' name for the widths of the levels."""
        whole = super().complete(config)
        for name in ("in_channels", "out_channels"):
            if whole[name] not in (1, 3):
                raise ValueError(
                    f"backbone: {cls.class_name()}: {name}: {whole[name]!r}; 1 or 3 is allowed"
                )
        bounds, factor = whole["image_range"], whole["scaling_factor"]
        if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise ValueError(f"image_range: {bounds!r} is not [lowest, highest]")
        if not 0 < factor < math.inf:
            raise ValueError(f"scale_factor: {factor!r} is not above 0")
        return {**whole, "block_out_channels": whole["channels"]}

    def encode(self, image: torch.Tensor) -> AutoencoderKLOutput:
        """The posterior of images (B, 1 or 3, H, W) in [-1, 1], as diffusers' AutoencoderKL."""
        low, high = self.config.image_range
        if (low, high) != (-1, 1):
            image = low + (image + 1) * ((high - low) / 2)
        hidden = self.network.encoder(image)
        moments = [self.network.quant_conv_mu(hidden), self.network.quant_conv_log_sigma(hidden)]
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat(moments, 1)))

    def decode(self, latent: torch.Tensor) -> DecoderOutput:
        """Images (B, 1 or 3, H, W), about [-1, 1], of unscaled latents (B, C, h, w)."""
        low, high = self.config.image_range
        image = self.network.decode(latent)
        if (low, high) != (-1, 1):
            image = (image - low) * (2 / (high - low)) - 1
        return DecoderOutput(sample=image)

    def register_to_config(self, **values: object) -> None:
        """Changes the configuration, as diffusers' parts do."""
        self.config = FrozenDict({**self.config, **values})


MONAI_PARTS = {"vae": MonaiAutoencoder, "unet": MonaiUNet, "controlnet": MonaiControlNet}


def is_monai(config: Mapping) -> bool:
    """Whether a part's configuration is that of a network of MONAI."""
    return str(config.get("_class_name", "")).startswith("monai.")


def monai_class(part: str, config: Mapping) -> type[MonaiPart]:
    """The class for a part of kind ``monai``.

    Raises:
        ValueError: MONAI's network of this name is none that the part can be.

    Source: engineering choice.
    """
    kind = MONAI_PARTS.get(part)
    if kind is None or config["_class_name"] != kind.class_name():
        allowed = kind.class_name() if kind else "no network of MONAI"
        raise ValueError(
            f"backbone: {part}: _class_name: {config['_class_name']!r}; allowed is {allowed}"
        )
    return kind

"""MONAI's own generative networks as parts of a backbone: MONAI computes, diffusers' calls ask.

A part of kind ``monai`` is a folder as any other. Its ``config.json`` names the class of
``monai.networks.nets`` and the arguments of that class, the weights beside it have MONAI's names.
:mod:`diffboost.generation.monai_checkpoints` makes such folders from a team's files.
"""

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import DiffusionUNetTransformerBlock
from safetensors.torch import save_file
from torch import nn

from diffboost.data.documents import read_json
from diffboost.data.weights import load_weights
from diffboost.knobs import refuse_unknown

WEIGHTS = "diffusion_pytorch_model.safetensors"
HINT_CHANNELS = (16, 32, 96, 256)  # of a new branch, a level; MONAI's default


class MonaiPart(nn.Module):
    """A network of MONAI under the calls that diffusers' part of the same name answers.

    Args:
        config: see :meth:`complete`.

    Raises:
        ValueError: see :meth:`complete`; or MONAI refuses the arguments.

    Source: engineering choice; the networks are MONAI's (Pinaya et al. 2023).
    """

    network_class: type[nn.Module]
    own_defaults: Mapping = {}  # what a configuration holds beside MONAI's arguments

    def __init__(self, config: Mapping) -> None:
        super().__init__()
        self.config = FrozenDict(self.complete(config))
        parameters = inspect.signature(self.network_class).parameters
        self.network = self.network_class(**{name: self.config[name] for name in parameters})

    @classmethod
    def class_name(cls) -> str:
        """What ``_class_name`` says in a ``config.json``."""
        return f"monai.networks.nets.{cls.network_class.__name__}"

    @classmethod
    def complete(cls, config: Mapping) -> dict:
        """A configuration with MONAI's defaults for what it leaves out.

        Args:
            config: arguments of MONAI's class, and what ``own_defaults`` names.

        Raises:
            ValueError: an argument is unknown or missing, or means what has no counterpart here
                (volumes, classes).

        Source: engineering choice.
        """
        parameters = inspect.signature(cls.network_class).parameters
        allowed = {*parameters, *cls.own_defaults}
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        refuse_unknown(given, allowed, f"backbone: {cls.class_name()}")
        empty = inspect.Parameter.empty
        defaults = {p.name: p.default for p in parameters.values() if p.default is not empty}
        whole = {**defaults, **cls.own_defaults, **given}
        missing = sorted(allowed - set(whole))
        if missing:
            raise ValueError(f"backbone: {cls.class_name()}: {', '.join(missing)}: not given")
        if whole["spatial_dims"] != 2:
            raise ValueError(
                f"backbone: {cls.class_name()}: spatial_dims: {whole['spatial_dims']!r}; "
                "only 2 is allowed: the bundles work on slices"
            )
        if whole.get("num_class_embeds") is not None:
            raise ValueError(
                f"backbone: {cls.class_name()}: num_class_embeds: {whole['num_class_embeds']!r}; "
                "only null is allowed: slices have prompts and no class numbers"
            )
        return {"_class_name": cls.class_name(), **whole}

    @classmethod
    def from_config(cls, config: Mapping) -> "MonaiPart":
        """The part with drawn weights, under the name that diffusers' parts have for it."""
        return cls({name: config[name] for name in config if name in cls.names()})

    @classmethod
    def names(cls) -> list[str]:
        """The keys of a ``config.json``, but its ``_class_name``."""
        return [*inspect.signature(cls.network_class).parameters, *cls.own_defaults]

    @classmethod
    def load(cls, folder: Path) -> "MonaiPart":
        """The part that lies in a folder.

        Raises:
            OSError: there is none.
            ValueError: it is damaged or does not fit its configuration.
        """
        part = cls(read_json(folder / "config.json", "backbone"))
        load_weights(part.network, folder / WEIGHTS, "backbone")
        return part

    def save_pretrained(self, folder: Path) -> None:
        """Writes the part into a folder, under the name that diffusers' parts have for it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {name: self.config[name] for name in ("_class_name", *self.names())}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        state = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(state, folder / WEIGHTS)

    def enable_gradient_checkpointing(self) -> None:
        """Raises ValueError: MONAI's networks cannot compute activations again."""
        raise ValueError(
            "gradient_checkpointing: true; MONAI's UNet and ControlNet have none: only false is "
            "allowed with a backbone of theirs"
        )


class MonaiUNet(MonaiPart):
    """MONAI's DiffusionModelUNet.

    Without ``with_conditioning`` it takes no prompts, and leaves those that it is given.

    Args:
        config: see :class:`MonaiPart`.

    Source: MONAI's DiffusionModelUNet.
    """

    network_class = DiffusionModelUNet

    def text_projections(self) -> Iterator[nn.Module]:
        """The projections whose input is the context as it is given to the network."""
        return _text_projections(self.network)

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

    def text_projections(self) -> Iterator[nn.Module]:
        """The projections whose input is the context as it is given to the network."""
        return _text_projections(self.network)

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


def _text_projections(network: nn.Module) -> Iterator[nn.Module]:
    """The cross-attentions' projections to keys and values."""
    for module in network.modules():
        if isinstance(module, DiffusionUNetTransformerBlock):
            yield from (module.attn2.to_k, module.attn2.to_v)


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

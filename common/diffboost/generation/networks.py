"""The generator's networks: a UNet with a ControlNet branch, and the grayscale autoencoder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from diffboost.data.weights import read_state
from diffboost.generation.backbones import has_part, load_part, new_branch
from diffboost.generation.monai_checkpoints import fill_monai, read_checkpoint
from diffboost.generation.monai_networks import MonaiAutoencoder
from diffboost.generation.monai_part import MonaiPart
from diffboost.generation.single_file import fill_branch, holds_unet, key_groups
from diffboost.generation.upsampling import fold_upsampling
from diffboost.precision import autocast_dtype


def _refuse_other_unet(own: nn.Module, unet: nn.Module, weights: str, backbone: str) -> None:
    """Raises ValueError where a UNet is not the backbone's own, but for half precision."""
    for (name, value), before in zip(
        unet.state_dict().items(), own.state_dict().values(), strict=True
    ):
        if not torch.allclose(before, value, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"weights: {weights} holds another UNet than that of backbone: {backbone!r} "
                f"({name} differs), and train_base: false would leave it out of model.pt; give "
                "train_base true, or as backbone what export.yaml makes of these weights"
            )


class ControlledUNet(nn.Module):
    """A text-conditioned UNet whose features a ControlNet branch shifts by an edge map.

    ``state_dict`` holds what is trained and nothing else: the branch, and the UNet if
    ``train_base``. A frozen UNet moves with the module and is named by its backbone. The UNet's
    upsampling convolutions are folded (:mod:`diffboost.generation.upsampling`).

    Args:
        backbone: see :func:`diffboost.generation.backbones.resolve_backbone`. A backbone without
            a branch gets a new one that starts from the UNet's encoder with zero convolutions.
        train_base: train the UNet too; the paper trains the branch alone (facts 3).
        weights: a ``model.pt`` to start from (branch, and UNet where it was trained), or a
            single-file ControlNet or ControlLDM in the original layout or diffusers'.
        gradient_checkpointing: compute activations again in the backward pass: less memory, about
            a third more time.
        channels_last: lay convolutions out as (B, H, W, C), faster on GPUs.
        precision: what the network will run in; a frozen UNet is kept in it, half the memory.

    Raises:
        FileNotFoundError: ``weights`` is no file.
        ValueError: ``weights`` is of unknown layout or does not fit, holds another UNet than the
            backbone's though ``train_base`` is false (it would not be in model.pt, and sampling
            would take the backbone's), or precision is unknown.

    Source: paper Sec. 3.1, Fig. 1.
    """

    def __init__(
        self,
        backbone: str,
        train_base: bool = False,
        weights: str | None = None,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        unet = load_part(backbone, "unet")
        if has_part(backbone, "controlnet"):
            self.controlnet = load_part(backbone, "controlnet")
        else:
            self.controlnet = new_branch(backbone, unet)
        if weights is not None:
            self._load(unet, Path(weights))
            if not train_base and holds_unet(weights):
                _refuse_other_unet(load_part(backbone, "unet"), unet, weights, backbone)
        fold_upsampling(unet, frozen=not train_base)
        self.controlnet.requires_grad_(True)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            self.controlnet.enable_gradient_checkpointing()
        if not train_base:
            # diffusers' own `to` warns of modules that must stay in float32, of which it has none
            unet = nn.Module.to(unet.requires_grad_(False), autocast_dtype(precision))
        self._frozen: tuple[nn.Module, ...] = () if train_base else (unet,)
        if train_base:
            self.unet = unet.requires_grad_(True)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def _load(self, unet: nn.Module, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"weights: {path} is no file; task_finetune and radimagenet_controlnet_pretrain "
                "write model.pt into their output_dir"
            )
        if not key_groups(path)["controlnet."]:
            if isinstance(self.controlnet, MonaiPart):
                where = f"weights: {path}"
                fill_monai(self.controlnet.network, read_checkpoint(path, "weights"), where)
                return
            fill_branch(self.controlnet, unet, path)
            self.controlnet.float(), unet.float()
            return
        state = read_state(path)
        for name, module in (("controlnet", self.controlnet), ("unet", unet)):
            prefix = name + "."
            part = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            if not part and name == "unet":
                continue
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                raise ValueError(f"weights: {path} does not fit the {name}: {error}") from error

    @property
    def base(self) -> nn.Module:
        """The UNet, trained or frozen."""
        return self._frozen[0] if self._frozen else self.unet

    def _apply(self, fn, recurse=True):
        for module in self._frozen:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(
        self,
        image: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        edge: torch.Tensor | None = None,
        control_scale: float = 1.0,
    ) -> torch.Tensor:
        """The noise in a noisy latent.

        Args:
            image: noisy latent (B, C, h, w), float, unit variance.
            timesteps: (B,) integers in [0, 1000); None means 0.
            context: prompt embeddings (B, tokens, width); None means zeros.
            edge: hint (B, 1, H, W) in [0, 1], at image size; None or ``control_scale`` 0 leaves the
                branch out.
            control_scale: weight of the branch's features.

        Returns:
            Predicted noise (B, C, h, w).

        Source: paper Sec. 3.1, Eq. 11; ControlNet's branch.
        """
        if timesteps is None:
            timesteps = image.new_zeros(image.shape[0], dtype=torch.long)
        if context is None:
            width = self.base.config.cross_attention_dim or 1  # MONAI's may take none
            context = image.new_zeros(image.shape[0], 1, width)
        down, middle = None, None
        if edge is not None and control_scale != 0:
            hint = edge.expand(-1, self.controlnet.config.conditioning_channels, -1, -1)
            down, middle = self.controlnet(
                image, timesteps, context, hint, control_scale, return_dict=False
            )
        return self.base(
            image,
            timesteps,
            context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]


class GrayscaleAutoencoder(nn.Module):
    """Stable Diffusion's autoencoder for grayscale images, with the paper's averaging output block.

    Args:
        autoencoder: an AutoencoderKL, whose upsampling convolutions are folded (not MONAI's); a
            gray image is copied to its input channels.

    Source: paper Sec. 3.1, Fig. 1a (cross-channel average at the final output).
    """

    def __init__(self, autoencoder: AutoencoderKL | MonaiAutoencoder) -> None:
        super().__init__()
        fold_upsampling(autoencoder)
        self.autoencoder = autoencoder

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Posterior moments of images.

        Args:
            image: (B, 1, H, W) in [-1, 1].

        Returns:
            (B, 2C, h, w): mean and log-variance of the unscaled latent.
        """
        image = image.expand(-1, self.autoencoder.config.in_channels, -1, -1)
        return self.autoencoder.encode(image).latent_dist.parameters

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Gray images (B, 1, H, W), about [-1, 1], of unscaled latents (B, C, h, w)."""
        return self.autoencoder.decode(latent).sample.mean(dim=1, keepdim=True)

    def decode_scaled(self, latent: torch.Tensor) -> torch.Tensor:
        """Gray images (B, 1, H, W) in [-1, 1] of the diffusion's unit-variance latents."""
        return self.decode(latent / self.autoencoder.config.scaling_factor).clamp(-1, 1)

    def forward(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruction of images and, behind it, their moments, for the loss.

        Args:
            image: (B, 1, H, W) in [-1, 1].
            noise: (B, C, h, w) standard normal, draws from the posterior; None takes its mean.

        Returns:
            The reconstruction (B, 1, H, W) without noise; with noise a pair of it and the moments.
        """
        moments = self.encode(image)
        posterior = DiagonalGaussianDistribution(moments)
        if noise is None:
            return self.decode(posterior.mean)
        return self.decode(posterior.mean + posterior.std * noise), moments

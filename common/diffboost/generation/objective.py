"""What a generator is trained on: draws of latent, noise and timestep, and the losses."""

import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from monai.engines import PrepareBatch
from monai.transforms import RandomizableTransform
from torch import nn
from torch.nn.functional import l1_loss

from diffboost.generation.backbones import load_config, load_part


def standard_normal(random_state, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 tensor of this shape from a NumPy random state."""
    return torch.from_numpy(random_state.standard_normal(shape).astype("float32"))


class DrawDiffusionTargetsd(RandomizableTransform):
    """A training sample from a cached slice: copy, latent, noise, timestep, prompt or empty prompt.

    Args:
        backbone: brings the autoencoder's latent scale and the number of timesteps.
        empty_prompt: chance that the prompt is dropped, so that guidance has something to push
            away from. The released code has none (facts 4); ControlNet's paper drops half.

    Source: paper Eq. 11; the posterior is drawn anew in each step.
    """

    def __init__(self, backbone: str, empty_prompt: float) -> None:
        super().__init__(prob=1.0)
        if not 0 <= empty_prompt <= 1:
            raise ValueError(f"empty_prompt: {empty_prompt} is not in [0, 1]")
        self.scaling_factor = load_config(backbone, "vae")["scaling_factor"]
        self.num_timesteps = load_config(backbone, "scheduler")["num_train_timesteps"]
        self.empty_prompt = empty_prompt

    def __call__(self, data: dict) -> dict:
        """``latent`` and ``noise`` (C, h, w), ``timestep``, ``context``, ``edge`` (1, H, W)."""
        copy = self.R.randint(len(data["moments"]))
        moments = torch.from_numpy(data["moments"][copy].astype("float32"))[None]
        posterior = DiagonalGaussianDistribution(moments)
        shape = tuple(posterior.mean.shape[1:])
        latent = posterior.mean[0] + posterior.std[0] * standard_normal(self.R, shape)
        dropped = self.R.random_sample() < self.empty_prompt
        context = data["empty_context" if dropped else "context"]
        return {
            "latent": latent * self.scaling_factor,
            "noise": standard_normal(self.R, shape),
            "timestep": int(self.R.randint(self.num_timesteps)),
            "context": torch.from_numpy(context.astype("float32")),
            "edge": torch.from_numpy(data["edges"][copy].astype("float32") / 255),
        }


class ControlPrepareBatch(PrepareBatch):
    """Noisy latent in, the drawn noise as target; timestep, prompt and edge go to the network.

    Args:
        backbone: brings the noise schedule.

    Source: paper Eq. 3 and 11.
    """

    def __init__(self, backbone: str) -> None:
        self.scheduler: DDPMScheduler = load_part(backbone, "scheduler")

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        """(noisy latent, target, (), {timesteps, context, edge}) on ``device``."""
        moved = {
            key: value.to(device, non_blocking=non_blocking) for key, value in batchdata.items()
        }
        latent, noise, timesteps = moved["latent"], moved["noise"], moved["timestep"]
        noisy = self.scheduler.add_noise(latent, noise, timesteps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latent, noise, timesteps)
        conditions = {key: moved[key] for key in ("context", "edge")}
        return noisy, target, (), {"timesteps": timesteps, **conditions}


class DrawPosteriorNoised(RandomizableTransform):
    """Adds ``noise`` (C, h, w) for drawing an image's latent from the autoencoder's posterior.

    Args:
        latent_channels: C.
        downsampling: side of the image over that of the latent.

    Source: latent diffusion's autoencoder (paper Sec. 3.1).
    """

    def __init__(self, latent_channels: int, downsampling: int) -> None:
        super().__init__(prob=1.0)
        self.latent_channels = latent_channels
        self.downsampling = downsampling

    def __call__(self, data: dict) -> dict:
        """The item with ``noise`` beside its ``image`` (1, H, W)."""
        height, width = (side // self.downsampling for side in data["image"].shape[-2:])
        noise = standard_normal(self.R, (self.latent_channels, height, width))
        return {**data, "noise": noise}


class AutoencoderPrepareBatch(PrepareBatch):
    """The image as input and target, and the posterior's noise for the network."""

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        """(image, image, (), {noise}) on ``device``."""
        image = batchdata["image"].to(device, non_blocking=non_blocking)
        noise = batchdata["noise"].to(device, non_blocking=non_blocking)
        return image, image, (), {"noise": noise}


class AutoencoderLoss(nn.Module):
    """Absolute error of intensities and of their finite differences, and the posterior's KL.

    Args:
        gradient_weight: weight of the differences, which keeps boundaries sharp.
        kl_weight: weight of the Kullback-Leibler term a latent element.

    Source: engineering choice; latent diffusion adds a perceptual and an adversarial term, whose
        networks need downloads or cost more than this autoencoder.
    """

    def __init__(self, gradient_weight: float, kl_weight: float) -> None:
        super().__init__()
        self.gradient_weight = gradient_weight
        self.kl_weight = kl_weight

    def forward(
        self, prediction: tuple[torch.Tensor, torch.Tensor], image: torch.Tensor
    ) -> torch.Tensor:
        """Loss of (reconstruction (B, 1, H, W), moments (B, 2C, h, w)) against ``image``."""
        reconstruction, moments = prediction
        loss = l1_loss(reconstruction, image)
        for dim in (-2, -1):
            differences = l1_loss(reconstruction.diff(dim=dim), image.diff(dim=dim))
            loss = loss + self.gradient_weight * differences
        divergence = DiagonalGaussianDistribution(moments).kl().mean() / moments[0].numel() * 2
        return loss + self.kl_weight * divergence

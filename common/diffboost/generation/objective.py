"""What a generator is trained on: draws of latent, noise and timestep, and the losses."""

import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from monai.engines import PrepareBatch
from monai.networks.schedulers import RFlowScheduler
from monai.transforms import RandomizableTransform
from monai.utils import convert_to_tensor
from torch import nn
from torch.nn.functional import l1_loss

from diffboost.data.transforms import LoadSliced
from diffboost.generation.backbones import load_config, load_part
from diffboost.generation.latents import downsampling, latent_shape
from diffboost.generation.networks import GrayscaleAutoencoder
from diffboost.knobs import nearest

OBJECTIVES = ("noise", "flow")
PREDICTIONS = ("epsilon", "v_prediction")  # prediction_type of a backbone's scheduler


def standard_normal(random_state, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 tensor of this shape from a NumPy random state."""
    return torch.from_numpy(random_state.standard_normal(shape).astype("float32"))


class DrawDiffusionTargetsd(RandomizableTransform):
    """A training sample of a slice: copy, latent, noise, timestep, prompt or empty prompt.

    A cached slice (``moments``) gives its latent. One without a cache (``image``, a path) gives the
    image and the posterior's noise instead, for :class:`ControlPrepareBatch` to encode; all draws
    are those of a cache without jitter, and the jitter is drawn after them.

    Args:
        backbone: brings the autoencoder's latent scale and the number of timesteps.
        empty_prompt: chance that the prompt is dropped, so that guidance has something to push
            away from. The released code has none (facts 4); ControlNet's paper drops half.
        image_size: side in pixels of images that are not cached.
        jitter: geometric jitter of images that are not cached, or None.

    Raises:
        ValueError: ``empty_prompt`` is not in [0, 1], or the autoencoder cannot halve the side.

    Source: paper Eq. 11; the posterior is drawn anew in each step.
    """

    def __init__(
        self,
        backbone: str,
        empty_prompt: float,
        image_size: int | None = None,
        jitter: RandomizableTransform | None = None,
    ) -> None:
        super().__init__(prob=1.0)
        if not 0 <= empty_prompt <= 1:
            raise ValueError(f"empty_prompt: {empty_prompt} is not in [0, 1]")
        if image_size is not None:
            latent_shape(backbone, image_size)  # refuses one that the autoencoder cannot halve
        config = load_config(backbone, "vae")
        self.scaling_factor = config["scaling_factor"]
        self.latent_channels = config["latent_channels"]
        self.downsampling = downsampling(backbone)
        self.num_timesteps = load_config(backbone, "scheduler")["num_train_timesteps"]
        self.empty_prompt = empty_prompt
        self.load = LoadSliced(["image", "edge"], image_size=image_size)
        self.jitter = jitter

    def __call__(self, data: dict) -> dict:
        """``noise`` (C, h, w), ``timestep``, ``context``, ``edge`` (1, H, W) and ``latent``
        (C, h, w), or ``image`` (1, H, W) and ``posterior_noise`` (C, h, w)."""
        cached = "moments" in data
        copy = self.R.randint(len(data["moments"]) if cached else 1)
        item = self._cached(data, copy) if cached else self.load(data)
        height, width = (side // self.downsampling for side in item["edge"].shape[-2:])
        shape = (self.latent_channels, height, width)
        posterior_noise = standard_normal(self.R, shape)
        dropped = self.R.random_sample() < self.empty_prompt
        drawn = {
            "noise": standard_normal(self.R, shape),
            "timestep": int(self.R.randint(self.num_timesteps)),
            "context": torch.from_numpy(
                data["empty_context" if dropped else "context"].astype("float32")
            ),
        }
        if cached:
            latent = item["posterior"].mean[0] + item["posterior"].std[0] * posterior_noise
            return {"latent": latent * self.scaling_factor, **drawn, "edge": item["edge"]}
        if self.jitter is not None:
            self.jitter.set_random_state(seed=self.R.randint(2**32, dtype="uint32"))
            item = self.jitter(item)
        image, edge = (convert_to_tensor(item[key], track_meta=False) for key in ("image", "edge"))
        return {"image": image, "posterior_noise": posterior_noise, **drawn, "edge": edge}

    def _cached(self, data: dict, copy: int) -> dict:
        """The posterior and the edge of a cached copy."""
        moments = torch.from_numpy(data["moments"][copy].astype("float32"))[None]
        edge = torch.from_numpy(data["edges"][copy].astype("float32") / 255)
        return {"posterior": DiagonalGaussianDistribution(moments), "edge": edge}


def refuse_other_prediction(backbone: str, prediction_type: str) -> None:
    """Refuses a backbone whose UNet predicts neither the noise nor the velocity.

    Args:
        backbone: for the message.
        prediction_type: of its scheduler's configuration.

    Raises:
        ValueError: it is another one, such as diffusers' ``sample``.

    Source: engineering choice.
    """
    if prediction_type not in PREDICTIONS:
        raise ValueError(
            f"backbone: {backbone}: prediction_type {prediction_type!r} of its scheduler is not "
            f"trained here; allowed: {', '.join(PREDICTIONS)}"
        )


class ControlPrepareBatch(PrepareBatch):
    """Noisy latent in, the drawn noise as target; timestep, prompt and edge go to the network.

    Images that were not cached are encoded here, by the frozen autoencoder in float32.

    Args:
        backbone: brings the noise schedule, and the autoencoder where images come.
        objective: ``noise``, or ``flow``: the noisy latent lies on the straight line from latent to
            noise at the time (timestep + 1) / 1000, the target is noise minus latent, and the
            network is told 1000 times the time.

    Raises:
        ValueError: ``objective`` is unknown, or the backbone's scheduler predicts what is not
            trained here.

    Source: paper Eq. 3 and 11; flow: Liu et al. 2022, times as in MONAI's RFlowScheduler, but
        (0, 1] for [0, 1): sampling begins at 1 and never asks at 0.
    """

    def __init__(self, backbone: str, objective: str = "noise") -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: {objective!r}; {nearest(objective, OBJECTIVES)}")
        self.objective = objective
        self.backbone = backbone
        self.scheduler: DDPMScheduler = load_part(backbone, "scheduler")
        if objective == "noise":
            refuse_other_prediction(backbone, self.scheduler.config.prediction_type)
        self.autoencoder: GrayscaleAutoencoder | None = None

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        """(noisy latent, target, (), {timesteps, context, edge}) on ``device``."""
        moved = {
            key: value.to(device, non_blocking=non_blocking) for key, value in batchdata.items()
        }
        noise, timesteps = moved["noise"], moved["timestep"]
        latent = moved["latent"] if "latent" in moved else self._encode(moved)
        conditions = {key: moved[key] for key in ("context", "edge")}
        if self.objective == "flow":
            timesteps = timesteps + 1
            line = RFlowScheduler(self.scheduler.config.num_train_timesteps)
            noisy = line.add_noise(latent, noise, timesteps)
            return noisy, noise - latent, (), {"timesteps": timesteps, **conditions}
        noisy = self.scheduler.add_noise(latent, noise, timesteps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latent, noise, timesteps)
        return noisy, target, (), {"timesteps": timesteps, **conditions}

    @torch.no_grad()
    def _encode(self, moved: dict[str, torch.Tensor]) -> torch.Tensor:
        """Latents (B, C, h, w) of unit variance, drawn from the posteriors of images."""
        if self.autoencoder is None:
            autoencoder = GrayscaleAutoencoder(load_part(self.backbone, "vae"))
            self.autoencoder = autoencoder.to(moved["image"].device).eval()
        moments = self.autoencoder.encode(moved["image"].float())
        posterior = DiagonalGaussianDistribution(moments)
        latent = posterior.mean + posterior.std * moved["posterior_noise"]
        return latent * self.autoencoder.autoencoder.config.scaling_factor


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


def sharp_error(
    reconstruction: torch.Tensor, image: torch.Tensor, gradient_weight: float
) -> torch.Tensor:
    """Absolute error of intensities, and with a weight of their finite differences.

    Args:
        reconstruction, image: (B, 1, H, W).
        gradient_weight: weight of the differences, which keeps boundaries sharp.

    Source: engineering choice.
    """
    loss = l1_loss(reconstruction, image)
    for dim in (-2, -1):
        differences = l1_loss(reconstruction.diff(dim=dim), image.diff(dim=dim))
        loss = loss + gradient_weight * differences
    return loss


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
        loss = sharp_error(reconstruction, image, self.gradient_weight)
        divergence = DiagonalGaussianDistribution(moments).kl().mean() / moments[0].numel() * 2
        return loss + self.kl_weight * divergence

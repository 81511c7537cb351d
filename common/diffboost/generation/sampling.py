"""Sampling: from a variant's own noise to a gray image that follows an edge."""

import numpy as np
import torch
from monai.inferers import Inferer
from torch import nn

from diffboost.data.addresses import address_seed
from diffboost.generation.backbones import load_part
from diffboost.generation.networks import GrayscaleAutoencoder
from diffboost.generation.schedulers import load_scheduler
from diffboost.precision import AutocastInferer

NOISE_ADDRESSES = ("case", "variant")


def variant_noise(
    seed: int, case: str, slice_: int, variant: int, shape: tuple, noise_address: str = "case"
) -> torch.Tensor:
    """Standard normal float32 start of a variant, from its address alone.

    Args:
        seed, case, slice_, variant: name the variant.
        shape: of a latent.
        noise_address: ``case`` draws from (seed, case, slice, variant); ``variant`` from (seed,
            variant), so that variant i of every slice starts from the same noise.

    Source: engineering choice; ``variant`` is the released code's (facts 19).
    """
    place = (case, slice_, variant) if noise_address == "case" else ("variant", variant)
    generator = np.random.RandomState(address_seed(seed, *place))
    return torch.from_numpy(generator.standard_normal(shape).astype("float32"))


class VariantInferer(Inferer):
    """Denoises and decodes: noise, prompt and edge in, gray images out.

    Args:
        backbone: brings noise schedule and autoencoder.
        scheduler: see :func:`load_scheduler`.
        num_inference_steps: steps of the scheduler; released code 20.
        guidance_scale: classifier-free guidance; 1 leaves the second half out, released code 9.
        control_scale: weight of the ControlNet branch; released code 1.
        precision: float32, bfloat16 or float16, of the networks; scheduler and latents stay in
            float32.

    Raises:
        ValueError: a number is out of its range, or the precision is unknown.

    Source: paper Sec. 3.1 and 3.4; values in facts 18.
    """

    def __init__(
        self,
        backbone: str,
        scheduler: str = "unipc",
        num_inference_steps: int = 6,
        guidance_scale: float = 1.0,
        control_scale: float = 1.0,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: {num_inference_steps} is not 1 or more")
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale: {guidance_scale} is not 1 (no guidance) or more")
        self.backbone = backbone
        self.scheduler = scheduler
        load_scheduler(backbone, scheduler)
        self.autoencoder = GrayscaleAutoencoder(load_part(backbone, "vae"))
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.control_scale = control_scale
        self.run_network = AutocastInferer(precision=precision)

    def __call__(
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        context: torch.Tensor,
        edge: torch.Tensor,
        negative_context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images of a batch.

        Args:
            inputs: noise (B, C, h, w), standard normal.
            network: a ControlledUNet.
            context: prompt embeddings (B, tokens, width).
            edge: hints (B, 1, H, W) in [0, 1].
            negative_context: (B, tokens, width), needed where ``guidance_scale`` is above 1.

        Returns:
            (B, 1, H, W) in [-1, 1].
        """
        scheduler = load_scheduler(self.backbone, self.scheduler)
        scheduler.set_timesteps(self.num_inference_steps, device=inputs.device)
        latent = inputs * scheduler.init_noise_sigma
        guided = self.guidance_scale > 1
        if guided:
            context = torch.cat([negative_context, context])
            edge = torch.cat([edge, edge])
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latent, timestep)
            scaled = torch.cat([scaled, scaled]) if guided else scaled
            steps = timestep.expand(len(scaled))
            noise = self.run_network(scaled, network, steps, context, edge, self.control_scale)
            if guided:
                negative, positive = noise.chunk(2)
                noise = negative + self.guidance_scale * (positive - negative)
            latent = scheduler.step(noise, timestep, latent, return_dict=False)[0]
        autoencoder = self.autoencoder.to(inputs.device)
        return self.run_network(latent, autoencoder.decode_scaled)

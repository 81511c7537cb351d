"""Sampling: from a variant's own noise to a gray image that follows an edge."""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from monai.inferers import Inferer
from torch import nn

from diffboost.data.addresses import address_seed
from diffboost.generation.constant_conditions import constant_conditions
from diffboost.generation.decoding import load_decoder
from diffboost.generation.schedulers import load_scheduler
from diffboost.precision import AutocastInferer

WHOLE_RUN = (0.0, 1.0)  # of an interval
NOISE_ADDRESSES = ("case", "variant", "volume")


def variant_place(case: str, slice_: int, variant: int, noise_address: str) -> tuple:
    """What names a variant's draws beside the seed.

    Args:
        case, slice_, variant: name the variant.
        noise_address: ``case``: each slice's variant has draws of its own; ``variant``: variant i
            of every slice shares them (released code); ``volume``: variant i of all slices of a
            case shares them, so that neighboring slices are alike.

    Source: engineering choice; ``variant`` is the released code's (facts 19).
    """
    places = {
        "case": (case, slice_, variant),
        "variant": ("variant", variant),
        "volume": ("volume", case, variant),
    }
    return places[noise_address]


def variant_noise(
    seed: int, case: str, slice_: int, variant: int, shape: tuple, noise_address: str = "case"
) -> torch.Tensor:
    """Standard normal float32 start of a variant, from its address alone.

    Args:
        seed, case, slice_, variant: name the variant.
        shape: of a latent.
        noise_address: see :func:`variant_place`.

    Source: engineering choice; ``variant`` is the released code's (facts 19).
    """
    place = variant_place(case, slice_, variant, noise_address)
    generator = np.random.RandomState(address_seed(seed, *place))
    return torch.from_numpy(generator.standard_normal(shape).astype("float32"))


def variant_step_seed(
    seed: int, case: str, slice_: int, variant: int, noise_address: str = "case"
) -> int:
    """Seed of what a scheduler draws in its steps for a variant, apart from its start.

    Args:
        seed, case, slice_, variant, noise_address: see :func:`variant_noise`.

    Source: engineering choice (design, "Randomness").
    """
    place = variant_place(case, slice_, variant, noise_address)
    return address_seed(seed, "steps", *place)


def check_interval(
    name: str, interval: Sequence[float], number: int | None = None
) -> tuple[float, float]:
    """An interval of a run of steps: fractions [start, end).

    Args:
        name: of its knob, for the message.
        interval: start and end.
        number: of the run's steps, of which it must hold one; None: nothing acts in it.

    Raises:
        ValueError: it is not two numbers with 0 <= start < end <= 1, or holds no step.

    Source: engineering choice.
    """
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"{name}: {list(interval)} is not [start, end], 0 <= start < end <= 1")
    if number is not None and not any(steps_inside(interval, number)):
        raise ValueError(
            f"{name}: {list(interval)} holds none of num_inference_steps: {number} steps, which "
            f"begin at 0, 1/{number}, …"
        )
    return float(interval[0]), float(interval[1])


def steps_inside(interval: Sequence[float], number: int) -> list[bool]:
    """Which of so many steps lie in an interval: step i does where start <= i / number < end.

    Source: engineering choice (guidance interval: Kynkäänniemi et al. 2024, there in noise levels).
    """
    return [interval[0] <= step / number < interval[1] for step in range(number)]


def step_kinds(
    number: int,
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] = WHOLE_RUN,
    control_scale: float = 1.0,
    control_interval: Sequence[float] = WHOLE_RUN,
) -> list[tuple[bool, bool]]:
    """Of each of so many steps whether it is guided and whether the branch is run.

    Args:
        number: of steps.
        guidance_scale, guidance_interval, control_scale, control_interval: see
            :class:`VariantInferer`.

    Source: engineering choice.
    """
    guided = [guidance_scale > 1 and step for step in steps_inside(guidance_interval, number)]
    controlled = [control_scale != 0 and step for step in steps_inside(control_interval, number)]
    return list(zip(guided, controlled, strict=True))


class VariantInferer(Inferer):
    """Denoises and decodes: noise, prompt and edge in, gray images out.

    Nothing is computed that changes no image: no second half outside the guidance interval, no
    branch outside the control interval or at ``control_scale`` 0, and hint features and keys and
    values of the text once a call (:func:`constant_conditions`). Inside the guidance interval both
    halves are one batch.

    Args:
        backbone: brings the noise schedule, and the decoder where ``decoder`` is None.
        scheduler: see :func:`load_scheduler`.
        num_inference_steps: steps of the scheduler; released code 20.
        guidance_scale: classifier-free guidance; 1 leaves the second half out, released code 9.
        guidance_interval: the steps with guidance, as fractions [start, end) of the run.
        control_scale: weight of the ControlNet branch; released code 1, 0 leaves it out.
        control_interval: the steps with the branch, as fractions [start, end) of the run.
        decoder: a tiny decoder, see :func:`diffboost.generation.decoding.resolve_decoder`; own or
            None is the backbone's, as the paper's.
        precision: float32, bfloat16 or float16, of the networks; scheduler and latents stay in
            float32.

    Raises:
        ValueError: a number is out of its range, an interval holds no step, the precision is
            unknown, or the decoder does not fit the backbone.

    Source: paper Sec. 3.1 and 3.4; values in facts 18; guidance interval Kynkäänniemi et al. 2024.
    """

    def __init__(
        self,
        backbone: str,
        scheduler: str = "unipc_karras",
        num_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] = WHOLE_RUN,
        control_scale: float = 1.0,
        control_interval: Sequence[float] = WHOLE_RUN,
        decoder: str | None = None,
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
        self.decoder = load_decoder(decoder, backbone)
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        guided = num_inference_steps if guidance_scale > 1 else None
        self.guidance_interval = check_interval("guidance_interval", guidance_interval, guided)
        self.control_scale = control_scale
        controlled = num_inference_steps if control_scale != 0 else None
        self.control_interval = check_interval("control_interval", control_interval, controlled)
        self.run_network = AutocastInferer(precision=precision)

    def __call__(
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        context: torch.Tensor,
        edge: torch.Tensor,
        negative_context: torch.Tensor | None = None,
        step_seeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images of a batch.

        Args:
            inputs: noise (B, C, h, w), standard normal.
            network: a ControlledUNet.
            context: prompt embeddings (B, tokens, width).
            edge: hints (B, 1, H, W) in [0, 1].
            negative_context: (B, tokens, width), needed where ``guidance_scale`` is above 1.
            step_seeds: (B,) int64, one a variant, see :func:`variant_step_seed`; seed what a
                scheduler draws in its steps. Without them it draws from torch's own generator.

        Returns:
            (B, 1, H, W) in [-1, 1].

        Raises:
            ValueError: steps are guided and there is no ``negative_context``.
        """
        scheduler = load_scheduler(self.backbone, self.scheduler)
        scheduler.set_timesteps(self.num_inference_steps, device=inputs.device)
        draws = _step_generators(scheduler, step_seeds)
        latent = inputs * scheduler.init_noise_sigma
        kinds = step_kinds(
            len(scheduler.timesteps),
            self.guidance_scale,
            self.guidance_interval,
            self.control_scale,
            self.control_interval,
        )
        if not any(guided for guided, _ in kinds):
            negative_context = None
        elif negative_context is None:
            raise ValueError(f"guidance_scale: {self.guidance_scale} needs a negative_context")
        with constant_conditions(network, context, edge, negative_context):
            for timestep, (guided, controlled) in zip(scheduler.timesteps, kinds, strict=True):
                scaled = scheduler.scale_model_input(latent, timestep)
                conditions = (context, edge if controlled else None)
                noise = self._noise(network, scaled, timestep, conditions, negative_context, guided)
                latent = scheduler.step(noise, timestep, latent, return_dict=False, **draws)[0]
        decoder = self.decoder.to(inputs.device)
        return self.run_network(latent, decoder.decode_scaled)

    def _noise(self, network, latent, timestep, conditions, negative_context, guided):
        """The noise in a latent; where it is guided, both halves pass as one batch."""
        context, edge = conditions
        if guided:
            latent = torch.cat([latent, latent])
            context = torch.cat([negative_context, context])
            edge = None if edge is None else torch.cat([edge, edge])
        steps = timestep.expand(len(latent))
        noise = self.run_network(latent, network, steps, context, edge, self.control_scale)
        if not guided:
            return noise
        negative, positive = noise.chunk(2)
        return negative + self.guidance_scale * (positive - negative)


def _step_generators(scheduler, step_seeds: torch.Tensor | None) -> dict:
    """Keyword arguments of the scheduler's step: a generator a variant where it may draw."""
    draws = "generator" in inspect.signature(scheduler.step).parameters
    if step_seeds is None or not draws:
        return {}
    return {"generator": [torch.Generator().manual_seed(seed) for seed in step_seeds.tolist()]}

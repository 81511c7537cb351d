"""Samplers by name, and which of them fit what a generator predicts."""

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from diffboost.generation.backbones import load_part
from diffboost.knobs import nearest


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Rectified flow: Euler's method in equal steps from noise (time 1) to image (time 0).

    diffusers' own steps end with one of a thousandth of the time, which costs a pass and moves
    nothing; MONAI's ``RFlowScheduler`` has equal steps, but another interface than the rest here.

    Source: Liu et al. 2022 (rectified flow); equal steps as MONAI's.
    """

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Times 1, 1 - 1/n … 1/n; the network is told a thousand times as much."""
        times = np.linspace(1, 0, num_inference_steps, endpoint=False)
        super().set_timesteps(device=device, sigmas=times)

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The sample itself, as the other schedulers give it."""
        return sample

    @property
    def init_noise_sigma(self) -> float:
        """Spread of the noise at the start."""
        return 1.0


SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "unipc_karras": (UniPCMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "flow": (FlowScheduler, {}),
}
# What lineage.json calls `prediction`, and what can sample it.
SCHEDULERS_OF = {
    "noise": ("ddim", "dpm++", "unipc", "unipc_karras", "euler"),
    "flow": ("flow",),
    "consistency": ("lcm",),
}


def load_scheduler(backbone: str, scheduler: str):
    """A sampling scheduler by name, on the noise schedule that the backbone was trained with.

    Args:
        backbone: brings the noise schedule; ``flow`` takes only its number of timesteps.
        scheduler: ddim (paper), dpm++, unipc, unipc_karras, euler; lcm for a distilled generator;
            flow for one that was trained with ``objective: flow``.

    Raises:
        ValueError: the scheduler is none of these.

    Source: released code samples with DDIM, eta 0 (facts 18); the others are diffusers';
    ``unipc_karras`` spaces its noise levels by Karras et al. 2022, equation 5, from the schedule's
    highest to its lowest, the others by equal steps of time.
    """
    return build_scheduler(scheduler, load_part(backbone, "scheduler").config)


def build_scheduler(scheduler: str, config: Mapping):
    """A sampling scheduler by name, on the noise schedule of a diffusers configuration.

    Args:
        scheduler: see :func:`load_scheduler`.
        config: of a backbone's scheduler.

    Raises:
        ValueError: the scheduler is unknown.

    Source: as :func:`load_scheduler`.
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler: {scheduler!r} is not one of {sorted(SCHEDULERS)}")
    kind, options = SCHEDULERS[scheduler]
    if kind is FlowScheduler:  # has no noise schedule
        config = {"num_train_timesteps": config["num_train_timesteps"]}
    return kind.from_config(config, **options)


def prediction_of(lineage: Mapping) -> str:
    """What a generator predicts, by its lineage: noise (where it says nothing), flow, consistency.

    Raises:
        ValueError: the lineage says something else.

    Source: engineering choice.
    """
    prediction = lineage.get("prediction", "noise")
    if prediction not in SCHEDULERS_OF:
        known = nearest(str(prediction), SCHEDULERS_OF)
        raise ValueError(f"lineage: prediction: {prediction!r} is not known; {known}")
    return prediction


def refuse_other_scheduler(scheduler: str, lineage: Mapping, generator_dir: str | None) -> None:
    """Refuses a scheduler that cannot sample what a generator predicts.

    Args:
        scheduler: see :func:`load_scheduler`.
        lineage: of the generator; an empty one is that of a backbone's own branch.
        generator_dir: for the message.

    Raises:
        ValueError: it does not fit; the message says what does.

    Source: engineering choice.
    """
    prediction = prediction_of(lineage)
    allowed = SCHEDULERS_OF[prediction]
    if scheduler not in allowed:
        where = generator_dir or "the backbone"
        raise ValueError(
            f"scheduler: {scheduler!r} does not fit the generator in {where}, which predicts "
            f"{prediction}; allowed: {', '.join(allowed)}"
        )

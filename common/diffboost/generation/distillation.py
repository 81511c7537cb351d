"""Consistency distillation: a generator of few steps from one of many.

Two neighboring points of the teacher's path from noise to image must give the student the same
clean latent; so a student's one step is the teacher's whole way, and two to four steps correct it.
"""

from pathlib import Path

import torch
from monai.inferers import Inferer
from torch import nn

from diffboost.data.items import SliceItems
from diffboost.generation.networks import ControlledUNet
from diffboost.generation.objective import ControlPrepareBatch
from diffboost.generation.saving import trace_lineage
from diffboost.generation.schedulers import load_scheduler, prediction_of
from diffboost.generation.synthesis import read_generator, refuse_other_backbone
from diffboost.generation.text import embed_prompts
from diffboost.precision import AutocastInferer


def load_student(generator_dir: str, backbone: str, **options) -> ControlledUNet:
    """A network that starts from a teacher's weights and trains what the teacher trained.

    Args:
        generator_dir: folder of the teacher, with ``model.pt`` and ``lineage.json``.
        backbone: the one that the teacher was trained on.
        **options: ``gradient_checkpointing``, ``channels_last``, ``precision`` of
            :class:`diffboost.generation.networks.ControlledUNet`.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: the teacher was trained on another backbone, or does not predict noise.

    Source: Luo et al. 2023, Sec. 4.1.
    """
    teacher = _read_teacher(generator_dir, backbone)
    weights = str(Path(generator_dir) / "model.pt")
    return ControlledUNet(backbone, teacher["train_base"], weights, **options)


def _read_teacher(generator_dir: str, backbone: str) -> dict:
    """What ``read_generator`` says of a teacher that can be distilled."""
    teacher = read_generator(generator_dir)
    refuse_other_backbone(teacher, generator_dir, backbone)
    prediction = prediction_of(teacher)
    if prediction != "noise":
        raise ValueError(
            f"generator_dir: the generator in {generator_dir} predicts {prediction}; distillation "
            "needs one that predicts noise, as train.yaml makes it with objective: noise"
        )
    return teacher


def trace_distillation(
    store_dir: str, data: SliceItems, backbone: str, generator_dir: str, fold: int, seed: int
) -> dict:
    """What a student will have seen: its slices, and all that its teacher saw.

    Args:
        store_dir: the slice store.
        data: the training slices.
        backbone: the backbone of both.
        generator_dir: folder of the teacher; its lineage is an ancestor.
        fold: fold that the slices come from.
        seed: the run's seed.

    Returns:
        As :func:`diffboost.generation.saving.trace_lineage`, with ``teacher_sha256``.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: as :func:`load_student`.

    Source: engineering choice (design, "lineage").
    """
    teacher = _read_teacher(generator_dir, backbone)
    weights = str(Path(generator_dir) / "model.pt")
    lineage = trace_lineage(
        store_dir, data, backbone, teacher["train_base"], fold, seed, weights, "consistency"
    )
    return {**lineage, "teacher_sha256": teacher["model_sha256"]}


def split_prediction(
    scheduler, output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean latent and the noise that a network's output means.

    Args:
        scheduler: brings the noise schedule and says whether the network predicts noise or
            velocity.
        output: of the network, (B, C, h, w).
        noisy: its input, (B, C, h, w).
        timesteps: (B,) integers.

    Returns:
        Two tensors (B, C, h, w).

    Source: Song et al. 2021 (DDIM), Eq. 12; Salimans and Ho 2022 for velocity.
    """
    alpha = scheduler.alphas_cumprod.to(noisy.device)[timesteps][:, None, None, None]
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return signal * noisy - spread * output, signal * output + spread * noisy
    return (noisy - spread * output) / signal, output


class ConsistencyInferer(Inferer):
    """A network's consistency function: the clean latent of a noisy one; at timestep 0 itself.

    Args:
        backbone: brings the noise schedule.
        precision: float32, bfloat16 or float16, of the network.

    Source: Luo et al. 2023, Eq. 9; the scalings are those of diffusers' LCMScheduler (sigma_data
        0.5, timesteps times 10), which samples with them.
    """

    def __init__(self, backbone: str, precision: str = "float32") -> None:
        super().__init__()
        self.scheduler = load_scheduler(backbone, "lcm")
        self.run_network = AutocastInferer(precision=precision)

    def __call__(
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        edge: torch.Tensor,
    ) -> torch.Tensor:
        """Clean latents (B, C, h, w) of noisy ones at ``timesteps`` (B,)."""
        output = self.run_network(inputs, network, timesteps, context, edge)
        clean, _ = split_prediction(self.scheduler, output, inputs, timesteps)
        c_skip, c_out = self.scheduler.get_scalings_for_boundary_condition_discrete(timesteps)
        return c_out[:, None, None, None] * clean + c_skip[:, None, None, None] * inputs


class ConsistencyPrepareBatch(ControlPrepareBatch):
    """Noisy latent in; the target is what the student makes of the teacher's next point.

    The teacher goes one step of DDIM down a grid of 50, with guidance. The target carries no
    gradient and comes from the student as it is: an averaged copy, as the paper has it, would cost
    memory and a part of every checkpoint, and the saved weights are an average anyway.

    Args:
        backbone: brings the noise schedule, and the autoencoder where images come.
        teacher: the frozen generator.
        student: the network in training, not wrapped for several processes.
        guidance_scale: of the teacher, with the empty prompt as the negative; 1 is none.
        precision: of both networks.

    Raises:
        ValueError: ``guidance_scale`` is below 1.

    Source: Luo et al. 2023, Sec. 4.2 (one-stage guided distillation, at a fixed scale) and 4.3
        (skipping steps); the grid is that of diffusers' LCMScheduler.
    """

    def __init__(
        self,
        backbone: str,
        teacher: ControlledUNet,
        student: ControlledUNet,
        guidance_scale: float = 1.0,
        precision: str = "float32",
    ) -> None:
        super().__init__(backbone)
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale: {guidance_scale} is not 1 (no guidance) or more")
        self.teacher = teacher
        self.student = student
        self.guidance_scale = guidance_scale
        self.infer = ConsistencyInferer(backbone, precision)
        self.empty_context = embed_prompts(backbone, [""])
        config = self.infer.scheduler.config
        self.stride = config.num_train_timesteps // config.original_inference_steps

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        """(noisy latent, target, (), {timesteps, context, edge}) on ``device``."""
        timestep = (batchdata["timestep"] // self.stride + 1) * self.stride - 1
        noisy, _, _, conditions = super().__call__(
            {**batchdata, "timestep": timestep}, device, non_blocking
        )
        with torch.no_grad():
            nearer, timesteps = self.step(noisy, **conditions)
            target = self.infer(nearer, self.student, **{**conditions, "timesteps": timesteps})
        return noisy, target, (), conditions

    def step(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        edge: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's next point on the grid, (B, C, h, w), and its timesteps (B,)."""
        output = self._guided(noisy, timesteps, context, edge)
        scheduler = self.infer.scheduler
        clean, noise = split_prediction(scheduler, output, noisy, timesteps)
        nearer = (timesteps - self.stride).clamp(min=0)
        return scheduler.add_noise(clean, noise, nearer), nearer

    def _guided(self, noisy, timesteps, context, edge) -> torch.Tensor:
        """The teacher's output, with guidance as a batch of two halves."""
        run = self.infer.run_network
        if self.guidance_scale == 1:
            return run(noisy, self.teacher, timesteps, context, edge)
        empty = self.empty_context.to(context).expand_as(context)
        noisy, timesteps, edge = (torch.cat([part, part]) for part in (noisy, timesteps, edge))
        output = run(noisy, self.teacher, timesteps, torch.cat([empty, context]), edge)
        negative, positive = output.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

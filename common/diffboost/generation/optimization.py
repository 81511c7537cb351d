"""Training at scale: accumulated gradients, optimizers, schedules, and what a device can do."""

from contextlib import nullcontext
from importlib.util import find_spec

import torch
from diffusers.optimization import get_scheduler
from monai.engines import IterationEvents, SupervisedTrainer
from monai.utils import CommonKeys
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from diffboost.knobs import nearest
from diffboost.precision import autocast_dtype
from diffboost.processes import ShareOfLoss

OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("one_cycle", "constant")
FUSED_DEVICES = ("cpu", "cuda")  # whose AdamW is one kernel in torch


def check_scale(
    device: str | torch.device,
    precision: str = "float32",
    accumulation: int = 1,
    compile: bool = False,
    optimizer_name: str = "adamw",
    schedule: str = "one_cycle",
) -> None:
    """Refuse wishes that the device can't meet; stands in ``run`` before data is read.

    Args:
        device: where training will run.
        precision: float32, bfloat16 or float16; float16 needs a CUDA device.
        accumulation: batches whose gradients are summed before a step, at least 1.
        compile: torch.compile the network; needs a compiler that works on this machine.
        optimizer_name: adamw or adamw8bit; the latter needs bitsandbytes and a CUDA device.
        schedule: one_cycle or constant.

    Raises:
        ValueError: a value is unknown, or the device can't meet it.

    Source: engineering choice (issue 3, "Bad input").
    """
    device = torch.device(device)
    _refuse_unknown("optimizer_name", optimizer_name, OPTIMIZERS)
    _refuse_unknown("schedule", schedule, SCHEDULES)
    if accumulation != int(accumulation) or accumulation < 1:
        raise ValueError(f"accumulation: {accumulation} is no whole number of 1 or more")
    dtype = autocast_dtype(precision)
    if dtype == torch.float16 and device.type != "cuda":
        raise ValueError(
            f"precision: float16 needs a CUDA device, for its loss is scaled; {device} can "
            "float32 and bfloat16"
        )
    if dtype == torch.bfloat16 and device.type == "cuda" and not _has_bfloat16():
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision: {name} has no bfloat16; it can float32 and float16")
    if optimizer_name == "adamw8bit":
        _check_eight_bits(device)
    if compile:
        _try_compiler(device)


def _refuse_unknown(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}: {value!r} is not known; {nearest(value, allowed)}")


def _check_eight_bits(device: torch.device) -> None:
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "optimizer_name: adamw8bit needs bitsandbytes, which is not installed: "
            "`pip install bitsandbytes`; adamw needs nothing"
        )
    if device.type != "cuda":
        raise ValueError(f"optimizer_name: adamw8bit needs a CUDA device, this is {device}")


def _has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _try_compiler(device: torch.device) -> None:
    """Compiles a line of code, which tells a missing compiler before data is read."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # the compilers behind it raise what they like
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"compile: torch.compile does not work for {device} on this machine ({reason}); "
            "it needs a C++ compiler (g++) on a CPU, Triton on a GPU"
        ) from error


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The network's parameters that require gradients."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def build_optimizer(network: nn.Module, optimizer_name: str, lr: float) -> Optimizer:
    """AdamW with torch's defaults over what is trained, its states in 32 or 8 bits.

    One kernel updates all parameters of a device that has it.

    Args:
        network: its parameters that require gradients are trained.
        optimizer_name: adamw, or adamw8bit (bitsandbytes): a quarter of the states' memory.
        lr: learning rate, by torch's name, which federated clients set; no batch size changes it.

    Raises:
        ValueError: ``optimizer_name`` is unknown.

    Source: released code (facts 3: AdamW defaults).
    """
    _refuse_unknown("optimizer_name", optimizer_name, OPTIMIZERS)
    if optimizer_name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # optional, for CUDA alone

        return AdamW8bit(trained_parameters(network), lr=lr)
    parameters = trained_parameters(network)
    fused = all(parameter.device.type in FUSED_DEVICES for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=lr, fused=fused)


def build_schedule(
    optimizer: Optimizer, schedule: str, learning_rate: float, num_steps: int
) -> LRScheduler:
    """The learning rate over the steps of a run.

    Args:
        optimizer: gets the rates.
        schedule: one_cycle (5 % warm-up, of two steps at least, then cosine decay to zero; as in
            torch, AdamW's first beta runs against it, from 0.95 to 0.85 and back) or constant
            (facts 3; the first beta stays).
        learning_rate: the peak, or the constant.
        num_steps: optimizer steps of the whole run.

    Raises:
        ValueError: ``schedule`` is unknown.

    Source: engineering choice; facts 3 for constant.
    """
    _refuse_unknown("schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return get_scheduler("constant", optimizer)
    steps = max(num_steps, 3)  # torch's schedule divides by the steps of each part less one
    return OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=max(0.05, 2 / steps)
    )


class AccumulatingTrainer(SupervisedTrainer):
    """MONAI's trainer, with batches that are cut into ``accumulation`` parts for memory's sake.

    The loader gives the whole batch of a step, and its gradient is the whole batch's, also in an
    epoch's last, smaller one. MONAI's own ``accumulation_steps`` makes each part an iteration: it
    would count the schedule, the averaged weights and the log in parts, weight uneven parts
    alike, divide an incomplete last group by the full number, and let processes exchange gradients
    at every part.

    Args:
        accumulation: parts of a batch; 1 is MONAI's trainer as it is.
        kwargs: see ``monai.engines.SupervisedTrainer``.

    Source: engineering choice.
    """

    def __init__(self, accumulation: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        self.accumulation = accumulation

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, torch.Tensor]) -> dict:
        """One step: gradients of all parts, then the optimizer."""
        if self.accumulation == 1:
            return super()._iteration(engine, batchdata)
        size = len(next(iter(batchdata.values())))
        split = [value.tensor_split(min(self.accumulation, size)) for value in batchdata.values()]
        loss, share = self.loss_function, 1.0
        if isinstance(loss, ShareOfLoss):  # asks the other processes, who may have fewer parts
            loss, share = loss.loss, loss.share(size, self.state.device)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=self.optim_set_to_none)
        total = 0.0
        for number, part in enumerate(zip(*split, strict=True), start=1):
            waits = hasattr(self.network, "no_sync") and number < len(split[0])
            with self.network.no_sync() if waits else nullcontext():
                part_loss = self._add_gradients(
                    dict(zip(batchdata, part, strict=True)), loss, share / size
                )
            total = total + part_loss
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        engine.state.output[CommonKeys.LOSS] = total
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _add_gradients(self, part: dict, loss, weight) -> torch.Tensor:
        """Adds a part's gradients to those that are there; gives its share of the loss."""
        inputs, targets, args, kwargs = self.prepare_batch(
            part, self.state.device, self.non_blocking, **self.to_kwargs
        )
        prediction = self.inferer(inputs, self.network, *args, **kwargs)
        part_loss = loss(prediction, targets) * (weight * len(inputs))
        (part_loss if self.scaler is None else self.scaler.scale(part_loss)).backward()
        self.state.output = {
            CommonKeys.IMAGE: inputs,
            CommonKeys.LABEL: targets,
            CommonKeys.PRED: prediction.detach(),
        }
        return part_loss.detach()

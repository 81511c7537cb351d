"""What a device computes: its peak a precision, and how much of it this work reaches."""

import time
from dataclasses import dataclass

import torch
from torch.nn.functional import conv2d

from diffboost.knobs import nearest

PROBE_SECONDS = 2.0
PRECISIONS = ("float32", "tfloat32", "bfloat16", "float16")
GPU_UTILIZATION = dict.fromkeys(PRECISIONS, 0.4)
# Of steps of tiny generators and segmenters, one thread; 16 bit mostly waits for norms and copies.
CPU_UTILIZATION = {"float32": 0.5, "tfloat32": 0.5, "bfloat16": 0.12, "float16": 0.12}


@dataclass(frozen=True)
class Device:
    """A device: FLOP/s at its best and the part of it assumed to be reached, by precision; memory.

    Source: engineering choice
    """

    name: str
    peak_flops: dict[str, float]
    utilization: dict[str, float]
    memory_bytes: float | None
    origin: str

    def hours(self, flops: float, precision: str) -> float:
        """Hours that so many FLOPs take."""
        return flops / (self.peak_flops[precision] * self.utilization[precision]) / 3600


def _gpu(name: str, memory_gb: int, *peak_tflops: float) -> Device:
    peak = {key: 1e12 * peak for key, peak in zip(PRECISIONS, peak_tflops, strict=True)}
    origin = "NVIDIA's data sheet, dense; tfloat32 where a config allows it"
    return Device(name, peak, GPU_UTILIZATION, memory_gb * 1e9, origin)


GPUS = {
    "a6000": _gpu("a6000", 48, 38.7, 77.4, 154.8, 154.8),
    "a100": _gpu("a100", 80, 19.5, 156.0, 312.0, 312.0),
    "h100": _gpu("h100", 80, 66.9, 494.7, 989.4, 989.4),
}
DEVICE_NAMES = ("cpu", *GPUS)


def find_device(name: str) -> Device:
    """A device by name; ``cpu`` is this machine's, whose speed is measured for two seconds.

    Args:
        name: cpu, a6000, a100 or h100.

    Raises:
        ValueError: another name; says which is nearest.

    Source: data sheets of NVIDIA; utilization: engineering choice
    """
    if name not in DEVICE_NAMES:
        raise ValueError(f"device: {name!r} is unknown; {nearest(name, DEVICE_NAMES)}")
    if name != "cpu":
        return GPUS[name]
    peak = {
        "float32": (float32 := _measured(torch.float32)),
        "tfloat32": float32,
        "bfloat16": _measured(torch.bfloat16),
        "float16": _measured(torch.float16),
    }
    threads = torch.get_num_threads()
    origin = f"measured now, convolutions on {threads} thread{'s' if threads > 1 else ''}"
    return Device("cpu", peak, CPU_UTILIZATION, None, origin)


def _measured(dtype: torch.dtype, channels: int = 64, side: int = 32, batch: int = 4) -> float:
    """FLOP/s of this machine in convolutions of a middle size, the best of a short while."""
    images = torch.randn(batch, channels, side, side).to(dtype)
    weights = torch.randn(channels, channels, 3, 3).to(dtype)
    flops = 2 * 9 * channels**2 * side**2 * batch
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS / 3
    with torch.inference_mode():
        while time.perf_counter() < end:
            start = time.perf_counter()
            conv2d(images, weights, padding=1)
            best = min(best, time.perf_counter() - start)
    return flops / best

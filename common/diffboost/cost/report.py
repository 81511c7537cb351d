"""The plan of a study as a table for people and as JSON for programs."""

import json
from collections.abc import Sequence

import pandas as pd

from diffboost.cost.devices import Device
from diffboost.cost.stage import Stage

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
ASSUMPTIONS = (
    "FLOPs: 2 a multiply-add of convolutions, linear layers and attention, counted in real passes "
    "(backward and recomputed ones too) on the meta device; norms, losses and loading are not.",
    "Memory: weights (with their running average), gradients and optimizer states are exact (8-bit "
    "states: a quarter); activations are the largest sum of live tensors in a step in float32 with "
    "fused attention, an upper bound where a stage runs in 16 bit; what allocator and kernels take "
    "comes on top.",
    "Disk: latents and model.pt are exact; PNG are taken at their raw size, an upper bound.",
    "Hours: of one device, without starting up, reading files, augmentation and metrics; several "
    "devices share them.",
)


def rows(stages: Sequence[Stage], device: Device) -> pd.DataFrame:
    """A row a run, in FLOPs, bytes and hours.

    Args:
        stages: of ``StudyCost``.
        device: what the hours are for.

    Source: engineering choice
    """
    return pd.DataFrame(
        {
            "stage": stage.stage,
            "what": stage.what,
            "fold": stage.fold,
            "seed": stage.seed,
            "images": stage.images,
            "steps": stage.steps,
            "batch_size": stage.unit.batch_size,
            "precision": stage.unit.precision,
            "flops": stage.flops,
            "flops_per_image": stage.unit.flops,
            "weight_bytes": stage.unit.weight_bytes,
            "gradient_bytes": stage.unit.gradient_bytes,
            "optimizer_bytes": stage.unit.optimizer_bytes,
            "activation_bytes": stage.unit.activation_bytes,
            "disk_bytes": stage.disk_bytes,
            "hours": device.hours(stage.flops - stage.float32_flops, stage.unit.precision)
            + device.hours(stage.float32_flops, "float32"),
        }
        for stage in stages
    ).astype({"fold": "Int64", "seed": "Int64"})


def table(runs: pd.DataFrame) -> str:
    """The runs as an aligned table: folds, seeds, and arms of equal cost, in one row.

    Args:
        runs: of ``rows``.

    Source: engineering choice
    """
    total = _together(runs)
    trained = total.gradient_bytes + total.optimizer_bytes
    memory = total.weight_bytes + trained + total.activation_bytes
    sums = ["runs", "images", "steps", "flops", "disk_bytes", "hours"]
    total.loc[len(total)] = {"stage": "total", "what": ""} | total[sums].sum().to_dict()
    shown = pd.DataFrame(
        {
            "stage": total.stage,
            "arm, setting": total.what,
            "runs": total.runs.map("{:.0f}".format),
            "images": total.images.map("{:,.0f}".format),
            "steps": [f"{number:,.0f}" if number else "" for number in total.steps],
            "FLOP": total.flops.map(scaled),
            "weights": total.weight_bytes.map(_bytes),
            "grad+optim": trained.reindex(total.index).map(_bytes),
            "activations": total.activation_bytes.map(_bytes),
            "memory": memory.reindex(total.index).map(_bytes),
            "disk": total.disk_bytes.map(_bytes),
            "hours": total.hours.map(_hours),
        }
    )
    return aligned(shown, left=2)


def _together(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a stage and arm, folds and seeds added up; arms of equal cost in one row."""
    sums = {name: (name, "sum") for name in ("images", "steps", "flops", "disk_bytes", "hours")}
    kinds = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
    peaks = {name: (name, "max") for name in kinds}
    arms = runs.groupby(["stage", "what"], sort=False)
    arms = arms.agg(runs=("stage", "size"), **sums, **peaks).reset_index()
    equal = arms.groupby(["stage", "runs", *sums, *peaks], sort=False)
    number = equal.what.transform("size")
    for name in ("runs", *sums):
        arms[name] *= number
    arms["what"] = equal.what.transform(_listed)
    return arms.drop_duplicates().reset_index(drop=True)


def _listed(names: pd.Series) -> str:
    """The names, or the first two and how many more."""
    more = len(names) - 2
    return ", ".join(names) if more < 2 else f"{', '.join(names[:2])} and {more} more"


def aligned(shown: pd.DataFrame, left: int) -> str:
    """Text columns of equal width; the first ``left`` of them begin at the left."""
    lines = [list(shown.columns), *shown.values.tolist()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def scaled(number: float) -> str:
    """A number with a prefix, three digits: 1.17 T."""
    for size, prefix in PREFIXES:
        if number >= size:
            return f"{number / size:.3g} {prefix}" if number < 1e21 else f"{number:.2e} "
    return f"{number:.3g} "


def _bytes(number: float) -> str:
    return "" if pd.isna(number) or not number else scaled(number) + "B"


def _hours(number: float) -> str:
    return f"{number:.2f}" if number >= 0.01 else "< 0.01"


def assumptions(device: Device, data: str) -> list[str]:
    """What the figures rest on, in sentences.

    Args:
        device: whose peak and utilization are stated.
        data: where the number of slices comes from.

    Source: engineering choice
    """
    shares = [
        f"{device.utilization[name]:.0%} of {scaled(flops)}FLOP/s in {name}"
        for name, flops in device.peak_flops.items()
    ]
    stated = f"Device {device.name}: {', '.join(shares)} are assumed ({device.origin})."
    return [f"Data: {data}.", stated, *ASSUMPTIONS]


def warnings(runs: pd.DataFrame, device: Device) -> list[str]:
    """Stages whose memory may be more than the device has."""
    if device.memory_bytes is None:
        return []
    kinds = ["weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes"]
    memory = runs[kinds].sum(axis=1).groupby(runs.stage, sort=False).max()
    return [
        f"{stage}: up to {_bytes(number)}, {device.name} has {_bytes(device.memory_bytes)}; a "
        "smaller batch_size (with accumulation), gradient_checkpointing or 16 bit need less"
        for stage, number in memory.items()
        if number > device.memory_bytes
    ]


def as_json(runs: pd.DataFrame, device: Device, name: str, stated: list[str]) -> str:
    """The runs, their totals and the assumptions as JSON."""
    totals = {key: float(runs[key].sum()) for key in ("flops", "disk_bytes", "hours", "images")}
    content = {
        "experiment": name,
        "device": device.name,
        "peak_flops": device.peak_flops,
        "utilization": device.utilization,
        "stages": runs.astype(object).where(runs.notna(), None).to_dict("records"),
        "total": totals,
        "assumptions": stated,
    }
    return json.dumps(content, indent=1) + "\n"

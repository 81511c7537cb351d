"""One run of a stage, with what it costs: a row of a study's plan."""

from dataclasses import dataclass

from diffboost.cost.units import Unit


@dataclass(frozen=True)
class Stage:
    """One run of a stage.

    Args:
        stage: prepare, latents, finetune, synthesize, train_segmentation, evaluate …
        what: arm, setting or network, where there are several.
        fold, seed: of the run; None where it has none.
        images: passes of an image through the stage's network.
        steps: updates of weights; 0 where nothing is trained.
        unit: FLOPs an image, and memory.
        flops: of the whole run.
        disk_bytes: of what it writes.
        float32_flops: those of ``flops`` that are in float32, whatever the unit's precision.
    """

    stage: str
    what: str
    fold: int | None
    seed: int | None
    images: int
    steps: int
    unit: Unit
    flops: float
    disk_bytes: int
    float32_flops: float = 0.0


def plain_stage(
    stage: str,
    images: int,
    unit: Unit,
    what: str = "",
    fold: int | None = None,
    seed: int | None = None,
    steps: int = 0,
    disk_bytes: int = 0,
) -> Stage:
    """A stage that does nothing but pass images: its FLOPs are those of a unit each.

    Args:
        stage, images, unit, what, fold, seed, steps, disk_bytes: see :class:`Stage`.

    Source: engineering choice.
    """
    flops = images * unit.flops
    return Stage(stage, what, fold, seed, images, steps, unit, flops, disk_bytes)

"""What a study orders where its ratio is to be chosen: `ratio: auto` in an experiment file."""

from collections.abc import Mapping
from pathlib import Path

from diffboost.plans import SYNTHETIC_THEN_REAL, Experiment, ablated_knobs, uses_variants
from diffboost.ratio.budget import read_budget, rungs_up_to

AUTO = "auto"


def is_auto(experiment: Experiment) -> bool:
    """Whether the study chooses its ratio itself."""
    return experiment.synthesis.get("ratio") == AUTO


def fixed_knobs(synthesis: Mapping) -> dict:
    """The knobs of synthesis without a ratio that is to be chosen."""
    return {key: value for key, value in synthesis.items() if (key, value) != ("ratio", AUTO)}


def probe_arm(experiment: Experiment) -> str | None:
    """The arm by which the ratio is chosen: the study's first that trains on variants at once.

    Source: engineering choice
    """
    arms = [arm for arm in experiment.arms if uses_variants(arm) and arm != SYNTHETIC_THEN_REAL]
    return arms[0] if arms else None


def check_auto_ratio(experiment: Experiment, path: Path) -> None:
    """Raises ValueError where a study can not choose its ratio.

    Args:
        experiment: the study.
        path: of its file, for the message.

    Source: engineering choice
    """
    if not is_auto(experiment):
        if experiment.auto_ratio:
            raise ValueError(
                f"{path}: auto_ratio: {experiment.auto_ratio!r}; needs synthesis: ratio: auto, "
                f"not {experiment.synthesis.get('ratio')!r}"
            )
        return
    try:
        read_budget(experiment.auto_ratio.get("budget", {"share": 1}))
        rungs_up_to(experiment.auto_ratio.get("max_ratio", 2))
    except ValueError as error:
        raise ValueError(f"{path}: auto_ratio: {error}") from None
    where = f"{path}: synthesis: ratio: auto"
    if probe_arm(experiment) is None:
        raise ValueError(
            f"{where} needs an arm such as diffboost to choose it by; arms: "
            f"{', '.join(experiment.arms)}"
        )
    if experiment.ablations.get("synthesis"):
        knob = next(iter(experiment.ablations["synthesis"]))
        raise ValueError(f"{where}: {knob}: a list; settings would differ in their ratios too")
    if "num_variants" in {*experiment.segmentation, *ablated_knobs(experiment)}:
        raise ValueError(f"{where}: segmentation: num_variants: leave it out; all are used")
    if experiment.segmentation.get("selection") == "test":
        raise ValueError(
            f"{where} needs segmentation: selection: inner_validation; test cases may not choose it"
        )

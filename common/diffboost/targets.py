"""What a study makes: the paper's tables and figures, by name."""

from diffboost.knobs import nearest
from diffboost.plans import Experiment, ablated_knobs, uses_variants

# The paper's tables and figures: the file of each, and what an experiment file needs for it.
TARGETS = {
    "table1": ("tables/table1.csv", "a section pretrain"),
    "table2": ("tables/table2.csv", "arms"),
    "figure4": ("figures/figure4.png", "an arm with variants"),
    "figure6": (
        "figures/figure6.svg",
        "a list in synthesis or segmentation, and arm diffboost",
    ),
    "figure7": ("figures/figure7.svg", "a list of networks"),
}


def ordered_targets(experiment: Experiment) -> list[str]:
    """Those of TARGETS that the experiment makes.

    Source: engineering choice
    """
    knobs = set(ablated_knobs(experiment))
    ordered = {
        "table1": experiment.pretrain is not None,
        "table2": True,
        "figure4": any(uses_variants(arm) for arm in experiment.arms),
        "figure6": bool(knobs - {"network"}) and "diffboost" in experiment.arms,
        "figure7": "network" in knobs,
    }
    return [target for target, is_ordered in ordered.items() if is_ordered]


def check_target(experiment: Experiment, target: str) -> None:
    """Refuses to make what the experiment does not order.

    Args:
        experiment: the study.
        target: `report`, which is all that the experiment orders, or one of TARGETS.

    Raises:
        ValueError: unknown target (says which is nearest), or one that the experiment lacks.

    Source: engineering choice
    """
    if target == "report" or target in ordered_targets(experiment):
        return
    if target not in TARGETS:
        raise ValueError(f"target: {target!r} is unknown; {nearest(target, ['report', *TARGETS])}")
    raise ValueError(
        f"target: {target} needs {TARGETS[target][1]} in the experiment file of {experiment.name}"
    )

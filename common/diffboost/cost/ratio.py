"""FLOPs of choosing a ratio: a variant of every slice, a probe, a whole training."""

import math

from monai.bundle import ConfigParser

from diffboost.cost import units
from diffboost.cost.configs import value
from diffboost.cost.units import Unit
from diffboost.ratio.budget import Price, read_budget, rungs_up_to
from diffboost.ratio.rule import probe_epochs, reach


def passes_of(arm: str, parser: ConfigParser) -> int:
    """Passes of the network a slice and step: two where slice and variant are merged as logits.

    Args:
        arm: of the segmenter.
        parser: of ``parse``, for the segmentation config.

    Source: facts 22
    """
    return 2 if arm.startswith("diffboost") and value(parser, "merge") == "logits" else 1


def training_flops(
    parser: ConfigParser, training: Unit, forward: Unit, num_slices: int, num_checked: int
) -> float:
    """FLOPs of a segmenter's training with the passes that choose its best epoch.

    Args:
        parser: of ``parse``, for the segmentation config; says epochs and ``val_interval``.
        training, forward: a slice's step, and its plain pass.
        num_slices: trained on.
        num_checked: on which the best epoch is chosen.

    Source: engineering choice
    """
    epochs = value(parser, "epochs")
    validations = epochs // min(value(parser, "val_interval"), epochs)
    return epochs * num_slices * training.flops + validations * num_checked * forward.flops


def search_price(
    synthesis: ConfigParser,
    segmentation: ConfigParser,
    arm: str,
    probe_epochs: int,
    num_varied: int,
    num_trained: int,
    num_checked: int,
) -> Price:
    """What the parts of a search for the ratio cost, in FLOPs.

    Edge agreement is left out, and where it is on the quality filter, which judges all variants at
    every step of the search.

    Args:
        synthesis, segmentation: of ``parse``.
        arm: of the probes.
        probe_epochs: of a probe; a whole training has those of the config.
        num_varied: slices that get variants.
        num_trained: slices that a segmenter is trained on.
        num_checked: slices of the inner validation.

    Source: engineering choice
    """
    training = units.segmenter_training(segmentation, passes_of(arm, segmentation))
    forward = units.segmenter_inference(segmentation)
    whole = training_flops(segmentation, training, forward, num_trained, num_checked)
    segmentation["epochs"] = probe_epochs
    probe = training_flops(segmentation, training, forward, num_trained, num_checked)
    return Price(
        variants=num_varied * units.sampling(synthesis).flops,
        probe=probe + num_checked * forward.flops,
        training=whole,
    )


def search_bound(
    synthesis: ConfigParser,
    segmentation: ConfigParser,
    search: ConfigParser,
    arm: str,
    num_varied: int,
    num_trained: int,
    num_checked: int,
    num_checked_cases: int,
) -> tuple[int, int, float, Unit]:
    """The most that a search for the ratio can come to, if no rung ends it.

    A budget in hours is no bound in FLOPs: then it is ``max_ratio``.

    Args:
        synthesis, segmentation, search: of ``parse``, each for its config.
        arm: of the probes.
        num_varied, num_trained, num_checked: slices, see ``search_price``.
        num_checked_cases: those of the inner validation; with few no probes are made.

    Returns:
        The ratio, the slices that all probes on the way there pass in training (0: there are no
        probes), their FLOPs, and what a slice of a probe costs.

    Source: engineering choice
    """
    epochs = probe_epochs(value(search, "epochs"), value(segmentation, "epochs"))
    counts = (num_varied, num_trained, num_checked)
    unit = units.segmenter_training(segmentation, passes_of(arm, segmentation))
    price = search_price(synthesis, segmentation, arm, epochs, *counts)
    budget, rungs = read_budget(value(search, "budget")), rungs_up_to(value(search, "max_ratio"))
    few = num_checked_cases < value(search, "min_cases")
    num_seeds = 0 if few else len(value(search, "seeds"))
    limit = budget.limit(price, rungs[-1]) if budget.counts == "flops" else math.inf
    ratio, probed = reach(rungs, price, limit, num_seeds)
    num_probes = num_seeds * len(probed)
    return ratio, num_probes * epochs * num_trained, num_probes * price.probe, unit

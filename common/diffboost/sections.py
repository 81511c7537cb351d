"""The sections of an experiment file against the configs of their stages, and its arms' epochs."""

import re
from collections.abc import Mapping
from pathlib import Path

from diffboost.data.documents import read_config
from diffboost.knob_values import check_value, refuse_own, set_by_study
from diffboost.knobs import nearest, refuse_unknown
from diffboost.plans import DEFAULT_NETWORK, SYNTHETIC_THEN_REAL, Experiment, ablated_knobs
from diffboost.ratio.study import fixed_knobs

ABLATED = ("synthesis", "segmentation")


def check_networks(experiment: Experiment, config_files: Mapping, path: Path) -> None:
    """Raises ValueError on a network that has no overlay beside the segmentation config."""
    if "segmentation" not in config_files:
        return
    overlays = Path(config_files["segmentation"]).parent.glob("network_*.yaml")
    known = [DEFAULT_NETWORK, *(overlay.stem.removeprefix("network_") for overlay in overlays)]
    networks = experiment.networks
    if not networks or len(set(networks)) < len(networks):
        raise ValueError(f"{path}: network: {networks!r}; a name or different names are needed")
    for network in networks:
        if network not in known:
            raise ValueError(f"{path}: network: {network!r} is unknown; {nearest(network, known)}")


def check_arm_epochs(experiment: Experiment, path: str | Path) -> None:
    """Refuses epochs of an arm that the study lacks, beside an ablation of epochs, or too few.

    Arm synthetic_then_real trains half of its epochs on variants, so it needs two.

    Args:
        experiment: the study.
        path: its file, for the message.

    Raises:
        ValueError: see above.

    Source: engineering choice
    """
    for arm, epochs in experiment.arm_epochs.items():
        if arm not in experiment.arms or type(epochs) is not int or epochs < 1:
            raise ValueError(
                f"{path}: arm_epochs: {arm}: {epochs!r}; arms of the study "
                f"({', '.join(experiment.arms)}) and whole numbers from 1 up are needed"
            )
    if experiment.arm_epochs and "epochs" in ablated_knobs(experiment):
        raise ValueError(
            f"{path}: arm_epochs: beside a list of segmentation: epochs; only one can be"
        )
    halved = experiment.arm_epochs.get(SYNTHETIC_THEN_REAL, experiment.segmentation.get("epochs"))
    if SYNTHETIC_THEN_REAL in experiment.arms and halved == 1:
        raise ValueError(
            f"{path}: epochs: 1; arm {SYNTHETIC_THEN_REAL} trains half of them on variants and "
            "needs 2 or more"
        )


def check_sections(experiment: Experiment, config_files: Mapping, path: Path) -> None:
    """Refuses knobs that a stage lacks or the study sets, and values that the stage would refuse.

    Args:
        experiment: the study.
        config_files: see ``read_experiment``.
        path: the experiment file, for the message.

    Raises:
        ValueError: names section, knob, value and what is allowed.

    Source: engineering choice
    """
    for section, config_file in config_files.items():
        first, _, part = section.partition(".")
        knobs = getattr(experiment, first)
        knobs = (knobs or {}).get(part, {}) if part else knobs
        if not knobs:
            continue
        where = f"{path}: {section.replace('.', ': ')}"
        config = read_config(config_file, "config_file")
        refuse_own(knobs, section, experiment, where)
        for own in set_by_study(section, experiment):
            config.pop(own, None)
        _check_knobs(fixed_knobs(knobs), config, where)
        for knob, values in experiment.ablations.get(section, {}).items():
            for value in values:
                _check_knobs({knob: value}, config, where)


def _check_knobs(section: Mapping, config: Mapping, where: str) -> None:
    """Raises ValueError on a knob that the stage's config lacks, or a value that is not allowed."""
    refuse_unknown(section, [key for key in config if not re.search(r"^\+|::", key)], where)
    for key, value in section.items():
        many = isinstance(value, list | dict) and not isinstance(config[key], type(value))
        one_of_many = isinstance(value, dict) or key == "include"  # of prepare: folders
        if many and not (one_of_many and config[key] is None):
            raise ValueError(
                f"{where}: {key}: {value!r}; one value is needed (lists are ablations in "
                f"{' and '.join(ABLATED)} only)"
            )
        if type(config[key]) in (int, float) and type(value) not in (int, float):
            raise ValueError(f"{where}: {key}: {value!r}; a number is needed (1.0e-5, not 1e-5)")
        if value is None:
            raise ValueError(f"{where}: {key}: has no value; leave the line out for the default")
        if type(config[key]) is bool and key != "amp" and type(value) is not bool:
            raise ValueError(f"{where}: {key}: {value!r}; allowed: true, false")
        check_value(key, value, where)

"""What knobs of a study may be: words, whole numbers, shares; the knobs that the study itself sets.

The words stand here a second time, since the stages' modules import torch and a study is planned
without it; a test holds both equal.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from diffboost.data.documents import read_config
from diffboost.data.tasks import INTENSITY_PER, PROMPT_ORDERS
from diffboost.knobs import nearest
from diffboost.plans import SYNTHETIC_THEN_REAL, Experiment, network_overlay

WORDS = {
    "edges": ("hed-bsds500", "controlnet-hed", "gradient"),
    "fold_order": ("drawn", "listed"),
    "intensity_per": INTENSITY_PER,
    "prompt_order": PROMPT_ORDERS,
    "objective": ("noise", "flow"),
    "schedule": ("one_cycle", "constant"),
    "optimizer_name": ("adamw", "adamw8bit"),
    "precision": ("float32", "bfloat16", "float16"),
    "latent_precision": ("float16", "float32"),
    "scheduler": ("ddim", "dpm++", "unipc", "unipc_karras", "euler", "lcm", "flow"),
    "noise_address": ("case", "variant", "volume"),
    "merge": ("logits", "images"),
    "selection": ("inner_validation", "test"),
    "part": ("training", "inner_validation", "training_fold", "test", "all"),
    "volumes": ("whole", "foreground"),
    "empty_masks": ("stated", "center_pixel"),
    "distances": ("directed", "pooled"),
}
# The least whole number of knobs that count.
COUNTS = dict.fromkeys(("num_workers", "min_foreground_px", "seed"), 0) | dict.fromkeys(
    (
        *("epochs", "batch_size", "accumulation", "num_copies", "num_cases", "num_images"),
        *("ratio", "max_ratio", "num_variants", "num_inference_steps", "patch_size"),
        *("val_interval", "checkpoint_interval", "min_cases"),
    ),
    1,
)
SHARES = ("alpha", "inner_fraction", "empty_prompt", "max_lost", "max_rejected_fraction")
SIZE_STEP = 32  # px

_GENERATOR = ("store_dir", "dataset_dir", "output_dir", "backbone", "image_size", "fold")
_SEGMENTER = ("store_dir", "dataset_dir", "synthetic_dir", "output_dir", "fold", "arm", "seed")
_TREE = ("store_dir", "dataset_dir", "image_size")
_DRAWN = ("store_dir", "dataset_dir", "output_dir", "image_size", "backbone")
SET_BY_STUDY = {
    "prepare": (*_TREE, "task", "edges", "hed_size_px", "num_folds"),
    "finetune": (*_GENERATOR, "num_cases"),
    "unlabelled": _GENERATOR,
    "synthesis": (*_GENERATOR, "num_cases", "generator_dir", "segmenter_dir", "segmenter_configs"),
    "auto_ratio": (
        *(*_GENERATOR, "num_cases", "num_classes", "processes", "generator_dir"),
        *("synthesis_configs", "synthesis_knobs"),
        *("segmenter_configs", "segmenter_knobs", "segmenter_arm"),
    ),
    "segmentation": (*_SEGMENTER, "image_size", "num_classes", "num_cases"),
    "pretrain.prepare": (*_TREE, "edges", "hed_size_px"),
    "pretrain.train": _DRAWN,
    "pretrain.pix2pix": _TREE + ("output_dir",),
    "pretrain.evaluate": (*_DRAWN, "generator_dir", "pix2pix_dir"),
}
# The key of the experiment file that decides such a knob, where it has another name.
KEYS = {"fold": "folds", "seed": "seeds", "arm": "arms", "num_classes": "task"}
KEYS |= {"segmenter_arm": "arms", "segmenter_knobs": "segmentation", "synthesis_knobs": "synthesis"}


def set_by_study(section: str, experiment: Experiment) -> set[str]:
    """The knobs of a section's stage that the study sets, so that its file can not."""
    names = {"bundle_root", *SET_BY_STUDY.get(section, ())}
    half = section == "segmentation" and SYNTHETIC_THEN_REAL in experiment.arms
    return names | ({"weights"} if half else set())


def refuse_own(knobs: Mapping, section: str, experiment: Experiment, where: str) -> None:
    """Refuses knobs that the study itself sets.

    Args:
        knobs: of the section, as the file has them.
        section: of the experiment file; `pretrain.train` for one within pretrain.
        experiment: the study.
        where: the file and section, for the message.

    Raises:
        ValueError: names the knob, its value and the key to use instead.

    Source: engineering choice
    """
    keys = {entry.name for entry in fields(Experiment)}
    for knob in set_by_study(section, experiment) & set(knobs):
        key = KEYS.get(knob, knob)
        place = (
            "pretrain" if "." in section and key in ("image_size", "dataset_dir") else "the file"
        )
        instead = f"use the key `{key}` of {place}" if key in keys else "leave it out"
        raise ValueError(f"{where}: {knob}: {knobs[knob]!r}; the study sets it: {instead}")


def check_value(knob: str, value: object, where: str) -> None:
    """Refuses a value that the knob's stage would refuse, hours later.

    Args:
        knob: its name, which means the same in every section.
        value: one value, no list of an ablation.
        where: the file and section, for the message.

    Raises:
        ValueError: names the knob, the value and what is allowed.

    Source: engineering choice
    """
    where = f"{where}: {knob}: {value!r}"
    if knob in WORDS and value not in WORDS[knob]:
        raise ValueError(f"{where} is unknown; {nearest(value, WORDS[knob])}")
    if knob == "amp" and not (isinstance(value, bool) or value == "auto"):
        raise ValueError(f"{where}; allowed: true, false, auto")
    if knob in COUNTS and not (type(value) is int and value >= COUNTS[knob]):
        raise ValueError(f"{where}; a whole number from {COUNTS[knob]} up is needed")
    if knob in SHARES and not (type(value) in (int, float) and 0 <= value <= 1):
        raise ValueError(f"{where}; a number from 0 to 1 is needed")


def check_image_size(experiment: Experiment, config_files: Mapping, path: Path) -> None:
    """Refuses a size of slices that the generator or one of the study's networks cannot halve.

    Args:
        experiment: the study.
        config_files: see ``read_experiment``.
        path: the experiment file, for the message.

    Raises:
        ValueError: names the size and what is needed.

    Source: engineering choice
    """
    sizes = {"image_size": experiment.image_size}
    own = (experiment.pretrain or {}).get("image_size")
    sizes |= {} if own is None else {"pretrain: image_size": own}
    for key, size in sizes.items():
        if type(size) is not int or size < SIZE_STEP or size % SIZE_STEP:
            raise ValueError(f"{path}: {key}: {size!r}; a multiple of {SIZE_STEP} is needed")
    if "segmentation" not in config_files:
        return
    for network, divisor in _divisors(experiment, Path(config_files["segmentation"])):
        if experiment.image_size % divisor or experiment.image_size < 2 * divisor:
            raise ValueError(
                f"{path}: image_size: {experiment.image_size}; network {network} needs a multiple "
                f"of {divisor} from {2 * divisor} up"
            )


def _divisors(experiment: Experiment, config_file: Path) -> list[tuple[str, int]]:
    """How far each network of a study halves its slices: ``size_divisor`` of its overlay, or by its
    channels, each value of an ablation."""
    config = read_config(config_file, "config_file")
    first = experiment.segmentation.get("channels", config["channels"])
    many = experiment.ablations.get("segmentation", {}).get("channels", [first])
    found = []
    for network in experiment.networks:
        files = network_overlay(config_file, network)
        fixed = [read_config(file, "config_file").get("size_divisor") for file in files]
        divisors = [fixed[0]] if fixed and fixed[0] else [2 ** (len(each) - 1) for each in many]
        found += [(network, divisor) for divisor in divisors]
    return found

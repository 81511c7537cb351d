"""Reads experiment files: what a user writes to order a whole study."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from monai.bundle import ConfigParser

from diffboost.knobs import refuse_unknown
from diffboost.segmentation.merging import split_arm

PROTOCOLS = ("sound",)


@dataclass(frozen=True)
class Experiment:
    """One study: a task, folds x arms x seeds, and the knobs of each stage.

    Args:
        name: names the folder `runs/<name>`; letters, digits, `_`, `-` and `.`.
        task: a task's name, or the path of a task file (relative to the experiment file).
        dataset_dir: folder of the scans, or `phantoms`.
        arms: ways to train the segmenter; `baseline`, which the others are compared with, is one.
        backbone: `tiny`, a hub id or a local folder.
        image_size: side of a prepared slice in pixels.
        edges: edge detector.
        hed_size_px: side to which a slice is enlarged before HED, in pixels; None: prepare's own.
        num_folds: how many folds the cases are dealt into.
        folds: the folds that are run, of 0 … num_folds - 1.
        seeds: a segmenter is trained per seed; the generator is fitted once a fold.
        num_cases: labelled training cases a fold may use, for few-label studies; None: all.
        protocol: `sound`.
        prepare, finetune, synthesis, segmentation: knobs of the stage's config file.

    Source: engineering choice
    """

    name: str
    task: str
    dataset_dir: str
    arms: list[str]
    backbone: str = "tiny"
    image_size: int = 64
    edges: str = "hed-bsds500"
    hed_size_px: int | None = None
    num_folds: int = 3
    folds: list[int] = field(default_factory=lambda: [0])
    seeds: list[int] = field(default_factory=lambda: [0])
    num_cases: int | None = None
    protocol: str = "sound"
    prepare: dict = field(default_factory=dict)
    finetune: dict = field(default_factory=dict)
    synthesis: dict = field(default_factory=dict)
    segmentation: dict = field(default_factory=dict)


def read_experiment(path: str | Path, config_files: Mapping[str, str | Path]) -> Experiment:
    """The experiment that a YAML file describes.

    Args:
        path: the experiment file.
        config_files: for each section, the config file that holds its knobs; a section without one
            is not checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing, unknown (says which is nearest) or has a value not allowed.

    Source: engineering choice
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"experiment: there is no file {path.absolute()}")
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(written, dict):
        raise ValueError(
            f"{path}: an experiment file holds `key: value` lines, name and task first"
        )
    refuse_unknown(written, [entry.name for entry in fields(Experiment)], str(path))
    for key in ("name", "task", "dataset_dir", "arms"):
        if key not in written:
            raise ValueError(f"{path}: `{key}` is missing")
    experiment = Experiment(**written)
    _check_values(experiment, path)
    for section, config_file in config_files.items():
        _check_knobs(getattr(experiment, section), config_file, f"{path}: {section}")
    _check_inner_fraction(experiment, path)
    return experiment


def task_path(experiment: Experiment, experiment_path: str | Path) -> str:
    """The task as stages take it: a name, or a path made absolute from the experiment file."""
    if Path(experiment.task).suffix not in (".yaml", ".yml"):
        return experiment.task
    return str((Path(experiment_path).absolute().parent / experiment.task).resolve())


def bundle_run(config_files: list[str | Path], settings: Mapping, knobs: Mapping) -> str:
    """The shell command of one stage, quoted.

    Args:
        config_files: the config file, then its overlays; the first one's bundle is the root.
        settings: what the study decides, such as folders, fold and seed; None leaves a key out.
        knobs: the experiment's section for this stage.

    Raises:
        ValueError: a knob is one of the settings.

    Source: engineering choice
    """
    files = [str(path) for path in config_files]
    settings = {key: value for key, value in settings.items() if value is not None}
    for key in knobs:
        if key in settings:
            raise ValueError(
                f"`{key}` (value {knobs[key]!r}) is set by the study, not in a section"
            )
    words = ["python", "-m", "monai.bundle", "run"]
    words += ["--config_file", files[0] if len(files) == 1 else repr(files)]
    words += ["--bundle_root", str(Path(files[0]).parents[1])]
    for key, value in (settings | dict(knobs)).items():
        words += [f"--{key}", str(value) if isinstance(value, str | Path) else repr(value)]
    return shlex.join(words)


def _check_inner_fraction(experiment: Experiment, path: Path) -> None:
    """Raises ValueError if the generator would see cases on which a segmenter is selected."""
    sections = ("finetune", "synthesis", "segmentation")
    fractions = {name: getattr(experiment, name).get("inner_fraction") for name in sections}
    if len(set(fractions.values())) > 1:
        raise ValueError(
            f"{path}: inner_fraction: {fractions}; {', '.join(sections)} need the same, or the "
            "generator sees cases on which a segmenter is selected"
        )


def _check_values(experiment: Experiment, path: Path) -> None:
    """Raises ValueError on a value outside what its key allows; the message names both."""
    if not re.fullmatch(r"[\w.-]+", str(experiment.name)):
        raise ValueError(f"{path}: name: {experiment.name!r}; allowed: letters, digits, _ - .")
    if experiment.protocol not in PROTOCOLS:
        raise ValueError(
            f"{path}: protocol: {experiment.protocol!r}; allowed so far: {', '.join(PROTOCOLS)}"
        )
    for key in ("arms", "folds", "seeds"):
        values = getattr(experiment, key)
        if not isinstance(values, list) or not values or len(set(values)) < len(values):
            raise ValueError(f"{path}: {key}: {values!r}; a list of different values is needed")
    for key, low in (("image_size", 8), ("num_folds", 2), ("num_cases", 1), ("hed_size_px", 8)):
        value = getattr(experiment, key)
        if value is not None and not (type(value) is int and value >= low):
            raise ValueError(f"{path}: {key}: {value!r}; a whole number from {low} up is needed")
    for key, end in (("folds", experiment.num_folds), ("seeds", 2**32)):
        for value in getattr(experiment, key):
            if type(value) is not int or not 0 <= value < end:
                raise ValueError(f"{path}: {key}: {value!r}; allowed: 0 to {end - 1}")
    if "baseline" not in experiment.arms:
        raise ValueError(f"{path}: arms: {experiment.arms!r}; `baseline` must be one of them")
    for arm in experiment.arms:
        split_arm(arm)


def _check_knobs(section: Mapping, config_file: str | Path, where: str) -> None:
    """Raises ValueError on a knob that the stage's config lacks, or a value of another kind."""
    if not isinstance(section, dict):
        raise ValueError(f"{where}: {section!r}; `key: value` lines are needed")
    config = ConfigParser.load_config_file(config_file)
    refuse_unknown(section, [key for key in config if not key.startswith("+")], where)
    for key, value in section.items():
        many = isinstance(value, list | dict) and not isinstance(config[key], type(value))
        if many and not (isinstance(value, dict) and config[key] is None):
            raise ValueError(
                f"{where}: {key}: {value!r}; one value is needed (ablations over a list of values "
                "are not built yet)"
            )
        if type(config[key]) in (int, float) and type(value) not in (int, float):
            raise ValueError(f"{where}: {key}: {value!r}; a number is needed (1.0e-5, not 1e-5)")
        if value is None:
            raise ValueError(f"{where}: {key}: has no value; leave the line out for the default")

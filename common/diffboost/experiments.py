"""Reads experiment files: what a user writes to order a whole study."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from diffboost.data.documents import read_config, read_yaml
from diffboost.data.tasks import change_task, read_task
from diffboost.knob_values import check_image_size, check_value
from diffboost.knobs import nearest, refuse_unknown
from diffboost.plans import (
    SYNTHETIC_THEN_REAL,
    Experiment,
    ablated_knobs,
    settings,
)
from diffboost.ratio.study import check_auto_ratio
from diffboost.sections import ABLATED, check_arm_epochs, check_networks, check_sections
from diffboost.segmentation.arms import ARMS
from diffboost.stages import WORKFLOW, stage_configs

# Knobs of prepare that go before the task's own keys.
TASK_KNOBS = ("channel", "labels", "include", "intensity_per", "prompt_order")

SECTIONS = ("prepare", "finetune", "synthesis", "auto_ratio", "segmentation", "evaluate")
PRETRAIN_SECTIONS = ("prepare", "train", "pix2pix", "evaluate")
EVALUATED = ("$", "@", "%", "_target_")  # by MONAI's ConfigParser
SCALES = ("tiny", "sd15")


def read_experiment(
    path: str | Path,
    config_files: Mapping[str, Path] | None = None,
    protocols_dir: Path = WORKFLOW / "protocols",
) -> Experiment:
    """The experiment that a YAML file describes, with its protocol's knobs and lists taken apart.

    Args:
        path: the experiment file.
        config_files: for each section (`pretrain.train` for one within pretrain), the config file
            that holds its knobs; a section without one is not checked. None: `stage_configs`.
        protocols_dir: holds a YAML file a protocol: {section: {knob: value}}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing, unknown (says which is nearest) or has a value not allowed.

    Source: engineering choice
    """
    path = Path(path)
    config_files = stage_configs() if config_files is None else config_files
    written = _read_keys(path)
    sections = _with_protocol(written, protocols_dir, path)
    ablations = _take_lists(sections, config_files, path)
    for section, knobs in (written.get("ablations") or {}).items():
        ablations.setdefault(section, {}).update(knobs)
    experiment = Experiment(**(written | sections | {"ablations": ablations}))
    _check_values(experiment, path)
    check_arm_epochs(experiment, path)
    _check_unlabelled(experiment, path)
    check_networks(experiment, config_files, path)
    _check_ablations(experiment, path)
    check_sections(experiment, config_files, path)
    check_image_size(experiment, config_files, path)
    _check_inner_fraction(experiment, path)
    _check_quality_filter(experiment, path)
    check_auto_ratio(experiment, path)
    _check_selection(experiment, path)
    return experiment


def task_path(experiment: Experiment, experiment_path: str | Path) -> str:
    """The task as stages take it: a name, or a path made absolute from the experiment file."""
    if Path(experiment.task).suffix not in (".yaml", ".yml"):
        return experiment.task
    return str((Path(experiment_path).absolute().parent / experiment.task).resolve())


def study_task(experiment: Experiment, experiment_path: str | Path) -> dict:
    """The task as the study's store has it: with what `prepare` changes in it.

    Raises:
        FileNotFoundError: there is no such task.
        ValueError: a key or value that is not allowed.

    Source: engineering choice
    """
    task = read_task(task_path(experiment, experiment_path))
    return change_task(task, **{key: experiment.prepare.get(key) for key in TASK_KNOBS})


def _read_keys(path: Path) -> dict:
    """The keys of an experiment file, all of them known and the needed ones there."""
    if not path.is_file():
        raise FileNotFoundError(f"experiment: there is no file {path.absolute()}")
    written = read_yaml(path, "experiment")
    if not isinstance(written, dict):
        raise ValueError(
            f"{path}: an experiment file holds `key: value` lines, name and task first"
        )
    refuse_unknown(written, [entry.name for entry in fields(Experiment)], str(path))
    for key in ("name", "task", "dataset_dir", "arms"):
        if key not in written:
            raise ValueError(f"{path}: `{key}` is missing")
    _check_mappings(written, path)
    _refuse_code(written, path)
    return written


def _refuse_code(value: object, path: Path) -> None:
    """Raises ValueError for text that a stage's config would evaluate: a document is no code."""
    if isinstance(value, Mapping):
        _refuse_code([*value, *value.values()], path)
    elif isinstance(value, list):
        for inner in value:
            _refuse_code(inner, path)
    elif isinstance(value, str) and value.startswith(EVALUATED):
        raise ValueError(
            f"{path}: {value!r:.80} would be evaluated as code; allowed are values that begin with "
            "none of $, @, %, _target_; give such a knob on the command line of the stage"
        )


def _check_mappings(written: Mapping, path: Path) -> None:
    """Raises ValueError on a section that is no mapping, and on unknown parts of `pretrain`."""
    for section in (*SECTIONS, "arm_epochs", "pretrain", "unlabelled", "ablations"):
        value = written.get(section, {})
        needed = section in (*SECTIONS, "arm_epochs")
        if not isinstance(value, dict) and (value is not None or needed):
            raise ValueError(f"{path}: {section}: {value!r}; `key: value` lines are needed")
    refuse_unknown(written.get("ablations") or {}, ABLATED, f"{path}: ablations")
    pretrain = written.get("pretrain") or {}
    refuse_unknown(pretrain, ("dataset_dir", "image_size", *PRETRAIN_SECTIONS), f"{path}: pretrain")
    for part in PRETRAIN_SECTIONS:
        if not isinstance(pretrain.get(part, {}), dict):
            raise ValueError(
                f"{path}: pretrain: {part}: {pretrain[part]!r}; `key: value` lines are needed"
            )


def _with_protocol(written: Mapping, protocols_dir: Path, path: Path) -> dict[str, dict]:
    """The file's sections over those of its protocol."""
    protocol = written.get("protocol", "sound")
    known = sorted(found.stem for found in protocols_dir.glob("*.yaml"))
    if protocol not in known:
        raise ValueError(f"{path}: protocol: {protocol!r} is unknown; {nearest(protocol, known)}")
    file = protocols_dir / f"{protocol}.yaml"
    stated = read_yaml(file, "protocol") or {}
    refuse_unknown(stated, SECTIONS, str(file))
    return {name: (stated.get(name) or {}) | written.get(name, {}) for name in SECTIONS}


def _take_lists(sections: dict, config_files: Mapping, path: Path) -> dict[str, dict[str, list]]:
    """Leaves the first value of each ablated knob in its section; gives {section: {knob: list}}.

    A knob that is a list itself, such as the network's channels, is ablated by a list of lists.
    """
    ablations = {}
    for section in ABLATED:
        config = _load(config_files.get(section))
        for knob, values in sections[section].items():
            nested = isinstance(values, list) and any(isinstance(value, list) for value in values)
            plain = isinstance(config.get(knob), list) and not nested
            if not isinstance(values, list) or plain:
                continue
            where = f"{path}: {section}: {knob}: {values!r}"
            if not values or len({repr(value) for value in values}) < len(values):
                raise ValueError(f"{where}; an ablation is a list of different values")
            ablations.setdefault(section, {})[knob] = values
        for knob, values in ablations.get(section, {}).items():
            sections[section] = sections[section] | {knob: values[0]}
    return ablations


def _check_inner_fraction(experiment: Experiment, path: Path) -> None:
    """Raises ValueError if the generator would see cases on which a segmenter is selected."""
    sections = ("finetune", "synthesis", "segmentation")
    fractions = {name: getattr(experiment, name).get("inner_fraction") for name in sections}
    if len(set(fractions.values())) > 1:
        raise ValueError(
            f"{path}: inner_fraction: {fractions}; {', '.join(sections)} need the same, or the "
            "generator sees cases on which a segmenter is selected"
        )
    if "inner_fraction" in ablated_knobs(experiment):
        raise ValueError(f"{path}: inner_fraction: one value is needed, no list")


def _check_unlabelled(experiment: Experiment, path: Path) -> None:
    """Raises ValueError where no training case is unlabelled, or one knob would be given twice."""
    if experiment.unlabelled is None:
        return
    if experiment.num_cases is None:
        raise ValueError(
            f"{path}: unlabelled: the cases beyond num_cases are, but num_cases is not given"
        )
    for knob in ("inner_fraction", "min_foreground_px", "num_cases"):
        if knob in experiment.unlabelled:
            raise ValueError(
                f"{path}: unlabelled: {knob}: all slices of the unlabelled cases are learned from"
            )


def _check_quality_filter(experiment: Experiment, path: Path) -> None:
    """Raises ValueError where the filter would need a segmenter that the test part chose."""
    ablated = experiment.ablations.get("synthesis", {}).get("quality_filter", [])
    values = [experiment.synthesis.get("quality_filter", False), *ablated]
    for value in values:
        if not isinstance(value, bool):
            raise ValueError(f"{path}: synthesis: quality_filter: {value!r}; allowed: true, false")
    if any(values) and experiment.segmentation.get("selection") == "test":
        raise ValueError(
            f"{path}: synthesis: quality_filter: true needs segmentation: selection: "
            "inner_validation; a segmenter that test cases chose may not filter variants"
        )


def _check_selection(experiment: Experiment, path: Path) -> None:
    """Raises ValueError where every training would be refused as a leak, hours later."""
    ablated = experiment.ablations.get("segmentation", {}).get("selection", [])
    selections = [experiment.segmentation.get("selection"), *ablated]
    if "test" in selections and not experiment.segmentation.get("allow_selection_on_test"):
        raise ValueError(
            f"{path}: segmentation: selection: 'test' is refused as a leak, unless "
            "allow_selection_on_test: true stands beside it (protocol paper does); its scores are "
            "too good"
        )


def _check_values(experiment: Experiment, path: Path) -> None:
    """Raises ValueError on a value outside what its key allows; the message names both."""
    for key in ("name", "task", "dataset_dir", "backbone"):
        value = getattr(experiment, key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{path}: {key}: {value!r}; a text is needed, in quotes if a number")
    if not re.fullmatch(r"[\w.-]*[\w-][\w.-]*", experiment.name):
        raise ValueError(f"{path}: name: {experiment.name!r}; allowed: letters, digits, _ - .")
    if experiment.scale not in SCALES:
        raise ValueError(
            f"{path}: scale: {experiment.scale!r}; {nearest(experiment.scale, SCALES)}"
        )
    check_value("edges", experiment.edges, str(path))
    for key in ("arms", "folds", "seeds", "ablation_folds"):
        values = getattr(experiment, key)
        if key == "ablation_folds" and values is None:
            continue
        if not isinstance(values, list) or not values or len(set(values)) < len(values):
            raise ValueError(f"{path}: {key}: {values!r}; a list of different values is needed")
    for key, low in (
        ("image_size", 8),
        ("num_folds", 2),
        ("num_cases", 1),
        ("hed_size_px", 8),
        ("processes", 1),
    ):
        value = getattr(experiment, key)
        if value is not None and not (type(value) is int and value >= low):
            raise ValueError(f"{path}: {key}: {value!r}; a whole number from {low} up is needed")
    for key, end in (("folds", experiment.num_folds), ("seeds", 2**32)):
        for value in getattr(experiment, key):
            if type(value) is not int or not 0 <= value < end:
                raise ValueError(f"{path}: {key}: {value!r}; allowed: 0 to {end - 1}")
    for value in experiment.ablation_folds or []:
        if value not in experiment.folds:
            raise ValueError(f"{path}: ablation_folds: {value!r} is none of folds")
    if "baseline" not in experiment.arms:
        raise ValueError(f"{path}: arms: {experiment.arms!r}; `baseline` must be one of them")
    arms = (*ARMS, SYNTHETIC_THEN_REAL)
    for arm in experiment.arms:
        if arm not in arms:
            raise ValueError(f"{path}: arm: {arm!r} is unknown; {nearest(arm, arms)}")


def _check_ablations(experiment: Experiment, path: Path) -> None:
    """Raises ValueError on an ablation that is ambiguous, or that no arm of the study shows."""
    lists = experiment.ablations
    for knob in set(lists.get("synthesis", {})) & set(lists.get("segmentation", {})):
        raise ValueError(
            f"{path}: {knob}: a list in synthesis and in segmentation; only one can be"
        )
    if "ratio" in lists.get("synthesis", {}) and "num_variants" in experiment.segmentation:
        raise ValueError(
            f"{path}: segmentation: num_variants: is decided by the list of ratio; leave it out"
        )
    for knob, (section, values) in ablated_knobs(experiment).items():
        if section != "network" and "diffboost" not in experiment.arms:
            raise ValueError(
                f"{path}: {section}: {knob}: {values!r}; figure 6 shows what a list does to arm "
                f"diffboost, which is not among the arms: {', '.join(experiment.arms)}"
            )
    folders = [setting.folder for setting in settings(experiment)]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"{path}: two values of an ablation would share the folder {folder}")


def _load(config_file: str | Path | None) -> dict:
    """A config file's content as it is written; nothing for None."""
    return read_config(config_file, "config_file") if config_file else {}

"""Task files: what a data set is (modality, organ, channel, label map, intensity, slices)."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

from diffboost.data.documents import read_yaml
from diffboost.knobs import nearest, refuse_unknown

TASKS_DIR = Path(__file__).parent / "tasks"
LAYOUTS = ("decathlon", "series", "pairs", "radimagenet")
VOLUMES = ("decathlon", "series")  # the others are of pictures
PHANTOMS = "phantoms"  # a dataset_dir that prepare makes on the fly
PHANTOM_LAYOUTS = ("decathlon", "radimagenet")
# The slice axis lies last; the codes name the directions in which rows, columns and slices grow.
AXCODES = {"axial": "RAS", "coronal": "RSA", "sagittal": "ASR"}
INTENSITY_KEYS = {
    "percentile": ("lower", "upper"),
    "window": ("low_hu", "high_hu"),
    "range": ("low", "high"),
}
INTENSITY_PER = ("volume", "slice")  # of which percentiles are taken
PROMPT_ORDERS = ("modality_first", "organ_first")
DEFAULTS = {
    "description": "",
    "modality": "",
    "organ": "",
    "finding": "",
    "labels": {},
    "drop": [],
    "channel": 0,
    "slice_axis": "axial",
    "intensity": {"policy": "percentile", "lower": 0.5, "upper": 99.5},
    "intensity_per": "volume",
    "prompt_order": "modality_first",
    "include": None,
    "download": None,
}
REQUIRED = ("name", "layout")


def task_names() -> list[str]:
    """Names of the tasks that come with the package.

    Source: engineering choice.
    """
    return sorted(path.stem for path in TASKS_DIR.glob("*.yaml"))


def length_unit(task: Mapping) -> str:
    """What distances are in: px for 2D images, whose pixels have no known size; mm for volumes.

    Args:
        task: what ``read_task`` gives.

    Source: engineering choice.
    """
    return "px" if task["layout"] == "pairs" else "mm"


def slicing(task: Mapping) -> dict:
    """What of a task decides which slices are cut from a file, their gray values and classes.

    Args:
        task: what ``read_task`` gives.

    Returns:
        intensity [percentile or range, low, high] and labels (the source values of each class); of
        volumes also channel, slice_axis and, for percentiles, intensity_per.

    Source: engineering choice.
    """
    policy = task["intensity"]["policy"]
    kind = policy if policy == "percentile" else "range"
    limits = [task["intensity"][key] for key in INTENSITY_KEYS[policy]]
    found = {"intensity": [kind, *limits], "labels": list(task["labels"].values())}
    if task["layout"] in VOLUMES:
        per = {"intensity_per": task["intensity_per"]} if kind == "percentile" else {}
        found |= {"channel": task["channel"], "slice_axis": task["slice_axis"], **per}
    return found


def read_task(task: str | Path | Mapping) -> dict:
    """Reads a task, fills in the defaults and checks every key.

    Args:
        task: a shipped name (``hippocampus_mri``), the path of a YAML file, or the mapping itself.

    Returns:
        A new dictionary with the keys name, layout, description, modality, organ, finding,
        labels (ordered name -> source values of class 1, 2, …), drop, channel, slice_axis,
        intensity, include and download (the Medical Segmentation Decathlon's name of the data).

    Raises:
        FileNotFoundError: no such name or file; the nearest name is suggested.
        ValueError: an unknown or missing key, or a value that is not allowed.

    Source: engineering choice (design, "Words").
    """
    if isinstance(task, Mapping):
        given, origin = copy.deepcopy(dict(task)), "task"
    else:
        path = Path(task)
        shipped = TASKS_DIR / f"{task}.yaml"
        path = path if path.suffix in (".yaml", ".yml") else shipped
        if not path.is_file():
            hint = nearest(str(task), task_names())
            raise FileNotFoundError(
                f"task: '{task}' is neither a shipped task nor a .yaml file; {hint}"
            )
        given = read_yaml(path, "task file")
        origin = f"task file {path}"
    if not isinstance(given, dict):
        raise ValueError(f"{origin}: a mapping of keys is needed, got {type(given).__name__}")
    refuse_unknown(given, (*REQUIRED, *DEFAULTS), origin)
    for key in REQUIRED:
        if not given.get(key):
            raise ValueError(f"{origin}: the key '{key}' is missing")
    full = {**copy.deepcopy(DEFAULTS), **given}
    _check_values(full, origin)
    return full


def change_task(
    task: Mapping,
    channel: int | None = None,
    labels: Mapping[str, list[int]] | None = None,
    include: list[str] | None = None,
    intensity_per: str | None = None,
    prompt_order: str | None = None,
) -> dict:
    """A task with another channel, other labels, subfolders, intensities or prompts.

    Args:
        task: a task as ``read_task`` gives it.
        channel: channel to read; None keeps the task's.
        labels: name -> source values in place of the task's (one zone, or each zone a class); the
            task's source values that are not named any more become background. None keeps all.
        include: subfolders to read; None keeps the task's.
        intensity_per: "volume" or "slice", of which percentiles are taken; None keeps the task's.
        prompt_order: "modality_first" or "organ_first"; None keeps the task's.

    Returns:
        A new, checked task.

    Raises:
        ValueError: a value that is not allowed, or a source value that the task does not have.

    Source: facts 35 (MSD prostate has two channels and two zones), 9, 13.
    """
    plain = {"channel": channel, "intensity_per": intensity_per, "prompt_order": prompt_order}
    changed = dict(task) | {key: value for key, value in plain.items() if value is not None}
    if include is not None:
        changed["include"] = list(include)
    if labels is not None:
        if not isinstance(labels, Mapping):
            raise ValueError(f"labels: {labels!r}; a mapping is needed, e.g. {{lesion: [1]}}")
        changed["labels"] = dict(labels)
    changed = read_task(changed)
    if labels is not None:
        known = {value for values in task["labels"].values() for value in values} | set(
            task["drop"]
        )
        named = {value for values in changed["labels"].values() for value in values}
        if named - known:
            raise ValueError(
                f"labels: {dict(labels)}: task '{task['name']}' has the source values "
                f"{sorted(known)}, not {sorted(named - known)}"
            )
        changed["drop"] = sorted(known - named)
    return changed


def _check_values(task: dict, origin: str) -> None:
    """Raises ValueError, naming the key, for a value that is not allowed."""
    for key, allowed in (
        ("layout", LAYOUTS),
        ("slice_axis", AXCODES),
        ("intensity_per", INTENSITY_PER),
        ("prompt_order", PROMPT_ORDERS),
    ):
        if task[key] not in allowed:
            raise ValueError(f"{origin}: {key} '{task[key]}'; {nearest(task[key], allowed)}")
    if not isinstance(task["channel"], int) or task["channel"] < 0:
        raise ValueError(f"{origin}: channel {task['channel']!r}; a whole number from 0 is needed")
    intensity = task["intensity"]
    policy = intensity.get("policy") if isinstance(intensity, dict) else intensity
    if policy not in INTENSITY_KEYS:
        raise ValueError(
            f"{origin}: intensity::policy '{policy}'; {nearest(policy, INTENSITY_KEYS)}"
        )
    if set(intensity) != {"policy", *INTENSITY_KEYS[policy]}:
        raise ValueError(
            f"{origin}: intensity policy '{policy}' takes the keys "
            f"{', '.join(INTENSITY_KEYS[policy])}, got {', '.join(sorted(set(intensity)))}"
        )
    low, high = (intensity[key] for key in INTENSITY_KEYS[policy])
    for limit in (low, high):
        if type(limit) not in (int, float) or not math.isfinite(limit):
            raise ValueError(f"{origin}: intensity: {limit!r:.80}; a number is needed")
    if not low < high:
        raise ValueError(f"{origin}: intensity: {low} must be below {high}")
    if task["layout"] != "radimagenet" and not task["labels"]:
        raise ValueError(f"{origin}: labels is empty; name at least one, e.g. {{lesion: [1]}}")
    if not isinstance(task["labels"], dict):
        raise ValueError(f"{origin}: labels must map a name to its source values")
    seen: dict[int, str] = {0: "background"}
    for name, values in (*task["labels"].items(), ("drop", task["drop"])):
        if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
            raise ValueError(f"{origin}: {name}: {values!r}; a list of whole numbers is needed")
        for value in values:
            if value in seen:
                raise ValueError(f"{origin}: value {value} of '{name}' belongs to '{seen[value]}'")
            seen[value] = name

"""The release of a model that a team trained: what of its run goes into configs and metadata."""

import json
from pathlib import Path

import pandas as pd

from diffboost.data.documents import read_config, read_json
from diffboost.data.slices import SliceStore, read_store
from diffboost.data.tasks import AXCODES, VOLUMES, length_unit, read_task, task_names
from diffboost.generation.backbones import load_config, resolve_backbone
from diffboost.generation.latents import latent_shape
from diffboost.generation.lineage import read_lineage_document
from diffboost.release.blocks import set_blocks, set_section
from diffboost.release.contents import copy_model
from diffboost.release.model import network_def
from diffboost.results import read_case_metrics

CHANGED_CONFIGS = ("inference.yaml", "train.yaml")
# Of run.json: where things lay on the machine of training, and hashes, which lineage.json has.
PRIVATE = ("_dir", "_sha256", "weights")
EXAMPLE_LICENSE = "\nThe phantoms in example/ are drawn by the package diffboost, Apache-2.0.\n"
SCHEDULERS = {"flow": "flow", "consistency": "lcm"}  # of what a generator predicts


def apply_run(release: Path, run: Path, license: str | None) -> dict[str, list[str]]:
    """Puts a run's model into a release of its bundle.

    Args:
        release: the release's folder, with the authored files.
        run: folder with model.pt, lineage.json and run.json, or of a study with one such.
        license: file that says the terms of data and weights; it becomes docs/data_license.txt.

    Returns:
        File -> what was changed in it.

    Raises:
        FileNotFoundError: the run lacks a file, or its slice store is gone.
        ValueError: ``license`` is missing, several models lie below ``run``, or the bundle's
            configs have no place for what the run is.

    Source: engineering choice (issue 4, "Releases").
    """
    if license is None or not Path(license).is_file():
        raise ValueError(
            f"license: {license}: name a text file with the terms of the run's data and weights; "
            "it becomes docs/data_license.txt"
        )
    run = _find_model(run)
    record = read_json(run / "run.json", "run")
    store = read_store(record["store_dir"])
    knobs, overlay = _knobs(release, run, record, store)
    copy_model(run, release)
    changed = {"models/model.pt": ["weights"], "models/lineage.json": ["lineage"]}
    changed |= _change_configs(release, knobs, overlay)
    figures = _figures(run, length_unit(store.header["task"]))
    changed["configs/metadata.json"] = _change_metadata(release, store, knobs, record, figures)
    text = Path(license).read_text(encoding="utf-8").rstrip("\n") + "\n"
    if (release / "example").is_dir():
        text += EXAMPLE_LICENSE
    (release / "docs" / "data_license.txt").write_text(text, encoding="utf-8")
    changed["docs/data_license.txt"] = ["license"]
    changed["docs/README.md"] = _change_readme(release, store, record, figures)
    return changed


def _find_model(run: Path) -> Path:
    """The folder of the one model at or below ``run``."""
    if (run / "model.pt").is_file():
        found = [run]
    else:
        found = sorted(path.parent for path in run.glob("**/run.json")
                       if (path.parent / "model.pt").is_file())  # fmt: skip
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise ValueError(f"run: {run}: the folder of one model.pt is needed; there are: {names}")
    for name in ("lineage.json", "run.json"):
        if not (found[0] / name).is_file():
            raise FileNotFoundError(f"run: {found[0]} has no {name}; a finished run has both")
    return found[0]


def _knobs(release: Path, run: Path, record: dict, store: SliceStore) -> tuple[dict, str | None]:
    """Knobs of the bundle's configs that the run decides; the overlay of its network, if any."""
    header = store.header
    knobs = {"image_size": header["preprocessing"]["image_size"]}
    if "arm" in record:
        task = header["task"]
        knobs |= {"num_classes": len(header["labels"]), "channels": record["channels"]}
        knobs |= {"channel": task["channel"], "slice_axcodes": AXCODES[task["slice_axis"]]}
        knobs |= _intensity(task)
        return knobs, _overlay(release, record["network"], record["num_parameters"], knobs)
    knobs["image_size"] = record["image_size"]
    lineage = read_lineage_document(run / "lineage.json")
    backbone = record["backbone"]
    if Path(resolve_backbone(backbone)).exists() and backbone != "tiny":
        raise ValueError(
            f"run: {run} was trained on the backbone {backbone}, which lies on this machine and "
            "would not be in the release; publish it on the hub, and train with its id"
        )
    knobs |= {"backbone": backbone, "train_base": lineage["train_base"], "task": _task(store)}
    knobs |= {name: header["preprocessing"][name] for name in ("edges", "hed_size_px")}
    if lineage.get("prediction") in SCHEDULERS:
        knobs["scheduler"] = SCHEDULERS[lineage["prediction"]]
    return knobs, None


def _intensity(task: dict) -> dict:
    """The knobs of inference that scale as the task does."""
    policy = task["intensity"]
    if policy["policy"] == "percentile":
        one = task["layout"] not in VOLUMES or task["intensity_per"] == "volume"  # for all slices
        kind = "percentile" if one else "slice_percentile"
        low, high = policy["lower"], policy["upper"]
    else:
        names = ("low_hu", "high_hu") if policy["policy"] == "window" else ("low", "high")
        kind, (low, high) = "range", (policy[name] for name in names)
    return {"intensity": kind, "intensity_low": low, "intensity_high": high}


def _task(store: SliceStore) -> str:
    """The shipped task that a store was made of."""
    for name in task_names():
        if read_task(name) == store.header["task"]:
            return name
    raise ValueError(
        f"run: the task {store.header['name']!r} is none of {', '.join(task_names())} as shipped; "
        "a generator's release needs its prompts: add the task to the package"
    )


def _overlay(release: Path, network: str, num_parameters: int, knobs: dict) -> str | None:
    """The overlay that made a run's network; None for that of the base config."""
    base = release / "configs" / "inference.yaml"
    if read_config(base, "config")["network_def"]["_target_"] == network:
        return None
    overlays = sorted((release / "configs").glob("network_*.yaml"))
    fitting = [path.name for path in overlays
               if read_config(path, "config")["network_def"]["_target_"] == network]  # fmt: skip
    if len(fitting) > 1:  # with residual units or without: the number of weights tells
        sizes = {name: _num_parameters(release, name, knobs) for name in fitting}
        fitting = [name for name in fitting if sizes[name] == num_parameters]
    if len(fitting) != 1:
        raise ValueError(
            f"run: its network is {network} with {num_parameters} parameters; overlays that make "
            f"one: {', '.join(fitting) or 'none'}; write its network_def into train.yaml and "
            "inference.yaml of a bundle of your own"
        )
    return fitting[0]


def _num_parameters(release: Path, overlay: str, knobs: dict) -> int:
    """Weights of the network that inference makes with an overlay and knobs."""
    layer = read_config(release / "configs" / overlay, "config")
    return sum(weight.numel() for weight in network_def(release, **layer, **knobs).parameters())


def _change_configs(release: Path, knobs: dict, overlay: str | None) -> dict[str, list[str]]:
    """Sets knobs, and a network's overlay, in the configs that have them."""
    changed = {}
    for name in CHANGED_CONFIGS:
        path = release / "configs" / name
        if path.is_file():
            layer = release / "configs" / overlay if overlay else None
            text, fields = set_blocks(path, knobs, layer)
            path.write_text(text, encoding="utf-8")
            changed |= {f"configs/{name}": fields} if fields else {}
    return changed


def _figures(run: Path, unit: str) -> dict[str, float]:
    """Measured figures of a run: means over its test cases, else the last row of its training.

    Distances are named by their unit, which metrics.csv calls mm whatever they are in.
    """
    table = run / "metrics.csv"
    if table.is_file():
        scores = read_case_metrics(table)
        means = scores.groupby(["label", "metric"]).value.mean()
        figures = {f"{label}_{metric.replace('_mm', f'_{unit}')}": round(float(value), 4)
                   for (label, metric), value in means.items() if pd.notna(value)}  # fmt: skip
        return {**figures, "num_cases": int(scores.case.nunique())}
    log = run / "training_log.csv"
    if not log.is_file():
        raise FileNotFoundError(f"run: {run} has neither metrics.csv nor training_log.csv")
    last = pd.read_csv(log).iloc[-1].dropna().to_dict()
    return {name: round(float(value), 6) for name, value in last.items()}


def _change_metadata(
    release: Path, store: SliceStore, knobs: dict, record: dict, figures: dict
) -> list[str]:
    """Writes figures, sizes and labels into metadata.json; the keys that were changed."""
    path = release / "configs" / "metadata.json"
    metadata = read_json(path, "metadata")
    formats, header = metadata["network_data_format"], store.header
    task, side = header["task"], knobs["image_size"]
    words = ", ".join(filter(None, (task["modality"], task["organ"])))
    fields = {
        "eval_metrics": figures,
        "data_source": f"{header['name']} ({words}); its terms are in docs/data_license.txt",
    }
    if "arm" in record:
        names = {str(number): str(name) for number, name in header["labels"].items()}
        _resize(formats, [side, side])
        formats["outputs"]["pred"]["num_channels"] = len(names)
        for group in ("outputs", "post_processed_outputs"):
            formats[group]["pred"]["channel_def"] = names
        formats["post_processed_outputs"]["pred"]["value_range"] = [0, len(names) - 1]
        fields["label_classes"] = ", ".join(f"{number} {name}" for number, name in names.items())
        fields["pred_classes"] = f"class index: {fields['label_classes']}"
    else:
        channels, *sides = latent_shape(record["backbone"], side)
        _resize(formats, sides)
        formats["inputs"]["edge"]["spatial_shape"] = [side, side]
        width = load_config(record["backbone"], "unet")["cross_attention_dim"]
        formats["inputs"]["context"]["spatial_shape"] = [width]
        for tensor in (formats["inputs"]["image"], formats["outputs"]["pred"]):
            tensor["num_channels"] = channels
    metadata |= fields
    path.write_text(json.dumps(metadata, indent=4) + "\n", encoding="utf-8")
    return [*fields, "network_data_format"]


def _resize(formats: dict, shape: list[int]) -> None:
    """Sets the size of the image that goes in and of what comes out."""
    for group, name in (
        ("inputs", "image"),
        ("outputs", "pred"),
        ("post_processed_outputs", "pred"),
    ):
        if group in formats:
            formats[group][name]["spatial_shape"] = list(shape)


def _change_readme(release: Path, store: SliceStore, record: dict, figures: dict) -> list[str]:
    """Replaces what the README says of data, training and performance; the sections changed."""
    path = release / "docs" / "README.md"
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    kept = (name for name in record if not name.endswith(PRIVATE) and record[name] is not None)
    knobs = "\n".join(f"| {name} | {json.dumps(record[name])} |" for name in kept)
    sections = {
        "Data": f"Trained on {store.header['name']}; its terms are in `data_license.txt`, and "
        "`models/lineage.json` names every case by its hash.\n",
        "Training configuration": "The knobs that made this model; null ones are left out. GPU "
        f"memory was not measured.\n\n| knob | value |\n|---|---|\n{knobs}\n",
        "Performance": f"Measured with this model:\n\n| figure | value |\n|---|---|\n{rows}\n",
    }
    text = path.read_text(encoding="utf-8")
    for title, body in sections.items():
        text = set_section(text, title, body)
    path.write_text(text, encoding="utf-8")
    return list(sections)

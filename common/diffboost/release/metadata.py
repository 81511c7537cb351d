"""metadata.json: MONAI's schema 20240725, and what the Model Zoo and MONAI Label ask beyond it."""

import re
from collections.abc import Mapping
from pathlib import Path

from diffboost.data.documents import read_json

SCHEMA = "meta_schema_20240725.json"
TEXTS = ("schema", "version", "task", "description", "authors", "copyright", "name")
VERSIONS = ("monai_version", "pytorch_version", "numpy_version")
MAPPINGS = ("changelog", "required_packages_version", "network_data_format")
OPTIONAL = {
    "data_source": str, "data_type": str, "image_classes": str, "label_classes": str,
    "pred_classes": str, "intended_use": str, "eval_metrics": dict, "references": list,
    "supported_apps": dict,
}  # fmt: skip
TENSOR = {
    "type": str, "format": str, "num_channels": int, "spatial_shape": list, "dtype": str,
    "value_range": list,
}  # fmt: skip


def read_metadata(bundle: Path) -> dict:
    """A bundle's metadata.json, checked.

    Args:
        bundle: folder with ``configs/metadata.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a key is missing or of another kind; names all that are.

    Source: MONAI's meta_schema_20240725; CONTRIBUTING.md of model-zoo; MONAILabel infer/bundle.py.
    """
    path = bundle / "configs" / "metadata.json"
    metadata = read_json(path, "metadata")
    wrong = _of_the_schema(metadata) + _of_the_clients(metadata)
    if wrong:
        raise ValueError(f"metadata: {path} does not fit {SCHEMA}: {'; '.join(wrong)}")
    return metadata


def check_changelog(metadata: Mapping) -> None:
    """Refuses a version that the changelog does not tell of.

    Raises:
        ValueError: names the version and what the changelog has.

    Source: model-zoo ci/verify_bundle.py.
    """
    version, changelog = metadata["version"], metadata["changelog"]
    if version not in changelog:
        raise ValueError(
            f"metadata: changelog lacks version {version}; it tells of {', '.join(changelog)}"
        )


def _of_the_schema(metadata: Mapping) -> list[str]:
    """What the schema asks and the metadata lack."""
    wrong = [f"{key}: a text is needed" for key in (*TEXTS, *VERSIONS)
             if not isinstance(metadata.get(key), str) or not metadata[key]]  # fmt: skip
    wrong += [
        f"{key}: a mapping is needed"
        for key in MAPPINGS
        if not isinstance(metadata.get(key), dict) or not metadata[key]
    ]
    wrong += [
        f"{key}: {kind.__name__} is needed"
        for key, kind in OPTIONAL.items()
        if key in metadata and not isinstance(metadata[key], kind)
    ]
    references = _items(metadata.get("references"))
    wrong += [f"references: {item!r} is no text" for item in references if type(item) is not str]
    for key, value in metadata.items():
        if key.endswith("_data_format"):
            wrong += _of_a_network(key, value)
    return wrong


def _items(value: object) -> list:
    return value if isinstance(value, list) else []


def _of_a_network(key: str, value: object) -> list[str]:
    """What is wrong with the inputs and outputs of a network."""
    if not isinstance(value, dict):
        return [f"{key}: a mapping is needed"]
    wrong = []
    for group in ("inputs", "outputs", "post_processed_outputs"):
        members = value.get(group, {} if group.startswith("post") else None)
        if not isinstance(members, dict):
            wrong.append(f"{key}#{group}: a mapping is needed")
            continue
        for name, tensor in members.items():
            if isinstance(tensor, dict):
                wrong += _of_a_tensor(f"{key}#{group}#{name}", tensor)
            elif not isinstance(tensor, str | int | float):
                wrong.append(f"{key}#{group}#{name}: {type(tensor).__name__} is not allowed")
    return wrong


def _of_a_tensor(where: str, tensor: Mapping) -> list[str]:
    """What is wrong with the description of a tensor."""
    wrong = [
        f"{where}#{key}: {kind.__name__} is needed"
        for key, kind in TENSOR.items()
        if not isinstance(tensor.get(key), kind) or isinstance(tensor[key], bool)
    ]
    sides = _items(tensor.get("spatial_shape"))
    wrong += [f"{where}#spatial_shape: {side!r}" for side in sides if type(side) not in (int, str)]
    ends = _items(tensor.get("value_range"))
    wrong += [f"{where}#value_range: {end!r}" for end in ends if type(end) not in (int, float)]
    if not isinstance(tensor.get("is_patch_data", False), bool):
        wrong.append(f"{where}#is_patch_data: bool is needed")
    if not isinstance(tensor.get("channel_def", {}), dict):
        wrong.append(f"{where}#channel_def: dict is needed")
    return wrong


def _of_the_clients(metadata: Mapping) -> list[str]:
    """What the zoo's checks and MONAI Label ask: digits, names, ``image`` in and ``pred`` out."""
    wrong = []
    if not str(metadata.get("schema")).endswith(SCHEMA):
        wrong.append(f"schema: {metadata.get('schema')!r} is not that of {SCHEMA}")
    if re.search(r"_v", str(metadata.get("name"))):
        wrong.append(f"name: {metadata['name']!r} has '_v', behind which MONAI looks for a version")
    versions = {key: metadata.get(key) for key in VERSIONS}
    packages = metadata.get("required_packages_version")
    versions |= packages if isinstance(packages, dict) else {}
    wrong += [f"{key}: {value!r} is no exact version" for key, value in versions.items()
              if not re.fullmatch(r"\d+(\.\d+)+(\.?\w+)?", str(value))]  # fmt: skip
    formats = metadata.get("network_data_format")
    for group, first in (("inputs", "image"), ("outputs", "pred")):
        members = formats.get(group) if isinstance(formats, dict) else None
        if not isinstance(members, dict) or not isinstance(members.get(first), dict):
            wrong.append(f"network_data_format#{group}: a tensor {first!r} is needed")
        elif next(iter(members)) != first:
            wrong.append(f"network_data_format#{group}: {first!r} must come first")
        elif not all(isinstance(n, str) for n in members[first].get("channel_def", {}).values()):
            wrong.append(f"network_data_format#{group}#{first}#channel_def: names must be text")
    return wrong

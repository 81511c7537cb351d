"""JSON twins: what a YAML config says, in the format that `monai.bundle.load` and others read."""

import json
from pathlib import Path

from diffboost.data.documents import read_config

TWINNED = ("train", "evaluate", "inference", "multi_gpu_train")  # what clients read, by its name


def json_twin(yaml_path: str | Path) -> str:
    """The content of a YAML config as JSON, indented by 4 as the Model Zoo formats it.

    Args:
        yaml_path: the config; its knobs keep their order.

    Returns:
        The text of the file ``<name>.json``, with a newline at its end.

    Raises:
        ValueError: JSON cannot say the same, such as a key that is no text, or a date.

    Source: engineering choice (clients read JSON; people read YAML).
    """
    content = read_config(yaml_path, "config")
    try:
        text = json.dumps(content, indent=4, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: {yaml_path} has no JSON twin: {error}") from error
    if json.loads(text) != content:
        raise ValueError(f"config: {yaml_path} has no JSON twin: keys must be text")
    return text

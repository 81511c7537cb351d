"""A trained segmenter, built as its own config files say."""

from collections.abc import Sequence
from pathlib import Path

import torch
from monai.bundle import ConfigParser

from diffboost.data.documents import read_json


def read_record(segmenter_dir: str | Path) -> dict:
    """The settings of the run that trained a segmenter.

    Args:
        segmenter_dir: its folder.

    Raises:
        FileNotFoundError: model.pt, run.json or lineage.json is missing.

    Source: engineering choice.
    """
    folder = Path(segmenter_dir)
    for name in ("model.pt", "run.json", "lineage.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"segmenter_dir: {folder} has no {name}; training of a segmenter writes it"
            )
    return read_json(folder / "run.json", "segmenter_dir")


def load_segmenter(
    segmenter_dir: str | Path,
    config_files: str | Path | Sequence[str | Path],
    num_classes: int,
    device: str | torch.device = "cpu",
) -> torch.nn.Module:
    """A trained segmenter, ready to predict.

    Args:
        segmenter_dir: folder with model.pt, run.json and lineage.json.
        config_files: those that trained it, the config and its overlays; of them only
            ``network_def`` is made, with the knobs of run.json.
        num_classes: of its output, with background.
        device: where it is put.

    Returns:
        The network: (B, 1, H, W) to logits (B, num_classes, H, W).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the config files make another network than the one that was trained.

    Source: engineering choice.
    """
    record = read_record(segmenter_dir)
    files = [config_files] if isinstance(config_files, str | Path) else list(config_files)
    for path in files:
        if not Path(path).is_file():
            raise FileNotFoundError(f"segmenter_configs: there is no file {path}")
    parser = ConfigParser()
    parser.read_config([str(path) for path in files])
    # `network` is the class's name in run.json, and the network itself in the config
    knobs = {key: value for key, value in record.items() if key in parser and key != "network"}
    for key, value in (knobs | {"num_classes": num_classes}).items():
        parser[key] = value
    network = parser.get_parsed_content("network_def")
    made = (type(network).__name__, sum(weight.numel() for weight in network.parameters()))
    trained = (record["network"], record["num_parameters"])
    if made != trained:
        raise ValueError(
            f"segmenter_configs: {', '.join(map(str, files))} make {made[0]} of {made[1]} "
            f"parameters, but {segmenter_dir} holds {trained[0]} of {trained[1]}; name the files "
            "that trained it, overlays included"
        )
    state = torch.load(Path(segmenter_dir) / "model.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(state.get("model", state))
    return network.to(device).requires_grad_(False).eval()

"""models/model.pt of a release: made from the backbone where a bundle ships none, and checked."""

import functools
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import nn

from diffboost.data.documents import read_config
from diffboost.data.weights import read_state
from diffboost.files import save_tensors, write_aside
from diffboost.generation.backbones import backbone_sha256, resolve_backbone
from diffboost.generation.lineage import read_lineage, write_lineage

NAME = "models/model.pt"


def network_def(release: Path, **overrides: object) -> nn.Module:
    """The network that a release's inference builds. Evaluates the config: for one's own alone.

    Args:
        release: folder with ``configs/inference.yaml``.
        **overrides: knobs to change.

    Raises:
        ValueError: the config has no ``network_def``, or it builds no network.

    Source: engineering choice.
    """
    config = read_config(release / "configs" / "inference.yaml", "config")
    if "network_def" not in config:
        raise ValueError(f"config: {release}/configs/inference.yaml has no network_def")
    parser = ConfigParser({**config, "bundle_root": str(release), **overrides})
    network = parser.get_parsed_content("network_def")
    if not isinstance(network, nn.Module):
        raise ValueError(f"config: network_def of {release} is a {type(network).__name__}")
    return network


def write_base_model(release: Path) -> None:
    """Writes the model.pt of a bundle that ships none: what its network is by its backbone alone.

    Weights are kept in float16 where that loses nothing, as the shipped backbone has them.

    Args:
        release: folder with ``configs/inference.yaml``.

    Raises:
        FileNotFoundError: the bundle has no backbone to take weights from.

    Source: engineering choice (every client expects a model.pt of network_def).
    """
    config = read_config(release / "configs" / "inference.yaml", "config")
    backbone = config.get("backbone")
    if not isinstance(backbone, str):
        raise FileNotFoundError(f"bundle: no {NAME}, and inference.yaml names no backbone")
    from_folder = config["network_def"].get("generator_dir") is not None
    state = network_def(release, **({"generator_dir": None} if from_folder else {})).state_dict()
    state = {name: _smallest(value) for name, value in state.items()}
    target = release / NAME
    write_aside(target, functools.partial(save_tensors, state))
    before = Path(resolve_backbone(backbone)) / "lineage.json"
    ancestors = [read_lineage(before)] if before.is_file() else []
    lineage = {
        "store": "", "prompts": [], "fold": None, "seed": 0, "cases": {}, "backbone": backbone,
        "backbone_sha256": backbone_sha256(backbone),
        "train_base": any(name.startswith("unet.") for name in state),
        "ancestors": ancestors,
    }  # fmt: skip
    write_lineage(target.with_name("lineage.json"), lineage)


def _smallest(value: torch.Tensor) -> torch.Tensor:
    """A tensor in float16 if that is exact, else as it is."""
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.float32 and torch.equal(value.half().float(), value):
        return value.half()
    return value.clone()


def check_model(release: Path) -> None:
    """Refuses weights that clients would not load, or others in their place. Runs no code.

    Args:
        release: folder with ``models``.

    Raises:
        FileNotFoundError: there is no model.pt.
        ValueError: it is no plain state dict, or others (``.pt``, ``.ts``) lie beside it.

    Source: ecosystem (MONAI Label takes the shortest name of ``models/*.pt``).
    """
    path = release / NAME
    if not path.is_file():
        raise FileNotFoundError(f"release: {release} has no {NAME}")
    shadows = sorted(
        found.name
        for found in path.parent.iterdir()
        if found.suffix in (".pt", ".ts", ".pth") and found.name != path.name
    )
    if shadows:
        raise ValueError(
            f"release: {release}/models has {', '.join(shadows)} beside model.pt: clients may load "
            "one of them in its place"
        )
    loaded = read_state(path, key="model.pt")
    wrong = sorted(name for name, value in loaded.items() if not torch.is_tensor(value))
    if wrong or not loaded:
        raise ValueError(f"model.pt: {path} is no plain state dict: {wrong[:3] or 'it is empty'}")


def check_fit(release: Path) -> None:
    """Refuses a model.pt that does not fit network_def, name by name and shape by shape.

    Builds the network, which evaluates the config: for releases of one's own, or trusted ones.

    Args:
        release: folder with ``configs`` and ``models``.

    Raises:
        ValueError: it does not fit.

    Source: engineering choice.
    """
    network = network_def(release)
    try:
        network.load_state_dict(read_state(release / NAME, key="model.pt"), strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"model.pt: {release / NAME} does not fit network_def of inference.yaml: "
            f"{' '.join(str(error).split())[:600]}"
        ) from error

"""Federated training of a bundle: what a site does in a round, and what the server has to know.

MONAI's client runs trainer and evaluator of a bundle without its run list; the rest of that list
which matters at a site, its guard against leaks, is run here. docs/federated.md has the contract.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject
from monai.utils import set_determinism
from torch import nn

from diffboost.data.documents import read_config
from diffboost.files import write_aside
from diffboost.handlers import save_weights

TRAIN, EVALUATE = "configs/train.yaml", "configs/evaluate.yaml"
SITE_KEYS = ("bundle_root", "store_dir", "output_dir")
ROUNDS = "rounds.csv"
GUARDS = "diffboost.audit.guards."


class Round(NamedTuple):
    """What a site has to tell of a round."""

    metrics: dict[str, float]  # of the global weights, on cases that this site keeps from training
    difference: dict[str, torch.Tensor]  # local weights minus global ones
    num_steps: int


def read_site(path: str | Path) -> dict:
    """What a site keeps to itself: its paths, and other knobs such as device or num_workers.

    Args:
        path: a YAML file with ``bundle_root``, ``store_dir``, ``output_dir`` and further knobs.

    Returns:
        Its content; the three folders, where they are relative, are those beside the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no mapping, or lacks one of the three.

    Source: engineering choice.
    """
    site = read_config(path, "site")
    missing = [key for key in SITE_KEYS if key not in site]
    if missing:
        raise ValueError(f"site: {path} lacks {', '.join(missing)}; needed: {', '.join(SITE_KEYS)}")
    return site | {key: str(Path(path).absolute().parent / site[key]) for key in SITE_KEYS}


def build_client(
    site: Mapping, knobs: Mapping, num_rounds: int, local_epochs: int, name: str
) -> MonaiAlgo:
    """MONAI's client on a bundle, ready for the first round; refuses data that would leak.

    Args:
        site: see :func:`read_site`.
        knobs: those that all sites share, the network's first of all. A site's own come after.
        num_rounds: of the whole job; a learning rate schedule lasts as long.
        local_epochs: epochs a round.
        name: of the site.

    Returns:
        The client. It evaluates on inner validation: a server that chooses weights by test cases
        would spoil them.

    Raises:
        ValueError: the guard of the bundle's training found a leak.

    Source: engineering choice.
    """
    settings = {**knobs, **site, "epochs": num_rounds * local_epochs}
    root = settings.pop("bundle_root")
    evaluated = dict(settings)
    if "part" in read_config(Path(root) / EVALUATE, "bundle_root"):
        evaluated["part"] = "inner_validation"
    client = MonaiAlgo(
        bundle_root=str(root),
        local_epochs=local_epochs,
        config_train_filename=TRAIN,
        config_evaluate_filename=[TRAIN, EVALUATE],
        train_kwargs=settings,
        eval_kwargs=evaluated,
        best_model_filepath=str(Path(settings["output_dir"]).absolute() / "model.pt"),
    )
    client.initialize({ExtraItems.CLIENT_NAME: name})
    _run_guards(client.train_workflow.parser)
    return client


def _run_guards(parser: ConfigParser) -> None:
    """Runs what a training's run list has against leaks, and nothing else of it."""
    for number, step in enumerate(parser["run"]):
        if isinstance(step, Mapping) and str(step.get("_target_", "")).startswith(GUARDS):
            parser.get_parsed_content(f"run::{number}")


def play_round(client: MonaiAlgo, weights: Mapping[str, torch.Tensor]) -> Round:
    """Judges the global weights, then trains on from them.

    Args:
        client: see :func:`build_client`.
        weights: the global ones, by the names of the network's state dict.

    Source: MONAI's ``MonaiAlgo``; the order of NVFlare's example.
    """
    sent = ExchangeObject(weights=dict(weights))
    metrics = {name: float(value) for name, value in client.evaluate(sent).metrics.items()}
    client.train(sent)
    found = client.get_weights()
    num_steps = found.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS]
    return Round(metrics, found.weights, int(num_steps))


def record_round(output_dir: str | Path, number: int, metrics: Mapping[str, float]) -> Path:
    """Adds a row to ``rounds.csv``: the round and the metrics of the weights that it began with.

    Args:
        output_dir: of the site.
        number: of the round, from 0, which begins a new file.
        metrics: by name, the same names in every round.

    Source: engineering choice.
    """
    path = Path(output_dir) / ROUNDS
    rows = []
    if number > 0 and path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    rows.append({"round": number, **metrics})

    def dump(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
            writer.writeheader()
            writer.writerows(rows)

    write_aside(path, dump)
    return path


class ServerNetwork(NamedTuple):
    """What a server needs to average the weights of a bundle, in names that JSON can hold."""

    class_path: str
    args: dict
    key_metric: str
    key_metric_mode: str  # max or min


def describe_network(bundle_root: str | Path, knobs: Mapping) -> ServerNetwork:
    """The bundle's network and its metric; no data is read.

    Args:
        bundle_root: the bundle.
        knobs: those that all sites share.

    Source: engineering choice.
    """
    parser = _read_training(bundle_root, knobs)
    component = parser.get_parsed_content("network_def", instantiate=False)
    name = component.resolve_module_name()
    class_path = name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}"
    mode = "min" if "metric_cmp_fn" in parser["validate"]["evaluator"] else "max"
    metric = next(iter(parser["validate"]["key_metric"]))
    return ServerNetwork(class_path, dict(component.resolve_args()), metric, mode)


def build_network(bundle_root: str | Path, knobs: Mapping) -> nn.Module:
    """The bundle's network as a single training of these knobs would begin with it, on the CPU.

    Args:
        bundle_root: the bundle.
        knobs: those that all sites share; ``seed`` draws the weights.

    Source: engineering choice.
    """
    parser = _read_training(bundle_root, knobs)
    set_determinism(seed=parser.get_parsed_content("seed"))
    network = parser.get_parsed_content("network_def")
    set_determinism(seed=None)
    return network


def save_global_weights(
    checkpoint: str | Path, bundle_root: str | Path, knobs: Mapping, path: str | Path
) -> Path:
    """Writes the server's global weights as a bundle's ``model.pt``: a plain state dict.

    Args:
        checkpoint: NVFlare's file, with the weights under ``model``.
        bundle_root, knobs: see :func:`build_network`.
        path: the file to write.

    Raises:
        ValueError: its names or shapes are not those of the bundle's network.

    Source: engineering choice.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    state = {name: torch.as_tensor(value) for name, value in state.items()}
    network = build_network(bundle_root, knobs)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {checkpoint} does not fit the bundle: {error}") from error
    save_weights(network, Path(path))
    return Path(path)


def _read_training(bundle_root: str | Path, knobs: Mapping) -> ConfigParser:
    """The training config with these knobs."""
    config = ConfigParser.load_config_file(str(Path(bundle_root) / TRAIN))
    parser = ConfigParser(config)
    parser.update({**knobs, "bundle_root": str(bundle_root), "device": "cpu"})
    return parser

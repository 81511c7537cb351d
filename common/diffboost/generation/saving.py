"""Averaged weights, ``model.pt`` and the lineage beside it."""

import logging
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from ignite.engine import Engine, Events
from torch import nn
from tqdm import tqdm

from diffboost.checkpoints import announce
from diffboost.data.items import SliceItems
from diffboost.data.slices import read_store
from diffboost.data.weights import load_weights
from diffboost.files import sha256_of_files
from diffboost.generation.backbones import backbone_sha256, load_part, resolve_backbone
from diffboost.generation.creation import write_backbone
from diffboost.generation.lineage import hash_cases, read_lineage, write_lineage
from diffboost.generation.networks import ControlledUNet, GrayscaleAutoencoder
from diffboost.generation.schedulers import prediction_of
from diffboost.handlers import save_weights
from diffboost.processes import is_main_process, wait_for_processes

logger = logging.getLogger(__name__)


def trace_lineage(
    store_dir: str,
    data: SliceItems,
    backbone: str,
    train_base: bool,
    fold: int | None = None,
    seed: int = 0,
    weights: str | None = None,
    prediction: str = "noise",
) -> dict:
    """What a generator will have seen: hashes of its cases, its backbone and its ancestors.

    Args:
        store_dir: the slice store.
        data: the training slices.
        backbone: the backbone's name; its ``lineage.json``, if it brings one, is an ancestor.
        train_base: whether the UNet is trained too.
        fold: fold that the items come from, None where folds do not matter.
        seed: the run's seed.
        weights: a ``model.pt`` that training starts from; its ``lineage.json`` is an ancestor.
        prediction: what the generator will predict: noise (then the lineage says nothing), flow,
            consistency.

    Returns:
        What ``write_lineage`` writes; ``cases`` and ``images`` see ``hash_cases``.

    Raises:
        ValueError: ``weights`` predict neither noise nor what is to be predicted.

    Source: engineering choice (design, "lineage").
    """
    ancestors = [Path(resolve_backbone(backbone)) / "lineage.json"]
    if weights is not None:
        ancestors.append(Path(weights).with_name("lineage.json"))
        if not ancestors[-1].is_file():
            logger.warning("weights: %s: no lineage.json says what they were trained on", weights)
    before = [read_lineage(path) for path in ancestors if path.is_file()]
    for found in map(prediction_of, before):
        if found not in ("noise", prediction):
            raise ValueError(
                f"weights: {weights} predict {found}; training that learns {prediction} can start "
                f"from weights that predict noise or {prediction}"
            )
    lineage = {
        "store": read_store(store_dir).header["name"],
        "prompts": data.unique("prompt"),
        "fold": fold,
        "seed": seed,
        **hash_cases(data),
        "backbone": Path(backbone).name if Path(backbone).exists() else backbone,
        "backbone_sha256": backbone_sha256(backbone),
        "train_base": train_base,
        "ancestors": before,
    }
    return lineage if prediction == "noise" else {**lineage, "prediction": prediction}


class AveragedWeightsSaver:
    """Keeps an exponential moving average of the trained weights and saves it with its lineage.

    Writes ``model.pt`` (averaged, plain state dict) and ``lineage.json`` (with its table, if the
    cases are many) into ``output_dir`` at the end. The average is a part of the checkpoints. It
    begins with the weights that the trainer starts from: in a federated round, the global ones.

    Args:
        network: the network in training; its parameters that require gradients are averaged.
        output_dir: folder for the two files.
        lineage: see :func:`trace_lineage`.
        decay: of the average; it warms up as (1 + step) / (10 + step). 0: there is no average, and
            the last weights are saved.

    Source: diffusers' EMAModel; the released code has no average (facts 3).
    """

    def __init__(
        self, network: nn.Module, output_dir: str, lineage: dict, decay: float = 0.999
    ) -> None:
        self.network = network
        self.output_dir = Path(output_dir)
        self.lineage = lineage
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.decay = decay
        self.average: EMAModel | None = None

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer."""
        engine.add_event_handler(Events.COMPLETED, self._save)
        if self.decay > 0:
            engine.add_event_handler(Events.STARTED, self._begin)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
            announce(engine, "average", self)

    def state_dict(self) -> dict:
        """The average and its count of steps."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Takes what ``state_dict`` gave, to the device of the network."""
        self.average.load_state_dict(state)
        self.average.to(self.parameters[0].device)

    def _begin(self, engine: Engine) -> None:
        self.average = EMAModel(self.parameters, decay=self.decay, foreach=True)

    def _update(self, engine: Engine) -> None:
        self.average.step(self.parameters)

    def _save(self, engine: Engine) -> None:
        if not is_main_process():
            return
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        save_weights(self.network, self.output_dir / "model.pt")
        if self.average is not None:
            self.average.restore(self.parameters)
        lineage = {**self.lineage, "steps": engine.state.iteration}
        write_lineage(self.output_dir / "lineage.json", lineage)


def export_autoencoder(
    network: GrayscaleAutoencoder,
    weights: str,
    dataset,
    backbone: str,
    output_dir: str,
    lineage: dict,
    num_images: int = 512,
) -> Path:
    """Write a backbone whose autoencoder is the trained one, scaled to unit variance.

    Args:
        network: the trained network's architecture, on the device to use.
        weights: its ``model.pt``.
        dataset: training data with ``image`` (1, H, W), to measure the latents' spread.
        backbone: brings the other parts.
        output_dir: the new backbone's folder.
        lineage: what the autoencoder has seen.
        num_images: images measured, evenly spread over the data set.

    The first process writes, the others wait. What was written from these weights is left as it is.

    Raises:
        FileExistsError: ``output_dir`` holds another backbone.

    Source: latent diffusion (scale = 1 / standard deviation of the latents).
    """
    lineage = {**lineage, "weights_sha256": sha256_of_files([weights])}
    record = Path(output_dir) / "lineage.json"
    there = record.is_file() and read_lineage(record).get("weights_sha256")
    wait_for_processes()  # all have looked
    if not is_main_process() or there == lineage["weights_sha256"]:
        wait_for_processes()
        return Path(output_dir)
    network = getattr(network, "module", network)
    load_weights(network, weights)
    network.eval()
    device = next(network.parameters()).device
    step = max(1, len(dataset) // num_images)
    means = []
    with torch.inference_mode():
        for index in tqdm(range(0, len(dataset), step), desc="measuring latents"):
            moments = network.encode(torch.as_tensor(dataset[index]["image"])[None].to(device))
            means.append(moments.chunk(2, dim=1)[0].cpu())
    scale = 1 / torch.cat(means).std().item()
    network.autoencoder.register_to_config(scaling_factor=scale)
    target = write_backbone(output_dir, {"vae": network.autoencoder}, backbone, lineage=lineage)
    wait_for_processes()
    return target


def export_backbone(generator_dir: str, backbone: str, output_dir: str) -> Path:
    """Write a whole backbone in float16 from a pretrained generator: the shipped ``tiny``.

    Args:
        generator_dir: folder with ``model.pt`` and ``lineage.json``.
        backbone: the backbone that it was trained on.
        output_dir: the new backbone's folder.

    Raises:
        ValueError: the generator does not predict noise, as every backbone does.

    Source: engineering choice.
    """
    lineage = read_lineage(Path(generator_dir) / "lineage.json")
    prediction = prediction_of(lineage)
    if prediction != "noise":
        raise ValueError(
            f"generator_dir: the generator in {generator_dir} predicts {prediction}; a backbone's "
            "own weights predict noise"
        )
    network = ControlledUNet(
        backbone, lineage["train_base"], weights=str(Path(generator_dir) / "model.pt")
    )
    parts = {"unet": network.base, "controlnet": network.controlnet}
    parts["vae"] = load_part(backbone, "vae")
    return write_backbone(output_dir, parts, backbone, half=True, lineage=lineage)

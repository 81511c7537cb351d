"""Time and losses of a training step, ours beside the step of diffusers' train_controlnet.py.

    python benchmarks/training_step.py [--models tiny 16m] [--batch_size 16] [--timed_steps 20]
                                       [--steps 200] [--compared_batch_size 2]

Trains the branch of a frozen backbone twice in one process, in turn, step by step, on phantoms:

- ours: the pretrain bundle's train.yaml as ``monai.bundle run`` runs it, with its cache (float32
  latents), data set, loader, trainer, handlers, log and checkpoints;
- peer: the step of diffusers' examples/controlnet/train_controlnet.py, with its defaults, written
  out in plain torch: images and hints are read by PIL, converted to RGB, resized, cropped and
  scaled by torchvision, captions tokenized; then the autoencoder's encoder, the text encoder,
  ControlNet, UNet, loss, backward, AdamW, schedule, zero_grad, loss.item() for the progress bar.
  Left out: accelerate's wrappers, which do nothing in one process and float32; gradient clipping
  (left out on both sides); logging. What the script draws (order of images, noise, timesteps, the
  posterior's noise) is given to it, ready, outside of its time.

Both have the same weights, images, hints, captions, draws, batch size, AdamW (5e-6, constant; the
script's default), threads and no loader processes. ``tiny`` is the shipped backbone at 64 px;
``16m`` has 16 million parameters (UNet and branch), about an eighth of the widths of Stable
Diffusion 1.5, random weights, and 128 px: a step has about the same share of encoding as there at
256 px. What differs between the sides is what ours is: cached latents and prompts, folded
upsampling, channels-last layout, the fused AdamW.

Runs twice a model: ``timed_steps`` steps of ``batch_size`` images, whose time is the median after
the first few, its ratio ours over the peer's (that of processor time, which other programs on the
machine disturb less, stands beside it); and ``steps`` steps of ``compared_batch_size``, whose
losses are compared (those of the timed steps too). What the cache takes once is shown beside it.
Ends with a line of JSON; the exit status is 1 if a step's losses differ by more than 1e-5.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.transforms import Compose
from torch.utils.data import default_collate
from train_controlnet import LEARNING_RATE, SEED, Peer

from diffboost.data.addresses import AddressedDataset, AddressedSampler
from diffboost.data.slices import slice_items
from diffboost.generation.creation import create_backbone
from diffboost.generation.objective import DrawDiffusionTargetsd
from diffboost.generation.streaming import StreamedItems
from diffboost.prepare import prepare

PRETRAIN = Path(__file__).parents[1] / "bundles" / "radimagenet_controlnet_pretrain"
RATIO_LIMIT, LOSS_LIMIT = 0.70, 1e-5  # issue 6
CHECKPOINTS = 500  # steps between two, its default
WARM_UP = 5  # steps whose time is not counted
SIZES_PX = {"tiny": 64, "16m": 128}
# Stable Diffusion 1.5's levels at about an eighth of its widths.
MIDDLE = {
    "image_size": SIZES_PX["16m"],
    "autoencoder_channels": [16, 32, 64, 64],
    "autoencoder_layers": 2,
    "latent_channels": 4,
    "unet_channels": [48, 96, 112, 128],
    "unet_layers": 2,
    "attention_heads": 4,
    "hint_channels": [8, 16, 32, 64],
    "zero_convolution_std": 0.0,
    "text_width": 96,
    "text_layers": 12,
    "max_tokens": 77,
    "vocab_size": 2000,
    "seed": SEED,
}


def draws(items, backbone: str, size_px: int, batch_size: int, steps: int) -> list[dict]:
    """What our run draws in each step, by the same addresses, as batches."""
    draw = DrawDiffusionTargetsd(backbone, empty_prompt=0.0, image_size=size_px)
    data = AddressedDataset(StreamedItems(items, backbone), Compose([draw]), SEED, cache=False)
    sampler = AddressedSampler(data, SEED, batch_size=batch_size, drop_last=True)
    batches, addresses = [], iter(sampler)
    for step in range(steps):
        if step and step % (len(sampler) // batch_size) == 0:
            addresses = iter(sampler)
        samples = [data[next(addresses)] for _ in range(batch_size)]
        kept = ("noise", "posterior_noise", "timestep")
        batches.append(default_collate([{name: each[name] for name in kept} for each in samples]))
    return batches


class Duel:
    """Lets the peer make a step behind each of ours, and times both.

    Args:
        peer: the other loop.
        drawn: its draws, a step each.
    """

    def __init__(self, peer: Peer, drawn: list[dict]) -> None:
        self.peer = peer
        self.drawn = drawn
        self.seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        self.cpu_seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        self.losses: dict[str, list[float]] = {"ours": [], "peer": []}
        self.start = (0.0, 0.0)

    def attach(self, trainer: Engine) -> None:
        """Listens to our trainer, behind its handlers."""
        trainer.add_event_handler(Events.STARTED, self._begin)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._follow)

    def _begin(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def _note(self, side: str) -> None:
        """The time since the last start, of the wall's clock and of the processors."""
        self.seconds[side].append(time.perf_counter() - self.start[0])
        self.cpu_seconds[side].append(time.process_time() - self.start[1])

    def _follow(self, trainer: Engine) -> None:
        self._note("ours")
        self.losses["ours"].append(trainer.state.output["loss"].item())
        step = len(self.losses["peer"])
        self._begin()
        self.losses["peer"].append(self.peer.step(self.drawn[step]))
        self._note("peer")
        if step + 1 == len(self.drawn):
            trainer.terminate()
        self._begin()


def our_run(folder: Path, backbone: str, size_px: int, batch_size: int) -> ConfigWorkflow:
    """The pretrain bundle with the peer's hyperparameters; one endless run, stopped by the duel."""
    return ConfigWorkflow(
        config_file=str(PRETRAIN / "configs" / "train.yaml"),
        meta_file=str(PRETRAIN / "configs" / "metadata.json"),
        workflow_type="train",
        bundle_root=str(PRETRAIN),
        store_dir=str(folder / "store"),
        output_dir=str(folder / f"models_of_batch_{batch_size}"),
        cache_dir=str(folder / "cache"),
        backbone=backbone,
        image_size=size_px,
        batch_size=batch_size,
        epochs=1_000_000,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        empty_prompt=0.0,
        ema_decay=0.0,
        latent_precision="float32",
        checkpoint_interval=CHECKPOINTS,
        seed=SEED,
        device="cpu",
    )


def write_data(model: str, num_images: int, folder: Path) -> str:
    """Phantoms as a slice store in ``folder``, and the backbone of a model; gives its name."""
    size_px = SIZES_PX[model]
    phantoms = {"num_images": num_images, "image_size_px": size_px}
    prepare("phantoms", folder / "store", "radimagenet", size_px, "gradient", num_folds=1,
            validation_fraction=0.0, phantoms=phantoms)  # fmt: skip
    if model == "16m":
        return str(create_backbone(str(folder / "backbone"), **MIDDLE))
    return model


def fight(backbone: str, size_px: int, batch_size: int, steps: int, folder: Path) -> dict:
    """So many steps of both sides.

    Returns:
        ``seconds`` an image, ``cpu_seconds`` a step and ``losses`` of each side, ``parameters`` of
        UNet and branch, and ``caching`` seconds.
    """
    items = slice_items(str(folder / "store"), 0, "training", inner_fraction=0)
    drawn = draws(items, backbone, size_px, batch_size, steps)
    duel = Duel(Peer(backbone, items, size_px, batch_size), drawn)
    workflow = our_run(folder, backbone, size_px, batch_size)
    workflow.initialize()
    start = time.perf_counter()
    trainer = workflow.parser.get_parsed_content("train::trainer")
    caching = time.perf_counter() - start
    duel.attach(trainer)
    workflow.run()
    duel.peer.bar.close()
    networks = (trainer.network, trainer.network.base)
    return {
        "seconds": {k: [s / batch_size for s in v] for k, v in duel.seconds.items()},
        "cpu_seconds": duel.cpu_seconds,
        "losses": duel.losses,
        "parameters": sum(p.numel() for network in networks for p in network.parameters()),
        "caching": caching,
    }


def measure(model: str, options: argparse.Namespace) -> dict:
    """Time and losses of both sides on one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = write_data(model, options.num_images, folder)
        timed, compared = (
            fight(backbone, SIZES_PX[model], batch_size, steps, folder)
            for batch_size, steps in (
                (options.batch_size, options.timed_steps),
                (options.compared_batch_size, options.steps),
            )
        )
    ours, peer = (timed["seconds"][side][WARM_UP:] for side in ("ours", "peer"))
    our_cpu, peer_cpu = (timed["cpu_seconds"][side][WARM_UP:] for side in ("ours", "peer"))
    pairs = [
        pair
        for run in (timed, compared)
        for pair in zip(run["losses"]["ours"], run["losses"]["peer"], strict=True)
    ]
    return {
        "name": f"training step, {model}",
        "ours": median(ours),
        "peer": median(peer),
        "ratio": median(ours) / median(peer),
        "ratio_of_means": fmean(ours) / fmean(peer),
        "ratio_of_cpu_time": median(our_cpu) / median(peer_cpu),
        "unit": "s an image",
        "limit": RATIO_LIMIT,
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        "loss_limit": LOSS_LIMIT,
        "compared_steps": len(compared["losses"]["ours"]),
        "timed_steps": len(ours),
        "batch_size": options.batch_size,
        "parameters": timed["parameters"],
        "cache_s_an_image": timed["caching"] / options.num_images,
    }


def main() -> int:
    """Prints a line a model and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SIZES_PX, default=list(SIZES_PX))
    parser.add_argument("--batch_size", type=int, default=16, help="of the timed steps")
    parser.add_argument("--timed_steps", type=int, default=20, help=f"above {WARM_UP}")
    parser.add_argument("--steps", type=int, default=200, help="whose losses are compared")
    parser.add_argument("--compared_batch_size", type=int, default=2, help="of those steps")
    parser.add_argument("--num_images", type=int, default=160, help="phantoms to train on")
    options = parser.parse_args()
    figures = []
    for model in options.models:
        figures.append(row := measure(model, options))
        print(
            f"{row['name']}: {row['parameters'] / 1e6:.1f} M parameters, ours {row['ours']:.4f} s "
            f"an image, peer {row['peer']:.4f}, ratio {row['ratio']:.3f}; losses differ by at most "
            f"{row['largest_loss_difference']:.1e}, {row['compared_steps']} steps in a row"
        )
    worst = max(figures, key=lambda row: row["ratio"])
    equal = all(row["largest_loss_difference"] <= LOSS_LIMIT for row in figures)
    print(json.dumps(worst | {"name": "training_step", "worst": worst["name"], "figures": figures}))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

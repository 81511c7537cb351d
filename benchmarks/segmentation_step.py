"""A training step of the segmenter against a plain loop that reads .npz, with equal losses.

    python benchmarks/segmentation_step.py [--size 64] [--steps N] [--arm diffboost] [--threads 1]
        [--variants 4] [--channels_last true] [--amp false] [--scratch DIR]

Ours is the segmentation bundle's train.yaml as it stands: loader, transforms, inferer, loss,
optimizer, train metric and MONAI's trainer; checkpoints, validation and logs are left out. The
peers are the released loop written out anew (facts 21 to 24): a sample is one compressed .npz of
image and label and one of N variants' .npz, read in every step; AttentionUnet, DiceCELoss and AdamW
as torch has them by default, batch 8. Left out of it are Lightning, its logging, and its own draws:
variants and merge masks are those that our addresses gave, held in memory. ``peer`` makes one pass
over real and synthetic slices together, so that its losses can be compared with ours; ``released``
makes two, as the released code does. All merge logits; our default, merged images, is half of that
work and has other losses. All have the same weights at the start, float32, threads, no
loader processes, and take their steps in turn. Data are phantoms at --size px and variants with
noise, by seed 0.

Losses of ours and peer must be equal to 1e-5 at the first step (0.01 with --amp true, where ours
runs in bfloat16 and the peers do not) and within 5 % of each other on the mean of all: batch norm
and Adam, whose first steps are signs of gradients, enlarge rounding.
The last line is JSON; the exit code is 1 where losses are not equal.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss
from torch.utils.data import DataLoader, Dataset

from diffboost.data.addresses import AddressedSampler, address_seed
from diffboost.data.slices import read_store, write_image
from diffboost.data.transforms import LoadSliced
from diffboost.prepare import prepare

CONFIG = Path(__file__).parents[1] / "bundles/diffboost_segmentation/configs/train.yaml"
LIMIT = 0.8
FIRST_LOSS, MEAN_LOSS = 1e-5, 0.05  # absolute at the first step; relative over all
FIRST_LOSS_BFLOAT16 = 0.01
PHANTOMS = {"num_training": 6, "num_test": 1, "size_px": 64, "num_slices": 8}
WARM_UP = 1  # steps that are not counted
STEPS, STEPS_PX = 40, 64  # by default, at this size; fewer at others, two at least


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64, help="px of a slice, a multiple of 32")
    parser.add_argument(
        "--steps", type=int, help="counted steps of each side; fewer at larger sizes"
    )
    parser.add_argument("--arm", default="diffboost", choices=["diffboost", "baseline"])
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all")
    parser.add_argument("--variants", type=int, default=4, help="of each slice")
    parser.add_argument("--channels_last", default="true", choices=["true", "false"])
    parser.add_argument(
        "--amp", default="false", choices=["true", "false"], help="bfloat16 in ours alone"
    )
    parser.add_argument("--scratch", type=Path, help="where to make a folder for the data")
    options = parser.parse_args()
    options.steps = options.steps or max(2, STEPS * STEPS_PX**2 // options.size**2)
    return options


def write_stores(folder: Path, size: int, num_variants: int) -> tuple[Path, Path]:
    """A slice store of phantoms, and a synthetic store: its slices with noise."""
    store_dir, synthetic_dir = folder / "store", folder / "synthetic"
    settings = {"edges": "gradient", "group_duplicates": False, "phantoms": PHANTOMS}
    prepare("phantoms", store_dir, "phantom_organ", size, **settings)
    (synthetic_dir / "images").mkdir(parents=True)
    load, rows = LoadSliced("image"), []
    for row in read_store(store_dir).index.to_dict("records"):
        image = load({"image": store_dir / row["image"]})["image"][0].numpy()
        for variant in range(num_variants):
            name = f"images/{row['case']}_{row['slice']:04d}_{variant:03d}.png"
            draws = np.random.RandomState(address_seed(row["case"], row["slice"], variant))
            noisy = image * draws.uniform(0.6, 1) + draws.normal(0, 0.1, image.shape)
            write_image(synthetic_dir / name, noisy)
            place = {name: row[name] for name in ("case", "slice", "source_sha256")}
            rows.append(place | {"image": name, "variant": variant, "kept": True})
    pd.DataFrame(rows).to_parquet(synthetic_dir / "manifest.parquet")
    return store_dir, synthetic_dir


def read_config(options: argparse.Namespace, folder: Path) -> ConfigParser:
    """The bundle's config for training without checkpoints, validation and logs."""
    store_dir, synthetic_dir = write_stores(folder, options.size, options.variants)
    parser = ConfigParser()
    parser.read_config(CONFIG)
    needs_variants = options.arm != "baseline"
    parser.update(
        {
            "store_dir": str(store_dir),
            "synthetic_dir": str(synthetic_dir) if needs_variants else None,
            "output_dir": str(folder / "run"),
            "arm": options.arm,
            "image_size": options.size,
            "patch_size": options.size // 4,
            "merge": "logits",  # as the released loop: two passes of work
            "epochs": 10_000,  # the benchmark stops it
            "channels_last": options.channels_last == "true",
            "amp": options.amp == "true",
            "device": "cpu",
            "train::handlers": [],
        }
    )
    return parser


class NpzSamples(Dataset):
    """Steps' samples as the released code reads them: two compressed files each."""

    def __init__(self, samples: Sequence[tuple[Path, Path | None, np.ndarray | None]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        real, variant, mask = self.samples[index]
        with np.load(real) as arrays:
            sample = {"data": arrays["data"], "seg": arrays["seg"]}
        if variant is not None:
            with np.load(variant) as arrays:
                sample |= {"data_aug": arrays["data"], "mask": mask}
        return sample


def write_samples(parser: ConfigParser, folder: Path, count: int) -> NpzSamples:
    """The .npz files, and which of them our addresses draw for the first ``count`` samples."""
    dataset = parser.get_parsed_content("train::dataset")
    sampler = AddressedSampler(dataset, parser["seed"], batch_size=parser["batch_size"])
    load, variants, samples = LoadSliced(["image", "label"]), {}, []
    for index, item in enumerate(dataset.data):
        slices = {key: value.numpy() for key, value in load(item).items() if key in load.keys}
        np.savez_compressed(folder / f"{index}.npz", data=slices["image"], seg=slices["label"])
        for number, path in enumerate(item.get("variants", ())):
            image = LoadSliced("synthetic")({"synthetic": path})["synthetic"].numpy()
            name = folder / f"{index}_{number}.npz"
            np.savez_compressed(name, data=image, seg=slices["label"])
            variants[image.tobytes()] = name
    while len(samples) < count:
        for address in sampler:
            sample = dataset[address]
            real, variant, mask = folder / f"{address[1]}.npz", None, None
            if variants:
                variant = variants[sample["synthetic"].numpy().tobytes()]
                mask = sample["merge_mask"].numpy()
            samples.append((real, variant, mask))
    return NpzSamples(samples)


def plain_steps(network: torch.nn.Module, samples: NpzSamples, passes: int) -> Iterator[float]:
    """The losses of the plain loop, a step each.

    Args:
        network: trained in place.
        samples: in the order of the steps.
        passes: 1 runs real and synthetic slices together, 2 one after the other.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss_function = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    network.train()
    for batch in DataLoader(samples, batch_size=8):
        image = batch["data"]
        if "data_aug" not in batch:
            prediction = network(image)
        else:
            variant, mask = batch["data_aug"], batch["mask"]
            if passes == 1:
                real, synthetic = network(torch.cat([image, variant])).chunk(2)
            else:
                real, synthetic = network(image), network(variant)
            prediction = real * mask + synthetic * (1 - mask)
        loss = loss_function(prediction, batch["seg"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def run_in_turn(
    parser: ConfigParser, peers: dict[str, Iterator[float]], steps: int
) -> dict[str, pd.DataFrame]:
    """Of each side a row a step: ``seconds``, ``cpu_seconds`` of this process, ``loss``.

    The peers step behind each of our trainer's steps.
    """
    trainer = parser.get_parsed_content("train::trainer")
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("ours", *peers)}
    started = (0.0, 0.0)

    def begin() -> None:
        nonlocal started
        started = (time.perf_counter(), time.process_time())

    def end(name: str, loss: float) -> None:
        seconds = (time.perf_counter() - started[0], time.process_time() - started[1])
        rows[name].append((*seconds, loss))
        begin()

    def end_step() -> None:
        end("ours", trainer.state.output["loss"].item())
        for name, iterator in peers.items():
            end(name, next(iterator))
        if len(rows["ours"]) == steps:
            trainer.terminate()

    trainer.add_event_handler(Events.STARTED, begin)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, end_step)  # behind the train metric
    trainer.run()
    columns = ["seconds", "cpu_seconds", "loss"]
    return {name: pd.DataFrame(values, columns=columns) for name, values in rows.items()}


def report(steps: dict[str, pd.DataFrame], options: argparse.Namespace) -> int:
    """Prints what came out; 1 where the losses of ours and peer are not equal."""
    middle = {name: 1000 * rows[WARM_UP:].median() for name, rows in steps.items()}
    times = {name: values.seconds for name, values in middle.items()}
    losses = {name: rows.loss for name, rows in steps.items()}
    differences = (losses["ours"] - losses["peer"]).abs()
    first, apart = differences[0], abs(losses["ours"].mean() / losses["peer"].mean() - 1)
    print(f"{options.arm} at {options.size} px, batch 8, {options.threads} threads, "
          f"{options.steps} steps; milliseconds a step:")  # fmt: skip
    for name, values in middle.items():
        print(f"  {name:9s} {values.seconds:9.1f}, of the processor {values.cpu_seconds:9.1f}; "
              f"mean loss {losses[name].mean():.4f}")  # fmt: skip
    print(f"losses of ours and peer: {first:.1e} apart at the first step, {differences.max():.1e} "
          f"at most; their means by {100 * apart:.2f} %")  # fmt: skip
    record = {
        "name": "segmentation_step",
        "ours": round(times["ours"], 2),
        "peer": round(times["peer"], 2),
        "ratio": round(times["ours"] / times["peer"], 4),
        "unit": "ms a step",
        "limit": LIMIT,
        "cpu_ratio": round(middle["ours"].cpu_seconds / middle["peer"].cpu_seconds, 4),
        "released": round(times["released"], 2),
        "ratio_to_released": round(times["ours"] / times["released"], 4),
        "size_px": options.size,
        "threads": options.threads,
        "amp": options.amp == "true",
        "first_loss_difference": first,
        "mean_loss_difference": round(apart, 6),
    }
    print(json.dumps(record))
    allowed = FIRST_LOSS_BFLOAT16 if options.amp == "true" else FIRST_LOSS
    return int(first > allowed or apart > MEAN_LOSS)


def main() -> int:
    """Makes the data, takes all steps in turn and prints what came out."""
    options = read_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        torch.manual_seed(0)
        parser = read_config(options, Path(folder))
        steps = options.steps + WARM_UP
        plain = [copy.deepcopy(parser.get_parsed_content("network_def")) for _ in range(2)]
        samples = write_samples(parser, Path(folder), 8 * steps)
        peers = {
            "peer": plain_steps(plain[0], samples, passes=1),
            "released": plain_steps(plain[1], samples, passes=2),
        }
        measured = run_in_turn(parser, peers, steps)
    return report(measured, options)


if __name__ == "__main__":
    sys.exit(main())

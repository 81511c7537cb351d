"""Edges of a batch of images against controlnet_aux's detector, image by image, with equal weights.

    python benchmarks/edges.py [--size 256] [--images 16] [--rounds 5] [--threads 1]
        [--weights FILE] [--data ../shared/data]

Ours is the detector that ``prepare`` calls on a batch of slices. The peer is controlnet_aux's
HEDdetector as it is installed, called on one gray uint8 picture after the other at
detect_resolution = image_resolution = --size, so that both look at the same pixels; its network
holds our weights. Both have the same threads and float32. Their uint8 maps (cut off, as the peer
does it) must be equal to one level. The last line is JSON; the exit code is 1 where maps differ.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from diffboost.conditions.edges import load_edge_detector
from diffboost.conditions.hed_weights import bsds500_file
from diffboost.data.weights import load_weights
from diffboost.store_writer import EDGE_BATCH

with warnings.catch_warnings():  # it loads all its annotators, whose libraries warn
    warnings.simplefilter("ignore")
    from controlnet_aux.hed import ControlNetHED_Apache2, HEDdetector

LIMIT = 0.7
LARGEST_DIFFERENCE = 1  # levels of 255


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="px, a multiple of 64")
    parser.add_argument("--images", type=int, default=16, help="how many")
    parser.add_argument("--rounds", type=int, default=5, help="of ours and the peer in turn")
    parser.add_argument("--threads", type=int, default=1, help="of torch and OpenCV, for both")
    parser.add_argument("--weights", help="see edge_weights of prepare; default: the cache, pip")
    parser.add_argument("--data", type=Path, help="folder with PNGs; default: drawn by seed 0")
    return parser.parse_args()


def make_images(data: Path | None, count: int, size: int) -> np.ndarray:
    """Gray pictures, uint8 (N, size, size): out of a folder, or blobs with speckle by seed 0."""
    if data is not None:
        paths = [path for path in sorted(data.rglob("*.png")) if "mask" not in path.name][:count]
        if len(paths) < count:
            raise SystemExit(f"--data: {data} has {len(paths)} PNGs; --images wants {count}")
        pictures = (Image.open(path).convert("L").resize((size, size)) for path in paths)
        return np.stack([np.asarray(picture) for picture in pictures])
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, count, size, size))
    shapes = gaussian_filter(noise[0], (0, size / 16, size / 16)) * size / 4
    speckle = gaussian_filter(noise[1], (0, 1, 1))
    return np.clip(128 + 60 * np.tanh(4 * shapes) + 20 * speckle, 0, 255).astype(np.uint8)


def main() -> int:
    """Times both in turn and prints what came out."""
    options = read_arguments()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    detector = load_edge_detector("hed-bsds500", options.weights, size_px=options.size)
    network = ControlNetHED_Apache2()
    load_weights(network, bsds500_file(options.weights))
    peer = HEDdetector(network.float().eval())
    pictures = make_images(options.data, options.images, options.size)
    images = torch.from_numpy(pictures[:, None].astype(np.float32)) / 127.5 - 1

    def run_ours() -> np.ndarray:
        edges = [detector(batch) for batch in images.split(EDGE_BATCH)]
        return (torch.cat(edges)[:, 0] * 255).to(torch.uint8).numpy()

    def run_peer() -> np.ndarray:
        size = {"detect_resolution": options.size, "image_resolution": options.size}
        return np.stack([peer(picture, **size, output_type="np")[..., 0] for picture in pictures])

    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    maps = {}
    for number in range(options.rounds + 1):
        for name, work in (("ours", run_ours), ("peer", run_peer)):
            start = time.perf_counter()
            maps[name] = work()
            if number:  # the first round warms up
                seconds[name].append(1000 * (time.perf_counter() - start) / options.images)
    difference = np.abs(maps["ours"].astype(int) - maps["peer"])
    times = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["peer"], strict=True)]
    print(f"{options.images} images of {options.size} px, {options.rounds} rounds, "
          f"{options.threads} threads; ours in batches of {EDGE_BATCH}")  # fmt: skip
    print(f"ratio of each round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(
        f"levels that differ: {np.mean(difference > 0):.2e} of all, by {difference.max()} at most"
    )
    record = {
        "name": "edges",
        **{name: round(value, 2) for name, value in times.items()},
        "ratio": round(statistics.median(ratios), 4),
        "unit": "ms an image",
        "limit": LIMIT,
        "size_px": options.size,
        "threads": options.threads,
        "largest_difference": int(difference.max()),
    }
    print(json.dumps(record))
    return int(difference.max() > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())

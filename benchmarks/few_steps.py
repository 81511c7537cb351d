"""Few steps: a distilled generator against its teacher, on the same slices and the same noise.

    python benchmarks/few_steps.py --store_dir DIR --teacher_dir DIR --student_dir DIR
        [--backbone tiny] [--fold 0] [--num_variants 64] [--sheet sheet.png]

Every preset makes the same variants, batch by batch in turn. Printed for each: edge agreement
(correlation of the image's edges, found by the store's detector, with the hint), mean absolute
distance of intensities in [-1, 1] to the image of the reference preset (DDIM 20, guidance 9, the
released code's prompt mix), to that of DDIM 20 without guidance, and to the source slice; sharpness
(mean absolute difference of neighboring pixels over that of the source), for a blurred image is
near to all others; and seconds a variant (median of the batches). The last line is JSON; ours is
the student in two steps, the peer the fast preset (UniPC 5, Karras). It promises no equality.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.data import list_data_collate

from diffboost.audit.fidelity import correlation
from diffboost.conditions.edges import load_edge_detector
from diffboost.data.slices import read_store
from diffboost.data.transforms import LoadSliced
from diffboost.generation.sampling import VariantInferer
from diffboost.generation.synthesis import (
    VariantConditions,
    VariantPrepareBatch,
    load_generator,
    variant_items,
)

BATCH_SIZE = 16
FAST, FEW = "teacher UniPC 5, Karras", "student LCM 2"
PLAIN, REFERENCE = "teacher DDIM 20", "teacher DDIM 20, guidance 9"
# name: (student?, scheduler, steps, guidance)
PRESETS = {
    FAST: (False, "unipc_karras", 5, 1.0),
    "teacher UniPC 5": (False, "unipc", 5, 1.0),
    "teacher UniPC 6": (False, "unipc", 6, 1.0),
    "teacher UniPC 4": (False, "unipc", 4, 1.0),
    "teacher UniPC 2": (False, "unipc", 2, 1.0),
    "student LCM 1": (True, "lcm", 1, 1.0),
    FEW: (True, "lcm", 2, 1.0),
    "student LCM 4": (True, "lcm", 4, 1.0),
    "teacher LCM 2": (False, "lcm", 2, 1.0),  # not distilled: what distillation adds
    "teacher LCM 4": (False, "lcm", 4, 1.0),
    PLAIN: (False, "ddim", 20, 1.0),
    REFERENCE: (False, "ddim", 20, 9.0),
}
PLAIN_MIX = {"prompt": 0.95, "phrase": 0.05, "style": 0.0}  # of inference.yaml
RELEASED_MIX = {"prompt": 0.045, "phrase": 0.005, "style": 0.95}  # of paper_sampling.yaml


def make_images(options: argparse.Namespace, items: list[dict]) -> tuple[dict, dict]:
    """(N, H, W) images and seconds a variant of every batch, by preset."""
    size = read_store(options.store_dir).header["preprocessing"]["image_size"]
    networks = [
        load_generator(folder, options.backbone)
        for folder in (options.teacher_dir, options.student_dir)
    ]
    inferers = {
        name: VariantInferer(options.backbone, scheduler, steps, guidance)
        for name, (_, scheduler, steps, guidance) in PRESETS.items()
    }
    mixes = [
        VariantConditions(items, options.backbone, mix, size) for mix in (PLAIN_MIX, RELEASED_MIX)
    ]
    images, seconds = ({name: [] for name in PRESETS} for _ in range(2))
    for start in range(0, len(items), BATCH_SIZE):
        part = items[start : start + BATCH_SIZE]
        batches = [list_data_collate([mix(item) for item in part]) for mix in mixes]
        for name, (student, *_) in PRESETS.items():
            noise, _, _, conditions = VariantPrepareBatch()(batches[name == REFERENCE], "cpu")
            begin = time.perf_counter()
            with torch.no_grad():
                made = inferers[name](noise, networks[student], **conditions)
            seconds[name].append((time.perf_counter() - begin) / len(part))
            images[name].append(made[:, 0].numpy())
    return {name: np.concatenate(parts) for name, parts in images.items()}, seconds


def roughness(images: np.ndarray) -> float:
    """Mean absolute difference of neighboring pixels."""
    return float(np.mean([np.abs(np.diff(images, axis=axis)).mean() for axis in (1, 2)]))


def measure(options: argparse.Namespace, items: list[dict], images: dict, seconds: dict) -> dict:
    """The figures of every preset."""
    preprocessing = read_store(options.store_dir).header["preprocessing"]
    detector = load_edge_detector(preprocessing["edges"], size_px=preprocessing["hed_size_px"])
    load = LoadSliced(["image", "edge"], preprocessing["image_size"])
    loaded = [load({key: item[key] for key in ("image", "edge")}) for item in items]
    source, hints = (np.stack([np.asarray(s[key])[0] for s in loaded]) for key in ("image", "edge"))
    images["source"] = source
    figures = {}
    for name, made in images.items():
        tensors = torch.from_numpy(made[:, None].astype("float32"))
        edges = np.concatenate([detector(part).cpu().numpy() for part in tensors.split(BATCH_SIZE)])
        agreement = [correlation(edge[0], hint) for edge, hint in zip(edges, hints, strict=True)]
        figures[name] = {
            "edge_agreement": float(np.nanmean(agreement)),
            "distance_to_reference": float(np.abs(made - images[REFERENCE]).mean()),
            "distance_to_plain": float(np.abs(made - images[PLAIN]).mean()),
            "distance_to_source": float(np.abs(made - source).mean()),
            "sharpness": roughness(made) / roughness(source),
            "seconds": float(np.median(seconds[name])) if name in seconds else 0.0,
        }
    images["hint"] = hints * 2 - 1
    return figures


def draw_sheet(images: dict, path: str, num_rows: int = 6) -> None:
    """A row a slice: source, hint, every preset."""
    names = ["source", "hint", *PRESETS]
    rows = np.linspace(0, len(images["source"]) - 1, num_rows).astype(int)
    figure = Figure(figsize=(1.5 * len(names), 1.6 * num_rows), layout="constrained")
    for axes, row in zip(figure.subplots(num_rows, len(names)), rows, strict=True):
        for axis, name in zip(axes, names, strict=True):
            axis.imshow(images[name][row], cmap="gray", vmin=-1, vmax=1)
            axis.set_axis_off()
            axis.set_title(name.replace(" ", "\n", 1) if row == rows[0] else "", fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("store_dir", "teacher_dir", "student_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--num_variants", type=int, default=64)
    parser.add_argument("--sheet", help="PNG to draw", type=Path)
    options = parser.parse_args()
    items = variant_items(options.store_dir, options.teacher_dir, options.fold, ratio=1, seed=0)
    chosen = np.random.RandomState(0).permutation(len(items))[: options.num_variants]
    items = [items[i] for i in sorted(chosen)]
    images, seconds = make_images(options, items)
    figures = measure(options, items, images, seconds)
    print(f"{len(items)} variants: {', '.join(figures[FEW])}")
    for name, row in figures.items():
        print(f"{name:28s}", " ".join(f"{value:8.4f}" for value in row.values()))
    if options.sheet:
        draw_sheet(images, options.sheet)
    ours, peer = figures[FEW]["seconds"], figures[FAST]["seconds"]
    summary = {"name": "few_steps", "ours": ours, "peer": peer, "ratio": ours / peer}
    print(json.dumps({**summary, "unit": "s/variant", "limit": None, "figures": figures}))


if __name__ == "__main__":
    main()

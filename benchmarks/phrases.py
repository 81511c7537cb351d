"""Does text act? What each augmentation phrase changes, beside what another noise changes.

    python benchmarks/phrases.py STORE_DIR GENERATOR_DIR [--backbone tiny] [--num_slices 12]
        [--csv phrases.csv] [--figure phrases.png]

Variants are made of the same slices and the same noise with the prompt alone, with a phrase mixed
into its embedding at weights 0.005 (released code), 0.05 (our default) and 0.5, and with prompt and
phrase as one plain sentence. A row a phrase: mean absolute change of gray level over that between
two draws of noise. Above 0.1, text is said to act (docs/results/protocol.md). A change of the mean
gray level is given apart: that is what "brighter" should do. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from monai.data import list_data_collate
from tqdm import tqdm

from diffboost.conditions.prompts import PHRASES
from diffboost.data.slices import read_store
from diffboost.generation.sampling import VariantInferer
from diffboost.generation.synthesis import VariantConditions, load_generator, variant_items
from diffboost.generation.text import embed_prompts, mix_embeddings

WEIGHTS = (0.005, 0.05, 0.5)
SENTENCE = "sentence"
ACTS = 0.1  # of the change by noise


class Painter:
    """Images of the same slices under other texts or other noise."""

    def __init__(self, options: argparse.Namespace) -> None:
        size = read_store(options.store_dir).header["preprocessing"]["image_size"]
        items = variant_items(options.store_dir, options.generator_dir, options.fold, 2, seed=0)
        number = len(items) // 2
        chosen = np.unique(np.linspace(0, number - 1, options.num_slices).astype(int))
        self.items = [[items[i + number * draw] for i in chosen] for draw in (0, 1)]
        self.prompts = [item["prompt"] for item in self.items[0]]
        self.backbone = options.backbone
        self.network = load_generator(options.generator_dir, options.backbone)
        self.inferer = VariantInferer(options.backbone, decoder=options.decoder)
        weights = {"prompt": 1.0}
        every = self.items[0] + self.items[1]
        prepare = VariantConditions(every, options.backbone, weights, size)
        self.batches = [list_data_collate([prepare(item) for item in part]) for part in self.items]
        texts = sorted({*self.prompts, *PHRASES})
        self.embedding = dict(
            zip(texts, embed_prompts(options.backbone, texts, batch_size=1), strict=True)
        )

    @torch.inference_mode()
    def paint(self, context: torch.Tensor | None = None, draw: int = 0) -> torch.Tensor:
        """(N, 1, H, W) in [-1, 1]; without a context by the prompts alone."""
        batch = self.batches[draw]
        context = batch["context"] if context is None else context
        return self.inferer(batch["image"], self.network, context, batch["edge"])

    def mixed(self, phrase: str, weight: float) -> torch.Tensor:
        """Prompts with a phrase mixed in, (N, tokens, width)."""
        weights = {"prompt": 1 - weight, "phrase": weight}
        parts = {"phrase": self.embedding[phrase]}
        return torch.stack(
            [mix_embeddings(parts | {"prompt": self.embedding[p]}, weights) for p in self.prompts]
        )

    def sentences(self, phrase: str) -> torch.Tensor:
        """Prompts that end in a phrase, (N, tokens, width)."""
        texts = [f"{prompt}, {phrase}" for prompt in self.prompts]
        return torch.stack(list(embed_prompts(self.backbone, texts, batch_size=1)))


def measure(painter: Painter, phrases: list[str]) -> pd.DataFrame:
    """A row a phrase and way of saying it: change over noise, and shift of the mean gray level."""
    plain = painter.paint()
    noise = float((painter.paint(draw=1) - plain).abs().mean())
    rows = []
    for phrase in tqdm(phrases, "phrases"):
        contexts = {weight: painter.mixed(phrase, weight) for weight in WEIGHTS}
        contexts[SENTENCE] = painter.sentences(phrase)
        for way, context in contexts.items():
            change = painter.paint(context) - plain
            row = {"phrase": phrase, "way": str(way), "change": float(change.abs().mean())}
            rows.append(row | {"over_noise": row["change"] / noise, "shift": float(change.mean())})
    return pd.DataFrame(rows).assign(noise=noise)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Every phrase as a dot, a row a way of saying it."""
    ways = list(dict.fromkeys(table.way))
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    for place, way in enumerate(ways):
        values = table.over_noise[table.way == way]
        axis.scatter(values, np.full(len(values), place), s=14, alpha=0.6, color="#0072B2")
    axis.axvline(ACTS, color="#7A7F87", linewidth=1)
    axis.set_xscale("log")
    labels = [way if way == SENTENCE else f"weight {way}" for way in ways]
    axis.set_yticks(range(len(ways)), labels)
    axis.set_xlabel("change by a phrase / change by other noise (line: text is said to act)")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Paints, measures, prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store_dir")
    parser.add_argument("generator_dir")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--decoder", default="own", help="own, tiny_decoder, a folder or hub id")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--num_slices", type=int, default=12)
    parser.add_argument("--num_phrases", type=int, default=len(PHRASES), help="the first so many")
    parser.add_argument("--csv", type=Path, help="a row a phrase and way")
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    options = parser.parse_args()
    table = measure(Painter(options), list(PHRASES[: options.num_phrases]))
    if options.csv:
        table.round(6).to_csv(options.csv, index=False)
    if options.figure:
        draw(table, options.figure)
    medians = table.groupby("way", sort=False).over_noise.median()
    for way, rows in table.groupby("way", sort=False):
        top = rows.nlargest(3, "over_noise")
        named = ", ".join(f"{p} {v:.3f}" for p, v in zip(top.phrase, top.over_noise, strict=True))
        print(f"{way:9s} median {medians[way]:.4f} of the noise's change; most: {named}")
    default = str(WEIGHTS[1])
    line = {"name": "phrases", "ours": float(medians[default]), "peer": 1.0}
    line |= {"ratio": float(medians[default]), "unit": "change by noise", "limit": ACTS}
    line |= {"acts": bool(medians[default] > ACTS), "noise": float(table.noise[0])}
    print(json.dumps(line | {"medians": medians.to_dict()}))


if __name__ == "__main__":
    main()

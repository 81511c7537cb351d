"""The rungs of a search for the ratio: a store grows, probes are trained on it and scored."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from diffboost.data.documents import read_json
from diffboost.files import write_json
from diffboost.ratio.budget import Price
from diffboost.ratio.record import unit_name
from diffboost.ratio.rule import MIN_CASES
from diffboost.ratio.stage_runs import BundleRun
from diffboost.segmentation.loading import load_segmenter
from diffboost.segmentation.scoring import case_dice, slice_dice, slice_overlaps

TRIED = "rungs.json"  # in the folder of the search: what is done
STORE = "synthetic_store"


class Probes:
    """Makes rungs: grows the store, trains a probe a seed on it, scores it on the inner validation.

    What is done stands in rungs.json, after every variant store and probe; the rest of a stage that
    was stopped is kept by the stage itself.

    Args:
        search_dir: folder of the search.
        synthesis, segmenter: the two stages; settings of the search are added to theirs.
        inner: slices of the inner validation.
        num_classes: with background.
        seeds: of the probes, the same at every rung, so that rungs are paired; none: no probes.
        epochs: of a probe.
        device: where probes are scored.

    Source: engineering choice
    """

    def __init__(
        self,
        search_dir: str,
        synthesis: BundleRun,
        segmenter: BundleRun,
        inner: Sequence[dict],
        num_classes: int,
        seeds: Sequence[int],
        epochs: int,
        device: str | torch.device,
    ) -> None:
        self.folder = Path(search_dir)
        self.synthesis = synthesis
        self.segmenter = segmenter
        self.inner = inner
        self.num_classes = num_classes
        self.seeds = list(seeds)
        self.epochs = epochs
        self.device = device
        self.unit = "case" if len({item["case"] for item in inner}) >= MIN_CASES else "slice"
        path = self.folder / TRIED
        noted = read_json(path, "search_dir") if path.is_file() else {"rungs": []}
        self.rungs = noted["rungs"]
        self.last, self.why = noted.get("last"), noted.get("why")

    def done(self) -> list[dict]:
        """The rungs whose probes are all scored."""
        return [rung for rung in self.rungs if len(rung["scores"]) == len(self.seeds)]

    def try_rung(self, ratio: int) -> dict:
        """The rung of a ratio: its scores and seconds; goes on with one that was begun."""
        self.grow(ratio)
        rung = self.rungs[-1]
        for seed in map(str, self.seeds):
            if seed not in rung["scores"]:
                start = time.perf_counter()
                rung["scores"][seed] = self._probe(ratio, int(seed))
                rung["seconds"][f"probe {seed}"] = time.perf_counter() - start
                self._note()
        return rung

    def end_with(self, ratio: int, why: str) -> None:
        """Grows the store to its last ratio, without probes; noted first: a clock may differ."""
        self.last, self.why = ratio, why
        self._note()
        self.grow(ratio)

    def grow(self, ratio: int) -> None:
        """Makes the variants of a ratio, if that is not done."""
        if not self.rungs or self.rungs[-1]["ratio"] != ratio:
            start = time.perf_counter()
            self.synthesis(output_dir=self.folder / STORE, ratio=ratio)
            took = time.perf_counter() - start
            self.rungs.append({"ratio": ratio, "scores": {}, "seconds": {"variants": took}})
            self._note()

    def _note(self) -> None:
        write_json(self.folder / TRIED, {"rungs": self.rungs, "last": self.last, "why": self.why})

    def _probe(self, ratio: int, seed: int) -> dict[str, float]:
        """Dice in [0, 1] of each unit, of a segmenter that was trained for the probe's epochs."""
        folder = self.folder / "probes" / f"ratio{ratio}.seed{seed}"
        self.segmenter(
            output_dir=folder,
            synthetic_dir=self.folder / STORE,
            num_variants=ratio,
            seed=seed,
            epochs=self.epochs,
        )
        network = load_segmenter(folder, self.segmenter.config_files, self.num_classes, self.device)
        size = self.segmenter.value("image_size")
        overlaps = slice_overlaps(network, self.inner, self.num_classes, size, device=self.device)
        scores = case_dice(overlaps) if self.unit == "case" else slice_dice(overlaps)
        shutil.rmtree(folder)
        return {unit_name(unit): dice for unit, dice in scores.items()}

    def spent_seconds(self) -> float:
        """Of the rungs that are done; of a stage that was stopped, only its last part."""
        return sum(sum(rung["seconds"].values()) for rung in self.done())

    def price_in_seconds(self) -> Price:
        """What variants, a probe and a training took here, by the rungs so far."""
        parts = [(name, took) for r in self.done() for name, took in r["seconds"].items()]
        variants = sum(took for name, took in parts if name == "variants")
        probes = [took for name, took in parts if name != "variants"]
        probe = sum(probes) / max(1, len(probes))
        whole = probe * self.segmenter.value("epochs") / self.epochs
        return Price(variants / self.done()[-1]["ratio"], probe, whole)

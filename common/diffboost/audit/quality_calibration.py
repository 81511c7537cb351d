"""Calibration of the quality filter on real slices of the inner validation, and planted defects."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from diffboost.audit.calibration import Judge, calibrate
from diffboost.audit.defects import KINDS, Sample, change_gray_levels, plant
from diffboost.audit.quality_scores import (
    EMPTY_FAMILIES,
    FAMILIES,
    GROUPS,
    Reference,
    View,
    describe_reference,
    group_of,
    score_sample,
    view_images,
)
from diffboost.conditions.edges import EdgeDetector, load_edge_detector_of
from diffboost.data.addresses import address_seed
from diffboost.data.slices import SliceStore
from diffboost.data.transforms import LoadSliced
from diffboost.segmentation.loading import load_segmenter

logger = logging.getLogger(__name__)

NUM_REFERENCE = 500  # training slices that say what gray levels and texture are usual
FEW_SLICES = 160  # of these or fewer, several copies of each slice are drawn
SEES_IMAGE = ("erased", "noise")  # defects that change the image; the others change the label


@dataclass(frozen=True)
class Instruments:
    """What slices are measured with.

    Args:
        segmenter: (B, 1, H, W) to logits (B, classes, H, W).
        detector: the store's edge detector.
        reference: what is usual in real training slices.
        load: reads image, label and edge of an item.
        device: where segmenter and detector run.
        batch_size: images a pass.

    Source: engineering choice.
    """

    segmenter: torch.nn.Module
    detector: EdgeDetector
    reference: Reference
    load: LoadSliced
    device: str | torch.device = "cpu"
    batch_size: int = 32

    def view(self, images: Sequence[np.ndarray]) -> list[View]:
        """Images (H, W) as they are seen."""
        return view_images(images, self.segmenter, self.detector, self.device, self.batch_size)

    def score(self, sample: Sample, view: View) -> dict:
        """Scores of a sample, with its case, kind and group."""
        scores = score_sample(view, sample.label, sample.hint, self.reference)
        group = group_of(float((sample.label > 0).mean()))
        return scores | {"case": sample.case, "kind": sample.kind, "group": group}

    def read(self, items: Sequence[Mapping]) -> Iterator[list[tuple[Sample, View]]]:
        """Samples of items with their views, a batch at a time."""
        for start in range(0, len(items), self.batch_size):
            loaded = [self.load(item) for item in items[start : start + self.batch_size]]
            views = self.view([item["image"][0].numpy() for item in loaded])
            yield [
                (
                    Sample(
                        str(item["case"]),
                        view.image,
                        item["label"][0].numpy(),
                        item["edge"][0].numpy(),
                        view.edges,
                    ),
                    view,
                )
                for item, view in zip(loaded, views, strict=True)
            ]

    def score_items(self, items: Sequence[Mapping]) -> list[dict]:
        """Scores of items with image, label and edge (paths) and case."""
        return [self.score(*seen) for batch in self.read(items) for seen in batch]


def load_instruments(
    store: SliceStore,
    segmenter_dir: str,
    segmenter_configs: str | Sequence[str],
    training: Sequence[Mapping],
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    edge_weights: str | None = None,
) -> Instruments:
    """Loads what variants of a store are measured with.

    Args:
        store: the slice store; its detector finds the edges.
        segmenter_dir, segmenter_configs: see ``load_segmenter``.
        training: items of real training slices; NUM_REFERENCE of them are looked at.
        seed: draws these.
        device: where segmenter and detector run.
        batch_size: images a pass.
        edge_weights: where the store's edge weights are; None: cache, pip or hub.

    Source: engineering choice.
    """
    preprocessing = store.header["preprocessing"]
    load = LoadSliced(["image", "label", "edge"], preprocessing["image_size"])
    generator = np.random.RandomState(address_seed(seed, "quality reference"))
    chosen = generator.permutation(len(training))[:NUM_REFERENCE]
    loaded = (load(training[int(place)]) for place in chosen)
    pairs = [(item["image"][0].numpy(), item["label"][0].numpy()) for item in loaded]
    return Instruments(
        load_segmenter(segmenter_dir, segmenter_configs, store.num_classes, device),
        load_edge_detector_of(preprocessing, edge_weights, device),
        describe_reference(pairs),
        load,
        device,
        batch_size,
    )


def calibrate_judges(
    inner: Sequence[Mapping],
    instruments: Instruments,
    max_lost: float,
    num_calibrated: int,
    seed: int = 0,
) -> dict[str, Judge | None]:
    """A judge of each of GROUPS.

    Good are real slices, as they are and in other gray levels; bad are the same with defects.

    Args:
        inner: items of the fold's inner validation.
        instruments: what they are measured with.
        max_lost: share of good samples that may be rejected.
        num_calibrated: slices with foreground, and as many without, that are drawn at most.
        seed: draws slices and defects.

    Returns:
        The judges; None of small or empty labels where fewer than two cases have any: variants of
        such slices are then kept without a verdict.

    Raises:
        ValueError: fewer than two cases have a slice with a large label.

    Source: engineering choice (issue 5, "Quality filter").
    """
    return judges_of(calibration_scores(inner, instruments, num_calibrated, seed), max_lost)


def judges_of(scores: pd.DataFrame, max_lost: float) -> dict[str, Judge | None]:
    """The judges that follow from scores.

    Args:
        scores: as ``calibration_scores`` gives them.
        max_lost: see ``calibrate_judges``.

    Source: engineering choice.
    """
    judges: dict[str, Judge | None] = {}
    for group in GROUPS:
        rows = scores[scores.group == group].reset_index(drop=True)
        if group != "large" and rows.case[rows.kind == ""].nunique() < 2:
            logger.warning(
                "quality filter: fewer than two cases of the inner validation have slices with "
                "%s labels; variants of such slices are kept without a verdict",
                group,
            )
            judges[group] = None
            continue
        families = EMPTY_FAMILIES if group == "empty" else FAMILIES
        names = [name for family in families.values() for name in family]
        judges[group] = calibrate(rows, names, max_lost)
    return judges


def calibration_scores(
    inner: Sequence[Mapping], instruments: Instruments, num_calibrated: int, seed: int = 0
) -> pd.DataFrame:
    """Scores of good samples and of planted defects, a row each.

    Args:
        inner, instruments, num_calibrated, seed: see ``calibrate_judges``.

    Returns:
        The scores, with ``case``, ``kind`` (empty: good), ``group``, and ``as_it_is``: whether
        slice and label are untouched.

    Source: engineering choice.
    """
    items, labels = _draw_slices(inner, instruments.load, num_calibrated, seed)
    copies = 1 + FEW_SLICES // max(sum(label.any() for _, label in labels), 1)
    rows, number = [], 0
    for batch in instruments.read(items):
        changed: list[Sample] = []
        for sample, view in batch:
            rng = np.random.RandomState(address_seed(seed, "quality", sample.case, number))
            number += 1
            rows.append(instruments.score(sample, view) | {"as_it_is": True})
            strangers = [label for case, label in labels if case != sample.case]
            for _ in range(copies):
                gray = change_gray_levels(sample.image, rng)
                changed.append(replace(sample, image=gray))
                planted = (plant(kind, sample, strangers, rng) for kind in KINDS)
                for defect in (defect for defect in planted if defect is not None):
                    if defect.kind in SEES_IMAGE:
                        changed.append(defect)
                    else:
                        rows.append(instruments.score(defect, view))
        views = instruments.view([sample.image for sample in changed])
        rows += map(instruments.score, changed, views)
    scores = pd.DataFrame(rows)
    return scores.assign(as_it_is=scores.as_it_is.eq(True))  # noqa: FBT003


def _draw_slices(
    inner: Sequence[Mapping], load: LoadSliced, num_calibrated: int, seed: int
) -> tuple[list[Mapping], list[tuple[str, np.ndarray]]]:
    """Items with foreground and as many without, in a drawn order, and their cases and labels."""
    generator = np.random.RandomState(address_seed(seed, "quality slices"))
    items, labels, counts = [], [], {True: 0, False: 0}
    for place in generator.permutation(len(inner)):
        item = inner[int(place)]
        if min(counts.values()) >= num_calibrated:
            break
        label = LoadSliced("label", load.image_size)({"label": item["label"]})["label"][0].numpy()
        counts[bool(label.any())] += 1
        if counts[bool(label.any())] <= num_calibrated:
            items.append(item)
            labels.append((str(item["case"]), label))
    return items, labels

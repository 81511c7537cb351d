"""Comparison of all slices of a store: copies once turned, mirrored or cropped, and neighbors.

The thresholds come from planted copies and from pairs of different patients of BUSI and of
hippocampus MR.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from diffboost.data.candidates import Candidates
from diffboost.data.registration import Likeness, align, invert, texture
from diffboost.data.splits import group_cases
from diffboost.data.tasks import AXCODES, VOLUMES
from diffboost.data.transforms import LoadSliced

logger = logging.getLogger(__name__)

NEAR_DUPLICATE, SAME_VOLUME = "near-duplicate", "another slice of the same volume"
LIKE = 0.56  # least likeness of near-duplicates
PARALLELS = (-2, -1, 0, 1, 2)  # slices beside the two, of which volumes must be alike on average …
NEARLY = 0.1  # … where the two are nearly alike
LESS_IN_PLACE = 0.06  # less for unturned slices whose shape and spacing few other cases have
FEW = 0.1  # share of the cases
LEAST_OVERLAP = 0.6
SEARCH_PX, SEARCH_BAND = 32, (0.7, 3.0)
MEASURE_PX, MEASURE_BAND = 64, (0.7, 3.0)
LOADED_PX = 96
NUM_MEASURED = 6  # fine alignments for each case, of volumes with both neighbors …
CLEAR, MOST_MEASURED = 0.8, 8  # … and those of more cases, if their coarse correlation is clear
NUM_COMMON = 60  # components that a data set has in common, at most one for every so many slices:
SLICES_A_COMPONENT = 20
ENOUGH_COMPONENTS = 5  # with fewer, near-duplicates must be more alike: up to CLEAR, with none
LARGEST_COMMON = 1000  # slices from which they are learned
STANDS_OUT = 4.0  # near-duplicates lie this many deviations above the median of drawn pairs …
CERTAIN = 0.97  # … but more is never asked for
BATCH = 64


def in_plane_shape(shape: Sequence[int], affine: Sequence[float], slice_axis: str) -> list[int]:
    """Rows and columns of a volume's slices.

    Args:
        shape: of the file's array, 3 ints.
        affine: of the file, 16 floats.
        slice_axis: the task's.

    Source: engineering choice.
    """
    axes = nib.io_orientation(np.reshape(affine, (4, 4)))[:, 0]
    world = ["RAS".index(code) for code in AXCODES[slice_axis][:2]]
    return [int(shape[int(np.flatnonzero(axes == axis)[0])]) for axis in world]


class SliceComparison:
    """The slices of a store, with their textures, and the two searches among them.

    Args:
        index: rows of a store (case, slice, foreground_px, original_shape, affine, spacing_mm),
            those of a case one after the other.
        paths: the image of every row.
        task: the store's task.

    Raises:
        ValueError: the slices of a case do not stand together.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """

    def __init__(self, index: pd.DataFrame, paths: Sequence[Path], task: Mapping) -> None:
        self.names = list(dict.fromkeys(index.case))
        self.case = index.case.map({name: n for n, name in enumerate(self.names)}).to_numpy()
        self.number = index["slice"].to_numpy()
        self.starts = np.flatnonzero(np.r_[True, self.case[1:] != self.case[:-1]])
        self.counts = np.diff(np.r_[self.starts, len(self.case)])
        if len(self.starts) != len(self.names):
            raise ValueError("index: the slices of a case do not stand together")
        self.shown = [
            self._middle(index.foreground_px.to_numpy(), n) for n in range(len(self.names))
        ]
        flat = task["layout"] not in VOLUMES
        firsts = index.iloc[self.starts]
        shapes = [
            list(shape[:2]) if flat else in_plane_shape(shape, affine, task["slice_axis"])
            for shape, affine in zip(firsts.original_shape, firsts.affine, strict=True)
        ]
        spacings = [[1.0] * 3 if flat else list(spacing) for spacing in firsts.spacing_mm]
        self.plane = [
            (*shape, *(round(float(step), 4) for step in spacing))
            for shape, spacing in zip(shapes, spacings, strict=True)
        ]
        aspects = np.array([w * dx / (h * dy) for h, w, dy, dx, _ in self.plane])
        self._load(paths, aspects[self.case])

    def _middle(self, foreground_px: np.ndarray, case: int) -> int:
        """The slice that stands for a case: the middle one of those with foreground, or of all."""
        rows = np.arange(self.starts[case], self.starts[case] + self.counts[case])
        labelled = rows[foreground_px[rows] > 0]
        rows = labelled if len(labelled) else rows
        return int(rows[len(rows) // 2])

    def _load(self, paths: Sequence[Path], aspects: np.ndarray) -> None:
        load = LoadSliced("image", LOADED_PX)
        coarse, fine = [], []
        for path, aspect in zip(tqdm(paths, "textures", unit="slice"), aspects, strict=True):
            image = load({"image": path})["image"]
            coarse.append(texture(image, aspect, SEARCH_PX, SEARCH_BAND))
            fine.append(texture(image, aspect, MEASURE_PX, MEASURE_BAND).half())
        self.coarse, self.fine = torch.stack(coarse), torch.stack(fine)

    def near_duplicates(self) -> list[tuple]:
        """Rows (case, slice, other, other_slice, likeness, kind): alike once turned, cropped …

        Source: engineering choice.
        """
        candidates = Candidates(self.coarse, SEARCH_PX, self.shown, self.starts)
        found, drawn = (self._measure(self._align_coarsely(pairs)) for pairs in candidates.search())
        clear = _standing_out([score for *_, score in drawn], CLEAR)
        self.likeness = self._learn_common(found, clear)
        known = min(1, self.likeness.components.shape[1] / ENOUGH_COMPONENTS)
        usual = known * LIKE + (1 - known) * CLEAR
        self.limit = _standing_out(self._likeness_of(drawn), usual)
        if self.limit > usual:
            logger.warning(
                "the cases look much alike: pairs count as near-duplicates from a likeness of %.2f "
                "on, not from %.2f; changed copies may be missed",
                self.limit,
                usual,
            )
        found = [pair for pair in found if pair[3] > self.limit - NEARLY]
        alike = zip(found, self._likeness_of(found), strict=True)
        found = [pair for pair, value in alike if value > self.limit - NEARLY]
        return [
            self._pair(a, b, value, NEAR_DUPLICATE)
            for (a, b, _, _), value in zip(found, map(self._parallel_likeness, found), strict=True)
            if value >= self.limit
        ]

    def _parallel_likeness(self, pair: tuple) -> float:
        """Mean likeness of aligned slices and those beside them, by the same map, in either order.

        Two patients' slices may agree by chance; those beside them then do so less, while those of
        a copy of a volume agree as well.
        """
        a, b, map_, score = pair
        means = []
        for order in (1, -1):
            beside = [
                (a + step, b + order * step, map_, score)
                for step in PARALLELS
                if self._same_case(a, a + step) and self._same_case(b, b + order * step)
            ]
            means.append(float(np.mean(self._likeness_of(beside))))
        return max(means)

    def _same_case(self, row: int, other: int) -> bool:
        return 0 <= other < len(self.case) and self.case[row] == self.case[other]

    def _likeness_of(self, found: list[tuple]) -> list[float]:
        """Likeness of aligned slices, the lower one of two directions.

        What is common lies right in one of the two only, where the other is turned.
        """
        values = []
        for part in _batches(found):
            fixed, moving, maps, _ = zip(*part, strict=True)
            maps = torch.stack(maps)
            fixed, moving = (self.fine[list(rows)].float() for rows in (fixed, moving))
            one = self.likeness.measure(fixed, moving, maps)[1]
            two = self.likeness.measure(moving, fixed, invert(maps))[1]
            values += torch.minimum(one, two).tolist()
        return values

    def _pair(self, first: int, second: int, likeness: float, kind: str) -> tuple:
        """A row of the result, the case that comes first in the store in front."""
        first, second = sorted((first, second))
        names = ((self.names[self.case[n]], int(self.number[n])) for n in (first, second))
        return (*next(names), *next(names), round(likeness, 4), kind)

    def _align_coarsely(self, candidates: list[tuple]) -> list[tuple]:
        """The candidates that stand out for their slice after alignment of coarse textures."""
        plain = Likeness(self.coarse[:1], 0, SEARCH_PX)
        ranked: dict[int, dict[int, tuple]] = {}
        for part in _batches(candidates):
            fixed, moving, maps = zip(*part, strict=True)
            fixed, moving = (self.coarse[list(rows)] for rows in (fixed, moving))
            maps = align(fixed, moving, torch.stack(maps), SEARCH_PX)
            scores = plain.measure(fixed, moving, maps)[0].tolist()
            for (a, b, _), map_, score in zip(part, maps, scores, strict=True):
                best = ranked.setdefault(b, {})
                if score > best.get(self.case[a], (-np.inf,))[0]:
                    best[self.case[a]] = (score, a, map_)
        chosen = []
        for row, best in ranked.items():
            matches = sorted(best.values(), key=lambda match: -match[0])
            for rank, (score, match, map_) in enumerate(matches[:MOST_MEASURED]):
                if rank < NUM_MEASURED or score >= CLEAR:
                    chosen.append((match, row, map_))
        return chosen

    def _measure(self, chosen: list[tuple]) -> list[tuple]:
        """The best aligned slices of each pair of cases, with the correlation of fine textures."""
        last = len(self.case) - 1
        tried = [
            (near, row, map_)
            for match, row, map_ in chosen
            for near in (match - 1, match, match + 1)
            if 0 <= near <= last and self.case[near] == self.case[match]
        ]
        plain = Likeness(self.fine[:1], 0, MEASURE_PX)
        best: dict[tuple, tuple] = {}
        for part in _batches(tried, "alignment"):
            fixed, moving, maps = zip(*part, strict=True)
            fixed, moving = (self.fine[list(rows)].float() for rows in (fixed, moving))
            maps = align(fixed, moving, torch.stack(maps), MEASURE_PX)
            scores, _, overlaps = plain.measure(fixed, moving, maps)
            for (a, b, _), map_, score, overlap in zip(
                part, maps, scores.tolist(), overlaps.tolist(), strict=True
            ):
                key = tuple(sorted((self.case[a], self.case[b])))
                if overlap >= LEAST_OVERLAP and (key not in best or score > best[key][3]):
                    best[key] = (a, b, map_, score)
        return list(best.values())

    def _learn_common(self, found: list[tuple], clear: float) -> Likeness:
        """What the store's slices have in common; of cases that correlate clearly one is taken."""
        same = ((self.case[a], self.case[b]) for a, b, _, score in found if score >= clear)
        group = group_cases(range(len(self.names)), same)
        rows = np.flatnonzero([group[case] == case for case in self.case])
        num_components = min(NUM_COMMON, len(rows) // SLICES_A_COMPONENT)
        rows = rows[:: -(-len(rows) // LARGEST_COMMON)]
        return Likeness(self.fine[rows], num_components, MEASURE_PX)

    def same_volumes(self) -> list[tuple]:
        """The same of volumes whose slices lie on each other as they are, as neighbors do.

        Call it after ``near_duplicates``, which learns what the slices have in common.

        Source: engineering choice.
        """
        classes: dict[tuple, list[int]] = {}
        for case, plane in enumerate(self.plane):
            classes.setdefault(plane, []).append(case)
        pairs = []
        for cases in classes.values():
            if len(cases) > 1 and self.counts[cases].max() > 1:
                few = len(cases) <= max(3, FEW * len(self.names))
                pairs += self._neighbors(cases, self.limit - LESS_IN_PLACE * few)
        return pairs

    def _neighbors(self, cases: list[int], limit: float) -> list[tuple]:
        """Pairs of some cases with slices of at least this likeness, unturned; volumes only."""
        rows = np.concatenate([np.arange(self.counts[n]) + self.starts[n] for n in cases])
        values, masks = self.fine[rows].float().flatten(2).unbind(1)
        values = self.likeness.remainder(values, masks)
        values = values / values.norm(dim=1, keepdim=True).clamp_min(1e-6)
        ends = np.cumsum(self.counts[cases])
        pairs = []
        for position, end in enumerate(ends):
            own = slice(end - self.counts[cases[position]], end)
            likeness = (values[own] @ values[end:].T).numpy()
            for other in range(position + 1, len(cases)):
                if max(self.counts[cases[position]], self.counts[cases[other]]) == 1:
                    continue
                start = ends[other - 1] - end
                part = likeness[:, start : start + self.counts[cases[other]]]
                if part.max() >= limit:
                    a, b = np.unravel_index(part.argmax(), part.shape)
                    pair = rows[own.start + a], rows[end + start + b]
                    pairs.append(self._pair(*pair, float(part.max()), SAME_VOLUME))
        return pairs


def _standing_out(values: Sequence[float], usual: float) -> float:
    """The usual limit; a higher one if even cases that were drawn come near it.

    The deviation is that of the lower half: some drawn pairs may be duplicates.
    """
    if not len(values):
        return usual
    low, middle = np.quantile(values, [0.16, 0.5])
    return float(max(usual, min(middle + STANDS_OUT * (middle - low), CERTAIN)))


def _batches(items: list, shown: str | None = None) -> Iterable[list]:
    """The items, some at a time, with a progress bar if it has a name."""
    starts = range(0, len(items), BATCH)
    return (items[start : start + BATCH] for start in tqdm(starts, shown, disable=shown is None))

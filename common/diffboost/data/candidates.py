"""Slices that are worth an alignment: those that look alike once turned, and some drawn.

The drawn ones say how alike any two cases of the data set are.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor
from tqdm import tqdm

from diffboost.data.addresses import address_seed
from diffboost.data.registration import TurnSearch

NUM_TURNED = 24  # cases that are aligned coarsely, for each case, from two starts
NUM_UPRIGHT = 32  # more of them, of those that look alike as they are: images of one sweep do
UPRIGHT = (0, 1, 23)  # ways of turning by 0, 15 and -15 degrees, not mirrored
NUM_DRAWN = 120  # pairs of cases drawn at random
NUM_EXAMPLES = 40  # slices from which the components of the search are learned


class Candidates:
    """Finds for the slice that stands for a case slices of other cases, and how it is turned.

    Args:
        textures: float (N, 2, P, P), coarse textures of all slices of a store.
        root_px: root of a slice's area, pixels.
        shown: the slice that stands for a case, a row of ``textures`` for every case.
        starts: the first slice of every case.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """

    def __init__(
        self, textures: Tensor, root_px: int, shown: Sequence[int], starts: Sequence[int]
    ) -> None:
        examples = shown[:: -(-len(shown) // NUM_EXAMPLES)]
        self.turns = TurnSearch(textures, root_px, examples)
        self.textures, self.shown, self.starts = textures, shown, np.asarray(starts)
        self.ends = np.r_[self.starts[1:], len(textures)]

    def search(self) -> tuple[list[tuple[int, int, Tensor]], list[tuple[int, int, Tensor]]]:
        """Candidates, and pairs of cases that are drawn at random, treated alike.

        Returns:
            Two lists of (slice, slice that stands for another case, (2, 3) map that turns the
            second so that it looks like the first).

        Source: engineering choice.
        """
        drawn_cases = self._draw_cases()
        found: list[tuple] = []
        drawn: list[tuple] = []
        for case, row in enumerate(tqdm(self.shown, "search", unit="case")):
            scores, turns = (values.numpy() for values in self.turns.find(self.textures[row]))
            upright = scores[list(UPRIGHT)]
            starts = self._two_starts(scores, self._best_cases(scores, case, NUM_TURNED))
            for other in self._best_cases(upright, case, NUM_UPRIGHT):
                way, place = _two_best(upright[:, other], other.start)[0]
                starts.append((UPRIGHT[way], place))
            rows = [slice(self.starts[other], self.ends[other]) for other in drawn_cases[case]]
            for pairs, places in ((found, starts), (drawn, self._two_starts(scores, rows))):
                pairs += [
                    (place, row, self.turns.maps[turns[way, place]])
                    for way, place in dict.fromkeys(places)
                ]
        return found, drawn

    def _draw_cases(self) -> list[list[int]]:
        """For every case the later ones that it is paired with; all pairs are as likely."""
        generator = np.random.default_rng(address_seed("pairs of cases"))
        pairs = np.sort(generator.integers(len(self.shown), size=(NUM_DRAWN, 2)))
        others: list[list[int]] = [[] for _ in self.shown]
        for first, second in np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0):
            others[first].append(int(second))
        return others

    def _best_cases(self, scores: np.ndarray, case: int, count: int) -> Iterable[slice]:
        """The rows of each other case with one of the best scores; scores are (ways, slices)."""
        best = np.maximum.reduceat(scores.max(axis=0), self.starts)
        best[case] = -np.inf
        for other in np.argsort(-best, kind="stable")[: min(count, len(best) - 1)]:
            yield slice(self.starts[other], self.ends[other])

    def _two_starts(self, scores: np.ndarray, cases: Iterable[slice]) -> list[tuple[int, int]]:
        """Two ways and rows to start from in every case."""
        return [start for rows in cases for start in _two_best(scores[:, rows], rows.start)]


def _two_best(scores: np.ndarray, first: int) -> list[tuple[int, int]]:
    """Way and row of the highest of scores (ways, slices), and of the highest far from it.

    ``first`` is the row of the first slice.
    """
    way, place = np.unravel_index(scores.argmax(), scores.shape)
    rest = scores.copy()
    rest[way, max(0, place - 2) : place + 3] = -np.inf
    other_way, other_place = np.unravel_index(rest.argmax(), rest.shape)
    return [(int(way), first + int(place)), (int(other_way), first + int(other_place))]

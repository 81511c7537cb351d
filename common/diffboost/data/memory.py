"""Decoded pictures in memory: each is read from its file once, whichever loader worker asks."""

import mmap
import multiprocessing
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from diffboost.data.images import read_levels

GIB = 1 << 30
FILES = (("image", np.uint16), ("label", np.uint8))


class PictureMemory:
    """The pictures of slices and variants as they were decoded, as far as a budget goes.

    Each gets its room beforehand, in the order given, until the budget is spent; it is filled when
    the picture is first asked for. The room is an anonymous map of memory, so that workers forked
    from this process fill it for each other, and pages that are never filled take none; a pickled
    copy (spawned workers) begins empty. MONAI's CacheDataset has no budget in bytes, keeps float32,
    and knows nothing of the variants, of which an epoch draws one each.

    Args:
        data: lists of items with ``image``, ``label`` and, where there are any, ``variants`` and
            ``variant_labels``: paths. The slices of all lists come first, variants afterwards.
        image_size: side S of the pictures in pixels; others, and those that are neither 16-bit
            images nor 8-bit labels, are read from their file each time.
        gib: room for decoded pictures in GiB (2**30 bytes); 0 reads each time.

    Raises:
        ValueError: ``gib`` is below 0.

    Source: engineering choice (issue 6: decoded stores stay in memory when they fit).
    """

    def __init__(self, data: Iterable[Iterable[Mapping]], image_size: int, gib: float) -> None:
        if not gib >= 0:
            raise ValueError(f"cache_gib: {gib}; at least 0 is needed, which reads each time")
        self.image_size = image_size
        self.places: dict[str, tuple[int, int, type]] = {}  # path: number, first byte, type
        size, budget = 0, int(gib * GIB)
        for path, kind in _pictures(data):
            needed = image_size**2 * np.dtype(kind).itemsize
            if size + needed > budget:
                break
            if path not in self.places:
                self.places[path] = (len(self.places), size, kind)
                size += needed
        self.size = size
        self._make_room()

    def _make_room(self) -> None:
        self.room = mmap.mmap(-1, max(1, self.size))
        self.filled = mmap.mmap(-1, max(1, len(self.places)))
        self.lock = multiprocessing.Lock()  # what is marked as filled is seen whole

    def __getstate__(self) -> dict:
        """All but the room, which only a fork shares."""
        return {"image_size": self.image_size, "places": self.places, "size": self.size}

    def __setstate__(self, state: dict) -> None:
        """Makes an empty room."""
        vars(self).update(state)
        self._make_room()

    def read(self, path: str | Path, key: str) -> np.ndarray:
        """The levels of a picture, a copy; see ``images.read_levels``, whose errors it passes on.

        Args:
            path: its file.
            key: what it is: ``image``, ``synthetic`` or ``label``.
        """
        if str(path) not in self.places:
            return read_levels(path, key)
        number, start, kind = self.places[str(path)]
        shape = (self.image_size, self.image_size)
        place = np.frombuffer(self.room, kind, self.image_size**2, start).reshape(shape)
        with self.lock:
            filled = self.filled[number]
        if filled:
            return place.copy()
        levels = read_levels(path, key)
        if levels.dtype == kind and levels.shape == shape:
            place[:] = levels
            with self.lock:
                self.filled[number] = 1
        return levels


def _pictures(data: Iterable[Iterable[Mapping]]) -> Iterable[tuple[str, type]]:
    """Paths and types of the pictures of items, slices before variants."""
    variants: list[tuple[str, type]] = []
    for item in (item for items in data for item in items):
        yield from ((str(item[key]), kind) for key, kind in FILES if key in item)
        for key, kind in (("variants", np.uint16), ("variant_labels", np.uint8)):
            variants += ((str(path), kind) for path in item.get(key, ()))
    yield from variants

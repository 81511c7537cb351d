"""Writing the store of a tree: an index that streams to disk, and edges in resumable shards."""

import functools
import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffboost.conditions.edges import EdgeDetector
from diffboost.conditions.prompts import prompt_from_path
from diffboost.data.addresses import address_seed
from diffboost.data.containment import refuse_names
from diffboost.data.documents import read_json
from diffboost.data.items import INDEX_KINDS
from diffboost.data.loading import TreeBatches, refuse_gone
from diffboost.data.slices import INDEX_COLUMNS, write_edge
from diffboost.data.sources import unique_names
from diffboost.data.tables import open_table, read_csv, read_table
from diffboost.data.tree import PngChecks, scan_tree
from diffboost.files import flush, write_aside
from diffboost.processes import process_rank_and_count
from diffboost.store_writer import EDGE_BATCH, FOLDERS, check_rejected, finish_store

CHUNK = 1024  # files that a worker checks at a time
ROW_GROUP = 64 * CHUNK
UNUSABLE = "unusable"  # folder of reasons against images that turn out bad when they are decoded
SCHEMA = pa.schema(
    {
        **{name: pa.string() for name in INDEX_COLUMNS},
        **{name: pa.int64() for name in ("slice", "fold", "foreground_px")},
        "spacing_mm": pa.list_(pa.float64()),
        "original_shape": pa.list_(pa.int64()),
        "affine": pa.list_(pa.float64()),
    }
)


class TreeWriter:
    """Writes the store of a tree modality/organ/finding/*.png, whose images stay in place.

    First one process writes the index, then any number of processes write the edges, each file
    once, aside and renamed; a file that is there is done. At last one process finishes.

    Args:
        store_dir: folder to fill.
        root: the tree.
        wanted: task and parameters, as they go into dataset.json.
        detector: edges of images.

    Source: DiffBoost Sec. 3.2; engineering choice (issue 3, "RadImageNet").
    """

    def __init__(
        self, store_dir: Path, root: Path, wanted: Mapping, detector: EdgeDetector
    ) -> None:
        self.store_dir = store_dir
        self.root = root
        self.wanted = wanted
        self.detector = detector
        self.index_path = store_dir / "index.parquet"

    def write_index(self, num_workers: int, max_rejected_fraction: float) -> None:
        """Checks every file and writes index.parquet and rejected.csv; nothing if they are there.

        Args:
            num_workers: processes that read files beside this one.
            max_rejected_fraction: share of files in [0, 1] that may be rejected.

        Raises:
            ValueError: no image, or too many are rejected.
            OSError: the tree is gone.

        Source: engineering choice (issue 3, "RadImageNet").
        """
        if self.index_path.is_file():
            return
        paths, rejected = scan_tree(self.root)
        paths = self._limit(paths)
        partial = self.index_path.with_suffix(".partial")
        num_rows, num_test, nearest = 0, 0, (float("inf"), "")
        with pq.ParquetWriter(partial, SCHEMA, write_page_checksum=True) as writer:
            for rows in self._rows(paths, rejected, num_workers):
                writer.write_table(rows)
                num_rows += len(rows)
                num_test += pc.sum(pc.equal(rows["section"], "test")).as_py() or 0
                if not num_test:
                    draws = ((self._draw(path), path) for path in rows["image"].to_pylist())
                    nearest = min(nearest, min(draws))
        if num_rows:
            refuse_gone([self.root / rows["image"][-1].as_py()])
        check_rejected(rejected, num_rows, max_rejected_fraction)
        if self.wanted["validation_fraction"] and not num_test and num_rows > 1:
            _rewrite(partial, functools.partial(_hold_out, path=nearest[1]))
        self._write_rejected(rejected)
        flush(partial)
        os.replace(partial, self.index_path)
        flush(self.store_dir)

    def _limit(self, paths: list[str]) -> list[str]:
        """``num_cases`` images drawn by seed, in their order; all if it is None."""
        wanted = self.wanted["num_cases"]
        if wanted is None:
            return paths
        if not 0 < wanted <= len(paths):
            raise ValueError(f"num_cases: {wanted}; there are {len(paths)} images")
        draw = functools.partial(address_seed, self.wanted["seed"], "prepare")
        drawn = heapq.nsmallest(wanted, ((draw(path), path) for path in paths))
        kept = {path for _, path in drawn}
        return [path for path in paths if path in kept]

    def _draw(self, path: str) -> float:
        """A number in [0, 1) by path: below ``validation_fraction`` the image is held out."""
        return address_seed(self.wanted["seed"], "test", path) / 2**32

    def _fold(self, path: str) -> int:
        """The fold of an image by path; -1 (never held out) where there is one fold only."""
        num_folds = self.wanted["num_folds"]
        return address_seed(self.wanted["seed"], "fold", path) % num_folds if num_folds > 1 else -1

    def _rows(self, paths: list[str], rejected: list, num_workers: int) -> Iterator[pa.Table]:
        """Row groups of the index; bad files are added to ``rejected``."""
        checks = DataLoader(PngChecks(self.root, paths, CHUNK), None, num_workers=num_workers)
        names = unique_names(path.rsplit(".", 1)[0] for path in paths)
        good: list[tuple] = []
        with tqdm(desc="index", unit="image", total=len(paths)) as bar:
            for number, results in enumerate(checks):
                chunk = paths[number * CHUNK : (number + 1) * CHUNK]
                for path, name, result in zip(chunk, names, results, strict=False):
                    if isinstance(result, str):
                        rejected.append((path, result))
                    else:
                        good.append((path, name, *result))
                bar.update(len(chunk))
                while len(good) >= ROW_GROUP:
                    yield self._table(good[:ROW_GROUP])
                    del good[:ROW_GROUP]
        if good:
            yield self._table(good)

    def _table(self, good: Sequence[tuple]) -> pa.Table:
        """Rows of the index for images (path, case, sha256, height, width)."""
        paths, cases, hashes, heights, widths = zip(*good, strict=True)
        held_out = [self._draw(path) < self.wanted["validation_fraction"] for path in paths]
        pairs = zip(paths, held_out, strict=True)
        folds = [-1 if held else self._fold(path) for path, held in pairs]
        same = {
            "slice": 0, "label": "", "image_root": "source", "foreground_px": 0,
            "source_label": "", "spacing_mm": [1.0] * 3, "affine": np.eye(4).ravel(),
        }  # fmt: skip
        columns = {name: [value] * len(paths) for name, value in same.items()} | {
            "case": cases,
            "group": cases,  # near-duplicates are not searched among a million images
            "image": paths,
            "edge": [f"edges/{path}" for path in paths],
            "prompt": [_prompt(path.rsplit("/", 1)[0]) for path in paths],
            "section": ["test" if held else "training" for held in held_out],
            "fold": folds,
            "original_shape": list(zip(heights, widths, [1] * len(paths), strict=True)),
            "sha256": hashes,
            "source_image": paths,
            "source_sha256": hashes,
            "image_sha256": hashes,
        }
        return pa.table({name: columns[name] for name in INDEX_COLUMNS}, schema=SCHEMA)

    def write_edges(self, num_workers: int) -> None:
        """Writes this process's share of the edges that are not there yet.

        Args:
            num_workers: processes that load images beside this one.

        Source: DiffBoost Sec. 3.2.
        """
        paths = read_table(self.index_path, "store_dir", {"image": "text"})["image"]
        refuse_names(paths, f"{self.index_path}: image")
        rank, count = process_rank_and_count()
        numbers = range(rank, -(-len(paths) // EDGE_BATCH), count)
        unusable = self._read_unusable()
        todo = [
            number
            for number in tqdm(numbers, "edges there", unit="batch", disable=rank > 0)
            if not all(
                path in unusable or (self.store_dir / "edges" / path).exists()
                for path in paths.slice(number * EDGE_BATCH, EDGE_BATCH).to_pylist()
            )
        ]
        size = self.wanted["preprocessing"]["image_size"]
        dataset = TreeBatches(self.root, paths, todo, EDGE_BATCH, size)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        for batch in tqdm(loader, "edges", unit="batch", disable=rank > 0):
            self._write_batch(batch)

    def _write_batch(self, batch: Sequence[tuple[str, torch.Tensor | str]]) -> None:
        """Writes the missing edges of a batch; the whole of it is detected, as the first time."""
        good = [(path, image) for path, image in batch if not isinstance(image, str)]
        for path, reason in batch:
            if isinstance(reason, str):
                name = hashlib.sha256(path.encode()).hexdigest()[:32]
                note = json.dumps([path, reason])
                write_aside(
                    self.store_dir / UNUSABLE / name,
                    functools.partial(Path.write_text, data=note, encoding="utf-8"),
                )
        if not good:
            return
        edges = self.detector(torch.stack([image for _, image in good]))
        for (path, _), edge in zip(good, edges, strict=True):
            target = self.store_dir / "edges" / path
            if not target.exists():
                write_aside(target, functools.partial(write_edge, edge=edge[0].numpy()))

    def _read_unusable(self) -> dict[str, str]:
        """Path and reason of images that could not be decoded."""
        notes = sorted((self.store_dir / UNUSABLE).glob("*"))
        notes = [path for path in notes if path.suffix != ".partial"]
        return dict(read_json(path, "store_dir", list) for path in notes)

    def finish(self, max_rejected_fraction: float) -> int:
        """Takes unusable images out of the index; writes dataset.json and the contact sheet.

        Args:
            max_rejected_fraction: share of files in [0, 1] that may be rejected.

        Returns:
            Number of images in the store.

        Raises:
            ValueError: too many are rejected.

        Source: engineering choice (design, "Slice store").
        """
        unusable = self._read_unusable()
        rejected = self._read_rejected() | unusable
        if unusable:
            self._write_rejected(sorted(rejected.items()))
            _rewrite(self.index_path, functools.partial(_leave_out, paths=list(unusable)))
            shutil.rmtree(self.store_dir / UNUSABLE)
        sections = read_table(self.index_path, "store_dir", {"section": "text"}, ["section"])
        counts = sections["section"].value_counts().to_pylist()
        counts = {count["values"]: count["counts"] for count in counts}
        check_rejected(list(rejected.items()), sum(counts.values()), max_rejected_fraction)
        for name in FOLDERS:
            (self.store_dir / name).mkdir(exist_ok=True)
        finish_store(self.store_dir, self.wanted, self.detector, counts)
        return sum(counts.values())

    def _read_rejected(self) -> dict[str, str]:
        path = self.store_dir / "rejected.csv"
        table = read_csv(path, "store_dir", ["file", "reason"], keep_default_na=False)
        return dict(zip(table.file, table.reason, strict=True))

    def _write_rejected(self, rejected: Sequence[tuple[str, str]]) -> None:
        table = pd.DataFrame(rejected, columns=["file", "reason"])
        write_aside(self.store_dir / "rejected.csv", functools.partial(table.to_csv, index=False))


@functools.lru_cache(maxsize=4096)
def _prompt(folder: str) -> str:
    """The prompt of every image of a folder modality/organ/finding."""
    return prompt_from_path(f"{folder}/name.png")


def _rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a parquet file row group by row group, aside, and moves it into place."""

    def write(partial: Path) -> None:
        with (
            open_table(path, "store_dir", INDEX_KINDS) as old,
            pq.ParquetWriter(partial, SCHEMA, write_page_checksum=True) as new,
        ):
            for number in range(old.num_row_groups):
                new.write_table(change(old.read_row_group(number)))

    write_aside(path, write)


def _hold_out(rows: pa.Table, path: str) -> pa.Table:
    """Moves one image into section test."""
    chosen = pc.equal(rows["image"], path)
    for name, value in (("section", "test"), ("fold", -1)):
        column = pc.if_else(chosen, pa.scalar(value, SCHEMA.field(name).type), rows[name])
        rows = rows.set_column(rows.column_names.index(name), SCHEMA.field(name), column)
    return rows


def _leave_out(rows: pa.Table, paths: Sequence[str]) -> pa.Table:
    """The rows of other images than these."""
    return rows.filter(pc.invert(pc.is_in(rows["image"], pa.array(paths))))

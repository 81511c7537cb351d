"""Writing a slice store: slices, labels and edges, then the header, the index and the lists."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffboost.conditions.edges import EdgeDetector, join_edges, mask_edges
from diffboost.conditions.prompts import task_prompt
from diffboost.contact_sheet import write_contact_sheet
from diffboost.data.documents import DIGEST, digest_of
from diffboost.data.duplicates import find_duplicates, is_too_large
from diffboost.data.hashes import MOVABLE
from diffboost.data.loading import CaseDataset, LoadedCase
from diffboost.data.slices import (
    INDEX_COLUMNS,
    STORE_VERSION,
    read_store,
    sha256_of_files,
    write_edge,
    write_image,
    write_label,
)
from diffboost.data.sources import Case, Source
from diffboost.data.splits import assign_folds, group_cases
from diffboost.data.tables import write_table

logger = logging.getLogger(__name__)

EDGE_BATCH = 8  # slices; more only take more memory on a CPU
SHOWN_REASONS = 5


class StoreWriter:
    """Writes the files of one slice store.

    Args:
        store_dir: folder to fill.
        root: folder of the source files.
        wanted: task and parameters, as they go into dataset.json.
        detector: edges of images.

    Source: engineering choice (design, "Slice store").
    """

    def __init__(
        self, store_dir: Path, root: Path, wanted: Mapping, detector: EdgeDetector
    ) -> None:
        self.store_dir = store_dir
        self.root = root
        self.wanted = wanted
        self.detector = detector
        self.rows: list[dict] = []
        self.rejected: list[tuple[str, str]] = []
        self.num_cases = 0
        self._pending: list[tuple[dict, torch.Tensor, torch.Tensor]] = []
        for name in ("images", "labels", "edges"):
            (store_dir / name).mkdir()

    def write_slices(self, source: Source, num_workers: int) -> None:
        """Loads every case and writes its slices; bad ones are noted with their reason.

        Args:
            source: cases, and files that the reader rejected.
            num_workers: processes that load cases beside this one.
        """
        self.rejected += source.rejected
        size = self.wanted["preprocessing"]["image_size"]
        dataset = CaseDataset(source.cases, self.wanted["task"], size)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        for case, loaded in zip(source.cases, tqdm(loader, "prepare", unit="case"), strict=True):
            if isinstance(loaded, str):
                self.rejected.append((case.image.relative_to(self.root).as_posix(), loaded))
                continue
            self.num_cases += 1
            for slice_of_case in self._slices(case, loaded):
                self._pending.append(slice_of_case)
                if len(self._pending) == EDGE_BATCH:
                    self._flush()
        self._flush()

    def _slices(self, case: Case, loaded: LoadedCase) -> Iterator[tuple]:
        """Row, image (1, S, S) and label of every slice of a case; paths come with the writing."""
        relative = case.image.relative_to(self.root)
        shared = {
            "case": case.name,
            "image_root": "store",
            "prompt": task_prompt(self.wanted["task"], case.finding),
            "section": case.section,
            "spacing_mm": loaded.spacing_mm,
            "original_shape": loaded.original_shape,
            "affine": loaded.affine,
            "source_image": relative.as_posix(),
            "source_label": "|".join(
                path.relative_to(self.root).as_posix() for path in case.labels
            ),
            "source_sha256": loaded.sha256,
        }
        for number, (image, label) in enumerate(zip(loaded.images, loaded.labels, strict=True)):
            foreground = int((label > 0).sum())
            yield shared | {"slice": number, "foreground_px": foreground}, image, label

    def _flush(self) -> None:
        """Detects the edges of the slices that wait and writes all their files."""
        if not self._pending:
            return
        rows, images, labels = zip(*self._pending, strict=True)
        self._pending = []
        edges = self.detector(torch.stack(images))
        edges = join_edges(edges, mask_edges(torch.stack(labels)))
        for row, image, label, edge in zip(rows, images, labels, edges, strict=True):
            name = f"{row['case']}_{row['slice']:04d}.png"
            row |= {key: f"{key}s/{name}" for key in ("image", "label", "edge")}
            write_image(self.store_dir / row["image"], image[0].numpy())
            write_label(self.store_dir / row["label"], label[0].numpy())
            write_edge(self.store_dir / row["edge"], edge[0].numpy())
            row["sha256"] = sha256_of_files([self.store_dir / row["image"]])
            self.rows.append(row)

    def write_index(self, max_rejected_fraction: float) -> None:
        """Writes rejected.csv, dataset.json, index.parquet and the contact sheet.

        Args:
            max_rejected_fraction: share of cases that may be rejected.

        Raises:
            ValueError: more were rejected, or too few cases are left for the folds.
        """
        check_rejected(self.rejected, self.num_cases, max_rejected_fraction)
        rejected = pd.DataFrame(self.rejected, columns=["file", "reason"])
        rejected.to_csv(self.store_dir / "rejected.csv", index=False)
        index = pd.DataFrame(self.rows)
        index["group"] = self._groups(index)
        training = index.case[index.section == "training"].unique()
        num_folds = self.wanted["num_folds"]
        if (index.section == "test").any():  # folds only move the inner validation then
            num_folds = min(num_folds, len(training))
        groups = dict(zip(index.case, index.group, strict=True))
        folds = assign_folds(
            training, num_folds, self.wanted["seed"], self.wanted["fold_order"], groups
        )
        index["fold"] = index.case.map(folds).fillna(-1).astype(int)
        write_table(self.store_dir / "index.parquet", index[list(INDEX_COLUMNS)])
        sections = index.drop_duplicates("case").section.value_counts()
        finish_store(self.store_dir, self.wanted, self.detector, sections)

    def _groups(self, index: pd.DataFrame) -> pd.Series:
        """The group of every row: cases that show the same scan; writes them to duplicates.csv."""
        if not self.wanted["group_duplicates"]:
            return index.case
        if is_too_large(index):
            logger.warning(
                "%d cases with %d slices are too many to be searched for near-duplicates: each is "
                "a group of its own; name the groups in index.parquet if you know them",
                index.case.nunique(),
                len(index),
            )
            return index.case
        paths = [self.store_dir / name for name in index.image]
        pairs = find_duplicates(index, paths, self.wanted["task"])
        pairs.to_csv(self.store_dir / "duplicates.csv", index=False)
        groups = group_cases(index.case.unique(), zip(pairs.case, pairs.other, strict=True))
        if len(pairs):
            logger.warning(
                "%d pairs of cases show the same scan (duplicates.csv), the most alike %s and %s; "
                "folds keep them together",
                len(pairs),
                *pairs.loc[0, ["case", "other"]],
            )
        return index.case.map(groups)


def check_rejected(
    rejected: Sequence[tuple[str, str]], num_cases: int, max_rejected_fraction: float
) -> None:
    """Logs what was rejected.

    Args:
        rejected: files and reasons.
        num_cases: how many cases are good.
        max_rejected_fraction: share of all in [0, 1] that may be rejected.

    Raises:
        ValueError: more were rejected, or nothing is left.

    Source: engineering choice (design, "Failure").
    """
    total = len(rejected) + num_cases
    shown = "; ".join(f"{file}: {reason}" for file, reason in rejected[:SHOWN_REASONS])
    if len(rejected) > SHOWN_REASONS:
        shown += f"; and {len(rejected) - SHOWN_REASONS} more"
    if len(rejected) > max_rejected_fraction * total or not num_cases:
        raise ValueError(
            f"{len(rejected)} of {total} cases were rejected, max_rejected_fraction "
            f"{max_rejected_fraction} allows fewer: {shown}"
        )
    if rejected:
        logger.warning("rejected %d of %d cases (rejected.csv): %s", len(rejected), total, shown)


def finish_store(
    store_dir: Path, wanted: Mapping, detector: EdgeDetector, sections: Mapping[str, int]
) -> None:
    """Writes dataset.json and the contact sheet of a store whose other files are there.

    Args:
        store_dir: the store's folder.
        wanted: task and parameters, as they go into dataset.json.
        detector: brings the hash of its weights.
        sections: number of cases of the sections ``training`` and ``test``.

    Source: engineering choice (design, "Slice store").
    """
    task = wanted["task"]
    labels = {"0": "background"}
    labels |= {str(number): name for number, name in enumerate(task["labels"], start=1)}
    header = {
        "name": task["name"],
        "description": task["description"],
        "modality": {"0": task["modality"]},
        "labels": labels,
        "numTraining": int(sections.get("training", 0)),
        "numTest": int(sections.get("test", 0)),
        "store_version": STORE_VERSION,
        **wanted,
        "preprocessing": wanted["preprocessing"] | {"edge_weights_sha256": detector.weights_sha256},
    }
    header[DIGEST] = digest_of(header, MOVABLE)
    text = json.dumps(header, indent=2) + "\n"
    (store_dir / "dataset.json").write_text(text, encoding="utf-8")
    write_contact_sheet(read_store(store_dir), store_dir / "contact_sheet.png")

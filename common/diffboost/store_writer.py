"""Writing a slice store: slices, labels and edges, then the header, the index and the lists."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffboost.conditions.edges import EdgeDetector, join_edges, mask_edges
from diffboost.conditions.prompts import prompt_from_path, task_prompt
from diffboost.contact_sheet import write_contact_sheet
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
from diffboost.data.splits import assign_folds

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
        self.hashes: dict[str, str] = {}
        self._pending: list[tuple[dict, torch.Tensor, torch.Tensor | None]] = []
        self._in_tree = wanted["task"]["layout"] == "radimagenet"
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
            self.hashes[case.name] = loaded.sha256
            for slice_of_case in self._slices(case, loaded):
                self._pending.append(slice_of_case)
                if len(self._pending) == EDGE_BATCH:
                    self._flush()
        self._flush()

    def _slices(self, case: Case, loaded: LoadedCase) -> Iterator[tuple]:
        """Row, image (1, S, S) and label of every slice of a case; paths come with the writing."""
        relative = case.image.relative_to(self.root)
        task = self.wanted["task"]
        shared = {
            "case": case.name,
            "prompt": prompt_from_path(relative)
            if self._in_tree
            else task_prompt(task, case.finding),
            "section": case.section,
            "spacing_mm": loaded.spacing_mm,
            "original_shape": loaded.original_shape,
            "affine": loaded.affine,
            "source_image": relative.as_posix(),
            "source_label": "|".join(
                path.relative_to(self.root).as_posix() for path in case.labels
            ),
        }
        for number, image in enumerate(loaded.images):
            label = None if loaded.labels is None else loaded.labels[number]
            foreground = 0 if label is None else int((label > 0).sum())
            yield shared | {"slice": number, "foreground_px": foreground}, image, label

    def _flush(self) -> None:
        """Detects the edges of the slices that wait and writes all their files."""
        if not self._pending:
            return
        rows, images, labels = zip(*self._pending, strict=True)
        self._pending = []
        edges = self.detector(torch.stack(images))
        if labels[0] is not None:
            edges = join_edges(edges, mask_edges(torch.stack(labels)))
        for row, image, label, edge in zip(rows, images, labels, edges, strict=True):
            name = f"{row['case']}_{row['slice']:04d}.png"
            row |= {"image": f"images/{name}", "edge": f"edges/{name}", "label": ""}
            row["image_root"] = "source" if self._in_tree else "store"
            write_edge(self.store_dir / row["edge"], edge[0].numpy())
            if self._in_tree:
                row["image"] = row["source_image"]
                row["sha256"] = self.hashes[row["case"]]
            else:
                write_image(self.store_dir / row["image"], image[0].numpy())
                row["sha256"] = sha256_of_files([self.store_dir / row["image"]])
            if label is not None:
                row["label"] = f"labels/{name}"
                write_label(self.store_dir / row["label"], label[0].numpy())
            self.rows.append(row)

    def write_index(self, max_rejected_fraction: float) -> None:
        """Writes rejected.csv, dataset.json, index.parquet and the contact sheet.

        Args:
            max_rejected_fraction: share of cases that may be rejected.

        Raises:
            ValueError: more were rejected, or too few cases are left for the folds.
        """
        self._check_rejected(max_rejected_fraction)
        rejected = pd.DataFrame(self.rejected, columns=["file", "reason"])
        rejected.to_csv(self.store_dir / "rejected.csv", index=False)
        index = pd.DataFrame(self.rows)
        training = index.case[index.section == "training"].unique()
        num_folds = self.wanted["num_folds"]
        if (index.section == "test").any():  # folds only move the inner validation then
            num_folds = min(num_folds, len(training))
        folds = assign_folds(training, num_folds, self.wanted["seed"])
        index["fold"] = index.case.map(folds).fillna(-1).astype(int)
        index[list(INDEX_COLUMNS)].to_parquet(self.store_dir / "index.parquet", index=False)
        header = json.dumps(self._header(index), indent=2)
        (self.store_dir / "dataset.json").write_text(header + "\n", encoding="utf-8")
        write_contact_sheet(read_store(self.store_dir), self.store_dir / "contact_sheet.png")

    def _check_rejected(self, max_rejected_fraction: float) -> None:
        """Logs what was rejected; raises if that was too much."""
        total = len(self.rejected) + len(self.hashes)
        reasons = [f"{file}: {reason}" for file, reason in self.rejected]
        shown = "; ".join(reasons[:SHOWN_REASONS])
        shown += f"; and {len(reasons) - SHOWN_REASONS} more" * (len(reasons) > SHOWN_REASONS)
        if len(self.rejected) > max_rejected_fraction * total or not self.hashes:
            raise ValueError(
                f"{len(reasons)} of {total} cases were rejected, max_rejected_fraction "
                f"{max_rejected_fraction} allows fewer: {shown}"
            )
        if reasons:
            logger.warning("rejected %d of %d cases (rejected.csv): %s", len(reasons), total, shown)

    def _header(self, index: pd.DataFrame) -> dict:
        """The contents of dataset.json."""
        task = self.wanted["task"]
        preprocessing = self.wanted["preprocessing"] | {
            "edge_weights_sha256": self.detector.weights_sha256
        }
        sections = index.drop_duplicates("case").section.value_counts()
        return {
            "name": task["name"],
            "description": task["description"],
            "modality": {"0": task["modality"]},
            "labels": {"0": "background"}
            | {str(number): name for number, name in enumerate(task["labels"], start=1)},
            "numTraining": int(sections.get("training", 0)),
            "numTest": int(sections.get("test", 0)),
            "store_version": STORE_VERSION,
            **self.wanted,
            "preprocessing": preprocessing,
            "source_sha256": self.hashes,
        }

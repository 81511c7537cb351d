"""Writing a slice store: slices, labels and edges, then the header, the index and the lists."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffboost.conditions.edges import EdgeDetector, join_edges, mask_edges
from diffboost.conditions.prompts import task_prompt
from diffboost.contact_sheet import write_contact_sheet
from diffboost.data.documents import DIGEST, digest_of
from diffboost.data.duplicates import find_duplicates, is_too_large, numbered_slices
from diffboost.data.hashes import MOVABLE
from diffboost.data.loading import CaseDataset, LoadedCase
from diffboost.data.pseudonyms import write_sources
from diffboost.data.slices import (
    INDEX_COLUMNS,
    STORE_VERSION,
    read_store,
    write_edge,
    write_image,
    write_label,
)
from diffboost.data.sources import Case, Source
from diffboost.data.splits import assign_folds, group_cases
from diffboost.data.tables import write_table
from diffboost.files import sha256_of_files
from diffboost.records import DoneCases, state_of

logger = logging.getLogger(__name__)

EDGE_BATCH = 8  # slices; more only take more memory on a CPU
SHOWN_REASONS = 5
FOLDERS = ("images", "labels", "edges")


class StoreWriter:
    """Writes the files of one slice store.

    Args:
        store_dir: folder to fill; cases that an interrupted run has done there are kept.
        root: folder of the source files.
        wanted: task and parameters, as they go into dataset.json.
        detector: edges of images.
        home: folder for what names the source files, where the cases have pseudonyms; then the
            store names none. None: the index names them.

    Source: engineering choice (design, "Slice store").
    """

    def __init__(
        self,
        store_dir: Path,
        root: Path,
        wanted: Mapping,
        detector: EdgeDetector,
        home: Path | None = None,
    ) -> None:
        self.store_dir = store_dir
        self.root = root
        self.wanted = wanted
        self.detector = detector
        self.home = home
        self.rows: list[dict] = []
        self.rejected: list[tuple[str, str]] = []
        self.num_cases = 0
        for name in FOLDERS:
            (store_dir / name).mkdir(exist_ok=True)

    def write_slices(self, source: Source, num_workers: int) -> None:
        """Loads the cases that are not done yet and writes their slices; notes why others are bad.

        Args:
            source: cases, and files that the reader rejected.
            num_workers: processes that load cases beside this one.

        Raises:
            OSError: a source file is gone that was there when the work began.
        """
        done = DoneCases(self.store_dir)
        origins, results = self._look(source.cases, done)
        todo = [case for case in source.cases if case.name not in results]
        if len(todo) < len(source.cases):
            logger.info("%d of %d cases are left to do", len(todo), len(source.cases))
        size = self.wanted["preprocessing"]["image_size"]
        dataset = CaseDataset(todo, self.wanted["task"], size)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        for case, loaded in zip(todo, tqdm(loader, "prepare", unit="case"), strict=True):
            if isinstance(loaded, LoadedCase):
                rows = self._write_case(case, loaded)
                files = [row[key] for row in rows for key in ("image", "label", "edge")]
                done.write(case.name, origins[case.name], rows, files)
                loaded = rows
            results[case.name] = loaded
        self._gather(source, results)

    def _look(self, cases: Sequence[Case], done: DoneCases) -> tuple[dict, dict]:
        """What every case is made of, and the rows of those that are done, or why one is bad."""
        origins, results = {}, {}
        for case in cases:
            try:
                files = state_of([case.image, *case.labels])
            except OSError as error:
                results[case.name] = str(error.strerror)
                continue
            origins[case.name] = [case.section, case.finding, *files]
            rows = done.read(case.name, origins[case.name])
            if rows is not None:
                results[case.name] = rows
        return origins, results

    def _gather(self, source: Source, results: Mapping[str, list[dict] | str]) -> None:
        """Rows and rejected files in the order of the cases; other files of the store go."""
        self.rejected += source.rejected
        for case in source.cases:
            result = results[case.name]
            if isinstance(result, str):
                self.rejected.append((case.image.relative_to(self.root).as_posix(), result))
            else:
                self.num_cases += 1
                self.rows += result
        listed = {row[key] for row in self.rows for key in ("image", "label", "edge")}
        for name in FOLDERS:
            for path in (self.store_dir / name).iterdir():
                if f"{name}/{path.name}" not in listed:  # of a case that has changed or turned bad
                    path.unlink()

    def _write_case(self, case: Case, loaded: LoadedCase) -> list[dict]:
        """Writes the files of a case's slices and returns their rows.

        Edges are detected in batches of the case alone, so that they depend on no other case.
        """
        shared = self._shared(case, loaded)
        rows = []
        for start in range(0, len(loaded.images), EDGE_BATCH):
            part = slice(start, start + EDGE_BATCH)
            images, labels = loaded.images[part], loaded.labels[part]
            edges = join_edges(self.detector(images), mask_edges(labels))
            for number, slices in enumerate(zip(images, labels, edges, strict=True), start):
                rows.append(shared | self._write_slice(case.name, number, *slices))
        return rows

    def _shared(self, case: Case, loaded: LoadedCase) -> dict:
        """What the rows of a case have in common."""
        labels = (path.relative_to(self.root).as_posix() for path in case.labels)
        return {
            "case": case.name,
            "image_root": "store",
            "prompt": task_prompt(self.wanted["task"], case.finding),
            "section": case.section,
            "spacing_mm": loaded.spacing_mm,
            "original_shape": loaded.original_shape,
            "affine": loaded.affine,
            "source_image": case.image.relative_to(self.root).as_posix(),
            "source_label": "|".join(labels),
            "source_sha256": loaded.sha256,
            "image_sha256": loaded.image_sha256,
        }

    def _write_slice(self, case: str, number: int, image, label, edge) -> dict:
        """Writes the three files of a slice, each (1, S, S); what its row has of its own."""
        name = f"{case}_{number:04d}.png"
        row = {"slice": number, "foreground_px": int((label > 0).sum())}
        row |= {key: f"{key}s/{name}" for key in ("image", "label", "edge")}
        write_image(self.store_dir / row["image"], image[0].numpy())
        write_label(self.store_dir / row["label"], label[0].numpy())
        write_edge(self.store_dir / row["edge"], edge[0].numpy())
        return row | {"sha256": sha256_of_files([self.store_dir / row["image"]])}

    def write_index(self, max_rejected_fraction: float) -> None:
        """Writes rejected.csv (at home, if there is one), the header, the index and the sheet.

        An interrupted run does this part anew, with the search for duplicates.

        Args:
            max_rejected_fraction: share of cases that may be rejected.

        Raises:
            ValueError: more were rejected, or too few cases are left for the folds.
        """
        check_rejected(self.rejected, self.num_cases, max_rejected_fraction)
        rejected = pd.DataFrame(self.rejected, columns=["file", "reason"])
        index = pd.DataFrame(self.rows)
        index["group"] = self._groups(index)  # also by the files' names, which may be hidden next
        if self.home is not None:
            names = index.drop_duplicates("case").set_index("case")
            names = names[["source_image", "source_label"]].T.to_dict("list")
            write_sources(self.home, str(self.root), names)
            index[["source_image", "source_label"]] = ""
        rejected.to_csv((self.home or self.store_dir) / "rejected.csv", index=False)
        training = index.case[index.section == "training"].unique()
        folds = self._folds(index, training) if self.wanted["num_folds"] else {}
        index["fold"] = index.case.map(folds).fillna(-1).astype(int)
        write_table(self.store_dir / "index.parquet", index[list(INDEX_COLUMNS)])
        sections = index.drop_duplicates("case").section.value_counts()
        finish_store(self.store_dir, self.wanted, self.detector, sections)

    def _folds(self, index: pd.DataFrame, training: Sequence[str]) -> dict[str, int]:
        """The fold of every case of section training."""
        num_folds = self.wanted["num_folds"]
        groups = dict(zip(index.case, index.group, strict=True))
        if (index.section == "test").any():  # folds only move the inner validation then
            num_folds = min(num_folds, len({groups[case] for case in training}))
        return assign_folds(
            training, num_folds, self.wanted["seed"], self.wanted["fold_order"], groups
        )

    def _groups(self, index: pd.DataFrame) -> pd.Series:
        """The group of every row: cases that show the same scan; writes them to duplicates.csv."""
        if not self.wanted["group_duplicates"]:
            return index.case
        if is_too_large(index):
            logger.warning(
                "%d cases with %d slices are too many to be searched for near-duplicates: groups "
                "are known by names such as liver_7_slice_12 alone; name others in index.parquet",
                index.case.nunique(),
                len(index),
            )
            pairs = numbered_slices(index)
        else:
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

"""The slice store: a folder of slices, labels and edges with an index; read, written, listed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffboost.data.containment import check_folder, inside, refuse_cases, refuse_names
from diffboost.data.documents import read_json
from diffboost.data.hashes import check_header, check_source
from diffboost.data.items import (
    FILE_COLUMNS,
    INDEX_KINDS,
    LATER_COLUMNS,
    SliceItems,
    later_columns,
)
from diffboost.data.pseudonyms import read_sources
from diffboost.data.splits import needs_names, select
from diffboost.data.tables import open_table, read_table, refuse_empty_cells, to_frame, with_texts

STORE_VERSION = 4  # 3, which is read too, lacks image_sha256
INDEX_COLUMNS = (
    "case", "slice", "image", "label", "edge", "image_root", "prompt", "section", "fold",
    "group", "spacing_mm", "original_shape", "affine", "foreground_px", "sha256", "source_image",
    "source_label", "source_sha256", "image_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class SliceStore:
    """A slice store: its folder, its dataset.json and its index (a row a slice), read when used."""

    store_dir: Path
    header: dict

    @cached_property
    def index(self) -> pd.DataFrame:
        """The whole index; of a tree with a million images rather read some ``columns``."""
        later = later_columns(self.header)
        with open_table(self.index_path, "store_dir", INDEX_KINDS, later=later) as file:
            table = with_texts(file.read(use_threads=False), later)
            refuse_empty_cells(table.select(INDEX_KINDS), self.index_path, "store_dir")
        refuse_cases(table["case"], f"{self.index_path}: case")
        for name in (*FILE_COLUMNS, "source_image", "source_label"):
            names = table[name]
            if name == "source_label":  # several masks are joined
                names = pc.list_flatten(pc.split_pattern(names, "|"))
            refuse_names(names, f"{self.index_path}: {name}")
        return to_frame(table)

    def columns(self, names: Sequence[str]) -> pd.DataFrame:
        """Some columns of the index, backed by Arrow: a hundred bytes a row, not a thousand."""
        kinds = {name: INDEX_KINDS[name] for name in names}
        later = later_columns(self.header)
        table = read_table(self.index_path, "store_dir", kinds, later=later)
        return to_frame(table, types_mapper=pd.ArrowDtype)

    def source_sha256(self) -> dict[str, str]:
        """The hash of every case's source files (image and labels)."""
        rows = self.columns(["case", "source_sha256"]).drop_duplicates("case")
        return dict(zip(rows["case"], rows.source_sha256, strict=True))

    @property
    def index_path(self) -> Path:
        """The index's file."""
        return self.store_dir / "index.parquet"

    @property
    def source_dir(self) -> Path:
        """Folder of the source images; a relative one in the header is relative to the store."""
        return self.store_dir / self.header["source_dir"]

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.header["labels"])

    def path(self, relative: str) -> Path:
        """Absolute path of a file of the store."""
        return self.store_dir / relative

    def image_path(self, row: pd.Series) -> Path:
        """Absolute path of a row's image, in the store or (RadImageNet tree) at its source."""
        root = self.source_dir if row["image_root"] == "source" else self.store_dir
        check_folder(str(root), row["image"].rpartition("/")[0], f"{self.index_path}: image")
        return root / row["image"]


def read_store(store_dir: str | Path) -> SliceStore:
    """Reads a slice store's header; its index is read when it is used.

    Args:
        store_dir: folder that ``prepare`` wrote.

    Returns:
        The store; its ``store_dir`` is absolute.

    Raises:
        FileNotFoundError: no such folder, or no slice store in it.
        ValueError: the store was written by another version of the format.

    Source: engineering choice (design, "Slice store").
    """
    store_dir = Path(store_dir).resolve()
    header_path, index_path = store_dir / "dataset.json", store_dir / "index.parquet"
    if not header_path.is_file() or not index_path.is_file():
        what = "no slice store in" if store_dir.is_dir() else "no such folder:"
        raise FileNotFoundError(
            f"store_dir: {what} {store_dir}; write one with prepare (bundle task_finetune)"
        )
    header = read_json(header_path, "store_dir")
    version = header.get("store_version")
    if version not in (STORE_VERSION, *LATER_COLUMNS):
        raise ValueError(
            f"store_dir: {store_dir} has store_version {version}, this program reads the versions "
            f"{', '.join(map(str, (*LATER_COLUMNS, STORE_VERSION)))}; run prepare again into a new "
            "folder"
        )
    check_header(header, header_path)
    return SliceStore(store_dir, header)


def write_image(
    path: str | Path, image: np.ndarray, text: Mapping[str, object] | None = None
) -> None:
    """Writes a slice as 16-bit gray PNG: round((x + 1) / 2 * 65535), no metadata but ``text``.

    Args:
        path: file to write.
        image: float (H, W) in [-1, 1].
        text: names and values to write into the PNG; None writes none.

    Raises:
        ValueError: the image has NaN or infinite values, for which there is no level.

    Source: engineering choice (design, "Slice store").
    """
    if not np.isfinite(image).all():
        raise ValueError(f"the image has NaN or infinite values; {path} was not written")
    levels = np.round((np.clip(image, -1, 1).astype(np.float64) + 1) / 2 * 65535)
    chunks = PngInfo()
    for name, value in (text or {}).items():
        chunks.add_text(name, str(value))
    Image.fromarray(levels.astype(np.uint16)).save(path, format="PNG", pnginfo=chunks)


def write_label(path: str | Path, label: np.ndarray) -> None:
    """Writes a class index map as 8-bit gray PNG.

    Args:
        path: file to write.
        label: integer (H, W), class index in [0, 255].

    Source: engineering choice (design, "Slice store").
    """
    Image.fromarray(label.astype(np.uint8)).save(path, format="PNG")


def write_edge(path: str | Path, edge: np.ndarray) -> None:
    """Writes an edge map as 8-bit gray PNG: round(255 * edge).

    Args:
        path: file to write.
        edge: float (H, W) in [0, 1].

    Source: engineering choice (design, "Slice store").
    """
    levels = np.round(np.clip(edge, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(levels).save(path, format="PNG")


def slice_items(
    store_dir: str | Path,
    fold: int,
    part: str,
    min_foreground_px: int = 0,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
    seed: int = 0,
) -> SliceItems:
    """The slices of one part of a fold, a dictionary a slice, made when it is asked for.

    Args:
        store_dir: a slice store.
        fold: the fold that is held out.
        part: ``training``, ``inner_validation``, ``training_fold``, ``test`` or ``all``.
        min_foreground_px: keep slices with at least this many foreground pixels.
        inner_fraction: share of the training fold's cases for inner validation.
        num_cases: keep this many cases of the training fold; None keeps all.
        seed: seed of the inner split and of the order in which ``num_cases`` are taken.

    Returns:
        Dictionaries with ``image``, ``edge`` and (where there is one) ``label``: absolute paths as
        str; ``prompt``, ``case``, ``sha256`` (of the image): str; ``slice``: int.

    Raises:
        FileNotFoundError: no slice store at ``store_dir``.
        ValueError: wrong part or fold, an empty training fold, an ``inner_fraction`` that keeps no
            case for ``inner_validation``, or no slice has enough foreground.

    Source: DiffBoost Sec. 4.1 (slices with more than 20 foreground pixels; facts, item 14).
    """
    if part == "inner_validation" and not 0 < inner_fraction < 1:
        raise ValueError(
            f"inner_fraction: {inner_fraction} keeps no case for inner validation; it has to lie "
            "between 0 and 1"
        )
    store = read_store(store_dir)
    names = ["case", "group"] if needs_names(part, inner_fraction, num_cases) else []
    index = store.columns([*names, "section", "fold", "foreground_px"])
    rows = select(index, fold, part, inner_fraction, seed, num_cases)
    rows = rows[rows.foreground_px >= min_foreground_px]
    if rows.empty:
        raise ValueError(
            f"{store.store_dir}: no slice of part '{part}' of fold {fold} has min_foreground_px "
            f"{min_foreground_px} or more"
        )
    rows = rows.index.to_numpy()
    del index
    return SliceItems(store.store_dir, store.header, rows)


def case_items(
    store_dir: str | Path,
    fold: int,
    part: str,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
    seed: int = 0,
) -> list[dict]:
    """The source files of one part of a fold, a dictionary a case, for whole-volume evaluation.

    Args:
        store_dir: a slice store.
        fold: the fold that is held out.
        part: ``training``, ``inner_validation``, ``training_fold``, ``test`` or ``all``.
        inner_fraction: share of the training fold's cases for inner validation.
        num_cases: keep this many cases of the training fold; None keeps all.
        seed: seed of the inner split and of the order in which ``num_cases`` are taken.

    Returns:
        Dictionaries with ``image`` (absolute path as str), ``label`` (the same, or a list of mask
        paths; absent without a label), ``case`` (str) and ``spacing_mm`` (3 floats in the order
        of the oriented volume H, W, D; 1 means pixels in 2D).

    Raises:
        FileNotFoundError: no slice store at ``store_dir``, its source folder is gone, or its cases
            have pseudonyms and what names them is not here.
        ValueError: wrong part or fold, an empty training fold, or a source file that is not the
            one that was prepared.

    Source: engineering choice (protocol ``sound``: whole volumes at test).
    """
    store = read_store(store_dir)
    key = f"{store.index_path}: "
    source_dir, names = store.source_dir, {}
    if store.header.get("pseudonyms"):
        source_dir, names = read_sources(store.store_dir)
    if not source_dir.is_dir():
        raise FileNotFoundError(
            f"{store.store_dir}: the source folder {source_dir} of this store is gone; "
            "whole-volume evaluation reads the source files"
        )
    rows = select(store.index, fold, part, inner_fraction, seed, num_cases)
    items = []
    for row in rows.drop_duplicates("case").to_dict("records"):
        image, label = names.get(row["case"], (row["source_image"], row["source_label"]))
        image = inside(source_dir, image, f"{key}source_image")
        label = [name for name in label.split("|") if name]
        labels = [str(inside(source_dir, name, f"{key}source_label")) for name in label]
        item = {"image": str(image), "case": row["case"]}
        check_source((item["image"], *labels), row)
        if labels:
            item["label"] = labels[0] if len(labels) == 1 else labels
        item["spacing_mm"] = [float(value) for value in row["spacing_mm"]]
        items.append(item)
    return items

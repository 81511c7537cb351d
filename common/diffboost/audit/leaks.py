"""`diffboost audit leaks`: every leak of a store, in names, hashes, lineages and the images.

What the guards of training and evaluation know from the index is searched here in the files: images
are hashed again and compared with each other, turned, mirrored, cropped and re-encoded.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from diffboost.audit.checks import (
    KINDS,
    Leak,
    lineage_leaks,
    model_leaks,
    selected_on_test,
    split_leaks,
    variant_leaks,
)
from diffboost.data.comparison import NEAR_DUPLICATE
from diffboost.data.containment import inside, refuse_special
from diffboost.data.documents import read_json
from diffboost.data.duplicates import find_duplicates, is_too_large, numbered_slices
from diffboost.data.images import read_image
from diffboost.data.manifest import read_manifest
from diffboost.data.slices import SliceStore, read_store
from diffboost.data.splits import group_cases, select
from diffboost.files import sha256_of_files, write_aside
from diffboost.generation.lineage import read_lineage
from diffboost.runs import RECORD

logger = logging.getLogger(__name__)

PARTS = {"training": "training", "validation": "inner_validation", "test": "test"}
TEXT = "diffboost:"  # what names of text chunks in a variant's PNG begin with


def audit_leaks(
    store_dir: str | Path,
    synthetic_dir: str | Path | None = None,
    generator_dir: str | Path | None = None,
    model_dir: str | Path | None = None,
    fold: int | None = None,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
    pairs: pd.DataFrame | None = None,
) -> list[Leak]:
    """All leaks of a slice store, and of what was made from it.

    Args:
        store_dir: slice store.
        synthetic_dir: a synthetic store; its variants are for training on ``fold``.
        generator_dir: folder with a generator's lineage.json.
        model_dir: folder with a segmenter's lineage.json and run.json.
        fold: audit this fold; None audits all, but a model or its variants on the fold alone that
            their run.json or lineage names, if one does.
        inner_fraction: share of the training fold's cases for inner validation.
        num_cases: of the training fold, see ``select``.
        pairs: what ``find_duplicates`` says of the store, if that is known; None searches.

    Returns:
        A leak a pair and kind; each names the folds in which it is one.

    Raises:
        FileNotFoundError: no store, or a folder lacks its lineage.json.
        ValueError: no such fold.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    store = read_store(store_dir)
    index = _hash_again(store)
    if pairs is None:
        pairs = _search(store, index)
    joined = _join_groups(index, pairs)
    folds = sorted({int(number) for number in index.fold if number >= 0}) or [0]
    folds = folds if fold is None else [fold]

    def split(number: int) -> list[Leak]:
        parts = _parts(index, number, inner_fraction, num_cases)
        parts = {name: rows.assign(group=joined[rows.index]) for name, rows in parts.items()}
        return _named_by_pairs(split_leaks(parts), pairs)

    leaks = _over_folds(folds, split)
    judged = index.assign(group=joined)
    for folder, check in (
        (synthetic_dir, _audit_variants),
        (generator_dir, _audit_generator),
        (model_dir, _audit_model),
    ):
        if folder is not None:
            own = _fold_of(Path(folder)) if fold is None else None
            leaks += check(Path(folder), judged, folds if own is None else [own])
    return leaks


def _over_folds(folds: Sequence[int], check: Callable[[int], list[Leak]]) -> list[Leak]:
    """The leaks of several folds, each pair once, with the folds in which it is one."""
    found: dict[tuple, tuple[Leak, list[str]]] = {}
    for fold in folds:
        for leak in check(fold):
            key = (leak.kind, *sorted((leak.first, leak.second)))
            named = found.setdefault(key, (leak, []))[1]
            if str(fold) not in named:  # by a model and by one before it, it is one leak
                named.append(str(fold))
    return [
        replace(leak, reason=f"{leak.reason}; folds {', '.join(named)}")
        for leak, named in found.values()
    ]


def _parts(
    index: pd.DataFrame, fold: int, inner_fraction: float, num_cases: int | None
) -> dict[str, pd.DataFrame]:
    """The rows of training, validation (if there is one) and test, as training draws them."""
    return {
        name: select(index, fold, part, inner_fraction, num_cases=num_cases)
        for name, part in PARTS.items()
        if inner_fraction or name != "validation"
    }


def _hash_again(store: SliceStore) -> pd.DataFrame:
    """The index, with the hashes that its image files have now."""
    index = store.index.copy()
    files = [store.image_path(row) for _, row in index[["image", "image_root"]].iterrows()]
    for path in files:
        refuse_special(path, "store_dir")
    index["sha256"] = [sha256_of_files([path]) for path in tqdm(files, "hashes", unit="slice")]
    return index


def _search(store: SliceStore, index: pd.DataFrame) -> pd.DataFrame:
    """Pairs of cases that show the same scan; in too large a store by their files' names alone."""
    if is_too_large(index):
        logger.warning(
            "%s: %d cases with %d slices are too many to compare the images; names (such as "
            "liver_7_slice_12), hashes, groups and lineages are audited",
            store.store_dir,
            index.case.nunique(),
            len(index),
        )
        return numbered_slices(index)
    paths = [store.image_path(row) for _, row in index[["image", "image_root"]].iterrows()]
    # A case whose rows stand in several places is one for the search.
    order = index.reset_index(drop=True).sort_values(["case", "slice"], kind="stable").index
    return find_duplicates(index.iloc[order], [paths[row] for row in order], store.header["task"])


def _join_groups(index: pd.DataFrame, pairs: pd.DataFrame) -> pd.Series:
    """The group of every row by what the index says and by what was found."""
    known = index[["case", "group"]].astype(str).drop_duplicates()
    names = [*known["case"], *known.group]
    joined = [
        *zip(known["case"], known.group, strict=True),
        *zip(pairs.case, pairs.other, strict=True),
    ]
    groups = group_cases(names, joined)
    return index.case.astype(str).map(groups)


def _named_by_pairs(leaks: Sequence[Leak], pairs: pd.DataFrame) -> list[Leak]:
    """Leaks by group, with the likeness and kind of the pair where it was found in the images."""
    found = {frozenset((row.case, row.other)): row for row in pairs.itertuples(index=False)}
    named = []
    for leak in leaks:
        row = found.get(frozenset((leak.first, leak.second)))
        if row is None or leak.kind != "duplicate":
            named.append(leak)
            continue
        kind = "duplicate" if row.kind == NEAR_DUPLICATE else "volume"
        slices = f"slice {row.slice} of {row.case}, slice {row.other_slice} of {row.other}"
        reason = f"likeness {row.likeness:.2f}, {slices}; {leak.reason.partition('; ')[2]}"
        named.append(Leak(kind, leak.first, leak.second, reason))
    return named


def _audit_variants(folder: Path, index: pd.DataFrame, folds: Sequence[int]) -> list[Leak]:
    """Variants from held-out cases, by manifest and by what their PNGs say, and their lineage."""
    manifest = read_manifest(folder, ["image", "case"])
    images = tqdm(manifest.image, "variants", unit="PNG")
    files = (read_image(inside(folder, image, "image"), "synthetic_dir") for image in images)
    told = [getattr(file, "text", {}).get(f"{TEXT}case") for file in files]

    def check(fold: int) -> list[Leak]:
        held_out = select(index, fold, "test")
        leaks, cases = variant_leaks(folder, held_out, index), set(held_out.case.astype(str))
        for image, case, own in zip(manifest.image, manifest.case, told, strict=True):
            if own != case and own in cases:
                reason = f"its PNG says that it was made from {own}, the manifest says {case}"
                leaks.append(Leak("generator", image, own, reason))
        return leaks

    return _over_folds(folds, check)


def _audit_generator(folder: Path, index: pd.DataFrame, folds: Sequence[int]) -> list[Leak]:
    """Held-out cases that a generator or a model before it has seen."""
    lineage = _lineage(folder)

    def check(fold: int) -> list[Leak]:
        return lineage_leaks(lineage, select(index, fold, "test"), index)

    return _over_folds(folds, check)


def _audit_model(folder: Path, index: pd.DataFrame, folds: Sequence[int]) -> list[Leak]:
    """What a segmenter was trained and selected on; and what its run.json says about that."""
    lineage = _lineage(folder)

    def check(fold: int) -> list[Leak]:
        held_out = select(index, fold, "test")
        leaks = model_leaks(lineage, held_out, index)
        if selected_on_test(folder) and not any(leak.kind == "selection" for leak in leaks):
            names = sorted(set(held_out.case.astype(str))) or ["test"]
            leaks.append(Leak("selection", str(folder), names[0], "run.json says selection test"))
        return leaks

    return _over_folds(folds, check)


def _fold_of(folder: Path) -> int | None:
    """The fold for which a model or variants were made; None: its files name none."""
    record = folder / RECORD
    named = read_json(record, str(folder)).get("fold") if record.is_file() else None
    return _lineage(folder).get("fold") if named is None else named


def _lineage(folder: Path) -> dict:
    path = folder / "lineage.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no lineage.json")
    return read_lineage(path)


def write_leaks(path: str | Path, leaks: Sequence[Leak]) -> None:
    """Writes a CSV, a row a leak: kind, meaning, first, second, reason.

    Args:
        path: the file.
        leaks: of :func:`audit_leaks`.

    Source: engineering choice.
    """
    rows: list[Mapping] = [
        {"kind": leak.kind, "meaning": KINDS[leak.kind], "first": leak.first,
         "second": leak.second, "reason": leak.reason}
        for leak in leaks
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["kind", "meaning", "first", "second", "reason"])
    write_aside(Path(path), lambda partial: table.to_csv(partial, index=False))

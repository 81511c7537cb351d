"""`diffboost audit leaks`: every leak of a store, in names, hashes, lineages and the images.

What the guards of training and evaluation know from the index is searched here in the files: images
are hashed again and compared with each other, turned, mirrored, cropped and re-encoded.
"""

import logging
from collections.abc import Mapping, Sequence
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
from diffboost.data.duplicates import PAIR_COLUMNS, find_duplicates, is_too_large
from diffboost.data.images import read_image
from diffboost.data.manifest import read_manifest
from diffboost.data.slices import SliceStore, read_store
from diffboost.data.splits import group_cases, select
from diffboost.files import sha256_of_files, write_aside
from diffboost.generation.lineage import read_lineage

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
        fold: audit this fold; None audits all, and models on the fold that their lineage names.
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
    found: dict[tuple, list] = {}
    for number in folds if fold is None else [fold]:
        parts = _parts(index, number, inner_fraction, num_cases)
        parts = {name: rows.assign(group=joined[rows.index]) for name, rows in parts.items()}
        leaks = _named_by_pairs(split_leaks(parts), pairs)
        for leak in leaks:
            key = (leak.kind, *sorted((leak.first, leak.second)))
            found.setdefault(key, [leak, []])[1].append(number)
    leaks = [
        Leak(leak.kind, leak.first, leak.second, f"{leak.reason}; folds {_listed(numbers)}")
        for leak, numbers in found.values()
    ]
    index["group"] = joined
    for folder, check in (
        (synthetic_dir, _audit_variants),
        (generator_dir, _audit_generator),
        (model_dir, _audit_model),
    ):
        if folder is not None:
            leaks += check(Path(folder), index, fold)
    return leaks


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
    """Pairs of cases that show the same scan; none, with a warning, in too large a store."""
    if is_too_large(index):
        logger.warning(
            "%s: %d cases with %d slices are too many to compare the images; names, hashes, groups "
            "and lineages are audited",
            store.store_dir,
            index.case.nunique(),
            len(index),
        )
        return pd.DataFrame(columns=list(PAIR_COLUMNS))
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


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _held_out(index: pd.DataFrame, fold: int | None) -> pd.DataFrame:
    """The test rows of a fold; of a store whose test section is given, of any."""
    if fold is None and not (index.section == "test").any():
        return index.iloc[:0]
    return select(index, fold or 0, "test")


def _audit_variants(folder: Path, index: pd.DataFrame, fold: int | None) -> list[Leak]:
    """Variants from held-out cases, by manifest and by what their PNGs say, and their lineage."""
    fold = _fold_of(folder, fold)
    manifest = read_manifest(folder, ["image", "case"])
    images = tqdm(manifest.image, "variants", unit="PNG")
    held_out = _held_out(index, fold)
    judged = dict(zip(held_out.case.astype(str), held_out.case.astype(str), strict=True))
    leaks = variant_leaks(folder, held_out, index)
    for image, case in zip(images, manifest.case, strict=True):
        file = read_image(inside(folder, image, "image"), "synthetic_dir")
        told = getattr(file, "text", {}).get(f"{TEXT}case", case)
        if told != case and told in judged:
            reason = f"its PNG says that it was made from {told}, the manifest says {case}"
            leaks.append(Leak("generator", image, told, reason))
    return leaks


def _audit_generator(folder: Path, index: pd.DataFrame, fold: int | None) -> list[Leak]:
    return lineage_leaks(_lineage(folder), _held_out(index, _fold_of(folder, fold)), index)


def _audit_model(folder: Path, index: pd.DataFrame, fold: int | None) -> list[Leak]:
    """What a segmenter was trained and selected on; and what its run.json says about that."""
    lineage, fold = _lineage(folder), _fold_of(folder, fold)
    held_out = _held_out(index, fold)
    leaks = model_leaks(lineage, held_out, index)
    if selected_on_test(folder) and not any(leak.kind == "selection" for leak in leaks):
        names = sorted(set(held_out.case.astype(str))) or ["test"]
        reason = f"run.json says selection test; fold {fold}"
        leaks.append(Leak("selection", str(folder), names[0], reason))
    return leaks


def _fold_of(folder: Path, fold: int | None) -> int | None:
    """The fold to judge a model or its variants on: the given one, or that of its lineage."""
    return fold if fold is not None else _lineage(folder).get("fold")


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

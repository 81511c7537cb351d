"""What counts as a leak: cases that two sides share by name, hash, group, or in a lineage."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd
import pyarrow as pa

from diffboost.data.documents import read_json
from diffboost.data.manifest import read_manifest
from diffboost.files import sha256_of_files
from diffboost.generation.lineage import read_lineage

# What is refused, by its short name.
KINDS = {
    "case": "a held-out case is trained on",
    "image": "the same image under another name",
    "duplicate": "a near-duplicate",
    "volume": "another slice of the same volume",
    "generator": "the generator or a model before it saw a held-out case, or a variant shows one",
    "selection": "the model is selected on test cases",
}


@dataclass(frozen=True)
class Leak:
    """A pair that must not be on both sides, and how it is known.

    ``first`` is on the side that a model learned from, ``second`` on the side that judges it.
    """

    kind: str
    first: str
    second: str
    reason: str

    def __str__(self) -> str:
        """The pair, what it is, and how it is known, in one sentence."""
        return f"{self.first} and {self.second}: {KINDS[self.kind]} ({self.reason})"


def split_leaks(parts: Mapping[str, pd.DataFrame]) -> list[Leak]:
    """Cases that two parts of a split share, by name, by content, or by group.

    Args:
        parts: name of a part -> its rows of a store's index (case, group, source_sha256,
            image_sha256, sha256, foreground_px), the part that is learned from first, ``test``
            last.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    leaks = []
    for (name, rows), (other_name, other_rows) in combinations(parts.items(), 2):
        sides = f"{name} and {other_name}"
        kind = "selection" if (name, other_name) == ("validation", "test") else None
        found: set[tuple[str, str]] = set()
        for first, second, own, reason in _shared(rows, other_rows):
            if (first, second) not in found:
                found.add((first, second))
                leaks.append(Leak(kind or own, first, second, f"{reason}; in {sides}"))
    return leaks


def _shared(rows: pd.DataFrame, others: pd.DataFrame) -> Iterator[tuple[str, str, str, str]]:
    """Pairs of cases of two parts, the kind of leak and how it is known; the surest first."""
    for case in sorted(set(rows.case) & set(others.case)):
        yield case, case, "case", "the same name"
    checks = (
        ("source_sha256", "image", "files of the same hash"),
        ("image_sha256", "image", "image files of the same hash"),
        ("sha256", "image", "slices of the same hash"),
        ("group", "duplicate", "one group of duplicates"),
    )
    for column, kind, reason in checks:
        sides = (_telling_slices(side) if column == "sha256" else side for side in (rows, others))
        own, theirs = (side[["case", column]].drop_duplicates().astype(str) for side in sides)
        pairs = own[own[column] != ""].merge(theirs, on=column, suffixes=("", "_other"))
        for first, second in zip(pairs["case"], pairs.case_other, strict=True):
            if first != second:
                yield first, second, kind, reason


def _telling_slices(rows: pd.DataFrame) -> pd.DataFrame:
    """Slices that show something: of volumes, those with foreground; empty ones are all alike."""
    alone = ~rows.case.duplicated(keep=False)
    return rows[(rows.foreground_px > 0) | alone]


def lineage_leaks(lineage: Mapping, held_out: pd.DataFrame, index: pd.DataFrame) -> list[Leak]:
    """Held-out cases that a model or one of its ancestors has seen, themselves or a duplicate.

    A case is known by the hash of its image and label files, or by that of its image file alone:
    the image may have been seen without a label, or with another one.

    Args:
        lineage: as ``read_lineage`` gives it.
        held_out: rows of the index of a store (case, group, source_sha256, image_sha256).
        index: all rows; tells the group of a case that was seen, by its hashes.

    Returns:
        Leaks of kind ``generator``, and ``selection`` where a model was only selected on the case.

    Source: engineering choice (design, "lineage").
    """
    cases, groups = _by_hash(held_out, "case"), _by_hash(index, "group")
    by_group = dict(zip(held_out.group.astype(str), held_out.case.astype(str), strict=True))
    leaks: dict[tuple, Leak] = {}
    for depth, kind, seen in seen_cases(lineage):
        model = "its lineage" if depth == 0 else f"an ancestor, {depth} back, in its lineage"
        for case, sha256 in seen:
            if sha256 in cases:
                second, reason = cases[sha256], "the same hash"
            elif groups.get(sha256) in by_group:
                second, reason = by_group[groups[sha256]], "one group of duplicates"
            else:
                continue
            leak = Leak(kind, case, second, f"{model}: {reason}")
            leaks.setdefault((model, kind, case, second), leak)
    return list(leaks.values())


def _by_hash(rows: pd.DataFrame, column: str) -> dict[str, str]:
    """A column of an index by hash, be it that of image and labels or that of the image alone."""
    found: dict[str, str] = {}
    for name in ("image_sha256", "source_sha256"):
        known = rows[[name, column]].drop_duplicates(name).astype(str)
        found |= dict(zip(known[name], known[column], strict=True))
    found.pop("", None)  # of a store that does not know the hash of the image alone
    return found


def seen_cases(
    lineage: Mapping, depth: int = 0
) -> Iterator[tuple[int, str, Iterable[tuple[str, str]]]]:
    """Names and hashes of the cases that taught or selected a model, then of its ancestors.

    Args:
        lineage: as ``read_lineage`` gives it.
        depth: of this lineage below the model's own, which is 0.

    Returns:
        Depth, ``generator`` (taught) or ``selection``, and pairs (case, hash), one after the other:
        by the hash of image and label files, then by that of the image alone where it is known.

    Source: engineering choice (design, "lineage").
    """
    for key, kind in (("cases", "generator"), ("selection", "selection")):
        yield depth, kind, _case_hashes(lineage, key)
    for ancestor in lineage.get("ancestors", []):
        yield from seen_cases(ancestor, depth + 1)


def _case_hashes(lineage: Mapping, key: str) -> Iterator[tuple[str, str]]:
    """Pairs (case, hash) of ``cases`` or ``selection`` of a lineage, ancestors left out."""
    cases, images = lineage.get(key, {}), lineage.get("images", {})
    if isinstance(cases, pa.Table):
        names = cases["case"].to_pylist()
        hashes = (cases[name].to_pylist() for name in ("sha256", "image_sha256"))
        cases, images = (dict(zip(names, column, strict=True)) for column in hashes)
    yield from cases.items()
    yield from ((case, images[case]) for case in cases if images.get(case))


def variant_leaks(
    synthetic_dir: str | Path,
    held_out: pd.DataFrame,
    index: pd.DataFrame,
    used: Iterable[str] | None = None,
) -> list[Leak]:
    """Variants whose source is held out, and what their generator saw of the held-out cases.

    Args:
        synthetic_dir: a synthetic store with manifest.parquet and lineage.json.
        held_out: rows of the index of the slice store that must not be sources.
        index: all rows, with ``image``.
        used: names of the variants' files that matter; None: all.

    Raises:
        FileNotFoundError: there is no lineage.json.
        ValueError: it is not the one that the manifest names.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    folder = Path(synthetic_dir)
    path = folder / "lineage.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"synthetic_dir: {folder} has no lineage.json, so that nothing says which cases its "
            "generator saw; synthesize it again"
        )
    columns = ["image", "case", "source_image", "source_sha256", "lineage_sha256"]
    manifest = read_manifest(folder, columns)
    if set(manifest.lineage_sha256) != {sha256_of_files([path])}:
        raise ValueError(f"synthetic_dir: {path} is not the lineage that the manifest names")
    if used is not None:
        names = manifest.image.str.rsplit("/", n=1).str[-1]
        manifest = manifest[names.isin({Path(file).name for file in used})]
    return _held_out_sources(manifest, held_out, index) + lineage_leaks(
        read_lineage(path), held_out, index
    )


def _held_out_sources(
    manifest: pd.DataFrame, held_out: pd.DataFrame, index: pd.DataFrame
) -> list[Leak]:
    """A leak for each held-out case that variants were made from: by name, file, hash or group."""
    files = (Path(image).name for image in index.image)
    case_of = dict(zip(files, index.case.astype(str), strict=True))  # by file, and by hash
    case_of |= _by_hash(index, "case") | _by_hash(held_out, "case")
    group_of = dict(zip(index.case.astype(str), index.group.astype(str), strict=True))
    judged = {group_of[case]: case for case in held_out.case.astype(str).unique()}
    leaks = {}
    columns = ["image", "case", "source_image", "source_sha256"]
    for image, case, source, sha256 in manifest[columns].itertuples(index=False):
        for origin in (case, case_of.get(Path(source).name, case), case_of.get(sha256, case)):
            second = judged.get(group_of.get(origin, origin))
            if second is not None and (origin, second) not in leaks:
                reason = f"{image} was made from {origin}"
                leaks[origin, second] = Leak("generator", image, second, reason)
    return list(leaks.values())


def model_leaks(lineage: Mapping, held_out: pd.DataFrame, index: pd.DataFrame) -> list[Leak]:
    """Held-out cases that a segmenter was trained on, that chose it, or that its generator saw.

    Args:
        lineage: as ``guard_training`` writes it.
        held_out: rows of the index of the store that judges it, see :func:`lineage_leaks`.
        index: all rows of that store.

    Source: engineering choice (issue 5, "Lineage and leak guard").
    """
    leaks = []
    for leak in lineage_leaks({**lineage, "ancestors": []}, held_out, index):
        kind = leak.kind
        if kind == "generator":
            sure = "image" if "hash" in leak.reason else "duplicate"
            kind = "case" if leak.first == leak.second else sure
        leaks.append(Leak(kind, leak.first, leak.second, leak.reason))
    return leaks + [
        leak
        for ancestor in lineage.get("ancestors", [])
        for leak in lineage_leaks(ancestor, held_out, index)
    ]


def selected_on_test(model_dir: str | Path) -> bool:
    """Whether the run that wrote a model says that the test part chose it.

    Args:
        model_dir: folder with the run's run.json.

    Source: engineering choice.
    """
    record = Path(model_dir) / "run.json"
    if not record.is_file():
        return False
    return read_json(record, "model_dir").get("selection") == "test"

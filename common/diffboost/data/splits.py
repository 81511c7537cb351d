"""Splits: folds over cases, the test part, and the inner validation part of a training fold."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from diffboost.data.addresses import address_seed
from diffboost.knobs import nearest

PARTS = ("training", "inner_validation", "training_fold", "test", "all")
FOLD_ORDERS = ("drawn", "listed")


def _seeded_order(cases: Iterable[str], *address: int | str) -> list[str]:
    """The cases in an order that depends on the address and their names alone."""
    return sorted(set(cases), key=lambda case: (address_seed(*address, case), case))


def assign_folds(
    cases: Iterable[str],
    num_folds: int,
    seed: int,
    order: str = "drawn",
    groups: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """A fold for every case, of sizes that differ by one at most where groups allow it.

    Args:
        cases: names of the cases; their order does not matter if it is drawn.
        num_folds: number of folds, at least 1.
        seed: seed of the draw.
        order: "drawn" by seed and name, or "listed": the first cases are fold 0, the next fold 1 …
        groups: case -> name of its group, whose cases share a fold: the emptiest one, in the drawn
            order; that of the first listed. None: every case is a group.

    Returns:
        case -> fold in [0, num_folds).

    Raises:
        ValueError: ``num_folds`` < 1, fewer cases or groups than folds, or an unknown order.

    Source: DiffBoost Sec. 4.1 (k-fold cross validation); drawing by name is our choice, the
        released code takes them as listed (facts 33).
    """
    if order not in FOLD_ORDERS:
        raise ValueError(f"fold_order: {order!r} is unknown; {nearest(order, FOLD_ORDERS)}")
    names = list(dict.fromkeys(cases))
    if order == "drawn":
        names = _seeded_order(names, seed, "fold")
    if num_folds < 1:
        raise ValueError(f"num_folds: {num_folds}; at least 1 is needed")
    if len(names) < num_folds:
        raise ValueError(f"num_folds: {num_folds} folds need as many cases, there are {len(names)}")
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault((groups or {}).get(name, name), []).append(name)
    if len(members) < num_folds:
        raise ValueError(
            f"num_folds: {num_folds} folds need as many groups of cases that are not duplicates of "
            f"each other, there are {len(members)}"
        )
    if order == "drawn":
        return _fill_folds(members, num_folds, seed)
    blocks = np.array_split(np.arange(len(names)), num_folds)  # the first ones may have one more
    listed = {names[rank]: fold for fold, block in enumerate(blocks) for rank in block}
    folds = {name: listed[group[0]] for group in members.values() for name in group}
    if len(set(folds.values())) < num_folds:
        raise ValueError(
            f"num_folds: {num_folds} folds of cases as they are listed leave one without a case, "
            "for cases that are duplicates of each other go where the first of them goes; fewer "
            "folds, or fold_order drawn"
        )
    return folds


def _fill_folds(members: Mapping[str, list[str]], num_folds: int, seed: int) -> dict[str, int]:
    """Groups in drawn order, large ones first, each into the fold with the fewest cases so far."""
    order = _seeded_order(members, seed, "fold")
    order.sort(key=lambda group: -len(members[group]))  # stable: equal ones stay as drawn
    sizes, folds = [0] * num_folds, {}
    for group in order:
        fold = sizes.index(min(sizes))
        sizes[fold] += len(members[group])
        folds |= dict.fromkeys(members[group], fold)
    return folds


def group_cases(cases: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The group of every case: the first name of all that pairs join, directly or by others.

    Args:
        cases: names of cases.
        pairs: names that belong together.

    Source: engineering choice.
    """
    group = {case: case for case in cases}

    def root(case: str) -> str:
        while group[case] != case:
            case = group[case]
        return case

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        group[high] = low
    return {case: root(case) for case in group}


def select(
    index: pd.DataFrame,
    fold: int,
    part: str,
    inner_fraction: float = 0.2,
    seed: int = 0,
    num_cases: int | None = None,
) -> pd.DataFrame:
    """The rows of one part of a fold; whole cases, never single slices.

    If any row has section "test", those rows are the test part and every fold trains on the whole
    section "training". Otherwise the test part is the fold's rows; rows of fold -1 are in no fold
    and never held out. ``num_cases`` limits the training fold first; the inner validation part is
    then drawn from the cases that are left.

    Args:
        index: a slice store's index (columns case, section, fold and, where there is one, group:
            cases of a group stay together in the inner validation part or out of it).
        fold: the fold that is held out, from 0.
        part: ``training``, ``inner_validation``, ``training_fold`` (both), ``test`` or ``all``.
        inner_fraction: share of the training fold's cases for inner validation, in [0, 1); at
            least one case unless it is 0.
        seed: seed of the inner split and of the order in which ``num_cases`` are taken.
        num_cases: keep this many cases of the training fold (few-label studies); None keeps all.

    Returns:
        A part of ``index``, in its order.

    Raises:
        ValueError: unknown part or fold, or no case is left to train on.

    Source: engineering choice (design, "Reproduction and truth": selection on an inner split).
    """
    if part not in PARTS:
        raise ValueError(f"part: '{part}'; allowed: {', '.join(PARTS)}")
    if not 0 <= inner_fraction < 1:
        raise ValueError(f"inner_fraction: {inner_fraction}; a number in [0, 1) is needed")
    if part == "all":
        return index
    test = _test_rows(index, fold)
    if part == "test":
        return index[test]
    if not needs_names(part, inner_fraction, num_cases):
        _refuse_empty(fold, int((~test).sum()), 0)
        return index[~test]
    cases = index.case[~test].unique()
    if num_cases is not None:
        if not 0 < num_cases <= len(cases):
            raise ValueError(
                f"num_cases: {num_cases}; the training fold of fold {fold} has {len(cases)} cases"
            )
        cases = _seeded_order(cases, seed, fold, "num_cases")[:num_cases]
    num_inner = max(1, round(inner_fraction * len(cases))) if inner_fraction else 0
    _refuse_empty(fold, len(cases), num_inner)
    inner = _inner_cases(index, cases, num_inner, (seed, fold, "inner_validation"))
    _refuse_empty(fold, len(cases), len(inner))
    chosen = {
        "training": set(cases) - set(inner),
        "inner_validation": set(inner),
        "training_fold": set(cases),
    }[part]
    return index[index.case.isin(chosen)]


def _inner_cases(index: pd.DataFrame, cases: Iterable[str], count: int, address: tuple) -> set[str]:
    """Whole groups in drawn order until there are ``count`` cases or more."""
    groups = index["group" if "group" in index else "case"]
    rows = pd.DataFrame({"case": index.case, "group": groups}).drop_duplicates("case")
    rows = rows[rows.case.isin(set(cases))]
    members: dict[str, list[str]] = {}
    for case, group in zip(rows.case, rows.group, strict=True):
        members.setdefault(group, []).append(case)
    inner: set[str] = set()
    for group in _seeded_order(members, *address):
        if len(inner) >= count:
            break
        inner.update(members[group])
    return inner


def needs_names(part: str, inner_fraction: float, num_cases: int | None) -> bool:
    """Whether ``select`` looks at the column ``case``, which is long in a tree of a million images.

    Args:
        part, inner_fraction, num_cases: as for ``select``.

    Source: engineering choice.
    """
    if part in ("all", "test"):
        return False
    return part == "inner_validation" or inner_fraction > 0 or num_cases is not None


def _refuse_empty(fold: int, num_cases: int, num_inner: int) -> None:
    """Raises ValueError if no case is left to train on."""
    if num_cases <= num_inner:
        raise ValueError(
            f"fold {fold}: the training fold is empty: {num_cases} cases, of which {num_inner} "
            "are for inner validation; use more cases, fewer folds or inner_fraction 0"
        )


def _test_rows(index: pd.DataFrame, fold: int) -> pd.Series:
    """True for the rows of the test part of a fold."""
    test = index.section == "test"
    if test.any():
        return test
    folds = sorted(number for number in index.fold.unique() if number >= 0)
    if folds and fold not in folds:
        there = ", ".join(str(number) for number in folds)
        raise ValueError(f"fold: {fold}; the store has the folds {there}")
    return index.fold == fold

"""Splits go by case, depend on seed and names alone, and never leave a training fold empty."""

import pandas as pd
import pytest

from diffboost.data.splits import assign_folds, select

CASES = [f"case_{number}" for number in range(10)]


def _index(num_test: int = 0) -> pd.DataFrame:
    folds = assign_folds(CASES, 3, seed=0)
    rows = [
        {"case": case, "slice": number, "section": "training", "fold": folds[case]}
        for case in CASES
        for number in range(2)
    ]
    rows += [
        {"case": f"test_{number}", "slice": 0, "section": "test", "fold": -1}
        for number in range(num_test)
    ]
    return pd.DataFrame(rows)


def _cases(part: str, index: pd.DataFrame | None = None, **choice) -> set[str]:
    index = _index() if index is None else index
    return set(select(index, choice.pop("fold", 0), part, **choice).case)


def test_folds_are_even_and_independent_of_order():
    folds = assign_folds(CASES, 3, seed=0)
    assert sorted(pd.Series(folds).value_counts()) == [3, 3, 4]
    assert assign_folds(CASES[::-1] + CASES[:2], 3, seed=0) == folds
    assert assign_folds(CASES, 3, seed=1) != folds


def test_every_case_is_tested_once_and_never_trained_on_then():
    tested = [case for fold in range(3) for case in _cases("test", fold=fold)]
    assert sorted(tested) == CASES
    for fold in range(3):
        parts = [_cases(part, fold=fold) for part in ("training", "inner_validation", "test")]
        assert sum(len(part) for part in parts) == len(set.union(*parts)) == len(CASES)
        assert _cases("training_fold", fold=fold) == parts[0] | parts[1]
        assert len(parts[1]) == 1  # round(0.2 * 6 or 7)


def test_a_test_section_leaves_the_whole_training_section_to_every_fold():
    index = _index(num_test=2)
    for fold in (0, 7):
        assert _cases("test", index, fold=fold) == {"test_0", "test_1"}
        assert _cases("training_fold", index, fold=fold) == set(CASES)
    inner = [_cases("inner_validation", index, fold=fold) for fold in range(4)]
    assert len({frozenset(part) for part in inner}) > 1


def test_num_cases_limits_the_training_fold_before_the_inner_split():
    three, two = (_cases("training_fold", num_cases=number) for number in (3, 2))
    assert len(three) == 3 and two < three
    parts = [_cases(part, num_cases=3) for part in ("training", "inner_validation")]
    assert [len(part) for part in parts] == [2, 1] and parts[0] | parts[1] == three
    assert _cases("test", num_cases=3) == _cases("test")
    assert _cases("training", inner_fraction=0) == _cases("training_fold")


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="num_folds: 11 folds need as many cases, there are 10"):
        assign_folds(CASES, 11, seed=0)
    with pytest.raises(ValueError, match="num_folds: 0"):
        assign_folds(CASES, 0, seed=0)
    with pytest.raises(ValueError, match="part: 'validation'; allowed: training"):
        _cases("validation")
    with pytest.raises(ValueError, match="fold: 3; the store has the folds 0, 1, 2"):
        _cases("training", fold=3)
    with pytest.raises(ValueError, match="num_cases: 7; the training fold of fold 0 has 6 cases"):
        _cases("training", num_cases=7)
    with pytest.raises(ValueError, match="inner_fraction: 1.5"):
        _cases("training", inner_fraction=1.5)


def test_an_empty_training_fold_is_an_error():
    with pytest.raises(ValueError, match="training fold is empty: 1 cases"):
        _cases("training", num_cases=1)
    single = pd.DataFrame([{"case": "a", "slice": 0, "section": "training", "fold": 0}])
    with pytest.raises(ValueError, match="training fold is empty: 0 cases"):
        select(single, 0, "training")


def test_rows_in_no_fold_are_never_held_out():
    index = _index().assign(fold=-1)
    assert _cases("training", index, inner_fraction=0) == set(CASES)
    assert _cases("test", index) == set()


def test_listed_cases_are_dealt_in_blocks():
    folds = assign_folds(CASES, 3, seed=0, order="listed")
    assert [folds[case] for case in CASES] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert assign_folds(CASES, 3, seed=5, order="listed") == folds
    with pytest.raises(ValueError, match="fold_order: 'list' is unknown; did you mean 'listed'"):
        assign_folds(CASES, 3, seed=0, order="list")
    groups = {"a": "a", "b": "b", "c": "a", "d": "a"}
    with pytest.raises(ValueError, match="num_folds: 2 folds .* leave one without a case"):
        assign_folds([*"abcd"], 2, 0, "listed", groups)
    assert set(assign_folds([*"abcd"], 2, 0, "drawn", groups).values()) == {0, 1}

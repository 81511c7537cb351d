"""Data whose cases all look alike raise no alarm; what is a copy among them is still found."""

import shutil

import numpy as np
import pytest
import torch
from small_store import write_store

from diffboost.audit.leaks import audit_leaks
from diffboost.data.candidates import Candidates
from diffboost.data.comparison import CLEAR, SliceComparison
from diffboost.data.duplicates import find_duplicates
from diffboost.data.registration import texture
from diffboost.data.slices import read_store, write_image


@pytest.mark.parametrize("layout", ["decathlon", "pairs"])
def test_no_alarm_on_near_equal_balls(tmp_path, layout):
    store_dir = write_store(tmp_path / "store", layout=layout)
    assert audit_leaks(store_dir, inner_fraction=0.0) == []


def test_a_copy_among_near_equal_discs_is_found_and_the_limit_is_told(tmp_path, caplog):
    store = read_store(write_store(tmp_path / "store", num_cases=16, layout="pairs"))
    paths = [store.path(name) for name in store.index.image]
    shutil.copyfile(paths[2], paths[9])
    pairs = find_duplicates(store.index, paths, store.header["task"])
    assert pairs[["case", "other"]].to_numpy().tolist() == [["case_2", "case_9"]]
    assert pairs.likeness[0] > 0.99
    assert "the cases look much alike" in caplog.text


@pytest.mark.parametrize(("alike", "limit"), [(False, CLEAR), (True, 0.9)])
def test_the_limit_rises_only_where_cases_look_alike(tmp_path, alike, limit):
    store = read_store(write_store(tmp_path / "store", num_cases=12, layout="pairs"))
    paths = [store.path(name) for name in store.index.image]
    for number, path in enumerate(paths):
        if not alike:
            write_image(path, np.random.default_rng(number).uniform(-1, 1, (32, 32)))
    slices = SliceComparison(store.index, paths, store.header["task"])
    assert slices.near_duplicates() == []
    assert slices.limit > limit if alike else slices.limit == limit


def noise_texture(number: int) -> torch.Tensor:
    image = torch.randn((1, 64, 64), generator=torch.Generator().manual_seed(number))
    return texture(image, 1.0, 64, (0.7, 3.0))


def test_pairs_of_cases_are_drawn_alike_each_time():
    textures = torch.stack([noise_texture(number) for number in range(6)])
    candidates = Candidates(textures, 64, shown=[0, 2, 4], starts=[0, 2, 4])
    (found, drawn), (_, again) = candidates.search(), candidates.search()
    pairs = {tuple(sorted((a // 2, b // 2))) for a, b, _ in drawn}
    assert pairs == {(0, 1), (0, 2), (1, 2)}  # all that there are
    assert [(a, b) for a, b, _ in drawn] == [(a, b) for a, b, _ in again]
    assert {b for _, b, _ in found} == {0, 2, 4} and all(a // 2 != b // 2 for a, b, _ in found)

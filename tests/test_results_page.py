"""The results page says what the committed metrics say."""

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import results_page  # noqa: E402

RESULTS = ROOT / "docs/results"


@pytest.fixture(scope="module")
def made_again(tmp_path_factory):
    """The page, made anew from the committed metrics."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(RESULTS / "data", folder / "data")
    results_page.write_page(folder)
    return folder


def test_the_committed_page_is_what_its_data_gives(made_again):
    assert (made_again / "index.md").read_text() == (RESULTS / "index.md").read_text()
    figures = {path.name for path in RESULTS.glob("*.svg")}
    assert {path.name for path in made_again.glob("*.svg")} == figures and figures


def test_every_arm_of_a_study_is_in_its_table(made_again):
    page = (made_again / "index.md").read_text()
    for path in sorted((RESULTS / "data").glob("real_breast_*.csv.gz")):
        study = path.name.removesuffix(".csv.gz")
        if study in results_page.STUDIES and "total" not in study:
            section = page.partition(f"\n## {study}\n")[2].partition("\n## ")[0]
            for arm in pd.read_csv(path).arm.unique():
                assert section.count(f"\n| {arm} | ") == 1, (study, arm)


def test_a_long_arm_is_compared_over_the_seeds_that_both_have():
    few = results_page.read(RESULTS / "data", "real_hippocampus_10")
    long = results_page.read(RESULTS / "data", "real_hippocampus_10_total")
    rows, best = results_page.over_more_time(few[few.knob == ""], long, "nnunet")
    assert best == "nnunet, long"
    assert {row["arm"] for row in rows} > {"nnunet", "nnunet, long", "diffboost"}
    assert {row["runs"] for row in rows} == {3 * long.seed.nunique()}

"""What variants add is told against the best classical arm, not against baseline alone."""

import numpy as np
import pandas as pd
import pytest

from diffboost.classical import against_best_classical
from diffboost.plans import Experiment

ARMS = ["baseline", "mirror", "nnunet", "diffboost", "diffboost+mirror"]
TEST = {"baseline": 0.5, "mirror": 0.62, "nnunet": 0.55, "diffboost": 0.56, "diffboost+mirror": 0.7}
VALIDATION = {"baseline": 0.4, "mirror": 0.6, "nnunet": 0.59, "diffboost": 0.9}
STUDY = Experiment(name="x", task="y", dataset_dir="z", arms=ARMS, folds=[0], seeds=[0, 1])


def metrics(arms: list[str]) -> pd.DataFrame:
    """Dice of 20 cases and two seeds."""
    rng = np.random.default_rng(0)
    rows = [
        (arm, 0, seed, f"c{case}", "x", "dice", TEST[arm] + rng.normal(0, 0.01))
        for arm in arms
        for seed in (0, 1)
        for case in range(20)
    ]
    return pd.DataFrame(rows, columns=["arm", "fold", "seed", "case", "label", "metric", "value"])


def logs(arms: list[str]) -> pd.DataFrame:
    """Two epochs a training, the first the best; seed 2 is of an earlier order of the study."""
    rows = [
        (arm, 0, seed, epoch, VALIDATION.get(arm, 0.7) - 0.1 * epoch + (9 if seed == 2 else 0))
        for arm in arms
        for seed in ((0, 1, 2) if arm == "baseline" else (0, 1))
        for epoch in (0, 1)
    ]
    return pd.DataFrame(rows, columns=["arm", "fold", "seed", "epoch", "val_dice"])


def test_the_arm_is_chosen_on_inner_validation_and_variants_are_held_to_it():
    found = against_best_classical(metrics(ARMS), logs(ARMS), STUDY)
    assert found["arm"] == "mirror" and found["selection"] == "inner_validation"
    assert found["val_dice"] == pytest.approx({"baseline": 0.4, "mirror": 0.6, "nnunet": 0.59})
    assert found["verdicts"] == {  # diffboost is above baseline
        "diffboost": "no gain shown",
        "diffboost+mirror": "gain shown",
    }
    assert found["differences"]["diffboost"]["mean"] == pytest.approx(-0.06, abs=0.01)
    assert found["differences"]["diffboost+mirror"]["training_ci95"][0] > 0


def test_there_is_nothing_to_choose_without_two_classical_arms_or_without_variants():
    for arms in (["baseline", "diffboost"], ["baseline", "mirror"]):
        assert against_best_classical(metrics(arms), logs(arms), STUDY) is None
    assert against_best_classical(metrics(ARMS), pd.DataFrame(), STUDY) is None

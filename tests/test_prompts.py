"""Prompts name modality, organ and finding; there are fifty phrases."""

import pytest

from diffboost.conditions.prompts import augmentation_phrase, prompt_from_path, task_prompt
from diffboost.data.tasks import read_task


def test_prompt_from_path_expands_abbreviations_and_underscores():
    assert prompt_from_path("US/gb/gb_stone/1.png") == "US, gallbladder, gallbladder stone"
    assert prompt_from_path("CT/abd/arterial_pathology/a.png") == "CT, abdomen, arterial pathology"
    assert prompt_from_path("MR/af/ATFL_pathology/a.png").startswith("MR, ankle foot, anterior ")
    assert prompt_from_path("US/cbd/ivc/a.png") == "US, common bile duct, inferior vena cava"


def test_a_path_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="modality/organ/finding/name.png"):
        prompt_from_path("CT/abd/1.png")


def test_task_prompt_takes_the_finding_of_the_case():
    task = read_task("breast_ultrasound")
    assert task_prompt(task) == "US, breast, lesion"
    assert task_prompt(task, "malignant") == "US, breast, malignant"
    assert task_prompt(task | {"organ": ""}) == "US, lesion"


def test_organ_first_is_what_the_released_code_says():
    other = {"prompt_order": "organ_first"}
    assert task_prompt(read_task("breast_ultrasound") | other, "benign") == "breast, ultrasound"
    assert task_prompt(read_task("prostate_mri") | other) == "prostate, MRI"
    assert task_prompt(read_task("spleen_ct") | other) == "abdomen, CT"


def test_fifty_different_phrases_return_in_turn():
    phrases = [augmentation_phrase(variant) for variant in range(100)]
    assert len(set(phrases)) == 50 and phrases[:50] == phrases[50:]

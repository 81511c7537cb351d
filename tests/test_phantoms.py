"""Phantoms: layout, physics that can be seen in the numbers, and the same bytes on every run."""

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from diffboost.data.anatomy import Canvas, posed_grid
from diffboost.data.phantom_volumes import write_decathlon_task
from diffboost.data.phantoms import CATEGORIES, phantom_image, write_radimagenet_tree
from diffboost.data.scanners import MR_FAMILY, mr_signals, us


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_radimagenet_tree(tmp_path_factory.mktemp("tree") / "a", len(CATEGORIES), 32)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task") / "a"
    return write_decathlon_task(folder, num_training=2, num_test=2, size_px=48, num_slices=12)


def test_tree_has_every_modality_organ_and_finding(tree):
    paths = sorted(tree.rglob("*.png"))
    assert len(paths) == len(CATEGORIES)
    assert {path.relative_to(tree).parts[:3] for path in paths} == set(CATEGORIES)
    assert {category[0] for category in CATEGORIES} == {"CT", "MR", "US"}
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (32, 32) and image.mode == "L"
            low, high = image.getextrema()
        assert high - low > 60, f"{path} is nearly flat"


def test_same_seed_and_number_give_the_same_bytes(tree, tmp_path):
    again = write_radimagenet_tree(tmp_path / "b", 3, 32)
    for path in sorted(again.rglob("*.png")):
        other = tree / path.relative_to(again)
        assert (
            hashlib.sha256(path.read_bytes()).digest()
            == hashlib.sha256(other.read_bytes()).digest()
        )
    assert not np.array_equal(phantom_image(0, 0, 32)[0], phantom_image(1, 0, 32)[0])
    assert not np.array_equal(phantom_image(0, 0, 32)[0], phantom_image(0, len(CATEGORIES), 32)[0])


def test_same_seed_gives_the_same_volume_bytes(task, tmp_path):
    again = write_decathlon_task(tmp_path / "b", num_training=1, num_test=1, size_px=48)
    for path in sorted(again.rglob("*_000.nii.gz")):
        other = task / path.relative_to(again)
        assert (
            hashlib.sha256(path.read_bytes()).digest()
            == hashlib.sha256(other.read_bytes()).digest()
        )


def test_mr_weighting_turns_contrast_around():
    tissues = ["fat", "gray", "white", "csf", "liver", "spleen"]
    t1 = mr_signals(np.random.default_rng(1), tissues, MR_FAMILY["t1"])
    t2 = mr_signals(np.random.default_rng(1), tissues, MR_FAMILY["t2"])
    assert t1["csf"] < t1["gray"] < t1["white"] and t1["spleen"] < t1["liver"]
    assert t2["csf"] > t2["gray"] > t2["white"] and t2["spleen"] > t2["liver"]


def scan_of(paint) -> np.ndarray:
    """Mean ultrasound image of 12 draws of a scene on a 64-sample canvas."""
    images = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        canvas = Canvas(posed_grid(rng, 64, [0.0], (1, 1), 0, 0, 0), rng)
        canvas.fill("liver")
        paint(canvas)
        images.append(us(rng, canvas.layers)[0])
    return np.mean(images, 0)


def test_ultrasound_attenuates_shadows_and_enhances():
    box = {"center": (0, -0.3), "radii": (0.3, 0.25), "wobble": 0.0}
    attenuated = scan_of(lambda canvas: canvas.fill("muscle"))
    assert attenuated[4:12].mean() > attenuated[-8:].mean()
    stone = scan_of(lambda canvas: canvas.blob("calcium", **box))
    assert stone[22:, 14:18].mean() < 0.6 * stone[22:, :6].mean()
    cyst = scan_of(lambda canvas: canvas.blob("fluid", **box))
    assert cyst[10:13, 14:18].mean() < 0.5 * cyst[10:13, :6].mean()
    assert cyst[22:, 14:18].mean() > 1.05 * cyst[22:, :6].mean()


def test_decathlon_header_names_every_file(task):
    header = json.loads((task / "dataset.json").read_text())
    assert header["modality"] == {"0": "MR"}
    assert header["labels"] == {"0": "background", "1": "organ"}
    assert (header["numTraining"], header["numTest"]) == (2, 2)
    for section in ("training", "test"):
        assert len(header[section]) == 2
        assert all((task / entry[key]).is_file() for entry in header[section] for key in entry)


def test_volumes_hold_an_organ_in_most_slices(task):
    for path in sorted(task.glob("images*/*.nii.gz")):
        image = nib.as_closest_canonical(nib.load(path))
        label_path = path.parent.with_name(path.parent.name.replace("images", "labels")) / path.name
        label = nib.as_closest_canonical(nib.load(label_path))
        assert image.shape == label.shape == (48, 48, 12)
        assert np.allclose(image.affine, label.affine)
        assert image.header.get_zooms()[2] > 1.5 * image.header.get_zooms()[0]
        values, mask = image.get_fdata(), label.get_fdata()
        assert image.get_data_dtype() == np.float32 and values.min() >= 0
        assert set(np.unique(mask)) == {0, 1}
        filled = mask.any((0, 1))
        assert not filled[0] and not filled[-1] and filled.sum() >= 6


def test_same_scanner_gives_test_cases_the_contrast_of_training(tmp_path):
    sizes = {"num_training": 4, "num_test": 6, "size_px": 48, "num_slices": 4}
    contrasts = {}
    for same in (False, True):
        folder = write_decathlon_task(tmp_path / str(same), **sizes, same_scanner=same)
        for path in sorted(folder.glob("images*/*.nii.gz")):
            values = nib.load(path).get_fdata()
            mask = nib.load(str(path).replace("images", "labels")).get_fdata() > 0
            contrast = values[mask].mean() / values[~mask].mean()
            contrasts.setdefault((same, path.parent.name), []).append(contrast)
    assert contrasts[True, "imagesTr"] == contrasts[False, "imagesTr"]
    assert max(contrasts[True, "imagesTs"]) < 1.4  # T1, as in training
    assert min(contrasts[False, "imagesTs"]) > 1.5


def test_bad_counts_and_folders_are_refused(tree, tmp_path):
    with pytest.raises(ValueError, match="num_images is 0"):
        write_radimagenet_tree(tmp_path / "c", 0)
    with pytest.raises(ValueError, match="num_test is 0"):
        write_decathlon_task(tmp_path / "c", num_test=0)
    with pytest.raises(FileExistsError, match="not empty"):
        write_radimagenet_tree(tree, 1)

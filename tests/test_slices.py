"""The slice store: what is written is read back, and lists hold the right files."""

import json

import nibabel as nib
import numpy as np
import pytest
import raw_data
import torch
from monai.transforms import Invertd
from PIL import Image

from diffboost.data.slices import (
    case_items,
    read_store,
    slice_items,
    write_edge,
    write_image,
    write_label,
)
from diffboost.data.tasks import read_task
from diffboost.data.transforms import LoadSliced, case_preprocessing
from diffboost.prepare import prepare


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory):
    """A store of four small volumes, edges by gradient."""
    root = raw_data.write_decathlon(tmp_path_factory.mktemp("raw"), 4, "LPS")
    return prepare(
        root, raw_data.store_of(root), raw_data.TASK_3D, 32, edges="gradient", num_folds=2
    )


def test_pngs_give_back_what_was_written(tmp_path):
    image = np.linspace(-1, 1, 256).reshape(16, 16)
    label = np.arange(256).reshape(16, 16) % 4
    names = {key: str(tmp_path / f"{key}.png") for key in ("image", "label", "edge")}
    write_image(names["image"], image)
    write_label(names["label"], label)
    write_edge(names["edge"], (image + 1) / 2)
    item = LoadSliced(["image", "label", "edge"])(names)
    assert all(value.shape == (1, 16, 16) for value in item.values())
    assert item["image"].dtype == item["edge"].dtype == torch.float32
    assert np.abs(item["image"][0].numpy() - image).max() < 1 / 65535
    assert np.abs(item["edge"][0].numpy() - (image + 1) / 2).max() < 0.51 / 255
    assert item["label"].dtype == torch.uint8
    assert (item["label"][0].numpy() == label).all()
    for name in names.values():
        with Image.open(name) as file:
            assert file.info == {}  # nothing about a patient, nothing at all


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_is_refused(tmp_path, value):
    image = np.zeros((4, 4))
    image[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite values; .*a.png was not written"):
        write_image(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_load_sliced_resizes_and_reads_8_bit_images(tmp_path):
    gray = np.full((10, 20), 51, np.uint8)
    Image.fromarray(np.stack([gray] * 3, -1)).save(tmp_path / "a.png")
    image = LoadSliced("image", image_size=8)({"image": tmp_path / "a.png"})["image"]
    assert image.shape == (1, 8, 8)
    assert torch.allclose(image, torch.tensor(51 / 127.5 - 1), atol=1e-5)
    write_label(tmp_path / "b.png", np.repeat([[0, 2]], 4, 0).repeat(4, 1))
    label = LoadSliced("label", image_size=8)({"label": tmp_path / "b.png"})["label"]
    assert label[0, 3].tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="keys: .*'mask'.*allowed: image, synthetic"):
        LoadSliced("mask")


def test_slice_items_are_files_of_the_part_with_enough_foreground(store_dir):
    items = slice_items(store_dir, 0, "training_fold")
    assert len(items) == 2 * 5 and {"image", "label", "edge", "prompt"} <= set(items[0])
    assert items[0]["prompt"] == "MR, head, body"
    filtered = slice_items(store_dir, 0, "training_fold", min_foreground_px=1)
    assert len(filtered) == 2 * 3 and {item["slice"] for item in filtered} == {1, 2, 3}
    assert all((LoadSliced("label")(item)["label"] > 0).any() for item in filtered)
    tested = {item["case"] for item in slice_items(store_dir, 0, "test")}
    assert not tested & {item["case"] for item in items}
    with pytest.raises(ValueError, match="min_foreground_px 5000"):
        slice_items(store_dir, 0, "test", min_foreground_px=5000)


def test_case_items_point_to_the_sources(store_dir):
    items = case_items(store_dir, 1, "test")
    assert len(items) == 2
    for item in items:
        assert nib.load(item["image"]).shape == nib.load(item["label"]).shape == (20, 24, 5)
        assert item["spacing_mm"] == pytest.approx(raw_data.SPACING_MM)


def test_stored_slices_are_the_preprocessed_case(store_dir):
    task = read_store(store_dir).header["task"]
    case = case_items(store_dir, 0, "test")[0]
    whole = case_preprocessing(task, 32, with_label=True)(case)
    stored = [item for item in slice_items(store_dir, 0, "test") if item["case"] == case["case"]]
    assert len(stored) == whole["image"].shape[-1]
    for item in map(LoadSliced(["image", "label"]), stored):
        number = item["slice"]
        assert (item["image"] - whole["image"][..., number]).abs().max() < 2 / 65535
        assert torch.equal(item["label"], whole["label"][..., number].to(torch.uint8))


def test_preprocessing_can_be_undone_to_shape_affine_and_content(store_dir):
    task = read_store(store_dir).header["task"]
    case = case_items(store_dir, 0, "test")[0]
    preprocessing = case_preprocessing(task, 64, with_label=True)
    item = preprocessing({"image": case["image"], "label": case["label"]})
    item["pred"] = (item["label"] == 2).float()  # as a network's probability of class 2
    undo = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)
    back, source = undo(item)["pred"], nib.load(case["label"])
    assert back.shape == (1, *source.shape)
    np.testing.assert_allclose(back.affine, source.affine, atol=1e-5)
    assert ((back[0] > 0.5).numpy() == (source.get_fdata() == 2)).all()


def test_a_2d_image_comes_back_with_its_rows_and_columns(tmp_path):
    raw_data.write_busi(tmp_path, 1)
    preprocessing = case_preprocessing(read_task(raw_data.TASK_2D), 64, with_label=False)
    item = preprocessing({"image": str(tmp_path / "benign" / "benign (1).png")})
    assert item["image"].shape == (1, 64, 64, 1)
    item["pred"] = (item["image"] > 0.4).float()
    undo = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)
    back = undo(item)["pred"]
    assert back.shape[:3] == (1, 30, 40)
    assert ((back.reshape(30, 40) > 0.5).numpy() == raw_data.picture(0)[1]).mean() > 0.98


def test_a_store_of_another_version_or_none_is_named(store_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="store_dir: no such folder: .*nowhere"):
        read_store(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no slice store in"):
        read_store(tmp_path)
    header = read_store(store_dir).header | {"store_version": 0}
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    (tmp_path / "index.parquet").write_bytes((store_dir / "index.parquet").read_bytes())
    with pytest.raises(ValueError, match="store_version 0, this program reads the versions 3, 4"):
        read_store(tmp_path)


def test_a_source_folder_that_is_gone_is_named(store_dir, tmp_path):
    header = read_store(store_dir).header | {"source_dir": "gone"}
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    (tmp_path / "index.parquet").write_bytes((store_dir / "index.parquet").read_bytes())
    with pytest.raises(FileNotFoundError, match="the source folder .*gone of this store is gone"):
        case_items(tmp_path, 0, "test")

"""Readers: what they find in each layout, how cases are named, and what they leave out."""

import logging

import nibabel as nib
import numpy as np
import pytest
import raw_data
import torch
from PIL import Image

from diffboost.data.loading import CaseDataset
from diffboost.data.sources import read_source
from diffboost.data.tasks import read_task

TASK_2D, TASK_3D = (read_task(task) for task in (raw_data.TASK_2D, raw_data.TASK_3D))


def _label(root, task, size=16, number=0) -> torch.Tensor:
    """The label (D, S, S) of a case, or the reason why it was rejected."""
    loaded = CaseDataset(read_source(root, task).cases, task, size)[number]
    return loaded if isinstance(loaded, str) else loaded.labels[:, 0]


def test_busi_layout_joins_masks_and_takes_the_finding_from_the_folder(tmp_path):
    root = raw_data.write_busi(tmp_path, 4)
    extra = np.zeros((30, 40), bool)
    extra[25:29, 30:38] = True
    rgba = np.stack([extra * 255] * 3 + [np.full(extra.shape, 255)], -1).astype(np.uint8)
    Image.fromarray(rgba).save(root / "benign" / "benign (1)_mask_1.png")  # opaque, as in BUSI
    cases = read_source(root, TASK_2D).cases
    assert [case.name for case in cases] == ["benign_1", "benign_3", "malignant_2", "malignant_4"]
    assert [case.finding for case in cases] == ["benign"] * 2 + ["malignant"] * 2
    assert [len(case.labels) for case in cases] == [2, 1, 1, 1]
    assert all(case.image.parent.name == case.finding for case in cases)
    loaded = CaseDataset(cases, TASK_2D, 40)[0]
    expected = raw_data.picture(0)[1] | extra
    assert abs(int(loaded.labels.sum()) * 30 / 40 - expected.sum()) <= 12
    assert loaded.original_shape == [30, 40, 1] and loaded.spacing_mm == [1, 1, 1]


def test_include_chooses_subfolders(tmp_path):
    root = raw_data.write_busi(tmp_path, 4)
    cases = read_source(root, TASK_2D | {"include": ["malignant"]}).cases
    assert [case.name for case in cases] == ["malignant_2", "malignant_4"]
    with pytest.raises(ValueError, match="include: no images in .*did you mean 'malignant'"):
        read_source(root, TASK_2D | {"include": ["malignent"]})


@pytest.mark.parametrize("form", ["1-bit", "0/1", "0/255", "rgb", "jpeg", "tiff", "palette"])
def test_binary_masks_of_every_form_give_the_same_label(tmp_path, form):
    image, mask = raw_data.picture(1)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "scan 1.png")
    bytes_255 = (mask * 255).astype(np.uint8)
    picture = {
        "1-bit": Image.fromarray(mask),
        "0/1": Image.fromarray(mask.astype(np.uint8)),
        "rgb": Image.fromarray(np.stack([bytes_255] * 3, -1)),
        "palette": Image.fromarray(bytes_255).convert("P"),
    }.get(form, Image.fromarray(bytes_255))
    suffix = {"jpeg": "jpg", "tiff": "tif"}.get(form, "png")
    picture.save(tmp_path / "masks" / f"scan 1.{suffix}")
    (case,) = read_source(tmp_path, TASK_2D).cases
    assert (case.name, case.finding) == ("scan_1", "")
    label = CaseDataset([case], TASK_2D, 120)[0].labels[0, 0]  # 4 x 3 pixels a source pixel
    expected = torch.from_numpy(mask).repeat_interleave(4, 0).repeat_interleave(3, 1)
    wrong = (label.bool() != expected).float().mean()
    assert wrong < (0.01 if form == "jpeg" else 1e-9)


@pytest.mark.parametrize("form", ["gray", "rgb", "rgba", "16-bit", "jpeg", "tiff"])
def test_images_of_every_form_give_the_same_slice(tmp_path, form):
    image, mask = raw_data.picture(1)
    picture = {
        "rgb": Image.fromarray(np.stack([image] * 3, -1)),
        "rgba": Image.fromarray(np.stack([image] * 3 + [image * 0 + 255], -1)),
        "16-bit": Image.fromarray(image.astype(np.uint16) * 200),
    }.get(form, Image.fromarray(image))
    suffix = {"jpeg": "jpg", "tiff": "tiff"}.get(form, "png")
    picture.save(tmp_path / f"a.{suffix}", **({"quality": 98} if form == "jpeg" else {}))
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    loaded = CaseDataset(read_source(tmp_path, TASK_2D).cases, TASK_2D, 24)[0]
    (tmp_path / "plain").mkdir()
    Image.fromarray(image).save(tmp_path / "plain" / "a.png")
    Image.fromarray(mask).save(tmp_path / "plain" / "a_mask.png")
    plain = CaseDataset(read_source(tmp_path / "plain", TASK_2D).cases, TASK_2D, 24)[0]
    assert (loaded.images - plain.images).abs().max() < (0.1 if form == "jpeg" else 1e-4)


def test_masks_with_several_classes_go_by_the_label_map(tmp_path):
    image, mask = raw_data.picture(0)
    label = mask.astype(np.uint8) * 2
    label[:4] = 7
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(label).save(tmp_path / "a_mask.png")
    task = TASK_2D | {"labels": {"wall": [7], "lesion": [1, 2]}}
    assert _label(tmp_path, task).unique().tolist() == [0, 1, 2]
    assert _label(tmp_path, task | {"labels": {"lesion": [2]}, "drop": [7]}).unique().tolist() == [
        0,
        1,
    ]
    reason = _label(tmp_path, task | {"labels": {"lesion": [2], "wall": [9]}})
    assert reason == (
        "label values 7 are not in the map: 0, 2, 9 (of the task's keys `labels` and `drop`)"
    )


def test_an_image_without_mask_is_left_out_with_a_reason(tmp_path):
    root = raw_data.write_busi(tmp_path, 2)
    (root / "benign" / "benign (1)_mask.png").unlink()
    source = read_source(root, TASK_2D)
    assert source.rejected == [("benign/benign (1).png", "no mask for this image")]
    assert [case.name for case in source.cases] == ["malignant_2"]


def test_equal_stems_get_different_names(tmp_path):
    for folder in ("a", "b"):
        raw_data.write_busi(tmp_path / folder, 1)
    names = [case.name for case in read_source(tmp_path, TASK_2D).cases]
    assert names == ["benign_1", "benign_1_2"]


def test_decathlon_reads_labelled_test_cases_and_leaves_out_the_others(tmp_path, caplog):
    root = raw_data.write_decathlon(tmp_path, 3)
    pairs = [
        {key: f"./{key}sTr/case_{number:03d}.nii.gz" for key in ("image", "label")}
        for number in range(3)
    ]
    test = [pairs[2], "./imagesTs/case_009.nii.gz"]
    raw_data.write_json(root, {"training": pairs[:2], "test": test})
    with caplog.at_level(logging.INFO):
        source = read_source(root, TASK_3D)
    assert [(case.name, case.section) for case in source.cases] == [
        ("case_000", "training"),
        ("case_001", "training"),
        ("case_002", "test"),
    ]
    assert "1 test images without label are left out" in caplog.text


def test_channel_is_the_last_axis_of_a_4d_file_and_plain_nii_is_read(tmp_path):
    image, label = raw_data.volume(0)
    raw_data.write_nifti(tmp_path / "labelsTr" / "a.nii", label)
    (tmp_path / "imagesTr").mkdir()
    affine = nib.load(tmp_path / "labelsTr" / "a.nii").affine
    both = np.stack([image, image[::-1]], axis=-1)
    nib.save(nib.Nifti1Image(both, affine), tmp_path / "imagesTr" / "a.nii")
    raw_data.write_json(
        tmp_path, {"training": [{"image": "imagesTr/a.nii", "label": "labelsTr/a.nii"}]}
    )
    cases = read_source(tmp_path, TASK_3D).cases
    first, second = (
        CaseDataset(cases, TASK_3D | {"channel": channel}, 24)[0].images for channel in (0, 1)
    )
    assert torch.allclose(second, first.flip(2), atol=1e-4) and not torch.allclose(second, first)
    assert CaseDataset(cases, TASK_3D | {"channel": 2}, 24)[0] == "the image has no channel 2"


def test_label_map_merges_and_drops(tmp_path):
    root = raw_data.write_decathlon(tmp_path, 1)
    whole = _label(root, TASK_3D, 32)
    assert whole.unique().tolist() == [0, 1, 2]
    merged = _label(root, TASK_3D | {"labels": {"body": [1, 2]}}, 32)
    assert torch.equal(merged, (whole > 0).to(torch.uint8))
    dropped = _label(root, TASK_3D | {"labels": {"right_part": [2]}, "drop": [1]}, 32)
    assert torch.equal(dropped, (whole == 2).to(torch.uint8))


def test_any_orientation_of_the_file_gives_the_same_slices(tmp_path):
    loaded = {}
    for axcodes in ("RAS", "LPS", "SAR", "PIL"):
        root = raw_data.write_decathlon(tmp_path / axcodes, 1, axcodes)
        loaded[axcodes] = CaseDataset(read_source(root, TASK_3D).cases, TASK_3D, 24)[0]
    for other in ("LPS", "SAR", "PIL"):
        assert torch.allclose(loaded[other].images, loaded["RAS"].images, atol=1e-5)
        assert torch.equal(loaded[other].labels, loaded["RAS"].labels)
        assert loaded[other].spacing_mm == pytest.approx(raw_data.SPACING_MM)
    assert loaded["SAR"].original_shape == [5, 24, 20]


@pytest.mark.parametrize(
    "axis, depth, spacing_mm",
    [("axial", 5, (0.5, 1, 3)), ("coronal", 24, (0.5, 3, 1)), ("sagittal", 20, (1, 3, 0.5))],
)
def test_slice_axis_decides_which_axis_comes_last(tmp_path, axis, depth, spacing_mm):
    root = raw_data.write_decathlon(tmp_path, 1, "LPS")
    task = TASK_3D | {"slice_axis": axis}
    loaded = CaseDataset(read_source(root, task).cases, task, 16)[0]
    assert loaded.images.shape == (depth, 1, 16, 16)
    assert loaded.spacing_mm == pytest.approx(spacing_mm)

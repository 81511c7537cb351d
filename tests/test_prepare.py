"""prepare writes whole stores: every box of the design's list, the same each time."""

import inspect
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import raw_data
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Resize
from PIL import Image

from diffboost.conditions.edges import EdgeDetector
from diffboost.data.slices import INDEX_COLUMNS, read_store, slice_items
from diffboost.data.transforms import LoadSliced, SmoothSlicesd
from diffboost.files import sha256_of_files
from diffboost.prepare import prepare

BUNDLES = Path(__file__).parents[1] / "bundles"
CONFIGS = ("task_finetune", "radimagenet_controlnet_pretrain")


def _prepare(root: Path, task: dict, store: str = "store", **knobs) -> Path:
    defaults = {"edges": "gradient", "num_folds": 2}
    return prepare(root, raw_data.store_of(root, store), task, 32, **{**defaults, **knobs})


def _bytes(store_dir: Path) -> dict[str, bytes]:
    files = sorted(path for path in store_dir.rglob("*.png") if "contact" not in path.name)
    return {str(path.relative_to(store_dir)): path.read_bytes() for path in files}


def test_a_store_of_other_edge_weights_is_another_store(tmp_path, monkeypatch):
    """It was taken for the one that was asked for."""
    root = raw_data.write_decathlon(tmp_path / "raw")

    def load(name, weights=None, size_px=None, device="cpu"):
        detect = lambda images: torch.full_like(images, float(weights))  # noqa: E731
        return EdgeDetector(name, detect, 64, f"hash of {weights}", device)

    monkeypatch.setattr("diffboost.prepare.load_edge_detector", load)
    settings = (root, tmp_path / "store", "hippocampus_mri", 32, "controlnet-hed")
    known = {"group_duplicates": False, "num_folds": 1}
    prepare(*settings, edge_weights="0.1", **known)
    assert prepare(*settings, edge_weights="0.1", **known) == prepare(*settings, **known)
    with pytest.raises(FileExistsError, match=r"made by weights of hash hash of 0.1, .* 0.9 has"):
        prepare(*settings, edge_weights="0.9", **known)


def test_volumes_become_a_store(tmp_path):
    root = raw_data.write_decathlon(tmp_path, 4, "LPS")
    store = read_store(_prepare(root, raw_data.TASK_3D))
    assert list(store.index.columns) == list(INDEX_COLUMNS) and len(store.index) == 4 * 5
    header = store.header
    assert header["labels"] == {"0": "background", "1": "left_part", "2": "right_part"}
    assert (header["numTraining"], header["numTest"], header["store_version"]) == (4, 0, 4)
    assert header["modality"] == {"0": "MR"} and header["task"]["name"] == "small_task"
    assert header["preprocessing"] == {
        "image_size": 32, "edges": "gradient", "hed_size_px": None, "edge_weights_sha256": "",
    }  # fmt: skip
    row = store.index.iloc[2]
    assert (row["case"], row["slice"], row.section) == ("case_000", 2, "training")
    assert row.spacing_mm.tolist() == pytest.approx(raw_data.SPACING_MM)
    assert row.original_shape.tolist() == [20, 24, 5]
    assert np.reshape(row.affine, (4, 4)).diagonal().tolist() == [-0.5, -1, 3, 1]
    assert row.sha256 == sha256_of_files([store.image_path(row)])
    sources = [store.source_dir / row[key] for key in ("source_image", "source_label")]
    assert store.source_sha256()["case_000"] == sha256_of_files(sources) == row.source_sha256
    assert 0.9 < row.foreground_px / (64 * 32 * 32 / (20 * 24)) < 1.1
    assert pd.read_csv(store.store_dir / "rejected.csv").columns.tolist() == ["file", "reason"]
    with Image.open(store.store_dir / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 1000 and np.asarray(sheet.convert("L")).std() > 10
    assert not raw_data.store_of(root, "store.partial").exists()


@pytest.mark.parametrize("shape", [(1, 96, 70, 3), (1, 20, 130), (1, 16, 16, 2)])
def test_slices_are_smoothed_as_monai_smooths_volumes(shape):
    image = MetaTensor(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    image.affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    size = {"spatial_size": (32, 32, -1), "mode": "trilinear"}  # gives a picture its D of 1
    wanted = Resize(**size, anti_aliasing=True)(image)
    smoothed = SmoothSlicesd("image", 32)({"image": image})["image"]
    found = Resize(**size)(smoothed)
    assert torch.allclose(found, wanted, atol=1e-6) and torch.equal(found.affine, wanted.affine)
    assert torch.equal(smoothed, image) == (max(shape[1:3]) <= 32)


def test_hints_hold_the_outline_of_the_label(tmp_path):
    root = raw_data.write_busi(tmp_path, 4)
    items = slice_items(_prepare(root, raw_data.TASK_2D), 0, "all")
    for item in map(LoadSliced(["edge", "label"]), items):
        inside = item["label"][0].bool()
        outline = inside[:, 1:] != inside[:, :-1]
        assert outline.any() and (item["edge"][0, :, 1:][outline] == 1).all()
    assert {item["prompt"] for item in items} == {"US, breast, benign", "US, breast, malignant"}


def test_an_empty_mask_is_kept_with_no_foreground(tmp_path):
    root = raw_data.write_busi(tmp_path, 3)
    Image.fromarray(np.zeros((30, 40), bool)).save(root / "benign" / "benign (1)_mask.png")
    index = read_store(_prepare(root, raw_data.TASK_2D)).index.set_index("case")
    assert index.foreground_px["benign_1"] == 0 < index.foreground_px["benign_3"]


def test_a_tree_keeps_its_images_where_they_are(tmp_path):
    for number in range(3):
        path = tmp_path / "US" / "gb" / "gb_stone" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(raw_data.picture(number)[0]).save(path)
    store = read_store(_prepare(tmp_path, "radimagenet", num_folds=1))
    assert not any((store.store_dir / "images").iterdir())
    assert set(store.index.image_root) == {"source"} and set(store.index.label) == {""}
    items = slice_items(store.store_dir, 0, "all")
    assert items[0]["image"] == str(tmp_path / "US" / "gb" / "gb_stone" / "0.png")
    assert items[0]["prompt"] == "US, gallbladder, gallbladder stone" and "label" not in items[0]
    loaded = LoadSliced(["image", "edge"], image_size=32)(items[0])
    assert loaded["image"].shape == loaded["edge"].shape == (1, 32, 32)


def test_phantoms_are_made_inside_the_store_and_move_with_it(tmp_path):
    sizes = {"num_training": 2, "num_test": 1, "size_px": 32, "num_slices": 4}
    store_dir = prepare(
        "phantoms", tmp_path / "a", "phantom_organ", 32, edges="gradient", phantoms=sizes
    )
    store = read_store(store_dir.rename(tmp_path / "b"))
    assert store.source_dir == tmp_path / "b" / "source" and store.source_dir.is_dir()
    assert (store.header["numTraining"], store.header["numTest"]) == (2, 1)
    folds = store.index.groupby("section").fold.unique()
    assert folds["test"].tolist() == [-1] and -1 not in folds["training"]


def test_workers_and_runs_change_nothing(tmp_path):
    root = raw_data.write_decathlon(tmp_path, 3)
    first = _prepare(root, raw_data.TASK_3D, "first")
    second = _prepare(root, raw_data.TASK_3D, "second", num_workers=2)
    assert _bytes(first) == _bytes(second)
    assert (first / "index.parquet").read_bytes() == (second / "index.parquet").read_bytes()


def test_a_store_in_place_is_left_as_it_is(tmp_path, caplog):
    root = raw_data.write_busi(tmp_path, 3)
    caplog.set_level("INFO")
    store_dir = _prepare(root, raw_data.TASK_2D)
    before = (store_dir / "index.parquet").stat().st_mtime_ns
    assert _prepare(root, raw_data.TASK_2D) == store_dir
    assert (store_dir / "index.parquet").stat().st_mtime_ns == before
    assert "nothing to do" in caplog.text


def test_monai_warns_of_its_readers_once_and_not_for_every_picture(tmp_path, caplog):
    _prepare(raw_data.write_busi(tmp_path, 4), raw_data.TASK_2D)
    warned = [record for record in caplog.records if "nvImageCodec" in record.getMessage()]
    assert len(warned) <= 1  # none where nvImageCodec is installed


def test_leftovers_of_a_stopped_run_are_replaced(tmp_path):
    root = raw_data.write_busi(tmp_path, 2)
    partial_dir = raw_data.store_of(root, "store.partial")
    (partial_dir / "images").mkdir(parents=True)
    store_dir = _prepare(root, raw_data.TASK_2D)
    assert len(read_store(store_dir).index) == 2 and not partial_dir.exists()


def test_num_cases_draws_by_seed(tmp_path):
    root = raw_data.write_busi(tmp_path, 8)
    chosen = [
        set(read_store(_prepare(root, raw_data.TASK_2D, f"{n}", num_cases=3, seed=n)).index.case)
        for n in range(3)
    ]
    assert [len(cases) for cases in chosen] == [3, 3, 3] and len(set(map(frozenset, chosen))) > 1


@pytest.mark.parametrize("bundle", CONFIGS)
def test_config_passes_every_knob_of_prepare(bundle):
    config = ConfigParser.load_config_file(BUNDLES / bundle / "configs" / "prepare.yaml")
    knobs = set(config) - {"bundle_root", "run"}
    call = config["run"][1]
    assert {key for key in call if key != "_target_"} == knobs
    assert knobs <= set(inspect.signature(prepare).parameters)
    assert all(call[key] == f"@{key}" for key in knobs)


def test_config_of_task_finetune_runs(tmp_path):
    root = raw_data.write_busi(tmp_path / "raw", 3)
    task = tmp_path / "task.yaml"
    task.write_text(json.dumps(raw_data.TASK_2D))
    parser = ConfigParser()
    parser.read_config(BUNDLES / "task_finetune" / "configs" / "prepare.yaml")
    store_dir = tmp_path / "store"
    knobs = {"dataset_dir": root, "store_dir": store_dir, "task": task, "edges": "gradient"}
    parser.update({key: str(value) for key, value in knobs.items()})
    parser.get_parsed_content("run")
    assert read_store(store_dir).header["preprocessing"]["image_size"] == 64

"""What is renamed into place lies on the disk before, and its new name right after: a power cut
loses no more than a kill."""

import os
import stat
from pathlib import Path

import pandas as pd
import pytest
import raw_data
import small_backbone
from PIL import Image

from diffboost.data.phantoms import write_radimagenet_tree
from diffboost.files import flush_folder
from diffboost.generation.array_files import DONE
from diffboost.generation.backbones import load_part
from diffboost.generation.cache import build_cache
from diffboost.generation.creation import write_backbone
from diffboost.generation.decoder_training import create_tiny_decoder, export_decoder
from diffboost.handlers import save_weights
from diffboost.prepare import prepare
from diffboost.records import DoneCases
from diffboost.segmentation.case_results import origin_of, write_scores
from diffboost.unlabelled import prepare_unlabelled


class Disk:
    """Which files were flushed since they changed, and folders since something moved there."""

    def __init__(self, monkeypatch) -> None:
        self.flushed: dict[int, int] = {}
        self.waiting: dict[int, str] = {}
        self.moved: list[str] = []
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.flush)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def flush(self, number: int) -> None:
        state = os.fstat(number)
        self.flushed[state.st_ino] = state.st_mtime_ns
        if stat.S_ISDIR(state.st_mode):
            self.waiting.pop(state.st_ino, None)
        self.fsync(number)

    def _watched(self, move):
        def watched(source, target):
            source, target = Path(source), Path(target)
            if ".partial" in str(source):  # other libraries move files of their own
                files = [path for path in (source, *source.rglob("*")) if path.is_file()]
                late = [str(path) for path in files if not self.is_flushed(path)]
                assert not late, f"moved before they were flushed: {late}"
                self.moved.append(target.name)
            move(source, target)
            if ".partial" in str(source):
                self.waiting[target.parent.stat().st_ino] = str(target)

        return watched

    def is_flushed(self, path: Path) -> bool:
        """Notes of done batches need not be: they are removed right after the renaming."""
        state = path.stat()
        return self.flushed.get(state.st_ino) == state.st_mtime_ns or path.name.startswith(DONE)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk(monkeypatch)
    yield disk
    assert disk.moved and not disk.waiting


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return small_backbone.write_backbone(tmp_path_factory.mktemp("backbone") / "small")


def test_a_folder_is_flushed_with_all_below_it_and_what_fails_is_said(tmp_path, disk):
    for name in ("a", "b/c", "b/d/e.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    flush_folder(tmp_path)
    assert all(map(disk.is_flushed, (tmp_path, *tmp_path.rglob("*"))))
    os.replace(tmp_path / "b/d/e.partial", tmp_path / "b/d/e")
    (tmp_path / "b/gone").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="b/gone"):
        flush_folder(tmp_path / "b")
    flush_folder(tmp_path / "b/d")


def test_a_store_of_cases(tmp_path, disk):
    root = raw_data.write_busi(tmp_path / "raw", 6)
    store = prepare(root, tmp_path / "store", raw_data.TASK_2D, 32, "gradient", num_folds=3)
    prepare_unlabelled(store, tmp_path / "unlabelled", fold=0, num_cases=2)
    assert {"store", "unlabelled"} <= set(disk.moved)


@pytest.fixture
def tree(tmp_path):
    return write_radimagenet_tree(tmp_path / "raw", num_images=4, image_size_px=32)


def test_a_store_of_a_tree(tree, tmp_path, disk):
    prepare(tree, tmp_path / "store", "radimagenet", 32, "gradient")
    assert {"store", "index.parquet"} <= set(disk.moved)


def test_a_cache_of_latents(tmp_path, disk, backbone):
    for name in ("image", "edge"):
        Image.new("L", (32, 32)).save(tmp_path / f"{name}.png")
    item = {name: str(tmp_path / f"{name}.png") for name in ("image", "edge")}
    folder = build_cache([item | {"prompt": "CT"}], backbone, str(tmp_path / "a"), 32).folder
    assert folder.name in disk.moved


def test_a_backbone_and_a_decoder(tmp_path, disk, backbone):
    write_backbone(str(tmp_path / "made"), {"vae": load_part(backbone, "vae")}, base=backbone)
    decoder = create_tiny_decoder(backbone, channels=8, num_blocks=[1, 1, 1])
    save_weights(decoder, tmp_path / "model.pt")
    weights, target = str(tmp_path / "model.pt"), str(tmp_path / "decoder")
    export_decoder(decoder, weights, backbone, target, {"cases": {}})
    assert {"made", "decoder"} <= set(disk.moved)


def test_predictions_of_an_evaluation(tmp_path, disk):
    partial_dir = tmp_path / "evaluation.partial"
    (partial_dir / "predictions").mkdir(parents=True)
    (partial_dir / "predictions" / "a.png").write_bytes(b"a")
    (tmp_path / "a.png").write_bytes(b"source")
    item = {"case": "a", "image": str(tmp_path / "a.png"), "label": []}
    rows = [{"case": "a", "label": "lesion", "metric": "dice", "value": 1.0}]

    DoneCases(partial_dir).write("a", origin_of(item), rows, ["predictions/a.png"])
    write_scores([item], str(partial_dir), str(tmp_path / "made"))
    assert {"predictions", "metrics.csv"} <= set(disk.moved)
    assert pd.read_csv(tmp_path / "made/metrics.csv").value.tolist() == [1.0]

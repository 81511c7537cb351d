"""Stages that are no training: stopped at any moment, the same command ends with the same bytes."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import monai
import numpy as np
import pytest
import raw_data
import small_backbone
import small_store
import torch
from monai.bundle import ConfigParser
from PIL import Image

from diffboost import prepare as prepare_module
from diffboost import store_folders, store_writer
from diffboost.audit.table1 import MethodBatches, image_paths
from diffboost.conditions.edges import load_edge_detector
from diffboost.data import phantom_volumes, phantoms
from diffboost.files import sha256_of_files
from diffboost.generation import cache
from diffboost.generation.cache import Jitterd, build_cache
from diffboost.generation.creation import train_tokenizer
from diffboost.prepare import prepare
from diffboost.records import DoneCases, state_of
from diffboost.segmentation import case_results
from diffboost.segmentation.evaluation import CaseWriter

PHANTOMS = {"num_training": 3, "num_test": 1, "size_px": 32, "num_slices": 3}
BUNDLE = Path(__file__).parents[1] / "bundles" / "diffboost_segmentation"
CONFIGS = [str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "evaluate")]


def _bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _times(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


class Stop:
    """Lets a function through some times, then raises."""

    def __init__(self, function, times: int, error: BaseException | None = None) -> None:
        self.function, self.times = function, times
        self.error = error or KeyboardInterrupt()
        self.calls = 0

    def __call__(self, *arguments, **named):
        self.calls += 1
        if self.calls > self.times:
            raise self.error
        return self.function(*arguments, **named)

    def __get__(self, instance, owner):  # as a method
        return lambda *arguments, **named: self(instance, *arguments, **named)


class StoppingDetector(Stop):
    """An edge detector that is stopped."""

    weights_sha256 = ""


def _stop_edges(monkeypatch, times: int, error: BaseException | None = None) -> None:
    detector = StoppingDetector(load_edge_detector("gradient"), times, error)
    monkeypatch.setattr(prepare_module, "load_edge_detector", lambda *_: detector)


@pytest.fixture(scope="module", autouse=True)
def no_sheet():
    """Contact sheets take a second each; their bytes are compared in test_tree_scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "write_contact_sheet", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four volumes of five slices."""
    return raw_data.write_decathlon(tmp_path_factory.mktemp("raw") / "scans")


def _prepare(root: Path, name: str, **knobs) -> Path:
    knobs = {"edges": "gradient", "num_folds": 2, "task": raw_data.TASK_3D} | knobs
    return prepare(root, raw_data.store_of(root, name), image_size=32, **knobs)


@pytest.fixture(scope="module")
def whole(root):
    return _bytes(_prepare(root, "whole"))


# prepare


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_prepare_goes_on_at_the_case_that_it_lacks(root, whole, monkeypatch, num_workers):
    name = f"resumed{num_workers}"
    partial_dir = raw_data.store_of(root, f"{name}.partial")
    _stop_edges(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        _prepare(root, name, num_workers=num_workers)
    monkeypatch.undo()
    assert len(list((partial_dir / "done").iterdir())) == 2
    done = _times(partial_dir, "*s/case_00[01]_*.png")
    (partial_dir / "images" / "case_002_0000.png").write_bytes(b"half")  # what a kill leaves
    (partial_dir / "edges" / "case_002_0009.png").write_bytes(b"stray")
    store_dir = _prepare(root, name, num_workers=num_workers)
    assert done.items() <= _times(store_dir, "*s/*.png").items() and len(done) == 2 * 5
    assert _bytes(store_dir) == whole and not partial_dir.exists()


@pytest.mark.parametrize(
    "module, function, left",
    [
        (store_writer, "find_duplicates", "resumed.partial"),
        (store_folders, "_remove_records", "resumed"),
    ],
)
def test_prepare_goes_on_after_its_cases(root, whole, monkeypatch, module, function, left):
    _stop_edges(monkeypatch, 4)
    monkeypatch.setattr(module, function, Stop(None, 0))  # the second: right after the renaming
    with pytest.raises(KeyboardInterrupt):
        _prepare(root, "resumed")
    monkeypatch.undo()
    store_dir = raw_data.store_of(root, "resumed")
    assert (raw_data.store_of(root, left) / "done").is_dir()
    _stop_edges(monkeypatch, 0)
    assert _bytes(_prepare(root, "resumed")) == whole
    shutil.rmtree(store_dir)


def test_a_case_that_changed_or_was_bad_is_done_again(tmp_path, monkeypatch):
    root = raw_data.write_decathlon(tmp_path / "scans")
    last = root / "labelsTr" / "case_003.nii.gz"
    good = last.read_bytes()
    last.write_bytes(b"no NIfTI")
    with pytest.raises(ValueError, match="1 of 4 cases were rejected.*case_003"):
        _prepare(root, "store")
    last.write_bytes(good)
    for key, array in zip(("images", "labels"), raw_data.volume(7, (20, 24, 4)), strict=True):
        raw_data.write_nifti(root / f"{key}Tr" / "case_001.nii.gz", array)
    done = _times(raw_data.store_of(root, "store.partial"), "images/case_00[02]*.png")
    store_dir = _prepare(root, "store")
    assert done.items() <= _times(store_dir, "images/*.png").items() and len(done) == 10
    assert _bytes(store_dir) == _bytes(_prepare(root, "anew"))
    assert not (store_dir / "edges" / "case_001_0004.png").exists()  # it has four slices now


def test_a_done_case_whose_file_was_lost_is_done_again(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "source").write_bytes(b"source")
    origin = ["training", *state_of([tmp_path / "source"])]
    done = DoneCases(tmp_path)
    done.write("case", origin, [{"value": 0.1 + 0.2, "spacing": [1e-17]}], ["a.png"])
    assert done.read("case", origin) == [{"value": 0.1 + 0.2, "spacing": [1e-17]}]
    assert done.read("case", ["test", *origin[1:]]) is None and done.read("other", origin) is None
    (tmp_path / "a.png").write_bytes(b"")
    assert done.read("case", origin) is None


def test_edges_of_a_case_depend_on_no_other(root):
    few = _bytes(_prepare(root, "few", num_cases=2))
    many = _bytes(_prepare(root, "many"))
    edges = [name for name in few if name.startswith("edges")]
    assert len(edges) == 2 * 5 and all(few[name] == many[name] for name in edges)


def test_a_corrected_command_is_not_stopped_by_what_is_left(tmp_path, monkeypatch):
    root = raw_data.write_decathlon(tmp_path / "scans")
    partial_dir = raw_data.store_of(root, "store.partial")
    _stop_edges(monkeypatch, 0)  # it never got anywhere
    with pytest.raises(KeyboardInterrupt):
        _prepare(root, "store")
    _stop_edges(monkeypatch, 1)  # another command, stopped after a case
    with pytest.raises(KeyboardInterrupt):
        _prepare(root, "store", seed=1)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="unfinished store: seed differ .seed: 1 there, 2"):
        _prepare(root, "store", seed=2)
    shutil.rmtree(partial_dir)
    few_labels = raw_data.TASK_3D | {"labels": {"left_part": [1]}}
    with pytest.raises(ValueError, match="4 of 4 .*values 2 are not in the map"):
        _prepare(root, "store", task=few_labels)
    assert not partial_dir.exists()
    (root / "imagesTr" / "case_000.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 4"):
        _prepare(root, "store")
    assert partial_dir.is_dir()  # with three good cases; but what was asked for has failed
    _prepare(root, "store", max_rejected_fraction=0.5, seed=1)


def test_phantoms_go_on_too(tmp_path, monkeypatch):
    knobs = {"edges": "gradient", "phantoms": PHANTOMS}
    first = prepare("phantoms", tmp_path / "whole", "phantom_organ", 32, **knobs)
    stop = Stop(phantom_volumes.phantom_case, 2)
    monkeypatch.setattr(phantom_volumes, "phantom_case", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare("phantoms", tmp_path / "resumed", "phantom_organ", 32, **knobs)
    stop.times = 99
    second = prepare("phantoms", tmp_path / "resumed", "phantom_organ", 32, **knobs)
    assert stop.calls == 3 + 2 and _bytes(first) == _bytes(second)


def test_phantoms_of_other_parameters_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(phantoms, "phantom_image", Stop(phantoms.phantom_image, 2))
    with pytest.raises(KeyboardInterrupt):
        phantoms.write_radimagenet_tree(tmp_path / "tree", 3, 16, seed=1)
    monkeypatch.undo()
    written = [phantoms.write_radimagenet_tree(tmp_path / name, 3, 16) for name in ("tree", "new")]
    assert _bytes(written[0]) == _bytes(written[1]) and len(_bytes(written[0])) == 3


def test_ct_phantoms_are_the_same_in_every_process():
    code = (
        "import numpy as np; from diffboost.data.scanners import ct\n"
        "layers = [(t, np.ones((1, 32, 32))) for t in ('liver', 'vessel', 'kidney', 'spleen')]\n"
        "for seed in range(6):\n"
        "    print(ct(np.random.default_rng(seed), layers, (40, 400)).mean())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": number},
            capture_output=True,
            check=True,
        ).stdout
        for number in ("1", "2")
    ]
    assert printed[0] == printed[1] and printed[0].count(b"\n") == 6


def test_prepare_is_killed_and_goes_on(root, whole, monkeypatch):
    detector = load_edge_detector("gradient")
    calls = []

    def kill_in_third(images):
        calls.append(images)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return detector(images)

    kill_in_third.weights_sha256 = ""
    monkeypatch.setattr(prepare_module, "load_edge_detector", lambda *_: kill_in_third)
    process = multiprocessing.get_context("fork").Process(target=_prepare, args=(root, "killed"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.undo()
    assert len(list(raw_data.store_of(root, "killed.partial").glob("done/*.json"))) == 2
    assert _bytes(_prepare(root, "killed")) == whole


# a disk that is full or gone


def test_a_full_disk_is_named_and_loses_nothing(root, whole, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # names no file, as Pillow's
    monkeypatch.setattr(store_writer, "write_edge", Stop(store_writer.write_edge, 7, full))
    with pytest.raises(OSError, match="No space left on device: .*scans_full.partial"):
        _prepare(root, "full")
    assert "full.partial keeps what is done; the same command goes on" in caplog.text
    monkeypatch.undo()
    assert _bytes(_prepare(root, "full")) == whole


def test_source_files_that_are_gone_are_no_bad_cases(tmp_path, monkeypatch):
    root = raw_data.write_decathlon(tmp_path / "scans")
    detector = load_edge_detector("gradient")

    def lose_the_disk(images):
        root.rename(tmp_path / "lost")
        return detector(images)

    lose_the_disk.weights_sha256 = ""
    monkeypatch.setattr(prepare_module, "load_edge_detector", lambda *_: lose_the_disk)
    with pytest.raises(OSError, match="case_001.nii.gz was there when the work began and cannot"):
        _prepare(root, "store", max_rejected_fraction=0.9)
    monkeypatch.setattr(prepare_module, "load_edge_detector", lambda *_: detector)
    (tmp_path / "lost").rename(root)
    assert _bytes(_prepare(root, "store")) == _bytes(_prepare(root, "anew"))


# the latent cache


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return small_backbone.write_backbone(tmp_path_factory.mktemp("backbone") / "small")


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Three slices of 32 px."""
    folder = tmp_path_factory.mktemp("slices")
    items = []
    for number in range(3):
        paths = {key: str(folder / f"{key}{number}.png") for key in ("image", "edge")}
        for path in paths.values():
            pixels = np.random.RandomState(number).randint(0, 255, (32, 32)).astype("uint8")
            Image.fromarray(pixels).save(path)
        items.append(paths | {"prompt": "CT, abdomen, normal"})
    return items


CACHE = {"image_size": 32, "jitter": Jitterd(20, (0.75, 1.05)), "num_copies": 3, "batch_size": 2}


def test_a_cache_goes_on_at_the_batches_that_it_lacks(backbone, slices, tmp_path, monkeypatch):
    whole = _bytes(build_cache(slices, backbone, str(tmp_path / "a"), **CACHE).folder)
    monkeypatch.setattr(cache, "FLUSHED_BATCHES", 2)
    write = cache._Pictures.write
    monkeypatch.setattr(cache._Pictures, "write", Stop(write, 3))
    with pytest.raises(KeyboardInterrupt):
        build_cache(slices, backbone, str(tmp_path / "b"), **CACHE)
    again = Stop(write, 99)
    monkeypatch.setattr(cache._Pictures, "write", again)
    folder = build_cache(slices, backbone, str(tmp_path / "b"), **CACHE).folder
    assert _bytes(folder) == whole and again.calls == 5 - 2  # the third was not flushed yet
    (folder / "done_batches_of_2").write_bytes(b"\1" * 5)  # killed right after the renaming
    assert _bytes(build_cache(slices, backbone, str(tmp_path / "b"), **CACHE).folder) == whole


def test_a_cache_of_other_batches_is_begun_anew(backbone, slices, tmp_path, monkeypatch):
    write = cache._Pictures.write
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(
        cache.os if hasattr(cache, "os") else os, "pwrite", Stop(os.pwrite, 5, full)
    )
    with pytest.raises(OSError, match="No space left on device: .*partial"):
        build_cache(slices, backbone, str(tmp_path), **CACHE)
    monkeypatch.undo()
    again = Stop(write, 99)
    monkeypatch.setattr(cache._Pictures, "write", again)
    build_cache(slices, backbone, str(tmp_path), **CACHE | {"batch_size": 3})
    assert again.calls == 3


# evaluation


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A store of five volumes and the weights of a network that was drawn."""
    folder = tmp_path_factory.mktemp("segmenter")
    small_store.write_store(folder / "store", 5)
    settings = {"num_classes": 3, "channels": [4, 8, 8]}
    for seed in (0, 1):
        torch.manual_seed(seed)
        parser = ConfigParser(ConfigParser.load_config_file(CONFIGS[0]) | settings)
        network = parser.get_parsed_content("network_def")
        torch.save(network.state_dict(), folder / f"model{seed}.pt")
    return folder


def _evaluate(folder: Path, name: str, model: int = 0, **knobs) -> dict[str, bytes]:
    knobs = {"image_size": 32, "num_classes": 3, "channels": [4, 8, 8], "part": "all"} | knobs
    knobs |= {"model_path": str(folder / f"model{model}.pt"), "output_dir": str(folder / name)}
    knobs |= {"store_dir": str(folder / "store"), "device": "cpu"}
    monai.bundle.run(config_file=CONFIGS, bundle_root=str(BUNDLE), **knobs)
    return _bytes(folder / name)


def test_evaluation_goes_on_at_the_cases_that_it_lacks(segmenter, monkeypatch):
    whole = _evaluate(segmenter, "whole")
    assert len(whole) == 6 and whole["metrics.csv"].count(b"case_4") == 14
    measure = CaseWriter._measure
    monkeypatch.setattr(CaseWriter, "_measure", Stop(measure, 2))
    with pytest.raises(KeyboardInterrupt):
        _evaluate(segmenter, "resumed")
    again = Stop(measure, 2)
    monkeypatch.setattr(CaseWriter, "_measure", again)
    put = case_results._put_in_place
    monkeypatch.setattr(case_results, "_put_in_place", Stop(put, 0))
    with pytest.raises(KeyboardInterrupt):  # two cases more, then again
        _evaluate(segmenter, "resumed")
    again.times = 99
    with pytest.raises(KeyboardInterrupt):  # all cases, not in place
        _evaluate(segmenter, "resumed")
    assert again.calls == 3 + 1
    monkeypatch.setattr(case_results, "_put_in_place", put)
    monkeypatch.setattr(CaseWriter, "_measure", Stop(measure, 0))
    replace = os.replace
    moved = Stop(replace, 1)  # the table is written; the predictions are moved, it is not
    monkeypatch.setattr(os, "replace", moved)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(segmenter, "resumed")
    assert (segmenter / "resumed" / "predictions").is_dir()
    monkeypatch.setattr(os, "replace", replace)
    assert _evaluate(segmenter, "resumed") == whole


@pytest.mark.parametrize("change", [{"model": 1}, {"volumes": "foreground"}])
def test_results_of_another_evaluation_are_not_mixed_in(segmenter, monkeypatch, change):
    name = f"other_{next(iter(change))}"
    monkeypatch.setattr(CaseWriter, "_measure", Stop(CaseWriter._measure, 2))
    with pytest.raises(KeyboardInterrupt):
        _evaluate(segmenter, name)
    monkeypatch.undo()
    mixed = _evaluate(segmenter, name, **change)
    assert mixed == _evaluate(segmenter, f"{name}_anew", **change)


def test_processes_share_the_cases_that_are_missing(segmenter, monkeypatch):
    data = [{"case": str(n), "image": str(segmenter / "model0.pt"), "label": []} for n in range(3)]
    writers = []
    for rank in (0, 1):
        monkeypatch.setattr(
            "diffboost.segmentation.evaluation.process_rank_and_count", lambda rank=rank: (rank, 2)
        )
        writers.append(CaseWriter(str(segmenter / "store"), str(segmenter / "x"), data))
    assert [list(writer.origins) for writer in writers] == [["0", "2"], ["1"]]


# Table 1 and a new backbone


def test_table1_makes_the_batches_that_it_lacks(tmp_path):
    data = [{}] * 5
    for path in image_paths(str(tmp_path), "Ours", 5)[:3]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert list(MethodBatches(data, 2, str(tmp_path), "Ours")) == [[2, 3], [4, 4]]
    assert len(MethodBatches(data, 2, str(tmp_path), "Pix2Pix")) == 3


def test_a_tokenizer_numbers_last_letters_by_alphabet(tmp_path):
    tokenizers = [train_tokenizer(["MR, organ, normal", "US, breast"], 400, 12) for _ in range(2)]
    for number, tokenizer in enumerate(tokenizers):
        tokenizer.save_pretrained(tmp_path / str(number))
    first, second = (tmp_path / name / "tokenizer.json" for name in ("0", "1"))
    assert sha256_of_files([first]) == sha256_of_files([second])
    vocabulary = json.loads(first.read_text())["model"]["vocab"]
    assert [vocabulary[f"{letter}</w>"] for letter in "abz0"] == [2, 3, 27, 28]
    tokens = tokenizers[0].convert_ids_to_tokens(tokenizers[0]("US, breast q")["input_ids"])
    assert tokens[1:-1] == ["us</w>", ",</w>", "breast</w>", "q</w>"]

"""The segmentation bundle as MONAI Label uses it: its calls, made with MONAI alone."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.transforms import LoadImaged, SaveImaged
from PIL import Image
from small_store import AFFINE, draw_ball

from diffboost.client_volumes import ClientVolumes, list_cases
from diffboost.data.slices import read_store, write_image
from diffboost.files import sha256_of_files

BUNDLE = Path(__file__).parents[1] / "bundles" / "diffboost_segmentation"
SMALL = {"image_size": 32, "num_classes": 3, "channels": [4, 8, 8]}
# What 3D Slicer posts: all options of /info/.
BODY = {
    "model": "diffboost_segmentation", "device": "cpu", "pretrained": True, "max_epochs": 1,
    "val_split": 0.25, "multi_gpu": True, "gpus": "all", "tracking": "None", "tracking_uri": "",
    "tracking_experiment_name": "", "run_id": "", "model_filename": "model.pt",
    "train_batch_size": 1, "val_batch_size": 1,
}  # fmt: skip


def write_volume(folder: Path, name: str, seed: int) -> dict[str, str]:
    """A NIfTI volume and its label (0, 1, 2) as MONAI Label's datastore has them."""
    image, label = draw_ball((5, 40, 36), seed)
    paths = {"image": folder / f"{name}.nii.gz", "label": folder / "final" / f"{name}.nii.gz"}
    paths["label"].parent.mkdir(parents=True, exist_ok=True)
    for key, array in (("image", image), ("label", label // 100)):
        nib.save(nib.Nifti1Image(array, AFFINE), paths[key])
    return {key: str(path) for key, path in paths.items()}


def write_picture(folder: Path, name: str, seed: int) -> dict[str, str]:
    """A PNG and its label (0, 1, 2)."""
    image, label = draw_ball((40, 52), seed)
    paths = {"image": folder / f"{name}.png", "label": folder / "final" / f"{name}.png"}
    paths["label"].parent.mkdir(parents=True, exist_ok=True)
    for key, array in (("image", image), ("label", label // 100)):
        Image.fromarray(array).save(paths[key])
    return {key: str(path) for key, path in paths.items()}


def write_release(folder: Path, **knobs) -> Path:
    """The bundle as a release has it: JSON beside the YAML, which clients take first."""
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("models", "eval"))
    for name in ("train", "inference"):
        config = yaml.safe_load((folder / "configs" / f"{name}.yaml").read_text())
        config |= {key: value for key, value in (SMALL | knobs).items() if key in config}
        (folder / "configs" / f"{name}.json").write_text(json.dumps(config, indent=4))
    return folder


def train(release: Path, data: list[dict], **body) -> dict:
    """monailabel.tasks.train.bundle: what it overrides, with Slicer's body; the run's record."""
    body = BODY | body
    path = release / "configs" / "train.json"
    handlers = ConfigParser.load_config_file(path)["train"]["handlers"]
    model = release / "models" / body["model_filename"]
    if model.exists() and not [each for each in handlers if each["_target_"] == "CheckpointLoader"]:
        loader = {"_target_": "CheckpointLoader", "load_path": str(model), "strict": False}
        handlers.insert(0, loader | {"load_dict": {"model": "$@network"}})
    split = round(len(data) * (1 - max(body["val_split"], 0)))
    overrides = {
        "bundle_root": str(release),
        "train#trainer#max_epochs": body["max_epochs"],
        "train#dataset#data": data[:split],
        "device": body["device"],
        "train#handlers": handlers,
    }
    if body["val_split"] >= 0:
        overrides["validate#dataset#data"] = data[split:]
    meta = str(release / "configs" / "metadata.json")
    files = {"meta_file": meta, "config_file": str(path)}
    settings = {"init_id": None, "final_id": None, "logging_file": False}
    monai.bundle.run(run_id=body["run_id"], **settings, **files, **overrides)
    return json.loads((release / "models" / "run.json").read_text())


def infer(release: Path, path: str | Path) -> np.ndarray:
    """monailabel.tasks.infer: the array that it writes, in the order of the file's axes."""
    parser = ConfigParser()
    parser.read_config(str(release / "configs" / "inference.json"))
    parser.config.update({"bundle_root": str(release)})
    network = parser.get_parsed_content("network_def")
    state = torch.load(release / "models" / "model.pt", weights_only=True)
    network.load_state_dict(state, strict=True)
    network.eval()
    data = {"image": str(path), "model": "diffboost_segmentation", "device": "cpu"}
    for transform in parser.get_parsed_content("preprocessing").transforms:
        if isinstance(transform, LoadImaged):
            transform._loader.image_only = False
        data = transform(data)
    with torch.no_grad():
        inferer = parser.get_parsed_content("inferer")
        data["pred"] = inferer(data["image"][None], network)[0]
    for transform in parser.get_parsed_content("postprocessing").transforms:
        if not isinstance(transform, SaveImaged):
            data = transform(data)
    pred = data["pred"]
    size = tuple(int(side) for side in data["image"].meta["spatial_shape"])
    assert pred.dtype == torch.uint8 and tuple(pred.shape[-len(size) :]) == size
    pred = pred.numpy() if pred.ndim < 4 else pred[0].numpy()
    return pred.T if pred.ndim == 2 else pred  # a picture's file has rows first


def run_inference(release: Path, folder: Path, output_dir: Path) -> None:
    config = str(release / "configs" / "inference.json")
    roots = {"bundle_root": str(release), "dataset_dir": str(folder)}
    monai.bundle.run(config_file=config, output_dir=str(output_dir), **roots)


def message_of(error: pytest.ExceptionInfo) -> str:
    """The words of an error and of its causes."""
    words, cause = "", error.value
    while cause is not None:
        words, cause = f"{words}\n{cause}", cause.__cause__
    return words


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("studies")
    return [write_volume(folder, f"case {number}", number) for number in range(4)]


@pytest.fixture(scope="module")
def release(tmp_path_factory, volumes) -> Path:
    """A release whose path has a blank, trained on volumes from MONAI Label."""
    release = write_release(tmp_path_factory.mktemp("app") / "a model", learning_rate=0.02)
    train(release, volumes, max_epochs=8)
    return release


def test_training_from_volumes_lands_in_models(release, volumes):
    record = json.loads((release / "models" / "run.json").read_text())
    assert (record["epochs"], record["arm"], record["weights"]) == (8, "baseline", None)
    log = pd.read_csv(release / "models" / "training_log.csv")
    assert len(log) == 8 and log.val_dice.max() > 0.3
    lineage = json.loads((release / "models" / "lineage.json").read_text())
    assert (sorted(lineage["cases"]), list(lineage["selection"])) == (
        ["case_0", "case_1", "case_2"],
        ["case_3"],
    )
    store = read_store(record["store_dir"])
    label = np.asarray(Image.open(store.path(store.index.label[2])))
    assert set(np.unique(label)) <= {0, 1, 2} and store.index.foreground_px.sum() > 0
    assert sorted(path.name for path in (release / "models").glob("*.pt")) == ["model.pt"]


def test_a_second_training_begins_with_the_last_weights(release, volumes, tmp_path):
    again = shutil.copytree(release, tmp_path / "release")
    model = again / "models" / "model.pt"
    before = sha256_of_files([model])
    first = train(again, volumes, run_id="run")
    assert first["inputs_sha256"]["before"] == before != sha256_of_files([model])
    lineage = json.loads((again / "models" / "lineage.json").read_text())
    assert sorted(lineage["ancestors"][0]["cases"]) == ["case_0", "case_1", "case_2"]
    log = pd.read_csv(again / "models" / "training_log.csv")
    assert log.val_dice[0] > 0.3  # it did not begin anew
    between = model.stat().st_mtime_ns
    train(again, volumes)
    assert model.stat().st_mtime_ns > between
    assert len(list((again / "models" / "clients").glob("run_*"))) == 3


def test_a_volume_comes_back_as_monai_bundle_writes_it(release, volumes, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(volumes[0]["image"], folder / "case.nii.gz")
    run_inference(release, folder, tmp_path / "seg")
    written = nib.load(tmp_path / "seg" / "case_seg.nii.gz")
    source = nib.load(folder / "case.nii.gz")
    served = infer(release, folder / "case.nii.gz")
    assert np.array_equal(served, np.asarray(written.dataobj)) and served.shape == source.shape
    assert np.allclose(written.affine, source.affine) and len(np.unique(served)) >= 2


def test_pictures_train_and_come_back(tmp_path):
    release = write_release(tmp_path / "release", learning_rate=0.02)
    data = [write_picture(tmp_path / "studies", f"us_{number}", number) for number in range(6)]
    train(release, data, max_epochs=12)
    folder = tmp_path / "images"
    folder.mkdir()
    gray = Image.open(data[0]["image"])
    gray.save(folder / "gray.png")
    Image.merge("RGB", [gray] * 3).save(folder / "photo.png")
    run_inference(release, folder, tmp_path / "seg")
    served = infer(release, folder / "gray.png")
    written = np.asarray(Image.open(tmp_path / "seg" / "gray_seg.png"))
    assert np.array_equal(served, written) and served.shape == (40, 52)
    assert np.array_equal(infer(release, folder / "photo.png"), served)  # by luminance
    truth = np.asarray(Image.open(data[0]["label"]))
    both = ((served > 0) & (truth > 0)).sum()
    assert 2 * both / ((served > 0).sum() + (truth > 0).sum()) > 0.5  # rows are rows


def test_both_kinds_are_served_whatever_lies_in_the_data_folder(release, volumes, tmp_path):
    picture = write_picture(release / "data", "lies_there", 1)  # the folder that `run` reads
    try:
        wanted = infer(release, volumes[0]["image"])
        assert infer(release, picture["image"]).shape == (40, 52)
    finally:
        shutil.rmtree(release / "data")
    assert np.array_equal(infer(release, volumes[0]["image"]), wanted)


COLORS = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
ODD = {
    "flat": (np.ones((8, 9)), np.eye(4), "image: a NIfTI file needs three axes, or four"),
    "five": (np.ones((8, 9, 2, 2, 2)), np.eye(4), "image: a NIfTI file needs three axes, or four"),
    "plane": (np.ones((8, 9, 3)), np.diag([1.0, 1, 0, 1]), "image: the directions of its affine"),
    "rgb": (np.zeros((8, 9, 3), COLORS), np.eye(4), "('R', 'u1'), ('G', 'u1'), ('B', 'u1')"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_volumes_are_refused_in_words(release, tmp_path, kind):
    array, affine, words = ODD[kind]
    volume = nib.Nifti1Image(array, None)
    volume.header.set_sform(affine, code=1)
    nib.save(volume, tmp_path / "odd.nii.gz")
    with pytest.raises((RuntimeError, AssertionError, TypeError, ValueError)) as error:
        infer(release, tmp_path / "odd.nii.gz")
    assert words in message_of(error)


def test_a_channel_that_is_not_there_is_refused(tmp_path, release, volumes):
    other = shutil.copytree(release, tmp_path / "release")
    config = json.loads((other / "configs" / "inference.json").read_text())
    (other / "configs" / "inference.json").write_text(json.dumps(config | {"channel": 2}))
    with pytest.raises(RuntimeError) as error:
        infer(other, volumes[0]["image"])
    assert "image: it has no channel 2" in message_of(error)
    volume = np.random.default_rng(0).uniform(0, 1, (12, 16, 3, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, AFFINE), tmp_path / "four.nii.gz")
    nib.save(nib.Nifti1Image(volume[..., 2], AFFINE), tmp_path / "one.nii.gz")
    assert np.array_equal(
        infer(other, tmp_path / "four.nii.gz"), infer(release, tmp_path / "one.nii.gz")
    )


def write_variants(store_dir: Path, folder: Path, case: str) -> Path:
    """A synthetic store with two variants of each slice of one case."""
    store = read_store(store_dir)
    (folder / "images").mkdir(parents=True)
    (folder / "lineage.json").write_text(json.dumps({"cases": {}, "ancestors": []}))
    lineage = sha256_of_files([folder / "lineage.json"])
    rows = []
    for row in store.index[store.index.case == case].to_dict("records"):
        for variant in range(2):
            name = f"images/{case}_{row['slice']:04d}_{variant:03d}.png"
            write_image(folder / name, np.full((32, 32), -variant / 10))
            place = {"image": name, "case": "of another name", "slice": row["slice"]}
            place |= {"source_image": row["image"], "lineage_sha256": lineage, "image_size": 32}
            place |= {"source_sha256": row["source_sha256"], "variant": variant, "kept": True}
            rows.append(place)
    pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
    return folder


def test_variants_are_used_where_there_are_any_and_the_log_says_so(
    release, volumes, tmp_path, caplog
):
    caplog.set_level(logging.INFO, logger="diffboost")
    other = shutil.copytree(release, tmp_path / "release")
    assert train(other, volumes)["arm"] == "baseline"
    assert "arm baseline: there are no variants of these 15 slices" in caplog.text
    (index,) = (other / "models" / "clients").glob("store_*/index.parquet")
    store_dir = index.parent
    write_variants(store_dir, other / "synthetic", "case_1")
    record = train(other, volumes)
    assert (record["arm"], record["synthetic_dir"]) == ("diffboost", str(other / "synthetic"))
    assert "arm diffboost: 5 of 15 slices have variants" in caplog.text
    lineage = json.loads((other / "models" / "lineage.json").read_text())
    assert len(lineage["ancestors"]) == 2  # the variants' generator, and the weights before


@pytest.mark.parametrize("val_split", [0.0, -1])
def test_without_volumes_for_validation_some_are_kept(release, volumes, tmp_path, val_split):
    other = shutil.copytree(release, tmp_path / "release")
    train(other, volumes, val_split=val_split)
    lineage = json.loads((other / "models" / "lineage.json").read_text())
    assert (len(lineage["cases"]), len(lineage["selection"])) == (3, 1)


def test_bad_volumes_are_named(release, volumes, tmp_path):
    other = shutil.copytree(release, tmp_path / "release")
    picture = write_picture(tmp_path, "us", 0)
    with pytest.raises(RuntimeError) as error:
        train(other, [*volumes, picture])
    assert "are a volume and a picture; a training takes one kind" in message_of(error)
    bad = write_volume(tmp_path, "bad", 5)
    nib.save(nib.Nifti1Image(np.full((5, 40, 36), 7, np.uint8), AFFINE), bad["label"])
    with pytest.raises(RuntimeError) as error:
        train(other, [*volumes[:2], bad])
    assert "bad.nii.gz: label values 7 are not in the map: 0, 1, 2" in message_of(error)
    with pytest.raises(RuntimeError) as error:
        train(other, [*volumes[:3], volumes[0]])
    assert "is in train::dataset::data and validate::dataset::data" in message_of(error)
    before = json.loads((release / "models" / "run.json").read_text())
    assert json.loads((other / "models" / "run.json").read_text()) == before


HOLDER = """
import sys
from pathlib import Path
from diffboost.client_volumes import ClientVolumes, list_cases
from diffboost.locks import hold_folder

folder, images = Path(sys.argv[1]), sys.argv[2:]
client = ClientVolumes(str(folder), None, "", 32, 3, 0, "RAS", "percentile", 0.5, 99.5)
items = [{"image": name, "label": name.replace("us_", "final/us_")} for name in images]
cases, layout = list_cases(items)
print(client.prepare(list(cases.values()), layout))
hold_folder(folder / "store_abc.partial")  # as if it were preparing another one
print("held", flush=True)
sys.stdin.read()
"""


def test_stores_that_another_process_holds_are_not_removed(tmp_path):
    """One that it trains on and one that it is preparing; without it both go."""
    data = [write_picture(tmp_path, f"us_{number}", number) for number in range(6)]
    cases, layout = list_cases(data)
    cases = list(cases.values())
    folder = tmp_path / "clients"
    client = ClientVolumes(str(folder), None, "", 32, 3, 0, "RAS", "percentile", 0.5, 99.5)
    command = [sys.executable, "-c", HOLDER, str(folder), *(item["image"] for item in data[:2])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, text=True) as holder:
        held = Path(holder.stdout.readline().strip())
        assert held.is_dir() and holder.stdout.readline() == "held\n"
        (folder / "store_abc.partial" / "done").mkdir()
        (folder / "store_stopped.partial").mkdir()
        second = client.prepare(cases[2:4], layout)
        assert (held / "index.parquet").is_file()
        assert (folder / "store_abc.partial" / "done").is_dir()
        assert not (folder / "store_stopped.partial").exists()
        holder.communicate()  # its input ends, and so does it
    third = client.prepare(cases[4:], layout)
    assert [path for path in folder.iterdir() if path.is_dir()] == [third] != [second]


def test_training_and_inference_agree_on_a_clients_volumes():
    train_config, inference = (
        yaml.safe_load((BUNDLE / "configs" / f"{name}.yaml").read_text())
        for name in ("train", "inference")
    )
    for key in ("channel", "slice_axcodes", "intensity", "intensity_low", "intensity_high"):
        assert train_config[key] == inference[key]


def test_labels_are_those_of_the_final_integers():
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    formats = metadata["network_data_format"]
    assert next(iter(formats["inputs"])) == "image"
    channels = formats["outputs"]["pred"]["channel_def"]
    assert list(channels) == [str(number) for number in range(len(channels))]
    assert channels["0"] == "background" and all(isinstance(v, str) for v in channels.values())
    assert len(formats["inputs"]["image"]["spatial_shape"]) == 2  # dimension 2 in /info/

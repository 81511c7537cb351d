"""No output holds what headers and text chunks of sources say of a patient; names can be hidden."""

import gzip
import json
import stat
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import raw_data
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from PIL import Image, PngImagePlugin

from diffboost.data.pseudonyms import home_of
from diffboost.data.slices import case_items, read_store
from diffboost.prepare import prepare
from diffboost.segmentation.evaluation import CaseWriter
from diffboost.segmentation.source_geometry import source_preprocessing

SECRET = "DOE^JOHN"
CONFIGS = Path(__file__).parents[1] / "bundles" / "diffboost_segmentation" / "configs"
FIELDS = ("descrip", "aux_file", "db_name", "intent_name")


def plant(root: Path) -> Path:
    """Writes a patient's name into every header and text of the sources."""
    for path in sorted(root.rglob("*.nii.gz")):
        image = nib.load(path)
        image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
        for name in FIELDS:
            image.header[name] = SECRET.encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET.encode()))
        nib.save(image, path)
    for path in sorted(root.rglob("*.png")):
        text, exif = PngImagePlugin.PngInfo(), Image.Exif()
        text.add_text("PatientName", SECRET)
        text.add_itxt("Comment", SECRET)
        exif[0x010E] = SECRET
        with Image.open(path) as image:
            image.load()
        image.save(path, pnginfo=text, exif=exif)
    return root


def written(folder: Path) -> bytes:
    """All that the files of a folder hold and are called, unpacked."""
    parts = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".parquet":
            data = pd.read_parquet(path).to_csv().encode()
        parts += [str(path.relative_to(folder)).encode(), data]
    return b"\n".join(parts)


SOURCES = {
    "volumes": (raw_data.write_decathlon, raw_data.TASK_3D, 3),
    "images": (raw_data.write_busi, raw_data.TASK_2D, 2),
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    """A planted data folder, its task and its number of classes."""
    write, task, num_classes = SOURCES[request.param]
    root = plant(write(tmp_path / "raw", 3))
    assert SECRET.encode() in written(root)
    return root, task, num_classes


def prepared(root: Path, task: dict, **knobs) -> Path:
    return prepare(
        root, root.with_name("store"), task, 32, "gradient", num_folds=2, group_duplicates=False,
        **knobs,
    )  # fmt: skip


def test_a_store_holds_no_header_and_no_text(source):
    store_dir = prepared(*source[:2])
    assert SECRET.encode() not in written(store_dir)
    for path in store_dir.glob("*s/*.png"):
        with Image.open(path) as image:
            image.load()
            assert not image.info and not image.getexif(), path


def check_predictions(folder: Path, number: int) -> None:
    """There are so many, without the planted name in a header, an extension or a text."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    assert len(files) == number and SECRET.encode() not in written(folder)
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert not image.info and not image.getexif()
        else:
            header = nib.load(path).header
            assert not header.extensions and not any(header[name].item() for name in FIELDS)


def test_predictions_of_evaluation_hold_no_header(source, tmp_path):
    store_dir = prepared(*source[:2])
    cases = case_items(store_dir, 0, "all")
    writer = CaseWriter(str(store_dir), str(tmp_path), cases)
    load = source_preprocessing(str(store_dir))
    (tmp_path / "predictions").mkdir()
    for item in cases:
        loaded = load(item)
        pred = loaded["label"] if "label" in loaded else loaded["image"]
        pred = pred if pred.shape[-1] > 1 else pred[..., 0]
        writer._write_prediction(item["case"], pred)
    check_predictions(tmp_path / "predictions", 3)


def test_a_prediction_of_one_slice_keeps_its_axes(source, tmp_path):
    """The last axis was left out where it had one slice."""
    store_dir = prepared(*source[:2])
    writer = CaseWriter(str(store_dir), str(tmp_path), case_items(store_dir, 0, "all"))
    affine = torch.tensor([[0, 2.0, 0, 1], [3, 0, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1]]).double()
    for shape in ((40, 32, 1), (1, 40, 32), (40, 32, 5)):
        pred = torch.arange(np.prod(shape)).reshape(1, *shape) % 3
        path = writer._write_prediction("case", MetaTensor(pred, affine=affine))
        found = nib.load(tmp_path / path)
        assert found.shape == shape and np.allclose(found.affine, affine)
        assert np.array_equal(np.asarray(found.dataobj), pred[0])


def test_predictions_of_inference_hold_no_header(source, tmp_path):
    root, _, num_classes = source
    config = str(CONFIGS / "inference.yaml")
    small = {"image_size": 32, "num_classes": num_classes, "channels": [4, 8, 8]}
    parser = ConfigParser(ConfigParser.load_config_file(config))
    parser.update(small)
    network = parser.get_parsed_content("network_def")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    folder = root / ("imagesTr" if (root / "imagesTr").is_dir() else "benign")
    for mask in folder.glob("*_mask.png"):
        mask.unlink()
    monai.bundle.run(
        config_file=config, dataset_dir=str(folder), output_dir=str(tmp_path / "eval"),
        model_path=str(tmp_path / "model.pt"), device="cpu", **small,
    )  # fmt: skip
    check_predictions(tmp_path / "eval", len(list(folder.iterdir())))


def test_pseudonyms_hide_every_name_and_evaluation_finds_the_way_back(source):
    root, task, _ = source
    plain = prepared(root, task)
    names = set(read_store(plain).index.case)
    key = root.with_name("secret")
    store_dir = prepare(
        root, root.with_name("hidden"), task, 32, "gradient", num_folds=2, group_duplicates=False,
        pseudonym_key=key,
    )  # fmt: skip
    store, told = read_store(store_dir), written(store_dir)
    stems = [path.name.split(".")[0] for path in root.rglob("*.*") if path.name != "dataset.json"]
    assert not [name for name in (*names, *stems, str(root)) if name.encode() in told]
    assert store.index.case.str.fullmatch("case_[0-9a-f]{16}").all()
    assert set(store.index.source_sha256) == set(read_store(plain).index.source_sha256)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and key.read_bytes().strip() not in told
    items = {item["case"]: item for item in case_items(store_dir, 0, "all")}
    kept = json.loads((home_of(store_dir) / "sources.json").read_text())["cases"]
    assert {name: item["image"] for name, item in items.items()} == {
        name: str(root / image) for name, (image, _) in kept.items()
    }
    assert (home_of(store_dir) / "rejected.csv").is_file()
    again = {"task": task, "image_size": 32, "edges": "gradient", "num_folds": 2}
    again |= {"group_duplicates": False, "pseudonym_key": key}
    assert prepare(root, store_dir, **again) == store_dir  # in place already
    other = read_store(prepare(root, root.with_name("other"), **again))
    assert list(other.index.case) == list(store.index.case)  # one secret, one pseudonym
    with pytest.raises(FileExistsError, match="pseudonyms"):
        prepare(root, store_dir, **again | {"pseudonym_key": root.with_name("another")})
    (home_of(store_dir) / "sources.json").unlink()
    with pytest.raises(FileNotFoundError, match="have pseudonyms; .* is not here"):
        case_items(store_dir, 0, "all")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"pseudonym_key": "store/secret"}, "lies in the store"),
        ({"pseudonym_key": "short"}, "fewer than 32"),
        ({"pseudonym_key": "secret", "fold_order": "listed"}, "fold_order listed"),
    ],
)
def test_useless_secrets_are_refused(tmp_path, knobs, message):
    root = raw_data.write_busi(tmp_path / "raw", 3)
    (tmp_path / "short").write_text("1234")
    knobs = knobs | {"pseudonym_key": tmp_path / knobs["pseudonym_key"]}
    with pytest.raises(ValueError, match=message):
        prepared(root, raw_data.TASK_2D, **knobs)
    assert not (tmp_path / "store").exists()

"""DICOM in (series, SEG labels, bad headers) and out (SEG of predictions, synthetic images)."""

import io
import json
import logging
import os
import tracemalloc
from pathlib import Path

import highdicom
import monai
import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import raw_data
import raw_dicom
import torch
from monai.bundle import ConfigParser
from PIL import Image
from pydicom.encaps import encapsulate
from test_patient_data import written

from diffboost import __version__
from diffboost.data import dicom_labels, dicom_series
from diffboost.data.dicom_labels import read_segments
from diffboost.data.dicom_pixels import LOSSLESS
from diffboost.data.dicom_series import read_headers
from diffboost.data.loading import CaseDataset, LoadedCase
from diffboost.data.slices import case_items, read_store
from diffboost.data.sources import read_source
from diffboost.data.tasks import read_task
from diffboost.data.transforms import LoadSliced
from diffboost.data.volume_reader import load_volume
from diffboost.dicom import commands
from diffboost.dicom.segmentations import read_labels, write_segmentations
from diffboost.dicom.series_check import check_folders
from diffboost.dicom.synthetic_images import write_synthetic
from diffboost.files import sha256_of_files
from diffboost.generation.provenance import FACTS, machine_facts, read_facts, variant_png
from diffboost.prepare import prepare
from diffboost.segmentation.source_geometry import source_preprocessing

CONFIG = str(
    Path(__file__).parents[1] / "bundles" / "diffboost_segmentation" / "configs" / "inference.yaml"
)
JPEG = "1.2.840.10008.1.2.4.50"
SMALL = {"image_size": 32, "num_classes": 3, "channels": [4, 8, 8], "device": "cpu"}
FLIP = (slice(None, None, -1), slice(None, None, -1))  # the series grows left and back, not (R, A)


def prepared(root: Path, name: str, task: dict) -> Path:
    return prepare(
        root, root.with_name(name), task, 32, "gradient", num_folds=3, group_duplicates=False
    )


def first_file(folder: Path) -> Path:
    return sorted(folder.iterdir())[0]


def changed(path: Path, **tags) -> None:
    """Writes a file again with other tags; None takes one out."""
    ds = pydicom.dcmread(path)
    for keyword, value in tags.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    raw_dicom.save(ds, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three cases as series with NIfTI labels, the same as NIfTI, predictions, and a store."""
    folder = tmp_path_factory.mktemp("dicom")
    raw_dicom.write_cases(folder / "raw")
    names = [f"case_{number:03d}.nii.gz" for number in range(3)]
    for number, name in enumerate(names):
        image, label = raw_data.volume(number)
        raw_data.write_nifti(folder / "nifti/imagesTr" / name, image.round(), "LPS")
        raw_data.write_nifti(folder / "nifti/labelsTr" / name, label, "LPS")
        turned = folder / "predictions" / name.replace(".nii", "_seg.nii")
        raw_data.write_nifti(turned, label * (number > 0), ("RAS", "SPL", "LPS")[number])
    entries = [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in names]
    raw_data.write_json(folder / "nifti", {"training": entries})
    prepared(folder / "raw", "store", raw_dicom.TASK)
    (folder / "model.pt").write_bytes(b"weights")
    names = {"0": "background", "1": "left part", "2": "right part"}
    channels = {"network_data_format": {"outputs": {"pred": {"channel_def": names}}}}
    (folder / "metadata.json").write_text(json.dumps(channels))
    write_segmentations(
        str(folder / "predictions"), str(folder / "raw/images"), str(folder / "seg"),
        str(folder / "metadata.json"), str(folder / "model.pt"),
    )  # fmt: skip
    return folder


# In: series and labels


def test_a_series_is_the_volume_that_its_nifti_holds(folder):
    series = load_volume(str(folder / "raw/images/case_001"), "image")
    nifti = load_volume(str(folder / "nifti/imagesTr/case_001.nii.gz"), "image")
    assert torch.equal(series.as_tensor(), nifti.as_tensor())  # rescaled: 0.5 x - 50
    assert torch.allclose(series.affine, nifti.affine, atol=1e-6)
    assert sorted(set(map(str, series.meta)) & {"00100010", "00100020", "00081030"}) == []
    store = read_store(folder / "store")
    volumes = read_source(folder / "nifti", raw_data.TASK_3D).cases
    wanted = CaseDataset(volumes, read_task(raw_data.TASK_3D), 32)
    load = LoadSliced(["image", "label"])
    for number, row in enumerate(store.index.to_dict("records")):
        case = wanted[number // 5]
        found = load({key: str(store.path(row[key])) for key in ("image", "label")})
        assert torch.equal(found["label"], case.labels[number % 5])
        assert torch.allclose(found["image"], case.images[number % 5], atol=2 / 65535)
        for name in ("spacing_mm", "original_shape", "affine"):
            assert np.allclose(row[name], getattr(case, name))
    assert number == 14
    sources = [folder / "raw/images/case_000", folder / "raw/labels/case_000.nii.gz"]
    assert store.index.source_sha256[0] == sha256_of_files(sources)


def test_no_header_of_a_series_gets_into_a_store(folder):
    told = written(folder / "store")
    assert not [value for value in raw_dicom.SECRETS.values() if value.encode() in told]


def test_evaluation_reads_the_series_and_knows_changed_ones(folder):
    item = case_items(folder / "store", 0, "all")[0]
    loaded = source_preprocessing(str(folder / "store"))(item)
    assert loaded["label"].shape[1:] == (20, 24, 5) and loaded["image"].shape == (1, 32, 32, 5)
    path = first_file(folder / "raw/images/case_000")
    whole = path.read_bytes()
    changed(path, RescaleIntercept=-49)
    with pytest.raises(ValueError, match="case_000' are damaged or others"):
        case_items(folder / "store", 0, "all")
    path.write_bytes(whole)


@pytest.mark.parametrize("place", ["file", "folder", "listed"])
def test_labels_as_seg_are_those_as_nifti(folder, tmp_path, place):
    root, task = tmp_path / "raw", raw_dicom.TASK
    raw_dicom.write_series(root / "images/case_001", 1)
    target = root / "labels" / ("case_001/seg.dcm" if place == "folder" else "case_001.dcm")
    target.parent.mkdir(parents=True)
    target.write_bytes((folder / "seg/case_001_seg.dcm").read_bytes())
    if place == "listed":
        task = raw_data.TASK_3D
        entry = {"image": "images/case_001", "label": "labels/case_001.dcm"}
        raw_data.write_json(root, {"training": [entry]})
    loaded = CaseDataset(read_source(root, task).cases, read_task(task), 32)[0]
    wanted = [folder / f"store/labels/case_001_{number:04d}.png" for number in range(5)]
    assert np.array_equal(loaded.labels[:, 0].numpy(), np.stack(list(map(Image.open, wanted))))


def test_a_seg_of_another_series_is_refused(folder):
    with pytest.raises(ValueError, match="refers to images that are not in the case's series"):
        read_segments(folder / "seg/case_001_seg.dcm", folder / "raw/images/case_000")
    with pytest.raises(ValueError, match="no DICOM SEG"):
        series = folder / "raw/images/case_000"
        read_segments(first_file(series), series)


def compressed(folder: Path, uid: str) -> None:
    """Compresses all files of a folder."""
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array.astype(np.uint16)  # the encoders want unsigned numbers
        if LOSSLESS[uid].startswith("JPEG 2000"):  # highdicom wants 32 pixels
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG2000", no_jp2=True)
            frame = file.getvalue()
        else:
            frame = highdicom.frame.encode_frame(pixels, uid, 16, 16, "MONOCHROME2", 0)
        ds.PixelData, ds.PixelRepresentation = encapsulate([frame]), 0
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.file_meta.TransferSyntaxUID = uid
        raw_dicom.save(ds, path)


@pytest.mark.parametrize("name", ["RLE Lossless", "JPEG-LS Lossless", "JPEG 2000 Lossless"])
def test_lossless_codes_give_the_same_voxels(tmp_path, name):
    uid = next(uid for uid, its in LOSSLESS.items() if its == name)
    series = raw_dicom.write_series(tmp_path / "series", 0)
    plain = load_volume(str(series), "image")
    compressed(series, uid)
    if name == "JPEG-LS Lossless" and pydicom.__version__ < "3":
        with pytest.raises(ValueError, match=r"JPEG-LS Lossless: no decoder .* pylibjpeg\[all\]"):
            load_volume(str(series), "image")
        return
    assert torch.equal(load_volume(str(series), "image").as_tensor(), plain.as_tensor())
    if name != "RLE Lossless":
        for path in series.iterdir():
            changed(path, Rows=12)
        with pytest.raises(ValueError, match="its code stream claims 20 x 24 pixels, its header"):
            load_volume(str(series), "image")


# In: what is no series


def alone(folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


def two_series(folder):
    raw_dicom.write_series(folder / "more", 1, {"SeriesNumber": 8, "Modality": "CT"})
    for path in (folder / "more").iterdir():
        path.rename(folder / f"other_{path.name}")
    (folder / "more").rmdir()


def moved(number: int, step: tuple):
    def change(folder):
        path = next(folder.glob(f"*_{number}.dcm"))
        place = pydicom.dcmread(path).ImagePositionPatient
        place = [float(start) + move for start, move in zip(place, step, strict=True)]
        changed(path, ImagePositionPatient=place)

    return change


def tilted(folder):
    for number in range(5):
        moved(number, (0, 2.0 * number, 0))(folder)


def tags(every: bool = False, **values):
    def change(folder):
        for path in sorted(folder.iterdir())[: None if every else 1]:
            changed(path, **values)

    return change


def deflated(folder):
    path = first_file(folder)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    raw_dicom.save(ds, path)


def lossy(folder):
    path = first_file(folder)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = JPEG, encapsulate([b"\xff\xd8\xff\xd9"])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    raw_dicom.save(ds, path)


def pipe(folder):
    os.mkfifo(folder / "pipe.dcm")


def link_out(folder):
    path = first_file(folder)
    (folder / "out.dcm").symlink_to(path.rename(folder.with_name("elsewhere.dcm")))


def cut(folder):
    path = first_file(folder)
    path.write_bytes(path.read_bytes()[:-300])


BAD = {
    "several": (two_series, r"holds 2 series: number 3 \(MR\), 5 files; number 8 \(CT\), 5 files"),
    "missing": (lambda f: next(f.glob("*_2.dcm")).unlink(), "1 slices are missing between .* 6 mm"),
    "unequal": (moved(4, (0, 0, 0.5)), "unequal spacing: .* are 3.5 mm apart, others 3 mm"),
    "twice": (moved(1, (0, 0, -3)), "lie at the same place"),
    "tilted": (tilted, "shifted against each other"),
    "localizer": (tags(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "mixed orientations"),
    "color": (tags(every=True, SamplesPerPixel=3, PhotometricInterpretation="RGB"), "color or inv"),
    "inverted": (tags(PhotometricInterpretation="MONOCHROME1"), "MONOCHROME2 are read"),
    "frames": (tags(NumberOfFrames=2, BitsAllocated=8), "multi-frame, 2 frames .*dcm2niix"),
    "alone": (alone, "one slice; a volume has two or more"),
    "no place": (tags(ImagePositionPatient=None), "lacks ImagePositionPatient"),
    "slope": (tags(RescaleSlope=0), "RescaleSlope 0.0 and RescaleIntercept -50.0: two numbers"),
    "skewed": (tags(every=True, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "right angle"),
    "flat": (tags(every=True, PixelSpacing=[0, 1]), r"PixelSpacing \[0.0, 1.0\] mm; 0.0001 to"),
    "bits": (tags(BitsAllocated=12), "BitsAllocated 12; 8, 16, 32 are read"),
    "high bit": (tags(BitsStored=12, HighBit=15), "HighBit 15 with BitsStored 12: only values"),
    "sizes": (tags(Rows=12), "different numbers of rows"),
    "huge": (tags(Rows=65535, Columns=65535), "claims 65535 x 65535 pixels; 1 to"),
    "hollow": (tags(Rows=4000, Columns=4000), "cut off: .* bytes cannot hold the 32000000"),
    "cut off": (cut, "cut off: "),
    "deflated": (deflated, "Deflated .* is not read; allowed: Implicit"),
    "lossy": (lossy, "JPEG Baseline .* is not read"),
    "pipe": (pipe, "pipe.dcm is no plain file"),
    "link": (link_out, "out.dcm is a link that leads out of its folder"),
    "other file": (lambda f: (f / "notes").write_text("x"), "notes is no DICOM file"),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "no DICOM file; a case is"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_series_is_refused_in_words_before_memory_is_taken(tmp_path, name):
    change, message = BAD[name]
    series = raw_dicom.write_series(tmp_path / "series", 0)
    change(series)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as caught:
        load_volume(str(series), "image")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22 and str(caught.value).startswith(f"image: {series} cannot be used: ")
    assert not [secret for secret in raw_dicom.SECRETS.values() if secret in str(caught.value)]


def test_files_beside_a_series_are_left_out_and_order_is_that_of_places(tmp_path):
    series = raw_dicom.write_series(tmp_path / "series", 0)
    (series / "notes.txt").write_text("x")
    (series / ".hidden").write_text("x")
    headers = read_headers(series, "image")
    assert [each.filename[-5] for each in headers] == ["0", "1", "2", "3", "4"]
    assert check_folders(tmp_path) == {"series": ""}
    changed(next(series.glob("*_2.dcm")), InstanceNumber=9)
    assert "InstanceNumbers do not follow" in check_folders(tmp_path)["series"]
    with pytest.raises(SystemExit, match="1"):
        commands.check(str(tmp_path))


def test_damaged_headers_are_named_or_read_and_nothing_else_is_raised(tmp_path):
    series = raw_dicom.write_series(tmp_path / "series", 0)
    path = first_file(series)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    head = len(whole) - 2 * 20 * 24
    refused = 0
    for _ in range(100):
        content = bytearray(whole)
        for place in rng.integers(128, head, rng.integers(1, 6)):
            content[place] = rng.integers(256)
        path.write_bytes(
            content[: rng.integers(head // 2, len(whole)) if rng.random() < 0.2 else None]
        )
        try:
            assert load_volume(str(series), "image").shape == (20, 24, 5)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"image: {series} cannot be used: "), error
    assert refused > 30


def test_a_bad_case_is_a_row_with_the_reason(tmp_path):
    root, task = raw_dicom.write_cases(tmp_path / "raw", 3), read_task(raw_dicom.TASK)
    next((root / "images/case_001").glob("*_2.dcm")).unlink()
    (root / "labels/case_002.nii.gz").unlink()
    (root / "images/notes.txt").write_text("x")
    source = read_source(root, task)
    reasons = dict(source.rejected)
    assert "one label is needed in labels; found: none of case_002," in reasons["images/case_002"]
    assert reasons["images/notes.txt"] == "no folder; a case is a folder of one series"
    cases = CaseDataset(source.cases, task, 32)
    assert isinstance(cases[0], LoadedCase) and "1 slices are missing" in cases[1]
    with pytest.raises(FileNotFoundError, match="no folder images in .* series: folders images"):
        read_source(root / "images", task)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 2, 2)])
def test_volumes_of_other_axes_are_refused(tmp_path, shape):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / "odd.nii.gz")
    message = f"image: .*odd.nii.gz has {len(shape)} axes; three are needed, or four"
    with pytest.raises(ValueError, match=message):
        load_volume(str(tmp_path / "odd.nii.gz"), "image")


def test_without_the_extra_it_is_named(folder, monkeypatch):
    monkeypatch.setattr(dicom_labels, "HAS_HIGHDICOM", False)
    with pytest.raises(ModuleNotFoundError, match=r"needs highdicom; .* diffboost\[dicom\]"):
        read_segments(folder / "seg/case_001_seg.dcm", folder / "raw/images/case_001")
    with pytest.raises(SystemExit, match=r"diffboost\[dicom\]"):
        commands.synthetic("nowhere", "out")
    monkeypatch.setattr(dicom_series, "HAS_PYDICOM", False)
    with pytest.raises(ModuleNotFoundError, match=r"needs pydicom; .* diffboost\[dicom\]"):
        prepared(folder / "raw", "again", raw_dicom.TASK)


# Out: segmentations


def test_a_seg_is_read_back_with_the_same_voxels(folder):
    label = raw_data.volume(1)[1]
    path, series = folder / "seg/case_001_seg.dcm", folder / "raw/images/case_001"
    assert np.array_equal(read_segments(path, series)[FLIP], label)
    seg = highdicom.seg.segread(path)
    frames = pydicom.dcmread(path).pixel_array  # (segment and slice, rows, columns), empty ones out
    wanted = [(label == n)[FLIP][:, :, k].T for n in (1, 2) for k in range(5)]
    wanted = [frame for frame in wanted if frame.any()]
    assert np.array_equal(frames.astype(bool), np.stack(wanted)[: len(frames)])
    assert len(frames) == len(wanted)
    sources = [each.SOPInstanceUID for each in read_headers(series, "image")]
    found = seg.get_pixels_by_source_instance(
        sources, combine_segments=True, assert_missing_frames_are_empty=True
    )
    assert np.array_equal(found.transpose(2, 1, 0)[FLIP], label)
    source = pydicom.dcmread(first_file(series))
    same = ("FrameOfReferenceUID", "StudyInstanceUID", "PatientID", "PatientName")
    assert all(seg[keyword].value == source[keyword].value for keyword in same)
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert {str(uid) for _, _, uid in seg.get_source_image_uids()} == set(sources)
    described = [seg.get_segment_description(number) for number in (1, 2)]
    assert [each.segment_label for each in described] == ["left part", "right part"]
    algorithm = described[0].algorithm_identification
    assert (algorithm.name, algorithm.version) == ("DiffBoost segmentation", __version__)
    assert algorithm.parameters == {"model_sha256": sha256_of_files([folder / "model.pt"])}


def test_a_prediction_of_nothing_is_a_seg_of_nothing(folder):
    found = read_segments(folder / "seg/case_000_seg.dcm", folder / "raw/images/case_000")
    assert found.shape == (20, 24, 5) and not found.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array[:-1], r"\(19 x 24 x 5\) does not lie on the grid"),
        (lambda array: array + 0.5, "other values than class indices"),
        (lambda array: array + 2, "has class 4"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    array = change(raw_data.volume(1)[1].astype(np.float32))
    raw_data.write_nifti(tmp_path / "case_001.nii.gz", array)
    with pytest.raises(ValueError, match=message):
        write_segmentations(
            str(tmp_path), str(folder / "raw/images"), str(tmp_path / "out"),
            str(folder / "metadata.json"), str(folder / "model.pt"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_labels_come_from_a_bundle_or_a_store(folder, tmp_path):
    assert read_labels(folder / "metadata.json") == ["left part", "right part"]
    assert read_labels(folder / "store/dataset.json") == ["left_part", "right_part"]
    for labels in ({"1": "a"}, {"0": "background"}, {"0": "b", "1": ""}, ["b", "a"], None):
        (tmp_path / "labels.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(ValueError, match=f"labels: {tmp_path}"):
            read_labels(tmp_path / "labels.json")


# Inference with MONAI and pydicom alone


def infer(dataset_dir: Path, folder: Path) -> dict[str, np.ndarray]:
    parser = ConfigParser(ConfigParser.load_config_file(CONFIG))
    parser.update(SMALL)
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def")
    folder.mkdir(exist_ok=True)
    torch.save(network.state_dict(), folder / "model.pt")
    monai.bundle.run(
        config_file=CONFIG, dataset_dir=str(dataset_dir), output_dir=str(folder / "eval"),
        model_path=str(folder / "model.pt"), **SMALL,
    )  # fmt: skip
    return {path.name: nib.load(path) for path in sorted((folder / "eval").iterdir())}


def test_inference_of_a_series_is_that_of_its_nifti_and_becomes_a_seg(folder, tmp_path):
    series = infer(folder / "raw/images", tmp_path / "series")
    nifti = infer(folder / "nifti/imagesTr", tmp_path / "nifti")
    assert list(series) == list(nifti) == [f"case_{n:03d}_seg.nii.gz" for n in range(3)]
    for name, found in series.items():
        assert np.array_equal(np.asarray(found.dataobj), np.asarray(nifti[name].dataobj))
        assert np.allclose(found.affine, nifti[name].affine, atol=1e-5)
    model = tmp_path / "series/model.pt"
    commands.seg(
        str(tmp_path / "series/eval"), str(folder / "raw/images"), str(tmp_path / "seg"),
        str(folder / "store/dataset.json"), str(model),
    )  # fmt: skip
    for name, found in series.items():
        case = name.split("_seg")[0]
        back = read_segments(tmp_path / "seg" / f"{case}_seg.dcm", folder / "raw/images" / case)
        assert np.array_equal(back, np.asarray(found.dataobj)) and back.any()


def told(error: BaseException | None) -> str:
    """What an error says, with its causes."""
    return "" if error is None else f"{error}\n{told(error.__cause__)}"


def test_inference_refuses_color_and_folders_with_a_dot(tmp_path):
    series = raw_dicom.write_series(tmp_path / "raw/1.2.3", 0)
    with pytest.raises(RuntimeError) as caught:
        infer(tmp_path / "raw", tmp_path / "out")
    assert "name folders of series without a dot: " in told(caught.value)
    series = series.rename(tmp_path / "raw/case")
    for path in series.iterdir():
        pixels = np.zeros((24, 20, 3), np.uint8).tobytes()
        changed(
            path, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
            BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, PixelData=pixels,
        )  # fmt: skip
    parser = ConfigParser(ConfigParser.load_config_file(CONFIG))
    parser.update({"dataset_dir": str(tmp_path / "raw"), **SMALL})
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("preprocessing")({"image": str(series)})
    assert "a DICOM series of color or of several frames a file" in told(caught.value)


# Out: synthetic images


@pytest.fixture
def synthetic(folder, tmp_path):
    """A synthetic store of a case that is called after a patient: two variants, one rejected."""
    facts = {name: kind("7") for name, kind in FACTS.items()} | machine_facts("cpu")
    row = read_store(folder / "store").index.iloc[0]
    facts |= {"case": "DOE_JOHN", "source_sha256": row.source_sha256, "prompt": row.prompt}
    (tmp_path / "synthetic/images").mkdir(parents=True)
    rows = []
    for number, kept in enumerate((True, False)):
        image = np.linspace(-1, 1, 32 * 32).reshape(32, 32) * (1 - number / 2)
        path = tmp_path / f"synthetic/images/DOE_JOHN_0000_{number:03d}.png"
        path.write_bytes(variant_png(image, facts | {"variant": number}))
        place = {"image": f"images/{path.name}", "case": "DOE_JOHN", "slice": 0, "variant": number}
        place |= {"source_image": str(folder / "raw"), "sha256": sha256_of_files([path])}
        rows.append(place | {"kept": kept, "reason": "" if kept else "faint"})
    pd.DataFrame(rows).to_parquet(tmp_path / "synthetic/manifest.parquet")
    return tmp_path / "synthetic"


def test_synthetic_images_are_marked_and_hold_nothing_of_a_patient(synthetic, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    [path] = write_synthetic(str(synthetic), str(tmp_path / "out"))
    assert path.name == "variant_000001.dcm" and "1 that the quality filter rejected" in caplog.text
    told = written(tmp_path / "out")
    secrets = [*raw_dicom.SECRETS.values(), "DOE", "JOHN", "case_000", str(tmp_path)]
    assert not [secret for secret in secrets if secret.encode() in told]
    uids = [raw_dicom.uid("case0", part) for part in ("series", "study", "frame", 0)]
    assert not [uid for uid in uids if uid.encode() in told]
    ds = pydicom.dcmread(path)
    dates = [each.keyword for each in ds.iterall() if each.VR in ("DA", "TM", "DT") and each.value]
    assert dates == []
    assert ds.SOPClassUID.name == "Secondary Capture Image Storage" and ds.Modality == "OT"
    assert list(ds.ImageType) == ["DERIVED", "SECONDARY"] and ds.ConversionType == "SYN"
    assert (ds.PatientID, str(ds.PatientName)) == ("SYNTHETIC", "SYNTHETIC^")
    assert (ds.BurnedInAnnotation, ds.PatientIdentityRemoved) == ("NO", "YES")
    assert ds.ContentQualification == "RESEARCH" and ds[0x0008001C].value == "YES"
    assert "never for diagnosis" in ds.DerivationDescription
    png = first_file(synthetic / "images")
    facts = read_facts(png.read_bytes())
    for name in set(facts) - {"case"}:
        assert f"diffboost:{name}: {facts[name]}" in ds.ImageComments
    assert f"diffboost:png_sha256: {sha256_of_files([png])}" in ds.ImageComments
    levels = (np.linspace(0, 1, 32 * 32) * 65535).round().reshape(32, 32)
    assert np.abs(ds.pixel_array - levels).max() <= 1 and ds.pixel_array.dtype == np.uint16


def test_synthetic_images_are_the_same_each_time_and_damaged_ones_are_refused(synthetic, tmp_path):
    first, again = (
        write_synthetic(str(synthetic), str(tmp_path / name))[0].read_bytes() for name in "ab"
    )
    assert first == again
    path = first_file(synthetic / "images")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, older, or not the file of the manifest"):
        write_synthetic(str(synthetic), str(tmp_path / "c"))

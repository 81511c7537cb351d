"""Scans that lie twice in a store are found, kept together by folds, and named where they leak."""

import io
import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage
from small_store import source_sha256, write_store, write_variants

from diffboost.audit import commands
from diffboost.audit.leaks import audit_leaks, write_leaks
from diffboost.data import duplicates
from diffboost.data.comparison import in_plane_shape
from diffboost.data.duplicates import PAIR_COLUMNS, find_duplicates, numbered_slices
from diffboost.data.pseudonyms import read_sources
from diffboost.data.registration import Likeness, align, invert, texture
from diffboost.data.slices import read_store
from diffboost.data.splits import assign_folds, group_cases, select
from diffboost.files import sha256_of_files
from diffboost.prepare import prepare

TASK_2D = {"name": "grain", "layout": "pairs", "labels": {"lesion": [1]}}
TASK_3D = {"name": "grain", "layout": "decathlon", "labels": {"body": [1]}}
SIZE = 48


def grain(seed: int, shape: tuple) -> np.ndarray:
    """Smooth and fine noise, 0 to 255: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    layers = [ndimage.gaussian_filter(rng.normal(size=shape), sigma) * sigma for sigma in (1, 2, 5)]
    total = sum(layers)
    return 255 * (total - total.min()) / np.ptp(total)


def jpeg(pixels: np.ndarray, gamma: float) -> np.ndarray:
    file = io.BytesIO()
    levels = 255 * (pixels / 255) ** gamma
    Image.fromarray(levels.astype(np.uint8)).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file), dtype=float)


COPIES = {
    "same": lambda pixels: pixels,
    "turned": lambda pixels: ndimage.rotate(pixels, 12, reshape=False, order=1),
    "quarter": lambda pixels: np.rot90(pixels),
    "mirrored_crop": lambda pixels: pixels[5:65, ::-1][:, 3:78],
    "gamma_jpeg": lambda pixels: jpeg(pixels, 1.5),
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A store of 20 images and five copies of the first five; pairs as they must be found."""
    folder = tmp_path_factory.mktemp("copies")
    (folder / "raw").mkdir()
    images = {f"scan_{number:02d}": grain(number, (72, 90)) for number in range(20)}
    images |= {
        name: change(images[f"scan_{number:02d}"])
        for number, (name, change) in enumerate(COPIES.items())
    }
    for name, pixels in images.items():
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "raw" / f"{name}.png")
        mask = np.zeros(pixels.shape, np.uint8)
        mask[20:40, 20:40] = 255
        Image.fromarray(mask).save(folder / "raw" / f"{name}_mask.png")
    store = prepare(folder / "raw", folder / "store", TASK_2D, SIZE, edges="gradient", num_folds=3)
    return store, {frozenset((f"scan_{n:02d}", name)) for n, name in enumerate(COPIES)}


def rewrite(store, folder, change):
    """A store with another index; its images are those of `store`."""
    folder.mkdir()
    shutil.copytree(store / "images", folder / "images")
    (folder / "dataset.json").write_bytes((store / "dataset.json").read_bytes())
    index = change(pd.read_parquet(store / "index.parquet"))
    index.to_parquet(folder / "index.parquet")
    return folder


def unaware(index: pd.DataFrame) -> pd.DataFrame:
    """Folds of an index as if copies were unknown: they are held out, their originals are not."""
    return index.assign(group=index.case, fold=(~index.case.isin(COPIES)).astype(int))


def test_prepare_finds_every_copy_and_no_other_pair(copies):
    store, pairs = copies
    listed = pd.read_csv(store / "duplicates.csv")
    found = {frozenset(pair) for pair in zip(listed.case, listed.other, strict=True)}
    assert found == pairs
    assert listed.likeness.min() > 0.7 and set(listed.kind) == {"near-duplicate"}


def test_folds_and_inner_validation_keep_copies_together(copies):
    store, pairs = copies
    index = read_store(store).index
    fold = dict(zip(index.case, index.fold, strict=True))
    assert all(len({fold[name] for name in pair}) == 1 for pair in pairs)
    assert index.fold.value_counts().max() - index.fold.value_counts().min() <= 1
    for seed in range(10):
        inner = set(select(index, 0, "inner_validation", 0.3, seed).case)
        rest = set(select(index, 0, "training", 0.3, seed).case)
        assert not any(pair & inner and pair & rest for pair in pairs)


def test_the_command_names_copies_across_folds_with_their_kind(copies, tmp_path, caplog):
    store, pairs = copies
    caplog.set_level("INFO")
    commands.leaks(str(store))
    assert "no leak in" in caplog.text
    planted = rewrite(store, tmp_path / "store", unaware)
    with pytest.raises(SystemExit) as exit_:
        commands.leaks(str(planted), inner_fraction=0.0, output=str(tmp_path / "leaks.csv"))
    assert exit_.value.code == 1 and "scan_01 and turned: a near-duplicate" in caplog.text
    leaks = pd.read_csv(tmp_path / "leaks.csv")
    assert {frozenset(pair) for pair in zip(leaks["first"], leaks.second, strict=True)} == pairs
    kinds = dict(zip(leaks.second, leaks.kind, strict=True)) | dict(
        zip(leaks["first"], leaks.kind, strict=True)
    )
    assert kinds["same"] == "image" and kinds["turned"] == "duplicate"
    assert leaks.reason.str.endswith("folds 0, 1").all()
    with pytest.raises(SystemExit, match="no such folder"):
        commands.leaks(str(tmp_path / "none"))


def test_a_case_in_two_folds_is_named(copies, tmp_path):
    store, _ = copies

    def twice(index):
        rows = index[index.case == "scan_07"]
        return pd.concat([index, rows.assign(fold=(rows.fold + 1) % 3)], ignore_index=True)

    known = pd.read_csv(store / "duplicates.csv")
    leaks = audit_leaks(rewrite(store, tmp_path / "store", twice), inner_fraction=0.0, pairs=known)
    assert {(leak.kind, leak.first, leak.second) for leak in leaks} == {
        ("case", "scan_07", "scan_07")
    }


def test_the_other_half_of_a_volume_is_found(tmp_path):
    entries = []

    def write(name, pixels, first=0):
        affine = np.diag([2.0, 1, 1, 1])
        affine[0, 3] = 2 * first
        for folder, values in (("imagesTr", pixels), ("labelsTr", pixels > 200)):
            path = tmp_path / "raw" / folder / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)
        entries.append({key: f"{folder}/{name}.nii.gz" for key, folder in
                        (("image", "imagesTr"), ("label", "labelsTr"))})  # fmt: skip

    for number in range(6):
        shape = (20, 40 + 2 * number, 44)
        pixels = ndimage.gaussian_filter1d(grain(number, shape), 2.5, axis=0)
        if number:
            write(f"volume_{number}", pixels)
        else:
            write("front", pixels[:9])
            write("back", pixels[9:], first=9)
    (tmp_path / "raw/dataset.json").write_text(json.dumps({"training": entries}))
    task = TASK_3D | {"slice_axis": "sagittal"}
    store = prepare(tmp_path / "raw", tmp_path / "store", task, SIZE, edges="gradient")
    listed = pd.read_csv(store / "duplicates.csv")
    assert listed[["case", "other"]].to_numpy().tolist() == [["front", "back"]]


def test_slices_with_numbered_names_are_one_volume(copies):
    store, _ = copies
    index = read_store(store).index.iloc[5:9].copy()
    index["case"] = ["liver_1_slice_4", "liver_1_slice_5", "liver_2_slice_4", "benign_2"]
    index["source_image"] = index.case + ".png"
    paths = [store / name for name in index.image]
    pairs = find_duplicates(index, paths, read_store(store).header["task"])
    assert pairs[["case", "other", "kind"]].to_numpy().tolist() == [
        ["liver_1_slice_4", "liver_1_slice_5", "another slice of the same volume"]
    ]


def pairs_by_name(*files: str) -> list[list[str]]:
    index = pd.DataFrame({"case": list(files), "source_image": list(files)})
    return numbered_slices(index)[["case", "other"]].to_numpy().tolist()


def test_names_of_slices_are_read_whatever_separates_and_follows_their_words():
    files = "images/a-b (slice 1).png", "images/a-b slice-02.nii.gz", "a-b.slice3", "a-b_SL4.tiff"
    assert pairs_by_name(*files) == [[files[0], other] for other in files[1:]]
    assert pairs_by_name("benign (1).png", "benign (2).png", "frame_1.png", "frame_2.png", "") == []
    other = ["p2/scan_z1.png", "p2/scan_z2.png"]  # the same names: two volumes
    assert pairs_by_name("p1/scan_z1.png", "p1/scan_z3.png", *other)[1:] == [other]
    assert len(pairs_by_name("normal/liver_7_z1.png", "malignant/liver_7_z2.png")) == 1


@pytest.mark.parametrize("kind", ["plain", "pseudonyms", "large"])
def test_slices_of_one_volume_are_in_one_fold(tmp_path, monkeypatch, kind):
    (tmp_path / "raw").mkdir()
    for volume in range(2):
        for number in range(4):
            name, mask = f"liver_{volume}_slice_{number}", np.zeros((40, 48), bool)
            mask[10:30, 10:30] = True
            pixels = grain(10 * volume + number, mask.shape).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "raw" / f"{name}.png")
            Image.fromarray(mask).save(tmp_path / "raw" / f"{name}_mask.png")
    knobs = {"pseudonym_key": tmp_path / "secret"} if kind == "pseudonyms" else {}
    if kind == "large":  # as 2,237 single images are
        monkeypatch.setattr(duplicates, "LARGEST_SEARCH", 10)
    store_dir = prepare(
        tmp_path / "raw", tmp_path / "store", TASK_2D, 32, "gradient", num_folds=2, **knobs
    )
    store = read_store(store_dir)
    index, source = store.index, store.index.source_image
    if kind == "pseudonyms":
        assert set(source) == {""}
        source = index.case.map(lambda case: read_sources(store_dir)[1][case][0])
        assert "liver" not in (store_dir / "duplicates.csv").read_text()
    volume = source.str.removesuffix(".png").str.rsplit("_slice_").str[0]
    assert set(volume) == {"liver_0", "liver_1"} and index.group.nunique() == 2
    assert (index.groupby(volume).fold.nunique() == 1).all()
    assert len(pd.read_csv(store_dir / "duplicates.csv")) == 6
    if kind == "large":  # the audit knows volumes by their names, too
        alone = store.index.assign(group=source, fold=np.arange(8) % 2)
        alone.to_parquet(store_dir / "index.parquet")
        found = {leak.kind for leak in audit_leaks(store_dir, inner_fraction=0.0)}
        assert found == {"volume", "duplicate"}  # the second: two that a third joins


def test_alignment_recovers_a_known_turn():
    pixels = torch.from_numpy(grain(3, (96, 96)).astype(np.float32))[None] / 127.5 - 1
    turned = ndimage.rotate(pixels[0], 7, reshape=False, order=1)[None]
    fixed, moving = (
        texture(torch.as_tensor(image), 1.0, 64, (0.7, 3.0))[None] for image in (turned, pixels)
    )
    maps = align(fixed, moving, torch.eye(3)[None, :2], 64, steps=12)
    cos, sin = np.cos(np.deg2rad(7)), np.sin(np.deg2rad(7))
    expected = torch.tensor([[[cos, -sin], [sin, cos]]], dtype=torch.float32)
    assert torch.allclose(maps[:, :, :2], expected, atol=0.01)
    product = torch.cat([maps, torch.tensor([[[0.0, 0, 1]]])], 1) @ torch.cat(
        [invert(maps), torch.tensor([[[0.0, 0, 1]]])], 1
    )
    assert torch.allclose(product, torch.eye(3)[None], atol=1e-5)
    plain, likeness, overlap = Likeness(fixed, 0, 64).measure(fixed, moving, maps)
    assert plain > 0.9 and torch.equal(plain, likeness) and 0.8 < overlap <= 1


def test_what_slices_have_in_common_does_not_make_them_alike():
    base = grain(0, (64, 64))
    images = [base + 0.5 * grain(seed, (64, 64)) for seed in range(1, 41)]
    textures = torch.stack(
        [
            texture(torch.from_numpy(image)[None].float() / 200 - 1, 1.0, 64, (0.7, 3.0))
            for image in images
        ]
    )
    first, second, same = textures[:1], textures[1:2], torch.eye(3)[None, :2]
    plain, likeness, _ = Likeness(textures, 2, 64).measure(first, second, same)
    assert plain > 0.5 and abs(likeness) < 0.2


def test_groups_stay_together_in_folds_of_near_equal_size():
    cases = [f"case_{number:02d}" for number in range(30)]
    groups = group_cases(
        cases, [("case_05", "case_01"), ("case_09", "case_05"), ("case_20", "case_21")]
    )
    assert groups["case_09"] == groups["case_01"] == "case_01" and groups["case_00"] == "case_00"
    for order in ("drawn", "listed"):
        folds = assign_folds(cases, 3, 0, order, groups)
        assert folds["case_01"] == folds["case_05"] == folds["case_09"]
        assert folds["case_20"] == folds["case_21"]
    sizes = np.bincount(list(assign_folds(cases, 3, 0, groups=groups).values()))
    assert sizes.max() - sizes.min() <= 1
    alone = {case: case for case in cases}
    assert assign_folds(cases, 3, 0, groups=alone) == assign_folds(cases, 3, 0)
    with pytest.raises(ValueError, match="as many groups of cases .* there are 1"):
        assign_folds(cases, 2, 0, groups=dict.fromkeys(cases, "case_00"))


def test_shape_of_slices_follows_the_orientation_of_the_file():
    affine = np.eye(4)[[1, 2, 0, 3]]  # array axes run to inferior … : x is S, y is R, z is A
    axes = nib.aff2axcodes(affine)
    shape = [{"R": 10, "A": 20, "S": 30}[code] for code in axes]
    assert in_plane_shape(shape, affine.ravel(), "axial") == [10, 20]
    assert in_plane_shape(shape, affine.ravel(), "sagittal") == [20, 30]
    assert in_plane_shape(shape, affine.ravel(), "coronal") == [10, 30]


@pytest.fixture
def small(tmp_path):
    """A store of six cases in three folds, and variants for fold 0 by a generator that is clean."""
    store = write_store(tmp_path / "store")
    synthetic = write_variants(store, tmp_path / "synthetic")
    manifest = pd.read_parquet(synthetic / "manifest.parquet")
    manifest = manifest[~manifest.case.isin(["case_0", "case_3"])]
    write_lineage(
        synthetic, {"cases": {"case_1": source_sha256(1)}, "ancestors": [], "fold": 0}, manifest
    )
    return store, synthetic, manifest


def write_lineage(folder, lineage, manifest=None):
    folder.mkdir(exist_ok=True)
    (folder / "lineage.json").write_text(json.dumps(lineage))
    if manifest is not None:
        sha256 = sha256_of_files([folder / "lineage.json"])
        manifest.assign(lineage_sha256=sha256).to_parquet(folder / "manifest.parquet")


def audit(store, **places):
    """Kind and names of all leaks in what the files tell; no search in the images."""
    nothing = pd.DataFrame(columns=["case", "slice", "other", "other_slice", "likeness", "kind"])
    leaks = audit_leaks(store, pairs=nothing, inner_fraction=0.0, **places)
    return {(leak.kind, leak.first, leak.second) for leak in leaks}


def test_generators_that_saw_held_out_cases_are_named(small):
    store, synthetic, manifest = small
    assert audit(store, synthetic_dir=synthetic) == set()
    ancestor = {"cases": {"renamed": source_sha256(3)}, "ancestors": []}
    lineage = {"cases": {"case_0": source_sha256(0)}, "ancestors": [ancestor], "fold": 0}
    write_lineage(synthetic, lineage, manifest)
    named = {("generator", "case_0", "case_0"), ("generator", "renamed", "case_3")}
    assert audit(store, synthetic_dir=synthetic) == named
    assert audit(store, generator_dir=synthetic) == named
    assert audit(store, generator_dir=synthetic, fold=1) == set()


def test_what_names_no_fold_is_judged_on_all(small, tmp_path):
    store, synthetic, manifest = small
    generator = tmp_path / "generator"
    lineage = {"cases": {"case_1": source_sha256(1)}, "ancestors": [], "fold": None}
    lineage["ancestors"] = [{"cases": {"case_1": source_sha256(1), "old": source_sha256(3)}}]
    write_lineage(generator, lineage)
    nothing = pd.DataFrame(columns=list(PAIR_COLUMNS))
    leaks = audit_leaks(store, generator_dir=generator, pairs=nothing)
    assert [(leak.first, leak.second, leak.reason.split("; ")[-1]) for leak in leaks] == [
        ("old", "case_3", "folds 0"), ("case_1", "case_1", "folds 1")
    ]  # fmt: skip
    assert audit(store, generator_dir=generator, fold=2) == set()
    clean = {"cases": {}, "ancestors": [], "fold": None}
    write_lineage(synthetic, clean, manifest)
    seen = {second for _, _, second in audit(store, synthetic_dir=synthetic)}
    assert seen == {"case_1", "case_2", "case_4", "case_5"}  # variants of fold 0, in the others
    (synthetic / "run.json").write_text(json.dumps({"fold": 0}))
    assert audit(store, synthetic_dir=synthetic) == set()
    (synthetic / "run.json").write_text(json.dumps({"fold": 1}))
    assert {second for *_, second in audit(store, synthetic_dir=synthetic)} == {"case_1", "case_4"}
    write_lineage(generator, clean | {"selection": {"case_2": source_sha256(2)}})
    assert audit(store, model_dir=generator) == {("selection", "case_2", "case_2")}


def test_a_case_of_a_given_test_section_is_a_leak_in_every_fold(small, tmp_path):
    store, *_ = small
    index = pd.read_parquet(store / "index.parquet")
    tested = index.case == "case_5"
    index.assign(section=index.section.where(~tested, "test")).to_parquet(store / "index.parquet")
    write_lineage(tmp_path / "generator", {"cases": {"x": source_sha256(5)}, "ancestors": []})
    nothing = pd.DataFrame(columns=list(PAIR_COLUMNS))
    (leak,) = audit_leaks(store, generator_dir=tmp_path / "generator", pairs=nothing)
    assert (leak.first, leak.second) == ("x", "case_5") and leak.reason.endswith("folds 0, 1, 2")


def test_variants_of_held_out_cases_are_named(small):
    store, synthetic, manifest = small
    lineage = {"cases": {}, "ancestors": [], "fold": 0}
    first, second, third = manifest.index[:3]
    planted = manifest.copy()
    planted.loc[first, "case"] = "case_0"
    planted.loc[second, "source_image"] = "/elsewhere/images/case_3_0001.png"
    write_lineage(synthetic, lineage, planted)
    images = manifest.image
    assert audit(store, synthetic_dir=synthetic) == {
        ("generator", images[first], "case_0"), ("generator", images[second], "case_3")
    }  # fmt: skip
    planted = manifest.copy()
    planted.loc[first, "source_sha256"] = source_sha256(3)  # under the name of a training case
    write_lineage(synthetic, lineage, planted)
    assert audit(store, synthetic_dir=synthetic) == {("generator", images[first], "case_3")}
    write_lineage(synthetic, lineage, manifest)
    chunks = PngInfo()
    chunks.add_text("diffboost:case", "case_3")
    Image.open(synthetic / images[third]).save(synthetic / images[third], pnginfo=chunks)
    assert audit(store, synthetic_dir=synthetic) == {("generator", images[third], "case_3")}


def test_segmenters_that_met_test_cases_are_named(small, tmp_path):
    store, *_ = small
    model = tmp_path / "model"
    lineage = {"cases": {"case_1": source_sha256(1)}, "ancestors": [], "fold": 0}
    lineage["selection"] = {"case_2": source_sha256(2)}
    write_lineage(model, lineage)
    assert audit(store, model_dir=model) == set()
    lineage["cases"]["case_0"], lineage["selection"]["case_3"] = source_sha256(0), source_sha256(3)
    lineage["ancestors"] = [{"cases": {"case_0": source_sha256(0)}, "ancestors": []}]
    write_lineage(model, lineage)
    assert audit(store, model_dir=model) == {
        ("case", "case_0", "case_0"), ("selection", "case_3", "case_3"),
        ("generator", "case_0", "case_0"),
    }  # fmt: skip
    write_lineage(model, {"cases": {}, "selection": {}, "ancestors": [], "fold": 0})
    (model / "run.json").write_text(json.dumps({"selection": "test"}))
    assert audit(store, model_dir=model) == {("selection", str(model), "case_0")}


def test_leaks_are_written_even_if_there_is_none(tmp_path):
    write_leaks(tmp_path / "leaks.csv", [])
    assert list(pd.read_csv(tmp_path / "leaks.csv").columns) == [
        "kind", "meaning", "first", "second", "reason"
    ]  # fmt: skip

"""The quality filter: scores, planted defects, calibration, rejections, and training after it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from monai.networks.nets import UNet
from PIL import Image
from scipy import ndimage

from diffboost.audit import defects, quality_scores
from diffboost.audit.calibration import calibrate
from diffboost.audit.commands import AUDITS
from diffboost.audit.defects import Sample, paint_over, plant
from diffboost.audit.guards import guard_segmenter
from diffboost.audit.quality import COLUMNS, audit_quality, filter_variants, judge_variants
from diffboost.audit.quality_scores import View, describe_reference, score_sample
from diffboost.data.slices import read_store, slice_items, write_image
from diffboost.data.transforms import LoadSliced
from diffboost.generation.lineage import write_lineage
from diffboost.generation.synthesis import with_source_hashes
from diffboost.prepare import prepare
from diffboost.segmentation.loading import load_segmenter
from diffboost.segmentation.training import training_items

CONFIGS = Path(__file__).parents[1] / "bundles" / "diffboost_segmentation" / "configs"
FILES = [str(CONFIGS / "train.yaml"), str(CONFIGS / "network_unet.yaml")]
SIZE = 32
CHANNELS = [4, 8]


def disc(row: float, column: float, radius: float = 6) -> np.ndarray:
    grid = np.indices((SIZE, SIZE))
    return np.hypot(grid[0] - row, grid[1] - column) < radius


def sample_of(mask: np.ndarray, seed: int = 0) -> Sample:
    """A dark disc in noise, with the hint of its outline."""
    noise = np.random.default_rng(seed).normal(0, 0.1, mask.shape)
    image = np.clip(np.where(mask, -0.5, 0.3) + noise, -1, 1).astype(np.float32)
    edges = ndimage.gaussian_gradient_magnitude(image, 1.0).astype(np.float32)
    return Sample(f"case_{seed}", image, mask.astype(np.uint8), edges, edges)


def view_of(sample: Sample, mask: np.ndarray) -> View:
    """What a segmenter sees that finds ``mask``."""
    foreground = ndimage.gaussian_filter(mask.astype(float), 0.7)
    return View(sample.image, np.stack([1 - foreground, foreground]), sample.edges)


@pytest.fixture(scope="module")
def good():
    return sample_of(disc(15, 16))


@pytest.fixture(scope="module")
def reference():
    samples = [sample_of(disc(15, 10 + seed), seed) for seed in range(8)]
    return describe_reference([(sample.image, sample.label) for sample in samples])


def test_scores_of_a_true_label_and_of_a_moved_one(good, reference):
    view = view_of(good, good.label > 0)
    own = score_sample(view, good.label, good.hint, reference)
    moved = plant("shifted", good, [], np.random.RandomState(0))
    other = score_sample(view, moved.label, moved.hint, reference)
    assert own["dice"] == pytest.approx(1) and other["dice"] < 0.55
    assert own["agreement_over_shifts"] > 0.3 > 0 > other["agreement_over_shifts"]
    assert own["contrast"] > 3 > other["contrast"] + 1
    assert own["edge_agreement"] == pytest.approx(1) and other["edge_agreement"] < 0.9
    assert set(own) >= {name for names in quality_scores.FAMILIES.values() for name in names}


def test_scores_of_an_empty_label(good, reference):
    empty = np.zeros_like(good.label)
    found = score_sample(view_of(good, good.label > 0), empty, good.hint, reference)
    none = score_sample(view_of(good, empty > 0), empty, good.hint, reference)
    assert np.isnan(found["dice"]) and none["found_share"] == 0
    assert found["found_share"] == pytest.approx((good.label > 0).mean(), abs=0.02)
    names = {name for names in quality_scores.EMPTY_FAMILIES.values() for name in names}
    assert set(found) >= names and quality_scores.group_of(0) == "empty"


def test_gray_levels_unlike_the_reference_are_far(good, reference):
    view = view_of(good, good.label > 0)
    bright = View(-good.image, view.probabilities, view.edges)
    own, other = (score_sample(seen, good.label, good.hint, reference) for seen in (view, bright))
    assert own["intensity_distance"] < 2 < other["intensity_distance"]
    assert own["contrast"] == pytest.approx(-other["contrast"])


def test_planted_defects_are_defects(good):
    rng = np.random.RandomState(0)
    stranger = disc(15, 24).astype(np.uint8)
    moved = plant("shifted", good, [], rng)
    assert moved.label.sum() >= defects.STAYS_INSIDE * good.label.sum()
    centers = [np.argwhere(label).mean(0) for label in (good.label, moved.label)]
    assert np.abs(centers[0] - centers[1]).max() >= 5.5  # half of 12 px, less rounding
    assert (moved.image == good.image).all() and (moved.hint[moved.label > 0] > 0).any()
    assert (plant("stranger", good, [stranger], rng).label == stranger).all()
    assert plant("stranger", good, [good.label], rng) is None  # says the same
    assert plant("emptied", good, [], rng).label.sum() == 0
    noise = plant("noise", good, [], rng)
    assert abs(np.corrcoef(noise.image.ravel(), good.image.ravel())[0, 1]) < 0.1
    blank = Sample("x", good.image, np.zeros_like(good.label), good.hint, good.edges)
    for kind in ("shifted", "stranger", "erased", "emptied"):
        assert plant(kind, blank, [stranger], rng) is None


def test_a_lesion_is_erased_only_where_it_is_seen(good):
    rng = np.random.RandomState(0)
    painted = paint_over(good.image, good.label > 0, rng)
    far = ~ndimage.binary_dilation(good.label, iterations=4)
    assert (painted[far] == good.image[far]).all()
    assert painted[good.label > 0].mean() == pytest.approx(0.3, abs=0.1)
    assert plant("erased", good, [], rng) is not None
    flat = Sample("x", painted, good.label, good.hint, good.edges)
    assert plant("erased", flat, [], rng) is None


def test_calibration_loses_what_is_allowed_and_finds_the_rest():
    rng = np.random.default_rng(0)
    rows = []
    for number in range(600):
        kind = "" if number % 2 else ("first", "second")[number // 2 % 2]
        place = {"": (0, 0), "first": (6, 0), "second": (0, -6)}[kind]
        a, b = rng.normal(place, 1)
        rows.append({"a": a, "b": b, "kind": kind, "case": f"case_{number % 30}"})
    scores = pd.DataFrame(rows)
    judge = calibrate(scores, ("a", "b"), max_lost=0.05)
    assert 0.03 <= judge.lost <= 0.05
    assert min(judge.found.values()) > 0.98 and set(judge.found) == {"first", "second"}
    verdicts = judge.verdict(scores)
    assert np.allclose(judge.parts(scores).sum(1) + judge.bias, verdicts)
    assert 0.02 <= (verdicts[scores.kind == ""] < 0).mean() <= 0.07
    strict = calibrate(scores, ("a", "b"), max_lost=0.3)
    assert 0.25 <= strict.lost <= 0.3
    with pytest.raises(ValueError, match="max_lost: 1.5"):
        calibrate(scores, ("a", "b"), max_lost=1.5)
    with pytest.raises(ValueError, match="0 cases with good samples"):
        calibrate(scores[scores.kind != ""], ("a", "b"), max_lost=0.05)


def test_cases_that_have_defects_alone_leave_a_calibration_whole():
    """Cases 0 and 5 of six, the only ones with good samples, fell into one part: all was kept."""
    rng = np.random.default_rng(0)
    rows = [
        {"a": rng.normal(0 if good else 8, 1), "kind": "" if good else "noise", "case": f"c{case}"}
        for case in range(6)
        for good in ([False] if case in (1, 2, 3, 4) else [False, True])
        for _ in range(20)
    ]
    judge = calibrate(pd.DataFrame(rows), ("a",), max_lost=0.05)
    assert np.isfinite(judge.bias) and judge.found == {"noise": 1.0} and judge.lost < 0.1
    assert calibrate(pd.DataFrame(rows), ("a",), max_lost=0.999).lost <= 1
    with pytest.raises(ValueError, match="calibration: 1 cases with good samples"):
        calibrate(pd.DataFrame([row for row in rows if row["case"] != "c5"]), ("a",), 0.05)


def test_a_case_that_looks_bad_to_the_others_is_named(caplog):
    """One of eight cases took the whole filter away, and nothing said so."""
    rng = np.random.default_rng(0)
    rows = [
        {"a": rng.normal(0 if good and case else 8), "b": rng.normal(), "case": f"c{case}",
         "kind": "" if good else "noise"}
        for case in range(8)
        for good in (True, False)
        for _ in range(20)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    judge = calibrate(frame, ("a", "b"), max_lost=0.05)
    assert judge.lost <= 0.05 and judge.found["noise"] < 0.5
    assert "it will reject little" in caplog.text and "good slices of c0 look as bad" in caplog.text
    caplog.clear()
    assert calibrate(frame[frame.case != "c0"].reset_index(drop=True), ("a", "b"), 0.05)
    assert not caplog.text


def test_slices_labelled_all_over_or_nowhere_are_compared_by_what_they_have():
    """One of them made every gray level's distance NaN, and the filter kept all."""
    usual = [sample_of(disc(16, 16), seed) for seed in range(8)]
    pairs = [(sample.image, sample.label) for sample in usual]
    full = (usual[0].image, np.ones((SIZE, SIZE), np.uint8))
    for reference in (describe_reference([*pairs, full]), describe_reference([full])):
        assert np.isfinite([*reference.middle.values(), *reference.spread.values()]).all()
        for label in (usual[1].label, np.zeros_like(usual[1].label), full[1]):
            sample = Sample("c", usual[1].image, label, usual[1].edges, usual[1].edges)
            scores = score_sample(view_of(sample, label > 0), label, sample.hint, reference)
            assert 0 <= scores["intensity_distance"] <= quality_scores.FARTHEST
            assert np.isnan(scores.get("contrast", 0)) == label.all()  # no border to look at


def test_a_score_that_a_sample_lacks_says_nothing():
    rng = np.random.default_rng(0)
    rows = [
        {"a": rng.normal(0 if good else 8), "b": np.nan if number % 3 else rng.normal(),
         "kind": "" if good else "noise", "case": f"c{number % 6}"}
        for number in range(240)
        for good in (True, False)
    ]  # fmt: skip
    judge = calibrate(pd.DataFrame(rows), ("a", "b"), max_lost=0.05)
    assert judge.found == {"noise": 1.0} and 0.02 < judge.lost <= 0.05
    lacking = judge.parts(pd.DataFrame({"a": [0.0, 8.0], "b": [np.nan, np.nan]}))
    assert (lacking[:, 1] == 0).all() and lacking[0, 0] > lacking[1, 0]


# --- a store, a segmenter that sees dark pixels, variants -----------------------------------------


class SeesDark(torch.nn.Module):
    """Logits of what is darker than its surroundings: stands for a trained segmenter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        smooth = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
        return torch.cat([smooth + 0.1, -smooth - 0.1], 1) * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A slice store of discs, a segmenter's folder, and a synthetic store with planted defects."""
    folder = tmp_path_factory.mktemp("quality")
    source = folder / "source" / "discs"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    task = {
        "name": "discs",
        "layout": "pairs",
        "modality": "US",
        "organ": "breast",
        "finding": "lesion",
        "labels": {"lesion": [1]},
        "intensity": {"policy": "range", "low": 0, "high": 255},
    }
    for number in range(30):
        mask = disc(*rng.uniform(10, 22, 2), rng.uniform(4, 7))
        sample = sample_of(mask if number % 5 else disc(-20, 0), number)
        name = f"case_{number:02d}"
        gray = np.round((sample.image + 1) * 127.5).astype(np.uint8)
        Image.fromarray(gray).save(source / f"{name}.png")
        Image.fromarray(255 * sample.label).save(source / f"{name}_mask.png")
    knobs = {"edges": "gradient", "group_duplicates": False}
    prepare(folder / "source", folder / "store", task | {"include": ["discs"]}, SIZE, **knobs)
    write_segmenter(folder, "segmenter")
    write_synthetic(folder)
    return folder


def write_segmenter(folder: Path, name: str, **changes) -> Path:
    """A folder as training leaves it; ``cases``, ``selection`` and run.json may be changed."""
    target = folder / name
    target.mkdir()
    network = UNet(2, 1, 2, CHANNELS, [2])
    torch.save(network.state_dict(), target / "model.pt")
    hashes = read_store(folder / "store").source_sha256()
    parts = {
        key: {item["case"] for item in slice_items(folder / "store", 0, part)}
        for key, part in (("cases", "training"), ("selection", "inner_validation"))
    }
    lineage = {"fold": 0, "ancestors": []}
    for key in parts:
        lineage[key] = {case: hashes[case] for case in changes.get(key, parts[key])}
    write_lineage(target / "lineage.json", lineage)
    record = {"arm": "baseline", "fold": 0, "channels": CHANNELS, "inner_fraction": 0.2}
    record |= {"network": "UNet", "num_cases": None}
    record |= {"num_parameters": sum(weight.numel() for weight in network.parameters())}
    record |= {key: value for key, value in changes.items() if key not in parts}
    (target / "run.json").write_text(json.dumps(record))
    return target


def write_synthetic(folder: Path) -> None:
    """Variant 0 shows its slice in other gray levels, variant 1 is noise, 2 another slice."""
    target = folder / "synthetic"
    (target / "images").mkdir(parents=True)
    items = slice_items(folder / "store", 0, "training")
    items, rows = with_source_hashes(str(folder / "store"), items), []
    load = LoadSliced(["image", "label"])
    loaded = [load(item) for item in items]
    for place, item in enumerate(items):
        rng = np.random.RandomState(place)
        own = loaded[place]["image"][0].numpy()
        other = loaded[(place + 7) % len(items)]["image"][0].numpy()
        noise = rng.normal(0, 0.4, own.shape)
        for variant, image in enumerate((0.95 * own + 0.02, noise, other)):
            name = f"images/{item['case']}_0000_{variant:03d}.png"
            write_image(target / name, image)
            rows.append(
                {
                    "image": name,
                    **{key: item[key] for key in ("case", "slice", "label", "edge")},
                    "source_sha256": item["source_sha256"],
                    "variant": variant,
                    "kept": True,
                    "reason": "",
                }
            )
    pd.DataFrame(rows).to_parquet(target / "manifest.parquet")


@pytest.fixture
def sees_dark(monkeypatch):
    monkeypatch.setattr("diffboost.audit.quality_calibration.load_segmenter", lambda *_: SeesDark())


def settings(folder: Path, **changes) -> dict:
    return {
        "store_dir": str(folder / "store"),
        "synthetic_dir": str(folder / "synthetic"),
        "segmenter_dir": str(folder / "segmenter"),
        "segmenter_configs": FILES,
    } | changes


def hashes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_audit_rejects_and_leaves_the_store_the_filter_marks_it(folder, sees_dark, tmp_path):
    before = hashes_of(folder)
    record = audit_quality(**settings(folder, output_dir=str(tmp_path / "audit")))
    assert hashes_of(folder) == before
    check_audit(tmp_path / "audit", record)
    filter_variants(**settings(folder, fold=0, quality_filter=True))
    manifest = pd.read_parquet(folder / "synthetic" / "manifest.parquet")
    images = hashes_of(folder / "synthetic" / "images")
    assert images.items() <= before.items()
    assert (folder / "synthetic" / "rejected.png").is_file()
    pd.testing.assert_frame_equal(manifest, pd.read_parquet(tmp_path / "audit" / "quality.parquet"))


def check_audit(output: Path, record: dict) -> None:
    """The three files say which variants are rejected and why, and agree."""
    judged = pd.read_parquet(output / "quality.parquet")
    assert set(COLUMNS) <= set(judged.columns)
    labeled = judged[judged.segmenter_agreement.notna()]
    kept = labeled.groupby("variant").kept.mean()
    assert kept[0] >= 0.85 and kept[1] == 0 and kept[2] <= 0.1
    assert (judged.kept == (judged.reason == "")).all()
    assert (judged.kept == ~(judged.quality < 0)).all()
    assert record["kept"] + sum(record["rejected"].values()) == record["variants"] == len(judged)
    assert json.loads((output / "quality.json").read_text()) == record
    assert record["judges"]["large"]["good_lost"] <= 0.05
    families = judged.reason[~judged.kept].str.partition(":")[0]
    assert set(families) <= set(quality_scores.FAMILIES)
    with Image.open(output / "rejected.png") as picture:
        assert picture.width > 800 and picture.height > 400


def test_a_store_whose_variants_are_all_good_is_no_error(folder, sees_dark, tmp_path):
    """Counting the reasons of nothing was a KeyError: 0, after all variants had been made."""
    copy = tmp_path / "synthetic"
    shutil.copytree(folder / "synthetic", copy)
    manifest = pd.read_parquet(copy / "manifest.parquet")
    own = manifest[(manifest.variant == 0) & (manifest.image.str.contains("_01_|_02_|_03_"))]
    own.to_parquet(copy / "manifest.parquet")
    changes = {"synthetic_dir": str(copy), "output_dir": str(tmp_path / "audit")}
    record = audit_quality(**settings(folder, **changes))
    assert record["kept"] == record["variants"] == len(own) > 0
    assert set(record["rejected"].values()) == {0}
    assert (tmp_path / "audit" / "rejected.png").is_file()


def test_knobs_of_the_calibration_change_it(folder, sees_dark):
    def judge(**knobs) -> dict:
        known = {"fold": 0, "inner_fraction": 0.2, "num_cases": None, "seed": 0}
        known |= {"max_lost": 0.05, "num_calibrated": 200}
        return judge_variants(**settings(folder) | known | knobs)[2]

    few, many = (judge(max_lost=share) for share in (0.02, 0.5))
    lost = [record["judges"]["large"]["good_lost"] for record in (few, many)]
    assert lost[0] <= 0.02 and lost[1] == pytest.approx(0.5, abs=0.03)
    assert few["kept"] >= many["kept"]
    with pytest.raises(ValueError, match="calibration: 1 cases"):
        judge(num_calibrated=1)


def test_an_unnamed_segmenter_leaves_the_filter_off(folder, caplog):
    caplog.set_level("INFO")
    off = settings(folder, fold=0, quality_filter=False, segmenter_dir=None)
    filter_variants(**off)
    assert "quality filter off" in caplog.text
    with pytest.raises(ValueError, match="segmenter_dir: a segmenter is needed"):
        filter_variants(**off | {"quality_filter": True})
    with pytest.raises(ValueError, match="segmenter_configs: the config files"):
        filter_variants(**settings(folder, fold=0, quality_filter=True, segmenter_configs=None))


def test_nothing_is_written_into_what_is_judged(folder):
    inside = str(folder / "synthetic" / "audit")
    with pytest.raises(ValueError, match="output_dir: .* lies in one of the folders"):
        audit_quality(**settings(folder, output_dir=inside))
    with pytest.raises(SystemExit, match="lies in one of the folders"):
        AUDITS["quality"](**settings(folder, output_dir=inside))


# --- the segmenter --------------------------------------------------------------------------------


def test_a_segmenter_is_built_as_its_configs_say(folder):
    network = load_segmenter(folder / "segmenter", FILES, num_classes=2)
    state = torch.load(folder / "segmenter" / "model.pt", weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network(torch.zeros(1, 1, SIZE, SIZE)).shape == (1, 2, SIZE, SIZE)
    assert not network.training
    with pytest.raises(ValueError, match="make AttentionUnet of .* holds UNet"):
        load_segmenter(folder / "segmenter", FILES[0], num_classes=2)
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.yaml"):
        load_segmenter(folder / "segmenter", [*FILES, "missing.yaml"], num_classes=2)
    with pytest.raises(FileNotFoundError, match="has no model.pt"):
        load_segmenter(folder / "store", FILES, num_classes=2)


def test_a_segmenter_that_knows_too_much_is_refused(folder):
    parts = {
        part: {item["case"] for item in slice_items(folder / "store", 0, part)}
        for part in ("training", "inner_validation", "test")
    }
    guard_segmenter(str(folder / "store"), 0, str(folder / "segmenter"))
    changes = {
        "saw_test": ({"cases": parts["training"] | parts["test"]}, "trained on"),
        "saw_inner": ({"cases": parts["training"] | parts["inner_validation"]}, "trained on"),
        "selected": ({"selection": parts["test"]}, "selected on test cases"),
        "arm": ({"arm": "diffboost"}, "of arm 'diffboost'"),
    }
    for name, (change, message) in changes.items():
        segmenter = write_segmenter(folder, name, **change)
        with pytest.raises(ValueError, match=message):
            guard_segmenter(str(folder / "store"), 0, str(segmenter))


# --- training after the filter --------------------------------------------------------------------


def reject(folder: Path, target: Path, rejected: pd.Series) -> str:
    """A copy of the synthetic store's manifest with some variants rejected."""
    target.mkdir()
    manifest = pd.read_parquet(folder / "synthetic" / "manifest.parquet")
    manifest.assign(kept=~rejected(manifest)).to_parquet(target / "manifest.parquet")
    return str(target)


def test_slices_without_a_kept_variant_are_their_own_partner(folder, tmp_path, caplog):
    known = {"store_dir": str(folder / "store"), "fold": 0, "image_size": SIZE, "num_classes": 2}
    case = slice_items(folder / "store", 0, "training")[3]["case"]
    synthetic = reject(folder, tmp_path / "some", lambda manifest: manifest.case == case)
    items = training_items(arm="diffboost", synthetic_dir=synthetic, **known)
    (alone,) = [item for item in items if item["case"] == case]
    assert alone["variants"] == [alone["image"]]
    assert all(len(item["variants"]) == 3 for item in items if item is not alone)
    assert f"no variant of 1 of {len(items)} slices; they are trained on as they are" in caplog.text
    left = training_items(arm="synthetic", synthetic_dir=synthetic, **known)
    assert len(left) == len(items) - 1 and case not in {item["case"] for item in left}
    assert "arm 'synthetic' leaves them out" in caplog.text
    none = reject(folder, tmp_path / "none", lambda manifest: manifest.case != "")
    with pytest.raises(ValueError, match="has nothing to train on"):
        training_items(arm="synthetic", synthetic_dir=none, **known)

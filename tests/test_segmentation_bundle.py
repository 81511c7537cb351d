"""The segmentation bundle's configs run: training, evaluation, inference."""

import json
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from PIL import Image
from small_store import AFFINE, IMAGES, VOLUMES, write_case, write_store, write_variants

from diffboost.data.tasks import read_task
from diffboost.data.transforms import case_preprocessing
from diffboost.release.trained import _intensity

BUNDLE = Path(__file__).parents[1] / "bundles" / "diffboost_segmentation"
TRAIN, EVALUATE, INFERENCE = (
    str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "evaluate", "inference")
)
SMALL = {"image_size": 32, "num_classes": 3, "channels": [4, 8, 8], "epochs": 2, "batch_size": 4}
METRICS = ["dice", "precision", "recall", "hd95_mm", "assd_mm", "empty_prediction", "empty_truth"]


def run(config_file, **settings) -> None:
    monai.bundle.run(config_file=config_file, bundle_root=str(BUNDLE), **(SMALL | settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of volumes, its variants, and a trained and evaluated baseline."""
    folder = tmp_path_factory.mktemp("segmentation")
    store = write_store(folder / "store")
    write_variants(store, folder / "synthetic")
    settings = {"store_dir": str(store), "output_dir": str(folder / "run"), "learning_rate": 0.01}
    run(TRAIN, **settings)
    run([TRAIN, EVALUATE], **settings)
    return folder


def train(folder: Path, name: str, **settings) -> dict[str, torch.Tensor]:
    """Weights of a run of its own."""
    settings = {"store_dir": str(folder / "store"), "output_dir": str(folder / name)} | settings
    if settings.get("arm", "").startswith("diffboost"):
        settings["synthetic_dir"] = str(folder / "synthetic")
    run(TRAIN, **settings)
    return weights(folder / name)


def test_training_writes_plain_weights_that_fit_the_network(folder):
    parser = ConfigParser(ConfigParser.load_config_file(TRAIN) | SMALL)
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(weights(folder / "run"), strict=True)
    log = pd.read_csv(folder / "run" / "training_log.csv")
    assert list(log.columns) == ["epoch", "train_loss", "val_dice"]
    assert list(log.epoch) == [1, 2] and np.isfinite(log.train_loss).all()
    assert log.val_dice.between(0, 1).all()
    assert json.loads((folder / "run" / "run.json").read_text())["arm"] == "baseline"
    assert not (folder / "run.partial").exists()


def test_evaluation_scores_every_test_case_in_its_own_geometry(folder):
    table = pd.read_csv(folder / "run" / "metrics.csv")
    assert list(table.columns) == ["case", "label", "metric", "value"]
    cases = ["case_0", "case_3"]  # fold 0
    expected = [(c, label, m) for c in cases for label in ("shell", "core") for m in METRICS]
    assert list(table[["case", "label", "metric"]].itertuples(index=False, name=None)) == expected
    assert np.isfinite(table.value).all()
    for case in cases:
        pred = nib.load(folder / "run" / "predictions" / f"{case}.nii.gz")
        source = nib.load(folder / "store" / "source" / "labelsTr" / f"{case}.nii.gz")
        assert pred.shape == source.shape and np.allclose(pred.affine, source.affine, atol=1e-5)
        assert pred.get_data_dtype() == np.uint8
        found = np.asarray(pred.dataobj)
        truth = np.asarray(source.dataobj) // 100
        assert set(np.unique(found)) <= {0, 1, 2}
        dice = table[(table.case == case) & (table.label == "shell") & (table.metric == "dice")]
        both = ((found == 1) & (truth == 1)).sum()
        by_hand = 2 * both / ((found == 1).sum() + (truth == 1).sum())
        assert dice.value.item() == pytest.approx(by_hand, abs=1e-6)


def test_workers_and_memory_change_no_weight(folder):
    settings = {"alone": {}, "helped": {"num_workers": 2}, "reading": {"cache_gib": 0}}
    alone, helped, reading = (
        train(folder, name, arm="diffboost+nnunet", **knobs) for name, knobs in settings.items()
    )
    assert same(alone, helped) and same(alone, reading)


KNOBS = {
    "arm": "mirror",
    "seed": 1,
    "fold": 1,
    "alpha": 0.1,
    "patch_size": 4,
    "merge": "logits",
    "learning_rate": 0.002,
    "batch_size": 3,
    "min_foreground_px": 200,
    "inner_fraction": 0.5,
    "num_cases": 3,
    "amp": True,
    "channels_last": False,
}


@pytest.fixture(scope="module")
def reference(folder):
    return {arm: train(folder, f"as_it_is_{arm}", arm=arm) for arm in ("baseline", "diffboost")}


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_changes_the_weights(folder, reference, knob):
    arm = "diffboost" if knob in ("alpha", "patch_size", "merge") else "baseline"
    changed = train(folder, f"knob_{knob}", **({"arm": arm} | {knob: KNOBS[knob]}))
    assert not same(changed, reference[arm])


def test_arms_start_from_the_same_weights(folder):
    still = {"learning_rate": 0.0, "epochs": 1}
    arms = [train(folder, f"still_{arm}", arm=arm, **still) for arm in ("baseline", "diffboost")]
    learned = [name for name in arms[0] if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(arms[0][name], arms[1][name]) for name in learned)


def test_another_run_in_the_folder_is_not_replaced(folder):
    train(folder, "taken", epochs=1)
    train(folder, "taken", epochs=1)  # the same again is fine
    with pytest.raises(RuntimeError) as error:
        train(folder, "taken", epochs=1, seed=3)
    message = str(error.value.__cause__ or error.value)
    assert "holds another run (seed 0 instead of 3)" in message


def test_a_run_that_breaks_off_leaves_no_model(folder):
    with pytest.raises(RuntimeError):
        train(folder, "broken", learning_rate=-1.0)
    assert not (folder / "broken" / "model.pt").exists()


def read_inference(**settings) -> ConfigParser:
    parser = ConfigParser(ConfigParser.load_config_file(INFERENCE))
    small = {key: SMALL[key] for key in ("image_size", "num_classes", "channels")}
    parser.update(small | {"device": "$torch.device('cpu')"} | settings)
    return parser


def test_inference_needs_monai_alone():
    assert "diffboost." not in Path(INFERENCE).read_text()


def test_inference_has_the_network_of_training():
    configs = [yaml.safe_load(Path(path).read_text()) for path in (TRAIN, INFERENCE)]
    for key in ("network_def", "network", "channels", "num_classes", "image_size", "device"):
        assert configs[0][key] == configs[1][key]


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (VOLUMES, {}),
        (VOLUMES | {"slice_axis": "sagittal"}, {"slice_axcodes": "ASR"}),
        (VOLUMES | {"slice_axis": "coronal"}, {"slice_axcodes": "RSA"}),
        (VOLUMES | {"channel": 1}, {"channel": 1}),
        (
            VOLUMES | {"intensity": {"policy": "window", "low_hu": 20, "high_hu": 150}},
            {"intensity": "range", "intensity_low": 20, "intensity_high": 150},
        ),
        (
            VOLUMES | {"intensity": {"policy": "percentile", "lower": 2, "upper": 90}},
            {"intensity_low": 2, "intensity_high": 90},
        ),
        (VOLUMES | {"intensity_per": "slice"}, {"intensity": "slice_percentile"}),
        (IMAGES, {}),
        (IMAGES | {"name": "rgb"}, {}),
    ],
)
def test_inference_sees_the_voxels_that_training_saw(tmp_path, task, settings):
    image_name, _ = write_case(tmp_path, task["layout"], "case", seed=0)
    path = tmp_path / image_name
    if task["name"] == "rgb":
        pixels = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    if task.get("channel"):
        volume = np.asarray(nib.load(path).dataobj)
        nib.save(nib.Nifti1Image(np.stack([volume, volume // 2 + 7], axis=-1), AFFINE), path)
    parser = read_inference(dataset_dir=str(path.parent), **settings)
    seen = parser.get_parsed_content("preprocessing")({"image": str(path)})["image"]
    trained = case_preprocessing(read_task(task), 32, False)({"image": str(path)})["image"]
    assert seen.shape == (1, 32, 32, seen.shape[-1])
    assert torch.allclose(seen.as_tensor(), trained.as_tensor(), atol=1e-6)


def test_a_released_model_of_pictures_takes_their_percentiles_whole(tmp_path):
    """In protocol paper it was told to take those of slices, which a picture has none of."""
    task = read_task(IMAGES | {"intensity_per": "slice"})
    knobs = _intensity(task)
    assert knobs["intensity"] == "percentile"
    path = tmp_path / write_case(tmp_path, "pairs", "case", seed=0)[0]
    parser = read_inference(dataset_dir=str(tmp_path), image_size=32, **knobs)
    seen = parser.get_parsed_content("preprocessing")({"image": str(path)})["image"]
    trained = case_preprocessing(task, 32, False)({"image": str(path)})["image"]
    assert torch.allclose(seen.as_tensor(), trained.as_tensor(), atol=1e-6)
    volumes = read_task(VOLUMES | {"intensity_per": "slice"})
    assert _intensity(volumes)["intensity"] == "slice_percentile"


def test_gray_values_do_not_depend_on_the_order_of_a_task_files_keys(tmp_path):
    """They were inverted where the upper limit stood first."""
    path = tmp_path / write_case(tmp_path, "decathlon", "case", seed=0)[0]
    for limits in ({"low": 20, "high": 220}, {"high": 220, "low": 20}):
        task = read_task(VOLUMES | {"intensity": {**limits, "policy": "range"}})
        seen = case_preprocessing(task, 32, False)({"image": str(path)})["image"]
        assert float(seen[0, 0, 0].mean()) < -0.8 and float(seen.max()) > 0.5


def test_percentiles_of_slices_fill_the_range_of_each(tmp_path):
    path = tmp_path / "case.nii.gz"
    volume = np.random.default_rng(0).uniform(0, 1, (20, 24, 5)) * np.arange(1, 6)
    nib.save(nib.Nifti1Image(volume.astype(np.float32), np.eye(4)), path)
    for per in ("volume", "slice"):
        task = read_task(VOLUMES | {"intensity_per": per})
        image = case_preprocessing(task, 32, False)({"image": str(path)})["image"][0]
        tops = image.amax((0, 1))
        assert tops.max() > 0.9
        assert (tops.min() > 0.8) == (per == "slice")
        assert image.abs().max() <= 1 + 1e-5
    with pytest.raises(ValueError, match="intensity_per 'slices'; did you mean 'slice'"):
        read_task(VOLUMES | {"intensity_per": "slices"})


def test_a_nearly_empty_slice_stays_in_range(tmp_path):
    """Its percentiles are equal: MONAI shifted it by them and clipped nothing; it had 199."""
    path = tmp_path / "case.nii.gz"
    volume = np.random.default_rng(0).uniform(0, 1, (40, 40, 3))
    volume[..., 2] = 0
    volume[20:22, 20:22, 2] = 200  # a quarter of a percent
    nib.save(nib.Nifti1Image(volume.astype(np.float32), np.eye(4)), path)
    trained = case_preprocessing(read_task(VOLUMES | {"intensity_per": "slice"}), 40, False)
    parser = read_inference(dataset_dir=str(tmp_path), intensity="slice_percentile", image_size=40)
    for preprocessing in (trained, parser.get_parsed_content("preprocessing")):
        image = preprocessing({"image": str(path)})["image"].as_tensor()[0]
        assert image.amin((0, 1)).tolist() == [-1, -1, -1]
        assert image.amax((0, 1)).tolist() == pytest.approx([1, 1, 1], abs=1e-4)


def test_misspelt_intensity_is_refused(tmp_path):
    with pytest.raises(RuntimeError):
        read_inference(intensity="percentil").get_parsed_content("preprocessing")


def test_inference_without_files_or_with_both_kinds_is_refused(folder, tmp_path):
    settings = {"dataset_dir": str(tmp_path), "model_path": str(folder / "run" / "model.pt")}
    for names in ([], ["a.png", "b.nii.gz"]):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(RuntimeError) as error:
            run(INFERENCE, **settings)
        assert "dataset_dir: .nii, .nii.gz files or .png" in str(error.value.__cause__)


def test_inference_of_volumes_equals_evaluation(folder, tmp_path):
    run(
        INFERENCE,
        dataset_dir=str(folder / "store" / "source" / "imagesTr"),
        output_dir=str(tmp_path),
        model_path=str(folder / "run" / "model.pt"),
    )
    assert len(list(tmp_path.glob("*_seg.nii.gz"))) == 6
    pred = nib.load(tmp_path / "case_3_seg.nii.gz")
    evaluated = nib.load(folder / "run" / "predictions" / "case_3.nii.gz")
    assert np.array_equal(np.asarray(pred.dataobj), np.asarray(evaluated.dataobj))
    assert np.allclose(pred.affine, evaluated.affine) and pred.get_data_dtype() == np.uint8
    assert len(np.unique(np.asarray(pred.dataobj))) >= 2


def test_images_keep_their_rows_and_columns(tmp_path):
    store = write_store(tmp_path / "store", layout="pairs")
    settings = {"store_dir": str(store), "output_dir": str(tmp_path / "run"), "epochs": 12}
    run(TRAIN, learning_rate=0.02, **settings)
    run([TRAIN, EVALUATE], **settings)
    source = tmp_path / "images"
    source.mkdir()
    (store / "source" / "case_0.png").rename(source / "case_0.png")
    run(
        INFERENCE,
        dataset_dir=str(source),
        output_dir=str(tmp_path / "seg"),
        model_path=str(tmp_path / "run" / "model.pt"),
    )
    evaluated = np.asarray(Image.open(tmp_path / "run" / "predictions" / "case_0.png"))
    inferred = np.asarray(Image.open(tmp_path / "seg" / "case_0_seg.png"))
    label = np.asarray(Image.open(store / "source" / "case_0_mask.png")) // 100
    assert evaluated.shape == label.shape == (40, 52) and evaluated.dtype == np.uint8
    assert np.array_equal(evaluated, inferred)
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    dice = table[(table.case == "case_0") & (table.metric == "dice")].value.tolist()
    by_hand = [
        2 * ((evaluated == i) & (label == i)).sum() / ((evaluated == i).sum() + (label == i).sum())
        for i in (1, 2)
    ]
    assert dice == pytest.approx(by_hand, abs=1e-6)
    assert max(dice) > 0.5  # it learned, so rows and columns are not swapped anywhere


def test_epochs_without_validation_have_no_dice(folder):
    train(folder, "interval", epochs=4, val_interval=2)
    log = pd.read_csv(folder / "interval" / "training_log.csv")
    assert log.val_dice.notna().tolist() == [False, True, False, True]


def test_the_shipped_model_is_not_replaced(folder, tmp_path):
    (tmp_path / "models").mkdir()
    shipped = tmp_path / "models" / "model.pt"
    shipped.write_bytes((BUNDLE / "models" / "model.pt").read_bytes())
    before = shipped.read_bytes()
    with pytest.raises(RuntimeError, match="Failed to instantiate") as error:
        run(TRAIN, store_dir=str(folder / "store"), output_dir=str(shipped.parent))
    assert "models holds a model.pt without run.json" in str(error.value.__cause__)
    assert shipped.read_bytes() == before and not (tmp_path / "models.partial").exists()

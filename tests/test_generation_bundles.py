"""The three generator bundles run end to end on a small phantom task."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_backbone
import torch
import yaml
from monai.bundle import run
from PIL import Image

from diffboost.audit.fidelity import correlation
from diffboost.conditions.prompts import STOCK_NEGATIVE_PROMPT
from diffboost.data.slices import read_store
from diffboost.generation.lineage import read_lineage
from diffboost.package import package
from diffboost.prepare import prepare

BUNDLES = Path(__file__).parents[1] / "bundles"
PRETRAIN = BUNDLES / "radimagenet_controlnet_pretrain"
FINETUNE = BUNDLES / "task_finetune"
SYNTHESIS = BUNDLES / "diffboost_synthesis"


def write_study(folder: Path, num_training: int = 4, num_slices: int = 4) -> Path:
    """A folder with the slice store of a small task, and a backbone."""
    phantoms = {"num_training": num_training, "num_slices": num_slices}
    phantoms |= {"num_test": 1, "size_px": 32}
    knobs = {"num_folds": 2, "phantoms": phantoms}
    prepare("phantoms", folder / "store", "phantom_organ", 32, "gradient", **knobs)
    small_backbone.write_backbone(folder / "backbone", zero_convolution_std=0.03)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


def bundle_run(bundle: Path, configs: list[str], **knobs) -> None:
    """One run in this process, as `python -m monai.bundle run` does it."""
    files = [str(bundle / "configs" / f"{name}.yaml") for name in configs]
    run(config_file=files, bundle_root=str(bundle), **knobs)


def finetune(folder: Path, name: str, **knobs) -> Path:
    """A generator after two epochs."""
    settings = {
        "store_dir": str(folder / "store"),
        "backbone": str(folder / "backbone"),
        "output_dir": str(folder / name),
        "image_size": 32,
        "epochs": 2,
        "batch_size": 4,
        "num_copies": 2,
        "device": "cpu",
    }
    bundle_run(FINETUNE, ["train"], **(settings | knobs))
    return folder / name


def synthesize(folder: Path, generator: Path, name: str, **knobs) -> Path:
    """Two variants of every training slice."""
    settings = {
        "store_dir": str(folder / "store"),
        "backbone": str(folder / "backbone"),
        "generator_dir": str(generator),
        "output_dir": str(folder / name),
        "image_size": 32,
        "ratio": 2,
        "num_inference_steps": 2,
        "device": "cpu",
    }
    bundle_run(SYNTHESIS, ["inference"], **(settings | knobs))
    return folder / name


@pytest.fixture(scope="module")
def generator(folder):
    return finetune(folder, "generator")


@pytest.fixture(scope="module")
def synthetic(folder, generator):
    return synthesize(folder, generator, "synthetic")


@contextmanager
def refused(match: str):
    """Expects an error whose message, or that of an error behind it, matches: MONAI wraps ours."""
    with pytest.raises(Exception) as caught:  # noqa: B017
        yield
    messages, error = [], caught.value
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    assert re.search(match, "\n".join(messages)), messages


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def test_finetune_writes_weights_lineage_and_log(folder, generator):
    names = {path.name for path in generator.iterdir()}
    assert names == {"model.pt", "lineage.json", "training_log.csv", "timing.csv", "run.json"}
    log = pd.read_csv(generator / "training_log.csv")
    assert list(log.epoch) == [1, 2] and np.isfinite(log.train_loss).all()
    lineage = json.loads((generator / "lineage.json").read_text())
    hashes = read_store(folder / "store").source_sha256()
    assert lineage["fold"] == 0 and len(lineage["cases"]) == 3  # the fourth is inner validation
    assert all(hashes[case] == sha for case, sha in lineage["cases"].items())
    assert not any(case.startswith("organ_test") for case in lineage["cases"])


def test_only_the_branch_moves_where_the_base_is_frozen(folder, generator):
    branch = weights(finetune(folder, "branch", train_base=False))
    assert {name.split(".")[0] for name in branch} == {"controlnet"}
    assert {name.split(".")[0] for name in weights(generator)} == {"controlnet", "unet"}


def test_loader_workers_change_no_byte(folder, generator):
    other = finetune(folder, "workers", num_workers=2)
    assert (other / "model.pt").read_bytes() == (generator / "model.pt").read_bytes()


def test_knobs_change_the_result(folder, generator):
    reference = weights(generator)
    for name, knobs in {
        "seed": {"seed": 1},
        "rate": {"learning_rate": 1.0e-3},
        "prompt": {"empty_prompt": 1.0},
        "jitter": {"rotation_degrees": 0.0},
        "copies": {"num_copies": 3},
        "ema": {"ema_decay": 0.1},
    }.items():
        changed = weights(finetune(folder, f"knob_{name}", **knobs))
        assert any(not torch.equal(changed[key], reference[key]) for key in reference), name


def test_another_run_is_not_overwritten(folder, generator):
    with refused("holds another run .*epochs 2 instead of 3"):
        finetune(folder, "generator", epochs=3)
    assert json.loads((generator / "run.json").read_text())["epochs"] == 2


def test_synthetic_store_is_whole(folder, synthetic):
    manifest = pd.read_parquet(synthetic / "manifest.parquet")
    assert len(manifest) == 3 * 4 * 2 and manifest.kept.all()
    assert sorted(manifest.image) == sorted(
        f"images/{path.name}" for path in (synthetic / "images").iterdir()
    )
    assert set(manifest.phrase) == {"higher contrast", "lower contrast"}
    image = Image.open(synthetic / manifest.image[0])
    assert np.asarray(image).shape == (32, 32) and np.asarray(image).dtype == np.uint16
    assert image.text["diffboost:prompt"] == manifest.prompt[0]
    assert image.text["diffboost:model_sha256"] == manifest.model_sha256[0]
    assert (synthetic / "contact_sheet.png").stat().st_size > 1000
    agreement = json.loads((synthetic / "edge_agreement.json").read_text())
    assert agreement["n"] == 24 and -1 <= agreement["own"] <= 1 and agreement["edges"] == "gradient"
    assert not (folder / "synthetic.partial").exists()


def test_variants_depend_on_neither_batch_nor_ratio(folder, generator, synthetic):
    more = synthesize(folder, generator, "more", ratio=3, batch_size=5)
    for path in (synthetic / "images").iterdir():
        first, second = (
            np.asarray(Image.open(p)).astype(int) for p in (path, more / "images" / path.name)
        )
        assert abs(first - second).max() <= 32  # of 65535: sums in another order


def test_sampling_knobs_change_the_variants(folder, generator, synthetic):
    name = next((synthetic / "images").iterdir()).name
    reference = np.asarray(Image.open(synthetic / "images" / name)).astype(int)
    for knob, value in {
        "seed": 1,
        "scheduler": "ddim",
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "control_scale": 0.0,
        "prompt_weights": {"prompt": 0.1, "phrase": 0.9},
        "noise_address": "variant",
    }.items():
        changed = synthesize(folder, generator, f"sampling_{knob}", **{knob: value})
        image = np.asarray(Image.open(changed / "images" / name)).astype(int)
        assert abs(image - reference).max() > 0, knob


def test_paper_sampling_overlay(folder, generator):
    files = [str(SYNTHESIS / "configs" / f"{n}.yaml") for n in ("inference", "paper_sampling")]
    knobs = {"store_dir": str(folder / "store"), "backbone": str(folder / "backbone")}
    knobs |= {"generator_dir": str(generator), "output_dir": str(folder / "paper")}
    run(config_file=files, ratio=1, image_size=32, device="cpu", **knobs)
    manifest = pd.read_parquet(folder / "paper" / "manifest.parquet")
    assert manifest.scheduler[0] == "ddim" and manifest.num_inference_steps[0] == 20
    assert manifest.guidance_scale[0] == 9.0 and manifest.phrase_weight[0] == 0.005
    assert manifest.negative_prompt[0] == STOCK_NEGATIVE_PROMPT


def test_guidance_leads_away_from_the_empty_prompt_unless_another_is_given(folder, generator):
    knobs = {"guidance_scale": 5.0, "ratio": 1, "num_inference_steps": 2}
    stores = [
        synthesize(folder, generator, name, **knobs | given)
        for name, given in (
            ("guided", {}),
            ("guided_empty", {"negative_prompt": ""}),
            ("guided_stock", {"negative_prompt": STOCK_NEGATIVE_PROMPT}),
        )
    ]
    name = next((stores[0] / "images").iterdir()).name
    images = [np.asarray(Image.open(store / "images" / name)).astype(int) for store in stores]
    assert (images[0] == images[1]).all() and abs(images[0] - images[2]).max() > 0
    assert pd.read_parquet(stores[0] / "manifest.parquet").negative_prompt.unique() == [""]


def test_generator_of_another_fold_is_refused(folder, generator):
    with refused("fold: 1, but the generator .* fold 0"):
        synthesize(folder, generator, "leak", fold=1)
    assert not (folder / "leak").exists()


def evaluate(folder: Path, generator: Path, **knobs) -> dict:
    """Loss of a generator on the inner validation slices."""
    settings = {"store_dir": str(folder / "store"), "backbone": str(folder / "backbone")}
    settings |= {"output_dir": str(generator), "image_size": 32, "batch_size": 4, "device": "cpu"}
    bundle_run(FINETUNE, ["train", "evaluate"], **(settings | knobs))
    return json.loads((generator / "validation.json").read_text())


def test_a_generator_is_judged_on_its_own_backbone_and_objective(folder, generator):
    """Another one gave a loss that looked as good."""
    found = evaluate(folder, generator)
    assert found["precision"] == "float32"
    assert found["backbone_sha256"] == read_lineage(generator / "lineage.json")["backbone_sha256"]
    other = small_backbone.write_backbone(folder / "other_backbone", 0.03, seed=1)
    with refused("was trained on backbone .*not on backbone: .*other_backbone"):
        evaluate(folder, generator, backbone=other)
    with refused("objective: 'flow', but .* predicts 'noise'"):
        evaluate(folder, generator, objective="flow")


def test_drawings_of_images_that_changed_are_another_run(folder, generator, tmp_path):
    """Old drawings stayed beside the edges of the new images."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 40, 40), dtype=np.uint8)
    for name, image in zip("ab", pixels, strict=True):
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
    settings = {"dataset_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "drawings")}
    settings |= {"backbone": str(folder / "backbone"), "generator_dir": str(generator)}
    settings |= {"image_size": 32, "edges": "gradient", "num_inference_steps": 1, "device": "cpu"}
    bundle_run(FINETUNE, ["inference"], **settings)
    assert len(list((tmp_path / "drawings" / "images").iterdir())) == 2
    bundle_run(FINETUNE, ["inference"], **settings)  # the same once more
    Image.fromarray(pixels[0]).save(tmp_path / "images" / "b.png")
    with refused(r"holds another run \(images_sha256"):
        bundle_run(FINETUNE, ["inference"], **settings)


def test_the_release_of_a_generator_draws_from_the_edges_of_its_training(folder, tmp_path):
    """It had the bundle's own, whatever the store had."""
    run_dir = finetune(folder, "released", backbone="tiny", epochs=1)
    terms = tmp_path / "terms.txt"
    terms.write_text("ours alone\n")
    made = package(str(FINETUNE), str(tmp_path / "dist"), str(run_dir), str(terms))
    config = yaml.safe_load((made / "configs" / "inference.yaml").read_text())
    assert (config["edges"], config["hed_size_px"]) == ("gradient", None)


def test_missing_generator_says_who_writes_it(folder):
    with refused("has no model.pt; task_finetune"):
        synthesize(folder, folder / "nowhere", "nothing")


def test_pretraining_from_nothing_to_a_backbone(folder):
    tree = folder / "tree"
    prepare(
        "phantoms",
        tree,
        "radimagenet",
        32,
        "gradient",
        num_folds=1,
        phantoms={"num_images": 8, "image_size_px": 32},
    )
    common = {"store_dir": str(tree), "image_size": 32, "batch_size": 4, "device": "cpu"}
    bundle_run(
        PRETRAIN,
        ["train_autoencoder"],
        backbone=str(folder / "backbone"),
        epochs=1,
        output_dir=str(folder / "autoencoder"),
        **common,
    )
    backbone = folder / "autoencoder" / "backbone"
    bundle_run(
        PRETRAIN,
        ["train"],
        backbone=str(backbone),
        train_base=True,
        epochs=1,
        output_dir=str(folder / "pretrained"),
        **common,
    )
    bundle_run(
        PRETRAIN,
        ["export"],
        backbone=str(backbone),
        output_dir=str(folder / "exported"),
        generator_dir=str(folder / "pretrained"),
    )
    scale = json.loads((folder / "exported/vae/config.json").read_text())["scaling_factor"]
    assert scale != 0.18215 and scale > 0
    lineage = read_lineage(folder / "exported/lineage.json")
    assert len(lineage["cases"]) == 8 and len(lineage["ancestors"]) == 1
    generator = finetune(folder, "next", backbone=str(folder / "exported"))
    assert read_lineage(generator / "lineage.json")["ancestors"] == [lineage]


def test_correlation_by_hand():
    ramp = np.array([[0.0, 1.0], [2.0, 3.0]])
    assert correlation(ramp, 2 * ramp + 1) == pytest.approx(1.0)
    assert correlation(ramp, -ramp) == pytest.approx(-1.0)
    assert np.isnan(correlation(ramp, np.ones((2, 2))))

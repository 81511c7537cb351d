"""Table 1: Pix2Pix, the metrics of image quality, and the comparison of both generators."""

import json
import math
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import small_backbone
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, run
from PIL import Image

from diffboost.audit.image_quality import METRICS, image_quality, scale_weights
from diffboost.audit.table1 import held_out_items, refuse_seen_images
from diffboost.data.slices import read_store, slice_items
from diffboost.generation.backbones import backbone_sha256
from diffboost.generation.lineage import write_lineage
from diffboost.generation.pix2pix import (
    DiscriminatorLoss,
    EdgeTranslator,
    GeneratorLoss,
    PairInferer,
    WeightedL1Loss,
    load_translator,
)
from diffboost.prepare import prepare

BUNDLE = Path(__file__).parents[1] / "bundles" / "radimagenet_controlnet_pretrain"
SMALL = {"image_size": 32, "device": "cpu"}
NARROW = {"channels": [4, 8, 8], "discriminator_channels": 4}


def write_tree_store(folder: Path, num_images: int, held_out: float, seed: int = 0) -> str:
    """A store of small phantoms with edges by gradient."""
    prepare(
        "phantoms",
        folder,
        "radimagenet",
        32,
        "gradient",
        num_folds=1,
        seed=seed,
        validation_fraction=held_out,
        phantoms={"num_images": num_images, "image_size_px": 32},
    )
    return str(folder)


def command(config: str, **knobs) -> None:
    """`python -m monai.bundle run` in a process of its own."""
    words = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", str(BUNDLE)]
    words += ["--config_file", str(BUNDLE / "configs" / f"{config}.yaml")]
    for key, value in (SMALL | knobs).items():
        words += [f"--{key}", str(value)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def here(config: str, **knobs) -> None:
    """The same run in this process."""
    path = str(BUNDLE / "configs" / f"{config}.yaml")
    run(config_file=path, bundle_root=str(BUNDLE), **(SMALL | knobs))


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of 24 phantoms, a third of them held out, a backbone and a Pix2Pix of two epochs."""
    folder = tmp_path_factory.mktemp("table1")
    write_tree_store(folder / "store", 24, 0.33)
    small_backbone.write_backbone(folder / "backbone", zero_convolution_std=0.03)
    knobs = {"store_dir": folder / "store", "output_dir": folder / "pix2pix"}
    command("train_pix2pix", epochs=2, batch_size=4, **NARROW, **knobs)
    return folder


def evaluate(folder: Path, name: str, start=here, **knobs) -> Path:
    """A comparison of the backbone's own branch with Pix2Pix."""
    paths = {"store_dir": "store", "backbone": "backbone", "pix2pix_dir": "pix2pix"}
    paths = {key: str(folder / path) for key, path in paths.items()}
    knobs = {"output_dir": str(folder / name), "num_inference_steps": 2} | knobs
    start("evaluate", **(paths | knobs))
    return folder / name


@pytest.fixture(scope="module")
def table1(folder):
    return evaluate(folder, "table1", start=command)


def held_out(folder: Path) -> pd.DataFrame:
    index = read_store(folder / "store").index
    return index[index.section == "test"]


def constant(value: float, side_px: int = 64) -> torch.Tensor:
    """An image of one intensity in [0, 1], given in [-1, 1]."""
    return torch.full((1, 1, side_px, side_px), 2 * value - 1)


def test_metrics_of_constant_images_by_hand():
    quality = image_quality(constant(0.25), constant(0.75))
    luminance = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)  # structure is 1
    expected = {"MAE": 0.5, "MSE": 0.25, "RMSE": 0.5, "SSIM": luminance}
    expected["MS-SSIM"] = luminance ** (0.3001 / (0.0448 + 0.2856 + 0.3001))  # coarsest of three
    assert tuple(quality) == METRICS
    for name, value in expected.items():
        assert quality[name] == pytest.approx([value], abs=1e-3), name  # SSIM is in float32


def test_metrics_of_equal_and_of_half_wrong_images():
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wrong = image.clone()
    wrong[1] = -1
    wrong[1, :, :32] = 1
    real = torch.stack([image[0], torch.full((1, 64, 64), -1.0)])
    quality = image_quality(wrong, real)
    for name, (equal, half) in {"MAE": (0, 0.5), "MSE": (0, 0.5), "RMSE": (0, 0.5**0.5)}.items():
        assert quality[name] == pytest.approx([equal, half], abs=1e-9), name
    assert quality["SSIM"][0] == pytest.approx(1) and quality["MS-SSIM"][0] == pytest.approx(1)
    assert quality["SSIM"][1] < 0.6


def test_scales_of_ms_ssim_fit_the_image():
    standard = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    assert scale_weights(256) == scale_weights(176) == standard
    for side_px, count in {175: 4, 99: 4, 98: 3, 64: 3, 43: 2, 21: 1, 11: 1}.items():
        weights = scale_weights(side_px)
        assert len(weights) == count and math.isclose(sum(weights), 1)
        assert weights[0] == pytest.approx(standard[0] / sum(standard[:count]))
        image = constant(0.5, side_px)
        assert image_quality(image, image)["MS-SSIM"] == pytest.approx([1])
    with pytest.raises(ValueError, match="image_size: 10 px"):
        scale_weights(10)


def test_losses_by_hand():
    undecided, sure = torch.zeros(2, 1, 3, 3), torch.full((2, 1, 3, 3), 20.0)
    assert GeneratorLoss()(undecided).item() == pytest.approx(math.log(2))
    assert GeneratorLoss()(sure).item() == pytest.approx(0, abs=1e-6)
    assert DiscriminatorLoss()(undecided, undecided).item() == pytest.approx(math.log(2))
    assert DiscriminatorLoss()(sure, undecided).item() == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert DiscriminatorLoss()(sure, -sure).item() == pytest.approx(0, abs=1e-6)
    assert WeightedL1Loss(100)(undecided, undecided + 0.5).item() == pytest.approx(50)


def test_translator_gives_images_and_names_sizes_that_do_not_fit():
    network = EdgeTranslator([4, 8, 8])
    image = network(torch.rand(2, 1, 32, 32))
    assert image.shape == (2, 1, 32, 32) and image.abs().max() <= 1
    alone = network(torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(alone).all()
    for side_px in (30, 4):
        with pytest.raises(ValueError, match=f"image_size: {side_px} px.*3 levels.*multiple of 4"):
            network(torch.rand(1, 1, side_px, side_px))


def test_both_networks_learn_and_the_discriminator_sees_edge_and_image(folder, tmp_path):
    knobs = {"store_dir": str(folder / "store"), "output_dir": str(tmp_path / "run")}
    config = ConfigParser.load_config_file(str(BUNDLE / "configs" / "train_pix2pix.yaml"))
    parser = ConfigParser(config | SMALL | NARROW | knobs | {"epochs": 1, "batch_size": 4})
    networks = {key: parser.get_parsed_content(key) for key in ("network", "discriminator")}
    before = {key: [p.detach().clone() for p in net.parameters()] for key, net in networks.items()}
    seen = {key: [] for key in networks}
    for key, net in networks.items():
        net.register_forward_pre_hook(lambda _, inputs, key=key: seen[key].append(inputs[0]))
    batches = []
    trainer = parser.get_parsed_content("train::trainer")
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: batches.append(engine.state.batch)
    )
    trainer.run()
    for key, net in networks.items():
        moved = [not torch.equal(a, b) for a, b in zip(before[key], net.parameters(), strict=True)]
        assert all(moved), key
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    last = networks["network"].state_dict()
    assert all(torch.equal(saved[name], value) for name, value in last.items())
    assert len(batches) == (24 - len(held_out(folder))) // 4 > 1
    for step, batch in enumerate(batches):
        assert torch.equal(seen["network"][step], batch["edge"])
        fake, real, fake_again = seen["discriminator"][3 * step : 3 * step + 3]
        assert all(torch.equal(pair[:, :1], batch["edge"]) for pair in (fake, real, fake_again))
        assert torch.equal(real[:, 1:], batch["image"])
        assert torch.equal(fake, fake_again) and not torch.equal(fake, real)


def test_training_writes_weights_log_and_settings(folder):
    names = {path.name for path in (folder / "pix2pix").iterdir()}
    assert names >= {"model.pt", "training_log.csv", "run.json"}
    log = pd.read_csv(folder / "pix2pix" / "training_log.csv")
    losses = ["reconstruction_loss", "generator_loss", "discriminator_loss"]
    assert list(log) == ["epoch", *losses] and list(log.epoch) == [1, 2]
    assert log.reconstruction_loss[1] < log.reconstruction_loss[0]
    assert load_translator(str(folder / "pix2pix"))(torch.rand(1, 1, 32, 32)).shape[-1] == 32


def test_loader_workers_change_no_byte(folder, tmp_path):
    for workers in (0, 2):
        knobs = {"store_dir": str(folder / "store"), "output_dir": str(tmp_path / f"w{workers}")}
        here("train_pix2pix", epochs=1, batch_size=4, num_workers=workers, **NARROW, **knobs)
    first, second = (tmp_path / name / "model.pt" for name in ("w0", "w2"))
    assert first.read_bytes() == second.read_bytes()


def test_comparison_writes_its_files(folder, table1):
    names = {path.name for path in table1.iterdir()}
    files = {"image_quality.csv", "table1.csv", "table1.md", "table1.png", "run.json", "images"}
    assert names == files and not table1.with_name("table1.partial").exists()
    rows = held_out(folder)
    quality = pd.read_csv(table1 / "image_quality.csv")
    assert set(quality.case) == set(rows.case) and len(rows) > 1
    assert len(quality) == len(rows) * 2 * 5 and np.isfinite(quality.value).all()
    assert not quality.duplicated(["case", "slice", "method", "metric"]).any()
    width, height = Image.open(table1 / "table1.png").size
    assert width > 600 and height > width  # four columns, six rows
    text = (table1 / "table1.md").read_text(encoding="utf-8")
    assert "0.0873 ± 0.0363" in text and "another data set" in text and "over 2 scales" in text


def test_table_is_the_aggregate_of_the_images(table1):
    quality = pd.read_csv(table1 / "image_quality.csv")
    table = pd.read_csv(table1 / "table1.csv")
    text = (table1 / "table1.md").read_text(encoding="utf-8")
    assert len(table) == 10
    for row in table.to_dict("records"):
        chosen = (quality.method == row["method"]) & (quality.metric == row["metric"])
        values = quality.value[chosen].to_numpy()
        assert row["n"] == len(values)
        assert row["mean"] == pytest.approx(values.mean())
        assert row["sd"] == pytest.approx(values.std(ddof=1))
        assert f"{row['mean']:.4f} ± {row['sd']:.4f}" in text


def test_quality_is_that_of_the_written_images(folder, table1):
    quality = pd.read_csv(table1 / "image_quality.csv")
    items = slice_items(folder / "store", fold=0, part="test", inner_fraction=0)
    for number, item in enumerate(items):
        real = np.asarray(Image.open(item["image"]).convert("F")) / 255
        for method in ("Pix2Pix", "Ours"):
            path = table1 / "images" / method / f"{number:06d}.png"
            image = np.asarray(Image.open(path)).astype(float) / 65535
            chosen = (quality.case == item["case"]) & (quality.method == method)
            values = quality[chosen].set_index("metric").value
            assert values["MAE"] == pytest.approx(abs(image - real).mean(), abs=2e-6)
            assert values["RMSE"] == pytest.approx(values["MSE"] ** 0.5, abs=2e-6)


def read_images(table1: Path) -> np.ndarray:
    paths = sorted((table1 / "images").rglob("*.png"))
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


def test_batches_do_not_change_the_images_but_knobs_do(folder, table1):
    same = evaluate(folder, "batches", batch_size=3, num_rows=1)
    assert abs(read_images(same) - read_images(table1)).max() <= 32  # of 65535: order of sums
    for knob, value in {"seed": 1, "control_scale": 0.0, "guidance_scale": 5.0}.items():
        other = evaluate(folder, f"knob_{knob}", num_rows=1, **{knob: value})
        assert abs(read_images(other) - read_images(table1)).max() > 32, knob
    few = evaluate(folder, "few", num_images=2, num_rows=1)
    assert len(read_images(few)) == 4


def test_bad_input_is_named(folder, tmp_path):
    with refused("pix2pix_dir: .*nowhere has no model.pt; train_pix2pix.yaml"):
        evaluate(folder, "bad", pix2pix_dir=str(folder / "nowhere"))
    with refused("num_images: 0 is not 1 or more"):
        evaluate(folder, "bad", num_images=0)
    with refused("part: 'tset'; allowed"):
        evaluate(folder, "bad", part="tset")
    store = write_tree_store(tmp_path / "all", 4, 0.0)
    with refused("part: 'test', but .* holds no image out; .*validation_fraction above 0"):
        evaluate(folder, "bad", store_dir=store)
    assert not (folder / "bad").exists()


def test_generator_of_another_backbone_is_refused(folder, tmp_path):
    lineage = {"backbone": "sd15", "backbone_sha256": "0" * 64, "train_base": False, "cases": {}}
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    torch.save({}, tmp_path / "model.pt")
    with refused("generator_dir: .*was trained on backbone 'sd15' .*not on backbone: .*backbone'"):
        evaluate(folder, "bad", generator_dir=str(tmp_path))
    with refused("was trained on backbone None"):
        evaluate(folder, "bad", generator_dir=str(folder / "pix2pix"))
    with refused("pix2pix_dir: .*holds a model of another training"):
        (tmp_path / "run.json").write_text("{}")
        evaluate(folder, "bad", pix2pix_dir=str(tmp_path))


def test_images_that_a_training_saw_are_refused(folder, tmp_path):
    lineage = json.loads((folder / "pix2pix" / "lineage.json").read_text())
    rows = held_out(folder)
    assert len(lineage["cases"]) == 24 - len(rows) and not set(lineage["cases"]) & set(rows.case)
    seen = rows.iloc[1]
    table = pa.table({"case": ["x"], "sha256": [seen.sha256]})  # as lineages of many cases are
    generator = {"cases": {}, "ancestors": [{"cases": table}]}
    generator["backbone_sha256"] = backbone_sha256(str(folder / "backbone"))
    write_lineage(tmp_path / "lineage.json", generator)
    torch.save({}, tmp_path / "model.pt")
    with refused(f"1 of {len(rows)} images, such as {seen.case}, .*training of generator_dir"):
        evaluate(folder, "bad", generator_dir=str(tmp_path))
    items = held_out_items(str(folder / "store"), "training", None, 0)
    arguments = (None, str(folder / "pix2pix"), str(folder / "backbone"))
    refuse_seen_images(items, "training", *arguments)  # nobody said that these are held out
    with pytest.raises(ValueError, match=f"{len(items)} of {len(items)} .*training of pix2pix_dir"):
        refuse_seen_images(items, "test", *arguments)
    assert not (folder / "bad.partial").exists()


def test_another_comparison_is_not_overwritten(folder, table1):
    with refused("holds another run .*seed 0 instead of 7"):
        evaluate(folder, "table1", seed=7)


def test_pair_is_edge_first():
    seen = []

    def network(pair):
        seen.append(pair)
        return [None, pair.sum(dim=1)]

    edge, image = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    logits = PairInferer()(image, network, edge=edge)
    assert torch.equal(seen[0], torch.cat([edge, image], dim=1)) and logits.sum() == 4

"""Copies of training images are found however they are changed; the audit says what it measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_backbone
import small_store
import torch
from PIL import Image
from scipy import ndimage, stats

from diffboost.audit.commands import memorization
from diffboost.audit.copies import CopySearch, in_place
from diffboost.audit.held_out import REASON
from diffboost.audit.memorization import membership_gap, own_threshold, tail_threshold
from diffboost.audit.memorization_figure import lay_onto
from diffboost.audit.planting import KINDS, draw_kinds, plant_copy
from diffboost.data.slices import read_store, slice_items, write_image
from diffboost.generation.lineage import copy_lineage, write_lineage
from diffboost.generation.networks import ControlledUNet
from diffboost.generation.saving import trace_lineage
from diffboost.generation.variant_facts import variant_facts
from diffboost.handlers import save_weights

SIZE = 32


def grain(seed: int) -> np.ndarray:
    """Smooth and fine noise in [-1, 1]: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    total = sum(ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), s) * s for s in (1, 2, 4))
    return (2 * (total - total.min()) / np.ptp(total) - 1).astype(np.float32)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A store of 24 cases in 3 folds, and an untrained generator that says it saw fold 0's."""
    folder = tmp_path_factory.mktemp("study")
    store = small_store.write_store(folder / "store", 24, "pairs", SIZE)
    for number, name in enumerate(read_store(store).index.image):
        write_image(store / name, grain(number))
    backbone = small_backbone.write_backbone(folder / "backbone", zero_convolution_std=0.03)
    save_weights(ControlledUNet(backbone), folder / "generator" / "model.pt")
    items = slice_items(str(store), 0, "training")
    lineage = trace_lineage(str(store), items, backbone, False, fold=0)
    write_lineage(folder / "generator" / "lineage.json", lineage)
    return folder


def write_variants(study, folder, pixels: dict) -> None:
    """A synthetic store with a variant of every training slice: its ``pixels`` or new grain."""
    sampler = {"scheduler": "unipc", "num_inference_steps": 1, "guidance_scale": 1.0}
    facts = variant_facts(
        str(study / "generator"), str(study / "backbone"), seed=3, noise_address="case",
        guidance_interval=(0, 1), control_scale=1.0, control_interval=(0, 1), decoder=None,
        prompt_weights={"prompt": 1.0}, precision="float32", batch_size=4, image_size=SIZE,
        license="test",
        **sampler,
    )  # fmt: skip
    copy_lineage(study / "generator", folder)
    (folder / "images").mkdir()
    rows = []
    for number, item in enumerate(slice_items(str(study / "store"), 0, "training")):
        image = f"images/{item['case']}_0000_000.png"
        write_image(folder / image, pixels.get(item["case"], grain(1000 + number)))
        rows.append({"image": image, "case": item["case"], "slice": 0, "variant": 0} | facts)
    pd.DataFrame(rows).assign(kept=True, reason="").to_parquet(folder / "manifest.parquet")


@pytest.fixture(scope="module")
def audited(study):
    """A store with two copies of one training image, and the audit's folder, exit code and log."""
    cases = slice_items(str(study / "store"), 0, "training").cases()
    original = grain(int(cases[0].split("_")[1]))
    rng = np.random.default_rng(0)
    planted = {
        cases[1]: plant_copy(original, ["turned", "gamma"], rng),
        cases[2]: plant_copy(original, ["mirrored", "noisy"], rng),
        cases[3]: grain(int(cases[3].split("_")[1])),  # of its own source
    }
    folder = study / "synthetic"
    folder.mkdir()
    write_variants(study, folder, planted)
    with pytest.raises(SystemExit) as exit_:
        memorization(
            str(folder), str(study / "store"), str(study / "generator"), num_planted=12,
            num_held_out=4, device="cpu",
        )  # fmt: skip
    return folder, cases, exit_.value.code


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_any_kind_is_found_and_strangers_are_not(kind):
    images = torch.from_numpy(np.stack([grain(number) for number in range(12)]))[:, None]
    names = [f"case_{number}" for number in range(12)]
    search = CopySearch(images, names, names)
    rng = np.random.default_rng(1)
    for number in (2, 7):
        copy = plant_copy(images[number, 0].numpy(), [kind], rng)
        assert copy.shape == (SIZE, SIZE) and copy.dtype == np.float32 and abs(copy).max() <= 1
        assert np.abs(copy - images[number, 0].numpy()).max() > 0.005
        match = search.nearest(torch.from_numpy(copy)[None])
        assert match.row == number and match.likeness > 0.65
        other = search.nearest(torch.from_numpy(copy)[None], names[number])
        assert other.row != number and other.likeness < 0.5


def test_a_copy_is_laid_onto_its_original():
    images = torch.from_numpy(np.stack([grain(number) for number in range(3)]))[:, None]
    search = CopySearch(images, ["a", "b", "c"], ["a", "b", "c"])
    match = search.nearest(images[1].flip(2))
    laid = lay_onto(images[1].flip(2), match.map)
    assert (laid - images[1])[:, 2:-2, 2:-2].abs().mean() < 0.05
    torch.testing.assert_close(in_place(images, images), torch.ones(3))


def test_images_of_a_group_must_stand_together():
    images = torch.zeros(3, 1, SIZE, SIZE)
    with pytest.raises(ValueError, match="groups: the images of one do not stand together"):
        CopySearch(images, ["a", "b", "c"], ["x", "y", "x"])
    with pytest.raises(ValueError, match="images of two patients"):
        CopySearch(images, ["a", "b", "c"], ["x", "x", "x"])


def test_planting_is_drawn_by_its_generator():
    drawn = [draw_kinds(np.random.default_rng(seed)) for seed in range(200)]
    assert {len(kinds) for kinds in drawn} == {1, 2, 3}
    assert {kind for kinds in drawn for kind in kinds} == set(KINDS)
    twice = [plant_copy(grain(0), drawn[5], np.random.default_rng(8)) for _ in range(2)]
    np.testing.assert_array_equal(*twice)


def test_threshold_is_the_tail_of_a_gumbel_law():
    values = stats.gumbel_r.rvs(0.3, 0.05, size=5000, random_state=0)
    assert tail_threshold(values, 0.01) == pytest.approx(0.3 + 0.05 * 4.600, abs=0.01)
    assert tail_threshold(values, 0.001) > tail_threshold(values, 0.01)


def test_threshold_of_own_sources_is_the_tail_of_a_normal_law_of_z():
    values = np.tanh(stats.norm.rvs(0.4, 0.1, size=5000, random_state=0))
    assert own_threshold(values, 0.01) == pytest.approx(np.tanh(0.4 + 0.1 * 2.326), abs=0.01)


def test_membership_gap_by_hand():
    training, held_out = pd.Series([0.8, 0.9, 0.7, 0.8]), pd.Series([0.5, 0.6, 0.4])
    found = membership_gap(training, held_out)
    assert found["gap"] == pytest.approx(0.3) and found["auc"] == 1
    assert 0.15 < found["ci95"][0] < 0.3 < found["ci95"][1] < 0.45
    assert found["cases"] == [4, 3]
    assert membership_gap(training, held_out[:1])["ci95"] is None


def test_copies_of_other_patients_are_named_and_end_with_code_1(audited):
    folder, cases, code = audited
    figures = json.loads((Path(f"{folder}.memorization") / "memorization.json").read_text())
    table = pd.read_csv(Path(f"{folder}.memorization") / "memorization.csv").set_index("case")
    assert code == 1 and len(table) == len(cases) == figures["variants"]
    assert set(table.index[table["copy"]]) == {cases[1], cases[2]}
    assert set(table.nearest_case[table["copy"]]) == {cases[0]}
    assert figures["verdict"].startswith("2 of 13 variants are copies of another patient")
    copies = figures["copies"]
    assert 0.3 < copies["threshold"] < 0.65
    assert copies["false_alarms"]["real_pairs"] == [0, 13]
    assert copies["recall"]["of"] == 12 and copies["recall"]["found"] >= 11
    assert sum(total for _, total in copies["recall"]["by_kind"].values()) > 12


def test_own_sources_are_judged_by_held_out_variants(audited):
    folder, cases, _ = audited
    figures = json.loads((Path(f"{folder}.memorization") / "memorization.json").read_text())
    table = pd.read_csv(Path(f"{folder}.memorization") / "memorization.csv").set_index("case")
    assert list(table.index[table.own_copy]) == [cases[3]]
    assert table.source_likeness[cases[3]] > 0.99 and table.source_ssim[cases[3]] > 0.99
    assert figures["own_source"]["beyond_edges"] == 1
    gap = figures["membership"]["likeness"]
    assert figures["membership"]["parts"] == ["inner_validation", "test"]
    assert gap["gap"] == pytest.approx(gap["training"] - gap["held_out"])
    assert gap["ci95"][0] < gap["gap"] < gap["ci95"][1] and gap["cases"] == [13, 7]
    assert any("too few" in note for note in figures["notes"])


def test_held_out_variants_are_marked_and_made_once(audited, study):
    folder, cases, _ = audited
    held_out = Path(f"{folder}.memorization") / "held_out"
    manifest = pd.read_parquet(held_out / "manifest.parquet")
    assert len(manifest) == 7 and not set(manifest.case) & set(cases)
    assert not manifest.kept.any() and set(manifest.reason) == {REASON}
    assert set(manifest.seed) == {3} and set(manifest.num_inference_steps) == {1}
    with Image.open(held_out / manifest.image[0]) as file:
        assert file.text["diffboost:purpose"] == REASON and file.size == (SIZE, SIZE)
    made = {path: path.stat().st_mtime_ns for path in (held_out / "images").iterdir()}
    places = (str(folder), str(study / "store"), str(study / "generator"))
    with pytest.raises(SystemExit):
        memorization(*places, num_planted=6, num_held_out=4, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in (held_out / "images").iterdir()} == made


def test_the_picture_shows_distributions_and_pairs(audited):
    with Image.open(Path(f"{audited[0]}.memorization") / "memorization.png") as file:
        assert file.size[0] == 1320 and file.size[1] > 900
        assert len(set(np.asarray(file.convert("L")).ravel())) > 50


def test_honest_variants_pass_and_silent_guards_say_so(study, tmp_path, caplog):
    caplog.set_level("INFO")
    write_variants(study, tmp_path, {})
    memorization(
        str(tmp_path), str(study / "store"), output_dir=str(tmp_path / "audit"), num_variants=5,
        num_planted=6,
    )  # fmt: skip
    assert "no copy of another patient in 5 variants; membership gap not measured" in caplog.text
    assert "note: 5 of 13 variants were looked at" in caplog.text
    assert "note: no generator at hand" in caplog.text
    assert not (tmp_path / "audit" / "held_out").exists()
    table = pd.read_csv(tmp_path / "audit" / "memorization.csv")
    assert len(table) == 5 and table.own_copy.isna().all()


def test_another_generator_or_store_is_refused(study, tmp_path):
    write_variants(study, tmp_path, {})
    other = tmp_path / "other"
    shutil.copytree(study / "generator", other)
    state = torch.load(other / "model.pt", weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, other / "model.pt")
    store = str(study / "store")
    with pytest.raises(SystemExit, match="generator_dir: .* the synthetic store was made by"):
        memorization(str(tmp_path), store, str(other), num_planted=6, device="cpu")
    lineage = tmp_path / "lineage.json"
    lineage.write_text(json.dumps({"cases": {"case_0": "f" * 64}, "ancestors": [], "fold": 0}))
    with pytest.raises(SystemExit, match="has none of the cases"):
        memorization(str(tmp_path), store, num_planted=6)

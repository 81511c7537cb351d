"""Deformed anatomy: edges and label move together, and everything downstream knows the label."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_backbone
import torch
from monai.bundle import run
from small_store import write_store, write_variants
from torchrun import bundle_settings

from diffboost.audit.consistency import measure_slice_consistency
from diffboost.audit.provenance import audit_provenance
from diffboost.audit.quality import items_of
from diffboost.client_training import _with_variants
from diffboost.conditions.edges import mask_edges
from diffboost.data.images import read_levels
from diffboost.data.slices import slice_items, write_label
from diffboost.generation.deformation import deform_items, deform_slice
from diffboost.generation.sampling import variant_noise
from diffboost.segmentation.augmentations import augmentation
from diffboost.segmentation.merging import PickVariantd, variants_by_slice
from diffboost.segmentation.training import training_items


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of four phantoms, an untrained generator, and deformed variants."""
    folder = small_backbone.write_study(tmp_path_factory.mktemp("deformation"), num_slices=3)
    synthesize(folder, "deformed", deformation_px=4.0, deformation_spacing_px=8)
    return folder


def synthesize(folder, name, **knobs):
    paths = {"store_dir": "store", "backbone": "backbone", "generator_dir": "generator"}
    settings = {key: str(folder / value) for key, value in (paths | {"output_dir": name}).items()}
    settings |= {"image_size": 32, "ratio": 2, "num_inference_steps": 1, "batch_size": 5}
    settings |= {"device": "cpu", "num_measured": 4}
    run(**bundle_settings("diffboost_synthesis", ["inference"], settings | knobs))


def item_of(folder, variant=0):
    return {**slice_items(folder / "store", 0, "training")[1], "variant": variant, "seed": 3}


def items_of_arm(folder, arm):
    synthetic_dir = str(folder / "deformed")
    return training_items(str(folder / "store"), arm, 0, 32, 2, synthetic_dir=synthetic_dir)


def test_edges_and_label_move_together(folder):
    item = item_of(folder)
    before = read_levels(item["label"], "label")
    edges, label = deform_slice(item, 4.0, 8, 32)
    assert edges.shape == label.shape == (32, 32) and label.dtype == np.uint8
    assert set(np.unique(label)) <= set(np.unique(before))
    changed = (label != before).mean()
    assert 0.005 < changed < 0.3
    outline = mask_edges(torch.as_tensor(label)[None, None])[0, 0].numpy()
    assert (edges >= outline - 1e-6).all()


def test_no_displacement_gives_the_slice_itself(folder):
    item = item_of(folder)
    edges, label = deform_slice(item, 0.0, 8, 32)
    assert np.array_equal(label, read_levels(item["label"], "label"))
    assert np.abs(edges - read_levels(item["edge"], "edge") / 255).max() < 2e-3


def test_a_field_has_an_address(folder):
    item = item_of(folder)
    first, again = (deform_slice(item, 4.0, 8, 32)[1] for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, deform_slice(item_of(folder, 1), 4.0, 8, 32)[1])
    moved = {**item, "slice": item["slice"] + 1}
    options = (4.0, 8, 32)
    assert not np.array_equal(first, deform_slice(moved, *options)[1])
    shared = [deform_slice(i, *options, noise_address="volume")[1] for i in (item, moved)]
    assert np.array_equal(*shared)


@pytest.mark.parametrize("numbers", [(-1.0, 8), (2.0, 1)])
def test_numbers_out_of_range_are_refused(folder, numbers):
    with pytest.raises(ValueError, match="deformation_px: .*deformation_spacing_px: "):
        deform_slice(item_of(folder), *numbers, 32)


def test_undeformed_items_stay_as_they_are(folder, tmp_path):
    items = [item_of(folder)]
    assert deform_items(items, str(tmp_path), 0.0, 8, 32) == items
    assert not list(tmp_path.iterdir())


def test_the_store_has_edges_and_labels_of_its_own(folder):
    store = folder / "deformed"
    manifest = pd.read_parquet(store / "manifest.parquet")
    for row in manifest.to_dict("records"):
        name = row["image"].removeprefix("images/")
        assert row["label"] == f"labels/{name}" and row["edge"] == f"edges/{name}"
        assert (store / row["label"]).is_file() and (store / row["edge"]).is_file()
    assert set(manifest.deformation_px) == {4.0}
    told = json.loads((store / "run.json").read_text())["facts"]
    assert told["deformation_px"] == 4.0 and told["deformation_spacing_px"] == 8


def test_provenance_makes_them_again_and_finds_an_edited_label(folder, tmp_path):
    def audits(again=False):
        paths = (folder / "store", folder / "generator", str(folder / "backbone"))
        return audit_provenance(folder / "deformed", *paths, again)

    found = audits(again=True)
    assert not [failure for audit in found for failure in audit.failures]
    assert all({"deformed edge", "deformed label"} <= set(audit.verified) for audit in found)
    path = next((folder / "deformed" / "labels").iterdir())
    kept = path.read_bytes()
    write_label(path, 1 - np.minimum(read_levels(path, "label"), 1))
    failures = [failure for audit in audits() for failure in audit.failures]
    path.write_bytes(kept)
    assert len(failures) == 1 and "is not the slice's label" in failures[0]


def test_quality_judges_a_variant_by_its_own_label(folder):
    manifest = pd.read_parquet(folder / "deformed" / "manifest.parquet")
    training = slice_items(folder / "store", 0, "training")
    items = items_of(manifest, folder / "deformed", training)
    assert all("/deformed/labels/" in item["label"] for item in items)


def test_a_segmenter_learns_a_variants_own_label(folder):
    for arm in ("diffboost", "diffboost+mirror", "synthetic"):
        item = items_of_arm(folder, arm)[1]
        images = [path.replace("labels", "images") for path in item["variant_labels"]]
        assert images == item["variants"]
        loaded = {**item, "image": torch.zeros(1, 32, 32)}
        own = torch.as_tensor(read_levels(item["label"], "label"))[None]
        transform = augmentation(arm, alpha=0.0, patch_size=4)
        transform.set_random_state(0)
        sample = transform({**loaded, "label": own})
        assert sample["label"].shape == (1, 32, 32) and sample["label"].dtype == torch.uint8
        labels = [torch.as_tensor(read_levels(p, "label"))[None] for p in item["variant_labels"]]
        if "mirror" not in arm:
            assert any(torch.equal(sample["label"], label) for label in labels)


def test_a_clients_training_learns_them_too(folder):
    items = list(slice_items(folder / "store", 0, "training"))
    client = SimpleNamespace(
        variants=lambda store_dir: variants_by_slice(folder / "deformed"),
        synthetic_dir=str(folder / "deformed"),
    )
    found, arm, _ = _with_variants(items, client, folder / "store", "baseline")
    assert arm == "diffboost"
    assert found == list(items_of_arm(folder, "diffboost"))


def test_merged_labels_are_those_of_their_patches(folder):
    items = items_of_arm(folder, "diffboost")
    own = torch.zeros(1, 32, 32, dtype=torch.uint8)
    item = {**items[1], "image": torch.zeros(1, 32, 32), "label": own}
    transform = augmentation("diffboost", alpha=0.5, patch_size=8)
    transform.set_random_state(1)
    sample = transform(item)
    real = sample["merge_mask"] > 0
    assert 0 < real.float().mean() < 1
    assert sample["label"][real].sum() == 0 and sample["label"][~real].sum() > 0


def test_undeformed_variants_have_no_label_of_their_own(tmp_path):
    store = write_store(tmp_path / "store")
    variants = write_variants(store, tmp_path / "synthetic")
    items = training_items(str(store), "diffboost", 0, 32, 3, synthetic_dir=str(variants))
    assert "variant_labels" not in items[0]
    label = torch.zeros(1, 32, 32)
    picked = PickVariantd()({**items[0], "image": torch.zeros(1, 32, 32), "label": label})
    assert picked["label"] is label


def test_noise_of_a_volume_is_shared_along_it_and_makes_its_slices_alike(folder):
    shape = (2, 4, 4)
    first, second = (variant_noise(0, "a", s, 1, shape, "volume") for s in (3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, variant_noise(0, "b", 3, 1, shape, "volume"))
    assert not torch.equal(first, variant_noise(0, "a", 3, 2, shape, "volume"))
    synthesize(folder, "own_noise")
    synthesize(folder, "shared_noise", noise_address="volume")
    own, shared = (
        json.loads((folder / name / "slice_consistency.json").read_text())
        for name in ("own_noise", "shared_noise")
    )
    assert own["pairs"] == shared["pairs"] == 4 and own["real"] == shared["real"] > 0
    assert shared["variants"] < 0.8 * own["variants"]
    assert abs(own["ratio"] - own["variants"] / own["real"]) < 1e-9


def test_single_slices_have_no_consistency(folder, tmp_path):
    item = item_of(folder)
    assert measure_slice_consistency(str(tmp_path), [item]) == {}
    assert not list(tmp_path.iterdir())

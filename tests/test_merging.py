"""The merge mask, the merge of two predictions, and which variants a slice may meet."""

import pandas as pd
import pytest
import torch
from small_store import source_sha256, write_store, write_variants

from diffboost.data.slices import slice_items
from diffboost.segmentation.arms import split_arm
from diffboost.segmentation.merging import (
    MergeInferer,
    PickVariantd,
    RandMergeMaskd,
    variants_by_slice,
)
from diffboost.segmentation.training import prepare_batch, training_items


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("merging") / "store")


def items_of(store, arm, **options):
    options = {"fold": 0, "image_size": 32, "num_classes": 3} | options
    return training_items(str(store), arm, **options)


def mask_of(alpha: float, patch_size: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    transform = RandMergeMaskd(alpha, patch_size)
    transform.set_random_state(seed=seed)
    return transform({"image": torch.zeros(1, *size)})["merge_mask"]


def test_mask_is_made_of_patches_that_are_cut_at_the_border():
    mask = mask_of(0.5, 4, (10, 7))
    assert mask.shape == (1, 10, 7) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    for row in (0, 4, 8):
        for column in (0, 4):
            assert len(mask[0, row : row + 4, column : column + 4].unique()) == 1


def test_alpha_is_the_share_of_real_patches():
    assert mask_of(0.0, 4, (8, 8)).sum() == 0
    assert mask_of(1.0, 4, (8, 8)).sum() == 64
    assert abs(float(mask_of(0.6, 1, (100, 100)).mean()) - 0.6) < 0.02


def test_mask_of_the_whole_slice_chooses_case_by_case():
    means = {float(mask_of(0.5, 32, (32, 32), seed=seed).mean()) for seed in range(10)}
    assert means == {0.0, 1.0}


@pytest.mark.parametrize(("alpha", "patch_size"), [(1.1, 4), (-0.1, 4), (0.5, 0)])
def test_mask_outside_its_range_is_refused(alpha, patch_size):
    with pytest.raises(ValueError, match="alpha: .* is not in|patch_size: 0 is not at least"):
        RandMergeMaskd(alpha, patch_size)


class Square(torch.nn.Module):
    """y = x squared in two channels; counts its passes."""

    passes = 0

    def forward(self, images):
        self.passes += 1
        return torch.cat([images**2, -(images**2)], dim=1)


def test_merge_in_logits_and_in_images():
    network = Square()
    real, synthetic = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 5.0)
    mask = torch.tensor([[[[1.0, 0.0], [0.5, 1.0]]]])
    logits = MergeInferer("logits")(real, network, synthetic=synthetic, merge_mask=mask)
    assert logits[0, 0].tolist() == [[9, 25], [17, 9]]  # 9 m + 25 (1 - m)
    images = MergeInferer("images")(real, network, synthetic=synthetic, merge_mask=mask)
    assert images[0, 0].tolist() == [[9, 25], [16, 9]]  # (3 m + 5 (1 - m)) squared
    assert network.passes == 2
    assert MergeInferer()(real, network)[0, 0].tolist() == [[9, 9], [9, 9]]


def test_amp_keeps_the_logits_float32():
    network = torch.nn.Conv2d(1, 2, 3)
    images = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        exact = MergeInferer()(images, network)
        rounded = MergeInferer(amp=True)(images, network)
    assert rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).abs().max()) < 0.05


def test_unknown_merge_is_refused():
    with pytest.raises(ValueError, match="merge: 'pixels' is unknown; .*allowed: images, logits"):
        MergeInferer("pixels")


def test_arms_are_split():
    assert split_arm("mirror") == (False, "mirror")
    assert split_arm("diffboost") == (True, "baseline")
    assert split_arm("diffboost+nnunet") == (True, "nnunet")


def test_only_kept_variants_are_met(store, tmp_path):
    synthetic = write_variants(store, tmp_path / "synthetic", ratio=3)
    manifest = pd.read_parquet(synthetic / "manifest.parquet")
    manifest["kept"] = manifest["variant"] != 1
    manifest.sample(frac=1, random_state=0).to_parquet(synthetic / "manifest.parquet")
    variants = variants_by_slice(synthetic)
    names = [path.rsplit("_", 1)[1] for path in variants["case_2", 3]]
    assert names == ["000.png", "002.png"]


def test_slices_without_variants_are_named(store, tmp_path):
    synthetic = write_variants(store, tmp_path / "synthetic")
    manifest = pd.read_parquet(synthetic / "manifest.parquet")
    case = items_of(store, "baseline")[0]["case"]
    lost = (manifest["case"] == case) & (manifest["slice"] == 2)
    manifest[~lost].to_parquet(synthetic / "manifest.parquet")
    with pytest.raises(ValueError, match=f"no variant of 1 of .*, e.g. {case} slice 2"):
        items_of(store, "diffboost", synthetic_dir=str(synthetic))


def test_variants_of_another_scan_of_the_same_name_are_refused(store, tmp_path):
    synthetic = write_variants(store, tmp_path / "synthetic")
    manifest = pd.read_parquet(synthetic / "manifest.parquet")
    case = items_of(store, "baseline")[0]["case"]
    for changed in ("case_0", case):  # the first is a test case, whose variants are not used
        other = manifest.assign(
            source_sha256=manifest.source_sha256.where(manifest["case"] != changed, "f" * 64)
        )
        other.to_parquet(synthetic / "manifest.parquet")
        if changed != case:
            items_of(store, "diffboost", synthetic_dir=str(synthetic))
    with pytest.raises(ValueError) as error:
        items_of(store, "diffboost", synthetic_dir=str(synthetic))
    own = source_sha256(int(case[-1]))[:12]
    for words in (
        f"synthetic_dir: {synthetic}: the variants of case '{case}' were made from files",
        "source_sha256 ffffffffffff…", f"of this name in {store} has {own}…: another scan or",
        "as in 1 training cases", "Synthesize from this store",
    ):  # fmt: skip
        assert words in str(error.value)
    manifest.drop(columns="source_sha256").to_parquet(synthetic / "manifest.parquet")
    with pytest.raises(ValueError, match="manifest.parquet lacks the columns source_sha256"):
        items_of(store, "diffboost", synthetic_dir=str(synthetic))


def test_steps_do_not_grow_with_the_ratio(store, tmp_path):
    baseline = items_of(store, "baseline")
    for ratio in (1, 3):
        synthetic = write_variants(store, tmp_path / f"synthetic_{ratio}", ratio)
        items = items_of(store, "diffboost", synthetic_dir=str(synthetic))
        assert len(items) == len(baseline)
        assert {len(item["variants"]) for item in items} == {ratio}


def test_variant_of_another_size_is_refused(store, tmp_path):
    item = slice_items(store, 0, "training")[0] | {"image": torch.zeros(1, 16, 16)}
    synthetic = write_variants(store, tmp_path / "synthetic")
    item["variants"] = variants_by_slice(synthetic)[item["case"], item["slice"]]
    with pytest.raises(ValueError, match=r"has shape \(1, 32, 32\), its slice has \(1, 16, 16\)"):
        PickVariantd()(item)


@pytest.mark.parametrize(
    ("arm", "options", "message"),
    [
        ("diffboost", {}, "arm 'diffboost' needs a synthetic_dir, but synthetic_dir is None"),
        ("mirror", {"synthetic_dir": "x"}, "arm 'mirror' takes no synthetic_dir, but .* is 'x'"),
        ("baseline", {"image_size": 64}, "image_size: 64 does not fit the store .* which has 32"),
        ("baseline", {"num_classes": 2}, "num_classes: 2 does not fit the store .* which has 3"),
        (
            "baseline",
            {"size_divisor": 5},
            "image_size: 32; this network needs a multiple of 5 from 10",
        ),
        ("baseline", {"size_divisor": 32}, "image_size: 32; .* a multiple of 32 from 64 up"),
        ("baseline", {"in_channels": 2}, "in_channels: 2 does not fit the store .* which has 1"),
        ("synthetic", {}, "arm 'synthetic' needs a synthetic_dir, but synthetic_dir is None"),
        ("baseline", {"min_foreground_px": 999}, "min_foreground_px 999"),
    ],
)
def test_items_that_cannot_be_trained_on_are_refused(store, arm, options, message):
    with pytest.raises(ValueError, match=message):
        items_of(store, arm, **options)


def test_synthetic_dir_without_manifest_is_refused(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no manifest.parquet"):
        items_of(store, "diffboost", synthetic_dir=str(tmp_path))


def test_batches_carry_what_the_arm_needs():
    batch = {key: torch.rand(2, 1, 4, 4) for key in ("image", "label", "synthetic", "merge_mask")}
    assert len(prepare_batch("nnunet")(batch, "cpu")) == 2
    _, _, _, extra = prepare_batch("diffboost+nnunet")(batch, "cpu")
    assert torch.equal(extra["merge_mask"], batch["merge_mask"])

"""Every arm acts, keeps the label true, and draws from (seed, epoch, index) alone."""

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose

from diffboost.data.addresses import AddressedDataset, AddressedSampler
from diffboost.data.slices import write_image, write_label
from diffboost.data.transforms import LoadSliced
from diffboost.segmentation.augmentations import augmentation
from diffboost.segmentation.merging import CLASSICAL_ARMS

SIZE = 40
ACTING = [arm for arm in CLASSICAL_ARMS if arm != "baseline"]
SPATIAL = ("mirror", "rotate", "scale", "deepstack", "nnunet")


def write_items(folder) -> list[dict]:
    """Two slices with an ellipse of class 1 holding a disc of class 2, and two variants of each."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    items = []
    for number in range(2):
        outer = ((rows - 17) / 12) ** 2 + ((columns - 22) / 8) ** 2 < 1
        inner = (rows - 12 - number) ** 2 + (columns - 22) ** 2 < 16
        label = outer.astype(np.uint8) + inner
        item = {"image": folder / f"{number}.png", "label": folder / f"{number}_label.png"}
        write_image(item["image"], np.choose(label, [-0.8, 0.2, 0.8]))
        write_label(item["label"], label)
        item["variants"] = [folder / f"{number}_{variant}.png" for variant in range(2)]
        for variant, path in enumerate(item["variants"]):
            write_image(path, np.choose(label, [0.9 - 0.1 * variant, -0.2, -0.6]))
        items.append(item | {"case": f"case_{number}"})
    return items


def make_dataset(folder, arm: str, seed: int = 0) -> AddressedDataset:
    transform = Compose([LoadSliced(["image", "label"]), augmentation(arm, 0.6, 16)])
    return AddressedDataset(write_items(folder), transform, seed=seed)


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


@pytest.mark.parametrize("arm", ACTING)
def test_the_arm_acts_and_the_label_stays_true(tmp_path, arm):
    plain = make_dataset(tmp_path, "baseline")[0]
    dataset = make_dataset(tmp_path, arm)
    samples = [dataset[(epoch, 0)] for epoch in range(40)]
    changed = [not torch.equal(sample["image"], plain["image"]) for sample in samples]
    assert sum(changed) >= 12
    for sample in samples:
        assert sample["image"].dtype == torch.float32 and sample["label"].dtype == torch.uint8
        assert sample["image"].shape == sample["label"].shape == (1, SIZE, SIZE)
        assert set(sample["label"].unique().tolist()) <= {0, 1, 2}
        if arm not in SPATIAL:
            assert torch.equal(sample["label"], plain["label"])
        image = sample["image"]
        bright = image > 0.75 * image.min() + 0.25 * image.max()  # between classes 0 and 1
        assert overlap(bright, sample["label"] > 0) > 0.9
    if arm in SPATIAL:
        assert any(not torch.equal(sample["label"], plain["label"]) for sample in samples)


def test_baseline_leaves_the_slice_alone(tmp_path):
    dataset = make_dataset(tmp_path, "baseline")
    assert torch.equal(dataset[(0, 1)]["image"], dataset[(5, 1)]["image"])
    assert set(dataset[(0, 1)]) == {"image", "label", "case"}


def test_intensity_arms_act_in_both_directions(tmp_path):
    plain = make_dataset(tmp_path, "baseline")[0]["image"]

    def images(arm):
        dataset = make_dataset(tmp_path, arm)
        return [dataset[(epoch, 0)]["image"] for epoch in range(60)]

    contrast = [float(image.std() / plain.std()) for image in images("contrast")]
    assert min(contrast) < 0.85 and max(contrast) > 1.02
    assert all(image.min() >= -0.801 and image.max() <= 0.801 for image in images("contrast"))
    brightness = [float((image - plain).mean()) for image in images("brightness")]
    assert 0.3 < np.std(brightness) < 0.7 and min(brightness) < -0.4 and max(brightness) > 0.4
    noise = [float((image - plain).std()) for image in images("noise")]
    assert max(noise) < 0.055 and min(noise) < 0.02 < max(noise)
    gamma = [float(image.mean() - plain.mean()) for image in images("gamma")]
    assert min(gamma) < -0.01 and max(gamma) > 0.01
    blurred = [not torch.equal(image, plain) for image in images("resolution")]
    assert 15 <= sum(blurred) <= 45  # chance 0.5


def test_blur_repeats_the_border(tmp_path):
    dataset = make_dataset(tmp_path, "resolution")
    corners = [dataset[(epoch, 0)]["image"][0, 0, 0] for epoch in range(10)]
    assert all(abs(float(corner) + 0.8) < 1e-3 for corner in corners)


@pytest.mark.parametrize("arm", ["diffboost", "diffboost+rotate", "diffboost+nnunet"])
def test_variant_and_slice_share_the_spatial_draw(tmp_path, arm):
    dataset = make_dataset(tmp_path, arm)
    means = set()
    for epoch in range(30):
        sample = dataset[(epoch, 0)]
        assert set(sample) == {"image", "synthetic", "merge_mask", "label", "case"}
        variant, label = sample["synthetic"], sample["label"]
        dark = variant < 0.6 * variant.max() + 0.4 * variant.min()
        assert overlap(dark, label > 0) > 0.9
        means.add(round(float(variant[label == 0].mean()), 2))
    assert len(means) >= 2  # both variants were met


@pytest.mark.parametrize("arm", [*ACTING, "diffboost", "diffboost+nnunet"])
def test_draws_come_from_the_address(tmp_path, arm):
    first, second = make_dataset(tmp_path, arm), make_dataset(tmp_path, arm)
    for key in set(first[(3, 1)]) - {"case"}:
        assert torch.equal(first[(3, 1)][key], second[(3, 1)][key])
    images = [first[(epoch, 1)]["image"] for epoch in range(12)]
    other = make_dataset(tmp_path, arm, seed=1)
    if arm != "diffboost":
        assert any(not torch.equal(images[0], image) for image in images[1:])
        again = [other[(epoch, 1)]["image"] for epoch in range(12)]
        assert any(not torch.equal(a, b) for a, b in zip(images, again, strict=True))


def test_workers_change_nothing(tmp_path):
    for arm in ("nnunet", "diffboost+nnunet"):
        dataset = make_dataset(tmp_path, arm)
        batches = []
        for num_workers in (0, 2):
            sampler = AddressedSampler(dataset, seed=0)
            loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=num_workers)
            batches.append([batch for _ in range(2) for batch in loader])
        for alone, helped in zip(*batches, strict=True):
            assert alone["case"] == helped["case"]
            for key in set(alone) - {"case"}:
                assert torch.equal(alone[key], helped[key])


def test_unknown_arm_is_refused():
    for arm in ("mirorr", "diffboost+", "diffboost+diffboost", "diffboostx"):
        with pytest.raises(ValueError, match="arm: .* is unknown; .*allowed: baseline, brightness"):
            augmentation(arm)

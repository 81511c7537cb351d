"""Every arm acts, keeps the label true, and draws from (seed, epoch, index) alone."""

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose

from diffboost.data.addresses import AddressedDataset, AddressedSampler
from diffboost.data.slices import write_image, write_label
from diffboost.data.transforms import LoadSliced
from diffboost.segmentation.arms import CLASSICAL_ARMS
from diffboost.segmentation.augmentations import augmentation
from diffboost.segmentation.merging import PickVariantd
from diffboost.segmentation.spatial import RandWarpd

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
    dataset = make_dataset(tmp_path, arm, seed=1)
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


def draws(arm: str, image: torch.Tensor, number: int, label: torch.Tensor | None = None):
    """What an arm makes of one slice, many times."""
    transform = augmentation(arm)
    transform.set_random_state(seed=0)
    label = torch.zeros_like(image, dtype=torch.uint8) if label is None else label
    return [transform({"image": image, "label": label, "case": "a"}) for _ in range(number)]


def coordinates(size: int = 64) -> torch.Tensor:
    """Rows and columns about the center as two images in one, (2, size, size)."""
    axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"))


def linear_maps(arm: str, number: int) -> list[np.ndarray]:
    """The 2 x 2 matrices by which an arm moves the positions near the center."""
    places = coordinates()
    inner = places[:, 24:40, 24:40].reshape(2, -1).double().numpy()
    maps = []
    for sample in draws(arm, places, number):
        moved = sample["image"][:, 24:40, 24:40].reshape(2, -1).double().numpy()
        fit, residual, *_ = np.linalg.lstsq(inner.T, moved.T, rcond=None)
        assert np.allclose(inner.T @ fit, moved.T, atol=1e-3)
        maps.append(fit.T)
    return maps


def test_contrast_stretches_about_the_mean_by_three_quarters_to_five_quarters():
    image = torch.full((1, 32, 32), 0.1)
    image[:, ::2] = -0.1
    image[0, 0, 0], image[0, 1, 0] = -0.9, 0.9  # wide range, so that clipping stays away
    middle = [sample["image"][0, 8:] for sample in draws("contrast", image, 300)]
    factors = [float((rows[1] - rows[0]).mean() / 0.2) for rows in middle]
    assert 0.749 < min(factors) < 0.76 and 1.24 < max(factors) < 1.251
    assert abs(np.mean(factors) - 1) < 0.03


def test_gamma_exponents_lie_between_their_bounds_half_of_them_below_one():
    image = torch.linspace(-0.8, 0.8, 64).reshape(1, 8, 8)
    middle = (image[0, 4, 0] + 0.8) / 1.6
    gammas = [
        float(torch.log((sample["image"][0, 4, 0] + 0.8) / 1.6) / torch.log(middle))
        for sample in draws("gamma", image, 300)
    ]
    assert 0.699 < min(gammas) < 0.72 and 1.47 < max(gammas) < 1.501
    assert 0.4 < np.mean(np.array(gammas) < 1) < 0.6


def test_brightness_adds_one_constant_of_deviation_a_half():
    image = torch.rand(1, 16, 16)
    offsets = [sample["image"] - image for sample in draws("brightness", image, 300)]
    assert all(float(offset.std()) < 1e-6 for offset in offsets)
    assert 0.45 < np.std([float(offset.mean()) for offset in offsets]) < 0.55


def test_noise_has_deviations_from_zero_to_a_twentieth():
    image = torch.zeros(1, 64, 64)
    deviations = [float(sample["image"].std()) for sample in draws("noise", image, 200)]
    assert min(deviations) < 0.002 and 0.047 < max(deviations) < 0.052
    assert abs(np.mean(deviations) - 0.025) < 0.004


def test_resolution_blurs_every_second_slice_by_half_to_one_and_a_half_pixels():
    image = torch.zeros(1, 33, 33)
    image[0, 16, 16] = 1
    offsets = torch.arange(33) - 16.0
    blurred = [sample["image"][0].sum(1) for sample in draws("resolution", image, 200)]
    sigmas = [float((line * offsets**2).sum().sqrt()) for line in blurred]
    acted = [sigma for sigma in sigmas if sigma]
    assert 80 < len(acted) < 120
    assert 0.45 < min(acted) < 0.6 and 1.4 < max(acted) < 1.52


def test_mirror_moves_image_and_label_alike():
    label = (torch.rand(1, 16, 16) > 0.5).to(torch.uint8)
    samples = draws("mirror", label.float(), 400, label)
    assert all(torch.equal(sample["image"], sample["label"].float()) for sample in samples)
    still = np.mean([torch.equal(sample["label"], label) for sample in samples])
    assert abs(still - (0.25 + 0.75 * 0.25)) < 0.07
    for flips in ([1], [2], [1, 2]):
        share = np.mean([torch.equal(sample["label"], label.flip(flips)) for sample in samples])
        assert abs(share - 0.75 * 0.25) < 0.06


def test_rotate_turns_by_up_to_five_degrees():
    maps = linear_maps("rotate", 200)
    angles = np.degrees([np.arctan2(each[1, 0], each[0, 0]) for each in maps])
    assert -5.01 < min(angles) < -4.8 and 4.8 < max(angles) < 5.01
    assert np.allclose([np.linalg.det(each) for each in maps], 1, atol=1e-3)


def test_scale_takes_a_twentieth_more_or_less():
    maps = linear_maps("scale", 200)
    factors = np.array([each[0, 0] for each in maps])
    assert 0.949 < factors.min() < 0.953 and 1.047 < factors.max() < 1.051
    assert np.allclose(maps, factors[:, None, None] * np.eye(2), atol=1e-3)


def warp(**options) -> RandWarpd:
    transform = RandWarpd(["image", "label"], ["bilinear", "nearest"], **options)
    return transform.set_random_state(seed=0)


def test_deepstack_has_the_chances_and_ranges_of_nnunet_v1(monkeypatch):
    seen = {}
    monkeypatch.setattr(RandWarpd, "__init__", lambda self, *args, **options: seen.update(options))
    monkeypatch.setattr(RandWarpd, "__call__", lambda self, data: data)
    monkeypatch.setattr(RandWarpd, "keys", ("image",), raising=False)
    augmentation("deepstack")
    assert seen == {
        "degrees": 180,
        "scale": (0.85, 1.25),
        "even_scale": True,
        "elastic_alpha": (0, 200),
        "elastic_sigma_px": (9, 13),
        "prob_rotate": 0.2,
        "prob_scale": 0.2,
        "prob_elastic": 0.2,
    }


def test_deepstack_mirrors_and_changes_gamma_as_often_as_it_should():
    image = torch.rand(1, 32, 32)
    samples = [sample["image"] for sample in draws("deepstack", image, 400)]
    values = [sample.flatten().sort().values for sample in samples]
    plain = image.flatten().sort().values
    same = np.mean([torch.allclose(each, plain) for each in values])
    assert abs(same - 0.8**3 * 0.7) < 0.07  # neither warped nor gamma
    still = np.mean([torch.equal(sample, image) for sample in samples])
    assert abs(still - 0.8**3 * 0.7 * 0.25) < 0.05
    kept = [abs(float(each.mean() - plain.mean())) < 0.05 for each in values]
    assert np.mean(kept) > 0.8  # gamma keeps the mean; a warp nearly does


def test_warp_draws_scales_below_and_above_one_equally_often():
    transform = warp(scale=(0.85, 1.25), even_scale=True, prob_scale=1.0)
    factors = [transform._factor() for _ in range(400)]
    assert 0.85 <= min(factors) < 0.86 and 1.24 < max(factors) <= 1.25
    assert 0.44 < np.mean(np.array(factors) < 1) < 0.56


def test_elastic_displacements_are_smooth_and_as_large_as_nnunets():
    transform = warp(elastic_alpha=(200, 200), elastic_sigma_px=(9, 9), prob_elastic=1.0)
    moves = torch.stack([transform._displacements((128, 128)) for _ in range(20)])
    inner = moves[..., 32:96, 32:96]
    expected = 200 * (1 / 3) ** 0.5 / (2 * np.pi**0.5 * 9)  # white noise through a Gaussian: 3.6 px
    assert float(inner.std()) == pytest.approx(expected, rel=0.2)
    slope = inner.diff(dim=-1).std()  # of such noise: its deviation over sqrt(2) sigma
    assert float(slope) == pytest.approx(expected / (2**0.5 * 9), rel=0.2)
    label = torch.zeros(1, 64, 64, dtype=torch.uint8)
    label[:, 20:40, 24:48] = 1
    samples = [transform({"image": label.float(), "label": label}) for _ in range(10)]
    assert all(sample["label"].dtype == torch.uint8 for sample in samples)
    for sample in samples:
        assert overlap(sample["image"] > 0.5, sample["label"] > 0) > 0.97
        assert overlap(sample["label"] > 0, label > 0) < 0.99


@pytest.mark.parametrize("arm", ["rotate", "scale", "deepstack", "nnunet"])
def test_a_label_shaped_image_goes_where_the_label_goes(arm):
    label = torch.zeros(1, 64, 64, dtype=torch.uint8)
    label[:, 18:38, 24:48] = 1
    moved = 0
    for sample in draws(arm, label.float(), 60, label):
        middle = (sample["image"].max() + sample["image"].min()) / 2
        shape = sample["image"] > middle
        assert overlap(shape, sample["label"] > 0) > 0.93
        moved += not torch.equal(sample["label"], label)
    assert moved > 20


def test_the_arm_synthetic_sees_variants_alone(tmp_path):
    plain = make_dataset(tmp_path, "baseline")[0]
    dataset = make_dataset(tmp_path, "synthetic")
    samples = [dataset[(epoch, 0)] for epoch in range(20)]
    assert all(set(sample) == {"image", "label", "case"} for sample in samples)
    assert all(torch.equal(sample["label"], plain["label"]) for sample in samples)
    background = {round(float(s["image"][s["label"] == 0].mean()), 1) for s in samples}
    assert background == {0.8, 0.9}  # the two variants; the slice itself has -0.8 there


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


@pytest.mark.parametrize("arm", [*ACTING, "deepstack"])
def test_variant_and_slice_share_the_intensity_draw(arm):
    """MONAI's low resolution drew a zoom for each."""
    transform = augmentation(f"diffboost+{arm}", 0.6, 16)
    steps = [step for step in transform.transforms if not isinstance(step, PickVariantd)]
    image = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for seed in range(60):
        sample = {"image": image, "synthetic": image, "case": "a", "variants": []}
        sample |= {"label": torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)}
        found = Compose(steps).set_random_state(seed)(sample)
        assert torch.equal(found["image"], found["synthetic"])


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

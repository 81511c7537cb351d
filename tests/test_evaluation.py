"""Metrics of whole cases against values computed by hand, and the rule for empty masks."""

import math

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.transforms import AsDiscrete
from raw_data import TASK_3D, volume, write_decathlon, write_nifti

from diffboost.data.slices import read_store, slice_items
from diffboost.data.transforms import LoadSliced
from diffboost.prepare import prepare
from diffboost.segmentation.evaluation import CaseDice
from diffboost.segmentation.metrics import case_metrics
from diffboost.segmentation.source_geometry import (
    most_likely,
    slice_axis_of,
    source_labels,
    source_preprocessing,
    stack_slices,
)


def square(size: tuple[int, ...], *spans: tuple[int, int], value: int = 1) -> torch.Tensor:
    """Zeros with a block of `value`; a span is (first, last + 1) along one axis."""
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[tuple(slice(*span) for span in spans)] = value
    return mask


def test_shifted_squares_by_hand():
    label = square((20, 20), (5, 9), (5, 9))  # 4 x 4 = 16 pixels
    pred = square((20, 20), (5, 9), (7, 13))  # 4 x 6 = 24 pixels, 8 of them common
    scores = case_metrics(pred, label, (1.0, 0.5), num_classes=2)[1]
    assert scores["dice"] == pytest.approx(2 * 8 / 40)
    assert scores["precision"] == pytest.approx(8 / 24)
    assert scores["recall"] == pytest.approx(8 / 16)
    # Along the columns the right sides are 4 px = 2 mm apart: the farthest points of either edge.
    assert scores["hd95_mm"] == pytest.approx(2.0)
    assert 0 < scores["assd_mm"] < 2.0
    assert scores["empty_prediction"] == scores["empty_truth"] == 0


def test_parallel_planes_by_hand_in_three_dimensions():
    label = square((10, 12, 12), (2, 3), (0, 12), (0, 12))
    pred = square((10, 12, 12), (5, 6), (0, 12), (0, 12))
    scores = case_metrics(pred, label, (2.5, 1.0, 1.0), num_classes=2)[1]
    assert scores["dice"] == 0
    assert scores["hd95_mm"] == pytest.approx(3 * 2.5)
    assert scores["assd_mm"] == pytest.approx(3 * 2.5)


def test_perfect_prediction_of_two_classes():
    label = square((16, 16, 4), (2, 8), (2, 8), (0, 4))
    label[10:14, 10:14] = 2
    for scores in case_metrics(label, label, (1, 1, 3), num_classes=3).values():
        assert [scores[name] for name in ("dice", "precision", "recall")] == [1, 1, 1]
        assert [scores[name] for name in ("hd95_mm", "assd_mm")] == [0, 0]


def test_one_slice_is_measured_in_two_dimensions():
    label = square((20, 20, 1), (4, 16), (4, 16))
    pred = label.clone()
    pred[9:11, 9:11] = 0  # a hole whose edge is farther from the outer edge than 95 % of the rest
    flat = case_metrics(pred[..., 0], label[..., 0], (1, 1), num_classes=2)
    assert case_metrics(pred, label, (1, 1, 7), num_classes=2) == flat
    assert flat[1]["assd_mm"] > 0  # in 3D every pixel would be edge, and the distance 0
    for axis in (0, 1):  # a sagittal and a coronal slice, in the source's axes
        masks = (mask[..., 0].unsqueeze(axis) for mask in (pred, label))
        spacing = [1, 1]
        spacing.insert(axis, 7)
        assert case_metrics(*masks, spacing, num_classes=2) == flat


@pytest.mark.parametrize(
    ("pred", "label", "overlap", "distance", "flags"),
    [
        (0, 0, 1.0, 0.0, (1, 1)),
        (1, 0, 0.0, math.hypot(20, 5), (0, 1)),
        (0, 1, 0.0, math.hypot(20, 5), (1, 0)),
    ],
)
def test_rule_for_empty_masks(pred, label, overlap, distance, flags):
    masks = [square((10, 10), (2, 4), (2, 4), value=value) for value in (pred, label)]
    scores = case_metrics(*masks, (2.0, 0.5), num_classes=2)[1]
    assert [scores[name] for name in ("dice", "precision", "recall")] == [overlap] * 3
    assert scores["hd95_mm"] == scores["assd_mm"] == pytest.approx(distance)
    assert (scores["empty_prediction"], scores["empty_truth"]) == flags


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"pred: shape \(4, 4\), label has \(4, 5\)"):
        case_metrics(torch.zeros(4, 4), torch.zeros(4, 5), (1, 1), 2)


def run_metric(batches: list[dict]) -> float:
    engine = Engine(lambda engine, batch: {"pred": batch["pred"], "label": batch["label"]})
    CaseDice(num_classes=3).attach(engine, "dice")
    return engine.run(batches).metrics["dice"]


def test_case_dice_counts_the_pixels_of_a_case_first():
    # Case a: class 1 has 2 of pred, 3 of label, 2 common over two batches; class 2 is in neither.
    # Case b: class 1 in pred alone; class 2 found wholly.
    batches = [
        {
            "case": ["a", "b"],
            "pred": torch.tensor([[[[1, 1, 0, 0]]], [[[1, 2, 0, 0]]]]),
            "label": torch.tensor([[[[1, 1, 0, 0]]], [[[0, 2, 0, 0]]]]),
        },
        {
            "case": ["a"],
            "pred": torch.tensor([[[[0, 0, 0, 0]]]]),
            "label": torch.tensor([[[[1, 0, 0, 0]]]]),
        },
    ]
    assert run_metric(batches) == pytest.approx((2 * 2 / 5 + 1 + 0 + 1) / 4)


def test_without_case_every_slice_is_one():
    pred = torch.tensor([[[[1, 0]]], [[[0, 0]]]])
    label = torch.tensor([[[[1, 0]]], [[[1, 0]]]])
    assert run_metric([{"pred": pred, "label": label}]) == pytest.approx((1 + 1 + 0 + 1) / 4)


def test_released_rules_by_hand():
    label = square((20, 20), (5, 9), (5, 9))  # 16 pixels
    pred = square((20, 20), (5, 9), (7, 13))  # 24 pixels, 8 of them common
    scores = case_metrics(pred, label, (1, 1), 2, smooth=1.0)[1]
    assert scores["dice"] == pytest.approx(2 * 9 / (2 * 9 + 17 + 9))  # 8 + 1, 16 + 1, 8 + 1
    assert scores["precision"] == pytest.approx(9 / (9 + 17))
    assert scores["recall"] == pytest.approx(9 / (9 + 9))
    assert case_metrics(pred, label, (1, 1), 2, smooth=0)[1]["dice"] == pytest.approx(0.4)


def test_pooled_distances_by_hand():
    label = square((1, 40), (0, 1), (5, 6))  # one point
    pred = square((1, 40), (0, 1), (5, 6))
    pred[0, 25] = 1  # two points, 0 and 20 from the label's
    one = case_metrics(pred, label, (1, 1), 2)[1]
    assert one["hd95_mm"] == pytest.approx(19)  # of 0 and 20 at 95 %; the other way 0
    assert one["assd_mm"] == pytest.approx(20 / 3)  # over the three points
    pooled = case_metrics(pred, label, (1, 1), 2, distances="pooled")[1]
    assert pooled["hd95_mm"] == pytest.approx(18)  # of 0, 0 and 20 at 95 %
    assert pooled["assd_mm"] == pytest.approx((10 + 0) / 2)  # mean of the two ways' means


def test_a_center_pixel_takes_the_place_of_nothing():
    nothing = torch.zeros(11, 11, dtype=torch.uint8)
    label = square((11, 11), (5, 6), (5, 9))  # holds the center, 4 pixels
    stated = case_metrics(nothing, label, (1, 1), 2)[1]
    painted = case_metrics(nothing, label, (1, 1), 2, empty_masks="center_pixel")[1]
    assert stated["dice"] == 0 and stated["hd95_mm"] == pytest.approx(math.hypot(11, 11))
    assert painted["dice"] == pytest.approx(2 / 5) and painted["hd95_mm"] < 3
    assert stated["empty_prediction"] == painted["empty_prediction"] == 1
    assert not nothing.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty_masks": "centre_pixel"}, "empty_masks: .* did you mean 'center_pixel'"),
        ({"distances": "direct"}, "distances: .* did you mean 'directed'"),
        ({"smooth": -1}, "smooth: -1 is below 0"),
    ],
)
def test_unknown_rules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        case_metrics(torch.zeros(4, 4), torch.zeros(4, 4), (1, 1), 2, **options)


def test_slices_are_stacked_and_stretched_to_the_depth():
    volume = torch.arange(6).expand(2, 3, 6)
    assert stack_slices(volume, 2, [1, 4])[0, 0].tolist() == [1, 1, 1, 4, 4, 4]
    assert stack_slices(volume.movedim(2, 0), 0, [0, 2, 3, 5])[:, 0, 0].tolist() == [
        0, 0, 2, 3, 3, 5,
    ]  # fmt: skip


def test_slices_lie_along_the_axis_of_the_world():
    affine = torch.tensor([[0, -0.8, 0, 3], [0, 0, -0.9, 7], [-3, 0, 0, 1], [0, 0, 0, 1.0]])
    found = {axis: slice_axis_of(affine, axis) for axis in ("axial", "coronal", "sagittal")}
    assert found == {"axial": (0, True), "coronal": (2, True), "sagittal": (1, True)}
    assert slice_axis_of(torch.eye(4), "axial") == (2, False)


def test_the_most_likely_class_is_that_of_monais_argmax_with_its_metadata():
    logits = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = 0.0  # a tie: the first class
    pred = MetaTensor(logits, affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    found, expected = most_likely(pred), AsDiscrete(argmax=True)(pred)
    assert torch.equal(found.as_tensor(), expected.as_tensor().long())
    assert found.shape == (1, 5, 4, 2) and not found.dtype.is_floating_point
    assert torch.equal(found.affine, pred.affine)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAR"])
def test_a_label_whose_file_runs_along_other_axes_than_the_image_meets_the_prediction(
    tmp_path, axcodes
):
    """A perfect prediction had a Dice of 0 where only the label's file was turned."""
    raw = write_decathlon(tmp_path / "raw")
    for number in range(4):
        file = raw / "labelsTr" / f"case_{number:03d}.nii.gz"
        write_nifti(file, volume(number)[1], axcodes)
    store_dir = prepare(raw, tmp_path / "store", TASK_3D, 64, "gradient", group_duplicates=False)
    transform = source_preprocessing(store_dir)
    case = read_store(store_dir).index.case.iloc[0]
    items = [item for item in slice_items(store_dir, 0, "all") if item["case"] == case]
    labels = torch.stack([LoadSliced("label")(item)["label"] for item in items], dim=-1)
    file = f"{case}.nii.gz"
    item = transform({key: str(raw / f"{key}sTr" / file) for key in ("image", "label")})
    one_hot = torch.cat([labels == number for number in range(3)])
    found = source_labels(transform)(item | {"pred": 20.0 * one_hot})
    pred, label = (found[key].as_tensor() for key in ("pred", "label"))
    assert pred.shape == label.shape == (1, 20, 24, 5)
    scores = case_metrics(pred[0], label[0], [0.5, 1.0, 3.0], 3)
    assert min(scores[number]["dice"] for number in (1, 2)) > 0.9

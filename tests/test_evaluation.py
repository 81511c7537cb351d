"""Metrics of whole cases against values computed by hand, and the rule for empty masks."""

import math

import pytest
import torch
from ignite.engine import Engine

from diffboost.segmentation.evaluation import CaseDice
from diffboost.segmentation.metrics import case_metrics


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

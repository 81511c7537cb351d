"""HED by Winograd's convolutions gives the maps of controlnet_aux's network."""

import pytest
import torch
from controlnet_aux.hed import ControlNetHED_Apache2
from torch.nn.functional import conv2d, relu

from diffboost.conditions import winograd
from diffboost.conditions.edges import _hed
from diffboost.conditions.winograd import GrayHed, WinogradConvolution, Workspace, clear_frame


def frame(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to framed (B, …, …, C), with noise where zeros must stand."""
    batch, channels, height, width = images.shape
    framed = torch.randn(batch, -(-height // 4) * 4 + 2, -(-width // 4) * 4 + 2, channels)
    framed[:, 1 : height + 1, 1 : width + 1] = images.permute(0, 2, 3, 1)
    return clear_frame(framed, height, width)


@pytest.mark.parametrize("chunk_bytes", [1, 30_000, 1 << 22])
@pytest.mark.parametrize("size", [(8, 8), (10, 13), (4, 23), (3, 1)])
def test_convolution_is_torchs_with_bias_and_relu(monkeypatch, size, chunk_bytes):
    monkeypatch.setattr(winograd, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 10, 3, padding=1).requires_grad_(False)
    fast = WinogradConvolution(layer, Workspace(), 0)
    images = torch.randn(3, 6, *size)
    framed = fast(frame(images), *size)
    inner = framed[:, 1 : size[0] + 1, 1 : size[1] + 1].permute(0, 3, 1, 2)
    torch.testing.assert_close(inner, relu(layer(images)), atol=2e-5, rtol=1e-5)
    assert framed.sum() == pytest.approx(float(inner.sum()), rel=1e-5)  # zeros around them


@pytest.fixture(scope="module")
def network() -> ControlNetHED_Apache2:
    """Random weights under which maps vary, and means as the published network has them."""
    torch.manual_seed(1)
    network = ControlNetHED_Apache2().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
            if module.out_channels == 1:
                module.weight *= 0.003
    network.norm[:] = torch.tensor([122.68, 116.67, 104.01]).view(1, 3, 1, 1)
    return network


@pytest.mark.parametrize("size", [(32, 32), (36, 50), (17, 64)])
def test_maps_are_those_of_the_network(network, size):
    images = torch.rand(2, 1, *size) * 2 - 1
    expected = _hed(network, images)
    assert expected.std() > 0.01 and 0 < expected.min() and expected.max() < 1
    maps = GrayHed(network)(images)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-5)
    levels, wanted = ((x * 255).to(torch.uint8).int() for x in (maps, expected))
    assert (levels - wanted).abs().max() <= 1


def test_passes_sizes_and_order_leave_no_trace(network, monkeypatch):
    detect = GrayHed(network)
    images = torch.rand(5, 1, 32, 32) * 2 - 1
    maps = detect(images)
    detect(torch.rand(1, 1, 48, 20))  # other sizes in the same memory
    assert torch.equal(detect(images), maps)
    monkeypatch.setattr(winograd, "PASS_PX", 2 * 32 * 32)
    torch.testing.assert_close(detect(images), maps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(detect(images[3:4]), maps[3:4], atol=1e-6, rtol=1e-5)


def test_the_first_layer_sees_gray_as_three_channels_less_their_means(network):
    images = torch.rand(2, 1, 20, 24) * 2 - 1
    framed = GrayHed(network)._start(images)
    rgb = ((images + 1) * 127.5).expand(-1, 3, -1, -1) - network.norm
    layer = network.block1.convs[0]
    expected = relu(conv2d(rgb, layer.weight, layer.bias, padding=1))
    inner = framed[:, 1:21, 1:25].permute(0, 3, 1, 2)
    torch.testing.assert_close(inner, expected, atol=1e-3, rtol=1e-5)
    assert framed[:, 0].abs().max() == framed[:, :, 25:].abs().max() == 0

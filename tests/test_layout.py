"""A segmenter's layout in memory changes neither its results nor its file."""

import copy

import pytest
import torch
from monai.networks.nets import AttentionUnet
from torch import nn

from diffboost.handlers import save_weights
from diffboost.segmentation.layout import LaidOutInstanceNorm, LaidOutPReLU, lay_out


@pytest.fixture
def network() -> AttentionUnet:
    torch.manual_seed(0)
    return AttentionUnet(2, 1, 3, [4, 8, 8], [2, 2])


def gradients(network: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of a fixed batch, and gradients of all weights."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 1, 16, 16, generator=generator)
    logits = network(images)
    (logits * torch.randn(logits.shape, generator=generator)).mean().backward()
    return logits, {name: weight.grad for name, weight in network.named_parameters()}


@pytest.mark.parametrize("channels_last", [True, False])
def test_logits_gradients_and_statistics_are_the_same(network, channels_last):
    plain = copy.deepcopy(network)
    assert lay_out(network, channels_last) is network
    (logits, found), (wanted, expected) = gradients(network), gradients(plain)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)
    if not channels_last:  # the same kernels in the same order
        assert torch.equal(logits, wanted)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_convolutions_are_laid_out_and_weights_keep_their_values(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = list(network.parameters())
    lay_out(network, channels_last=True)
    assert all(a is b for a, b in zip(weights, network.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    kernels = [weight for weight in weights if weight.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_only_a_relu_behind_a_batch_norm_works_in_place():
    relus = [nn.ReLU() for _ in range(4)]
    network = nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(2), relus[0]),
        nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.0), relus[1]),
        nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), relus[2]),
        nn.Sequential(nn.Conv2d(2, 2, 1), relus[3]),
    )
    lay_out(network, channels_last=False)
    assert [relu.inplace for relu in relus] == [True, True, False, False]


def test_the_file_does_not_depend_on_the_layout(network, tmp_path):
    save_weights(network, tmp_path / "plain.pt")
    save_weights(lay_out(network, channels_last=True), tmp_path / "laid_out.pt")
    state = torch.load(tmp_path / "laid_out.pt", weights_only=True)
    assert all(value.is_contiguous() for value in state.values())
    assert (tmp_path / "plain.pt").read_bytes() == (tmp_path / "laid_out.pt").read_bytes()


LAYERS = {
    "norm": nn.InstanceNorm2d(5),
    "affine norm": nn.InstanceNorm2d(5, eps=1e-3, affine=True),
    "prelu": nn.PReLU(),
    "prelu below zero": nn.PReLU(init=-0.3),
}


def forth_and_back(layer: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of input and weights."""
    image = image.clone().requires_grad_()
    output = layer(image)
    weights = torch.linspace(-1, 2, output.numel()).reshape(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), [image, *layer.parameters()])]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_laid_out_layers_give_what_torchs_give(name, memory_format):
    image = torch.randn(3, 5, 7, 4, generator=torch.Generator().manual_seed(0)) * 4 + 3
    image[0, 0, 0] = 0.0
    image = image.contiguous(memory_format=memory_format)
    laid_out = lay_out(nn.Sequential(copy.deepcopy(LAYERS[name])), channels_last=True)[0]
    assert type(laid_out) in (LaidOutInstanceNorm, LaidOutPReLU)
    found, expected = forth_and_back(laid_out, image), forth_and_back(LAYERS[name], image)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-5)
    assert found[0].is_contiguous(memory_format=memory_format)


def test_statistics_of_a_norm_are_float32_under_autocast():
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 20
    layer = lay_out(nn.Sequential(nn.InstanceNorm2d(3)), channels_last=True)
    with torch.autocast("cpu", torch.bfloat16):
        normed = layer(image)
    assert normed.dtype == torch.float32
    torch.testing.assert_close(normed, nn.InstanceNorm2d(3)(image), atol=1e-4, rtol=1e-4)


def test_layers_with_statistics_or_several_weights_stay_torchs():
    network = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.PReLU(3))
    kinds = [type(layer) for layer in lay_out(network, channels_last=True)]
    assert kinds == [nn.InstanceNorm2d, nn.PReLU]


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True)])
def test_what_follows_a_norm_may_write_into_its_output(activation):
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = nn.Sequential(nn.InstanceNorm2d(3), activation)
    laid_out = lay_out(copy.deepcopy(plain), channels_last=True)
    for value, wanted in zip(
        forth_and_back(laid_out, image), forth_and_back(plain, image), strict=True
    ):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-5)

"""A segmenter's layout in memory changes neither its results nor its file."""

import copy

import pytest
import torch
from monai.networks.nets import AttentionUnet
from torch import nn

from diffboost.handlers import save_weights
from diffboost.segmentation.layout import lay_out


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

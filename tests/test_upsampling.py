"""Folded upsampling convolutions: the same numbers from fewer multiplications."""

import importlib.util
from pathlib import Path

import pytest
import small_backbone
import torch
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from diffboost.generation.backbones import load_part
from diffboost.generation.networks import ControlledUNet, GrayscaleAutoencoder
from diffboost.generation.upsampling import FoldedUpsample, fold_kernel, fold_upsampling

COUNTS = Path(__file__).parents[1] / "benchmarks" / "counts.py"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return small_backbone.write_backbone(tmp_path_factory.mktemp("upsampling") / "small", 0.03)


def test_a_folded_kernel_in_closed_form():
    weight = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    kernel = fold_kernel(weight)[0, 0]
    # every output pixel sees all nine weights, spread over four neighbors
    for row in (0, 1):
        for column in (0, 1):
            assert kernel[row::2, column::2].sum() == weight.sum()
    assert kernel[0, 0] == 9 and kernel[3, 3] == 1 and kernel[1, 3] == 4 + 7


@pytest.mark.parametrize("frozen", [True, False])
def test_folded_upsampling_equals_diffusers_own_forward_and_back(frozen):
    torch.manual_seed(0)
    plain = Upsample2D(6, use_conv=True, out_channels=5).double()
    folded = FoldedUpsample(plain, frozen)
    features = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 10, 14, dtype=torch.float64)
    gradients = []
    for layer in (plain, folded):
        output = layer(features)
        wanted = [features] if frozen else [features, plain.conv.weight, plain.conv.bias]
        gradients.append([output, *torch.autograd.grad((output * weight).sum(), wanted)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(folded(features, (10, 14)), plain(features, (10, 14)))
    assert torch.equal(folded(features, (9, 13)), plain(features, (9, 13)))  # an odd side


def test_it_takes_four_ninths_of_the_multiplications():
    plain = Upsample2D(8, use_conv=True)
    flops = []
    for layer in (plain, FoldedUpsample(plain, frozen=True)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 8, 4, 4, requires_grad=True)).sum().backward()
        flops.append(counter.get_total_flops())
    weight_gradient = 2 * 8 * 8 * 9 * 64
    assert flops[0] == 3 * weight_gradient
    assert flops[1] == 2 * 2 * 8 * 8 * 16 * 16  # the kernel is frozen: no gradient of it


def test_networks_keep_their_outputs_and_the_names_of_their_weights(backbone):
    torch.manual_seed(0)
    latent, context = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    steps = torch.tensor([10, 900])
    unet, autoencoder = load_part(backbone, "unet"), load_part(backbone, "vae")
    for train_base in (False, True):
        network = ControlledUNet(backbone, train_base=train_base).eval()
        assert any(isinstance(module, FoldedUpsample) for module in network.base.modules())
        assert set(network.base.state_dict()) == set(unet.state_dict())
        with torch.no_grad():
            for side in (8, 6, 5):
                cut = latent[..., :side, :side]
                torch.testing.assert_close(
                    network(cut, steps, context), unet(cut, steps, context).sample
                )
    images = autoencoder.decode(latent).sample.mean(dim=1, keepdim=True)
    gray = GrayscaleAutoencoder(load_part(backbone, "vae"))
    torch.testing.assert_close(gray.decode(latent), images)
    assert set(gray.autoencoder.state_dict()) == set(autoencoder.state_dict())


def test_a_frozen_kernel_moves_with_its_network(backbone):
    network = ControlledUNet(backbone, precision="bfloat16", channels_last=True)
    kernels = [m.kernel for m in network.base.modules() if isinstance(m, FoldedUpsample)]
    assert {kernel.dtype for kernel in kernels} == {torch.bfloat16}
    trained = ControlledUNet(backbone, train_base=True)
    assert all(m.kernel is None for m in trained.modules() if isinstance(m, FoldedUpsample))
    fold_upsampling(trained.base)  # a second time changes nothing
    assert all(not isinstance(m.conv, FoldedUpsample) for m in trained.base.modules()
               if isinstance(m, FoldedUpsample))  # fmt: skip


def test_a_training_step_at_true_size_keeps_issue_6s_limit():
    spec = importlib.util.spec_from_file_location("counts", COUNTS)
    counts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counts)
    ours, peer = (count("sd15", 512) for count in (counts.our_training, counts.peer_training))
    assert peer == pytest.approx(3.397e12, rel=0.001)  # performance_facts 3.1: 3.40
    assert ours == pytest.approx(2.192e12, rel=0.001)  # 2.27 there, without folding
    assert ours / peer < counts.TRAINING_LIMIT

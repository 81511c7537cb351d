"""The shipped backbone: small enough, whole, and it follows edges that it has never seen."""

import json

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffboost.audit.fidelity import correlation
from diffboost.conditions.edges import load_edge_detector
from diffboost.data.phantoms import phantom_image
from diffboost.generation.backbones import PARTS, TINY_DIR
from diffboost.generation.decoding import SHIPPED, SHIPPED_DIR, load_decoder
from diffboost.generation.networks import ControlledUNet, GrayscaleAutoencoder, load_part
from diffboost.generation.sampling import VariantInferer, variant_noise
from diffboost.generation.text import embed_prompts

UNSEEN_SEED = 12345


def unseen_phantoms(number: int) -> tuple[torch.Tensor, list[str]]:
    """Images (N, 1, 64, 64) in [-1, 1] and prompts that pretraining did not have."""
    drawn = [phantom_image(UNSEEN_SEED, index, 64) for index in range(number)]
    images = torch.stack([torch.as_tensor(image.astype("float32")) for image, _ in drawn])
    return images[:, None] / 127.5 - 1, [", ".join(labels) for _, labels in drawn]


def test_tiny_is_whole_and_small():
    assert {path.name for path in TINY_DIR.iterdir()} == {*PARTS, "lineage.json"}
    assert sum(path.stat().st_size for path in TINY_DIR.rglob("*") if path.is_file()) <= 20e6
    lineage = json.loads((TINY_DIR / "lineage.json").read_text())
    assert len(lineage["cases"]) == 6000 and len(lineage["ancestors"]) == 1
    assert all(len(sha) == 64 for sha in lineage["cases"].values())


def test_tiny_autoencoder_reconstructs_unseen_phantoms():
    images, _ = unseen_phantoms(16)
    with torch.no_grad():
        rebuilt = GrayscaleAutoencoder(load_part("tiny", "vae"))(images)
    assert (rebuilt - images).abs().mean() < 0.1  # of a range of 2


def test_tiny_variants_follow_their_edges():
    images, prompts = unseen_phantoms(16)
    detector = load_edge_detector("gradient")
    hints = detector(images)
    noise = torch.stack([variant_noise(0, str(i), 0, 0, (4, 16, 16)) for i in range(16)])
    network = ControlledUNet("tiny").eval()
    with torch.no_grad():
        variants = VariantInferer("tiny")(noise, network, embed_prompts("tiny", prompts), hints)
    found = detector(variants)
    own = np.mean([correlation(f.numpy(), h.numpy()) for f, h in zip(found, hints, strict=True)])
    others = hints.roll(5, dims=0)
    other = np.mean([correlation(f.numpy(), h.numpy()) for f, h in zip(found, others, strict=True)])
    assert own > other + 0.3, (own, other)


def test_tiny_decoder_is_small_and_near_the_autoencoders_own():
    assert sum(path.stat().st_size for path in SHIPPED_DIR.iterdir()) <= 0.5e6
    images, _ = unseen_phantoms(16)
    own, tiny = load_decoder(None, "tiny"), load_decoder(SHIPPED, "tiny")
    flops = []
    with torch.no_grad():
        latents = own.encode(images).chunk(2, dim=1)[0] * own.autoencoder.config.scaling_factor
        decoded = []
        for decoder in (own, tiny):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                decoded.append(decoder.decode_scaled(latents))
            flops.append(counter.get_total_flops())
    assert (decoded[1] - decoded[0]).abs().mean() < 0.1  # of a range of 2
    assert 7 * flops[1] < flops[0]

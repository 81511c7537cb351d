"""The generator: state that is trained, targets in closed form, caches, sampling."""

import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import small_backbone
import small_store
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from diffboost.data.addresses import AddressedDataset
from diffboost.data.slices import slice_items
from diffboost.generation import cache
from diffboost.generation.backbones import load_part, resolve_backbone
from diffboost.generation.cache import Jitterd, build_cache
from diffboost.generation.creation import write_backbone
from diffboost.generation.networks import ControlledUNet, GrayscaleAutoencoder
from diffboost.generation.objective import (
    AutoencoderLoss,
    ControlPrepareBatch,
    DrawDiffusionTargetsd,
)
from diffboost.generation.sampling import VariantInferer, variant_noise
from diffboost.generation.schedulers import load_scheduler
from diffboost.generation.synthesis import VariantConditions
from diffboost.generation.text import embed_prompts, mix_embeddings
from diffboost.precision import AutocastInferer, choose_bfloat16


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A small untrained backbone whose zero convolutions are zero, as ControlNet's."""
    return small_backbone.write_backbone(tmp_path_factory.mktemp("backbone") / "small")


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Three 32 px slices on disk."""
    folder = tmp_path_factory.mktemp("slices")
    generator = np.random.RandomState(0)
    items = []
    for i in range(3):
        image = generator.randint(0, 65535, (32, 32)).astype("uint16")
        edge = generator.randint(0, 255, (32, 32)).astype("uint8")
        Image.fromarray(image).save(folder / f"image{i}.png")
        Image.fromarray(edge).save(folder / f"edge{i}.png")
        items.append(
            {
                "image": str(folder / f"image{i}.png"),
                "edge": str(folder / f"edge{i}.png"),
                "prompt": ["CT, abdomen, normal", "MR, brain, lesion", "CT, abdomen, normal"][i],
            }
        )
    return items


def test_zero_convolutions_leave_the_unet_as_it_was(backbone):
    network = ControlledUNet(backbone).eval()
    latent, context = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    steps, edge = torch.tensor([10, 900]), torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        plain = network.base(latent, steps, context).sample
        controlled = network(latent, steps, context, edge)
    torch.testing.assert_close(controlled, plain)


def test_state_dict_holds_what_is_trained(backbone):
    branch = ControlledUNet(backbone)
    assert {name.split(".")[0] for name in branch.state_dict()} == {"controlnet"}
    assert not any(p.requires_grad for p in branch.base.parameters())
    both = ControlledUNet(backbone, train_base=True)
    assert {name.split(".")[0] for name in both.state_dict()} == {"controlnet", "unet"}
    assert branch.to(torch.float64).base.conv_in.weight.dtype == torch.float64


def test_weights_round_trip_and_misfit_is_named(backbone, tmp_path):
    network = ControlledUNet(backbone, train_base=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    path = tmp_path / "model.pt"
    torch.save(network.state_dict(), path)
    again = ControlledUNet(backbone, train_base=True, weights=str(path))
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    torch.save({"controlnet.conv_in.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="does not fit the controlnet"):
        ControlledUNet(backbone, weights=str(path))
    with pytest.raises(FileNotFoundError, match="weights: .* is no file"):
        ControlledUNet(backbone, weights=str(tmp_path / "none.pt"))


def test_weights_with_another_unet_need_train_base(backbone, tmp_path):
    """The branch was trained on that UNet, and variants were drawn by the backbone's."""
    network = ControlledUNet(backbone, train_base=True)
    path = tmp_path / "model.pt"
    torch.save(network.state_dict(), path)
    assert not ControlledUNet(backbone, weights=str(path)).base.training
    with torch.no_grad():
        for parameter in network.unet.parameters():
            parameter.mul_(1.05)
    torch.save(network.state_dict(), path)
    ControlledUNet(backbone, train_base=True, weights=str(path))
    with pytest.raises(ValueError, match="weights: .* holds another UNet than .* train_base true"):
        ControlledUNet(backbone, weights=str(path))


def test_a_backbone_that_predicts_the_sample_is_refused(backbone, tmp_path):
    """It was trained on the noise, and its output read as the sample."""
    other = shutil.copytree(backbone, tmp_path / "other")
    path = other / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"prediction_type": "sample"}))
    message = "backbone: .*other: prediction_type 'sample' .* allowed: epsilon, v_prediction"
    with pytest.raises(ValueError, match=message):
        ControlPrepareBatch(str(other))
    ControlPrepareBatch(str(other), objective="flow")  # has a target of its own


def test_unknown_backbone_says_what_is_allowed(tmp_path):
    with pytest.raises(FileNotFoundError, match="allowed are 'tiny', a local folder"):
        resolve_backbone(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="part 'unet' of .* was looked for in"):
        load_part(str(tmp_path), "unet")
    with pytest.raises(ValueError, match="part: 'vea' is not one of"):
        load_part(str(tmp_path), "vea")


def test_backbone_without_branch_gets_one_from_its_encoder(backbone, tmp_path):
    parts = {name: load_part(backbone, name) for name in ("unet", "vae", "scheduler")}
    bare = write_backbone(str(tmp_path / "bare"), parts)
    branch = ControlledUNet(str(bare)).controlnet
    unet = load_part(str(bare), "unet")
    assert isinstance(unet, UNet2DConditionModel)
    assert torch.equal(branch.conv_in.weight, unet.conv_in.weight)
    assert branch.controlnet_mid_block.weight.abs().max() == 0


def test_gray_block_averages_the_channels(backbone):
    autoencoder = GrayscaleAutoencoder(load_part(backbone, "vae"))
    latent = torch.randn(2, 4, 8, 8)
    rgb = autoencoder.autoencoder.decode(latent).sample
    assert rgb.shape == (2, 3, 32, 32)
    torch.testing.assert_close(autoencoder.decode(latent)[:, 0], rgb.mean(dim=1))
    assert autoencoder.encode(torch.rand(2, 1, 32, 32)).shape == (2, 8, 8, 8)


def test_autoencoder_loss_in_closed_form():
    loss = AutoencoderLoss(gradient_weight=1.0, kl_weight=0.5)
    image = torch.zeros(1, 1, 4, 4)
    reconstruction = torch.zeros(1, 1, 4, 4)
    reconstruction[..., 2:] = 1.0
    moments = torch.zeros(1, 8, 1, 1)
    moments[:, :4] = 2.0
    # mean error 1/2; one of three column differences is 1; KL of N(2, 1) is 2 an element
    assert loss((reconstruction, moments), image).item() == pytest.approx(0.5 + 1 / 3 + 0.5 * 2)


def test_cache_keeps_moments_and_prompts(backbone, slices, tmp_path):
    items = build_cache(slices, backbone, str(tmp_path), image_size=32)
    assert len(items) == 3 and items[0]["moments"].shape == (1, 8, 8, 8)
    autoencoder = GrayscaleAutoencoder(load_part(backbone, "vae"))
    pixels = np.asarray(Image.open(slices[1]["image"])).astype("float32") / 65535 * 2 - 1
    moments = autoencoder.encode(torch.from_numpy(pixels)[None, None])[0].detach().numpy()
    np.testing.assert_allclose(items[1]["moments"][0], moments, atol=5e-3)
    np.testing.assert_array_equal(
        items[1]["edges"][0, 0], np.asarray(Image.open(slices[1]["edge"]))
    )
    contexts = embed_prompts(backbone, [slices[0]["prompt"], ""])
    np.testing.assert_allclose(items[0]["context"], contexts[0], atol=1e-5)
    np.testing.assert_allclose(items[2]["empty_context"], contexts[1], atol=1e-5)
    assert not np.allclose(items[0]["context"], items[1]["context"])
    files = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy"))
    build_cache(slices, backbone, str(tmp_path), image_size=32)
    assert files == sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy"))


def test_jittered_copies_differ_and_repeat(backbone, slices, tmp_path):
    jitter = Jitterd(20, (0.75, 1.05))
    options = {"image_size": 32, "jitter": jitter, "num_copies": 2, "seed": 1}
    first = build_cache(slices, backbone, str(tmp_path / "a"), **options)
    again = build_cache(slices, backbone, str(tmp_path / "b"), **options)
    assert not np.array_equal(first[0]["edges"][0], first[0]["edges"][1])
    np.testing.assert_array_equal(first[2]["edges"], again[2]["edges"])
    with pytest.raises(ValueError, match="num_copies: 2"):
        build_cache(slices, backbone, str(tmp_path), image_size=32, num_copies=2)


def test_processes_share_the_building_of_a_cache(backbone, slices, tmp_path, monkeypatch):
    options = {"image_size": 32, "jitter": Jitterd(20, (0.75, 1.05)), "num_copies": 3}
    options |= {"batch_size": 2}  # 9 pictures in 5 batches
    whole = build_cache(slices, backbone, str(tmp_path / "a"), **options).folder
    turns = [(1, 2), (0, 2)]  # this one process plays both, the second first
    fill = cache._fill

    def fill_in_turns(*arguments):
        for turn in turns:
            monkeypatch.setattr(cache, "process_rank_and_count", lambda turn=turn: turn)
            fill(*arguments)

    monkeypatch.setattr(cache, "_fill", fill_in_turns)
    shared = build_cache(slices, backbone, str(tmp_path / "b"), **options).folder
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert files == {path.name: path.read_bytes() for path in shared.iterdir()}
    assert set(files) == {"moments.npy", "edges.npy", "contexts.npy", "rows.npy"}
    turns[:] = [(0, 2)]  # half of it alone is not the same
    half = build_cache(slices, backbone, str(tmp_path / "c"), **options).folder
    assert (half / "moments.npy").read_bytes() != files["moments.npy"]


def test_a_cache_of_a_store_is_known_by_its_index(backbone, tmp_path):
    store_dir = small_store.write_store(tmp_path / "store", 3)
    items = slice_items(store_dir, 0, "training", inner_fraction=0)
    cached = build_cache(items, backbone, str(tmp_path / "cache"), image_size=32)
    assert len(cached) == len(items) == 10 and cached[9]["edges"].shape == (1, 1, 32, 32)
    copy = pickle.loads(pickle.dumps(cached))  # as a spawned loader process gets it
    np.testing.assert_array_equal(copy[-1]["moments"], cached[9]["moments"])
    with pytest.raises(IndexError):
        cached[10]
    (store_dir / "images").rename(store_dir / "gone")  # nothing is read again
    again = build_cache(items, backbone, str(tmp_path / "cache"), image_size=32)
    assert again.folder == cached.folder
    index = pd.read_parquet(store_dir / "index.parquet")
    index.loc[index["case"] == "case_1", "source_sha256"] = "f" * 64
    index.to_parquet(store_dir / "index.parquet")
    other = slice_items(store_dir, 0, "training", inner_fraction=0)
    with pytest.raises(FileNotFoundError, match="images"):
        build_cache(other, backbone, str(tmp_path / "cache"), image_size=32)


def test_crop_factor_zooms_in_and_rotation_moves_both():
    edge = torch.zeros(1, 32, 32)
    edge[:, 8:24, 8:24] = 1
    zoomed = Jitterd(0, (0.5, 0.5))({"image": edge.clone(), "edge": edge})
    assert zoomed["edge"].mean() > 0.9  # the inner half fills the whole
    torch.testing.assert_close(torch.as_tensor(zoomed["edge"])[0, 4:28, 4:28], torch.ones(24, 24))
    widened = Jitterd(0, (2.0, 2.0))(
        {"image": torch.ones(1, 32, 32), "edge": torch.ones(1, 32, 32)}
    )
    assert widened["edge"][0, 0, 0] == 0 and widened["image"][0, 0, 0] == 1  # padded 0, mirrored


def test_training_target_in_closed_form(backbone, slices, tmp_path):
    items = build_cache(slices, backbone, str(tmp_path), image_size=32)
    draw = DrawDiffusionTargetsd(backbone, empty_prompt=0.0)
    sample = AddressedDataset(items, draw, seed=5, cache=False)[(3, 1)]
    batch = {k: torch.as_tensor(v)[None] for k, v in sample.items()}
    noisy, target, _, conditions = ControlPrepareBatch(backbone)(batch, "cpu")
    alpha = load_part(backbone, "scheduler").alphas_cumprod[sample["timestep"]]
    expected = alpha.sqrt() * sample["latent"] + (1 - alpha).sqrt() * sample["noise"]
    torch.testing.assert_close(noisy[0], expected)
    assert torch.equal(target[0], sample["noise"])
    assert conditions["edge"].shape == (1, 1, 32, 32) and conditions["edge"].max() <= 1
    again = AddressedDataset(items, draw, seed=5, cache=False)[(3, 1)]
    assert torch.equal(sample["noise"], again["noise"])


def test_empty_prompt_is_dropped_as_often_as_asked(backbone, slices, tmp_path):
    items = build_cache(slices, backbone, str(tmp_path), image_size=32)
    dataset = AddressedDataset(items, DrawDiffusionTargetsd(backbone, 0.3), cache=False)
    empty = torch.from_numpy(np.array(items[0]["empty_context"]))
    dropped = [torch.equal(dataset[(epoch, 0)]["context"], empty) for epoch in range(300)]
    assert 0.2 < np.mean(dropped) < 0.4
    with pytest.raises(ValueError, match="empty_prompt: 1.5"):
        DrawDiffusionTargetsd(backbone, 1.5)


def test_a_side_that_the_autoencoder_cannot_halve_is_refused_before_any_work(
    backbone, slices, tmp_path
):
    message = "image_size: 30; .* needs a multiple of 4 px"
    with pytest.raises(ValueError, match=message):
        build_cache(slices, backbone, str(tmp_path / "cache"), image_size=30)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=message):
        DrawDiffusionTargetsd(backbone, 0.0, image_size=30)
    with pytest.raises(ValueError, match=message):
        VariantConditions([], backbone, {"prompt": 1.0}, image_size=30)


def test_variants_do_not_depend_on_their_batch(backbone):
    network = ControlledUNet(backbone).eval()
    noise = torch.stack([variant_noise(0, "case", 3, v, (4, 8, 8)) for v in range(3)])
    context, edge = torch.randn(3, 12, 16), torch.rand(3, 1, 32, 32)
    inferer = VariantInferer(backbone, "unipc", num_inference_steps=3)
    with torch.no_grad():
        whole = inferer(noise, network, context, edge)
        alone = inferer(noise[1:2], network, context[1:2], edge[1:2])
    assert whole.shape == (3, 1, 32, 32) and whole.abs().max() <= 1
    torch.testing.assert_close(whole[1:2], alone, atol=1e-4, rtol=0)


def test_half_precision_moves_a_variant_a_little(backbone):
    network = ControlledUNet(backbone).eval()
    inputs = torch.randn(1, 4, 8, 8), network, torch.randn(1, 12, 16), torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        full = VariantInferer(backbone, num_inference_steps=2)(*inputs)
        half = VariantInferer(backbone, num_inference_steps=2, precision="bfloat16")(*inputs)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1
    with pytest.raises(ValueError, match="precision: 'bf16' is not known"):
        VariantInferer(backbone, precision="bf16")


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "unipc", "unipc_karras", "euler"])
def test_guidance_of_equal_prompts_changes_nothing(backbone, scheduler):
    network = ControlledUNet(backbone).eval()
    noise, context = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 16)
    edge = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        plain = VariantInferer(backbone, scheduler, 2)(noise, network, context, edge)
        guided = VariantInferer(backbone, scheduler, 2, guidance_scale=9.0)
        images = guided(noise, network, context, edge, negative_context=context)
    torch.testing.assert_close(images, plain, atol=1e-4, rtol=0)


def test_sampling_values_out_of_range_are_named(backbone):
    with pytest.raises(ValueError, match="scheduler: 'ddmi' is not one of"):
        load_scheduler(backbone, "ddmi")
    with pytest.raises(ValueError, match="num_inference_steps: 0"):
        VariantInferer(backbone, num_inference_steps=0)
    with pytest.raises(ValueError, match="guidance_scale: 0.5"):
        VariantInferer(backbone, guidance_scale=0.5)
    narrow = {"num_inference_steps": 5, "guidance_scale": 9.0}
    with pytest.raises(ValueError, match=r"guidance_interval: \[0.25, 0.35\] holds none of"):
        VariantInferer(backbone, guidance_interval=(0.25, 0.35), **narrow)
    with pytest.raises(ValueError, match=r"control_interval: \[0.9, 1.0\] holds none of"):
        VariantInferer(backbone, control_interval=(0.9, 1.0))
    VariantInferer(backbone, guidance_interval=(0.25, 0.35))  # no guidance, so no matter


def test_prompt_mix_is_linear():
    parts = {"prompt": torch.ones(2, 3), "phrase": 2 * torch.ones(2, 3), "style": torch.zeros(2, 3)}
    mixed = mix_embeddings(parts, {"prompt": 0.5, "phrase": 0.25})
    torch.testing.assert_close(mixed, torch.ones(2, 3))
    with pytest.raises(ValueError, match="phrases"):
        mix_embeddings(parts, {"phrases": 1.0})
    with pytest.raises(ValueError, match="prompt_weights: {'prompt': 0.0}; one of them"):
        mix_embeddings(parts, {"prompt": 0.0})


def test_noise_has_an_address_of_its_own():
    first = variant_noise(0, "a", 1, 2, (4, 8, 8))
    assert torch.equal(first, variant_noise(0, "a", 1, 2, (4, 8, 8)))
    for other in [(1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 2), (0, "a", 1, 3)]:
        assert not torch.equal(first, variant_noise(*other, (4, 8, 8)))


def test_noise_by_variant_is_the_same_for_every_slice():
    first = variant_noise(0, "a", 1, 2, (4, 8, 8), "variant")
    assert torch.equal(first, variant_noise(0, "b", 5, 2, (4, 8, 8), "variant"))
    for other in [(1, "a", 1, 2), (0, "a", 1, 3)]:
        assert not torch.equal(first, variant_noise(*other, (4, 8, 8), "variant"))


def test_autocast_runs_in_bfloat16_and_gives_float32():
    network, image = torch.nn.Linear(64, 64), torch.randn(4, 64)
    plain = AutocastInferer(amp=False)(image, network)
    torch.testing.assert_close(plain, network(image))
    rounded = AutocastInferer(amp=True)(image, network)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, atol=0.05, rtol=0.05)


def test_bfloat16_is_chosen_where_the_processor_is_made_for_it(monkeypatch):
    assert choose_bfloat16(True, "cpu") is True and choose_bfloat16(False, "cpu") is False
    for capability, chosen in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=capability: it)
        assert choose_bfloat16("auto", "cpu") is chosen
    with pytest.raises(ValueError, match="amp: 'fast' is not known; allowed: true, false, auto"):
        choose_bfloat16("fast", "cpu")

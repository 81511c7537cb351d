"""Exports of the segmentation network: ONNX against torch, TorchScript, MONAI Deploy's reading."""

import json
from pathlib import Path

import monai.bundle
import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImage, LoadImaged, SaveImage, SaveImaged
from small_store import draw_ball
from test_federated import BUNDLES, SEGMENTATION

from diffboost.package import json_twin

CONFIGS = BUNDLES / SEGMENTATION / "configs"
NETWORK = {"image_size": 32, "num_classes": 3, "channels": [4, 8, 8]}
OVERLAYS = ["network_unet", "network_residual_unet"]  # the larger ones are in docs/tracking.md


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A release's folder in small: JSON config, metadata and a model whose batch norms have seen
    images."""
    root = tmp_path_factory.mktemp("bundle")
    (root / "configs").mkdir()
    (root / "models").mkdir()
    config = json.loads(json_twin(CONFIGS / "inference.yaml"))
    (root / "configs" / "inference.json").write_text(json.dumps(config | NETWORK))
    metadata = (CONFIGS / "metadata.json").read_text()
    (root / "configs" / "metadata.json").write_text(metadata)
    write_weights(root / "configs" / "inference.json", root / "models" / "model.pt")
    return root


def write_weights(config: Path | list, path: Path) -> torch.nn.Module:
    """Writes and returns the network of a config, with statistics that are not the initial ones."""
    parser = ConfigParser(ConfigParser.load_config_files(config))
    parser.update(NETWORK | {"device": "cpu"})
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def").eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    torch.save(network.state_dict(), path)
    return network


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_onnx_gives_torchs_logits(bundle, tmp_path, overlay):
    config = [str(bundle / "configs" / "inference.json")]
    config += [str(CONFIGS / f"{overlay}.yaml")] if overlay else []
    network = write_weights(config, tmp_path / "model.pt")
    monai.bundle.onnx_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.onnx"),
        ckpt_file=str(tmp_path / "model.pt"),
        config_file=config,
        input_shape=[1, 1, 32, 32],
        converter_kwargs={"input_names": ["image"], "output_names": ["pred"]},
        device="cpu",
    )
    image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (pred,) = session.run(["pred"], {"image": image.numpy()})
    with torch.no_grad():
        expected = network(image).numpy()
    assert pred.shape == (1, 3, 32, 32) and np.abs(expected).max() > 0.1
    assert np.abs(pred - expected).max() <= 1e-4


@pytest.mark.parametrize("use_trace", [False, True])
def test_torchscript_gives_torchs_logits(bundle, tmp_path, use_trace):
    monai.bundle.ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        use_trace=use_trace,
        input_shape=[1, 1, 32, 32],
        device="cpu",
    )
    network = write_weights([str(bundle / "configs" / "inference.json")], tmp_path / "model.pt")
    image = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        difference = torch.jit.load(tmp_path / "model.ts")(image) - network(image)
    assert difference.abs().max() <= 1e-4


def without(compose: Compose, *kinds: type) -> Compose:
    """What Deploy's operator does to a bundle's transforms: reading and writing is its own."""
    kept = []
    for transform in compose.transforms:
        if isinstance(transform, Compose):
            transform = without(transform, *kinds)
        if not isinstance(transform, kinds):
            kept.append(transform)
    return Compose(kept)


def test_deploys_operator_can_run_the_bundle(bundle):
    """The reading rules of MONAI Deploy App SDK 3.5 (ecosystem.md 3.6), on an array in memory."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    formats = metadata["network_data_format"]
    assert all(
        "type" in each for group in ("inputs", "outputs") for each in formats[group].values()
    )
    name, output = next(iter(formats["inputs"])), next(iter(formats["outputs"]))
    parser = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()))
    parser["bundle_root"] = str(bundle)
    parser["device"] = "$torch.device('cpu')"
    network = parser.get_parsed_content("network_def")
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    network.load_state_dict(state.get("state_dict", state.get("model", state)), strict=True)
    before = without(parser.get_parsed_content("preprocessing"), LoadImage, LoadImaged)
    after = without(parser.get_parsed_content("postprocessing"), SaveImage, SaveImaged)
    volume, _ = draw_ball((40, 36, 5), seed=0)
    affine = torch.diag(torch.tensor([0.8, 0.9, 3.0, 1.0], dtype=torch.float64))
    meta = {"affine": affine, "original_affine": affine, "space": "RAS",
            "spatial_shape": volume.shape, "original_channel_dim": "no_channel"}  # fmt: skip
    item = before({name: MetaTensor(torch.from_numpy(volume).float(), meta=meta)})
    with torch.no_grad():
        logits = parser.get_parsed_content("inferer")(item[name][None], network.eval())
    item[output] = logits[0]
    pred = after(item)[output]
    assert pred.dtype == torch.uint8 and pred.shape == (1, *volume.shape)
    assert set(pred.unique().tolist()) <= {0, 1, 2}

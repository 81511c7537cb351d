"""Backbones: the autoencoder, UNet, ControlNet branch, text encoder, tokenizer and scheduler.

A backbone is a folder in the layout of diffusers, with one sub-folder a part: ``tiny`` is such a
folder inside this package, a hub id is one on the Hugging Face hub, any local folder is taken as it
is. Or it is a single file in the original layout (:mod:`diffboost.generation.single_file`). A
folder's networks may be MONAI's (:mod:`diffboost.generation.monai_networks`). So the tiny default
and Stable Diffusion 1.5 differ in nothing but this name.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import constants, hf_hub_download
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffboost.data.documents import read_json
from diffboost.files import sha256_of_files
from diffboost.generation.config_limits import refuse_absurd
from diffboost.generation.monai_networks import MonaiControlNet, MonaiUNet, is_monai, monai_class
from diffboost.generation.single_file import (
    SUFFIXES,
    load_single_file,
    load_tokenizer,
    parts_of,
    read_tokenizer,
)

logger = logging.getLogger(__name__)

TINY_DIR = Path(__file__).parents[1] / "weights" / "tiny"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD15_DIR = TINY_DIR.with_name("sd15")  # configs alone, no weights
# What diffusers, transformers and safetensors raise on damaged parts: diffusers asserts numbers of
# channels (AssertionError) and lacks some ways of loading (NotImplementedError); a damaged config
# may ask for an optional package (ImportError).
MISFITS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    AssertionError, NotImplementedError, ImportError, SafetensorError,
)  # fmt: skip
PARTS = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "controlnet": ControlNetModel,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "scheduler": DDPMScheduler,
}


def resolve_backbone(backbone: str) -> str:
    """The folder or hub id that a backbone's name stands for.

    Args:
        backbone: ``tiny``; ``sd15`` for Stable Diffusion 1.5's hub id; another hub id
            ``owner/name``; a local folder in the layout of diffusers; a single file in the original
            layout of latent diffusion or ControlLDM.

    Raises:
        FileNotFoundError: ``tiny`` lacks its weights, or a path does not exist.

    Source: engineering choice.
    """
    if backbone == "tiny":
        if not (TINY_DIR / "unet").is_dir():
            raise FileNotFoundError(
                f"backbone: 'tiny' was looked for in {TINY_DIR} and is not there; "
                "`make tiny_weights` pretrains it on phantoms"
            )
        return str(TINY_DIR)
    if backbone == "sd15":
        return SD15
    path = Path(backbone).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix in SUFFIXES):
        return str(path)
    looks_like_hub_id = backbone.count("/") == 1 and not backbone.startswith((".", "/", "~"))
    if path.is_file() or not looks_like_hub_id or path.suffix in SUFFIXES:
        raise FileNotFoundError(
            f"backbone: {backbone!r} is no folder and no file that ends in {', '.join(SUFFIXES)}; "
            "allowed are 'tiny', a local folder in the layout of diffusers (vae/, unet/, "
            "text_encoder/, tokenizer/, scheduler/), a single file in the original layout, and a "
            f"hub id such as '{SD15}'"
        )
    return backbone


def has_part(backbone: str, part: str) -> bool:
    """Whether a backbone brings this part; a hub id is taken to hold Stable Diffusion's parts."""
    root = Path(resolve_backbone(backbone))
    if root.is_file():
        return part in parts_of(root) or part in ("tokenizer", "scheduler")
    return (root / part).is_dir() if root.is_dir() else part != "controlnet"


def load_config(backbone: str, part: str) -> dict:
    """The configuration of a part, without its weights; the class's defaults fill what it leaves.

    Stable Diffusion 1.5's configurations lie in this package, so its hub id needs no hub. A
    backbone without a branch gives that of the branch that would start from its UNet.

    Args:
        backbone: see :func:`resolve_backbone`.
        part: vae, unet, controlnet, text_encoder or scheduler.

    Returns:
        Keyword arguments of the part's class (of its configuration's class for the text encoder),
        and where it was written the class's name under ``_class_name``.

    Raises:
        ValueError: the part's name is none of these.
        FileNotFoundError: the configuration is not in the folder, nor on the hub or in its cache.

    Source: engineering choice.
    """
    allowed = sorted(set(PARTS) - {"tokenizer"})
    if part not in allowed:
        raise ValueError(f"part: {part!r} is not one of {allowed}")
    if part == "controlnet" and _config_path(backbone, part) is None:
        with torch.device("meta"):
            return dict(new_branch(backbone, load_part(backbone, "unet")).config)
    path = _config_path(backbone, part)
    given = read_json(path, "backbone")
    refuse_absurd(given, path)
    if part == "text_encoder":
        return CLIPTextModel.config_class(**given).to_dict()
    if is_monai(given):
        return monai_class(part, given).complete(given)
    parameters = inspect.signature(PARTS[part].__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | given


def new_branch(backbone: str, unet: nn.Module) -> ControlNetModel | MonaiControlNet:
    """A branch that starts from the UNet's encoder, with zero convolutions.

    Args:
        backbone: brings the number of the autoencoder's levels, for a UNet of MONAI's.
        unet: the backbone's, of diffusers or of MONAI.

    Source: ControlNet (Zhang et al. 2023).
    """
    if isinstance(unet, MonaiUNet):
        levels = len(load_config(backbone, "vae")["block_out_channels"])
        return MonaiControlNet.from_unet(unet, levels)
    return ControlNetModel.from_unet(unet)


def _config_path(backbone: str, part: str) -> Path | None:
    """The JSON file of a part's configuration; None for a branch that the backbone lacks."""
    root = Path(resolve_backbone(backbone))
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    beside = root.parent if root.is_file() else root
    for path in (beside / part / name, beside / part / "config.json"):
        if path.is_file():
            return path
    unlike_sd15 = part == "controlnet" and (beside / "unet" / "config.json").is_file()
    if root == Path(SD15) or (root.is_file() and not unlike_sd15):
        return SD15_DIR / part / "config.json"
    if part == "controlnet":
        return None
    if root.is_dir():
        raise _missing_part(backbone, part)
    try:
        return Path(hf_hub_download(backbone, f"{part}/{name}"))
    except OSError as error:
        raise _missing_part(backbone, part) from error


def load_part(backbone: str, part: str) -> nn.Module | CLIPTokenizer | DDPMScheduler:
    """One part of a backbone; networks in float32, in evaluation mode and without gradients.

    Args:
        backbone: see :func:`resolve_backbone`.
        part: vae, unet, controlnet, text_encoder, tokenizer or scheduler.

    Raises:
        ValueError: the part's name is none of these.
        FileNotFoundError: the part is not in the folder, nor on the hub or in its local cache.

    Under ``torch.device("meta")`` a network is made from its configuration alone, without weights.

    Source: paper Sec. 3.1 (latent diffusion with text conditioning); loading is diffusers'.
    """
    if part not in PARTS:
        raise ValueError(f"part: {part!r} is not one of {sorted(PARTS)}")
    if torch.get_default_device().type == "meta" and issubclass(PARTS[part], nn.Module):
        return _without_weights(backbone, part)
    root = resolve_backbone(backbone)
    if Path(root).is_file():
        loaded = _load_from_file(root, part)
    else:
        # refuses absurd sizes before memory is taken
        config = {} if part == "tokenizer" else load_config(backbone, part)
        try:
            loaded = _load_from_folder(root, part, config)
        except OSError as error:
            raise _missing_part(backbone, part) from error
        except MISFITS as error:
            raise ValueError(
                f"backbone: the part {part!r} of {root} is damaged or does not fit its "
                f"configuration: {' '.join(str(error).split())[:500]}"
            ) from error
    if isinstance(loaded, nn.Module):
        loaded = loaded.float().eval().requires_grad_(False)
    return loaded


def _load_from_folder(
    root: str, part: str, config: Mapping
) -> nn.Module | CLIPTokenizer | DDPMScheduler:
    """One part of a folder or of a hub id."""
    if part == "tokenizer":
        return read_tokenizer(root, subfolder=part)
    if is_monai(config):
        return monai_class(part, config).load(Path(root) / part)
    options = {"use_safetensors": True} if issubclass(PARTS[part], nn.Module) else {}
    return PARTS[part].from_pretrained(root, subfolder=part, **options)


def _load_from_file(path: str, part: str) -> nn.Module | CLIPTokenizer | DDPMScheduler:
    """One part of a single-file backbone."""
    if part == "tokenizer":
        return load_tokenizer(path)
    config = load_config(path, part)
    if part == "scheduler":  # as written: samplers have defaults of their own for what it leaves
        return DDPMScheduler.from_config(read_json(_config_path(path, part), "backbone"))
    return load_single_file(path, part, lambda: _without_weights(path, part), config)


def _without_weights(backbone: str, part: str) -> nn.Module:
    """A network on the default device as its configuration makes it."""
    config = load_config(backbone, part)
    if part == "text_encoder":
        network = CLIPTextModel(CLIPTextModel.config_class(**config))
    else:
        kind = monai_class(part, config) if is_monai(config) else PARTS[part]
        network = kind.from_config(config)
    return network.eval().requires_grad_(False)


def _missing_part(backbone: str, part: str) -> FileNotFoundError:
    """Says where a part was looked for and what gets it."""
    root = Path(resolve_backbone(backbone))
    if root.is_dir():
        found = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
        return FileNotFoundError(
            f"backbone: the part {part!r} of {root} was looked for in {root / part}; there "
            f"is {found}; `hf download {SD15} --local-dir {root}` gets Stable Diffusion 1.5"
        )
    return FileNotFoundError(
        f"backbone: the part {part!r} of {backbone!r} was looked for on the hub and in its local "
        f"cache {constants.HF_HUB_CACHE} (HF_HUB_OFFLINE={int(constants.HF_HUB_OFFLINE)}); "
        f"`hf download {backbone} --include '{part}/*'` on a machine with a network gets it"
    )


def backbone_sha256(backbone: str) -> str:
    """Hash over a local backbone's files (names and bytes), a single file's with what stands beside
    it; a hub id hashes its name.

    Source: engineering choice.
    """
    root = Path(resolve_backbone(backbone))
    digest = hashlib.sha256()
    if root.is_file():
        digest.update(bytes.fromhex(_file_sha256(root, root.stat().st_mtime_ns)))
        for part in sorted({*parts_of(root), "scheduler"}):
            digest.update(json.dumps(load_config(str(root), part), sort_keys=True).encode())
        root = root.parent / "tokenizer"
    elif not root.is_dir():
        digest.update(str(root).encode())
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(bytes.fromhex(_file_sha256(path, path.stat().st_mtime_ns)))
    return digest.hexdigest()


def part_sha256(backbone: str, part: str) -> str | None:
    """Hash over the files of one part of a local folder; None where a backbone is no folder.

    Source: engineering choice.
    """
    folder = Path(resolve_backbone(backbone)) / part
    if not folder.is_dir():
        return None
    return sha256_of_files(path for path in sorted(folder.iterdir()) if path.is_file())


@lru_cache(maxsize=256)
def _file_sha256(path: Path, changed_ns: int) -> str:
    """A file's hash; checkpoints of gigabytes are read once a process."""
    return sha256_of_files([path])

"""Backbones: the autoencoder, UNet, ControlNet branch, text encoder, tokenizer and scheduler.

Every backbone is a folder in the layout of diffusers, with one sub-folder a part. ``tiny`` is such
a folder inside this package; a hub id is one on the Hugging Face hub; any local folder is taken as
it is. So the tiny default and Stable Diffusion 1.5 differ in nothing but this name.
"""

import hashlib
import inspect
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

TINY_DIR = Path(__file__).parents[1] / "weights" / "tiny"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD15_DIR = TINY_DIR.with_name("sd15")  # configs alone, no weights
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
        backbone: ``tiny``, a local folder in the layout of diffusers, a hub id ``owner/name``, or
            ``sd15`` for Stable Diffusion 1.5's hub id.

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
    if path.is_dir():
        return str(path)
    looks_like_hub_id = backbone.count("/") == 1 and not backbone.startswith((".", "/", "~"))
    if path.is_file() or not looks_like_hub_id:
        raise FileNotFoundError(
            f"backbone: {backbone!r} is no folder; allowed are 'tiny', a local folder in the "
            "layout of diffusers (vae/, unet/, text_encoder/, tokenizer/, scheduler/) "
            "and a hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'"
        )
    return backbone


def has_part(backbone: str, part: str) -> bool:
    """Whether a backbone brings this part; a hub id is taken to hold Stable Diffusion's parts."""
    root = Path(resolve_backbone(backbone))
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
    if part == "controlnet" and resolve_backbone(backbone) != SD15 and not has_part(backbone, part):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(load_config(backbone, "unet"))
            return dict(ControlNetModel.from_unet(unet, load_weights_from_unet=False).config)
    given = json.loads(_config_path(backbone, part).read_text(encoding="utf-8"))
    if part == "text_encoder":
        return CLIPTextModel.config_class(**given).to_dict()
    parameters = inspect.signature(PARTS[part].__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | given


def _config_path(backbone: str, part: str) -> Path:
    """The JSON file of a part's configuration, from the hub where the backbone is a hub id."""
    root = Path(resolve_backbone(backbone))
    if root == Path(SD15):
        return SD15_DIR / part / "config.json"
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    if not root.is_dir():
        try:
            return Path(hf_hub_download(backbone, f"{part}/{name}"))
        except OSError as error:
            raise _missing_part(backbone, part) from error
    if not (root / part / name).is_file():
        raise _missing_part(backbone, part)
    return root / part / name


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
    options = {"use_safetensors": True} if issubclass(PARTS[part], nn.Module) else {}
    try:
        loaded = PARTS[part].from_pretrained(root, subfolder=part, **options)
    except OSError as error:
        raise _missing_part(backbone, part) from error
    if isinstance(loaded, nn.Module):
        loaded = loaded.float().eval().requires_grad_(False)
    return loaded


def _without_weights(backbone: str, part: str) -> nn.Module:
    """A network on the default device as its configuration makes it, for counting."""
    config = load_config(backbone, part)
    if part == "text_encoder":
        network = CLIPTextModel(CLIPTextModel.config_class(**config))
    else:
        network = PARTS[part].from_config(config)
    return network.eval().requires_grad_(False)


def _missing_part(backbone: str, part: str) -> FileNotFoundError:
    """Says where a part was looked for and what gets it."""
    root = Path(resolve_backbone(backbone))
    if root.is_dir():
        found = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
        return FileNotFoundError(
            f"backbone: the part {part!r} was looked for in {root / part}; {root} holds {found}; "
            f"`hf download {SD15} --local-dir {root}` gets Stable Diffusion 1.5"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "0")
    return FileNotFoundError(
        f"backbone: the part {part!r} of {backbone!r} was looked for on the hub and in its local "
        f"cache {HF_HUB_CACHE} (HF_HUB_OFFLINE={offline}); "
        f"`hf download {backbone} --include '{part}/*'` on a machine with a network gets it"
    )


def backbone_sha256(backbone: str) -> str:
    """Hash over the files of a local backbone (names and bytes); a hub id hashes its name.

    Source: engineering choice.
    """
    root = Path(resolve_backbone(backbone))
    digest = hashlib.sha256()
    if not root.is_dir():
        digest.update(str(backbone).encode())
        return digest.hexdigest()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def write_backbone(
    output_dir: str,
    parts: dict[str, object],
    base: str | None = None,
    half: bool = False,
    lineage: dict | None = None,
) -> Path:
    """Write a backbone folder: the given parts, and the others as they are in ``base``.

    Args:
        output_dir: the folder; it is written aside and moved into place when whole.
        parts: name of a part to the loaded part; the names are those of ``PARTS``.
        base: the backbone that brings the parts not given.
        half: store weights as float16, half the size.
        lineage: what the weights have seen, written as ``lineage.json``.

    Raises:
        FileExistsError: ``output_dir`` exists.

    Source: engineering choice.
    """
    target = Path(output_dir)
    if target.exists():
        raise FileExistsError(f"output_dir: {target} exists; remove it or name another folder")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in PARTS:
        if name in parts:
            part = parts[name]
            if half and isinstance(part, nn.Module):
                part = part.half()
            part.save_pretrained(partial / name)
            _forget_path(partial / name / "config.json")
        elif base is not None and has_part(base, name):
            shutil.copytree(Path(resolve_backbone(base)) / name, partial / name)
    if lineage is not None:
        (partial / "lineage.json").write_text(json.dumps(lineage, sort_keys=True) + "\n")
    partial.rename(target)
    logger.info(
        "wrote backbone %s: %s", target, ", ".join(sorted(p.name for p in target.iterdir()))
    )
    return target


def _forget_path(config: Path) -> None:
    """Drop the path of the machine where a part was loaded from; diffusers keeps it."""
    if config.is_file():
        content = json.loads(config.read_text())
        content.pop("_name_or_path", None)
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

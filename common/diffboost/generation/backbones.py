"""Backbones: the autoencoder, UNet, ControlNet branch, text encoder, tokenizer and scheduler.

Every backbone is a folder in the layout of diffusers, with one sub-folder a part. ``tiny`` is such
a folder inside this package; a hub id is one on the Hugging Face hub; any local folder is taken as
it is. So the tiny default and Stable Diffusion 1.5 differ in nothing but this name.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

TINY_DIR = Path(__file__).parents[1] / "weights" / "tiny"
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
        backbone: ``tiny``, a local folder in the layout of diffusers, or a hub id ``owner/name``.

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


def load_part(backbone: str, part: str) -> nn.Module | CLIPTokenizer | DDPMScheduler:
    """One part of a backbone; networks in float32, in evaluation mode and without gradients.

    Args:
        backbone: see :func:`resolve_backbone`.
        part: vae, unet, controlnet, text_encoder, tokenizer or scheduler.

    Raises:
        ValueError: the part's name is none of these.
        FileNotFoundError: the part is not in the folder, nor on the hub or in its local cache.

    Source: paper Sec. 3.1 (latent diffusion with text conditioning); loading is diffusers'.
    """
    if part not in PARTS:
        raise ValueError(f"part: {part!r} is not one of {sorted(PARTS)}")
    root = resolve_backbone(backbone)
    options = {"use_safetensors": True} if issubclass(PARTS[part], nn.Module) else {}
    try:
        loaded = PARTS[part].from_pretrained(root, subfolder=part, **options)
    except OSError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0")
        raise FileNotFoundError(
            f"backbone: the part {part!r} of {backbone!r} was looked for in {root}/{part} and in "
            f"the local hub cache (HF_HUB_OFFLINE={offline}); "
            f"`hf download {backbone}` on a machine with a network gets it"
        ) from error
    if isinstance(loaded, nn.Module):
        loaded = loaded.float().eval().requires_grad_(False)
    return loaded


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

"""What a synthetic PNG says inside: the facts that its bytes follow from, and a hash of the file.

Every fact is a text chunk ``diffboost:<name>``. The last chunk before the end is the seal: the hash
of the whole file with zeros in the hash's place. Sealing a file again gives the same bytes, or a
byte was changed.
"""

import hashlib
import io
import platform
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import diffusers
import numpy as np
import PIL
import torch
import transformers
from PIL import Image, features

from diffboost import __version__
from diffboost.conditions.prompts import STOCK_NEGATIVE_PROMPT
from diffboost.data.slices import write_image

PREFIX = "diffboost:"
FORMAT = 4  # of these facts
DESCRIPTION = (
    "Synthetic image, drawn by a generative model (DiffBoost) from the edges of a training slice. "
    "It shows no person; use it for research, never for diagnosis."
)
# What each variant has of its own, what a run's variants share, and where they were made.
VARIANT_FACTS = {
    "case": str, "slice": int, "variant": int, "prompt": str, "phrase": str, "batch_place": int,
    "source_sha256": str, "edge_sha256": str,
}  # fmt: skip
RUN_FACTS = {
    "seed": int, "noise_address": str, "scheduler": str, "num_inference_steps": int,
    "guidance_scale": float, "guidance_interval": str, "control_scale": float,
    "control_interval": str, "decoder": str, "decoder_sha256": str, "prompt_weights": str,
    "precision": str, "batch_size": int, "image_size": int, "backbone": str,
    "backbone_sha256": str, "model_sha256": str, "lineage_sha256": str, "license": str,
    "purpose": str, "deformation_px": float, "deformation_spacing_px": int,
    "negative_prompt": str,
}  # fmt: skip
MACHINE_FACTS = {
    "format": int, "versions": str, "machine": str, "threads": int, "matmul_precision": str,
}  # fmt: skip
FACTS = {**VARIANT_FACTS, **RUN_FACTS, **MACHINE_FACTS}
OWN_DECODER = "the backbone's"  # what facts call no tiny decoder; no folder is called so
# What was always so before a format and is not written there; in format 1 the decoder's hash was
# the backbone's.
BEFORE_FORMAT = {
    2: {
        "guidance_interval": "[0.0, 1.0]", "control_interval": "[0.0, 1.0]",
        "decoder": OWN_DECODER, "decoder_sha256": None,
    },
    3: {"deformation_px": 0.0, "deformation_spacing_px": 16},
    4: {"negative_prompt": STOCK_NEGATIVE_PROMPT},
}  # fmt: skip


def facts_before(format_: int, backbone_sha256: str) -> dict:
    """The facts that files of an older format do not say, since they were always so.

    Args:
        format_: of the files.
        backbone_sha256: theirs.

    Source: engineering choice.
    """
    later = {
        n: v for first, facts in BEFORE_FORMAT.items() if first > format_ for n, v in facts.items()
    }
    return {name: backbone_sha256 if value is None else value for name, value in later.items()}


_SEAL = b"tEXt" + f"{PREFIX}file_sha256".encode() + b"\0"
_NO_HASH = b"0" * 64
_END = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


def backbone_name(backbone: str) -> str:
    """What a file calls its backbone: a hub id whole, of a path the last name.

    A whole path would say who used which machine.

    Args:
        backbone: as ``resolve_backbone`` takes it.

    Source: engineering choice.
    """
    is_path = backbone.startswith((".", "/", "~")) or backbone.count("/") != 1
    return Path(backbone).name if is_path or Path(backbone).exists() else backbone


def machine_facts(device: str | torch.device) -> dict:
    """Where variants are made: programs, kind of processor, threads; rounding depends on these.

    Args:
        device: where the networks run.

    Source: engineering choice (issue 5, "Provenance").
    """
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    name = torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(device)
    packer = "zlib-ng" if features.check("zlib_ng") else "zlib"
    versions = {
        "diffboost": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        packer: features.version(packer.replace("-", "_")),
    }
    return {
        "format": FORMAT,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "machine": f"{device.type} {platform.machine()} {name}",
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def variant_png(image: np.ndarray, facts: Mapping[str, object]) -> bytes:
    """A variant as the bytes of its file: 16-bit PNG with its facts, sealed.

    Args:
        image: float (H, W) in [-1, 1].
        facts: all of :data:`FACTS`; those that their format does not know are left out.

    Raises:
        KeyError: a fact is missing.

    Source: engineering choice (issue 5, "Provenance").
    """
    text = {"Description": DESCRIPTION, "Software": "DiffBoost"}
    text[f"{PREFIX}format"] = facts["format"]
    later = facts_before(facts["format"], facts["backbone_sha256"])
    text |= {PREFIX + name: kind(facts[name]) for name, kind in FACTS.items() if name not in later}
    file = io.BytesIO()
    write_image(file, image, text)
    return _seal(file.getvalue().removesuffix(_END) + _seal_chunk(_NO_HASH) + _END)


def _seal_chunk(digest: bytes) -> bytes:
    """The chunk that holds the file's hash."""
    body = _SEAL + digest
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


_TAIL = len(_seal_chunk(_NO_HASH)) + len(_END)


def _seal(data: bytes) -> bytes:
    """The file's bytes with the right hash in the seal, which stands at the end."""
    unsealed = data[:-_TAIL] + _seal_chunk(_NO_HASH) + _END
    digest = hashlib.sha256(unsealed).hexdigest().encode()
    return data[:-_TAIL] + _seal_chunk(digest) + _END


def is_intact(data: bytes) -> bool:
    """Whether every byte of a sealed file is as it was written.

    Args:
        data: the file's bytes.

    Source: engineering choice (issue 5, "one-byte edits are found").
    """
    return len(data) > _TAIL and _seal(data) == data


def is_sealed(data: bytes) -> bool:
    """Whether a file has a seal at all, broken or not."""
    return _SEAL in data


def is_whole(path: str | Path) -> bool:
    """Whether a file is there and intact; what a loss of power left half written is not."""
    try:
        return is_intact(Path(path).read_bytes())
    except FileNotFoundError:
        return False


def read_facts(data: bytes) -> dict | None:
    """The facts of a synthetic PNG, by their types; None if it says nothing.

    Args:
        data: the file's bytes; whether they are intact is not asked here.

    Raises:
        ValueError: it was written by another version, or is damaged.

    Source: engineering choice (issue 5, "Provenance").
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
            text = dict(file.info)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"no readable PNG: {error}") from None
    if not any(str(name).startswith(PREFIX) for name in text):
        return None
    if text.get(f"{PREFIX}format") not in map(str, range(1, FORMAT + 1)):
        raise ValueError(
            f"its facts have the format {text.get(PREFIX + 'format', 'of a version before 1')}, "
            f"this program knows 1 to {FORMAT}; nothing in it can be verified"
        )
    try:
        before = facts_before(int(text[f"{PREFIX}format"]), text[f"{PREFIX}backbone_sha256"])
        text |= {PREFIX + name: value for name, value in before.items()}
        return {name: kind(text[PREFIX + name]) for name, kind in FACTS.items()}
    except (KeyError, ValueError) as error:
        raise ValueError(f"its facts are incomplete or damaged: {error}") from None

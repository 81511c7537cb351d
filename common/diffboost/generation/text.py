"""Prompts to embeddings: the frozen text encoder, and the weighted mix used at synthesis."""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from diffboost.generation.backbones import has_part, load_config, load_part

logger = logging.getLogger(__name__)


def takes_prompts(backbone: str) -> bool:
    """Whether a backbone's UNet is conditioned on texts; where it is not, the log says it once."""
    if not has_part(backbone, "unet"):
        return True
    conditioned = load_config(backbone, "unet").get("with_conditioning", True)
    if not conditioned:
        _warn_once(
            f"backbone: the UNet of {backbone} is not conditioned (with_conditioning: false): "
            "prompts and guidance change nothing"
        )
    return conditioned


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    """Logs a warning that a process has not yet logged."""
    logger.warning(message)


def embed_prompts(
    backbone: str, prompts: Sequence[str], device: str | torch.device = "cpu", batch_size: int = 256
) -> torch.Tensor:
    """Embeddings of prompts by the backbone's frozen text encoder.

    Args:
        backbone: see :func:`diffboost.generation.backbones.resolve_backbone`.
        prompts: N texts; longer ones are cut at the tokenizer's length. "" is the empty prompt.
        device: where the encoder runs.
        batch_size: prompts encoded at a time.

    Returns:
        (N, tokens, width) float32 on the CPU; (N, 1, 1) zeros where the UNet takes no prompts.

    Source: paper Sec. 3.1 (CLIP text conditioning).
    """
    if not takes_prompts(backbone):
        return torch.zeros(len(prompts), 1, 1)
    tokenizer = load_part(backbone, "tokenizer")
    encoder = load_part(backbone, "text_encoder").to(device)
    embeddings = []
    with torch.inference_mode():
        for start in range(0, len(prompts), batch_size):
            tokens = tokenizer(
                list(prompts[start : start + batch_size]),
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
            embeddings.append(encoder(tokens.to(device)).last_hidden_state.float().cpu())
    return torch.cat(embeddings).clone()


def mix_embeddings(parts: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Weighted sum of embeddings, as the released code mixes them (facts 16).

    Args:
        parts: name to embedding (tokens, width), e.g. prompt, phrase, style.
        weights: name to weight; a name without embedding is an error, weight 0 leaves one out.

    Raises:
        ValueError: a weight names no part, or all are 0.

    Source: released code, ``segmentation_sample.py`` (0.045 prompt, 0.005 phrase, 0.95 style).
    """
    unknown = sorted(set(weights) - set(parts))
    if unknown:
        raise ValueError(f"prompt_weights: {unknown} not known; allowed are {sorted(parts)}")
    if not any(weights.values()):
        raise ValueError(f"prompt_weights: {dict(weights)}; one of them at least must not be 0")
    return sum(weight * parts[name] for name, weight in weights.items() if weight != 0)

"""Prompts to embeddings: the frozen text encoder, and the weighted mix used at synthesis."""

from collections.abc import Mapping, Sequence

import torch

from diffboost.generation.backbones import load_part


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
        (N, tokens, width) float32 on the CPU.

    Source: paper Sec. 3.1 (CLIP text conditioning).
    """
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
        ValueError: a weight names no part.

    Source: released code, ``segmentation_sample.py`` (0.045 prompt, 0.005 phrase, 0.95 style).
    """
    unknown = sorted(set(weights) - set(parts))
    if unknown:
        raise ValueError(f"prompt_weights: {unknown} not known; allowed are {sorted(parts)}")
    return sum(weight * parts[name] for name, weight in weights.items() if weight != 0)

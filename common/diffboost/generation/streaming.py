"""Training items without a cache of latents: images are read and encoded in the step."""

from collections.abc import Sequence

import numpy as np
import torch

from diffboost.data.items import SliceItems
from diffboost.generation.cache import Jitterd, build_cache
from diffboost.generation.text import embed_prompts


class StreamedItems(Sequence):
    """Slices with their paths and the embeddings of their prompts.

    Args:
        data: the slices.
        backbone: brings the text encoder.
        device: where the text encoder runs; every prompt is embedded once, at the start.

    Source: engineering choice.
    """

    def __init__(self, data: SliceItems, backbone: str, device: str | torch.device = "cpu") -> None:
        self.data = data
        prompts = ["", *data.unique("prompt")]
        contexts = embed_prompts(backbone, prompts, device).numpy()
        self.contexts = dict(zip(prompts, contexts, strict=True))

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, str | np.ndarray]:
        """The paths ``image`` and ``edge``, ``context`` and ``empty_context`` of a slice."""
        item = self.data[index]
        return {
            "image": item["image"],
            "edge": item["edge"],
            "context": self.contexts[item["prompt"]],
            "empty_context": self.contexts[""],
        }


def training_items(
    cache_latents: bool,
    data: SliceItems,
    backbone: str,
    cache_dir: str,
    image_size: int,
    jitter: Jitterd | None = None,
    num_copies: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    latent_precision: str = "float16",
) -> Sequence[dict]:
    """Items for training the generator, with cached latents or with paths.

    Args:
        cache_latents: encode every slice once, into ``cache_dir``
            (:func:`diffboost.generation.cache.build_cache`); otherwise keep nothing, and the step
            encodes, with a new jitter in every epoch instead of ``num_copies``.
        data: the slices.
        backbone, cache_dir, image_size, jitter, num_copies, seed, device, latent_precision: as for
            the cache.

    Returns:
        What ``DrawDiffusionTargetsd`` takes, a dictionary a slice.

    Source: engineering choice.
    """
    if not cache_latents:
        return StreamedItems(data, backbone, device)
    return build_cache(
        data,
        backbone,
        cache_dir,
        image_size,
        jitter,
        num_copies,
        seed=seed,
        device=device,
        latent_precision=latent_precision,
    )

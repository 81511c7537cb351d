"""Latents, edges and prompt embeddings of a training set, computed once and memory-mapped.

The posterior's moments are cached, not a sample of it: the noise of the latent is still drawn in
every step. Where geometric jitter is on, ``num_copies`` jittered copies of each slice are cached.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Affine, Compose, RandomizableTransform
from tqdm import tqdm

from diffboost.data.addresses import address_seed
from diffboost.data.transforms import LoadSliced
from diffboost.generation.backbones import backbone_sha256, load_part
from diffboost.generation.networks import GrayscaleAutoencoder
from diffboost.generation.text import embed_prompts
from diffboost.handlers import is_main_process, wait_for_processes

logger = logging.getLogger(__name__)


class Jitterd(RandomizableTransform):
    """Rotation and centre crop of an image and its edge together.

    Args:
        rotation_degrees: the angle is uniform in ± this.
        crop: the crop's side over the image's, uniform in this range; above 1 pads.

    Image borders are mirrored, edges are padded with 0.

    Source: released code, ``segmentation_dataset.py`` (facts 8: ±20 degrees, 0.75 to 1.05).
    """

    def __init__(self, rotation_degrees: float, crop: tuple[float, float]) -> None:
        super().__init__(prob=1.0)
        self.rotation_degrees = rotation_degrees
        self.crop = tuple(crop)

    def __call__(self, data: dict) -> dict:
        """``image`` and ``edge``, each (1, H, W), moved alike; the other keys stay."""
        angle = np.deg2rad(self.R.uniform(-self.rotation_degrees, self.rotation_degrees))
        factor = self.R.uniform(*self.crop)
        out = dict(data)
        for key, padding in (("image", "reflection"), ("edge", "zeros")):
            affine = Affine(
                rotate_params=angle,
                scale_params=(factor, factor),
                padding_mode=padding,
                image_only=True,
            )
            out[key] = affine(data[key])
        return out


def build_cache(
    data: Sequence[dict],
    backbone: str,
    cache_dir: str,
    image_size: int,
    jitter: Jitterd | None = None,
    num_copies: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
) -> list[dict]:
    """Items for training the generator, backed by memory-mapped files; built if not there yet.

    Args:
        data: slice items with the paths ``image`` and ``edge`` and the text ``prompt``.
        backbone: brings the autoencoder and the text encoder.
        cache_dir: a folder for caches; each lies in a sub-folder named by a hash of its content.
        image_size: side in pixels.
        jitter: geometric jitter, or None for the slice as it is.
        num_copies: jittered copies of each slice; 1 where ``jitter`` is None.
        seed: draws the jitter of each copy, with the slice's index.
        device: where the autoencoder runs.
        batch_size: images encoded at a time.

    Returns:
        One dictionary a slice: ``moments`` (copies, 2C, h, w) float16, ``edges`` (copies, 1, H, W)
        uint8, ``context`` and ``empty_context`` (tokens, width) float32.

    Raises:
        ValueError: ``num_copies`` and ``jitter`` contradict each other.

    Source: engineering choice (``reference/performance_facts.md`` 3.3); jitter as in facts 8.
    """
    if (jitter is None) != (num_copies == 1):
        raise ValueError(f"num_copies: {num_copies} with jitter {jitter}; 1 means no jitter")
    folder = Path(cache_dir) / _cache_key(data, backbone, image_size, jitter, num_copies, seed)
    if is_main_process() and not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _fill(partial, data, backbone, image_size, jitter, num_copies, seed, device, batch_size)
        partial.rename(folder)
    wait_for_processes()
    moments = np.load(folder / "moments.npy", mmap_mode="r")
    edges = np.load(folder / "edges.npy", mmap_mode="r")
    contexts = np.load(folder / "contexts.npy", mmap_mode="r")
    rows = json.loads((folder / "prompts.json").read_text())
    return [
        {
            "moments": moments[i],
            "edges": edges[i],
            "context": contexts[row],
            "empty_context": contexts[0],
        }
        for i, row in enumerate(rows)
    ]


def _cache_key(data, backbone, image_size, jitter, num_copies, seed) -> str:
    digest = hashlib.sha256()
    draws = (jitter.rotation_degrees, jitter.crop, seed) if jitter is not None else None
    digest.update(repr((backbone_sha256(backbone), image_size, num_copies, draws)).encode())
    for item in data:
        for key in ("image", "edge"):
            digest.update(hashlib.sha256(Path(item[key]).read_bytes()).digest())
        digest.update(item["prompt"].encode())
    return digest.hexdigest()[:16]


def _fill(folder, data, backbone, image_size, jitter, num_copies, seed, device, batch_size) -> None:
    """Encode every copy of every slice into ``folder``."""
    autoencoder = GrayscaleAutoencoder(load_part(backbone, "vae")).to(device).eval()
    load = LoadSliced(["image", "edge"], image_size=image_size)
    transform = Compose([jitter] if jitter is not None else [])
    moments, edges = None, None
    addresses = [(index, copy) for index in range(len(data)) for copy in range(num_copies)]
    for start in tqdm(range(0, len(addresses), batch_size), desc="caching latents"):
        batch = addresses[start : start + batch_size]
        samples = []
        for index, copy in batch:
            transform.set_random_state(seed=address_seed(seed, "jitter", copy, index))
            samples.append(transform(load({key: data[index][key] for key in ("image", "edge")})))
        images = torch.stack([torch.as_tensor(s["image"]) for s in samples]).float()
        with torch.inference_mode():
            encoded = autoencoder.encode(images.to(device)).half().cpu().numpy()
        if moments is None:
            shape = (len(data), num_copies)
            moments = _memory_map(folder / "moments.npy", "float16", shape + encoded.shape[1:])
            edges = _memory_map(folder / "edges.npy", "uint8", shape + samples[0]["edge"].shape)
        for (index, copy), moment, sample in zip(batch, encoded, samples, strict=True):
            moments[index, copy] = moment
            edges[index, copy] = np.clip(np.asarray(sample["edge"]) * 255 + 0.5, 0, 255)
    moments.flush()
    edges.flush()
    prompts = ["", *sorted({item["prompt"] for item in data})]
    np.save(folder / "contexts.npy", embed_prompts(backbone, prompts, device).numpy())
    rows = [prompts.index(item["prompt"]) for item in data]
    (folder / "prompts.json").write_text(json.dumps(rows))
    logger.info("cached %d slices x %d copies in %s", len(data), num_copies, folder)


def _memory_map(path: Path, dtype: str, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(shape))

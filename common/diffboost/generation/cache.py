"""Latents, edges and prompt embeddings of a training set, computed once and kept on disk.

The posterior's moments are cached, not a sample of it: the noise of the latent is still drawn in
every step. Where geometric jitter is on, ``num_copies`` jittered copies of each slice are cached.
"""

import hashlib
import logging
import os
import shutil
import tokenize
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Affine, Compose, RandomizableTransform
from tqdm import tqdm

from diffboost.data.addresses import address_seed
from diffboost.data.containment import refuse_special
from diffboost.data.items import SliceItems
from diffboost.data.slices import sha256_of_files
from diffboost.data.transforms import LoadSliced
from diffboost.generation.backbones import backbone_sha256, load_part
from diffboost.generation.networks import GrayscaleAutoencoder
from diffboost.generation.text import embed_prompts
from diffboost.processes import is_main_process, process_rank_and_count, wait_for_processes

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


# What numpy raises on a damaged head, which it reads as Python's own text.
_NPY_ERRORS = (ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError, LookupError)


def load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    """A .npy file of numbers; Python objects, which could run code, are not loaded.

    Args:
        path: the file.
        mmap_mode: as for numpy's ``load``.

    Raises:
        ValueError: it is damaged or holds objects; remove the cache's folder, it is made again.

    Source: engineering choice (issue 5, "Hostile input").
    """
    refuse_special(path, "cache_dir")
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (*_NPY_ERRORS, tokenize.TokenError) as error:
        raise ValueError(f"cache_dir: {path} is damaged: {error}; remove its folder") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.ndim:
        raise ValueError(f"cache_dir: {path} holds no array of numbers; remove its folder")
    return array


class ArrayFile:
    """Rows of a ``.npy`` file, read and written in place.

    Not a memory map: pages of one stay resident, and a cache is larger than memory.

    Args:
        path: the file.
        writable: whether rows will be written.

    Source: engineering choice.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        header = load_array(path, mmap_mode="r")
        self.shape, self.dtype, self._offset = header.shape, header.dtype, header.offset
        self._row_bytes = header[:1].nbytes
        self._file = open(path, "r+b" if writable else "rb", buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        """A row, as a new array."""
        row = range(len(self))[row]
        values = np.empty(self.shape[1:], self.dtype)
        start = self._offset + row * self._row_bytes
        if os.preadv(self._file.fileno(), [values], start) != self._row_bytes:
            raise OSError(f"{self._file.name} ends before row {row}")
        return values

    def write(self, row: int, part: int, values: np.ndarray) -> None:
        """Writes ``values`` as number ``part`` of the parts of a row."""
        values = np.ascontiguousarray(values, self.dtype)
        start = self._offset + row * self._row_bytes + part * values.nbytes
        if os.pwrite(self._file.fileno(), values, start) != values.nbytes:
            raise OSError(f"{self._file.name}: row {row} was not written, is the disk full?")


class CachedItems(Sequence):
    """A finished cache as items for training; nothing is read before it is used.

    Args:
        folder: the cache.

    Source: engineering choice.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._moments = ArrayFile(self.folder / "moments.npy")
        self._edges = ArrayFile(self.folder / "edges.npy")
        self._contexts = load_array(self.folder / "contexts.npy")
        self._rows = load_array(self.folder / "rows.npy")
        fits = self._rows.ndim == 1 and len(self._rows) == len(self._moments) == len(self._edges)
        if not fits or not (0 <= self._rows).all() or not (self._rows < len(self._contexts)).all():
            raise ValueError(
                f"cache_dir: {self.folder}: rows.npy does not fit the others; remove the folder"
            )

    def __reduce__(self) -> tuple:
        """Pickles the folder; spawned workers open the files themselves."""
        return type(self), (self.folder,)

    def __len__(self) -> int:
        """Number of slices."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """``moments``, ``edges``, ``context`` and ``empty_context`` of a slice."""
        return {
            "moments": self._moments[index],
            "edges": self._edges[index],
            "context": self._contexts[self._rows[index]],
            "empty_context": self._contexts[0],
        }


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
) -> CachedItems:
    """Items for training the generator, backed by files on disk; built if not there yet.

    All processes of torch.distributed build it together, each a run of batches; the files are the
    same for any number of them.

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
    there = folder.is_dir()
    wait_for_processes()  # all have looked before one of them begins
    if there:
        return CachedItems(folder)
    partial = folder.with_name(folder.name + ".partial")
    autoencoder = GrayscaleAutoencoder(load_part(backbone, "vae")).to(device).eval()
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_prompts(partial, data, backbone, device)
        _make_files(partial, autoencoder, (len(data), num_copies), image_size)
    wait_for_processes()
    _fill(partial, data, autoencoder, image_size, jitter, num_copies, seed, device, batch_size)
    wait_for_processes()
    if is_main_process():
        partial.rename(folder)
        logger.info("cached %d slices x %d copies in %s", len(data), num_copies, folder)
    wait_for_processes()
    return CachedItems(folder)


def _cache_key(data, backbone, image_size, jitter, num_copies, seed) -> str:
    """Names a cache by what is in it; a store's slices are known by the hashes of its index."""
    digest = hashlib.sha256()
    draws = (jitter.rotation_degrees, jitter.crop, seed) if jitter is not None else None
    digest.update(repr((backbone_sha256(backbone), image_size, num_copies, draws)).encode())
    if isinstance(data, SliceItems):
        digest.update(data.fingerprint().encode())
    else:
        for item in data:
            digest.update(sha256_of_files([item["image"]]).encode())
            digest.update(sha256_of_files([item["edge"]]).encode())
            digest.update(item["prompt"].encode())
    return digest.hexdigest()[:16]


def _write_prompts(folder: Path, data, backbone: str, device) -> None:
    """Embeds every prompt once, the empty one first; writes which one each slice has."""
    prompts = ["", *sorted({item["prompt"] for item in data})]
    np.save(folder / "contexts.npy", embed_prompts(backbone, prompts, device).numpy())
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    rows = (numbers[item["prompt"]] for item in data)
    np.save(folder / "rows.npy", np.fromiter(rows, np.int32, len(data)))


def _make_files(folder: Path, autoencoder, shape: tuple[int, int], image_size: int) -> None:
    """Makes the files of moments and edges, without contents."""
    config = autoencoder.autoencoder.config
    side = image_size // 2 ** (len(config.block_out_channels) - 1)
    sizes = {
        "moments": ("float16", (2 * config.latent_channels, side, side)),
        "edges": ("uint8", (1, image_size, image_size)),
    }
    for name, (dtype, each) in sizes.items():
        path = folder / f"{name}.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(*shape, *each)).flush()


def _fill(folder, data, autoencoder, image_size, jitter, num_copies, seed, device, batch_size):
    """Encodes this process's run of batches into the files of ``folder``."""
    load = LoadSliced(["image", "edge"], image_size=image_size)
    transform = Compose([jitter] if jitter is not None else [])
    moments = ArrayFile(folder / "moments.npy", writable=True)
    edges = ArrayFile(folder / "edges.npy", writable=True)
    total = len(data) * num_copies
    rank, count = process_rank_and_count()
    num_batches = -(-total // batch_size)
    mine = range(rank * num_batches // count, (rank + 1) * num_batches // count)
    for number in tqdm(mine, desc="caching latents", disable=rank > 0):
        last = min(total, (number + 1) * batch_size)
        places = [divmod(place, num_copies) for place in range(number * batch_size, last)]
        samples = []
        for index, copy in places:
            transform.set_random_state(seed=address_seed(seed, "jitter", copy, index))
            item = data[index]
            samples.append(transform(load({key: item[key] for key in ("image", "edge")})))
        images = torch.stack([torch.as_tensor(sample["image"]) for sample in samples]).float()
        with torch.inference_mode():
            encoded = autoencoder.encode(images.to(device)).half().cpu().numpy()
        for (index, copy), moment, sample in zip(places, encoded, samples, strict=True):
            moments.write(index, copy, moment)
            edges.write(index, copy, np.clip(np.asarray(sample["edge"]) * 255 + 0.5, 0, 255))

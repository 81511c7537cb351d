"""Latents, edges and prompt embeddings of a training set, computed once and kept on disk.

The posterior's moments are cached, not a sample of it: the noise of the latent is still drawn in
every step. Where geometric jitter is on, ``num_copies`` jittered copies of each slice are cached.
"""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Affine, Compose, RandomizableTransform
from tqdm import tqdm

from diffboost.data.addresses import address_seed
from diffboost.data.items import SliceItems
from diffboost.data.transforms import LoadSliced
from diffboost.files import flush, flush_folder, sha256_of_files
from diffboost.generation.array_files import (
    DONE,
    ArrayFile,
    CachedItems,
    DoneBatches,
    make_array_file,
)
from diffboost.generation.backbones import backbone_sha256, load_part
from diffboost.generation.latents import latent_shape
from diffboost.generation.networks import GrayscaleAutoencoder
from diffboost.generation.text import embed_prompts
from diffboost.knobs import nearest
from diffboost.locks import hold_folder, release_folder
from diffboost.processes import is_main_process, process_rank_and_count, wait_for_processes
from diffboost.records import same_command_goes_on

logger = logging.getLogger(__name__)

LATENT_PRECISIONS = ("float16", "float32")
FLUSHED_BATCHES = 8  # are lost at most, and encoded again, when a process is killed


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
    latent_precision: str = "float16",
) -> CachedItems:
    """Items for training the generator, backed by files on disk; built if not there yet.

    All processes of torch.distributed build it together, each a run of batches; the files are the
    same for any number of them. An interrupted run is gone on with at the batches that it lacks.

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
        latent_precision: float16, or float32, in which the encoder computes.

    Returns:
        One dictionary a slice: ``moments`` (copies, 2C, h, w) of ``latent_precision``, ``edges``
        (copies, 1, H, W) uint8, ``context`` and ``empty_context`` (tokens, width) float32.

    Raises:
        ValueError: ``num_copies`` and ``jitter`` contradict each other, ``latent_precision`` is
            none of its two, or the autoencoder cannot halve the side.
        OSError: there is no room for the files, or they cannot be written.
        BlockingIOError: another run is building it.

    Source: engineering choice (``reference/performance_facts.md`` 3.3); jitter as in facts 8.
    """
    if (jitter is None) != (num_copies == 1):
        raise ValueError(f"num_copies: {num_copies} with jitter {jitter}; 1 means no jitter")
    if latent_precision not in LATENT_PRECISIONS:
        raise ValueError(
            f"latent_precision: {latent_precision!r} is not known; "
            f"{nearest(latent_precision, LATENT_PRECISIONS)}"
        )
    latent = latent_shape(backbone, image_size)
    key = _cache_key(data, backbone, image_size, jitter, num_copies, seed, latent_precision)
    folder = Path(cache_dir) / key
    there = folder.is_dir()
    wait_for_processes()  # all have looked before one of them begins
    if there:
        _drop_notes(folder)
        return CachedItems(folder)
    partial_dir = folder.with_name(folder.name + ".partial")
    autoencoder = GrayscaleAutoencoder(load_part(backbone, "vae")).to(device).eval()
    pictures = _Pictures(
        data,
        autoencoder,
        latent,
        image_size,
        jitter,
        num_copies,
        seed,
        device,
        batch_size,
        latent_precision,
    )
    done = DoneBatches(partial_dir, len(pictures), batch_size)
    with same_command_goes_on(partial_dir):
        if is_main_process():
            hold_folder(partial_dir)
            _open(partial_dir, done, data, backbone, pictures)
        wait_for_processes()
        _fill(partial_dir, done, pictures)
        wait_for_processes()
        if is_main_process():
            partial_dir.rename(folder)
            flush(folder.parent)
            _drop_notes(folder)
            release_folder(partial_dir)
            logger.info("cached %d slices x %d copies in %s", len(data), num_copies, folder)
        wait_for_processes()
    return CachedItems(folder)


def _open(folder: Path, done: DoneBatches, data, backbone: str, pictures: "_Pictures") -> None:
    """Makes the files of a cache, with the prompts and without pictures, or keeps those there."""
    if done.is_begun():
        logger.info("%s: going on with what an interrupted run left", folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_prompts(folder, data, backbone, pictures.device)
    for name, (dtype, each) in pictures.shapes().items():
        shape = (len(data), pictures.num_copies, *each)
        make_array_file(folder / f"{name}.npy", dtype, shape)
    flush_folder(folder)  # pictures are flushed as they are written
    done.begin()


def _drop_notes(folder: Path) -> None:
    """Removes the file of done batches from a whole cache; a kill may have left it there."""
    if is_main_process():
        for path in folder.glob(f"{DONE}*"):
            path.unlink()


def _cache_key(data, backbone, image_size, jitter, num_copies, seed, latent_precision) -> str:
    """Names a cache by what is in it; a store's slices are known by the hashes of its index."""
    digest = hashlib.sha256()
    draws = (jitter.rotation_degrees, jitter.crop, seed) if jitter is not None else None
    content = (backbone_sha256(backbone), image_size, num_copies, draws, latent_precision)
    digest.update(repr(content).encode())
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


class _Pictures:
    """The pictures of a cache, jittered, in batches.

    Args:
        data, image_size, jitter, num_copies, seed, device, batch_size, latent_precision: see
            :func:`build_cache`.
        autoencoder: encodes the images.
        latent: channels, height and width of what it encodes them to.
    """

    def __init__(
        self,
        data,
        autoencoder,
        latent,
        image_size,
        jitter,
        num_copies,
        seed,
        device,
        batch_size,
        latent_precision,
    ) -> None:
        self.data = data
        self.autoencoder = autoencoder
        self.latent = latent
        self.image_size = image_size
        self.transform = Compose([jitter] if jitter is not None else [])
        self.num_copies = num_copies
        self.seed = seed
        self.device = device
        self.batch_size = batch_size
        self.latent_precision = latent_precision
        self.load = LoadSliced(["image", "edge"], image_size=image_size)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.data) * self.num_copies // self.batch_size)

    def shapes(self) -> dict[str, tuple]:
        """Type and shape of a picture's moments and edge."""
        channels, *sides = self.latent
        moments = (2 * channels, *sides)
        return {
            "moments": (self.latent_precision, moments),
            "edges": ("uint8", (1, self.image_size, self.image_size)),
        }

    def write(self, number: int, moments: ArrayFile, edges: ArrayFile) -> None:
        """Encodes a batch into the two files."""
        last = min(len(self.data) * self.num_copies, (number + 1) * self.batch_size)
        places = [divmod(i, self.num_copies) for i in range(number * self.batch_size, last)]
        samples = [self._sample(*place) for place in places]
        images = torch.stack([torch.as_tensor(sample["image"]) for sample in samples]).float()
        with torch.inference_mode():
            encoded = self.autoencoder.encode(images.to(self.device)).cpu().numpy()
        for place, moment, sample in zip(places, encoded, samples, strict=True):
            moments.write(*place, moment)
            edges.write(*place, np.clip(np.asarray(sample["edge"]) * 255 + 0.5, 0, 255))

    def _sample(self, index: int, copy: int) -> dict:
        """Image and edge of a jittered copy of a slice."""
        self.transform.set_random_state(seed=address_seed(self.seed, "jitter", copy, index))
        item = self.data[index]
        return self.transform(self.load({key: item[key] for key in ("image", "edge")}))


def _fill(folder: Path, done: DoneBatches, pictures: _Pictures) -> None:
    """Encodes what is missing of this process's run of batches into the files of ``folder``."""
    moments = ArrayFile(folder / "moments.npy", writable=True)
    edges = ArrayFile(folder / "edges.npy", writable=True)
    rank, count = process_rank_and_count()
    mine = range(rank * len(pictures) // count, (rank + 1) * len(pictures) // count)
    todo = done.missing(mine)
    with tqdm(desc="caching latents", total=len(todo), disable=rank > 0) as bar:
        for start in range(0, len(todo), FLUSHED_BATCHES):
            group = todo[start : start + FLUSHED_BATCHES]
            for number in group:
                pictures.write(number, moments, edges)
                bar.update()
            moments.flush()
            edges.flush()
            done.mark(group)

"""Synthesis: variants to make of training slices and phrases, and their conditions."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from monai.engines import PrepareBatch
from monai.transforms import Transform

from diffboost.conditions.prompts import augmentation_phrase
from diffboost.data.slices import read_store, slice_items
from diffboost.data.tasks import slicing
from diffboost.data.transforms import LoadSliced
from diffboost.files import sha256_of_files
from diffboost.generation.backbones import backbone_sha256
from diffboost.generation.latents import latent_shape
from diffboost.generation.lineage import read_lineage_document
from diffboost.generation.networks import ControlledUNet
from diffboost.generation.sampling import (
    NOISE_ADDRESSES,
    variant_noise,
    variant_step_seed,
)
from diffboost.generation.text import embed_prompts, mix_embeddings
from diffboost.knobs import nearest

# The released code's fixed words of every mix (facts 16).
STYLE_PROMPT = "gray, sketch"
QUALITY_SUFFIX = ", best quality, extremely detailed"


def read_generator(generator_dir: str) -> dict:
    """Lineage of a generator and the hashes of its two files.

    Args:
        generator_dir: folder with ``model.pt`` and ``lineage.json``.

    Raises:
        FileNotFoundError: one of the two is missing.

    Source: engineering choice.
    """
    folder = Path(generator_dir)
    for name in ("model.pt", "lineage.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"generator_dir: {folder} has no {name}; task_finetune's output_dir gets both"
            )
    return {
        **read_lineage_document(folder / "lineage.json"),
        "model_sha256": sha256_of_files([folder / "model.pt"]),
        "lineage_sha256": sha256_of_files([folder / "lineage.json"]),
    }


def refuse_other_backbone(generator: Mapping, generator_dir: str, backbone: str) -> str:
    """Refuses a backbone that is not, byte for byte, the one that a generator was trained on.

    Args:
        generator: what ``read_generator`` gives.
        generator_dir: for the message.
        backbone: that is to be used with it.

    Returns:
        The backbone's hash.

    Raises:
        ValueError: it is another one, or was damaged since.

    Source: engineering choice (design, "lineage"; safetensors have no checksum).
    """
    found_sha256 = backbone_sha256(backbone)
    trained_on = str(generator.get("backbone_sha256"))  # None: a Pix2Pix model
    if trained_on != found_sha256:
        raise ValueError(
            f"generator_dir: the model in {generator_dir} was trained on backbone "
            f"{generator.get('backbone')!r} ({trained_on[:12]}), "
            f"not on backbone: {backbone!r} ({found_sha256[:12]})"
        )
    return found_sha256


def _fact(generator: Mapping, name: str, generator_dir: str) -> object:
    """What a generator's lineage says under a name; raises ValueError if it does not."""
    if name not in generator:
        raise ValueError(f"generator_dir: {generator_dir}: its lineage.json has no '{name}'")
    return generator[name]


def load_generator(generator_dir: str | None, backbone: str) -> ControlledUNet:
    """The network of a trained generator, without gradients; None is the backbone's own branch."""
    if generator_dir is None:
        network = ControlledUNet(backbone)
    else:
        generator = read_generator(generator_dir)
        refuse_other_backbone(generator, generator_dir, backbone)
        train_base = _fact(generator, "train_base", generator_dir)
        network = ControlledUNet(backbone, train_base, str(Path(generator_dir) / "model.pt"))
    return network.requires_grad_(False).eval()


def variant_items(
    store_dir: str,
    generator_dir: str,
    fold: int,
    ratio: int,
    seed: int,
    min_foreground_px: int = 0,
    **selection,
) -> list[dict]:
    """One item a variant to make: its source slice, its number, its phrase.

    First come the variants 0 of all slices, then all variants 1, and so on: a larger ratio appends
    items and moves none to another place in a batch, on which its rounding depends.

    Args:
        store_dir: the slice store.
        generator_dir: its generator must come from this fold.
        fold: whose training part (without the inner validation) is varied.
        ratio: variants a slice; paper's augmentation ratio.
        seed: with case, slice and variant the address of the noise.
        min_foreground_px: slices with less foreground get no variants.
        **selection: further arguments of :func:`diffboost.data.slices.slice_items`.

    Raises:
        ValueError: ``ratio`` is below 1, or the generator was finetuned on another fold.

    Source: paper Sec. 3.4; variant i uses phrase i mod 50 (facts 17).
    """
    if ratio < 1:
        raise ValueError(f"ratio: {ratio} is not 1 or more")
    trained_fold = _fact(read_generator(generator_dir), "fold", generator_dir)
    if trained_fold is not None and trained_fold != fold:
        raise ValueError(
            f"fold: {fold}, but the generator in {generator_dir} was finetuned on fold "
            f"{trained_fold}; it may have seen test cases of fold {fold}"
        )
    slices = slice_items(
        store_dir, fold=fold, part="training", min_foreground_px=min_foreground_px, **selection
    )
    slices = with_source_hashes(store_dir, slices)
    return [
        {**item, "variant": variant, "phrase": augmentation_phrase(variant), "seed": seed}
        for variant in range(ratio)
        for item in slices
    ]


def with_source_hashes(store_dir: str, slices: Iterable[dict]) -> list[dict]:
    """Items of slices, with the hash of the case's files and how slices were cut from these.

    The keys are ``source_sha256`` and ``slicing``, see :func:`diffboost.data.tasks.slicing`.

    Args:
        store_dir: the slice store.
        slices: as ``slice_items`` gives them.

    Source: engineering choice (issue 5, "Provenance").
    """
    store = read_store(store_dir)
    hashes, cut = store.source_sha256(), json.dumps(slicing(store.header["task"]))
    return [{**item, "source_sha256": hashes[item["case"]], "slicing": cut} for item in slices]


class VariantConditions(Transform):
    """Noise, edge, prompt and negative prompt of one variant.

    Args:
        data: all items; each of their texts is embedded alone, so that no embedding depends on
            which others there are.
        backbone: brings text encoder and latent shape.
        prompt_weights: weights of ``prompt``, ``phrase`` and ``style`` in the embedding's mix.
        image_size: side in pixels.
        noise_address: see :func:`diffboost.generation.sampling.variant_noise`.
        negative_prompt: what guidance leads away from; "" is what the empty prompts of finetuning
            teach, and what a distilled generator was guided by.
        device: where the text encoder runs.

    Raises:
        ValueError: ``noise_address`` is unknown, or the autoencoder cannot halve the side.

    Source: released code, ``segmentation_sample.py`` (facts 16, 17, 19).
    """

    def __init__(
        self,
        data: Sequence[dict],
        backbone: str,
        prompt_weights: Mapping[str, float],
        image_size: int,
        noise_address: str = "case",
        negative_prompt: str = "",
        device: str | torch.device = "cpu",
    ) -> None:
        if noise_address not in NOISE_ADDRESSES:
            raise ValueError(
                f"noise_address: {noise_address!r}; {nearest(noise_address, NOISE_ADDRESSES)}"
            )
        self.noise_address = noise_address
        self.prompt_weights = dict(prompt_weights)
        self.negative_prompt = negative_prompt
        self.latent_shape = latent_shape(backbone, image_size)
        self.load = LoadSliced(["edge"], image_size=image_size)
        texts = {item["prompt"] + self._suffix() for item in data}
        texts |= {item["phrase"] for item in data} | {STYLE_PROMPT, negative_prompt}
        texts = sorted(texts)
        embeddings = embed_prompts(backbone, texts, device, batch_size=1)
        self.embedding = dict(zip(texts, embeddings, strict=True))

    def _suffix(self) -> str:
        """The released code's quality words belong to its style mix alone."""
        return QUALITY_SUFFIX if self.prompt_weights.get("style", 0) > 0 else ""

    def __call__(self, data: dict) -> dict:
        """``image`` (noise, (C, h, w)), ``step_seeds`` (an integer), ``context``,
        ``negative_context``, ``edge`` (1, H, W)."""
        address = (data["seed"], data["case"], data["slice"], data["variant"])
        parts = {
            "prompt": self.embedding[data["prompt"] + self._suffix()],
            "phrase": self.embedding[data["phrase"]],
            "style": self.embedding[STYLE_PROMPT],
        }
        return {
            "image": variant_noise(*address, self.latent_shape, self.noise_address),
            "step_seeds": variant_step_seed(*address, self.noise_address),
            "context": mix_embeddings(parts, self.prompt_weights),
            "negative_context": self.embedding[self.negative_prompt],
            "edge": self.load({"edge": data["edge"]})["edge"],
            "case": data["case"],
            "slice": data["slice"],
            "variant": data["variant"],
        }


class VariantPrepareBatch(PrepareBatch):
    """Noise in, no target; prompt, negative prompt, edge and seeds go to the inferer."""

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        """(noise, None, (), {context, negative_context, edge, step_seeds}), all but the seeds on
        ``device``."""
        names = ("context", "negative_context", "edge")
        moved = {k: batchdata[k].to(device, non_blocking=non_blocking) for k in ("image", *names)}
        seeds = torch.as_tensor(batchdata["step_seeds"])
        return moved["image"], None, (), {**{k: moved[k] for k in names}, "step_seeds": seeds}

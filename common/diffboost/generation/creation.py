"""A new backbone from nothing: small parts of the same classes as Stable Diffusion 1.5."""

import json
import logging
import shutil
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffboost.conditions.prompts import ABBREVIATIONS, augmentation_phrase
from diffboost.data.documents import read_json
from diffboost.files import flush, flush_folder
from diffboost.generation.backbones import PARTS, has_part, load_part, resolve_backbone
from diffboost.generation.lineage import write_lineage

logger = logging.getLogger(__name__)

# Words that prompts of RadImageNet and of the shipped tasks are made of.
PROMPT_WORDS = (
    "CT MR MRI US abdomen pelvis chest lung brain spine shoulder hip knee ankle foot thyroid "
    "breast prostate spleen liver kidney hippocampus organ gland normal benign malignant "
    "lesion mass cyst nodule tumor fracture tear edema hemorrhage infarct stone dilated fluid "
    "fibrosis arterial pathology chondral post op central peripheral anterior posterior"
)

END_OF_WORD = "</w>"  # CLIP's mark of a word's last letter


def train_tokenizer(texts: list[str], vocab_size: int, max_tokens: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from these texts; any other ASCII text falls to letters.

    The library numbers a word's last letters in the order of a hash map, another one in every
    process, and merges of equal counts follow these numbers. Here they get their numbers first.

    Args:
        texts: prompts and phrases; CLIP lower-cases them.
        vocab_size: tokens at most.
        max_tokens: length of a prompt in tokens, its two end marks included.

    Source: engineering choice; the byte-pair scheme is CLIP's.
    """
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    last_letters = [letter + END_OF_WORD for letter in letters]
    blank = CLIPTokenizer(model_max_length=max_tokens)
    trained = blank.train_new_from_iterator(
        sorted(set(texts)) + letters, vocab_size=vocab_size, new_special_tokens=last_letters
    )
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(model["vocab"], merges, model_max_length=max_tokens)


def create_backbone(
    output_dir: str,
    image_size: int,
    autoencoder_channels: list[int],
    autoencoder_layers: int,
    latent_channels: int,
    unet_channels: list[int],
    unet_layers: int,
    attention_heads: int,
    hint_channels: list[int],
    zero_convolution_std: float,
    text_width: int,
    text_layers: int,
    max_tokens: int,
    vocab_size: int,
    seed: int,
) -> Path:
    """Write an untrained backbone folder: autoencoder, UNet, ControlNet branch, text encoder.

    The text encoder stays as it is drawn here: it tells prompts apart, as a frozen random feature
    map, and does not know what their words mean (Stable Diffusion's CLIP does).

    Args:
        output_dir: the folder to write.
        image_size: side in pixels that the parts are made for (they take others).
        autoencoder_channels: a width a level; each level but the last halves the side.
        autoencoder_layers: residual blocks a level.
        latent_channels: channels of the latent.
        unet_channels: a width a level; all but the first level have cross-attention.
        unet_layers: residual blocks a level.
        attention_heads: heads of every attention of the UNet.
        hint_channels: widths of the branch's edge encoder, as many as the autoencoder's.
        zero_convolution_std: spread of the branch's zero convolutions at the start; ControlNet has
            0, a small value lets a UNet and its branch start together.
        text_width: width of text encoder and cross-attention.
        text_layers: layers of the text encoder.
        max_tokens: prompt length in tokens.
        vocab_size: tokens at most.
        seed: draws every weight.

    Raises:
        ValueError: the edge encoder's strides do not match the autoencoder's.

    Source: paper Sec. 3.1 for the parts; the widths are an engineering choice.
    """
    if len(hint_channels) != len(autoencoder_channels):
        raise ValueError(
            f"hint_channels: {hint_channels} has {len(hint_channels)} levels, but the autoencoder "
            f"has {len(autoencoder_channels)}; both must halve the image equally often"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts = [PROMPT_WORDS, *ABBREVIATIONS.values(), *map(augmentation_phrase, range(50))]
        tokenizer = train_tokenizer(texts, vocab_size, max_tokens)
        parts = {
            "tokenizer": tokenizer,
            "text_encoder": _text_encoder(tokenizer, text_width, text_layers),
            "vae": AutoencoderKL(
                in_channels=3,
                out_channels=3,
                latent_channels=latent_channels,
                block_out_channels=autoencoder_channels,
                layers_per_block=autoencoder_layers,
                down_block_types=["DownEncoderBlock2D"] * len(autoencoder_channels),
                up_block_types=["UpDecoderBlock2D"] * len(autoencoder_channels),
                norm_num_groups=8,
                sample_size=image_size,
            ),
            "scheduler": _noise_schedule(),
        }
        latent_size = image_size // 2 ** (len(autoencoder_channels) - 1)
        unet = _unet(
            latent_size, latent_channels, unet_channels, unet_layers, attention_heads, text_width
        )
        parts["unet"] = unet
        parts["controlnet"] = _branch(unet, hint_channels, zero_convolution_std)
    return write_backbone(output_dir, parts)


def _text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _unet(
    latent_size: int, channels: int, widths: list[int], layers: int, heads: int, text_width: int
) -> UNet2DConditionModel:
    crossed = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * crossed,
        up_block_types=["CrossAttnUpBlock2D"] * crossed + ["UpBlock2D"],
        cross_attention_dim=text_width,
        attention_head_dim=heads,
        norm_num_groups=16,
    )


def _branch(unet: UNet2DConditionModel, hint_channels: list[int], std: float) -> ControlNetModel:
    branch = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=tuple(hint_channels)
    )
    if std > 0:
        zero_convolutions = [
            branch.controlnet_cond_embedding.conv_out,
            branch.controlnet_mid_block,
            *branch.controlnet_down_blocks,
        ]
        for convolution in zero_convolutions:
            torch.nn.init.normal_(convolution.weight, std=std)
    return branch


def _noise_schedule() -> DDPMScheduler:
    """Stable Diffusion's schedule (facts 3: 1000 steps, scaled linear, 0.00085 to 0.012)."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="leading",  # chosen: samplers have others where a backbone leaves it open
    )


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
            write_part(part, partial / name)
        elif base is not None and has_part(base, name):
            folder = Path(resolve_backbone(base)) / name
            if folder.is_dir():
                shutil.copytree(folder, partial / name)
            else:
                write_part(load_part(base, name), partial / name)
    if lineage is not None:
        write_lineage(partial / "lineage.json", lineage)
    flush_folder(partial)
    partial.rename(target)
    flush(target.parent)
    logger.info(
        "wrote backbone %s: %s", target, ", ".join(sorted(p.name for p in target.iterdir()))
    )
    return target


def write_part(part: object, folder: Path, left_out: tuple[str, ...] = ("_name_or_path",)) -> None:
    """Save a part.

    Args:
        part: whatever diffusers or transformers save.
        folder: where.
        left_out: keys of its configuration; by default the path of the machine where it was loaded
            from, which diffusers keeps.

    Source: engineering choice.
    """
    part.save_pretrained(folder)
    if isinstance(part, SchedulerMixin):  # saved, defaults would pass for choices of the backbone
        config = folder / part.config_name
        left_out = (*left_out, *part.config.get("_use_default_values", ()))
    else:
        config = folder / "config.json"
    if config.is_file():
        content = read_json(config, "backbone")
        content = {key: value for key, value in content.items() if key not in left_out}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

"""FLOPs at the true size of Stable Diffusion 1.5, ours beside the peers', on the meta device.

    python benchmarks/counts.py [--sizes 256 384 512] [--variant_px 384] [--backbone sd15]

Counts, without weights, a network or a clock, what an image costs:

- a training step of the finetune bundle (train.yaml, sd15.yaml, latents and prompts cached, no
  gradient checkpointing) against a step of diffusers' examples/controlnet/train_controlnet.py: the
  autoencoder's encoder, the text encoder, the ControlNet forward and backward, the frozen UNet
  forward and back to the branch's residuals. The script's defaults have no gradient checkpointing;
  its optimizer and its data are not counted, nor are ours.
- a variant of the synthesis bundle (inference.yaml, sd15.yaml: the fast preset) against one of
  diffusers' StableDiffusionControlNetPipeline at DDIM 20 and guidance 9 (the paper's sampling): 20
  times ControlNet and UNet on two halves, and the decoder. Ours by paper_sampling.yaml is shown.

Both sides are counted by ``diffboost.cost.counting.count``, one multiply-add as 2, attention's
backward as twice its forward. Ends with a line of JSON; the exit status is 1 if a limit of issue 6
is not met, for these figures have no noise.
"""

import argparse
import json
import sys

import torch
from diffusers import ControlNetModel
from torch.nn.functional import mse_loss

from diffboost.cost import units
from diffboost.cost.configs import parse
from diffboost.cost.counting import count, inference
from diffboost.generation.backbones import load_part
from diffboost.stages import stage_configs

TRAINING_LIMIT = 0.66  # of train_controlnet.py's FLOPs, issue 6
VARIANT_LIMIT = 3.0  # TFLOP at 384 px, issue 6
REFERENCE = {"num_inference_steps": 20, "guidance_scale": 9.0}  # facts 18


def peer_parts(backbone: str) -> dict[str, torch.nn.Module]:
    """diffusers' own modules of a backbone, without weights; only the branch is trained."""
    with torch.device("meta"):
        parts = {name: load_part(backbone, name) for name in ("vae", "text_encoder", "unet")}
        parts["controlnet"] = ControlNetModel.from_config(units.load_config(backbone, "controlnet"))
    parts["controlnet"].requires_grad_(True).train()
    return parts


def peer_training(backbone: str, image_size: int) -> float:
    """FLOPs an image of a step of train_controlnet.py."""
    parts = peer_parts(backbone)
    scale = parts["vae"].config.scaling_factor

    def step() -> None:
        with torch.device("meta"):
            image = torch.zeros(1, 3, image_size, image_size)
            tokens = torch.zeros(1, units.context_shape(backbone)[0], dtype=torch.long)
            timesteps = torch.zeros(1, dtype=torch.long)
        latents = parts["vae"].encode(image).latent_dist.parameters.chunk(2, dim=1)[0] * scale
        context = parts["text_encoder"](tokens, return_dict=False)[0]
        down, middle = parts["controlnet"](latents, timesteps, context, image, return_dict=False)
        predicted = parts["unet"](
            latents,
            timesteps,
            context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        torch.autograd.backward(mse_loss(predicted.float(), torch.zeros_like(predicted)))

    return count(step, parts.values()).flops


def peer_variant(backbone: str, image_size: int) -> float:
    """FLOPs of an image of StableDiffusionControlNetPipeline by the paper's sampling."""
    parts = peer_parts(backbone)

    def step() -> None:
        with torch.device("meta"):
            latents = torch.zeros(2, *units.latent_shape(backbone, image_size))
            timesteps = torch.zeros(2, dtype=torch.long)
            context = torch.zeros(2, *units.context_shape(backbone))
            hint = torch.zeros(2, 3, image_size, image_size)
        down, middle = parts["controlnet"](latents, timesteps, context, hint, return_dict=False)
        parts["unet"](latents, timesteps, context, None, None, None, None, None, down, middle)

    def decode() -> None:
        parts["vae"].decode(
            torch.zeros(1, *units.latent_shape(backbone, image_size), device="meta")
        )

    steps = REFERENCE["num_inference_steps"] * inference(step, parts.values()).flops
    return steps + inference(decode, parts.values()).flops


def our_training(backbone: str, image_size: int) -> float:
    """FLOPs an image of a step of the finetune bundle at the paper's scale, with caches."""
    file = stage_configs()["finetune"]
    knobs = {"backbone": backbone, "image_size": image_size}
    knobs |= {"cache_latents": True, "gradient_checkpointing": False}
    return units.generator_training(parse([file, file.with_name("sd15.yaml")], knobs)).flops


def our_variant(backbone: str, image_size: int, *overlays: str) -> float:
    """FLOPs of a variant of the synthesis bundle with these overlays."""
    file = stage_configs()["synthesis"]
    files = [file, *(file.with_name(f"{name}.yaml") for name in overlays)]
    return units.sampling(parse(files, {"backbone": backbone, "image_size": image_size})).flops


def figure(name: str, ours: float, peer: float, **limit) -> dict:
    """A line of the table, in TFLOP."""
    ours, peer = ours / 1e12, peer / 1e12
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "TFLOP"} | limit


def is_met(figure: dict) -> bool:
    """Whether a figure keeps its limit; one without a limit does."""
    return figure[figure.get("limited", "ratio")] <= figure.get("limit", float("inf"))


def count_all(sizes: list[int], variant_px: int, backbone: str) -> list[dict]:
    """All figures."""
    figures = [
        figure(
            f"training step at {size} px, an image",
            our_training(backbone, size),
            peer_training(backbone, size),
            limit=TRAINING_LIMIT,
        )
        for size in sizes
    ]
    reference = peer_variant(backbone, variant_px)
    for preset, overlays, limit in (
        ("fast preset", ("sd15",), {"limit": VARIANT_LIMIT, "limited": "ours"}),
        ("reference preset", ("sd15", "paper_sampling"), {}),
    ):
        ours = our_variant(backbone, variant_px, *overlays)
        figures.append(figure(f"variant at {variant_px} px, {preset}", ours, reference, **limit))
    return figures


def main() -> int:
    """Prints the table and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512], metavar="PX")
    parser.add_argument("--variant_px", type=int, default=384)
    parser.add_argument("--backbone", default="sd15", help="see resolve_backbone")
    arguments = parser.parse_args()
    figures = count_all(arguments.sizes, arguments.variant_px, arguments.backbone)
    print(f"{'TFLOP on ' + arguments.backbone:40} {'ours':>8} {'peer':>8} {'ratio':>7}  limit")
    for row in figures:
        of = {"ours": "TFLOP of ours", "ratio": "of the peer"}[row.get("limited", "ratio")]
        limit = f"{row['limit']} {of}" if "limit" in row else ""
        print(
            f"{row['name']:40} {row['ours']:8.4f} {row['peer']:8.4f} {row['ratio']:7.4f}  {limit}"
        )
    steps = [row for row in figures if row.get("limit") == TRAINING_LIMIT]
    worst = max(steps, key=lambda row: row["ratio"])
    met = all(map(is_met, figures))
    print(
        json.dumps(
            worst | {"name": "counts", "worst": worst["name"], "met": met, "figures": figures}
        )
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

"""Time of a variant: ours against diffusers' StableDiffusionControlNetPipeline, same weights.

    python benchmarks/sampling.py [--backbone tiny] [--batch_size 8] [--rounds 3]

The pipeline is built from the very modules of our network, and both get the same noise, edges and
embeddings in the same batch; text is embedded beforehand for both. Presets are read from the
synthesis bundle: the exact one is inference.yaml with paper_sampling.yaml (DDIM 20, guidance 9),
the fast one inference.yaml alone. Rounds run pipeline, exact and fast in turn, and medians count.

Exits with 1 if our exact images are not the pipeline's to 1e-4 in [-1, 1] (gray: the mean of the
channels that the pipeline decodes). Edges are gradients of phantoms. Left out: writing PNGs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionControlNetPipeline

from diffboost.conditions.edges import load_edge_detector
from diffboost.conditions.prompts import STOCK_NEGATIVE_PROMPT
from diffboost.cost.configs import parse, value
from diffboost.data.phantoms import phantom_image
from diffboost.generation.backbones import has_part, load_part
from diffboost.generation.latents import latent_shape
from diffboost.generation.networks import ControlledUNet
from diffboost.generation.sampling import VariantInferer, load_scheduler, variant_noise
from diffboost.generation.text import embed_prompts
from diffboost.stages import stage_configs

KNOBS = (
    "scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "control_scale",
    "control_interval", "decoder",
)  # fmt: skip
TOLERANCE = 1e-4
NEAR_ZERO_STD = 0.03  # of the convolutions of a branch that has learned nothing yet


def read_preset(backbone: str, *overlays: str) -> dict:
    """The sampler's knobs as the synthesis bundle has them."""
    config = Path(stage_configs()["synthesis"])
    files = [config, *(config.with_name(f"{name}.yaml") for name in overlays)]
    parser = parse(files, {"backbone": backbone})
    return {name: value(parser, name) for name in KNOBS}


def load_network(backbone: str) -> ControlledUNet:
    """UNet and branch; a branch of zeros, which would act as nothing, gets small weights."""
    network = ControlledUNet(backbone).requires_grad_(False).eval()
    if not has_part(backbone, "controlnet"):
        torch.manual_seed(0)
        branch = network.controlnet
        for layer in (branch.controlnet_mid_block, *branch.controlnet_down_blocks):
            torch.nn.init.normal_(layer.weight, std=NEAR_ZERO_STD)
    return network


def build_pipeline(backbone: str, network: ControlledUNet) -> StableDiffusionControlNetPipeline:
    """The peer, of our network's own modules and with our scheduler's configuration."""
    pipeline = StableDiffusionControlNetPipeline(
        vae=load_part(backbone, "vae"),
        text_encoder=load_part(backbone, "text_encoder"),
        tokenizer=load_part(backbone, "tokenizer"),
        unet=network.base,
        controlnet=network.controlnet,
        scheduler=load_scheduler(backbone, "ddim"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_batch(backbone: str, size: int, side: int, seed: int) -> dict[str, torch.Tensor]:
    """Noise, edges and embeddings of so many phantoms."""
    drawn = [phantom_image(seed, index, side) for index in range(size)]
    images = torch.stack([torch.as_tensor(image).float() for image, _ in drawn])[:, None]
    prompts = [", ".join(labels) for _, labels in drawn]
    shape = latent_shape(backbone, side)
    noise = [variant_noise(seed, f"phantom_{index}", 0, 0, shape) for index in range(size)]
    return {
        "inputs": torch.stack(noise),
        "context": embed_prompts(backbone, prompts),
        "edge": load_edge_detector("gradient")(images / 127.5 - 1),
        "negative_context": embed_prompts(backbone, [STOCK_NEGATIVE_PROMPT]).expand(size, -1, -1),
    }


def run_pipeline(pipeline, batch: dict[str, torch.Tensor], preset: dict) -> torch.Tensor:
    """The pipeline's images, as it gives them: (B, 3, H, W) in [0, 1]."""
    return pipeline(
        prompt_embeds=batch["context"],
        negative_prompt_embeds=batch["negative_context"],
        image=batch["edge"].expand(-1, pipeline.controlnet.config.conditioning_channels, -1, -1),
        latents=batch["inputs"],
        num_inference_steps=preset["num_inference_steps"],
        guidance_scale=preset["guidance_scale"],
        controlnet_conditioning_scale=preset["control_scale"],
        output_type="pt",
    ).images


def largest_difference(pipeline, batch: dict[str, torch.Tensor], preset: dict, ours) -> float:
    """Between our images and the mean of the channels that the pipeline decodes."""
    decoded = []
    hook = pipeline.vae.decoder.register_forward_hook(lambda *call: decoded.append(call[-1]))
    run_pipeline(pipeline, batch, preset)
    hook.remove()
    gray = decoded[-1].mean(dim=1, keepdim=True).clamp(-1, 1)
    return (ours - gray).abs().max().item()


def time_in_turn(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each, all in turn, after a round that does not count."""
    seconds = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def figure(name: str, ours: float, peer: float, limit: float | None = None) -> dict:
    """One measured ratio."""
    ratio = round(ours / peer, 4)
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": "s a variant",
            "limit": limit}  # fmt: skip


@torch.inference_mode()
def measure(backbone: str, batch_size: int, image_size: int, rounds: int, seed: int) -> dict:
    """Both presets against the pipeline."""
    network = load_network(backbone)
    pipeline = build_pipeline(backbone, network)
    batch = draw_batch(backbone, batch_size, image_size, seed)
    exact, fast = read_preset(backbone, "paper_sampling"), read_preset(backbone)
    print(f"exact preset {exact}\nfast preset  {fast}")
    samplers = {
        "exact": VariantInferer(backbone, **exact),
        "fast": VariantInferer(backbone, **fast),
    }
    ours = {
        name: lambda sampler=sampler: sampler(network=network, **batch)
        for name, sampler in samplers.items()
    }
    difference = largest_difference(pipeline, batch, exact, ours["exact"]())
    print(f"largest difference of exact images in [-1, 1]: {difference:.1e}")
    runs = {"pipeline": lambda: run_pipeline(pipeline, batch, exact), **ours}
    times = {name: took / batch_size for name, took in time_in_turn(runs, rounds).items()}
    figures = [
        figure("exact preset / pipeline", times["exact"], times["pipeline"], 1.0),
        figure("fast preset / pipeline", times["fast"], times["pipeline"], 0.15),
        figure(
            "fast preset / exact preset", times["fast"], times["exact"]
        ),  # both ours: the exact one is faster
    ]
    for row in figures:
        print("{name:<28} {ours:.4f} / {peer:.4f} {unit} = {ratio:.3f}".format(**row))
    worst = max(figures[:2], key=lambda row: row["ratio"] / row["limit"])
    return {**worst, "name": "sampling", "worst": worst["name"], "difference": difference,
            "tolerance": TOLERANCE, "figures": figures, "backbone": Path(backbone).name,
            "image_size": image_size, "batch_size": batch_size}  # fmt: skip


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="tiny", help="tiny, a folder or a hub id")
    parser.add_argument("--batch_size", type=int, default=8, help="variants a pass")
    parser.add_argument("--image_size", type=int, default=64, help="px")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that does not")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seed", type=int, default=0, help="of phantoms and noise")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    result = measure(**options)
    print(json.dumps(result))
    sys.exit(int(result["difference"] > TOLERANCE))


if __name__ == "__main__":
    main()

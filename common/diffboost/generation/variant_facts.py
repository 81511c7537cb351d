"""The facts that variants of a run share, and the settings that follow from them."""

import json
from collections.abc import Mapping, Sequence

from diffboost.generation.backbones import backbone_sha256
from diffboost.generation.decoding import OWN, decoder_sha256
from diffboost.generation.provenance import OWN_DECODER, RUN_FACTS
from diffboost.generation.sampling import check_interval
from diffboost.generation.schedulers import refuse_other_scheduler
from diffboost.generation.synthesis import read_generator


def variant_facts(
    generator_dir: str,
    backbone: str,
    seed: int,
    noise_address: str,
    scheduler: str,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_interval: Sequence[float],
    control_scale: float,
    control_interval: Sequence[float],
    decoder: str | None,
    prompt_weights: Mapping[str, float],
    precision: str,
    batch_size: int,
    image_size: int,
    license: str,
    purpose: str = "training of a segmenter",
    deformation_px: float = 0.0,
    deformation_spacing_px: int = 16,
    negative_prompt: str = "",
) -> dict:
    """What all variants of a run share; stands in each of them and in the manifest.

    Args:
        generator_dir: its model and lineage are named by their hashes.
        backbone: named, and hashed.
        seed, noise_address: of the noise.
        scheduler, num_inference_steps, guidance_scale, guidance_interval: of the inferer.
        control_scale, control_interval, precision: of the inferer.
        decoder: of the inferer; named, and hashed.
        prompt_weights, negative_prompt, image_size: of :class:`VariantConditions`.
        batch_size: variants a pass, on which rounding depends.
        license: terms of the variants, in words.
        purpose: what they are for, in words.
        deformation_px, deformation_spacing_px: of ``deform_items``.

    Raises:
        FileNotFoundError: generator, backbone or decoder is not there.
        ValueError: ``license`` says nothing, an interval is none, or the scheduler does not fit
            the generator.

    Source: engineering choice (issue 5, "Provenance").
    """
    if not license or not str(license).strip():
        raise ValueError(f"license: {license!r}; name the terms of the variants in words")
    generator = read_generator(generator_dir)
    refuse_other_scheduler(scheduler, generator, generator_dir)
    facts = {
        "seed": seed,
        "noise_address": noise_address,
        "scheduler": scheduler,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": json.dumps(check_interval("guidance_interval", guidance_interval)),
        "control_scale": control_scale,
        "control_interval": json.dumps(check_interval("control_interval", control_interval)),
        "decoder": OWN_DECODER if decoder in (None, OWN) else decoder,
        "decoder_sha256": decoder_sha256(decoder, backbone),
        "prompt_weights": json.dumps(dict(prompt_weights), sort_keys=True),
        "precision": precision,
        "batch_size": batch_size,
        "image_size": image_size,
        "backbone": backbone,
        "backbone_sha256": backbone_sha256(backbone),
        "model_sha256": generator["model_sha256"],
        "lineage_sha256": generator["lineage_sha256"],
        "license": license,
        "purpose": purpose,
        "deformation_px": deformation_px,
        "deformation_spacing_px": deformation_spacing_px,
        "negative_prompt": negative_prompt,
    }
    return {name: kind(facts[name]) for name, kind in RUN_FACTS.items()}


def variant_settings(facts: Mapping) -> tuple[dict, dict]:
    """The keyword arguments that made a variant, out of its facts.

    Args:
        facts: as ``variant_facts`` gives them or a file says them.

    Returns:
        Those of :class:`VariantConditions` and those of ``VariantInferer``.

    Source: engineering choice.
    """
    names = ("image_size", "noise_address", "negative_prompt")
    conditions = {name: facts[name] for name in names}
    conditions["prompt_weights"] = json.loads(facts["prompt_weights"])
    names = ("scheduler", "num_inference_steps", "guidance_scale", "control_scale", "precision")
    sampling = {name: facts[name] for name in names}
    for name in ("guidance_interval", "control_interval"):
        sampling[name] = json.loads(facts[name])
    sampling["decoder"] = None if facts["decoder"] == OWN_DECODER else facts["decoder"]
    return conditions, sampling

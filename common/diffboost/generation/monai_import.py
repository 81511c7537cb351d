"""Makes a backbone of checkpoints that a team trained with MONAI or monai-generative."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import DDPMScheduler

from diffboost.data.documents import read_config
from diffboost.generation.backbones import load_config, load_part
from diffboost.generation.config_limits import refuse_absurd
from diffboost.generation.creation import write_backbone
from diffboost.generation.monai_checkpoints import load_checkpoint, read_checkpoint
from diffboost.generation.monai_networks import MONAI_PARTS
from diffboost.generation.monai_part import MonaiPart
from diffboost.generation.objective import PREDICTIONS
from diffboost.knobs import nearest

logger = logging.getLogger(__name__)

PACKAGES = ("monai", "generative")
# What monai-generative calls an argument of MONAI's, and older versions of its schedulers.
RENAMED = {"num_channels": "channels", "use_checkpointing": "use_checkpoint"}
SCHEDULE_RENAMED = {"beta_schedule": "schedule"}
SCHEDULES = {
    "linear_beta": "linear", "scaled_linear_beta": "scaled_linear",
    "linear": "linear", "scaled_linear": "scaled_linear",
}  # fmt: skip
SCHEDULE_DEFAULTS = {
    "num_train_timesteps": 1000, "schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 2e-2,
    "prediction_type": "epsilon",
}  # fmt: skip
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")


def import_monai_backbone(
    output_dir: str,
    definitions: str,
    autoencoder: str,
    diffusion_unet: str,
    scale_factor: float | None,
    image_range: Sequence[float],
    controlnet: str | None = None,
    text_from: str | None = None,
    autoencoder_def: str = "autoencoder_def",
    diffusion_unet_def: str = "diffusion_unet_def",
    controlnet_def: str = "controlnet_def",
    noise_scheduler_def: str = "noise_scheduler",
) -> Path:
    """Writes a backbone folder whose networks are MONAI's, from a team's checkpoints.

    Args:
        output_dir: the folder to write.
        definitions: a bundle's config (JSON or YAML) that defines the networks and the noise
            schedule, in the terms of MONAI or of monai-generative.
        autoencoder, diffusion_unet, controlnet: checkpoints; without a ControlNet the backbone gets
            its branch when it is trained.
        scale_factor: what the team's LatentDiffusionInferer multiplied latents with: 1 / standard
            deviation as a rule, 1 where it had none.
        image_range: lowest and highest intensity of the images that the autoencoder was trained on.
        text_from: a backbone whose text encoder and tokenizer the UNet was trained with; None for
            one that is not conditioned.
        autoencoder_def, diffusion_unet_def, controlnet_def, noise_scheduler_def: ids of the
            definitions.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``output_dir`` exists.
        FileNotFoundError: a file is missing.
        ValueError: a definition means what has no counterpart here, a checkpoint does not fit its
            definition, or the networks do not fit each other.

    Source: engineering choice (issue 4, "monai-generative").
    """
    if scale_factor is None:
        raise ValueError(
            "scale_factor: not given; say what LatentDiffusionInferer multiplied the latents with "
            "(1 / standard deviation as a rule; 1.0 where it had no scale_factor)"
        )
    config = read_config(definitions, "definitions")
    files = {
        "vae": (autoencoder, autoencoder_def),
        "unet": (diffusion_unet, diffusion_unet_def),
        "controlnet": (controlnet, controlnet_def),
    }
    bounds = [float(bound) for bound in image_range]
    scale = {"scaling_factor": float(scale_factor), "image_range": bounds}
    parts: dict[str, object] = {
        name: _load(
            name,
            path,
            read_definition(config, identifier, definitions),
            definitions,
            scale if name == "vae" else {},
        )
        for name, (path, identifier) in files.items()
        if path is not None
    }
    refuse_misfits(parts)
    parts["scheduler"] = noise_schedule(read_definition(config, noise_scheduler_def, definitions))
    parts |= _text_parts(parts["unet"], text_from)
    folder = write_backbone(output_dir, parts)
    logger.info(
        "%s: nothing says which cases its networks have seen; leaks from there cannot be found",
        folder,
    )
    return folder


def read_definition(config: Mapping, identifier: str, path: str) -> dict:
    """A definition of a bundle's config with its references resolved, and nothing executed.

    Args:
        config: the config as it is written.
        identifier: the definition's id.
        path: the config's file, for messages.

    Raises:
        ValueError: there is none, it refers to what is not there, or it holds an expression.

    Source: engineering choice (a team's config is data here, not code).
    """
    if not isinstance(config.get(identifier), dict):
        raise ValueError(
            f"definitions: {path}: {identifier!r} is no definition in it; "
            f"{nearest(identifier, config)}"
        )
    return _resolved(config, config[identifier], f"definitions: {path}: {identifier}")


def _resolved(config: Mapping, value: object, where: str, depth: int = 0) -> object:
    """A value in which references to other ids are what these hold."""
    if isinstance(value, dict):
        return {k: _resolved(config, v, f"{where}: {k}", depth) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(config, v, where, depth) for v in value]
    if not isinstance(value, str) or value[:1] not in ("@", "$", "%"):
        return value
    place: object = config
    for word in value[1:].replace("#", "::").split("::"):
        place = place.get(word) if isinstance(place, dict) else None
    if value[0] != "@" or place is None or depth > 8:
        raise ValueError(
            f"{where}: {value!r}; a plain value is needed, or a reference to one (@id)"
        )
    return _resolved(config, place, where, depth + 1)


def _load(part: str, path: str, definition: dict, definitions: str, own: Mapping) -> MonaiPart:
    """A part of a definition and of our own settings, with the weights of a checkpoint."""
    kind = MONAI_PARTS[part]
    target = str(definition.get("_target_", ""))
    package, name = target.split(".")[0], target.split(".")[-1]
    if name != kind.network_class.__name__ or package not in (*PACKAGES, name):
        raise ValueError(
            f"definitions: {definitions}: _target_: {target!r}; for the {part} "
            f"{kind.network_class.__name__} of monai.networks.nets or generative.networks.nets is "
            "allowed"
        )
    config = {RENAMED.get(k, k): v for k, v in definition.items() if not k.startswith("_")} | own
    refuse_absurd(config, Path(definitions))
    keys = {"vae": "autoencoder", "unet": "diffusion_unet", "controlnet": "controlnet"}
    state = read_checkpoint(path, keys[part])
    return load_checkpoint(kind, config, state, f"{keys[part]}: {path}").eval()


def noise_schedule(definition: Mapping) -> DDPMScheduler:
    """diffusers' noise schedule for one of MONAI's.

    Args:
        definition: of a scheduler of MONAI or monai-generative. What belongs to sampling alone
            (variance, clipping of samples) has no say: variants are drawn by schedulers of our
            config's choice, and latents are not clipped.

    Raises:
        ValueError: the scheduler, its schedule or what is predicted has no counterpart.

    Source: MONAI's and diffusers' schedules of these names are the same numbers.
    """
    name = str(definition.get("_target_", "")).split(".")[-1]
    given = {SCHEDULE_RENAMED.get(k, k): v for k, v in definition.items()}
    whole = {**SCHEDULE_DEFAULTS, **given}
    checked = (
        ("_target_", name, SCHEDULERS),
        ("schedule", whole["schedule"], SCHEDULES),
        ("prediction_type", whole["prediction_type"], PREDICTIONS),
    )
    for key, value, allowed in checked:
        if value not in allowed:
            raise ValueError(
                f"definitions: noise schedule: {key}: {value!r} has no counterpart here; "
                f"{nearest(value, allowed)}"
            )
    return DDPMScheduler(
        num_train_timesteps=whole["num_train_timesteps"],
        beta_start=whole["beta_start"],
        beta_end=whole["beta_end"],
        beta_schedule=SCHEDULES[whole["schedule"]],
        prediction_type=whole["prediction_type"],
        clip_sample=False,
        timestep_spacing="leading",  # MONAI's own
    )


def refuse_misfits(parts: Mapping[str, MonaiPart]) -> None:
    """Raises ValueError where the networks of a backbone do not fit each other.

    Args:
        parts: vae, unet and, where there is one, controlnet.

    Source: latent diffusion and ControlNet.
    """
    vae, unet = parts["vae"].config, parts["unet"].config
    found = {"diffusion_unet: out_channels": (unet.out_channels, vae.latent_channels)}
    found["diffusion_unet: in_channels"] = (unet.in_channels, vae.latent_channels)
    if "controlnet" in parts:
        branch = parts["controlnet"].config
        same = ("in_channels", "channels", "num_res_blocks", "with_conditioning")
        for name in (*same, "cross_attention_dim", "resblock_updown"):
            found[f"controlnet: {name}"] = (_per_level(branch, name), _per_level(unet, name))
        found["controlnet: levels of conditioning_embedding_num_channels"] = (
            len(branch.conditioning_embedding_num_channels),
            len(vae.channels),
        )
    for name, (value, expected) in found.items():
        if value != expected:
            raise ValueError(
                f"{name}: {value!r}; {expected!r} is needed: latents have the autoencoder's "
                "channels, the branch the UNet's shape, and its hint is an image that it shrinks "
                "to a latent's side"
            )


def _per_level(config: Mapping, name: str) -> object:
    """What a configuration says under a name; one number of blocks stands for all levels."""
    if name == "num_res_blocks" and isinstance(config[name], int):
        return [config[name]] * len(config["channels"])
    return list(config[name]) if isinstance(config[name], tuple | list) else config[name]


def _text_parts(unet: MonaiPart, text_from: str | None) -> dict[str, object]:
    """Text encoder and tokenizer for a UNet; none where it is not conditioned."""
    width = unet.config.cross_attention_dim
    if not unet.config.with_conditioning:
        if text_from is not None:
            raise ValueError(
                f"text_from: {text_from!r}; the UNet is not conditioned (with_conditioning: "
                "false) and takes no prompts: leave it null"
            )
        return {}
    if text_from is None:
        raise ValueError(
            f"text_from: not given; the UNet is conditioned on texts of width {width}: name the "
            "backbone (tiny, sd15, a folder) whose text encoder it was trained with"
        )
    found = load_config(text_from, "text_encoder")["hidden_size"]
    if found != width:
        raise ValueError(
            f"text_from: {text_from!r}: its embeddings are {found} wide, the UNet's "
            f"cross_attention_dim is {width}"
        )
    return {name: load_part(text_from, name) for name in ("text_encoder", "tokenizer")}

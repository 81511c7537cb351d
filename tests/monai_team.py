"""What a team has: networks of monai-generative with drawn weights, their files, their bundle.

The networks are those of the real package. Its schedulers do not import beside MONAI 1.6
(``monai.config.IgniteInfo`` is gone); MONAI's, which are their successors, stand for them.
"""

import json
import warnings
from pathlib import Path

import small_backbone
import torch
from monai.networks.schedulers import DDPMScheduler

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from generative.networks import nets

from diffboost.generation.monai_import import import_monai_backbone

SCALE = 0.7  # of the latents
NUM_RES_BLOCKS, WIDTHS, ATTENTION = 1, [8, 16], [False, True]
AUTOENCODER = {
    "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_channels": [8, 8, 8],
    "num_res_blocks": 1, "attention_levels": [False, False, True], "latent_channels": 3,
    "norm_num_groups": 4,
}  # fmt: skip
UNET = {
    "spatial_dims": 2, "in_channels": 3, "num_channels": WIDTHS, "num_res_blocks": 1,
    "attention_levels": ATTENTION, "norm_num_groups": 4, "num_head_channels": 4,
}  # fmt: skip
TEXTS = {"with_conditioning": True, "cross_attention_dim": small_backbone.SMALL["text_width"]}
HINT = {"conditioning_embedding_num_channels": [4, 8, 8]}
SCHEDULE = {
    "schedule": "scaled_linear_beta", "num_train_timesteps": 1000, "beta_start": 0.0015,
    "beta_end": 0.0195, "clip_sample": False,
}  # fmt: skip


class Team:
    """The networks, on disk in `folder` and in memory.

    Args:
        folder: gets networks.json and three checkpoints.
        conditioned: whether the UNet and the ControlNet take texts.
    """

    def __init__(self, folder: Path, conditioned: bool) -> None:
        self.folder = folder
        self.text_from = small_backbone.write_backbone(folder / "texts") if conditioned else None
        texts = TEXTS if conditioned else {}
        self.arguments = {
            "autoencoder": AUTOENCODER,
            "diffusion_unet": {**UNET, **texts, "out_channels": 3},
            "controlnet": {**UNET, **texts, **HINT},
        }
        torch.manual_seed(0)
        self.autoencoder = drawn(nets.AutoencoderKL(**self.arguments["autoencoder"]))
        self.unet = drawn(nets.DiffusionModelUNet(**self.arguments["diffusion_unet"]))
        self.controlnet = drawn(nets.ControlNet(**self.arguments["controlnet"]))
        self.scheduler = DDPMScheduler(**SCHEDULE)
        torch.save(self.autoencoder.state_dict(), folder / "autoencoder.pt")
        torch.save({"state_dict": self.unet.state_dict(), "epoch": 7}, folder / "diffusion_unet.pt")
        wrapped = {f"module.{name}": v for name, v in self.controlnet.state_dict().items()}
        torch.save({"model": wrapped}, folder / "controlnet.pt")
        self.write_definitions()

    def write_definitions(self, package: str = "generative.networks.nets", **changed) -> None:
        """networks.json as a bundle's config has it: with a reference."""
        classes = {
            "autoencoder": "AutoencoderKL",
            "diffusion_unet": "DiffusionModelUNet",
            "controlnet": "ControlNet",
        }
        config = {"spatial_dims": 2}
        for name, arguments in self.arguments.items():
            definition = {"_target_": f"{package}.{classes[name]}", **arguments}
            config[f"{name}_def"] = definition | {"spatial_dims": "@spatial_dims"}
        scheduler = {"_target_": "generative.networks.schedulers.DDPMScheduler", **SCHEDULE}
        config["noise_scheduler"] = scheduler
        for key, value in changed.items():
            name, _, argument = key.partition("__")
            config[name][argument] = value
        (self.folder / "networks.json").write_text(json.dumps(config))

    def bring(self, name: str = "backbone", **changed) -> str:
        """The backbone of these files."""
        names = ("autoencoder", "diffusion_unet", "controlnet")
        settings = {key: str(self.folder / f"{key}.pt") for key in names}
        settings |= {"definitions": str(self.folder / "networks.json"), "scale_factor": SCALE}
        settings |= {"text_from": self.text_from, "image_range": [0, 1]}
        return str(import_monai_backbone(str(self.folder / name), **settings | changed))


@torch.no_grad()
def drawn(network: torch.nn.Module) -> torch.nn.Module:
    """The network with no weight at zero."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.15)
    return network.eval()

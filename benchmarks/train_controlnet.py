"""The training loop of diffusers' examples/controlnet/train_controlnet.py, in plain torch.

What is taken and what is left out stands in ``training_step.py``, which lets it run beside ours.
"""

from collections.abc import Iterator

import torch
from diffusers import ControlNetModel
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from diffboost.data.addresses import AddressedSampler
from diffboost.generation.backbones import has_part, load_part

LEARNING_RATE = 5e-6  # default of train_controlnet.py
SEED = 0  # of both sides


class Pictures(Dataset):
    """Images, hints and captions as train_controlnet.py's ``make_train_dataset`` prepares them.

    Args:
        items: dictionaries with ``image``, ``edge`` and ``prompt``.
        tokenizer: the backbone's.
        size_px: ``--resolution``.
    """

    def __init__(self, items, tokenizer, size_px: int) -> None:
        self.items = list(items)
        self.tokenizer = tokenizer
        bilinear = transforms.InterpolationMode.BILINEAR
        cut = [transforms.Resize(size_px, bilinear), transforms.CenterCrop(size_px)]
        self.hint = transforms.Compose([*cut, transforms.ToTensor()])
        self.image = transforms.Compose([self.hint, transforms.Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, addresses: list[tuple[int, int]]) -> list[dict]:
        """The examples of a batch; ``datasets`` transforms a batch at a time too."""
        items = [self.items[index] for _, index in addresses]
        tokens = self.tokenizer(
            [item["prompt"] for item in items],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return [
            {
                "pixel_values": self.image(Image.open(item["image"]).convert("RGB")),
                "conditioning_pixel_values": self.hint(Image.open(item["edge"]).convert("RGB")),
                "input_ids": row,
            }
            for item, row in zip(items, tokens, strict=True)
        ]


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """train_controlnet.py's ``collate_fn``."""
    batch = {name: torch.stack([each[name] for each in examples]) for name in examples[0]}
    for name in ("pixel_values", "conditioning_pixel_values"):
        batch[name] = batch[name].to(memory_format=torch.contiguous_format).float()
    return batch


class Peer:
    """The training loop of train_controlnet.py, a step at a time.

    Args:
        backbone: brings all parts.
        items: the training slices.
        size_px: side of the images.
        batch_size: ``--train_batch_size``.
    """

    def __init__(self, backbone: str, items, size_px: int, batch_size: int) -> None:
        self.vae, self.text_encoder, self.unet, self.scheduler, tokenizer = (
            load_part(backbone, name)
            for name in ("vae", "text_encoder", "unet", "scheduler", "tokenizer")
        )
        branch = has_part(backbone, "controlnet")
        torch.manual_seed(SEED)  # a new branch's hint encoder is drawn as ours is
        self.controlnet = (
            load_part(backbone, "controlnet") if branch else ControlNetModel.from_unet(self.unet)
        )
        self.controlnet.requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(
            self.controlnet.parameters(),
            lr=LEARNING_RATE,
            betas=(0.9, 0.999),
            weight_decay=1e-2,
            eps=1e-8,
        )
        self.lr_scheduler = get_scheduler("constant", self.optimizer)
        data = Pictures(items, tokenizer, size_px)
        sampler = AddressedSampler(data, SEED, batch_size=batch_size, drop_last=True)
        self.loader = DataLoader(
            data, batch_size=batch_size, sampler=sampler, collate_fn=collate, num_workers=0
        )
        self.batches = self._batches()
        self.bar = tqdm(desc="Steps")

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.loader

    def step(self, drawn: dict[str, torch.Tensor]) -> float:
        """Loss of the next step.

        Args:
            drawn: ``posterior_noise`` and ``noise`` (B, C, h, w), ``timestep`` (B,).
        """
        batch = next(self.batches)
        noise, timesteps = drawn["noise"], drawn["timestep"]
        posterior = self.vae.encode(batch["pixel_values"]).latent_dist
        latents = posterior.mean + posterior.std * drawn["posterior_noise"]
        latents = latents * self.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        context = self.text_encoder(batch["input_ids"], return_dict=False)[0]
        down, middle = self.controlnet(
            noisy,
            timesteps,
            encoder_hidden_states=context,
            controlnet_cond=batch["conditioning_pixel_values"],
            return_dict=False,
        )
        predicted = self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        loss = mse_loss(predicted.float(), noise.float(), reduction="mean")
        loss.backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.bar.update()
        value = loss.detach().item()
        self.bar.set_postfix(loss=value, lr=self.lr_scheduler.get_last_lr()[0])
        return value

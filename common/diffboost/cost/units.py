"""One image's way through each network of a study, counted with the bundles' own modules."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from monai.bundle import ConfigParser
from torch import nn

from diffboost.conditions.edges import detection_size, load_edge_detector
from diffboost.conditions.hed import ControlNetHED_Apache2
from diffboost.cost.configs import amp_precision, float32_kind, value, without_eight_bit
from diffboost.cost.counting import Count, count, inference, num_bytes, optimizer_bytes
from diffboost.generation.backbones import load_config, load_part
from diffboost.generation.constant_conditions import constant_conditions
from diffboost.generation.decoding import load_decoder
from diffboost.generation.latents import latent_shape
from diffboost.generation.networks import ControlledUNet, GrayscaleAutoencoder
from diffboost.generation.sampling import step_kinds
from diffboost.generation.schedulers import build_scheduler
from diffboost.generation.text import takes_prompts
from diffboost.store_writer import EDGE_BATCH

LATENT_BATCH = 32  # of build_cache


@dataclass(frozen=True)
class Unit:
    """FLOPs an image, and the memory that a whole batch needs.

    Args:
        flops: of one image, forward, and backward where it is a training.
        weight_bytes: parameters and buffers, those of averages included.
        gradient_bytes, optimizer_bytes: of what is trained.
        activation_bytes: peak of a batch.
        saved_bytes: of the weights that the stage writes.
        batch_size: images a step.
        precision: of the multiplications.
    """

    flops: float
    weight_bytes: int
    activation_bytes: int
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    saved_bytes: int = 0
    batch_size: int = 1
    precision: str = "float32"


def _weights(modules: Iterable[nn.Module]) -> int:
    return num_bytes(t for m in modules for t in (*m.parameters(), *m.buffers()))


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def context_shape(backbone: str) -> tuple[int, int]:
    """(tokens, width) of a prompt's embedding, as ``embed_prompts`` gives it."""
    if not takes_prompts(backbone):
        return 1, 1
    config = load_config(backbone, "text_encoder")
    return config["max_position_embeddings"], config["hidden_size"]


def _generator_inputs(backbone: str, image_size: int, batch_size: int) -> tuple:
    """Latent, timesteps, context and edge of a batch, on the default device."""
    latent = torch.zeros(batch_size, *latent_shape(backbone, image_size))
    timesteps = torch.zeros(batch_size, dtype=torch.long)
    context = torch.zeros(batch_size, *context_shape(backbone))
    return latent, timesteps, context, torch.zeros(batch_size, 1, image_size, image_size)


def generator_training(parser: ConfigParser) -> Unit:
    """A step of finetuning or pretraining: network, loss and optimizer are the config's own.

    Args:
        parser: of ``parse``.

    Source: engineering choice (paper Eq. 11 is what the step computes)
    """
    backbone, size, batch = (value(parser, k) for k in ("backbone", "image_size", "batch_size"))
    precision, eight_bit = value(parser, "precision", "float32"), without_eight_bit(parser)
    with torch.device("meta"):
        network = parser.get_parsed_content("network")
        weights = _weights([network, network.base])  # a frozen UNet is kept in 16 bit
        parser["precision"] = "float32"  # there is no autocast on the meta device
        network, loss = (parser.get_parsed_content(key) for key in ("network", "loss"))
        optimizer = parser.get_parsed_content("optimizer")
    network.train()

    def step() -> None:
        with torch.device("meta"):
            inputs = _generator_inputs(backbone, size, batch)
            lost = loss(network(*inputs), torch.zeros_like(inputs[0]))
        torch.autograd.backward(lost)

    counted = count(step, [network, network.base])
    trained = _trained(network)
    average = num_bytes(trained) if value(parser, "ema_decay", 0) > 0 else 0
    states = optimizer_bytes(optimizer)
    return replace(
        _unit(counted, batch, [], precision),
        weight_bytes=weights + average,
        gradient_bytes=num_bytes(p.grad for p in trained),
        optimizer_bytes=states // 4 if eight_bit else states,
        saved_bytes=num_bytes(trained),
    )


def _unit(counted: Count, batch: int, modules: Iterable[nn.Module], precision: str) -> Unit:
    return Unit(
        counted.flops / batch,
        _weights(modules),
        counted.activation_bytes,
        batch_size=batch,
        precision=precision,
    )


def _forward(run: Callable, modules: list[nn.Module], batch: int, precision="float32") -> Unit:
    """A forward pass of a batch without gradients."""
    with torch.device("meta"):
        return _unit(inference(run, modules), batch, set(modules), precision)


def encoding(backbone: str, image_size: int, batch_size: int = LATENT_BATCH) -> Unit:
    """The autoencoder's encoder, as the cache of latents runs it."""
    with torch.device("meta"):
        autoencoder = GrayscaleAutoencoder(load_part(backbone, "vae"))
    shape = (batch_size, 1, image_size, image_size)
    return _forward(lambda: autoencoder.encode(torch.zeros(shape)), [autoencoder], batch_size)


def embedding(backbone: str) -> Unit:
    """The text encoder, a prompt; nothing where the UNet takes none."""
    if not takes_prompts(backbone):
        return Unit(0, 0, 0)
    with torch.device("meta"):
        encoder = load_part(backbone, "text_encoder")
    tokens = context_shape(backbone)[0]
    return _forward(lambda: encoder(torch.zeros(1, tokens, dtype=torch.long)), [encoder], 1)


def sampling(parser: ConfigParser, train_base: bool = False) -> Unit:
    """A variant: what the sampler's steps compute, what it computes once a pass, and the decoder.

    Args:
        parser: of ``parse``, for the synthesis config.
        train_base: whether the generator has a UNet of its own; changes no FLOPs.

    Every variant's edge and prompt count as different; where variants share a prompt, its keys and
    values cost less than this.

    Source: engineering choice; the loop is ``VariantInferer``'s
    """
    backbone, size, batch = (value(parser, k) for k in ("backbone", "image_size", "batch_size"))
    scheduler = build_scheduler(value(parser, "scheduler"), load_config(backbone, "scheduler"))
    scheduler.set_timesteps(value(parser, "num_inference_steps"))
    names = ("guidance_scale", "guidance_interval", "control_scale", "control_interval")
    knobs = {name: value(parser, name) for name in names if name in parser}
    with torch.device("meta"):
        network = ControlledUNet(backbone, train_base).eval()
        decoder = load_decoder(value(parser, "decoder"), backbone)
        latent = torch.zeros(batch, *latent_shape(backbone, size))
        conditions = _generator_inputs(backbone, size, batch)[2:]
    kinds = Counter(step_kinds(len(scheduler.timesteps), **knobs))
    modules = [network, network.base, decoder]
    negative = conditions[0] if any(guided for guided, _ in kinds) else None
    with constant_conditions(network, *conditions, negative):
        first = _steps(network, dict.fromkeys(kinds, 1), backbone, size, batch, modules)
        later = _steps(network, kinds - Counter([*kinds]), backbone, size, batch, modules)
    decoding = _forward(lambda: decoder.decode_scaled(latent), modules, batch)
    precision = value(parser, "precision", "float32")
    return replace(
        decoding,
        flops=first.flops + later.flops + decoding.flops,
        activation_bytes=max(unit.activation_bytes for unit in (first, later, decoding)),
        precision=float32_kind(parser) if precision == "float32" else precision,
    )


def _steps(
    network: ControlledUNet, kinds: Mapping, backbone: str, size: int, batch: int, modules: list
) -> Unit:
    """So many of each kind of step (guided, with the branch), the FLOPs of all."""

    def step(guided: bool, controlled: bool) -> None:
        *inputs, edge = _generator_inputs(backbone, size, batch * (1 + guided))
        network(*inputs, edge if controlled else None)

    units = {kind: _forward(partial(step, *kind), modules, batch) for kind in kinds}
    flops = sum(number * units[kind].flops for kind, number in kinds.items())
    peak = max((unit.activation_bytes for unit in units.values()), default=0)
    return Unit(flops, 0, peak)


def edge_detection(edges: str, image_size: int, hed_size_px: int | None) -> Unit:
    """HED at its own size, or the gradient, a slice; by direct convolutions, as on a GPU.

    A processor's HED (:mod:`diffboost.conditions.winograd`) needs a third of them.

    Args:
        edges: the detector's name.
        image_size: side of a slice in pixels.
        hed_size_px: side at which HED looks at it; None: ``detection_size``.

    Source: engineering choice
    """
    shape = (EDGE_BATCH, 1, image_size, image_size)
    if edges == "gradient":
        detector = load_edge_detector(edges, device="meta")
        return _forward(lambda: detector(torch.zeros(shape)), [], EDGE_BATCH)
    side = hed_size_px or detection_size(image_size)
    with torch.device("meta"):
        network = ControlNetHED_Apache2()
    return _forward(lambda: network(torch.zeros(EDGE_BATCH, 3, side, side)), [network], EDGE_BATCH)


def segmenter_training(parser: ConfigParser, passes: int = 1) -> Unit:
    """A step of a segmenter: network, loss and optimizer are the config's own.

    Args:
        parser: of ``parse``.
        passes: 2 where a batch is joined by its variants (arms of diffboost, merged as logits).

    Source: engineering choice; facts 22 (cost of the merge)
    """
    network, loss = (parser.get_parsed_content(key) for key in ("network", "loss"))
    batch, size, channels = (
        value(parser, key) for key in ("batch_size", "image_size", "in_channels")
    )
    network.train()

    def step() -> None:
        with torch.device("meta"):
            slices = torch.zeros(passes * batch, channels or 1, size, size)
            label = torch.zeros(batch, 1, size, size, dtype=torch.uint8)
        torch.autograd.backward(loss(sum(network(slices).chunk(passes)), label))

    counted = count(step, [network])
    optimizer = parser.get_parsed_content("optimizer")
    unit = _unit(counted, batch, {network}, amp_precision(parser))
    return replace(
        unit,
        gradient_bytes=num_bytes(p.grad for p in _trained(network)),
        optimizer_bytes=optimizer_bytes(optimizer),
        saved_bytes=unit.weight_bytes,
    )


def segmenter_inference(parser: ConfigParser, batch_size: int = 16) -> Unit:
    """A segmenter's forward pass, a slice."""
    network = parser.get_parsed_content("network").eval()
    size, channels = (value(parser, key) for key in ("image_size", "in_channels"))
    shape = (batch_size, channels or 1, size, size)
    return _forward(lambda: network(torch.zeros(shape)), [network], batch_size)


def translator_training(parser: ConfigParser) -> Unit:
    """A step of Pix2Pix, its discriminator's included, as ``AdversarialTrainer`` does it.

    Args:
        parser: of ``parse``, for train_pix2pix.yaml.

    Source: Isola et al. 2017
    """
    network, judge = (parser.get_parsed_content(key) for key in ("network", "discriminator"))
    batch, size = (value(parser, key) for key in ("batch_size", "image_size"))

    def step() -> None:
        edge = torch.zeros(batch, 1, size, size, device="meta")
        drawn = network(edge)
        # MONAI's adversarial loss cannot be on the meta device; a sum leads back the same way.
        torch.autograd.backward(judge(torch.cat([edge, drawn], 1))[-1].sum())
        for image in (edge, drawn.detach()):
            torch.autograd.backward(judge(torch.cat([edge, image], 1))[-1].sum())

    counted = count(step, [network, judge])
    optimizers = [value(parser, key) for key in ("optimizer", "discriminator_optimizer")]
    return replace(
        _unit(counted, batch, {network, judge}, "float32"),
        gradient_bytes=num_bytes(p.grad for m in (network, judge) for p in _trained(m)),
        optimizer_bytes=sum(optimizer_bytes(optimizer) for optimizer in optimizers),
        saved_bytes=_weights([network]),
    )

"""A network of MONAI as a part of a backbone: its configuration, its folder, its weights."""

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffusers.configuration_utils import FrozenDict
from monai.networks.nets.diffusion_model_unet import DiffusionUNetTransformerBlock
from safetensors.torch import save_file
from torch import nn

from diffboost.data.documents import read_json
from diffboost.data.weights import load_weights
from diffboost.knobs import refuse_unknown

WEIGHTS = "diffusion_pytorch_model.safetensors"
# What MONAI raises on arguments that make no network.
REFUSALS = (
    RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    AssertionError,
)  # fmt: skip


class MonaiPart(nn.Module):
    """A network of MONAI under the calls that diffusers' part of the same name answers.

    Args:
        config: see :meth:`complete`.

    Raises:
        ValueError: see :meth:`complete`; or MONAI makes no network of the arguments.

    Source: engineering choice; the networks are MONAI's (Pinaya et al. 2023).
    """

    network_class: type[nn.Module]
    own_defaults: Mapping = {}  # what a configuration holds beside MONAI's arguments

    def __init__(self, config: Mapping) -> None:
        super().__init__()
        self.config = FrozenDict(self.complete(config))
        parameters = inspect.signature(self.network_class).parameters
        try:
            self.network = self.network_class(**{name: self.config[name] for name in parameters})
        except REFUSALS as error:
            raise ValueError(
                f"backbone: {self.class_name()}: MONAI refuses its arguments: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error

    @classmethod
    def class_name(cls) -> str:
        """What ``_class_name`` says in a ``config.json``."""
        return f"monai.networks.nets.{cls.network_class.__name__}"

    @classmethod
    def complete(cls, config: Mapping) -> dict:
        """A configuration with MONAI's defaults for what it leaves out.

        Args:
            config: arguments of MONAI's class, and what ``own_defaults`` names.

        Raises:
            ValueError: an argument is unknown or missing, or means what has no counterpart here
                (volumes, classes).

        Source: engineering choice.
        """
        parameters = inspect.signature(cls.network_class).parameters
        allowed = {*parameters, *cls.own_defaults}
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        refuse_unknown(given, allowed, f"backbone: {cls.class_name()}")
        empty = inspect.Parameter.empty
        defaults = {p.name: p.default for p in parameters.values() if p.default is not empty}
        whole = {**defaults, **cls.own_defaults, **given}
        missing = sorted(allowed - set(whole))
        if missing:
            raise ValueError(f"backbone: {cls.class_name()}: {', '.join(missing)}: not given")
        if whole["spatial_dims"] != 2:
            raise ValueError(
                f"backbone: {cls.class_name()}: spatial_dims: {whole['spatial_dims']!r}; "
                "only 2 is allowed: the bundles work on slices"
            )
        if whole.get("num_class_embeds") is not None:
            raise ValueError(
                f"backbone: {cls.class_name()}: num_class_embeds: {whole['num_class_embeds']!r}; "
                "only null is allowed: slices have prompts and no class numbers"
            )
        return {"_class_name": cls.class_name(), **whole}

    @classmethod
    def from_config(cls, config: Mapping) -> "MonaiPart":
        """The part with drawn weights, under the name that diffusers' parts have for it."""
        return cls({name: config[name] for name in config if name in cls.names()})

    @classmethod
    def names(cls) -> list[str]:
        """The keys of a ``config.json``, but its ``_class_name``."""
        return [*inspect.signature(cls.network_class).parameters, *cls.own_defaults]

    @classmethod
    def load(cls, folder: Path) -> "MonaiPart":
        """The part that lies in a folder.

        Raises:
            OSError: there is none.
            ValueError: it is damaged or does not fit its configuration.
        """
        part = cls(read_json(folder / "config.json", "backbone"))
        load_weights(part.network, folder / WEIGHTS, "backbone")
        return part

    def save_pretrained(self, folder: Path) -> None:
        """Writes the part into a folder, under the name that diffusers' parts have for it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {name: self.config[name] for name in ("_class_name", *self.names())}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        state = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(state, folder / WEIGHTS)

    def text_projections(self) -> Iterator[nn.Module]:
        """The cross-attentions' keys and values: they take the context as the network gets it."""
        for module in self.network.modules():
            if isinstance(module, DiffusionUNetTransformerBlock):
                yield from (module.attn2.to_k, module.attn2.to_v)

    def enable_gradient_checkpointing(self) -> None:
        """Raises ValueError: MONAI's networks cannot compute activations again."""
        raise ValueError(
            "gradient_checkpointing: true; MONAI's UNet and ControlNet have none: only false is "
            "allowed with a backbone of theirs"
        )

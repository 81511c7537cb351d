"""The bundles' configs as they are counted: with overlays and knobs, on the meta device."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from monai.bundle import ConfigParser


def parse(files: Sequence[str | Path], knobs: Mapping) -> ConfigParser:
    """A stage's config with its overlays and knobs, on the meta device and without weights.

    Args:
        files: the config file, then its overlays.
        knobs: replace what the files say.

    Source: engineering choice
    """
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    parser.update(dict(knobs))
    parser["device"] = "$torch.device('meta')"
    for key, neutral in (("weights", None), ("compile", False)):
        if key in parser:
            parser[key] = neutral
    return parser


def value(parser: ConfigParser, key: str, default=None):
    """What a knob is after all overlays; ``default`` where the config has no such key."""
    return parser.get_parsed_content(key) if key in parser else default


def without_eight_bit(parser: ConfigParser) -> bool:
    """Takes AdamW for its 8-bit form, which needs CUDA; whether that was asked for."""
    eight_bit = value(parser, "optimizer_name") == "adamw8bit"
    if eight_bit:
        parser["optimizer_name"] = "adamw"
    return eight_bit


def float32_kind(parser: ConfigParser) -> str:
    """What float32 multiplications run in: TensorFloat-32 where the config allows it."""
    steps = str(parser.config.get("initialize", ""))
    return "tfloat32" if "set_float32_matmul_precision('high')" in steps else "float32"


def amp_precision(parser: ConfigParser) -> str:
    """What a segmenter's multiplications run in, by its knob ``amp``; auto as on this machine."""
    return "bfloat16" if value(parser, "bfloat16", False) else "float32"

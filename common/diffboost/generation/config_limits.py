"""Limits of a network's configuration, looked at before memory is taken for the network."""

from collections.abc import Mapping
from pathlib import Path

LARGEST_SIZE = 1 << 20  # tokens, pixels, channels
MOST_LAYERS = 1 << 10


def refuse_absurd(config: Mapping, path: Path) -> None:
    """Raises ValueError for a number that no network of a backbone has, before one is built.

    Source: engineering choice (issue 5, "Hostile input").
    """
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        counted = "layers" in name or "res_blocks" in name
        highest = MOST_LAYERS if counted else LARGEST_SIZE
        for number in numbers:
            if isinstance(number, int) and not -1 <= number <= highest:
                raise ValueError(f"backbone: {path}: {name}: {value!r:.80}; at most {highest}")

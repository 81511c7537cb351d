"""Changes of a few top-level keys in a YAML config or a README; all other bytes stay."""

import json
import re
from pathlib import Path

import yaml

from diffboost.data.documents import read_config

_KEY = re.compile(r"^([A-Za-z_][\w:]*):", re.MULTILINE)


def set_blocks(path: Path, knobs: dict, overlay: Path | None = None) -> tuple[str, list[str]]:
    """The text of a config with other values of some knobs and a network's blocks.

    Args:
        path: the YAML config.
        knobs: key -> value; those that the config does not have, or has with this value, are left.
        overlay: a config whose top-level keys take the place of the same ones.

    Returns:
        The text, and the keys that were changed.

    Raises:
        ValueError: the result does not say what was wanted, or an overlay's key has no place.

    Source: engineering choice (comments and order are what people read).
    """
    text, config = path.read_text(encoding="utf-8"), read_config(path, "config")
    wanted = {key: value for key, value in knobs.items() if key in config}
    wanted = {key: value for key, value in wanted.items() if config[key] != value}
    for key, value in wanted.items():
        text = _with_value(text, key, json.dumps(value))
    if overlay is not None:
        layer, source = read_config(overlay, "config"), overlay.read_text(encoding="utf-8")
        for key in layer:
            text = _replace(text, key, _block(source, key), path)
        wanted |= {key: value for key, value in layer.items() if config.get(key) != value}
    if yaml.safe_load(text) != {**config, **wanted}:
        raise ValueError(f"config: {path}: {', '.join(wanted)} could not be set in its text")
    return text, list(wanted)


def _bounds(text: str, key: str) -> tuple[int, int]:
    """Where a top-level key's block begins and ends: at the next key, or comment at the margin."""
    start = next((m.start() for m in _KEY.finditer(text) if m.group(1) == key), -1)
    if start < 0:
        return -1, -1
    following = re.compile(r"^(?=\S)", re.MULTILINE).search(text, text.index("\n", start) + 1)
    return start, following.start() if following else len(text)


def _block(text: str, key: str) -> str:
    start, end = _bounds(text, key)
    return text[start:end]


def _replace(text: str, key: str, block: str, path: Path) -> str:
    """A text with another block of a key."""
    start, end = _bounds(text, key)
    if start < 0:
        raise ValueError(f"config: {path} has no key {key!r} that an overlay could replace")
    return text[:start] + block.rstrip("\n") + "\n" + text[end:]


def _with_value(text: str, key: str, value: str) -> str:
    """A text with another value of a key, on its first line; comments stay."""
    start, end = _bounds(text, key)
    first, newline, rest = text[start:end].partition("\n")
    comment = re.search(r"\s+#.*$", first)
    kept = "".join(
        line for line in rest.splitlines(keepends=True) if line.lstrip()[:1] in ("#", "")
    )
    return (
        text[:start] + f"{key}: {value}{comment[0] if comment else ''}{newline}{kept}" + text[end:]
    )


def set_section(text: str, title: str, body: str) -> str:
    """A Markdown text with another body of a section of second level, or with it at the end.

    Args:
        text: the document.
        title: of the section.
        body: what stands below the title.

    Source: engineering choice.
    """
    section = f"## {title}\n{body.rstrip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if not pattern.search(text):
        return f"{text.rstrip()}\n\n{section}"
    return pattern.sub(lambda _: section + "\n", text, count=1).rstrip() + "\n"

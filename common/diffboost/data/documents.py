"""Documents from outside: JSON and YAML, read within limits, with errors that name file and key."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from diffboost.data.containment import read_file

LARGEST_JSON = 1 << 28  # bytes; the datalist of a million volumes has about 1 << 27
LARGEST_YAML = 1 << 20  # bytes
DEEPEST = 100  # levels; a lineage has two a generation
DIGEST = "digest"  # key of a document's own hash
# PyYAML's own, and what its makers of dates, numbers and keys let through.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def read_json(
    path: str | Path, key: str, kind: type | tuple[type, ...] = dict, nan: bool = False
) -> dict | list:
    """Reads a JSON file.

    Args:
        path: the file.
        key: what it is, for messages.
        kind: dict or list (or both), what it must hold.
        nan: allow NaN and Infinity, which Python writes and JSON does not know.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON in UTF-8, has a name twice in one mapping, is larger than
            ``LARGEST_JSON``, deeper than ``DEEPEST``, or holds another kind.

    Source: engineering choice (issue 5, "Hostile input").
    """
    content = read_file(path, key, LARGEST_JSON)
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=float if nan else _refuse_constant,
        )
        _refuse_deep(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {path} is not JSON: {one_line(error)}") from error
    if not isinstance(value, kind):
        needed = {dict: "a mapping", list: "a list"}.get(kind, "a mapping or a list")
        raise ValueError(f"{key}: {path}: {needed} is needed, got {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A mapping; raises ValueError where a name stands twice, of which JSON keeps the last."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one mapping")
    return mapping


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_deep(value: object) -> None:
    """Raises ValueError for a value of more than ``DEEPEST`` levels, without recursion."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def digest_of(document: Mapping, without: Iterable[str] = ()) -> str:
    """Hash of what a document says, as 64 hexadecimal digits.

    Args:
        document: what is written as JSON.
        without: names that may change; ``digest`` never counts.

    Source: engineering choice (JSON has no checksum).
    """
    left_out = {DIGEST, *without}
    content = {name: value for name, value in document.items() if name not in left_out}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_digest(
    document: Mapping, path: str | Path, key: str, without: Iterable[str] = ()
) -> None:
    """Refuses a document that does not say what it said when it was written.

    Args:
        document: as it was read; one without a ``digest`` is not checked.
        path, key: for the message.
        without: as for ``digest_of``.

    Raises:
        ValueError: the hashes differ.

    Source: engineering choice (issue 5: nothing is accepted in silence).
    """
    if DIGEST in document and document[DIGEST] != digest_of(document, without):
        raise ValueError(
            f"{key}: {path} is damaged or was changed: its {DIGEST} does not fit; if it was "
            f"changed on purpose, take the key '{DIGEST}' out"
        )


def _refuse_nesting(text: str) -> None:
    """Raises ValueError for more open brackets than ``DEEPEST``, on which PyYAML takes minutes."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, which can grow without end, and without a key twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"aliases (*name) are not allowed:{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the key {name!r} stands twice in one mapping:{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, key: str) -> object:
    """Reads a YAML file with plain values only.

    Args:
        path: the file.
        key: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, has aliases, tags of other types or a key twice, or is larger
            than ``LARGEST_YAML``.

    Source: engineering choice (issue 5, "Hostile input").
    """
    content = read_file(path, key, LARGEST_YAML)
    try:
        text = content.decode("utf-8")
        _refuse_nesting(text)
        value = yaml.load(text, _PlainLoader)  # noqa: S506 (a SafeLoader)
        _refuse_deep(value)
    except _YAML_ERRORS as error:
        raise ValueError(f"{key} {path} is not YAML: {one_line(error)}") from error
    return value


def read_config(path: str | Path, key: str) -> dict:
    """Reads a config file of MONAI's as it is written: JSON, or YAML with plain values.

    Args:
        path: the file.
        key: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no mapping, or what ``read_json`` and ``read_yaml`` refuse.

    Source: engineering choice (MONAI's own reader takes seconds to import).
    """
    if Path(path).suffix == ".json":
        return read_json(path, key)
    value = read_yaml(path, key)
    if not isinstance(value, dict):
        raise ValueError(f"{key}: {path}: a mapping is needed, got {type(value).__name__}")
    return value


def one_line(error: BaseException) -> str:
    """What an error says, on one line of readable length.

    Args:
        error: any.

    Source: engineering choice.
    """
    return " ".join(str(error).split())[:300] or type(error).__name__

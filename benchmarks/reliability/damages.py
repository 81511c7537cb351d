"""Damages for fuzz_inputs.py: each changes a file by random numbers; bytes, documents, tables."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

Change = Callable[[Path, np.random.RandomState, Path], None]


@dataclass(frozen=True)
class Damage:
    """A way to change a file.

    ``hostile`` ones must never be accepted with another meaning. ``rewritten`` ones give a whole
    file with right checksums that says something else, as its owner could write it.
    """

    name: str
    change: Change
    hostile: bool = False
    rewritten: bool = False


def _bytes_damage(change: Callable[[bytearray, np.random.RandomState], bytes]) -> Change:
    def act(path: Path, rng: np.random.RandomState, sentinel: Path) -> None:
        path.write_bytes(bytes(change(bytearray(path.read_bytes()), rng)))

    return act


def _flip_bit(content: bytearray, rng) -> bytes:
    content[rng.randint(len(content))] ^= 1 << rng.randint(8)
    return content


def _change_bytes(content: bytearray, rng) -> bytes:
    for place in rng.randint(len(content), size=rng.randint(1, 20)):
        content[place] = rng.randint(256)
    return content


def _flip_early(content: bytearray, rng) -> bytes:
    content[rng.randint(min(512, len(content)))] ^= 1 << rng.randint(8)
    return content


def _flip_late(content: bytearray, rng) -> bytes:
    content[-1 - rng.randint(min(512, len(content)))] ^= 1 << rng.randint(8)
    return content


def _zero_run(content: bytearray, rng) -> bytes:
    start, length = rng.randint(len(content)), rng.randint(1, 200)
    content[start : start + length] = bytes(len(content[start : start + length]))
    return content


def _splice(content: bytearray, rng) -> bytes:
    start, place = rng.randint(len(content)), rng.randint(len(content))
    part = content[start : start + rng.randint(1, 200)]
    content[place:place] = part
    return content


def _delete_run(content: bytearray, rng) -> bytes:
    start = rng.randint(len(content))
    del content[start : start + rng.randint(1, 200)]
    return content


BYTES = [
    Damage("bit flip", _bytes_damage(_flip_bit)),
    Damage("bit flip near the start", _bytes_damage(_flip_early)),
    Damage("bit flip near the end", _bytes_damage(_flip_late)),
    Damage("changed bytes", _bytes_damage(_change_bytes)),
    Damage("truncation", _bytes_damage(lambda c, rng: c[: rng.randint(len(c))])),
    Damage("run of zeros", _bytes_damage(_zero_run)),
    Damage("splice", _bytes_damage(_splice)),
    Damage("deleted run", _bytes_damage(_delete_run)),
    Damage("noise", _bytes_damage(lambda c, rng: rng.bytes(rng.randint(1, 3000)))),
    Damage("emptied", _bytes_damage(lambda c, rng: b"")),
]


def _link(path: Path, rng, sentinel: Path) -> None:
    """A file outside, good in itself, in the place of the file."""
    shutil.copy(path, sentinel / path.name)
    path.unlink()
    path.symlink_to(sentinel / path.name)


def _pipe(path: Path, rng, sentinel: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, rng, sentinel: Path) -> None:
    path.unlink()
    path.mkdir()


def _gone(path: Path, rng, sentinel: Path) -> None:
    path.unlink()


PLACES = [
    Damage("pipe", _pipe),
    Damage("folder in its place", _folder),
    Damage("gone", _gone),
]
LINK = Damage("link to a file outside", _link, hostile=True)

# Values that take the place of a value of a document; the name says what is hostile.
_VALUES = [
    (
        "wrong type",
        lambda rng: [None, True, -1, 0, 1.5, "", "word", [], {}, [1, [2]]][rng.randint(10)],
    ),
    ("huge number", lambda rng: int([10**9, 10**18, 2**63, -(10**12)][rng.randint(4)])),
    ("long text", lambda rng: "a" * 100_000),
]
_OUT = ["../../sentinel/secret.png", "/etc/passwd", "a/../../../sentinel/secret.nii.gz",
        "C:\\secret.png", "..\\..\\secret.png", "images/\x00.png"]  # fmt: skip


def _places(value: object) -> list[tuple]:
    """(container, key) of every value of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in list(items):
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += _places(inner)
    return found


def _edit(load: Callable, dump: Callable, draw: Callable) -> Change:
    def act(path: Path, rng, sentinel: Path) -> None:
        document = load(path.read_text(encoding="utf-8"))
        places = _places(document)
        container, key = places[rng.randint(len(places))]
        container[key] = draw(rng)
        path.write_text(dump(document), encoding="utf-8")

    return act


def _remove(load: Callable, dump: Callable) -> Change:
    def act(path: Path, rng, sentinel: Path) -> None:
        document = load(path.read_text(encoding="utf-8"))
        places = _places(document)
        container, key = places[rng.randint(len(places))]
        del container[key]
        path.write_text(dump(document), encoding="utf-8")

    return act


def _escape(load: Callable, dump: Callable) -> Change:
    """A name of a file leads out of the folder."""

    def act(path: Path, rng, sentinel: Path) -> None:
        document = load(path.read_text(encoding="utf-8"))
        places = [
            (container, key)
            for container, key in _places(document)
            if isinstance(container[key], str)
            and container[key].endswith((".gz", ".nii", ".parquet"))
        ]
        if not places:
            places = _places(document)
        container, key = places[rng.randint(len(places))]
        container[key] = _OUT[rng.randint(len(_OUT))]
        path.write_text(dump(document), encoding="utf-8")

    return act


def _text(text: str) -> Change:
    return lambda path, rng, sentinel: path.write_text(text, encoding="utf-8")


def _twice(path: Path, rng, sentinel: Path) -> None:
    """The first key of a JSON mapping a second time, with nothing in it."""
    text = path.read_text(encoding="utf-8")
    key = next(iter(json.loads(text)))
    path.write_text(text.rstrip().rstrip("}") + f', "{key}": []}}', encoding="utf-8")


JSON_DAMAGES = [
    *(Damage(name, _edit(json.loads, json.dumps, draw)) for name, draw in _VALUES),
    Damage("NaN", _edit(json.loads, json.dumps, lambda rng: float("nan")), hostile=True),
    Damage("removed key", _remove(json.loads, json.dumps)),
    Damage("deep nesting", _text("[" * 100_000), hostile=True),
    Damage("deep mapping", _text('{"a":' * 5000 + "1" + "}" * 5000), hostile=True),
    Damage("a key twice", _twice, hostile=True),
]
JSON_ESCAPE = Damage("a name that leads out", _escape(json.loads, json.dumps), hostile=True)


def _bomb(path: Path, rng, sentinel: Path) -> None:
    """Aliases that grow tenfold a line."""
    lines = ["a0: &a0 [x, x]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)
    ]
    path.write_text(path.read_text() + "\n" + "\n".join(lines) + "\n")


def _tag(path: Path, rng, sentinel: Path) -> None:
    mark = sentinel / "executed"
    path.write_text(
        path.read_text() + f"\nname: !!python/object/apply:os.system ['touch {mark}']\n"
    )


def _yaml_dump(document: object) -> str:
    return yaml.safe_dump(document, sort_keys=False)


YAML_DAMAGES = [
    *(Damage(name, _edit(yaml.safe_load, _yaml_dump, draw)) for name, draw in _VALUES),
    Damage("NaN", _edit(yaml.safe_load, _yaml_dump, lambda rng: float("nan")), hostile=True),
    Damage("removed key", _remove(yaml.safe_load, _yaml_dump)),
    Damage("aliases", _bomb, hostile=True),
    Damage("a tag that runs code", _tag, hostile=True),
    Damage("deep nesting", _text("a: " + "[" * 20_000), hostile=True),
]


def _column(change: Callable[[pd.DataFrame, np.random.RandomState], pd.DataFrame]) -> Change:
    def act(path: Path, rng, sentinel: Path) -> None:
        change(pd.read_parquet(path), rng).to_parquet(path)

    return act


def _name_out(table: pd.DataFrame, rng) -> pd.DataFrame:
    names = [name for name in ("image", "edge", "source_image") if name in table]
    name = names[rng.randint(len(names))]
    table.loc[rng.randint(len(table)), name] = _OUT[rng.randint(len(_OUT))]
    return table


def _null(table: pd.DataFrame, rng) -> pd.DataFrame:
    name = table.columns[rng.randint(len(table.columns))]
    table[name] = table[name].astype(object)
    table.at[rng.randint(len(table)), name] = None
    return table


def _other_type(table: pd.DataFrame, rng) -> pd.DataFrame:
    name = table.columns[rng.randint(len(table.columns))]
    table[name] = [b"\xff\xfe", 3.5, 10**17][rng.randint(3)]
    return table


def _no_column(table: pd.DataFrame, rng) -> pd.DataFrame:
    return table.drop(columns=table.columns[rng.randint(len(table.columns))])


TABLE_DAMAGES = [
    Damage("a name that leads out", _column(_name_out), hostile=True),
    Damage("an empty cell", _column(_null), hostile=True),
    Damage("another type", _column(_other_type), rewritten=True),
    Damage("a column less", _column(_no_column)),
    Damage("no rows", _column(lambda table, rng: table.iloc[:0]), rewritten=True),
]


def _cell(path: Path, rng, sentinel: Path) -> None:
    lines = path.read_text().splitlines()
    line = rng.randint(len(lines))
    cells = lines[line].split(",")
    cells[rng.randint(len(cells))] = ["", "nan", "text", '"', "1e999"][rng.randint(5)]
    lines[line] = ",".join(cells)
    path.write_text("\n".join(lines))


CSV_DAMAGES = [Damage("a cell", _cell), Damage("deep quotes", _text('"' * 9999))]

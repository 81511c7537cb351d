"""Damages and attacks for fuzz_inputs.py: each takes a file and a generator of random numbers."""

import copy
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
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


def _header(**fields) -> Change:
    """Other values in a NIfTI header: place, kind, and what one is drawn from."""

    def act(path: Path, rng, sentinel: Path) -> None:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            content = bytearray(file.read())
        for place, kind, values in fields.values():
            struct.pack_into(kind, content, place, values[rng.randint(len(values))])
        with opened(path, "wb") as file:
            file.write(content)

    return act


def _gzip_bomb(path: Path, rng, sentinel: Path) -> None:
    with gzip.open(path, "rb") as file:
        head = bytearray(file.read(352))
    struct.pack_into("<8h", head, 40, 3, 2000, 2000, 60, 1, 1, 1, 1)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(64):
            file.write(bytes(1 << 20))


_NAN, _INF = float("nan"), float("inf")
_HUGE = {"a": (42, "<h", [32767, 30000]), "b": (44, "<h", [32767]), "c": (46, "<h", [32767])}
_FLAT = {"a": (280, "<f", [0.0]), "b": (296, "<f", [0.0]), "c": (312, "<f", [0.0])}
_STARTS = [_NAN, -8.0, 1e30, 3e9]
VOLUME_DAMAGES = [
    Damage("huge dims", _header(**_HUGE), hostile=True),
    Damage("negative or no dims", _header(a=(42, "<h", [-5, 0])), hostile=True),
    Damage("wrong number of dims", _header(a=(40, "<h", [0, 1, 9, -3, 300])), hostile=True),
    Damage("voxels begin elsewhere", _header(a=(108, "<f", _STARTS)), hostile=True),
    Damage("another type of voxels", _header(a=(70, "<h", [0, 1, 32, 128, 1536, 2304, 9999]))),
    Damage("NaN in the affine", _header(a=(280, "<f", [_NAN, _INF])), hostile=True),
    Damage("no spacing", _header(**_FLAT), hostile=True),
    Damage("NaN in the scaling", _header(a=(112, "<f", [_INF, -_INF]))),
    Damage("NaN in spacings", _header(a=(80, "<f", [_NAN, -1.0]), b=(84, "<f", [_NAN, 0.0]))),
]  # fmt: skip
GZIP_BOMB = Damage("gzip bomb", _gzip_bomb, hostile=True)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _picture(width: int, height: int, raw_bytes: int) -> Change:
    """A PNG with right checksums that claims a size and unpacks to so many bytes."""

    def act(path: Path, rng, sentinel: Path) -> None:
        packer = zlib.compressobj(9)
        packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(raw_bytes >> 20))
        head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head)
            + _chunk(b"IDAT", packed + packer.flush()) + _chunk(b"IEND", b"")
        )  # fmt: skip

    return act


def _text_bomb(path: Path, rng, sentinel: Path) -> None:
    """A compressed text of 256 MB in front of the pixels."""
    content = path.read_bytes()
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    path.write_bytes(content[:33] + _chunk(b"zTXt", b"diffboost:case\0\0" + packed) + content[33:])


PICTURE_DAMAGES = [
    Damage("huge size", _picture(60000, 60000, 1 << 20), hostile=True),
    Damage("huge side", _picture(2**31 - 1, 1, 1 << 20), hostile=True),
    Damage("no size", _picture(0, 0, 0), hostile=True),
    Damage("pixel bomb", _picture(9000, 9000, 81 << 20), hostile=True),
    Damage("size that is not there", _picture(4000, 4000, 0), hostile=True),
]
TEXT_BOMB = Damage("text bomb", _text_bomb)


class _Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def _pickle_zipped(path: Path, rng, sentinel: Path) -> None:
    torch.save({"state_dict": {}, "code": _Payload(sentinel / "executed")}, path)


def _pickle_legacy(path: Path, rng, sentinel: Path) -> None:
    payload = {"a": _Payload(sentinel / "executed")}
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def _pickle_plain(path: Path, rng, sentinel: Path) -> None:
    path.write_bytes(pickle.dumps(_Payload(sentinel / "executed")))


def _zip_bomb(path: Path, rng, sentinel: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w") as file:
            for _ in range(128):
                file.write(bytes(1 << 20))
    path.write_bytes(buffer.getvalue())


def _other_tensors(path: Path, rng, sentinel: Path) -> None:
    state = torch.load(path, weights_only=True)
    name = sorted(state)[rng.randint(len(state))]
    value = copy.deepcopy(state[name])
    state[name] = [value[:0], value.new_zeros(3, 3, 3), "text", None][rng.randint(4)]
    torch.save(state, path)


def _head_of_tensors(path: Path, rng, sentinel: Path) -> None:
    """A .safetensors head that claims more than there is."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 0, int([2**62, 10**9, 0, len(content)][rng.randint(4)]))
    path.write_bytes(content)


PICKLES = [
    Damage("pickle, zipped", _pickle_zipped, hostile=True),
    Damage("pickle, legacy", _pickle_legacy, hostile=True),
    Damage("pickle, plain", _pickle_plain, hostile=True),
    Damage("zip bomb", _zip_bomb, hostile=True),
]
TORCH_DAMAGES = [*PICKLES, Damage("other tensors", _other_tensors, hostile=True)]
TENSOR_DAMAGES = [*PICKLES, Damage("head that lies", _head_of_tensors, hostile=True)]


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 4) -> Change:
    """One more member in a tar, that should not be written."""

    def act(path: Path, rng, sentinel: Path) -> None:
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            member.size = size if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(bytes(4)) if kind == tarfile.REGTYPE else None)

    return act


def _claims(path: Path, rng, sentinel: Path) -> None:
    content = bytearray(path.read_bytes())
    head = tarfile.TarInfo("Task09_Spleen/huge.nii")
    head.size = 10**12
    path.write_bytes(head.tobuf() + bytes(content))


def _packed(path: Path, rng, sentinel: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


ARCHIVE_DAMAGES = [
    Damage("path that leads out", _member("../sentinel/planted"), hostile=True),
    Damage("hidden path that leads out", _member("Task09_Spleen/../../planted"), hostile=True),
    Damage("absolute path", _member("/tmp/planted_by_fuzz"), hostile=True),
    Damage("link", _member("Task09_Spleen/a", tarfile.SYMTYPE, "../../sentinel"), hostile=True),
    Damage("hard link", _member("Task09_Spleen/b", tarfile.LNKTYPE, "/etc/passwd"), hostile=True),
    Damage("device", _member("Task09_Spleen/c", tarfile.CHRTYPE), hostile=True),
    Damage("pipe inside", _member("Task09_Spleen/d", tarfile.FIFOTYPE), hostile=True),
    Damage("size that is not there", _claims, hostile=True),
    Damage("packed", _packed, hostile=True),
]  # fmt: skip


def _cell(path: Path, rng, sentinel: Path) -> None:
    lines = path.read_text().splitlines()
    line = rng.randint(len(lines))
    cells = lines[line].split(",")
    cells[rng.randint(len(cells))] = ["", "nan", "text", '"', "1e999"][rng.randint(5)]
    lines[line] = ",".join(cells)
    path.write_text("\n".join(lines))


CSV_DAMAGES = [Damage("a cell", _cell), Damage("deep quotes", _text('"' * 9999))]


def volume(path: Path, seed: int, label: bool) -> None:
    """A small NIfTI file for the fuzzer: noise with a box, or the box."""
    rng = np.random.RandomState(seed)
    mask = np.zeros((12, 14, 4), np.uint8)
    mask[3:8, 4:9, 1:3] = 1
    array = mask if label else (rng.normal(100, 10, mask.shape) + 60 * mask).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), path)

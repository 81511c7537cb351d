"""Attacks for fuzz_inputs.py: files that claim what is not there, hold code, or lead out."""

import copy
import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from damages import Change, Damage


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


def volume(path: Path, seed: int, label: bool) -> None:
    """A small NIfTI file for the fuzzer: noise with a box, or the box."""
    rng = np.random.RandomState(seed)
    mask = np.zeros((12, 14, 4), np.uint8)
    mask[3:8, 4:9, 1:3] = 1
    array = mask if label else (rng.normal(100, 10, mask.shape) + 60 * mask).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), path)

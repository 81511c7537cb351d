"""Weights from outside: tensors and plain containers only, no code, checked against checksums."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffboost.data.containment import refuse_special

# Where trainers write the state dict that is not the file itself: Lightning, MONAI's
# CheckpointSaver, and the scripts of monai-generative and MAISI.
CONTAINERS = (
    "state_dict", "model", "model_state_dict", "unet_state_dict", "autoencoder_state_dict",
    "controlnet_state_dict",
)  # fmt: skip
# Lightning writes its own classes beside the weights; they are read as empty shells.
INERT_MODULES = ("pytorch_lightning.", "lightning.")
# What torch, zipfile and pickle raise on a damaged file; zipfile says NotImplementedError of a
# compression or version that it does not know, which a flipped bit makes.
_DAMAGE = (
    RuntimeError, OSError, ValueError, LookupError, EOFError, TypeError, AttributeError,
    ArithmeticError, AssertionError, MemoryError, ImportError, SafetensorError, zipfile.BadZipFile,
    NotImplementedError,
)  # fmt: skip


class Inert:
    """Stands for a class of Lightning inside a checkpoint; does nothing."""

    def __init__(self, *args, **kwargs) -> None: ...


def read_state(path: str | Path, prefix: str = "", key: str = "weights") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin with ``prefix``, on the CPU.

    Args:
        path: a .safetensors file, or one that torch wrote; a state dict inside (under one of
            ``CONTAINERS``) is opened.
        prefix: "" gives all tensors. Others are not kept in memory.
        key: what the file is, for messages.

    Returns:
        Name (whole, with its prefix) to tensor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no tensors, or holds more than tensors.

    Source: engineering choice.
    """
    path = Path(path)
    refuse_special(path, key)
    with _named(path, key):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}
        state = _read_torch(path)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name.startswith(prefix)
    }


def tensor_names(path: str | Path, key: str = "weights") -> list[str]:
    """The names of a checkpoint's tensors; of a .safetensors file only its head is read.

    Args:
        path, key: see :func:`read_state`.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_state`.

    Source: engineering choice.
    """
    if Path(path).suffix != ".safetensors":
        return list(read_state(path, key=key))
    refuse_special(path, key)
    with _named(path, key), safe_open(path, framework="pt") as file:
        return list(file.keys())


@contextmanager
def _named(path: str | Path, key: str) -> Iterator[None]:
    """Turns what is raised on a damaged file, or on one with code, into an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UnpicklingError as error:
        raise ValueError(
            f"{key}: {path} holds more than tensors and plain containers, which could run code: "
            f"{_line(error)}; write its state dict alone to a .safetensors file"
        ) from error
    except _DAMAGE as error:
        raise ValueError(f"{key}: {path} cannot be read: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_torch(path: Path) -> Mapping:
    """The state dict in a file of torch, mapped into memory where its format allows."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        stamp = path.stat()
        _check_zip(path, stamp.st_size, stamp.st_mtime_ns)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    shells = [(Inert, name) for name in unsafe if name.startswith(INERT_MODULES)]
    with torch.serialization.safe_globals(shells):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    if isinstance(state, Mapping):
        inner = (state[name] for name in CONTAINERS if isinstance(state.get(name), Mapping))
        state = next(inner, state)
    if not isinstance(state, Mapping):
        raise ValueError("it holds no mapping of names to tensors")
    return {str(name): value for name, value in state.items()}


@lru_cache(maxsize=64)
def _check_zip(path: Path, size: int, changed_ns: int) -> None:
    """Raises ValueError for a zip file with damaged or packed members; torch looks at neither.

    A file is read once a process for it: a gigabyte a second.
    """
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if total > size:
            raise ValueError(f"{size} bytes claim to hold {total}; torch does not pack weights")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its part {damaged} is damaged (checksum)")


def check_weights(path: str | Path, key: str = "weights") -> None:
    """Refuses weights that do not load, before a handler of MONAI's loads them without a name.

    Args:
        path, key: see :func:`read_state`.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_state`; also without any tensor.

    Source: engineering choice (issue 5, "Hostile input").
    """
    if not tensor_names(path, key):
        raise ValueError(f"{key}: {path} holds no tensors")


def load_weights(network: nn.Module, path: str | Path, key: str = "weights") -> None:
    """Puts a checkpoint's tensors into a network.

    Args:
        network: gets them.
        path, key: see :func:`read_state`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see :func:`read_state`; or tensors are missing, too many or of another shape.

    Source: engineering choice.
    """
    try:
        network.load_state_dict(read_state(path, key=key))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:500]
        raise ValueError(f"{key}: {path} does not fit this network: {text}") from error

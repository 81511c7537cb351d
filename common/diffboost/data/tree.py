"""Trees modality/organ/finding/*.png such as RadImageNet: listing them and checking their files."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from diffboost.data.containment import leads_out, read_file
from diffboost.data.images import BROKEN_ERRORS, LARGEST_PICTURE, SIGNATURE, check_chunks

DEPTH = 3  # folders above an image


def scan_tree(root: str | Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Lists the images of a tree; opens none.

    Args:
        root: folder that holds modality/organ/finding/*.png; hidden files are passed over.

    Returns:
        Paths relative to ``root``, folder by folder in the order of their names, and rejected
        files (path, reason): other files beside images, and images at another depth.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image at all.

    Source: DiffBoost Sec. 3.2 (RadImageNet's layout).
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir: no such folder: {root}")
    paths: list[str] = []
    rejected: list[tuple[str, str]] = []
    _scan_folder(root, "", 0, paths, rejected)
    if not paths:
        reasons = "; ".join(f"{file}: {reason}" for file, reason in rejected[:3])
        raise ValueError(
            f"dataset_dir: no case of layout 'radimagenet' in {root}. "
            f"{reasons or 'Expected is modality/organ/finding/*.png'}"
        )
    return paths, rejected


def _scan_folder(root: Path, folder: str, depth: int, paths: list, rejected: list) -> None:
    """Adds what lies in one folder and below it."""
    with os.scandir(root / folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        relative = f"{folder}/{entry.name}" if folder else entry.name
        picture = entry.name.lower().endswith(".png")
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and entry.is_dir() and leads_out(root, entry.path):
            rejected.append((relative, "a link that leads out of the tree"))
            continue
        if depth == DEPTH:
            if picture:
                paths.append(relative)
            else:
                rejected.append((relative, "not a .png file"))
        elif entry.is_dir():
            _scan_folder(root, relative, depth + 1, paths, rejected)
        elif picture:
            rejected.append((relative, "images lie at modality/organ/finding/name.png"))


def check_png(path: str | Path) -> tuple[str, int, int]:
    """Reads a PNG file once, checks its structure (checksums of all chunks) and hashes it.

    Args:
        path: the file.

    Returns:
        sha256 as 64 hexadecimal digits, height and width in pixels.

    Raises:
        ValueError: the file cannot be read, is empty, no PNG or broken; the message says which.

    Source: engineering choice (checksums of all chunks; pixels are decoded when edges are made).
    """
    try:
        content = read_file(path, "image", LARGEST_PICTURE)
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from error
    if not content.startswith(SIGNATURE):
        raise ValueError("not a PNG file" if content else "the file is empty")
    try:
        check_chunks(content)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            width, height = picture.size
    except UnidentifiedImageError as error:
        raise ValueError("broken PNG: its head is damaged or cut off") from error
    except BROKEN_ERRORS as error:
        raise ValueError(f"broken PNG: {error}") from error
    return hashlib.sha256(content).hexdigest(), height, width


class PngChecks(Dataset):
    """Checks files of a tree by chunks: ``check_png``'s result or the reason (str) of each file.

    Args:
        root: the tree.
        paths: paths relative to ``root``.
        chunk: files an item.

    Source: engineering choice.
    """

    def __init__(self, root: Path, paths: Sequence[str], chunk: int) -> None:
        self.root = str(root)
        self.paths = paths
        self.chunk = chunk

    def __len__(self) -> int:
        """Number of chunks."""
        return -(-len(self.paths) // self.chunk)

    def __getitem__(self, index: int) -> list[tuple[str, int, int] | str]:
        """The results of the files of a chunk."""
        results = []
        for path in self.paths[index * self.chunk : (index + 1) * self.chunk]:
            try:
                results.append(check_png(os.path.join(self.root, path)))
            except ValueError as error:
                results.append(str(error))
        return results

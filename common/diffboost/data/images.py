"""Pictures from outside: size and checksums are looked at before a pixel is decoded."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffboost.data.containment import read_file, refuse_special

FORMATS = ("PNG", "JPEG", "TIFF")
LARGEST_PIXELS = 1 << 26  # 8192 x 8192
LARGEST_PICTURE = 1 << 30  # bytes of a file
SIGNATURE = b"\x89PNG\r\n\x1a\n"
HIGHEST_RATIO = 1040  # of deflate's output to its input; 1032 and headers
# Pillow's plugins unpack what a damaged file says: their errors are of any of these kinds.
BROKEN_ERRORS = (
    OSError, SyntaxError, ValueError, LookupError, EOFError, TypeError, ArithmeticError,
    AttributeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def read_image(path: str | Path, key: str) -> Image.Image:
    """A whole picture in memory.

    A PNG is refused if a checksum of its does not fit, which Pillow's decoder does not look at:
    of labels, which are nearly empty, it takes a tenth of the damaged files for good ones.

    Args:
        path: a PNG, JPEG or TIFF file, told apart by content.
        key: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these, damaged, cut off or claims absurd sizes.

    Source: engineering choice (issue 5, "Hostile input").
    """
    content = read_file(path, key, LARGEST_PICTURE)
    try:
        return decode(content)
    except ValueError as error:
        raise ValueError(
            f"{key}: {path} cannot be read, truncated or of another format: {error}"
        ) from error


def read_levels(path: str | Path, key: str) -> np.ndarray:
    """The levels of a whole picture, (H, W), as its file has them.

    Args:
        path, key: see :func:`read_image`; the key ``label`` takes 8-bit gray or palettes alone.

    Returns:
        uint8 of an 8-bit picture and uint16 of a 16-bit one; float32 luminance, 0 to 255, of RGB.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_image`; or a label of another kind.

    Source: engineering choice (design, "Slice store").
    """
    picture = read_image(path, key)
    if key == "label":
        if picture.mode not in ("L", "P", "1"):
            raise ValueError(f"label: a picture of mode {picture.mode}; 8-bit gray is needed")
        return np.array(picture, dtype=np.uint8)
    if picture.mode == "L" or picture.mode.startswith("I"):
        return np.array(picture)
    return np.array(picture.convert("F"))


def picture_size(path: str | Path, key: str) -> tuple[int, int]:
    """Width and height that a picture's header claims, in pixels.

    Args:
        path: a PNG, JPEG or TIFF file.
        key: what it is, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these, or claims absurd sizes.

    Source: engineering choice.
    """
    refuse_special(path, key)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _refuse_size(*picture.size)
            return picture.size
    except BROKEN_ERRORS as error:
        raise ValueError(f"{key}: {path} cannot be read: {error}") from error


def decode(content: bytes) -> Image.Image:
    """The picture in the bytes of a file.

    Args:
        content: of a PNG, JPEG or TIFF file.

    Raises:
        ValueError: says what is wrong with it.

    Source: engineering choice.
    """
    if content.startswith(SIGNATURE):
        check_chunks(content)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            _refuse_size(*picture.size)
            picture.load()
            return picture
    except UnidentifiedImageError as error:
        raise ValueError(
            f"it is no whole picture of the formats {', '.join(FORMATS)}"
            if content
            else "the file is empty"
        ) from error
    except BROKEN_ERRORS as error:
        raise ValueError(f"it is damaged, cut off or too large: {error}") from error


def check_chunks(content: bytes) -> None:
    """Refuses a PNG with a damaged chunk, or with a size that its bytes cannot hold.

    Args:
        content: of a file that begins with PNG's signature.

    Raises:
        ValueError: says what is wrong.

    Source: PNG specification, 5.3 (chunks) and 11.2.2 (header); deflate's highest ratio.
    """
    place, packed, kind = len(SIGNATURE), 0, b""
    size = (0, 0, 0, 0)
    while kind != b"IEND":
        if place + 12 > len(content):
            raise ValueError("it is cut off")
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            raise ValueError("it is cut off")
        checksum = zlib.crc32(memoryview(content)[place + 4 : end])
        if checksum != struct.unpack_from(">I", content, end)[0]:
            raise ValueError(f"its part {kind.decode('latin-1')!r} is damaged (checksum)")
        if place == len(SIGNATURE):
            if (length, kind) != (13, b"IHDR"):
                raise ValueError("it does not begin with its header")
            size = struct.unpack_from(">IIBB", content, place + 8)
            _refuse_size(*size[:2])
        elif kind == b"IDAT":
            packed += length
        place = end + 4
    width, height, depth, _ = size
    if width * height * depth // 8 > HIGHEST_RATIO * packed:
        raise ValueError(f"{packed} bytes cannot hold the {width} x {height} pixels that it claims")


def _refuse_size(width: int, height: int) -> None:
    """Raises ValueError for a picture without pixels, or with more than the limit."""
    if not 0 < width * height <= LARGEST_PIXELS:
        raise ValueError(
            f"it claims {width} x {height} pixels; 1 to {LARGEST_PIXELS} in all are allowed"
        )

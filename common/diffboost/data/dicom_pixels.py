"""Coded pixels of DICOM files: which codes are read, and what sizes they themselves claim."""

import struct

from monai.utils import optional_import

pydicom, _ = optional_import("pydicom")
get_decoder, HAS_DECODERS = optional_import("pydicom.pixels", name="get_decoder")  # pydicom 3

PLAIN = {
    "1.2.840.10008.1.2": "Implicit VR Little Endian",
    "1.2.840.10008.1.2.1": "Explicit VR Little Endian",
    "1.2.840.10008.1.2.2": "Explicit VR Big Endian",
}
RLE, JPEG_2000 = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"
LOSSLESS = {
    RLE: "RLE Lossless",
    "1.2.840.10008.1.2.4.57": "JPEG Lossless",
    "1.2.840.10008.1.2.4.70": "JPEG Lossless, first-order prediction",
    "1.2.840.10008.1.2.4.80": "JPEG-LS Lossless",
    JPEG_2000: "JPEG 2000 Lossless",
}
_SIZE_OF_J2K = b"\xff\x4f\xff\x51"  # start of a code stream, and its size segment
_START_OF_JPEG = b"\xff\xd8\xff"
_FRAMES_OF_JPEG = (0xC3, 0xF7)  # SOF3 (lossless), SOF55 (JPEG-LS)


class UnusableDicom(ValueError):
    """A DICOM file or series is refused, in words of ours that hold no free text of its header.

    Source: engineering choice (what pydicom raises may quote bytes of a patient's data).
    """


def refuse_syntax(uid: str | None) -> None:
    """Refuses a transfer syntax that is not read, by its name.

    Args:
        uid: of a file's meta header; None: there is none.

    Raises:
        ValueError: it is lossy, deflated or unknown, or no decoder for it is installed.

    Source: engineering choice (issue 4, "DICOM in").
    """
    if uid in PLAIN:
        return
    if uid not in LOSSLESS:
        name = pydicom.uid.UID(str(uid)).name if uid else "none"
        allowed = ", ".join((PLAIN | LOSSLESS).values())
        raise UnusableDicom(f"transfer syntax {name!s:.60} is not read; allowed: {allowed}")
    if HAS_DECODERS:
        there = get_decoder(uid).is_available
    else:
        handlers = pydicom.config.pixel_data_handlers
        there = any(each.is_available() and each.supports_transfer_syntax(uid) for each in handlers)
    if not there:
        raise UnusableDicom(
            f"transfer syntax {LOSSLESS[uid]}: no decoder is installed; one is in "
            "'pip install pylibjpeg[all]', or decompress the files (dcmdjpeg, gdcmconv --raw)"
        )


def refuse_coded_size(uid: str, pixels: bytes, size: tuple[int, int], name: str) -> None:
    """Refuses compressed pixels whose own header claims another size than the file's.

    A decoder takes memory by what the code stream says, not by Rows and Columns. RLE has no size
    of its own, and grows 64 times at most.

    Args:
        uid: the transfer syntax, one of :data:`LOSSLESS`.
        pixels: encapsulated.
        size: columns and rows, by the file's header.
        name: the file's, for the message.

    Raises:
        ValueError: the sizes differ, or a JPEG's size is not found.

    Source: ISO/IEC 15444-1 A.5.1 (SIZ), 10918-1 B.2.2 (SOF), 14495-1 C.2.2.
    """
    if uid == RLE:
        return
    if uid == JPEG_2000:
        found = _size_of_j2k(pixels)
    else:
        found = _size_of_jpeg(pixels, pixels.find(_START_OF_JPEG) + 2)
    if found != size:
        raise UnusableDicom(
            f"{name}: its code stream claims {found[0]} x {found[1]} pixels, its header "
            f"{size[0]} x {size[1]}"
        )


def _size_of_j2k(pixels: bytes) -> tuple[int, int]:
    """Width and height in the size segment of a JPEG 2000 code stream; 0 x 0 if it has none."""
    place = pixels.find(_SIZE_OF_J2K)
    if place < 0:
        return 0, 0
    right, low, left, top = struct.unpack_from(">4I", pixels, place + 8)
    return right - left, low - top


def _size_of_jpeg(pixels: bytes, place: int) -> tuple[int, int]:
    """Width and height in the frame header of a JPEG or JPEG-LS code stream; 0 x 0 if it has none.

    Args:
        pixels: encapsulated.
        place: of the segment behind the start of the image.
    """
    while place + 9 <= len(pixels) and pixels[place] == 0xFF:
        kind, length = pixels[place + 1], struct.unpack_from(">H", pixels, place + 2)[0]
        if kind in _FRAMES_OF_JPEG:
            height, width = struct.unpack_from(">2H", pixels, place + 5)
            return width, height
        place += 2 + length
    return 0, 0

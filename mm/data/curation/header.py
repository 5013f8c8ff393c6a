"""What an image says about itself, its pixels unread."""

import io
import warnings
from typing import NamedTuple

from PIL import Image

from mm.data import decode
from mm.data.decode import BadSample


class Header(NamedTuple):
    """What an image says about itself before it is decoded. Width and height are as it is shown."""

    width: int
    height: int
    format: str
    mode: str
    depth: int
    """bits a channel"""
    turned: bool
    animated: bool


def header(data: bytes) -> Header:
    """The header of an image. BadSample where there is none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _header(data)
    except Exception as error:  # decoders raise nearly every kind on damaged data
        reason = str(error) if "BytesIO" not in str(error) else f"starts with {data[:8]!r}"
        raise BadSample(f"not an image that can be opened: {reason}"[:200]) from None


def _header(data: bytes) -> Header:
    opened = Image.open(io.BytesIO(data), formats=decode.FORMATS)
    orientation = opened.getexif().get(decode.ORIENTATION, 1) if "exif" in opened.info else 1
    width, height = opened.size if orientation not in range(5, 9) else opened.size[::-1]
    if not width or not height:
        raise BadSample("no pixels")
    is_photo = opened.format == "MPO"  # a JPEG with a second picture behind it
    return Header(
        width,
        height,
        "JPEG" if is_photo else opened.format or "unknown",
        opened.mode,
        _depth(opened, data),
        turned=orientation in range(2, 9),
        animated=not is_photo and bool(getattr(opened, "is_animated", False)),
    )


def _depth(opened: Image.Image, data: bytes) -> int:
    if opened.format == "PNG" and len(data) > 24:  # Pillow's mode tells nothing of 16-bit colours
        return data[24]
    if opened.mode == "1":
        return 1
    return 16 if opened.mode.startswith("I;16") else 32 if opened.mode in ("I", "F") else 8

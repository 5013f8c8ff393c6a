"""Bytes of a sample -> image and captions; bounded, and never by unpickling."""

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

if TYPE_CHECKING:
    from mm.data.shards import Sample

MAX_PIXELS = 2**26  # 67 megapixels, 200 MB decoded (Pillow needs up to six times that for a WebP meanwhile)
SCAN, MOST_SCANS = (
    b"\xff\xda",
    200,
)  # a progressive JPEG has about 10; each goes over all pixels, and takes few bytes
LONGEST_CAPTION = 10_000  # characters
LARGEST_TEXT = 2**22  # bytes of a .txt or .json member
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
ORIENTATION = 0x0112  # the EXIF tag
# the formats that Pillow may try: others (EPS) start programs. Its JPEG reader opens MPO too
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class BadSample(Exception):
    """A sample that cannot be used, permanently; its text is the reason."""

    @property
    def reason(self) -> str:
        """Why, in one line."""
        return str(self)


class EncodedImage:
    """An image of which only the header has been read: a JPEG is decoded when its pixels are asked for.

    Ordinary JPEGs go through simplejpeg, all others through Pillow; the pixels are equal.
    """

    size: tuple[int, int]
    """Height and width in pixels, the EXIF orientation applied."""

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS):
        """Raises BadSample: not an image, damaged, or of more than max_pixels pixels."""
        self._data, self._max_pixels = data, max_pixels
        self._decoded: NDArray[np.uint8] | None = None
        with _bad_sample(data):
            if data[:2] == b"\xff\xd8" and not _has_one_scan(data) and data.count(SCAN) > MOST_SCANS:
                raise BadSample(f"JPEG of more than {MOST_SCANS} scans")
            header = _jpeg_header(data)
            if header is None:
                self._decoded = _with_pillow(data, max_pixels)
                height, width, _ = self._decoded.shape
            else:
                height, width, self._orientation = header
                _check_pixels(width, height, max_pixels)
                if self._orientation >= 5:
                    height, width = width, height
        self.size = height, width

    def pixels(self, reduce: int = 1) -> Tensor:
        """Decode.

        Args:
            reduce: 1, 2, 4 or 8: a JPEG comes at that part of its size, rounded up, by an inverse DCT of fewer
                coefficients; where that cannot be done, and all else, comes whole.

        Returns:
            uint8 (3, H, W), or (4, H, W) when the image has an alpha channel (not premultiplied); interleaved
            in memory (channels last).

        Raises:
            BadSample: damaged.
        """
        decoded = self._decoded
        if decoded is None:
            with _bad_sample(self._data):
                try:
                    decoded = _turned(_with_simplejpeg(self._data, reduce), self._orientation)
                except ValueError:  # it stops at the least oddity; Pillow says what is damage
                    decoded = _with_pillow(self._data, self._max_pixels)
        return torch.from_numpy(decoded).permute(2, 0, 1)


def image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a JPEG, PNG, WebP, GIF (first frame), BMP or TIFF; the EXIF orientation is applied.

    Returns:
        uint8 (3, H, W), or (4, H, W) when the image has an alpha channel (not premultiplied); interleaved in
        memory (channels last).

    Raises:
        BadSample: not an image, damaged, or of more than max_pixels pixels (checked before decoding).
    """
    return EncodedImage(data, max_pixels).pixels()


@contextmanager
def _bad_sample(data: bytes) -> Iterator[None]:
    """Decoders raise nearly every kind of error on damaged data: all become BadSample."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        if "BytesIO" in first_line:  # Pillow names the object, not the problem
            first_line = f"starts with {data[:8]!r}"
        raise BadSample(f"not an image that can be decoded: {first_line}"[:200]) from None


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise BadSample(f"image of {width} x {height} pixels exceeds the limit of {most}")


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """Stored height and width and the orientation (1 to 8) of a JPEG; None where Pillow must decode."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colors in ("CMYK", "YCCK"):
        return None
    orientation = 1
    if _has_metadata(data):
        with _pillow(data) as opened:
            orientation = opened.getexif().get(ORIENTATION, 1)
    return height, width, orientation if orientation in range(1, 9) else 1


def _has_metadata(data: bytes) -> bool:
    """Whether a JPEG has EXIF or XMP data (APP1), or has an odd header that may hide some.

    Pillow's look at every header would take as long as a twentieth of the decoding.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1] != 0xE1:
        if data[at + 1] == 0xDA:  # the scan
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _has_one_scan(data: bytes) -> bool:
    """Whether a JPEG is an ordinary one, not progressive, with all its colours in its first scan: counting the scans
    of all would take as long as a tenth of the decoding."""
    at, colours = 2, 0
    while data[at : at + 1] == b"\xff" and len(data) > at + 9:
        if data[at + 1] in (0xC0, 0xC1):
            colours = data[at + 9]
        if data[at + 1] == 0xDA:
            return data[at + 4] == colours
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _with_simplejpeg(data: bytes, reduce: int) -> NDArray[np.uint8]:
    """(H, W, 3). ValueError where libjpeg has any remark, be it that some bytes are left over."""
    if reduce == 1:
        return simplejpeg.decode_jpeg(data)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    least = {"min_height": -(-height // reduce), "min_width": -(-width // reduce)}
    return simplejpeg.decode_jpeg(data, **least, min_factor=reduce)


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """(H, W, C) as the camera wrote it -> as it is to be seen."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


@contextmanager
def _pillow(data: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata
        yield Image.open(io.BytesIO(data), formats=FORMATS)


@contextmanager
def opened_image(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """What Pillow has opened, of no more than max_pixels pixels; what it raises in the body becomes BadSample too."""
    with _bad_sample(data):
        if data[8:16] == b"WEBPVP8X":  # Pillow allocates the canvas before it tells its size
            width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
            _check_pixels(width, height, max_pixels)
        with _pillow(data) as opened:
            _check_pixels(*opened.size, max_pixels)
            yield opened


def _with_pillow(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """(H, W, 3), or (H, W, 4) with alpha."""
    with opened_image(data, max_pixels) as opened:
        ImageOps.exif_transpose(opened, in_place=True)
        if opened.mode.startswith("I") or opened.mode == "F":
            grey, unit = np.asarray(opened), 257 if opened.mode.startswith("I;16") else 1
            pixels = np.empty((*grey.shape, 3), dtype=np.uint8)
            for top in range(0, len(grey), 64):  # of all rows at once the floats take 1 GB at the limit
                rows = grey[top : top + 64].astype(np.float64) / unit
                pixels[top : top + 64] = np.clip(np.rint(rows), 0, 255).astype(np.uint8)[:, :, None]
            return pixels
        if opened.mode == "CMYK" and opened.format in ("JPEG", "MPO") and "adobe" not in opened.info:
            opened = ImageChops.invert(opened)  # only Adobe's files hold ink upside down; Pillow turns all
        return np.array(opened.convert("RGBA" if opened.has_transparency_data else "RGB"))


def image_member(sample: "Sample") -> bytes:
    """The member that is the image, by its extension. BadSample when there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise BadSample(f"no image among its members ({', '.join(sorted(sample.members))})")


def captions(sample: "Sample") -> list[str]:
    """Captions of a sample: the lines of `.txt`, or `caption` (text) or `captions` (list of text) of `.json`.

    Raises:
        BadSample: there is none, or one that is empty, of over 10,000 characters or not UTF-8, or their
            member has more than 4 MB.
    """
    try:
        found = _captions(sample.members)
        "".join(found).encode()  # JSON can write half a character that no UTF-8 can
    except UnicodeError:
        raise BadSample("caption is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadSample("json cannot be read") from None
    if not found:
        raise BadSample("empty caption")
    if max(map(len, found)) > LONGEST_CAPTION:
        raise BadSample(f"caption of more than {LONGEST_CAPTION} characters")
    return found


def _captions(members: dict[str, bytes]) -> list[str]:
    if "txt" in members:
        lines = _text(members, "txt").decode("utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()]
    if "json" not in members:
        raise BadSample(f"no caption among its members ({', '.join(sorted(members))})")
    value = json.loads(_text(members, "json"))
    found = value.get("captions", value.get("caption")) if isinstance(value, dict) else None
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found):
        raise BadSample("json holds no text under 'caption' or 'captions'")
    return [caption.strip() for caption in found if caption.strip()]


def _text(members: dict[str, bytes], extension: str) -> bytes:
    text = members[extension]
    if len(text) > LARGEST_TEXT:
        raise BadSample(f"{extension} of {len(text)} bytes exceeds the limit of {LARGEST_TEXT}")
    return text

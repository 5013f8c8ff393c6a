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

MAX_PIXELS = 2**26  # 67 megapixels, 200 MB decoded
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
        self._data = data
        with _bad_sample(data):
            self._opened = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = self._opened.size
            if width * height > max_pixels:
                raise BadSample(f"image of {width} x {height} pixels exceeds the limit of {max_pixels}")
            self._decoded = None if self._is_plain_jpeg() else _with_pillow(self._opened)
            self._orientation = _orientation(self._opened)
        if self._decoded is not None:
            height, width, _ = self._decoded.shape
        elif self._orientation >= 5:
            height, width = width, height
        self.size = height, width

    def pixels(self, reduce: int = 1) -> Tensor:
        """Decode.

        Args:
            reduce: 1, 2, 4 or 8: a JPEG may come at that part of its size, rounded up, by an inverse DCT of
                fewer coefficients; what else comes whole.

        Returns:
            uint8 (3, H, W), or (4, H, W) when the image has an alpha channel (not premultiplied); interleaved
            in memory (channels last).

        Raises:
            BadSample: damaged.
        """
        with _bad_sample(self._data):
            if self._decoded is None:
                try:
                    decoded = _turned(_with_simplejpeg(self._data, reduce), self._orientation)
                except ValueError:  # it stops at the least oddity; Pillow says what is damage
                    decoded = _with_pillow(self._opened)
            else:
                decoded = self._decoded
        return torch.from_numpy(decoded).permute(2, 0, 1)

    def _is_plain_jpeg(self) -> bool:
        if self._opened.format not in ("JPEG", "MPO") or self._opened.mode not in ("RGB", "L"):
            return False
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(self._data)
        except ValueError:
            return False
        return (width, height) == self._opened.size  # it is this size that was held against the limit


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            yield
    except BadSample:
        raise
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        if "BytesIO" in first_line:  # Pillow names the object, not the problem
            first_line = f"starts with {data[:8]!r}"
        raise BadSample(f"not an image that can be decoded: {first_line}"[:200]) from None


def _with_simplejpeg(data: bytes, reduce: int) -> NDArray[np.uint8]:
    """(H, W, 3). ValueError where libjpeg has any remark, be it that some bytes are left over."""
    if reduce == 1:
        return simplejpeg.decode_jpeg(data)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    least = {"min_height": -(-height // reduce), "min_width": -(-width // reduce)}
    return simplejpeg.decode_jpeg(data, **least, min_factor=reduce)


def _orientation(opened: Image.Image) -> int:
    """1 to 8, as EXIF counts them."""
    if "exif" not in opened.info and "xmp" not in opened.info:
        return 1
    found = opened.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """(H, W, C) as the camera wrote it -> as it is to be seen."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _with_pillow(opened: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3), or (H, W, 4) with alpha."""
    opened = ImageOps.exif_transpose(opened)
    if opened.mode.startswith("I") or opened.mode == "F":
        grey = np.asarray(opened).astype(np.float64) / (257 if opened.mode.startswith("I;16") else 1)
        grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if opened.mode == "CMYK" and opened.format in ("JPEG", "MPO") and "adobe" not in opened.info:
        opened = ImageChops.invert(
            opened
        )  # only Adobe's programs write ink upside down; Pillow expects it of all
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
        BadSample: there is none, or an empty one, one of over 10,000 characters, or one that is not UTF-8, or
            its member has more than 4 MB.
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
        return [
            line.strip() for line in _text(members, "txt").decode("utf-8-sig").splitlines() if line.strip()
        ]
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

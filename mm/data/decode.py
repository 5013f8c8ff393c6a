"""Bytes of a sample -> image and captions; bounded, and never by unpickling."""

import io
import json
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

if TYPE_CHECKING:
    from mm.data.shards import Sample

MAX_PIXELS = 2**26  # 67 megapixels, 200 MB decoded
LONGEST_CAPTION = 10_000  # characters
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


def image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a JPEG, PNG, WebP, GIF (first frame), BMP or TIFF.

    Ordinary JPEGs go through torchvision, all others through Pillow. The EXIF orientation is applied.

    Returns:
        uint8 (3, H, W), or (4, H, W) when the image has an alpha channel (not premultiplied).

    Raises:
        BadSample: not an image, damaged, or of more than max_pixels pixels (checked before decoding).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = opened.size
            if width * height > max_pixels:
                raise BadSample(f"image of {width} x {height} pixels exceeds the limit of {max_pixels}")
            decoded = _jpeg(data, opened)
            return _with_pillow(opened) if decoded is None else decoded
    except BadSample:
        raise
    except Exception as error:  # decoders raise nearly every kind on damaged data
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        if "BytesIO" in first_line:  # Pillow names the object, not the problem
            first_line = f"starts with {data[:8]!r}"
        raise BadSample(f"not an image that can be decoded: {first_line}"[:200]) from None


def _jpeg(data: bytes, opened: Image.Image) -> Tensor | None:
    """The decoded image, or None where Pillow must: CMYK, turned by EXIF, not a JPEG.

    Only JPEG goes through torchvision: its PNG decoder crashes the process on some damaged files.
    """
    if opened.format not in ("JPEG", "MPO") or opened.mode not in ("RGB", "L"):
        return None
    if "exif" in opened.info and opened.getexif().get(ORIENTATION, 1) != 1:
        return None
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def _with_pillow(opened: Image.Image) -> Tensor:
    opened = ImageOps.exif_transpose(opened)
    if opened.mode.startswith("I") or opened.mode == "F":
        grey = np.asarray(opened).astype(np.float64) / (257 if opened.mode.startswith("I;16") else 1)
        grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
        return torch.from_numpy(grey)[None].repeat(3, 1, 1)
    has_alpha = opened.has_transparency_data
    pixels = np.array(opened.convert("RGBA" if has_alpha else "RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_member(sample: "Sample") -> bytes:
    """The member that is the image, by its extension. BadSample when there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise BadSample(f"no image among its members ({', '.join(sorted(sample.members))})")


def captions(sample: "Sample") -> list[str]:
    """Captions of a sample: the lines of `.txt`, or `caption` (text) or `captions` (list of text) of `.json`.

    Raises:
        BadSample: there is none, or an empty one, one of over 10,000 characters, or one that is not UTF-8.
    """
    try:
        found = _captions(sample.members)
    except UnicodeDecodeError:
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
        return [line.strip() for line in members["txt"].decode().splitlines() if line.strip()]
    if "json" not in members:
        raise BadSample(f"no caption among its members ({', '.join(sorted(members))})")
    value = json.loads(members["json"])
    found = value.get("captions", value.get("caption")) if isinstance(value, dict) else None
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found):
        raise BadSample("json holds no text under 'caption' or 'captions'")
    return [caption.strip() for caption in found if caption.strip()]

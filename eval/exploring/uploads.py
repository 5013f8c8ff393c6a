"""What is read of a file and of a text that somebody gives; all of it may be hostile.

Every function raises UserError with the reason for what it does not take.
"""

import io

from PIL import Image
from torch import Tensor

from mm.data import decode
from mm.data.video import open_video
from mm.errors import UserError

IMAGES = [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
CLIPS = [".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".webp"]
MAX_PIXELS = 2**25  # 33 megapixels: larger ones come from no camera that this is for
ANIMATED = ("GIF", "PNG", "WEBP")
LONGEST_TEXT = 1000  # characters
MOST_LABELS = 200
MOST_TEMPLATES = 20


def image(data: bytes | None) -> Tensor:
    """uint8 (3|4, H, W) of an image of one frame."""
    data = _given(data, "image")
    try:
        with decode.opened_image(data, MAX_PIXELS) as opened:
            if opened.format in ANIMATED and getattr(opened, "is_animated", False):
                raise UserError(
                    f"this {opened.format} is an animation: give one frame as an image, or the whole in the tab Clips"
                )
        return decode.image(data, MAX_PIXELS)
    except decode.BadSample as error:
        raise UserError(f"{_kind(data)}this cannot be used as an image: {error.reason}") from None


def clip(data: bytes | None) -> bytes:
    """The bytes of a video that can be opened."""
    data = _given(data, "clip")
    try:
        open_video(data, MAX_PIXELS)
    except decode.BadSample as error:
        raise UserError(f"this cannot be used as a clip: {error.reason}") from None
    return data


def _given(data: bytes | None, what: str) -> bytes:
    if not data:
        raise UserError(
            f"there is no {what} yet: choose a file, or drop one" if data is None else "the file is empty"
        )
    return data


def text(given: str | None, what: str) -> str:
    """A text of some words. what: its name in a message."""
    found = " ".join((given or "").split())
    if not found:
        raise UserError(f"the {what} is empty: write some words")
    if len(found) > LONGEST_TEXT:
        raise UserError(f"the {what} has {len(found):,} characters; at most {LONGEST_TEXT:,} are read")
    if any("\ud800" <= letter <= "\udfff" for letter in found) or "\0" in found:
        raise UserError(f"the {what} holds half a character, or none (NUL): write it again")
    return found


def labels(given: str | None) -> list[str]:
    """Labels, one a line or separated by commas; each once."""
    return _several(given, "label", MOST_LABELS, commas=True)


def templates(given: str | None) -> list[str]:
    """Templates, one a line, each with a {} where the label goes; the label alone where there are none."""
    if not (given or "").strip():
        return ["{}"]
    found = _several(given, "template", MOST_TEMPLATES, commas=False)
    for one in found:
        if "{}" not in one and "{c}" not in one:
            raise UserError(f"template {one!r} has no place for the label; write {{}} where it goes")
    return found


def _several(given: str | None, what: str, most: int, commas: bool) -> list[str]:
    if len(given or "") > most * LONGEST_TEXT:
        raise UserError(
            f"the {what}s have {len(given or ''):,} characters; at most {most * LONGEST_TEXT:,} are read"
        )
    lines = (given or "").replace(",", "\n").splitlines() if commas else (given or "").splitlines()
    found = list(dict.fromkeys(text(line, what) for line in lines if line.strip()))
    if not found:
        raise UserError(f"there is no {what} yet: write some, one a line")
    if len(found) > most:
        raise UserError(f"there are {len(found)} {what}s; at most {most} are read")
    return found


def picture(pixels: Tensor, side: int) -> bytes:
    """A JPEG, made anew, of pixels uint8 (3|4, H, W), no side longer than `side`."""
    made = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    made.thumbnail((side, side))
    if made.mode == "RGBA":
        ground = Image.new("RGBA", made.size, "white")
        made = Image.alpha_composite(ground, made).convert("RGB")
    written = io.BytesIO()
    made.save(written, "JPEG", quality=85)
    return written.getvalue()


def _kind(data: bytes) -> str:
    """What a file that is no image seems to be."""
    start = data[:512].lstrip().lower()
    if start.startswith((b"<svg", b"<?xml")) and b"svg" in data[:2048].lower():
        return "SVG is a program that draws, and is not run: save it as PNG; "
    if data[4:8] == b"ftyp" or (data[:4] in (b"\x1aE\xdf\xa3", b"RIFF") and data[8:12] != b"WEBP"):
        return "this seems to be a video, which the tab Clips reads; "
    return ""

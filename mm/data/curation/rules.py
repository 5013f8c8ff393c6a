"""What a caption and an image must be like to stay: rules that look at one sample alone."""

import io
import re
import unicodedata
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from mm.config import Config
from mm.data.curation.wording import faults, readable, script_of, words
from mm.data.decode import FORMATS
from mm.data.transforms import WHITE, composite

_ADDRESS = re.compile(
    r"(?:https?|ftp)://|\bwww\.\w|\b[\w-]{2,40}\.(?:com|org|net|info|biz|de|fr|co\.uk|ru|io)\b(?!\.\w)"
    r"|[\w.+-]{1,64}@[\w-]{1,64}\.\w{2,}",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"</?[a-z!][^<>]{0,200}>|&(?:[a-z]{2,8}|#x?[0-9a-f]+);|\{\{|\[/?[a-z]+\]", re.IGNORECASE)
_FILE = re.compile(
    r"[\w-]{1,64}\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|pdf|mp4|psd|html?)\b|\b(?:IMG|DSCN?|DSCF|DCIM|PICT)[-_]?\d{2,}",
    re.IGNORECASE,
)
Format = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff"]


class Fault(NamedTuple):
    """Why a sample goes: the key of the rule in the config, and what was found."""

    rule: str
    detail: str


class CaptionRules(Config):
    """What a caption must be like. Letters, digits and words are counted as `mm data stats` counts them."""

    min_characters: int | None = Field(None, ge=1)
    """Shortest caption, in characters."""
    max_characters: int | None = Field(None, ge=1)
    """Longest caption, in characters."""
    min_words: int | None = Field(None, ge=1)
    """Fewest words."""
    max_words: int | None = Field(None, ge=1)
    """Most words."""
    valid_text: bool = False
    """Drop captions with control characters or the traces of a wrong encoding."""
    script: str = "Latin"
    """Writing that script_share asks for: Latin, Cyrillic, Greek, Arabic, Han, Kana, Hangul, Devanagari, ..."""
    script_share: float | None = Field(None, ge=0, le=1)
    """Least share of the letters in that script; a caption without letters has none."""
    no_addresses: bool = False
    """Drop captions with addresses of pages or of mail."""
    no_markup: bool = False
    """Drop captions with HTML, entities, templates or [tags]."""
    no_file_names: bool = False
    """Drop captions with names of files, such as cat.jpg or IMG_0042."""
    keep: str | None = None
    """Regular expression that must be found in a caption (Python's; (?i) at its start ignores case)."""
    drop: str | None = None
    """Regular expression that must not be found in a caption."""
    max_run: int | None = Field(None, ge=1)
    """Longest run of one word: 2 drops `cat cat cat`."""
    min_distinct: float | None = Field(None, ge=0, le=1)
    """Least share of different words among the words."""
    max_repeats: int | None = Field(None, ge=1)
    """Samples that may have one and the same caption, but for case and blanks; the first ones stay."""
    all_captions: bool = True
    """Every caption of a sample must pass; false: one is enough."""

    @field_validator("keep", "drop")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @field_validator("script")
    @classmethod
    def _names_a_script(cls, name: str) -> str:
        if not name.isalpha():
            raise ValueError("expected the name of one script, such as Latin")
        return name.capitalize()


class ImageRules(Config):
    """What an image must be like."""

    min_side: int | None = Field(None, ge=1)
    """Least pixels of the shorter side."""
    max_aspect: float | None = Field(None, ge=1)
    """Most that the longer side may be, in shorter sides."""
    min_pixels: int | None = Field(None, ge=1)
    """Fewest pixels, width x height."""
    max_pixels: int | None = Field(None, ge=1)
    """Most pixels, width x height."""
    min_bytes_per_pixel: float | None = Field(None, gt=0)
    """Least bytes of the file a pixel: below 0.02 is a JPEG of next to nothing."""
    min_deviation: float | None = Field(None, gt=0)
    """Least standard deviation of the grey values, of 255, on white: below about 2 is a blank image."""
    min_entropy: float | None = Field(None, gt=0, le=8)
    """Least entropy of the grey values in bits, of 8: one colour has 0, a drawing in two about 1."""
    formats: list[Format] | None = None
    """Formats that stay, by the content of the file; null: all that can be read."""


def captions_fault(captions: list[str], rules: CaptionRules) -> tuple[str, Fault] | None:
    """Which caption of a sample does not pass, and why; None where they pass."""
    found = []
    for caption in captions:
        fault = caption_fault(caption, rules)
        if fault is not None:
            found.append((caption, fault))
        elif not rules.all_captions:
            return None
    return found[0] if found else None


def caption_fault(caption: str, rules: CaptionRules) -> Fault | None:
    """The first rule that a caption breaks, None where it breaks none."""
    said = words(caption)
    limits = (
        ("characters", len(caption), rules.min_characters, rules.max_characters),
        ("words", len(said), rules.min_words, rules.max_words),
    )
    for what, count, least, most in limits:
        if least is not None and count < least:
            return Fault(f"caption.min_{what}", f"{count} {what}")
        if most is not None and count > most:
            return Fault(f"caption.max_{what}", f"{count} {what}")
    if rules.valid_text and (wrong := _encoding_fault(caption)):
        return Fault("caption.valid_text", wrong)
    if rules.script_share is not None:
        share = script_share(caption, rules.script)
        if share < rules.script_share:
            return Fault("caption.script_share", f"{share:.2f} {rules.script}")
    patterns = (("addresses", _ADDRESS), ("markup", _MARKUP), ("file_names", _FILE))
    for name, pattern in patterns:
        if getattr(rules, f"no_{name}") and (match := pattern.search(caption)):
            return Fault(f"caption.no_{name}", readable(match.group(), 60))
    if rules.keep is not None and not re.search(rules.keep, caption):
        return Fault("caption.keep", f"no {rules.keep}")
    if rules.drop is not None and (match := re.search(rules.drop, caption)):
        return Fault("caption.drop", readable(match.group(), 60))
    if rules.max_run is not None:
        run, word = max(((len(list(same)), word) for word, same in groupby(said)), default=(0, ""))
        if run > rules.max_run:
            return Fault("caption.max_run", f"{readable(word, 30)} {run} times in a row")
    if rules.min_distinct is not None and said:
        share = len(set(said)) / len(said)
        if share < rules.min_distinct:
            return Fault("caption.min_distinct", f"{share:.2f} of {len(said)} words")
    return None


def _encoding_fault(caption: str) -> str | None:
    wrong = {"broken encoding", "control characters"}.intersection(faults(caption))
    if not wrong and any(unicodedata.category(c) in ("Cn", "Co", "Cs") for c in caption):
        return "characters that are not assigned"
    return min(wrong, default=None)


def script_share(caption: str, script: str) -> float:
    """Share of the letters that belong to a script; 0 without letters."""
    letters = [c for c in caption if c.isalpha()]
    return sum(script_of(c) == script for c in letters) / len(letters) if letters else 0.0


def format_of(data: bytes) -> str:
    """Format of an image that can be decoded, by its content, in lower case."""
    name = str(Image.open(io.BytesIO(data), formats=FORMATS).format).lower()
    return "jpeg" if name == "mpo" else name


def image_fault(data: bytes, image: Tensor, rules: ImageRules) -> Fault | None:
    """The first rule that an image breaks, None where it breaks none.

    Args:
        data: the file.
        image: uint8 (3|4, H, W), decoded from it.
    """
    height, width = image.shape[-2:]
    pixels, short, long = width * height, min(width, height), max(width, height)
    size = f"{width} x {height}"
    if rules.formats is not None and (kind := format_of(data)) not in rules.formats:
        return Fault("image.formats", kind)
    if rules.min_side is not None and short < rules.min_side:
        return Fault("image.min_side", size)
    if rules.max_aspect is not None and long > rules.max_aspect * short:
        return Fault("image.max_aspect", size)
    if rules.min_pixels is not None and pixels < rules.min_pixels:
        return Fault("image.min_pixels", size)
    if rules.max_pixels is not None and pixels > rules.max_pixels:
        return Fault("image.max_pixels", size)
    if rules.min_bytes_per_pixel is not None and len(data) < rules.min_bytes_per_pixel * pixels:
        return Fault("image.min_bytes_per_pixel", f"{len(data):,} bytes of {size}")
    if rules.min_deviation is not None or rules.min_entropy is not None:
        deviation, entropy = spread(image)
        if rules.min_deviation is not None and deviation < rules.min_deviation:
            return Fault("image.min_deviation", f"{deviation:.2f} of 255")
        if rules.min_entropy is not None and entropy < rules.min_entropy:
            return Fault("image.min_entropy", f"{entropy:.2f} bits")
    return None


def spread(image: Tensor) -> tuple[float, float]:
    """Standard deviation (of 255) and entropy (bits) of the grey values of an image on white."""
    colours = composite(image, WHITE).permute(1, 2, 0).contiguous().numpy()
    share = np.asarray(Image.fromarray(colours).convert("L").histogram(), dtype=np.float64)
    share /= share.sum()
    grey = np.arange(256)
    mean = float(share @ grey)
    deviation = float(share @ (grey - mean) ** 2) ** 0.5
    there = share[share > 0]
    return deviation, float(-(there * np.log2(there)).sum())


def repeats(texts: NDArray[np.uint64], most: int) -> NDArray[np.bool_]:
    """(N,) hashes of captions -> which come after `most` equal ones."""
    order = np.argsort(texts, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(texts[order]).astype(bool)])
    rank = np.arange(len(texts)) - np.repeat(starts, np.diff(np.r_[starts, len(texts)]))
    surplus = np.zeros(len(texts), dtype=bool)
    surplus[order[rank >= most]] = True
    return surplus

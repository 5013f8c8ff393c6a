"""What is wrong with the samples of a shard, and the hashes by which copies of them are found."""

import base64
import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from mm.data.curation.duplicates import IMAGES, WORDS
from mm.data.curation.sweep import Shard, Visited
from mm.data.decode import FORMATS, MAX_PIXELS, BadSample, EncodedImage, captions, image_member
from mm.data.index import FORMAT, index_path, index_text
from mm.data.remote import is_remote
from mm.data.shards import Sample
from mm.errors import UserError

VERSION = 1  # of what a visit finds
DAMAGE = (
    "broken shard",  # no sample of it can be read
    "unreadable shard",  # reading failed, which may pass
    "damaged tar",  # its structure, while an index still finds samples
    "wrong index",  # NAME.idx is not of this tar
    "wrong sizes",  # sizes.json does not say what is there
    "damaged sample",  # its members cannot be read
    "no image",
    "damaged image",
    "no caption",
    "empty caption",
    "damaged caption",
)
REMARKS = (  # worth knowing, but no damage
    "odd image",  # it decodes, but the decoder objects: flipped bits, or an odd program wrote it
    "repeated key",  # that of an earlier sample in the same shard
    "duplicate image",  # that of an earlier sample with other captions, byte for byte
    "duplicate pair",  # image and captions of an earlier sample
)


def visit(samples: Iterable[Visited], shard: Shard, decode: bool) -> Iterator[dict[str, Any]]:
    """A record `kind, key, detail` of each finding, then one of figures (`sums`).

    Figures: the number of samples, bytes and captioned samples; keys; rows of IMAGES, and of WORDS for captions
    and keys, `id` being the place in the shard, in base64. About 60 bytes a sample.
    """
    if shard.broken:
        yield {
            "kind": "unreadable shard" if shard.may_pass else "broken shard",
            "key": "",
            "detail": shard.broken,
        }
    else:
        yield from _index_faults(shard.path)
    keys: dict[str, int] = {}
    names: list[str] = []
    images: list[tuple[int, int, int, int]] = []
    texts: list[tuple[int, int]] = []
    sizes = captioned = 0
    for each in samples:
        names.append(each.key)
        if each.sample is None:
            yield {"kind": "damaged sample", "key": each.key, "detail": each.problem}
            continue
        if keys.setdefault(each.key, each.index) != each.index:
            detail = f"also sample {keys[each.key]}; this is sample {each.index}"
            yield {"kind": "repeated key", "key": each.key, "detail": detail}
        sizes += sum(map(len, each.sample.members.values()))
        words, fault = _captions(each.sample)
        if fault:
            yield {"kind": fault[0], "key": each.key, "detail": fault[1]}
        captioned += bool(words)
        texts += ((hash_of(text.encode()), each.index) for text in words)
        is_whole = True
        for kind, detail in _image_faults(each.sample, decode):
            yield {"kind": kind, "key": each.key, "detail": detail}
            is_whole &= kind in REMARKS
        if is_whole:
            digest = hashlib.sha256(image_member(each.sample)).digest()
            first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
            images.append((first, second, hash_of("\n".join(words).encode()) if words else 0, each.index))
    yield {
        "is_open": shard.broken is None,
        "lacks_index": not (shard.broken or is_remote(shard.path) or _has_index(shard.path)),
        "bytes": sizes,
        "captioned": captioned,
        "names": names,
        "images": base64.b64encode(np.array(images, IMAGES).tobytes()).decode(),
        "texts": base64.b64encode(np.array(texts, WORDS).tobytes()).decode(),
        "keys": base64.b64encode(
            np.array(
                [(hash_of(os.fsencode(name)), i) for i, name in enumerate(names) if name], WORDS
            ).tobytes()
        ).decode(),
    }


def hash_of(data: bytes) -> int:
    """64 bits; among 10^8 texts two have the same by chance once in 3,700 data sets."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _captions(sample: Sample) -> tuple[list[str], tuple[str, str] | None]:
    try:
        return captions(sample), None
    except BadSample as error:
        detail = str(error)
    if not {"txt", "json"} & sample.members.keys() or detail.startswith("json holds no text"):
        return [], ("no caption", detail)
    return [], ("empty caption" if detail == "empty caption" else "damaged caption", detail)


def _image_faults(sample: Sample, decode: bool) -> Iterator[tuple[str, str]]:
    try:
        data = image_member(sample)
    except BadSample as error:
        yield "no image", str(error)
        return
    try:
        if decode:
            oddity = _decode(data)
        else:
            oddity = None
            _look(data)
    except BadSample as error:
        yield "damaged image", str(error)
        return
    if oddity:
        yield "odd image", oddity


def _decode(data: bytes) -> str | None:
    """What the decoder objects to. BadSample where it cannot decode at all.

    A JPEG is decoded at an eighth of its size: all its bits are read, and the rest of the work is spared.
    """
    encoded = EncodedImage(data)
    if data[:2] == b"\xff\xd8":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if height * width <= MAX_PIXELS and space in ("YCbCr", "Gray", "RGB"):
                simplejpeg.decode_jpeg(data, min_height=1, min_width=1, fastdct=True, fastupsample=True)
                return None
        except ValueError as error:
            encoded.pixels(8)
            return str(error)
    encoded.pixels()
    return None


def _look(data: bytes) -> None:
    """BadSample where the header of an image says that it is none, or is too large."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        width, height = _size(data)
    if width * height > MAX_PIXELS:
        raise BadSample(f"image of {width} x {height} pixels exceeds the limit of {MAX_PIXELS}")


def _size(data: bytes) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS).size
    except Exception:  # parsers raise nearly every kind
        raise BadSample(f"not an image: starts with {data[:8]!r}") from None


def _has_index(path: str) -> bool:
    if is_remote(path) or not Path(index_path(path)).is_file():
        return False
    with open(index_path(path), "rb") as file:
        return FORMAT.encode() in file.read(256)


def _index_faults(path: str) -> Iterator[dict[str, Any]]:
    """Holds the tar against the index beside it; where there is none, opening the shard has read the tar."""
    if not _has_index(path):
        return
    try:
        text = index_text(path)
    except UserError as error:
        yield {"kind": "damaged tar", "key": "", "detail": str(error)}
        return
    if Path(index_path(path)).read_bytes() != text:
        detail = f"{os.path.basename(index_path(path))} does not say where its samples lie; run: mm data index {path}"
        yield {"kind": "wrong index", "key": "", "detail": detail}

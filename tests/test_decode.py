import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mm.data.decode import BadSample, captions, image, image_member
from mm.data.shards import Sample

RNG = np.random.default_rng(0)
SMOOTH = np.array(Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60)))


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes, mode: str = "RGB") -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert(mode))).permute(2, 0, 1)


RGB = Image.fromarray(SMOOTH)
RGBA = RGB.copy()
RGBA.putalpha(RGB.convert("L"))
PALETTE = RGB.quantize(16)
ANIMATION = encode(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)], lossless=True)


@pytest.mark.parametrize(
    ("data", "mode", "tolerance"),
    [
        pytest.param(encode(RGB, "JPEG"), "RGB", 3, id="jpeg"),
        pytest.param(encode(RGB.convert("L"), "JPEG"), "RGB", 3, id="grey jpeg"),
        pytest.param(encode(RGB.convert("CMYK"), "JPEG"), "RGB", 0, id="cmyk jpeg"),
        pytest.param(encode(RGB, "PNG"), "RGB", 0, id="png"),
        pytest.param(encode(RGB.convert("L"), "PNG"), "RGB", 0, id="grey png"),
        pytest.param(encode(RGB.convert("1"), "PNG"), "RGB", 0, id="1-bit png"),
        pytest.param(encode(RGBA, "PNG"), "RGBA", 0, id="rgba png"),
        pytest.param(encode(RGBA.convert("LA"), "PNG"), "RGBA", 0, id="grey alpha png"),
        pytest.param(encode(PALETTE, "PNG"), "RGB", 0, id="palette png"),
        pytest.param(encode(PALETTE, "PNG", transparency=3), "RGBA", 0, id="transparent palette png"),
        pytest.param(encode(RGB, "PNG", transparency=(1, 2, 3)), "RGBA", 0, id="transparent colour png"),
        pytest.param(encode(RGB, "WEBP", lossless=True), "RGB", 0, id="webp"),
        pytest.param(encode(RGBA, "WEBP", lossless=True), "RGBA", 0, id="rgba webp"),
        pytest.param(encode(PALETTE, "GIF", save_all=True, append_images=[RGB]), "RGB", 0, id="animated gif"),
        pytest.param(ANIMATION, "RGB", 0, id="animated webp"),
        pytest.param(encode(RGB, "BMP"), "RGB", 0, id="bmp"),
        pytest.param(encode(RGB, "TIFF"), "RGB", 0, id="tiff"),
    ],
)  # fmt: skip
def test_kinds_of_image(data: bytes, mode: str, tolerance: int) -> None:
    got = image(data)
    assert got.dtype == torch.uint8 and got.shape == (len(mode), 60, 80)
    assert (got.int() - pixels(data, mode).int()).abs().max() <= tolerance


def test_sixteen_bits_keep_their_range() -> None:
    grey = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    got = image(encode(Image.fromarray(grey), "PNG"))
    assert got.shape == (3, 60, 80)
    assert np.abs(got.numpy()[1].astype(int) - np.rint(grey / 257).astype(int)).max() <= 1


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    for kind in ("JPEG", "PNG"):
        got = image(encode(RGB, kind, exif=exif))
        assert got.shape == (3, 80, 60)
        turned = torch.from_numpy(np.rot90(SMOOTH, -1).copy()).permute(2, 0, 1)
        assert (got.int() - turned.int()).abs().max() < 40


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + encode(RGB, "PNG")[33:]


@pytest.mark.parametrize("data", [bomb(50_000, 50_000), bomb(11_000, 10_000), bomb(200_000, 1_000)])
def test_bombs_are_refused_by_their_header(data: bytes) -> None:
    with pytest.raises(BadSample, match=r"pixels"):
        image(data)


def test_the_limit_can_be_set() -> None:
    data = encode(RGB, "PNG")
    assert image(data, max_pixels=4800).shape == (3, 60, 80)
    with pytest.raises(BadSample, match="80 x 60 pixels exceeds the limit of 4799$"):
        image(data, max_pixels=4799)


JPEG, PNG = encode(RGB, "JPEG", quality=95), encode(RGB, "PNG")


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\x00" * 1000, JPEG[: len(JPEG) // 2], JPEG[:30], PNG[: len(PNG) // 2], PNG[:20],
     encode(RGB, "WEBP")[:100], encode(RGB, "GIF")[:60], b"<svg xmlns='http://www.w3.org/2000/svg'/>",
     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"\x80\x04\x95pickle"],
)  # fmt: skip
def test_what_is_no_image_is_a_bad_sample(data: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        image(data)
    assert caught.value.reason and "\n" not in caught.value.reason and "0x" not in caught.value.reason


def test_a_text_is_said_to_be_none_and_a_camera_s_double_jpeg_is_read() -> None:
    with pytest.raises(BadSample, match="starts with b'hello'"):
        image(b"hello")
    assert image(encode(RGB, "MPO", save_all=True, append_images=[RGB])).shape[0] == 3


def test_flipped_bytes_decode_or_are_bad() -> None:
    for data in (JPEG, PNG, encode(RGBA, "WEBP"), encode(PALETTE, "GIF")):
        for _ in range(60):
            damaged = bytearray(data)
            for position in RNG.integers(0, len(data), 3):
                damaged[position] ^= int(RNG.integers(1, 256))
            try:
                got = image(bytes(damaged))
            except BadSample:
                continue
            assert got.dtype == torch.uint8 and got.shape[0] in (3, 4)


def sample(**members: bytes) -> Sample:
    return Sample("a", "s.tar", members)


def test_captions() -> None:
    assert captions(sample(txt=b"a cat\n")) == ["a cat"]
    assert captions(sample(txt="one\n\n zwei ü \r\nthree".encode())) == ["one", "zwei ü", "three"]
    assert captions(sample(json=json.dumps({"caption": "a cat", "url": 1}).encode())) == ["a cat"]
    assert captions(sample(json=json.dumps({"captions": ["a", "b"]}).encode())) == ["a", "b"]
    assert captions(sample(txt=b"text", json=b"{}")) == ["text"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b""}, "empty caption"),
        ({"txt": b" \n\t "}, "empty caption"),
        ({"txt": b"\xff\xfe\x00"}, "not UTF-8"),
        ({"txt": b"x" * 1_000_000}, "more than 10000 characters"),
        ({"jpg": b""}, r"no caption among its members \(jpg\)"),
        ({"json": b"{"}, "json cannot be read"),
        ({"json": b"[" * 100_000}, "json cannot be read"),
        ({"json": b"[1, 2]"}, "holds no text"),
        ({"json": b'{"caption": 3}'}, "holds no text"),
        ({"json": b'{"captions": [null]}'}, "holds no text"),
        ({"json": b'{"captions": []}'}, "empty caption"),
    ],
)
def test_bad_captions(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        captions(sample(**members))


def test_the_image_is_found_by_its_extension() -> None:
    assert image_member(sample(txt=b"t", png=b"p")) == b"p"
    with pytest.raises(BadSample, match="no image"):
        image_member(sample(txt=b"t"))

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mm.data.decode import BadSample, EncodedImage, captions, image, image_member
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
        pytest.param(encode(RGB, "JPEG"), "RGB", 0, id="jpeg"),
        pytest.param(encode(RGB.convert("L"), "JPEG"), "RGB", 0, id="grey jpeg"),
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
        pytest.param(encode(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]), "RGB", 0, id="apng"),
        pytest.param(encode(RGB.convert("L"), "TIFF"), "RGB", 0, id="grey tiff"),
        pytest.param(encode(RGB.convert("1"), "TIFF"), "RGB", 0, id="1-bit tiff"),
        pytest.param(encode(RGB.convert("1"), "BMP"), "RGB", 0, id="1-bit bmp"),
        pytest.param(encode(PALETTE, "GIF", transparency=3), "RGBA", 0, id="transparent gif"),
        pytest.param(encode(RGB, "BMP"), "RGB", 0, id="bmp"),
        pytest.param(encode(RGB, "TIFF"), "RGB", 0, id="tiff"),
    ],
)  # fmt: skip
def test_kinds_of_image(data: bytes, mode: str, tolerance: int) -> None:
    got = image(data)
    assert got.dtype == torch.uint8 and got.shape == (len(mode), 60, 80)
    assert (got.int() - pixels(data, mode).int()).abs().max() <= tolerance


@pytest.mark.parametrize("seed", range(12))
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 90, 2).tolist()
    picture = RGB.resize((width, height)) if seed % 4 else RGB.resize((width, height)).convert("L")
    options = {"subsampling": int(rng.integers(0, 3))} if seed % 4 else {}
    data = encode(picture, "JPEG", quality=int(rng.integers(30, 96)), progressive=seed % 2 == 1, **options)
    assert torch.equal(image(data), pixels(data))
    assert EncodedImage(data).size == (height, width)


def test_a_jpeg_with_a_few_odd_bytes_is_read_and_one_cut_short_is_not() -> None:
    data = encode(RGB, "JPEG")
    for odd in (data[:-2] + b"\x00\x01\x02" + data[-2:], data + b"more", data[:2] + b"\xff" + data[2:]):
        assert torch.equal(image(odd), pixels(data))
    encoded = EncodedImage(data[:-200])  # the header is whole
    assert encoded.size == (60, 80)
    for reduce in (1, 2):
        with pytest.raises(BadSample, match="truncated"):
            encoded.pixels(reduce)


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("side", [(60, 80), (61, 83), (7, 200)])
def test_a_jpeg_can_be_decoded_at_a_part_of_its_size(reduce: int, side: tuple[int, int]) -> None:
    picture = RGB.resize((side[1], side[0]), Image.Resampling.BICUBIC)
    got = EncodedImage(encode(picture, "JPEG", quality=95, subsampling=0)).pixels(reduce)
    assert got.shape == (3, -(-side[0] // reduce), -(-side[1] // reduce))
    height, width = side[0] // reduce, side[1] // reduce  # what is not whole at the edges aside
    if height and width:
        means = np.array(picture)[: height * reduce, : width * reduce].astype(float)
        means = means.reshape(height, reduce, width, reduce, 3).mean(axis=(1, 3))
        assert np.abs(got.permute(1, 2, 0).numpy()[:height, :width] - means).mean() < 3


def test_only_a_jpeg_is_reduced() -> None:
    for data in (encode(RGB, "PNG"), encode(RGB, "WEBP"), encode(RGB.convert("CMYK"), "JPEG")):
        assert EncodedImage(data).pixels(4).shape == (3, 60, 80)


def adobe(data: bytes, transform: int | None) -> bytes:
    """A CMYK JPEG with another colour transform in Adobe's segment, or without the segment."""
    at = data.index(b"Adobe") - 4
    if transform is None:
        return data[:at] + data[at + 16 :]
    return data[: at + 15] + bytes([transform]) + data[at + 16 :]


def test_cmyk_has_the_right_colours() -> None:
    ink = np.array(RGB.convert("CMYK"))
    luminance = np.array(ImageOps.invert(RGB).convert("YCbCr"))  # Adobe's YCCK: of what the ink leaves white
    stored = np.dstack([255 - luminance, np.zeros((60, 80), np.uint8)])
    cases = {
        "adobe": encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=95),
        "ycck": adobe(encode(Image.fromarray(stored, "CMYK"), "JPEG", quality=95), 2),
        "plain": adobe(encode(Image.fromarray(255 - ink, "CMYK"), "JPEG", quality=95), None),
    }
    for name, data in cases.items():
        assert (image(data).permute(1, 2, 0).int() - torch.tensor(SMOOTH).int()).abs().max() <= 8, name


def test_sixteen_bits_keep_their_range() -> None:
    grey = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    swapped = Image.frombytes("I;16B", (80, 60), grey.astype(">u2").tobytes())
    for picture, kind in ((Image.fromarray(grey), "PNG"), (Image.fromarray(grey), "TIFF"), (swapped, "TIFF")):
        got = image(encode(picture, kind))
        assert got.shape == (3, 60, 80)
        assert np.abs(got.numpy()[1].astype(int) - np.rint(grey / 257).astype(int)).max() <= 1


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)])
def test_colours_of_sixteen_bits(kind: int, channels: int) -> None:
    deep = RNG.integers(0, 65536, (60, 80, channels))
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in deep)  # Pillow writes no such file
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 80, 60, 16, kind, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    got = image(data).permute(1, 2, 0).numpy()
    assert got.shape == deep.shape and np.abs(got - deep / 257).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_exif_orientation_is_applied(kind: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(RGB, kind, exif=exif)
        right = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        encoded = EncodedImage(data)
        assert torch.equal(encoded.pixels().permute(1, 2, 0), torch.tensor(np.array(right)))
        assert encoded.size == (right.height, right.width)
        if kind == "JPEG":
            assert encoded.pixels(2).shape == (3, right.height // 2, right.width // 2)
    exif[0x0112] = 6  # the camera was turned: rows are columns
    turned = np.rot90(SMOOTH, -1).astype(int)
    assert np.abs(image(encode(RGB, kind, exif=exif)).permute(1, 2, 0).numpy() - turned).mean() < 5


def test_exif_behind_other_segments_is_found_and_a_wrong_one_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encode(RGB, "JPEG", exif=exif)
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    for filler in (comment, comment * 3, b"\xff"):
        assert image(data[:2] + filler + data[2:]).shape == (3, 80, 60)
    exif[0x0112] = 77
    assert image(encode(RGB, "JPEG", exif=exif)).shape == (3, 60, 80)


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + encode(RGB, "PNG")[33:]


def jpeg_bomb(width: int, height: int) -> bytes:
    data = encode(RGB, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    "data",
    [bomb(50_000, 50_000), bomb(11_000, 10_000), bomb(200_000, 1_000), jpeg_bomb(65_000, 65_000),
     jpeg_bomb(10_000, 10_000)],
)  # fmt: skip
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
    assert captions(sample(txt=b"\xef\xbb\xbfa cat")) == ["a cat"]  # as some editors begin a file
    assert captions(sample(json=b'{"caption": "a cat", "pixels": 1e999, "seen": NaN}')) == ["a cat"]
    many = "\n".join(f"caption {i}" for i in range(1000))
    assert len(captions(sample(txt=many.encode()))) == 1000


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b""}, "empty caption"),
        ({"txt": b" \n\t "}, "empty caption"),
        ({"txt": b"\xff\xfe\x00"}, "not UTF-8"),
        ({"txt": b"x" * 1_000_000}, "more than 10000 characters"),
        ({"jpg": b""}, r"no caption among its members \(jpg\)"),
        ({"txt": b"a\n" * 2**22}, "txt of 8388608 bytes exceeds the limit"),
        ({"json": b"{"}, "json cannot be read"),
        ({"json": b""}, "json cannot be read"),
        ({"json": b'{"caption": "\xff"}'}, "not UTF-8"),
        ({"json": b'{"caption": "\\ud83d"}'}, "not UTF-8"),
        ({"json": b'{"caption": "a", "n": ' + b"9" * 10_000 + b"}"}, "json cannot be read"),
        ({"json": b'{"caption": "a"}' + b" " * 2**22}, "json of 4194320 bytes exceeds the limit"),
        ({"json": b'{"caption": ' * 50_000}, "json cannot be read"),
        ({"json": b"null"}, "holds no text"),
        ({"json": b'"a cat"'}, "holds no text"),
        ({"json": b'{"caption": {"caption": "a"}}'}, "holds no text"),
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

"""What `eval.explore` does without a browser: the index is brute force, what is refused and why, and who is let in."""

import asyncio
import io
import json
import socket
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.explore import ExploreConfig, main
from eval.exploring import show, uploads
from eval.exploring.index import Index, build_index, nearest
from eval.exploring.opened import Opened
from eval.exploring.server import FIRST_PORT, HOST, Guard, free_socket
from eval.models import Given
from mm.config import load
from mm.data.folders import FolderSet
from mm.errors import UserError
from mm.evaluators.sets import SetConfig
from mm.fusion import FusionConfig, build_fusion
from mm.fusion.base import Width
from mm.models.folder import save_model
from mm.models.fused import Fused
from mm.models.heads import AnswerHead, ClassHead
from tests import tiny, videos

FOLDER = Path("/nowhere/uploads-of-explore")
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'& ${alert(3)} {{value}} @children \u202e"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two random towers."""
    folder = tmp_path_factory.mktemp("explore")
    save_model(folder / "run" / "model", tiny.towers())
    return folder / "run"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 3, 64, 1000])
def test_nearest_is_brute_force(seed, block):
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(100, 8, generator=generator), dim=1)
    rows[50:60] = rows[3]  # equals, in several blocks
    query, most = rows[3 + seed], [1, 7, 50, 200][seed]
    scores, places = nearest(rows, query, most, block)
    plain = sorted(range(100), key=lambda i: (-round(float(rows[i].double() @ query.double()), 5), i))[:most]
    exact = (rows.double() @ query.double())[plain]
    assert torch.allclose(scores.double(), exact, atol=1e-5) and len(set(places.tolist())) == min(most, 100)
    assert set(places[:1].tolist()) <= set(plain[:11])
    if seed == 0:
        assert places.tolist() == [3]


def test_index_finds_an_image_by_itself_and_is_kept(run, tmp_path, capsys):
    tiny.captioned(tmp_path / "data", 12)
    config = SetConfig(data=str(tmp_path / "data"), workers=0, batch=5)
    given = Given(str(run), tmp_path / "cache")
    index = build_index(given, config, tmp_path / "cache")
    assert "indexing 12 images" in capsys.readouterr().out and len(index) == 12 and not index.videos
    model = Opened("m", given.model)
    for i in (0, 7):
        row = model.image_row(uploads.image(tiny.png(tiny.NAMES[i % 4], i)))
        (best, *_) = index.nearest(row, 3)
        assert best.key == f"{i:06d}" and best.score == pytest.approx(1, abs=1e-5)
        assert best.caption == f"{tiny.NAMES[i % 4]} picture {i}"
        with Image.open(io.BytesIO(index.thumbnail(best.place))) as seen:
            assert seen.size == (tiny.SIZE, tiny.SIZE)
            off = np.asarray(seen.convert("RGB")).mean((0, 1)) - np.array(tiny.COLOURS[tiny.NAMES[i % 4]])
            assert np.abs(off).max() < 12

    again = Given(str(run), tmp_path / "cache")

    def never(*_):
        raise AssertionError("it was indexed again")

    again.model.towers.forward = never  # type: ignore[method-assign]
    kept = build_index(again, config, tmp_path / "cache")
    assert torch.equal(kept.rows, index.rows) and kept.facts == index.facts


def test_a_set_of_videos_is_searched_by_clips(run, tmp_path):
    tiny.clips(tmp_path / "data", 4, damaged=1)
    index = build_index(Given(str(run), None), SetConfig(data=str(tmp_path / "data"), workers=0), None)
    assert index.videos and len(index) == 4 and index.left_out == 1
    assert index.nearest(index.rows[2], 4)[0].place == 2
    assert index.thumbnail(0).startswith(b"\xff\xd8")


def test_rows_of_nan_are_left_out_and_said():
    rows = F.normalize(torch.randn(4, 3), dim=1)
    rows[1] = float("nan")
    facts = [{"index": i, "key": str(i), "captions": []} for i in range(4)]
    index = Index(rows, facts, [], videos=False)  # type: ignore[arg-type]
    assert index.left_out == 1 and {one.key for one in index.nearest(rows[0], 9)} == {"0", "2", "3"}


def test_a_model_of_nan_says_so():
    towers = tiny.towers()
    with torch.no_grad():
        towers.image_projection.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        Opened("m", towers).image_row(uploads.image(tiny.png("red")))


@pytest.mark.parametrize("bias", [None, -2.0])
def test_probabilities_are_at_the_models_own_temperature(bias):
    towers = tiny.towers(scale_init=7.0, bias_init=bias)
    model = Opened("m", towers)
    row = model.image_row(uploads.image(tiny.png("red")))
    labels, templates = ["red", "green", "a cat"], ["a {}", "the {c} thing"]
    found = model.classify(row, labels, templates)
    prompts = [towers.encode_text([t.replace("{c}", n).replace("{}", n) for t in templates]) for n in labels]
    cosines = torch.stack([F.normalize(one.mean(0), dim=0) for one in prompts]) @ row
    plain = (7 * cosines).softmax(0) if bias is None else (7 * cosines + bias).sigmoid()
    assert dict(found) == pytest.approx(dict(zip(labels, plain.tolist())), abs=1e-5)
    chances = [chance for _, chance in found]
    assert chances == sorted(chances, reverse=True)


def bomb(side: int) -> bytes:
    """A PNG of so many pixels a side in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


BAD_IMAGES = {
    "none": (lambda: None, "no image yet"),
    "empty": (lambda: b"", "file is empty"),
    "text": (lambda: b"hello", "cannot be used as an image"),
    "script": (lambda: b"<script>alert(1)</script>", "cannot be used as an image"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "SVG is a program"),
    "bomb": (lambda: bomb(30_000), "exceeds limit of"),
    "small bomb": (lambda: bomb(8_000), "8000 x 8000 pixels exceeds the limit"),
    "cut": (lambda: tiny.png("red")[:200], "cannot be used as an image"),
    "gif": (lambda: animated("GIF"), "GIF is an animation"),
    "webp": (lambda: animated("WEBP"), "WEBP is an animation"),
    "apng": (lambda: animated("PNG"), "PNG is an animation"),
    "video": (lambda: videos.encode(videos.pictures(4)), "seems to be a video"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused_with_the_reason(kind):
    make, why = BAD_IMAGES[kind]
    with pytest.raises(UserError, match=why):
        uploads.image(make())


def test_bad_clips_are_refused_and_good_ones_read(run):
    for data in (None, b"", b"hello", tiny.png("red")[:100], b"<svg/>", videos.audio_alone()):
        with pytest.raises(UserError, match=r"no clip yet|empty|cannot be used as a clip"):
            uploads.clip(data)
    clip = uploads.clip(videos.encode(videos.pictures(8)))
    assert Opened("m", Given(str(run), None).model).clip_row(clip).norm().item() == pytest.approx(1, abs=1e-5)


def test_texts_are_bounded():
    assert uploads.text("  a\tred \n apple ", "query") == "a red apple"
    for given, why in {
        None: "query is empty",
        " \n": "query is empty",
        "x" * 1001: "has 1,001 characters",
        "half \ud800": "half a character",
        "a\0b": "NUL",
    }.items():
        with pytest.raises(UserError, match=why):
            uploads.text(given, "query")
    assert uploads.labels("cat, dog\n\ncat\n bird ") == ["cat", "dog", "bird"]
    assert uploads.templates(" ") == ["{}"] and uploads.templates("a {}, b\n{c}") == ["a {}, b", "{c}"]
    with pytest.raises(UserError, match="there are 201 labels; at most 200"):
        uploads.labels("\n".join(map(str, range(201))))
    with pytest.raises(UserError, match="no label yet"):
        uploads.labels(" , ,\n")
    with pytest.raises(UserError, match="no place for the label"):
        uploads.templates("a photo")
    with pytest.raises(UserError, match=r"labels have 300,000 characters"):
        uploads.labels("," * 300_000)


class Tags(HTMLParser):
    """The elements of a page, and the text in them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_texts_of_others_are_never_markup(tmp_path):
    folder = tmp_path / "a<b onclick=x>"
    folder.mkdir()
    name = "x'\"><img src=x onerror=alert(1)>"
    (folder / f"{name}.png").write_bytes(tiny.png("red"))
    (folder / f"{name}.txt").write_text(HOSTILE)
    towers = tiny.towers()
    rows = towers.encode_image([uploads.image(tiny.png("red"))])
    index = Index(rows, [{"index": 0, "key": name, "captions": [HOSTILE]}], FolderSet(folder), videos=False)
    pages = [
        show.hits(index.nearest(rows[0], 1), index),
        show.bars([(HOSTILE, 0.5)], HOSTILE),
        show.refusal(HOSTILE),
        show.answer(HOSTILE),
        show.sides([(HOSTILE, show.note(HOSTILE))]),
    ]
    for page in pages:
        tags = Tags()
        tags.feed(page)
        assert HOSTILE in tags.text
        assert "script" not in {tag for tag, _ in tags.tags}
        assert not [name for _, given in tags.tags for name in given if name.startswith("on")]
        assert all(
            given["src"].startswith("data:image/jpeg;base64,") for tag, given in tags.tags if tag == "img"
        )
    assert pages[0].count("<img") == 1


def asked(path: str = "/", method: str = "GET", body: bytes = b"", **headers: str) -> int:
    """The status of a request; 200 where it is let through."""
    through, said = [], []

    async def app(scope, receive, send):
        got = await receive()
        through.append(got["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        said.append(message)

    headers = {"host": f"{HOST}:7860", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    asyncio.run(Guard(app, 7860, FOLDER, 20)(scope, receive, send))
    status = said[0]["status"]
    assert (status == 200) == (through == [body])
    assert any(name == b"content-security-policy" for name, _ in said[0]["headers"])
    return status


def test_only_the_page_itself_is_let_through():
    join = "/gradio_api/queue/join"
    ours = f"http://{HOST}:7860"
    assert asked() == asked("/assets/index-a_b.js") == asked(origin=ours) == 200
    assert asked(host="evil.example") == asked(host=f"{HOST}:1") == 421
    assert asked(join, "POST", b"{}", origin="http://evil.example") == asked(origin="null") == 403
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file=http://evil.example/",
        "/gradio_api/proxy=http://evil.example/",
        "/assets/../../etc/passwd",
        "/gradio_api/run/predict",
        "/gradio_api/call/x",
        "/gradio_api/vibe-edit/",
        "/monitoring",
        "/docs",
    ):
        assert asked(path) == 404, path
    assert asked("/gradio_api/upload", "POST", content_length=str(200 * 10**6)) == 413
    assert asked("/gradio_api/upload", "POST", content_length="-1") == 413
    fine = json.dumps({"data": [{"path": f"{FOLDER}/x/a.png", "url": f"{ours}/gradio_api/file=a.png"}]})
    assert asked(join, "POST", fine.encode()) == 200
    for path in (
        "http://evil.example/a.png",
        "https://127.0.0.1:1/",
        "//x/y",
        "/etc/passwd",
        f"{FOLDER}/../a.png",
        f"{FOLDER}-beside/a.png",
        "README.md",
        "a\0b",
        "x" * 100_000,
        3,
        [],
    ):
        elsewhere = {"data": [[{"path": path, "meta": {"_type": "gradio.FileData"}}]]}
        assert asked(join, "POST", json.dumps(elsewhere).encode()) == 400
    assert asked(join, "POST", b"{") == asked(join, "POST", b" " * 2**21) == 400


def test_it_listens_on_this_machine_alone():
    assert load(ExploreConfig, None, ["model=x", "server_name=localhost"]).server_name == HOST
    for name in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(UserError, match=r"server_name.*must be 127\.0\.0\.1.*ssh -L"):
            load(ExploreConfig, None, ["model=x", f'server_name="{name}"'])


def test_a_port_that_is_taken(capsys):
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: .*in use"):
            main(["model=none", f"port={port}"])
    with free_socket(None) as first, free_socket(None) as second:
        assert first.getsockname()[0] == HOST and first.getsockname()[1] != second.getsockname()[1]
        assert f"port {FIRST_PORT} is taken" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="there is no model in"):
        main([f"model={tmp_path}", "cache=null"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mm\[explore\]'"):
        main(["model=x"])


@pytest.fixture(scope="module")
def headed():
    """A model that answers, classifies and describes, random."""
    towers = tiny.towers()
    torch.manual_seed(0)
    widths = {"image": Width(192, 192), "text": Width(32, 32)}
    fusion = build_fusion(FusionConfig(kind="merged", width=32, heads=2, layers=1), widths)
    heads = {
        "vqa": AnswerHead(fusion, answers=["red", "green"]),
        "kinds": ClassHead(width=192, classes=["cat", "dog"]),
    }
    return Fused(towers, heads)


def test_heads_are_asked(headed):
    model = Opened("m", headed)
    assert model.answers_of == "vqa" and model.classes_of == "kinds" and model.writes_of is None
    assert not model.asks_of_clips and not model.classes_are_of_clips and not model.is_graph
    pixels = uploads.image(tiny.png("red"))
    chances = headed.classify([pixels])[0]
    assert dict(model.own_classes(pixels)) == pytest.approx(dict(zip(["cat", "dog"], chances.tolist())))
    assert model.answer(pixels, "what?") == headed.answer([pixels], ["what?"])[0]
    found = model.why(pixels, "what colour?", [], question=True)
    assert found.heat.shape == (3, 384, 384) and [word for word, _ in found.words] == ["what", "colour", "?"]
    found = model.why(pixels, "a red thing", ["a cat"], question=False)
    plain = headed.encode_text(["a red thing", "a cat"]) @ headed.encode_image([pixels])[0]
    assert found.score == pytest.approx(float(plain[0] - plain[1]), abs=1e-5)


def test_tabs_say_what_they_lack(headed):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'mm[explore]'")
    from eval.exploring.page import build_page, told

    def written(models) -> str:
        return json.dumps([one["props"].get("value") for one in build_page(models, 20).config["components"]])

    pair = Opened("plain", tiny.towers()), None
    alone = written([pair])
    for what in ("data=FOLDER", "no head that answers or writes", "data=SHARDS of videos", "other=MODEL"):
        assert what in alone
    both = written([(Opened("<b>headed", headed), None), pair])
    assert "no head that answers" not in both and "other=MODEL" not in both and "<b>headed" not in both

    def breaks(*given):
        raise ZeroDivisionError("/home/somebody/secret")

    assert "the terminal" in told(breaks)() and "secret" not in told(breaks)()

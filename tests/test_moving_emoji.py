"""mm.data.sources.moving_emoji: motions that go the way their class says, and nothing else that tells the class."""

import colorsys
import hashlib
import io
import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mm.data.make import make
from mm.data.shards import Sample, ShardSet
from mm.data.sources import emoji, emoji_things, moving_emoji
from mm.data.sources.canvas import Drawing
from mm.data.sources.emoji_concepts import kin, read_concepts, split
from mm.data.sources.motions import MOTIONS, Look, cycle, render
from mm.data.sources.moving_emoji import Clip, MovingEmojiConfig, class_names, clips_of, encode
from mm.data.video import video_of
from mm.errors import UserError

PARTS = ("train", "val", "test", "test_reversed")
SMALL = {"of_each_kind": 4, "clips_of_each": 1, "size": 48, "samples_per_shard": 100}
BACKGROUND = (90, 120, 150)
CLASSES = class_names(tuple(MOTIONS))
Frames = NDArray[np.uint8]
Arts = dict[str, dict[str, Drawing]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("moving_emoji", tmp_path_factory.mktemp("data") / "out", **SMALL)


@pytest.fixture(scope="module")
def arts() -> Arts:
    things = emoji_things.read_things()
    return {
        name: dict(emoji_things.draw(name, emoji.ART[name](emoji.EmojiConfig()), things, 48))
        for name in ("openmoji", "twemoji")
    }


def hashes(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "source.json"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(out: Path, part: str) -> list[tuple[Sample, dict[str, Any]]]:
    folder = out / part if part == "train" else out / part / "test"
    return [(sample, json.loads(sample.members["json"])) for sample in ShardSet(str(folder))]


def decode(members: dict[str, bytes]) -> Frames:
    """All frames, by the plainest way."""
    pictures = [data for name, data in members.items() if name.endswith("jpg")]
    if pictures:
        return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in pictures])
    (video,) = (members[name] for name in ("mp4", "webm") if name in members)
    with av.open(io.BytesIO(video), "r") as file:
        file.streams.video[0].thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in file.decode(video=0)])


def drawn_by(art: dict[str, Drawing], clip: Clip, config: MovingEmojiConfig) -> Frames:
    image = art[clip.thing].image
    return render(image, clip.motion, clip.look, clip.phase, clip.direction, config.size, config.frames)


def looks() -> list[Look]:
    return [Look(side, x, y, BACKGROUND) for side in (0.4, 0.6) for x, y in ((0.0, 1.0), (0.5, 0.3), (1, 0))]


def flag() -> Image.Image:
    """A white square with a red corner."""
    image = Image.new("RGBA", (90, 90), (255, 255, 255, 255))
    ImageDraw.Draw(image).rectangle((60, 0, 89, 29), fill=(255, 0, 0, 255))
    return image


def drawn(frames: Frames) -> NDArray[np.bool_]:
    return np.abs(frames.astype(int) - BACKGROUND).max(-1) > 40


def middle(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean column and row of each frame: (T, 2)."""
    return np.array([np.argwhere(one).mean(0)[::-1] for one in mask])


# Motions


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_clip_backwards_is_its_twin_and_both_begin_and_end_alike(motion: str) -> None:
    for look in looks():
        for size, frames in ((48, 17), (50, 12)):
            for phase in (0, 3, frames - 2):
                one, other = (render(flag(), motion, look, phase, way, size, frames) for way in (1, -1))
                assert one.shape == (frames, size, size, 3) and one.dtype == np.uint8
                assert (one == other[::-1]).all() and (one[0] == one[-1]).all()
                assert (one[0] == other[0]).all() and not (one == other).all()
                # all of the cycle, once
                assert len({frame.tobytes() for frame in one}) == frames - 1


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_frame_is_the_first_one_of_some_phase(motion: str) -> None:
    look = Look(0.5, 0.2, 0.7, BACKGROUND)
    whole = [frame.tobytes() for frame in cycle(flag(), motion, look, 48, 16)]
    for way in (1, -1):
        clips = [render(flag(), motion, look, phase, way, 48, 17) for phase in range(16)]
        for index in range(17):
            assert sorted(clip[index].tobytes() for clip in clips) == sorted(whole)


@pytest.mark.parametrize("look", looks())
def test_motions_go_where_their_names_say(look: Look) -> None:
    def forward(motion: str) -> Frames:
        return render(flag(), motion, look, 0, 1, 96, 17)

    assert [(motion.forward, motion.backward) for motion in MOTIONS.values()] == [
        ("moving right", "moving left"),
        ("moving up", "moving down"),
        ("turning clockwise", "turning anticlockwise"),
        ("going round clockwise", "going round anticlockwise"),
        ("growing", "shrinking"),
        ("changing from red to green to blue", "changing from blue to green to red"),
    ]
    slide, climb = forward("slide"), forward("climb")
    for before, after in pairwise(slide):
        assert (after == np.roll(before, 6, axis=1)).all()
    for before, after in pairwise(climb):
        assert (after == np.roll(before, -6, axis=0)).all()

    turn = forward("turn")
    red = (turn[..., 0] > 150) & (turn[..., 1] < 100)
    assert_clockwise(middle(red) - middle(drawn(turn)))

    orbit = forward("orbit")
    path = middle(drawn(orbit))
    assert_clockwise(path - path[:-1].mean(0))
    assert np.ptp(drawn(orbit).sum((1, 2))) == 0

    area = drawn(forward("pulse")).sum((1, 2))
    assert (np.diff(area)[:-1] > 0).all() and area[-1] == area[0] < area[-2] / 4

    tint = forward("tint")
    corner = tint[:, (tint[0, ..., 0] > 150) & (tint[0, ..., 1] < 100)].mean(1)  # red at first
    hue, saturation, value = np.array([colorsys.rgb_to_hsv(*(color / 255)) for color in corner]).T
    assert np.allclose(hue[:-1], np.arange(16) / 16, atol=0.01) and hue[-1] == hue[0]
    assert [corner[k].argmax() for k in (0, 5, 11)] == [0, 1, 2]
    assert np.ptp(saturation) < 0.02 and np.ptp(value) < 0.02


def assert_clockwise(arm: NDArray[np.float64]) -> None:
    """(T, 2), to the right and down: one way round a circle in equal steps."""
    angle = np.arctan2(arm[:, 1], arm[:, 0])  # grows clockwise, as rows go down
    step = np.diff(np.unwrap(angle))
    assert np.allclose(step, 2 * np.pi / 16, atol=0.2) and np.ptp(np.hypot(*arm.T)) < 2


@pytest.mark.parametrize("motion", ["turn", "orbit", "pulse"])
def test_nothing_is_cut_off(motion: str) -> None:
    disc = Image.new("RGBA", (90, 90))
    ImageDraw.Draw(disc).ellipse((0, 0, 89, 89), fill=(255, 255, 255, 255))
    for look in looks():
        for mask in drawn(render(disc, motion, look, 0, 1, 96, 17)):
            height, width = np.ptp(np.argwhere(mask), axis=0)
            assert abs(height - width) <= 2


def test_every_thing_shows_which_way_it_turns(arts: Arts) -> None:
    """A wheel that turns by a spoke would not."""
    for art in arts.values():
        for name, drawing in art.items():
            frames = cycle(drawing.image, "turn", Look(0.6, 0.5, 0.5, BACKGROUND), 48, 16).astype(int)
            turned = np.abs(frames[1] - frames[0]).mean()
            assert np.abs(frames[1] - frames[-1]).mean() > 0.7 * turned > 0, name


# Encoding


@pytest.mark.parametrize("container", ["mp4", "webm", "frames"])
def test_decoded_twins_have_the_same_frames_bit_for_bit(container: str, arts: Arts) -> None:
    for motion in MOTIONS:
        look, decoded = Look(0.55, 0.3, 0.6, BACKGROUND), []
        for way in (1, -1):
            frames = render(arts["openmoji"]["cat"].image, motion, look, 5, way, 48, 17)
            members = encode(frames, container, 12)
            assert members == encode(frames, container, 12)
            decoded.append(decode(members))
            assert np.abs(decoded[-1].astype(int) - frames).mean() < 4  # chroma has half the size
        assert (decoded[0] == decoded[1][::-1]).all() and (decoded[0][0] == decoded[0][-1]).all()
        assert not (decoded[0] == decoded[1]).all()


@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("webm", "vp9")])
def test_files_are_ordinary_videos_with_several_keyframes(container: str, codec: str) -> None:
    (data,) = encode(render(flag(), "orbit", looks()[0], 0, 1, 48, 17), container, 10).values()
    with av.open(io.BytesIO(data), "r") as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == codec and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 10 and sum(packet.is_keyframe for packet in file.demux(stream)) >= 3


# The order, and nothing else, tells the class


@pytest.mark.parametrize("motion", ["slide", "tint"])
def test_without_the_order_no_classifier_tells_the_direction(motion: str, arts: Arts) -> None:
    """A linear classifier on clips of other things, decoded: twins are on the same side."""
    in_order = {"slide": shifts, "tint": turns}[motion]
    config = MovingEmojiConfig(motions=(motion,), clips_of_each=1, size=32)
    things = [thing for thing in emoji_things.read_things().values() if thing.name in arts["twemoji"]]
    clips = list(clips_of(config, things, list(arts.values())))
    views: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for clip in clips:
        frames = decode(encode(drawn_by(arts["openmoji"], clip, config), "mp4", 12))
        small = frames.reshape(17, 8, 4, 8, 4, 3).mean((2, 4))
        views["bag"].append(np.concatenate([small.mean(0), small.std(0)]).ravel())
        for index in (0, 3, 8, 13, 16):
            views[f"frame {index}"].append(small[index].ravel())
        views["order"].append(in_order(frames, clip))
    labels = np.array([clip.direction for clip in clips])
    half = len(clips) // 4 * 2  # of the things
    accuracy = {}
    for name, view in views.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
        model.fit(np.array(view[:half]), labels[:half])
        accuracy[name] = model.score(np.array(view[half:]), labels[half:])
    assert accuracy.pop("order") > 0.9
    # in these twins are equal, and one of the two is right
    assert {accuracy[f"frame {index}"] for index in (0, 8, 16)} == {0.5}
    margin = 3 * 0.5 / np.sqrt(len(clips) - half)
    assert all(abs(share - 0.5) < margin for share in accuracy.values()), accuracy


def shifts(frames: Frames, clip: Clip) -> NDArray[np.float64]:
    """What each frame has in common with the next, by how far that is shifted to the right."""
    columns = np.fft.fft(np.abs(frames.astype(float) - clip.look.background).sum((1, 3)), axis=1)
    common = np.fft.ifft(columns[:-1].conj() * columns[1:], axis=1).real.mean(0)
    return common / common.max()


def turns(frames: Frames, clip: Clip) -> NDArray[np.float64]:
    """How far the hue of each part of the picture turns from each frame to the next, on average."""
    small = frames.reshape(17, 4, 8, 4, 8, 3).mean((2, 4))
    hue = small @ np.exp(2j * np.pi * np.arange(3) / 3)
    return np.angle(hue[1:] * hue[:-1].conj()).mean(0).ravel()


def test_the_first_frame_is_equally_likely_to_be_any() -> None:
    things = list(emoji_things.read_things().values())
    blank = Drawing(flag(), None, (255, 255, 255))
    art = {thing.name: blank for thing in things}
    clips = list(clips_of(MovingEmojiConfig(), things, [art]))
    for motion in MOTIONS:
        phases = Counter((clip.phase, clip.direction) for clip in clips if clip.motion == motion)
        expected = len(things) * 4 / 16
        squares = sum((phases[phase, 1] - expected) ** 2 / expected for phase in range(16))
        assert squares < 37.7  # chi-square of 15 degrees of freedom: one of a thousand is above
        assert all(phases[phase, 1] == phases[phase, -1] for phase in range(16))


# The sets


def test_samples_are_what_they_say(made: Path) -> None:
    config, counts = MovingEmojiConfig(), json.loads((made / "source.json").read_text())["counts"]
    for part in PARTS:
        place = made / part
        assert (place / "classnames.txt").read_text().splitlines() == CLASSES
        samples = read(made, part)
        assert len(samples) == counts[part] and list(samples[0][0].members)[-3:] == ["cls", "txt", "json"]
        classes: Counter[str] = Counter()
        for sample, about in samples:
            action = CLASSES[int(sample.members["cls"])]
            motion = MOTIONS[about["motion"]]
            assert (
                action == about["action"] == (motion.forward if about["direction"] == 1 else motion.backward)
            )
            article = "an" if about["thing"][0] in "aeiou" else "a"
            assert sample.members["txt"].decode() == f"a drawing of {article} {about['thing']} {action}"
            assert about["fps"] == config.fps and 0 <= about["phase"] < 16
            classes[action] += 1
        assert set(classes) == set(CLASSES) and len(set(classes.values())) == 1
        if part != "train":
            assert (place / "test/nshards.txt").read_text() == "1\n"
            assert "{c}" in (place / "zeroshot_classification_templates.txt").read_text()
    assert (made / "train/sizes.json").exists()
    readme = (made / "README.md").read_text()
    assert "openmoji: OpenMoji 17 (openmoji.org), CC BY-SA 4.0; train and val" in readme
    assert "CC BY 4.0; test and test_reversed" in readme


def test_things_and_artists_of_the_sets(made: Path) -> None:
    things = {part: {about["thing"] for _, about in read(made, part)} for part in PARTS}
    assert things["test"] == things["test_reversed"]
    assert not things["train"] & things["val"] and not things["test"] & (things["train"] | things["val"])
    for part in PARTS:
        artist, licence = ("twemoji", "CC BY 4.0") if "test" in part else ("openmoji", "CC BY-SA 4.0")
        assert {(about["artist"], about["licence"]) for _, about in read(made, part)} == {(artist, licence)}


def test_things_held_out_are_those_of_the_emoji_source() -> None:
    for seed in (0, 1):
        concepts, other = read_concepts(), emoji.EmojiConfig(split_seed=seed)
        split(concepts, kin(concepts, []), seed, other.val_share, other.test_share)
        where = {concept.name: concept.split for concept in concepts}
        things = emoji_things.read_things()
        of_thing = {thing.name: concept for concept, thing in things.items()}
        parts = moving_emoji.split(things, MovingEmojiConfig(split_seed=seed))
        for part, found in parts.items():
            assert len(found) > 5 and {where[of_thing[thing.name]] for thing in found} == {part}


def test_twins_are_in_the_same_set_with_the_same_frames(made: Path) -> None:
    for part in ("val", "test"):
        twins: dict[str, list[tuple[int, Frames]]] = defaultdict(list)
        for sample, about in read(made, part):
            twins[about["pair"]].append((about["direction"], decode(sample.members)))
        for one, other in twins.values():
            assert one[0] == -other[0] and one[1].shape == (17, 48, 48, 3)
            assert (one[1] == other[1][::-1]).all()


def test_the_reversed_set_is_the_test_set_backwards_under_its_labels(made: Path) -> None:
    samples = zip(read(made, "test"), read(made, "test_reversed"), strict=True)
    for i, ((one, _), (other, _)) in enumerate(samples):
        assert one.members["mp4"] != other.members["mp4"]
        assert {**one.members, "mp4": b""} == {**other.members, "mp4": b""}
        if i < 20:
            assert (decode(one.members) == decode(other.members)[::-1]).all()


def test_training_clips_are_shuffled_and_others_are_not(made: Path) -> None:
    train, test = ([about["pair"] for _, about in read(made, part)] for part in ("train", "test"))
    assert test[0::2] == test[1::2]
    assert sum(one == other for one, other in pairwise(train)) < 10


def test_a_set_of_one_motion_has_the_clips_that_it_has_among_all(made: Path, tmp_path: Path) -> None:
    out = make("moving_emoji", tmp_path / "out", **SMALL, motions=["turn"], container="frames", fps=5)
    assert (out / "train/classnames.txt").read_text() == "turning clockwise\nturning anticlockwise\n"
    for part in PARTS:
        among = {
            (about["pair"], about["direction"]): decode(sample.members)
            for sample, about in read(made, part)
            if about["motion"] == "turn"
        }
        alone = read(out, part)
        assert len(alone) == len(among)
        for sample, about in alone:
            names = list(sample.members)
            assert names[:2] == ["0000.jpg", "0001.jpg"] and names[16:] == ["0016.jpg", "cls", "txt", "json"]
            assert about["fps"] == 5 and video_of(sample).duration == pytest.approx(17 / 5)
            other = among[about["pair"], about["direction"]]
            assert np.abs(decode(sample.members).astype(int) - other).mean() < 4


def test_same_options_give_the_same_bytes_and_seeds_change_what_they_say(made: Path, tmp_path: Path) -> None:
    small = {**SMALL, "motions": ["slide"], "size": 32}
    one, again, shuffled, other = (
        hashes(make("moving_emoji", tmp_path / name, **small, **more))
        for name, more in (
            ("one", {}),
            ("again", {}),
            ("shuffled", {"seed": 1}),
            ("other", {"clip_seed": 1}),
        )
    )
    assert one == again
    assert {name.split("/")[0] for name in one if one[name] != shuffled[name]} == {"train"}
    assert {name.split("/")[0] for name in one if one[name] != other[name]} == {*PARTS, "README.md"}


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    for options, said in (
        ({"artist": "twemoji"}, "test_artist=twemoji is the artist of the other sets"),
        ({"motions": ["turn", "turn"]}, "one or more of slide, climb, turn, orbit, pulse, tint, each once"),
        ({"motions": ["spin"]}, "slide"),
        ({"size": 97}, "multiple of 2"),
        (
            {"of_each_kind": 4, "size": 32, "val_share": 0.001},
            "none of 36 things is left for val; raise of_each_kind=4, or",
        ),
    ):
        with pytest.raises(UserError, match=said):
            make("moving_emoji", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

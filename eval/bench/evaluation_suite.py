"""A suite of five sets with both programs, from a shell to the results: for `evaluation`.

The sets lie in CLIP_benchmark's layout, made of emoji (`mm data make emoji`), which a demo's model tells apart:

categories, concepts   classification; drawings of 96 pixels
photos                 classification; JPEGs of 500 to 1,024 pixels, a drawing on a photograph
flickr8k               retrieval; drawings, a caption each
mscoco_captions        retrieval; such JPEGs, five captions each

CLIP_benchmark takes a set for one of retrieval by its name, hence the last two; so that one command does all, as ours.
"""

import io
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from pydantic import Field

from eval.bench import peer, photos
from eval.bench.measure import Seconds
from mm.config import Config
from mm.data import decode
from mm.data.catalog import index_shards
from mm.data.shards import Sample, ShardSet
from mm.data.transforms import EvalTransform
from mm.data.writer import ShardWriter
from mm.evaluators.retrieval import KS

NAME = "ViT-S-32-alt"  # the smallest of open_clip's ViTs for 224 pixels
SHARDS = 4  # a set, so that its workers have something to do
RETRIEVAL = ("flickr8k", "mscoco_captions")
CLASSIFICATION = ("categories", "concepts", "photos")
CAPTIONS = (
    "a large drawing of {} in front of an old town",
    "someone has put a picture of {} over a photograph of a garden",
    "{}, with flowers and houses behind it that can hardly be seen",
    "this is what {} looks like on the screen of a telephone",
    "a sign with {} on it that hides most of what is behind",
)
OURS = {
    **{f"text_retrieval_recall@{k}": f"image_to_text_recall@{k}" for k in KS},
    **{f"image_retrieval_recall@{k}": f"text_to_image_recall@{k}" for k in KS},
    "acc1": "accuracy",
    "acc5": "accuracy@5",
    "mean_per_class_recall": "mean_per_class",
}
"""Their names of figures -> ours."""


class SuiteSize(Config):
    """Five sets, and the model that both programs open."""

    model: str | None = None
    """A run, which is exported as a model of open_clip; null: open_clip's ViT-S-32-alt with random weights."""
    photos: int = Field(300, ge=10, le=1000)
    """JPEGs in each of two sets."""
    drawings: int = Field(250, ge=10, le=250)
    """Images in each of three sets."""
    classes: int = Field(1000, ge=10, le=1000)
    """Names in the classification of JPEGs."""
    templates: int = Field(3, ge=1, le=80)
    """Prompts of each of these names, the first of ImageNet's."""
    workers: int = 2
    """Loader processes, of both."""
    turns: int = 3
    """Of each."""


class Apart(NamedTuple):
    """A figure that both have found."""

    set: str
    figure: str
    theirs: float
    ours: float
    of: int
    """Samples, or captions, that it is the share of; 0: of no such share."""


class Found(NamedTuple):
    """What the programs took in each turn, and what they found."""

    theirs: list[Seconds]
    first: list[Seconds]
    """Ours, with an empty cache."""
    again: list[Seconds]
    """With the embeddings of the first: `fresh=true`."""
    known: list[Seconds]
    """With its results."""
    start: list[Seconds]
    """Imports, and opening the model."""
    resized: list[Apart]
    fitting: list[Apart]
    """The same images, resized beforehand to what the model reads."""


def run_suite(size: SuiteSize, folder: Path) -> Found:
    """Both programs in turns, one thread each, fp32, batches of 64."""
    folder = (peer.ROOT / folder / "suite").resolve()
    model = make_model(size, folder / "model")
    made = folder / f"sets_{size.photos}_{size.drawings}_{size.classes}_{size.templates}"
    if not (made / "complete").exists():
        write_sets(size, made)
        (made / "complete").touch()
    variables = peer.environment("clip_benchmark") | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    run = Programs(size, folder, model, variables)
    seconds: dict[str, list[Seconds]] = {key: [] for key in ("theirs", "first", "again", "known", "start")}
    for turn in range(size.turns):
        sides = (["theirs"], ["first", "again", "known", "start"])
        for key in itertools.chain(*(sides if turn % 2 == 0 else reversed(sides))):
            seconds[key].append(run(key, made))
            print(f"  {key:7} {seconds[key][-1].wall:.1f} ({seconds[key][-1].cpu:.1f}) s", flush=True)
    resized = run.apart(made)
    fitting = folder / "fitting"
    preprocessing = json.loads((model / "open_clip_config.json").read_text())["preprocess_cfg"]
    fit_sets(
        made,
        fitting,
        EvalTransform(*(preprocessing[key] for key in ("size", "resize_mode", "interpolation"))),
    )
    run("theirs", fitting)
    run("first", fitting)
    return Found(**seconds, resized=resized, fitting=run.apart(fitting))


class Programs:
    """The two, each in a process of its own."""

    def __init__(self, size: SuiteSize, folder: Path, model: Path, variables: Mapping[str, str]) -> None:
        self.size, self.folder, self.model, self.variables = size, folder, model, dict(variables)

    def __call__(self, key: str, sets: Path) -> Seconds:
        """Run one, and wait: seconds of it and of all its processes. RuntimeError where it fails."""
        if key == "theirs":
            return self._timed(
                key, ["-m", "clip_benchmark.cli", *self._their_arguments(sets)], self.variables
            )
        if key == "start":
            code = "import sys; from eval import suite; suite.load(sys.argv[1])"
            command = ["-c", code, str(self.model)]
        else:
            if key == "first":
                for old in ("cache", "ours"):
                    shutil.rmtree(self.folder / old, ignore_errors=True)
            command = ["-m", "eval.suite", *self._our_arguments(sets)] + ["fresh=true"] * (key == "again")
        return self._timed(key, command, self.variables | {"PYTHONPATH": str(peer.ROOT)})

    def _timed(self, key: str, arguments: list[str], variables: Mapping[str, str]) -> Seconds:
        log = self.folder / f"{key}.log"
        before, wall = _cpu_of_children(), time.perf_counter()
        with log.open("w") as out:
            ended = subprocess.run(
                [sys.executable, *arguments],
                env=variables,
                cwd=peer.ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        if ended.returncode:
            raise RuntimeError(f"{key} ended with {ended.returncode}; its output is in {log}")
        return Seconds(time.perf_counter() - wall, _cpu_of_children() - before)

    def _their_arguments(self, sets: Path) -> list[str]:
        return [
            *("eval", "--quiet", "--no_amp", "--batch_size", "64", "--num_workers", str(self.size.workers)),
            *("--dataset", *(f"wds/{name}" for name in CLASSIFICATION + RETRIEVAL)),
            *("--dataset_root", f"{sets}/{{dataset}}", "--output", f"{self.folder}/theirs_{{dataset}}.json"),
            *("--recall_k", *map(str, KS), "--pretrained_model", f"local-dir:{self.model},"),
        ]

    def _our_arguments(self, sets: Path) -> list[str]:
        common = {"batch": 64, "workers": self.size.workers}
        names = {
            name: {"kind": "classification", "data": str(sets / name)} | common for name in CLASSIFICATION
        }
        pairs = {"kind": "retrieval", "equal_captions": False} | common  # as theirs counts
        config = {"sets": names | {name: pairs | {"data": str(sets / name)} for name in RETRIEVAL}}
        path = self.folder / "suite.yaml"
        path.write_text(json.dumps(config))  # YAML too
        return [
            str(path),
            f"model={self.model}",
            f"out={self.folder}/ours/suite.json",
            f"cache={self.folder}/cache",
        ]

    def apart(self, sets: Path) -> list[Apart]:
        """All figures that the last run of each has found on these sets."""
        ours = json.loads((self.folder / "ours" / "suite.json").read_text())["figures"]
        found = []
        for name in CLASSIFICATION + RETRIEVAL:
            metrics: dict[str, float] = json.loads((self.folder / f"theirs_{name}.json").read_text())[
                "metrics"
            ]
            for key, theirs in metrics.items():
                of = ours[name]["captions" if key.startswith("image_retrieval") else "samples"]
                figure = OURS[key]
                found.append(
                    Apart(
                        name, figure, theirs, ours[name][figure], 0 if figure == "mean_per_class" else int(of)
                    )
                )
        return found


def make_model(size: SuiteSize, folder: Path) -> Path:
    """A folder that open_clip opens."""
    shutil.rmtree(folder, ignore_errors=True)
    if size.model is not None:
        from mm.export import ExportConfig, run

        run(ExportConfig(model=size.model, out=folder, format="open_clip"))
        return folder
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    described = {"model_cfg": open_clip.get_model_config(NAME), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def write_sets(size: SuiteSize, folder: Path) -> None:
    """The five sets."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    from mm.data import make

    emoji = make.ensure("emoji", peer.ROOT / "build" / "bench" / "emoji")
    print(f"making sets in {folder}", flush=True)
    for name, source in (
        ("categories", "test_categories"),
        ("concepts", "test_concepts"),
        ("flickr8k", "test_both"),
    ):
        samples = _spread(ShardSet(str(emoji / source / "test")), size.drawings)
        _write(folder / name, ({**sample.members, "png": _opaque(sample)} for sample in samples))
        for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
            shutil.copy(emoji / source / file, folder / name / file)
    drawn = ShardSet(str(emoji / "test_source" / "test"))
    names = (emoji / "test_source" / "classnames.txt").read_text().splitlines()[: size.classes]
    whole, rng = photos.mosaic(), random.Random(0)
    known = [sample for sample in drawn if int(sample.members["cls"]) < len(names)]
    for name in ("photos", "mscoco_captions"):
        _write(
            folder / name, (_photograph(sample, names, whole, rng) for sample in _spread(known, size.photos))
        )
    templates = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES[: size.templates]]
    (folder / "photos" / "classnames.txt").write_text("\n".join(names))
    (folder / "photos" / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    for name in RETRIEVAL:
        (folder / name / "dataset_type.txt").write_text("retrieval")


def fit_sets(source: Path, folder: Path, transform: EvalTransform) -> None:
    """The same sets, their images PNGs of the size that a model reads: neither program resizes them."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("test"))
    for name in CLASSIFICATION + RETRIEVAL:
        samples = iter(ShardSet(str(source / name / "test")))
        _write(
            folder / name,
            ({**_without_image(sample), "png": _fitted(sample, transform)} for sample in samples),
        )


def _spread(samples: Any, count: int) -> Iterator[Sample]:
    count = min(count, len(samples))
    return (samples[i * len(samples) // count] for i in range(count))


def _write(folder: Path, samples: Iterator[dict[str, bytes]]) -> None:
    """`test/0.tar`, `1.tar`, ..., SHARDS in all."""
    members = list(samples)
    test = folder / "test"
    with ShardWriter(test, max_samples=-(-len(members) // SHARDS)) as writer:
        for i, one in enumerate(members):
            writer.add(f"{i:06d}", one)
    for number, name in enumerate(writer.sizes):
        (test / name).rename(test / f"{number}.tar")
        (test / name).with_suffix(".idx").unlink()
    (test / "sizes.json").unlink()
    index_shards(str(test))
    (test / "nshards.txt").write_text(f"{len(writer.sizes)}\n")


def _opaque(sample: Sample) -> bytes:
    """A drawing on white: CLIP_benchmark drops the alpha channel."""
    drawing = Image.open(io.BytesIO(decode.image_member(sample))).convert("RGBA")
    return _png(Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB"))


def _photograph(sample: Sample, names: list[str], whole: Image.Image, rng: random.Random) -> dict[str, bytes]:
    """A drawing on a photograph, its class, and captions."""
    behind = Image.open(io.BytesIO(photos.photograph(whole, rng)))
    side = min(behind.size) * 9 // 10
    drawing = Image.open(io.BytesIO(decode.image_member(sample))).convert("RGBA")
    large = drawing.resize((side, side), Image.Resampling.LANCZOS)
    behind.paste(large, ((behind.width - side) // 2, (behind.height - side) // 2), large)
    out = io.BytesIO()
    behind.save(out, "JPEG", quality=photos.QUALITY)
    captions = "\n".join(caption.format(names[int(sample.members["cls"])]) for caption in CAPTIONS)
    return {"jpg": out.getvalue(), "txt": captions.encode(), "cls": sample.members["cls"]}


def _without_image(sample: Sample) -> dict[str, bytes]:
    return {end: data for end, data in sample.members.items() if end not in decode.IMAGE_EXTENSIONS}


def _fitted(sample: Sample, transform: EvalTransform) -> bytes:
    pixels = transform(decode.image(decode.image_member(sample)))
    return _png(Image.fromarray(pixels.permute(1, 2, 0).numpy()))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

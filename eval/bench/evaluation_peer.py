"""The processes of `evaluation`: `python -m eval.bench.evaluation_peer JOB SETTINGS.json OUT.json`.

They run where CLIP_benchmark is installed (`peer.environment("clip_benchmark")`). Its `zero_shot_classifier` and ours
take turns in one process; retrieval has a process for each side, for the sake of its memory.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from eval.bench import parity_data
from eval.bench.measure import in_turns, timed
from mm import metrics, zeroshot
from mm.evaluators.embedding import embedding
from mm.evaluators.store import Store, model_hash
from mm.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower

KS = (1, 5, 10)
TOWERS: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
"""The text tower of open_clip's ViT-B-32; its image tower has no part in this."""


def models(layers: int, folder: Path) -> tuple[TwoTower, Any]:
    """The same model twice, with so many layers in its text tower: ours, and open_clip's."""
    towers = folder / "evaluation_towers.json"
    towers.write_text(json.dumps(TOWERS | {"text_cfg": TOWERS["text_cfg"] | {"layers": layers}}))
    weights = str(parity_data.initial_weights(towers, seed=0))
    tower = {"name": f"open_clip:{towers}", "weights": weights}
    config = TwoTowerConfig.model_validate({"image": tower, "text": tower, "projection": "none"})
    return build_two_tower(config), open_clip.create_model(towers.stem, pretrained=weights).eval()


def imagenet(classes: int, templates: int) -> tuple[list[str], list[str]]:
    """So many of ImageNet's 1,000 class names, evenly spread, and of its 80 templates, with a `{c}`."""
    names = [IMAGENET_CLASSNAMES[i * len(IMAGENET_CLASSNAMES) // classes] for i in range(classes)]
    return names, [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES[:templates]]


def classifier(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each turn: `theirs`, `ours`, `repeated` (ours, every name given twice), `again` (ours, a second time:
    from the store of the first); `difference` of the weights at most; `prompts`, and their mean `tokens`.
    """
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    names, templates = imagenet(settings["classes"], settings["templates"])
    weights: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, peer = models(settings["layers"], folder)
        tokenizer = open_clip.get_tokenizer("ViT-B-32")
        digest = model_hash(model)

        def ours(key: str, names: list[str], store: bool = False) -> None:
            with embedding(model, store=Store(folder / "store", digest) if store else None) as embed:
                weights[key] = zeroshot.classifier(
                    names, templates, lambda texts: embed.texts(texts, settings["batch"])
                )

        def theirs(names: list[str] = names) -> None:
            weights["theirs"] = zero_shot_classifier(peer, tokenizer, names, templates, "cpu", amp=False).T

        runs: dict[str, Callable[[], None]] = {
            "theirs": theirs,
            "ours": lambda: ours("ours", names),
            "repeated": lambda: ours("repeated", [*names, *names]),
            "again": lambda: ours("again", names, store=True),
        }
        theirs(names[:1])
        ours("again", names, store=True)
        seconds = in_turns(list(runs.values()), settings["turns"], warmup=0)
    weights["repeated"], twin = weights["repeated"].chunk(2)
    assert torch.equal(weights["repeated"], twin)
    prompts = [zeroshot.prompt(template, name) for name in names for template in templates]
    return dict(zip(runs, seconds, strict=True)) | {
        "difference": max(
            float((weights[key] - weights["theirs"]).abs().max()) for key in ("ours", "repeated", "again")
        ),
        "prompts": len(prompts),
        "tokens": statistics.mean(len(model.text.tokenizer(prompt)) for prompt in prompts),
    }


def features(settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of images (I, D), of captions (I * C, D), those of an image side by side, and the image of each.

    A caption is its image and a random direction that is `noise` times as long. Nothing larger than the result is held.
    """
    generator = torch.Generator().manual_seed(0)
    images, captions, dim = settings["images"], settings["captions"], settings["dim"]
    image = torch.empty(images, dim).normal_(generator=generator)
    image /= image.norm(dim=1, keepdim=True)
    text = torch.empty(images, captions, dim).normal_(generator=generator)
    text *= settings["noise"] / text.norm(dim=2, keepdim=True)
    text += image[:, None]
    text /= text.norm(dim=2, keepdim=True)
    return image, text.flatten(0, 1), torch.arange(images).repeat_interleave(captions)


def recall_ours(settings: dict[str, Any]) -> dict[str, Any]:
    """`measured` recall of `mm.metrics`."""
    image, text, image_of_text = features(settings)

    def run() -> dict[str, float]:
        to_text, to_image = metrics.retrieval_recall(image, text, image_of_text, KS)
        return {f"text@{k}": to_text[k] for k in KS} | {f"image@{k}": to_image[k] for k in KS}

    return measured(run)


def recall_theirs(settings: dict[str, Any]) -> dict[str, Any]:
    """`measured` recall of CLIP_benchmark; the embeddings are there already, so that its model does nothing."""
    from clip_benchmark.metrics import zeroshot_retrieval

    image, text, _ = features(settings)
    captions = settings["captions"]

    class Rows:
        """Images and texts are their own embeddings."""

        @staticmethod
        def encode_image(rows: Tensor) -> Tensor:
            return rows

        encode_text = encode_image

    def loader() -> Iterator[tuple[Tensor, list[range]]]:
        for places in torch.arange(len(image)).split(settings["batch"]):
            yield image[places], [range(i * captions, (i + 1) * captions) for i in places.tolist()]

    def tokenize(numbers: list[int]) -> Tensor:
        return text[numbers]

    def run() -> dict[str, float]:
        found = zeroshot_retrieval.evaluate(
            Rows, loader(), tokenize, "cpu", amp=False, recall_k_list=list(KS)
        )
        return {f"{to}@{k}": found[f"{to}_retrieval_recall@{k}"] for to in ("text", "image") for k in KS}

    return measured(run)


def measured(run: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """`seconds` of one call, `bytes` that it held beyond what was there before, and its `figures`."""
    found: dict[str, float] = {}
    before = peak()
    seconds = timed(lambda: found.update(run()))
    return {"seconds": seconds, "bytes": peak() - before, "figures": found}


def peak() -> int:
    """The most bytes that this process has held. (`ru_maxrss` of a child begins with that of its parent.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "classifier": classifier,
    "recall_ours": recall_ours,
    "recall_theirs": recall_theirs,
}


def main(job: str, settings: Path, out: Path) -> None:
    out.write_text(json.dumps(JOBS[job](json.loads(settings.read_text()))))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

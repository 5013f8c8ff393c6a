"""Compositional choice: which text belongs to which image, among a few that differ in little.

A sample is one of

- n images and n texts, the i-th image with the i-th text (Winoground, Thrush et al. 2022, arXiv:2204.03162: n = 2);
- an image and n texts, the first of which is right (SugarCrepe, Hsieh et al. 2023, arXiv:2306.14610; ARO, Yuksekgonul
  et al. 2023, arXiv:2210.01936), or a text and n images, likewise;
- a cue and n images, k of which go with it (WinoGAViL, Bitton et al. 2022, arXiv:2207.12576).

Its images are the members `0.jpg 1.jpg ...`, or `image0.png image1.png ...`, `image_0.png ...`, from 0 or from 1, of any
format of images; or the one that has no number (`jpg`), as CLIP_benchmark writes it. Its texts are the lines of `txt`,
as of any captions; a cue is in `json`: `{"cue": text, "associations": [0, 3]}`, the images that go with it, counted from
0.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mm import metrics
from mm.data import decode, fields
from mm.data.decode import BadSample
from mm.data.questions import read_json
from mm.data.shards import Sample
from mm.evaluators.distinct import FactReading, distinct_images, read_facts
from mm.evaluators.embedding import Embedder
from mm.evaluators.labels import group_names
from mm.evaluators.outcome import MANY, Outcome, content_hash, slice_name, together, totals
from mm.evaluators.passes import Facts, usable
from mm.evaluators.sets import SetConfig
from mm.metrics.bootstrap import Floats, Sampled, sampled

LONGEST_CUE = 200  # characters


class ChoiceConfig(SetConfig):
    """A few images and texts, of which those that belong together are to be found."""

    kind: Literal["choice"] = "choice"
    """Compositional choice (Winoground, SugarCrepe, ARO, WinoGAViL), by the towers."""
    by: str | None = Field(None, pattern=r"^json:.+$")
    """A field of the samples, `json:NAME`: every figure is given for each of its values too (`accuracy_VALUE`)."""


class ChoiceReading(FactReading):
    """The texts of a sample, and which of its images go with the cue where it has one."""

    def read(self, sample: Sample, facts: Facts) -> None:
        """Adds texts, right (places of images; of a cue alone) and json."""
        facts |= {"texts": [], "right": [], "json": None}
        images = len(facts["images"])
        if not images:
            return
        try:
            given = read_json(sample) if "json" in sample.members else {}
            facts["json"] = fields.short(given)
            if "cue" in given:
                facts["texts"], facts["right"] = _association(given, images)
            else:
                facts["texts"] = decode.captions(sample)
                _check_numbers(images, len(facts["texts"]))
        except BadSample as error:
            facts["problems"]["texts"] = error.reason


def choice(embed: Embedder, config: ChoiceConfig) -> Outcome:
    """Figures, of the samples that have them:

    - n images and n texts: text_score (of every image its text is the nearest), image_score (of every text its image is)
      and group_score (both); CLIP_benchmark's text_acc, image_acc and acc;
    - one image or one text: accuracy (of the several others the first is the nearest);
    - a cue: jaccard (of the k images that go with it and the k nearest to it).

    A tie is no hit, so that a model to which all is alike has 0. (CLIP_benchmark takes the first of equals, and that is
    the right one where there is one image.) With `by` each figure of every value, `NAME_VALUE`. Beside them what a
    random order has: chance, of the accuracy, and `NAME_chance`; samples, bad. Samples of the same images are not
    independent.

    Details: sizes (figures by how many images and texts there are), by, mistakes.
    """
    facts = read_facts(embed, config, ChoiceReading(embed.transform()))
    usable(facts, "texts")
    image, place_of_image = distinct_images(embed, config, facts)
    good = usable(facts, "texts")
    used = [facts[i] for i in good]
    texts = list(dict.fromkeys(text for fact in used for text in fact["texts"]))
    place_of_text = {text: i for i, text in enumerate(texts)}
    text = embed.texts(texts, config.batch)

    shapes: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for i, fact in enumerate(used):
        shapes[len(fact["images"]), len(fact["texts"]), len(fact["right"])].append(i)
    scores: dict[str, Floats] = defaultdict(lambda: np.full(len(used), np.nan))
    chances: dict[str, Floats] = defaultdict(lambda: np.full(len(used), np.nan))
    for (images, many, k), members in shapes.items():
        seen = [[place_of_image[one] for one in used[i]["images"]] for i in members]
        said = [[place_of_text[one] for one in used[i]["texts"]] for i in members]
        cosines = _cosines(image, seen, text, said)
        values = nearest(cosines[:, :, 0], [used[i]["right"] for i in members]) if k else matched(cosines)
        for name, value in values.items():
            scores[name][members] = value.double().cpu().numpy()
            chances[name][members] = chance(name, images, many, k)

    units, unit = together([fact["image_id"] for fact in used])
    found = {name: _figure(value, unit) for name, value in scores.items()}
    about = {
        "chance" if name == "accuracy" else f"{name}_chance": float(np.nanmean(value))
        for name, value in chances.items()
    }
    sizes = [f"{len(fact['images'])} x {len(fact['texts'])}" for fact in used]
    details: dict[str, Any] = {"sizes": _table(scores, sizes, "images x texts")}
    if config.by is not None:
        values_of = group_names(used, [config.by])
        found |= _slices(scores, values_of, unit)
        details["by"] = _table(scores, values_of, config.by)
    missed = [scores[name] == 0 for name in ("accuracy", "group_score", "jaccard") if name in scores]
    wrong = np.flatnonzero(np.any(missed, axis=0)).tolist()
    details["mistakes"] = [{key: used[i][key] for key in ("key", "index", "texts")} for i in wrong[:MANY]]
    return Outcome(found, units, about | totals(facts, good), content_hash(used, "texts", "right"), details)


def matched(cosines: Tensor) -> dict[str, Tensor]:
    """Of (S, I, T), I = T or one of them 1: (S,) bools by the name of the figure. Ties and NaN are no hits."""
    _, images, texts = cosines.shape
    if 1 in (images, texts):
        flat = cosines.flatten(1)
        return {"accuracy": flat[:, 0] > flat[:, 1:].amax(1)}
    own = cosines.diagonal(dim1=1, dim2=2)
    others = cosines.masked_fill(torch.eye(images, dtype=torch.bool, device=cosines.device), -torch.inf)
    text, image = (own > others.amax(2)).all(1), (own > others.amax(1)).all(1)
    return {"text_score": text, "image_score": image, "group_score": text & image}


def nearest(cosines: Tensor, right: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Of (S, I) cosines with a cue and the k places that are right of each: (S,) Jaccard indices of those and the k
    nearest. An image is among these if fewer than k others are at least as near."""
    k = len(right[0])
    rights = torch.tensor(right, device=cosines.device)
    # not (other < own), so that NaN is far from all and before all
    before = (~(cosines[:, None] < cosines[:, :, None])).sum(2) - 1
    hits = (before < k).gather(1, rights).sum(1)
    return {"jaccard": hits.double() / (2 * k - hits)}


def chance(name: str, images: int, texts: int, right: int = 0) -> float:
    """What a figure of one sample is on average if the order of all its cosines is random.

    group_score: with x_1 < ... < x_n on the diagonal, uniform, the other two of each pair (i < j) must lie below x_i:
    n! times the integral of x_1^(2 (n - 1)) ... x_n^0 over 0 < x_1 < ... < x_n < 1, which is (n - 1)! / (2 n - 1)!.
    """
    if name == "jaccard":
        draws = math.comb(images, right)
        ways = {m: math.comb(right, m) * math.comb(images - right, right - m) for m in range(right + 1)}
        return sum(count / draws * m / (2 * right - m) for m, count in ways.items())
    return {
        "accuracy": 1 / max(images, texts),
        "text_score": 1 / texts**images,
        "image_score": 1 / images**texts,
        "group_score": math.factorial(images - 1) / math.factorial(2 * images - 1),
    }[name]


def _cosines(
    image: Tensor, seen: Sequence[Sequence[int]], text: Tensor, said: Sequence[Sequence[int]]
) -> Tensor:
    """(S, I, T) float64 of rows by their places: every sum by itself, so that equal rows have equal cosines."""
    at_image, at_text = (torch.tensor(places, device=image.device) for places in (seen, said))
    chunk = max(1, metrics.CHUNK // (at_image.shape[1] * at_text.shape[1] * image.shape[1]))
    return torch.cat(
        [
            (image[some].double()[:, :, None] * text[others].double()[:, None]).sum(3)
            for some, others in zip(at_image.split(chunk), at_text.split(chunk), strict=True)
        ]
    )


def _association(given: dict[str, Any], images: int) -> tuple[list[str], list[int]]:
    """The cue, and the images that go with it."""
    cue, right = given["cue"], given.get("associations")
    if not isinstance(cue, str) or not 0 < len(cue.strip()) <= LONGEST_CUE:
        raise BadSample(f"cue is not a text of 1 to {LONGEST_CUE} characters: {str(cue)[:40]!r}")
    if (
        not isinstance(right, list)
        or not all(type(i) is int and 0 <= i < images for i in right)
        or not 0 < len(set(right)) == len(right) < images
    ):
        raise BadSample(
            f"associations are not some of the {images} images, counted from 0, each once: {str(right)[:40]}"
        )
    return [cue.strip()], right


def _check_numbers(images: int, texts: int) -> None:
    if images == texts == 1:
        raise BadSample("one image and one text: there is nothing to choose")
    if images != texts and 1 not in (images, texts):
        raise BadSample(f"{images} images and {texts} texts: give as many of both, or one of either")


def _figure(values: Floats, unit: np.ndarray) -> Sampled:
    known = ~np.isnan(values)
    return sampled("mean", values[known], unit=unit[known])


def _slices(scores: dict[str, Floats], groups: Sequence[str], unit: np.ndarray) -> dict[str, Sampled]:
    found = {}
    for group in sorted(set(groups)):
        for name, values in scores.items():
            own = np.where(np.array(groups) == group, values, np.nan)
            if not np.isnan(own).all():
                found[f"{name}_{slice_name(group)}"] = _figure(own, unit)
    return found


def _table(scores: dict[str, Floats], groups: Sequence[str], header: str) -> list[dict[str, Any]]:
    rows = []
    for group in sorted(set(groups)):
        own = np.array(groups) == group
        means = {name: values[own] for name, values in scores.items() if not np.isnan(values[own]).all()}
        row = {name: float(np.nanmean(values)) for name, values in means.items()}
        rows.append({header: group, "samples": int(own.sum())} | row)
    return rows

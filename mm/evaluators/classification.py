"""Classification of images and videos: the class whose prompts are nearest (zero-shot; CLIP, Radford et al. 2021), or
the one that a head names."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mm import metrics, zeroshot
from mm.data.fields import FIELD
from mm.data.lines import read_lines
from mm.errors import UserError
from mm.evaluators import prompts
from mm.evaluators.embedding import Corruption, Embedder, EverythingReading, mean_of_views
from mm.evaluators.labels import class_numbers, group_names, objective, targets
from mm.evaluators.outcome import Outcome, by_key, content_hash
from mm.evaluators.passes import Facts, pass_over, usable
from mm.evaluators.sets import SetConfig, ViewsConfig, beside, folder_classes, open_set
from mm.evaluators.tables import answers, multi_label, single_label
from mm.models.fused import CLIPS
from mm.models.heads import ClassHead


class NamesConfig(SetConfig):
    """Classes that are named by words."""

    classnames: Path | tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers, a file with one a line, or open_clip:imagenet; null: the set's
    classnames.txt, or the names of its folders."""
    templates: Path | tuple[str, ...] | None = None
    """Prompts with `{}` or `{c}` for the name, a file with one a line, open_clip:imagenet (80 prompts) or
    open_clip:imagenet_simple (7), or a JSON file with prompts for each name; null: the set's
    zeroshot_classification_templates.txt, or else the name alone."""
    label: str = Field("cls", pattern=rf"^({FIELD})$")
    """Where the class of a sample stands: `cls`, `npy:2` (a column of its `.npy`), `json:NAME` (a number, or the
    name of a class)."""
    objective: str | None = None
    """Of lines such as `race:White`, those of this kind alone are the class names and the templates (FairFace)."""


class JudgedConfig(NamesConfig):
    """What is told apart by words, or by a head."""

    head: str | None = None
    """A classification head of the model; null: zero-shot, by the class names."""


class ClassificationConfig(JudgedConfig):
    """Images or videos with a class number in `.cls`, named by words."""

    kind: Literal["classification"] = "classification"
    """Zero-shot classification, or by a head."""
    video: ViewsConfig | None = None
    """The samples are videos, looked at like this ({}: once); null: images."""
    labels: Literal["auto", "single", "multi"] = "auto"
    """`multi`: an image shows any number of classes, `.npy` holds a 0 or 1 for each; `auto`: as the set's
    dataset_type.txt says, else single."""
    groups: tuple[str, ...] = ()
    """Fairness: fields (`npy:0`, `json:NAME`) whose values together name the group of a sample; the figures then have
    the worst group and the gap to the best, and the details all groups."""
    group_names: tuple[str, ...] = ()
    """What the numbers of the one field of `groups` mean, for the reader."""
    ignore_groups: tuple[str, ...] = ()
    """Groups that no figure is made of (FMoW: the region Other)."""


class Judged(NamedTuple):
    """Logits of samples that can be used."""

    logits: Callable[[], Iterator[Tensor]]
    """(N, C) in pieces: cosines times the model's factor, or the head's logits."""
    facts: list[Facts]
    bad: int
    names: list[str]


def classification(embed: Embedder, config: ClassificationConfig) -> Outcome:
    """Figures: accuracy, accuracy@5 (where there are at least 5 classes), mean_per_class, f1_macro, ece; with groups
    worst_group and group_gap (and of the top 5, `..@5`); of several labels an image mean_average_precision. Beside
    them chance (of the accuracy 1 / classes; of the mean average precision the mean share of positives), majority (the
    share of the commonest class); classes, samples, bad.

    Details: per_class, confusions, calibration, groups, mistakes.
    """
    multi = config.labels == "multi" or (config.labels == "auto" and is_multilabel(config))
    judged = judge(embed, config, needed_fields(config, multi), video=config.video)
    data = content_hash(judged.facts, "label", "npy" if multi or ":" in config.label else "label")
    if multi:
        truth = targets(judged.facts, len(judged.names))
        found = multi_label(torch.cat(list(judged.logits())), truth, judged.names)
    else:
        labels = class_numbers(judged.facts, config.label, judged.names)
        groups = group_names(judged.facts, config.groups, config.group_names) if config.groups else None
        said = answers(judged.logits(), labels, len(judged.names))
        found = single_label(said, labels, judged.names, judged.facts, groups, config.ignore_groups)
    sampled, about, details = found
    counts = {"samples": len(judged.facts), "bad": judged.bad}
    return Outcome(sampled, by_key(judged.facts), about | counts, data, details)


def judge(
    embed: Embedder,
    config: JudgedConfig,
    needed: Sequence[str],
    video: ViewsConfig | None = None,
    corruption: Corruption | None = None,
) -> Judged:
    """What the model says of the samples of a set whose image and `needed` facts can be used. Collective."""
    by = _by_words if config.head is None else _by_head
    return by(embed, config, needed, video, corruption)


def class_names(config: NamesConfig) -> list[str]:
    """Names of the classes; none where the set has none."""
    folders = folder_classes(config)
    names = prompts.names(config.classnames, beside(config, "classnames.txt")) or folders
    if folders and len(names) != len(folders):
        raise UserError(
            f"there are {len(names)} class names, and {len(folders)} folders of images in {config.data}: the names must "
            "be those of the folders, in their order"
        )
    return objective(names, config.objective)


def classifier(embed: Embedder, config: NamesConfig, names: list[str]) -> Tensor:
    """(C, D) unit rows of the class names in the set's prompts. Collective."""
    default = beside(config, "zeroshot_classification_templates.txt")
    texts = prompts.prompts(names, config.templates, default, config.objective)
    return zeroshot.of_prompts(texts, lambda texts: embed.texts(texts, config.batch))


def needed_fields(config: NamesConfig, multi: bool = False) -> list[str]:
    """Facts that a sample must have for its label to be known."""
    kind = "npy" if multi else config.label.partition(":")[0]
    return ["label" if kind == "cls" else kind]


def is_multilabel(config: SetConfig) -> bool:
    """Whether CLIP_benchmark's dataset_type.txt says that an image of a set has several labels."""
    path = beside(config, "dataset_type.txt")
    return path is not None and read_lines(path) == ["multilabel"]


def _by_words(
    embed: Embedder,
    config: JudgedConfig,
    needed: Sequence[str],
    video: ViewsConfig | None,
    corruption: Corruption | None,
) -> Judged:
    names = class_names(config)
    if not names:
        raise UserError(f"no class names: give `classnames`, or put a classnames.txt into {config.data}")
    image, facts, bad = embed.images(config, video, corruption).usable(*needed)
    weights = classifier(embed, config, names)
    factor, _ = embed.scale()
    pieces = image.split(max(1, metrics.CHUNK // len(weights)))
    return Judged(lambda: (metrics.scores_of(some, weights) * factor for some in pieces), facts, bad, names)


def _by_head(
    embed: Embedder,
    config: JudgedConfig,
    needed: Sequence[str],
    video: ViewsConfig | None,
    corruption: Corruption | None,
) -> Judged:
    """The head's logits, of videos the logarithm of the mean over views of the probabilities (TSN, Wang et al. 2016)."""
    head = embed.head(ClassHead, config.head)
    names = class_names(config)
    if names and names != head.classes:
        raise UserError(
            f"the classes of {config.data} ({len(names)}: {', '.join(names[:3])}, ...) are not those that head "
            f"{config.head} was trained on ({len(head.classes)}: {', '.join(head.classes[:3])}, ...)"
        )
    views = embed.views(video)
    reads_video = bool(CLIPS.keys() & set(head.modalities))
    if reads_video != (views is not None):
        raise UserError(
            f"head {config.head} reads {head.modalities[0]}: "
            + ("give the set `video: {}`" if reads_video else "leave `video` of the set out")
        )

    def compute(batch: dict[str, Tensor], facts: list[Facts]) -> Tensor:
        logits = head(embed.features(batch, head.modalities))
        return logits if views is None else mean_of_views(logits.softmax(1), views.number).log()

    reading = EverythingReading(embed.transform(), views, corruption)
    rows, facts = pass_over(config, open_set(config), reading, compute)
    good = usable(facts, *needed)
    return Judged(lambda: iter([rows[good]]), [facts[i] for i in good], len(facts) - len(good), head.classes)

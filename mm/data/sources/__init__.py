"""Data that anyone can get, one file a source."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.sources import (
    classes,
    easy_vqa,
    emoji,
    emoji_questions,
    fluent_anim,
    karpathy,
    moving_emoji,
    nlvr2,
    openclipart,
    videos,
    vqa,
)
from mm.data.sources.output import Report, SourceConfig


class Source(NamedTuple):
    """How a source is made: its keys, and the function that writes it into a folder."""

    config: type[SourceConfig]
    write: Callable[[Any, Path], Report]
    about: str


SOURCES: dict[str, Source] = {
    "emoji": Source(
        emoji.EmojiConfig,
        emoji.write,
        "1,900 emoji by two artists, concepts held out (pip packages; more artists from npm)",
    ),
    "emoji_questions": Source(
        emoji_questions.EmojiQuestionsConfig,
        emoji_questions.write,
        "questions and statements about emoji on canvases, by two artists (pip packages)",
    ),
    "easy_vqa": Source(
        easy_vqa.EasyVqaConfig,
        easy_vqa.write,
        "questions about the shape and color of a figure (pip package, MIT)",
    ),
    "openclipart": Source(
        openclipart.OpenclipartConfig,
        openclipart.write,
        "drawings with titles and keywords, cleaned (Debian package, public domain)",
    ),
    "vqa": Source(
        vqa.VqaConfig,
        vqa.write,
        "questions about images: VQA v1 and v2, OK-VQA, GQA, VizWiz, TextVQA, or rows of yours",
    ),
    "karpathy": Source(
        karpathy.KarpathyConfig,
        karpathy.write,
        "captioned images of a Karpathy split: COCO, Flickr30k, Flickr8k",
    ),
    "nlvr2": Source(
        nlvr2.Nlvr2Config, nlvr2.write, "NLVR2: sentences that are true or false of two photographs"
    ),
    "moving_emoji": Source(
        moving_emoji.MovingEmojiConfig,
        moving_emoji.write,
        "clips of emoji whose class is in the order of the frames alone (pip packages)",
    ),
    "videos": Source(
        videos.VideosConfig,
        videos.write,
        "labelled or captioned videos: Kinetics, UCF101, HMDB51, Something-Something, MSR-VTT, folders",
    ),
    "fluent_anim": Source(
        fluent_anim.FluentAnimConfig,
        fluent_anim.write,
        "animated people in 16 actions, of which one frame shows which (npm, 197 MB, MIT)",
    ),
    "classes": Source(
        classes.ClassesConfig, classes.write, "labelled images: a folder for each class, as ImageNet"
    ),
}

"""Questions about images as they were published -> a sample a question: VQA v1 and v2, OK-VQA, GQA, VizWiz, TextVQA,
and rows of your own. The format is found out from what the files hold: see vqa_formats.

The folder also gets `answers.json`, how many questions each normalised answer has.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mm.data.sources import vqa_formats
from mm.data.sources.annotations import annotation_files, read_annotations, shown
from mm.data.sources.images import ImageReader, ImagesConfig, Item, Names, refuse_nothing, write_shards
from mm.data.sources.output import Report, by_hash


class VqaConfig(ImagesConfig):
    """Questions about images, a sample a question: VQA v1 and v2, OK-VQA, GQA, VizWiz, TextVQA, or your own rows."""

    questions: Path | tuple[Path, ...]
    """File of questions, folder of such files (GQA's train_all_questions), or a list of these. Your own: JSON lines
    of {"image": path, "question": text, "answer": text}, or "answers", a list of text.
    """
    annotations: Path | tuple[Path, ...] | None = None
    """File or files of the answers, where they lie apart (VQA v1 and v2, OK-VQA); null: none, as of test sets."""


def write(config: VqaConfig, folder: Path) -> Report:
    """Make shards of questions, and `answers.json`, in `folder`."""
    from mm.data.questions import write_answers

    report = Report()
    reader = ImageReader(config, folder, report)
    items = list(_items(config, report))
    items = by_hash(items, (item.name for item in items), config.seed)
    answers: Counter[str] = Counter()
    images: set[Names] = set()
    unanswered = 0

    def samples() -> Iterator[dict[str, bytes]]:
        nonlocal unanswered
        for item, members in reader.members(items):
            answer = json.loads(item.members["json"]).get("answer")
            images.update(item.images)
            if answer is None:
                unanswered += 1
            else:
                answers[answer] += 1
            yield members

    questions = write_shards(folder, samples(), config.samples_per_shard)
    if not questions:
        refuse_nothing("questions", config.questions, report)
    report.counts |= {"questions": questions, "images": len(images), "different answers": len(answers)}
    if unanswered:
        report.counts["without answers"] = unanswered
    write_answers(folder, answers)
    return report


def _items(config: VqaConfig, report: Report) -> Iterator[Item]:
    """The questions of all files, each id once."""
    from mm.data.decode import LARGEST_TEXT, BadSample
    from mm.data.questions import read_question

    answers = None
    if config.annotations is not None:
        answers = vqa_formats.Answers()
        for path in annotation_files(config.annotations, "annotations"):
            for fault in answers.add(read_annotations(path, report), path):
                report.skip(*fault)
    seen: set[int | str] = set()
    shared: dict[Names, Names] = {}  # many questions are about one image
    row = 0
    for path in annotation_files(config.questions, "questions"):
        for asked in vqa_formats.read(read_annotations(path, report), path, answers):
            row += 1
            if isinstance(asked, vqa_formats.Fault):
                report.skip(*asked)
                continue
            number = row if asked.id is None else asked.id
            name = f"question {shown(number)}"
            if number in seen:
                report.skip(name, "duplicate question id: the first stays")
                continue
            seen.add(number)
            about = {"question_id": number, **asked.about}
            try:
                read_question(about)
                text = json.dumps(about, ensure_ascii=False).encode()
            except BadSample as error:
                report.skip(name, error.reason)
                continue
            except UnicodeError:  # half a character in what nobody reads
                text = json.dumps(about).encode()
            if len(text) > LARGEST_TEXT:
                report.skip(name, f"too long a record: more than {LARGEST_TEXT:,} bytes")
                continue
            names = shared.setdefault(asked.images, asked.images)
            yield Item(name, (names,), {"json": text})
    for fault in answers.unused() if answers is not None else ():
        report.skip(*fault)

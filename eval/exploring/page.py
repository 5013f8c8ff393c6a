"""The tabs of the page: what is typed and dropped there goes through `uploads`, what is found through `show`."""

import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import gradio as gr
from torch import Tensor

from eval.exploring import show, uploads
from eval.exploring.index import Index
from eval.exploring.opened import Opened
from mm.errors import UserError

TITLE = "mm explore"
FEW, MANY = 12, 48  # samples that are shown
WAITING = 32  # questions at a time; the next one is told to come back
TEMPLATES = "a photo of a {}."
NEEDS_DATA = "Start with data=FOLDER (a folder of images, or shards) to search it."

Models = Sequence[tuple[Opened, Index | None]]


def build_page(models: Models, max_upload_mb: int) -> gr.Blocks:
    """The page of one model, or of two to compare; the first has the other tabs."""
    model, index = models[0]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(300, 600)) as page:
        gr.HTML(_head(models, max_upload_mb), js_on_load=None)
        with gr.Tab("Search"):
            _search(model, index)
        with gr.Tab("Classify"):
            _classify(model)
        with gr.Tab("Ask"):
            _ask(model)
        with gr.Tab("Clips"):
            _clips(model, index)
        with gr.Tab("Compare"):
            _compare(models)
        with gr.Tab("Why"):
            _why(model)
    return page.queue(max_size=WAITING, default_concurrency_limit=2, api_open=False)


def told(answer: Callable[..., str]) -> Callable[..., str]:
    """What is found, or why nothing is: a mistake of the user's in its words, ours in the terminal."""

    @wraps(answer)
    def asked(*given: object) -> str:
        try:
            return answer(*given)
        except UserError as error:
            return show.refusal(str(error))
        except Exception:
            traceback.print_exc()
            return show.refusal(
                "this went wrong, and not by your doing: the terminal of eval.explore tells where"
            )

    return asked


def _search(model: Opened, index: Index | None) -> None:
    if index is None:
        gr.HTML(show.note(NEEDS_DATA), js_on_load=None)
        return
    if index.videos:
        gr.HTML(show.note("The set holds videos: the tab Clips searches it."), js_on_load=None)
        return
    found = index

    def by_words(words: str, most: float) -> str:
        return show.hits(found.nearest(model.text_row(uploads.text(words, "query")), _most(most)), found)

    def by_image(data: bytes | None, most: float) -> str:
        return show.hits(found.nearest(model.image_row(uploads.image(data)), _most(most)), found)

    with gr.Row():
        with gr.Column(min_width=280):
            words = _line("Words", "what shall be in the picture")
            ask = gr.Button("Search by words", variant="primary")
            most = gr.Slider(1, MANY, FEW, step=1, label="Results")
        with gr.Column(min_width=280):
            image = _image()
            like = gr.Button("Search by image")
    out = _out()
    _on([ask.click, words.submit], by_words, [words, most], out)
    _on([like.click], by_image, [image, most], out)


def _classify(model: Opened) -> None:
    own = model.classes_of is not None and not model.classes_are_of_clips
    classify = _classifier(model, uploads.image, model.image_row, own)
    given = _beside_labels(_image, own)
    go = gr.Button("Classify", variant="primary")
    _on([go.click], classify, given, _out())


def _ask(model: Opened) -> None:
    clips = model.asks_of_clips
    read: Callable[[bytes | None], object] = uploads.clip if clips else uploads.image
    if model.answers_of is None and model.writes_of is None:
        gr.HTML(
            show.note(
                f"{model.name} has no head that answers or writes: open a run of configs/finetune/ for questions (VQA) "
                "or captions."
            ),
            js_on_load=None,
        )
        return

    def answer(data: bytes | None, question: str) -> str:
        return show.answer(model.answer(read(data), uploads.text(question, "question")))  # type: ignore[arg-type]

    def caption(data: bytes | None) -> str:
        return show.answer(model.caption(uploads.image(data)))

    seen = _clip() if clips else _image()
    if model.answers_of is not None:
        question = _line("Question", "what colour is it?")
        go = gr.Button("Ask", variant="primary")
    if model.writes_of is not None:
        described = _image() if clips else seen
        write = gr.Button("Describe")
    out = _out()
    if model.answers_of is not None:
        _on([go.click, question.submit], answer, [seen, question], out)
    if model.writes_of is not None:
        _on([write.click], caption, [described], out)


def _clips(model: Opened, index: Index | None) -> None:
    if model.is_graph:
        gr.HTML(
            show.note("ONNX graphs read images and texts: open the run itself for clips."), js_on_load=None
        )
        return
    own = model.classes_are_of_clips
    classify = _classifier(model, uploads.clip, model.clip_row, own)
    given = _beside_labels(_clip, own)
    clip = given[0]
    go = gr.Button("Classify the clip", variant="primary")
    out = _out()
    _on([go.click], classify, given, out)
    if index is None or not index.videos:
        gr.HTML(show.note("Start with data=SHARDS of videos to search them here."), js_on_load=None)
        return
    found = index

    def by_words(words: str) -> str:
        return show.hits(found.nearest(model.text_row(uploads.text(words, "query")), FEW), found)

    def by_clip(data: bytes | None) -> str:
        return show.hits(found.nearest(model.clip_row(uploads.clip(data)), FEW), found)

    words = _line("Words", "what shall happen in the clip")
    with gr.Row():
        ask = gr.Button("Search clips by words")
        like = gr.Button("Search clips by the clip")
    _on([ask.click, words.submit], by_words, [words], out)
    _on([like.click], by_clip, [clip], out)


def _compare(models: Models) -> None:
    if len(models) < 2:
        gr.HTML(show.note("Start with other=MODEL to see two models side by side."), js_on_load=None)
        return

    def classify(data: bytes | None, labels: str, templates: str) -> str:
        pixels = uploads.image(data)
        return show.sides(
            [(one.name, _bars(one, one.image_row(pixels), labels, templates)) for one, _ in models]
        )

    def search(words: str) -> str:
        query = uploads.text(words, "query")
        return show.sides(
            [
                (one.name, show.hits(index.nearest(one.text_row(query), FEW), index))
                for one, index in models
                if index
            ]
        )

    given = _beside_labels(_image, own=False)
    go = gr.Button("Classify with both", variant="primary")
    if models[0][1] is not None:
        words = _line("Words", "what shall be in the picture")
        ask = gr.Button("Search with both")
    else:
        gr.HTML(show.note(NEEDS_DATA), js_on_load=None)
    out = _out()
    _on([go.click], classify, given, out)
    if models[0][1] is not None:
        _on([ask.click, words.submit], search, [words], out)


def _why(model: Opened) -> None:
    if model.is_graph:
        gr.HTML(
            show.note("ONNX graphs have no gradients to explain by: open the run itself."), js_on_load=None
        )
        return

    def of_text(data: bytes | None, words: str, against: str) -> str:
        others = uploads.labels(against) if (against or "").strip() else []
        return show.why(model.why(uploads.image(data), uploads.text(words, "text"), others, question=False))

    def of_question(data: bytes | None, question: str) -> str:
        return show.why(model.why(uploads.image(data), uploads.text(question, "question"), [], question=True))

    questions = model.explains_answers and not model.asks_of_clips
    with gr.Row():
        with gr.Column(min_width=280):
            image = _image()
        with gr.Column(min_width=280):
            words = _line("Text, or question" if questions else "Text", "a red apple")
            against = _line("Rather than (may be empty)", "a green apple, a pear")
    with gr.Row():
        go = gr.Button("Why does the text fit?", variant="primary")
        if questions:
            ask = gr.Button("Why this answer to the question?")
    out = _out()
    _on([go.click], of_text, [image, words, against], out)
    if questions:
        _on([ask.click], of_question, [image, words], out)


def _classifier(
    model: Opened, read: Callable[[bytes | None], Any], row: Callable[[Any], Tensor], own: bool
) -> Callable[..., str]:
    """What classifies an upload among labels that are typed; own: by the model's own classes where none are.

    read: the upload as the model takes it, row: that in the common space.
    """

    def classify(data: bytes | None, labels: str, templates: str) -> str:
        seen = read(data)
        if own and not (labels or "").strip():
            return show.bars(model.own_classes(seen), "probability, by the model's own classifier")
        return _bars(model, row(seen), labels, templates)

    return classify


def _beside_labels(place: Callable[[], gr.File], own: bool) -> list[gr.Component]:
    """A place for an upload, and beside it those for labels and templates."""
    with gr.Row():
        with gr.Column(min_width=280):
            file = place()
        with gr.Column(min_width=280):
            return [file, *_labels(own)]


def _bars(model: Opened, row: object, labels: str, templates: str) -> str:
    found = model.classify(row, uploads.labels(labels), uploads.templates(templates))  # type: ignore[arg-type]
    each = "" if model.bias is None else f" and bias {model.bias:.3g}, each label for itself"
    return show.bars(
        found, f"probability, at the model's own temperature: cosines times {model.scale:.3g}{each}"
    )


def _most(given: float) -> int:
    """How many results: a slider is no promise of what is sent."""
    if not isinstance(given, int | float) or not 1 <= given <= MANY:
        raise UserError(f"results must be 1 to {MANY}")
    return int(given)


def _image() -> gr.File:
    """A place for an image, and below it what was read of the file."""
    file = gr.File(
        label="Image", type="binary", file_types=uploads.IMAGES, height=150, elem_classes="mm-file"
    )
    seen = _out()

    def preview(data: bytes | None) -> str:
        pixels = uploads.image(data)
        height, width = pixels.shape[-2:]
        looked = show.image(uploads.picture(pixels, 224), "mm-seen", "the image that was read")
        return looked + show.note(f"{width} × {height} pixels")

    _on([file.upload], preview, [file], seen)
    file.clear(lambda: "", None, seen, api_visibility="private")
    return file


def _clip() -> gr.File:
    file = gr.File(label="Clip", type="binary", file_types=uploads.CLIPS, height=150, elem_classes="mm-file")
    seen = _out()

    def preview(data: bytes | None) -> str:
        return show.note(f"{len(uploads.clip(data)):,} bytes of video")

    _on([file.upload], preview, [file], seen)
    file.clear(lambda: "", None, seen, api_visibility="private")
    return file


def _labels(own: bool) -> tuple[gr.Textbox, gr.Textbox]:
    said = "one a line, or with commas" + ("; none: the model's own classes" if own else "")
    labels = gr.Textbox(label="Labels", lines=4, max_lines=10, info=said, placeholder="cat\ndog")
    templates = gr.Textbox(
        TEMPLATES, label="Templates", lines=2, max_lines=6, info="one a line, {} where the label goes"
    )
    return labels, templates


def _line(label: str, example: str) -> gr.Textbox:
    return gr.Textbox(label=label, placeholder=example, lines=1, max_lines=1)


def _out() -> gr.HTML:
    return gr.HTML("", js_on_load=None)


def _on(
    events: Sequence[Callable[..., object]], answer: Callable[..., str], given: list, out: gr.HTML
) -> None:
    for event in events:
        event(told(answer), given, out, api_visibility="private", show_progress="minimal")


def _head(models: Models, max_upload_mb: int) -> str:
    names = " and ".join(show.text(one.name) for one, _ in models)
    index = models[0][1]
    searched = "" if index is None else f"{len(index):,} {'videos' if index.videos else 'images'} indexed; "
    left_out = "" if index is None or not index.left_out else f"{index.left_out:,} could not be read; "
    about = f"{searched}{left_out}files of up to {max_upload_mb} MB; all stays on this machine"
    return f"<h2>{names}</h2>{show.note(about)}"

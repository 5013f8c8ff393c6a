"""Why a model decided so: heat over the image and shares of the words, as a picture (`mm explain`).

By gradient-weighted attention in transformers, LayerCAM in networks of convolutions, and erasure of words; whether it is
right is measured by taking away what was marked (`faithfulness`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import model_validator

from mm.config import Config
from mm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mm.explain.explanation import Explanation
    from mm.models.folder import Model


class ExplainConfig(Config):
    """A model, an image, and what is to be explained: why a text fits, an answer, or a class."""

    model: str
    """A run, its model/ folder, an exported one, or a published model: open_clip:NAME@TAG, transformers:NAME."""
    image: Path
    """The image file."""
    text: str | None = None
    """A text: why the image and it are near."""
    against: list[str] = []
    """Other texts: why the image is nearer to `text` than to these."""
    question: str | None = None
    """A question, for a model that answers: why it answers so."""
    answer: str | None = None
    """The answer to explain; null: the one that it gives."""
    label: str | None = None
    """The class to explain, for a model with a classifier; null: the one that it finds."""
    head: str | None = None
    """The head that answers or classifies, where a model has several."""
    out: Path = Path("explanation.png")
    """The picture to write."""

    @model_validator(mode="after")
    def _one_thing(self) -> "ExplainConfig":
        asked = [key for key in ("text", "question", "label") if getattr(self, key) is not None]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} are given: explain one of them at a time")
        for key, of in (("against", "text"), ("answer", "question")):
            if getattr(self, key) and getattr(self, of) is None:
                raise ValueError(f"{key} belongs to {of}, which is not given")
        return self


def run(config: ExplainConfig) -> "Explanation":
    """Explain, print what the words count and what the score loses without the marked pixels, and write the picture.

    Raises UserError: the model cannot do what is asked, the image is none, or the picture cannot be written.
    """
    from mm.explain.faithfulness import faithfulness, word_faithfulness
    from mm.explain.picture import draw
    from mm.files import write_atomically
    from mm.models.opening import open_model

    image = read_image(config.image)
    found = explain(open_model(config.model), image, config)
    out = config.out.expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, draw(found))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    print(f"{found.what} {found.score:.4f}")
    if found.words:
        print("words: " + ", ".join(f"{word} {share:.0%}" for word, share in found.words))
    if len(found.words) > 1:
        words = word_faithfulness(found)
        print(
            f"all words {words.whole:.4f}, none {words.nothing:.4f}; on average, those of the largest shares away first "
            f"{words.deletion:.4f} (in random orders {words.random_deletion:.4f})"
        )
    test = faithfulness(found)
    print(
        f"whole image {test.whole:.4f}, blurred {test.nothing:.4f}; on average, the marked pixels blurred first "
        f"{test.deletion:.4f} (as many elsewhere {test.random_deletion:.4f}), brought back first "
        f"{test.insertion:.4f} ({test.random_insertion:.4f})"
    )
    print(out)
    return found


def explain(model: "Model", image: "Tensor", config: ExplainConfig) -> "Explanation":
    """What `config` asks of an image, uint8 (3|4, H, W)."""
    from mm.explain.explanation import explain_answer, explain_class, explain_text

    if config.text is not None:
        return explain_text(model, image, config.text, config.against)
    if config.question is not None:
        return explain_answer(model, image, config.question, config.answer, config.head)
    if not model.heads:
        raise UserError(
            f"{config.model} has no head that classifies: give text=..., to explain why the image is near to it"
        )
    return explain_class(model, image, config.label, config.head)


def read_image(path: Path) -> "Tensor":
    """An image file, uint8 (3|4, H, W). UserError for what is none."""
    from mm.data import decode

    try:
        return decode.image(path.expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except decode.BadSample as error:
        raise UserError(f"{path}: {error.reason}") from None

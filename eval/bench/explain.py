"""Whether explanations mark what a score rests on, on real data: `python -m eval.bench.explain model=RUN data=SET`.

For images of a set and their captions the deletion and insertion test (`mm.explain.faithfulness`): what the score loses
on average while the marked pixels are blurred first, beside as many pixels elsewhere, what it gains while they are
brought back first, and, for captions of three words or more, what it loses while the marked words are left out first,
beside random orders. Left out is what loses nothing when all of it is taken away: no part of that can matter. With
`questions=true` the set holds questions, and answers are explained.
"""

import statistics

from pydantic import Field

from eval.models import load
from mm import program
from mm.config import Config, parse
from mm.data import decode
from mm.data.questions import question
from mm.data.shards import Sample
from mm.evaluators.sets import SetConfig, open_set
from mm.explain.explanation import Explanation, explain_answer, explain_text
from mm.explain.faithfulness import faithfulness, word_faithfulness
from mm.models.folder import Model

FEWEST_WORDS = 3


class ExplainBenchConfig(Config):
    """A model, and images with captions."""

    model: str = "runs/demo"
    """As eval.suite takes it."""
    data: str = "data/emoji/val"
    """A set with captions."""
    split: str = "test"
    """Its part."""
    questions: bool = False
    """Explain the answers to its questions, in place of its captions."""
    samples: int = Field(40, ge=2)
    """So many, spread evenly over the set."""
    draws: int = Field(4, ge=1)
    """Other places of each heat that it is compared with."""


def measure(config: ExplainBenchConfig) -> dict[str, list[float]]:
    """By image: what deletion and insertion of pixels gain over as many elsewhere, and deletion of words over random
    orders, as shares of what whole images (texts) have over blurred (empty) ones on average."""
    model, samples = load(config.model), open_set(SetConfig(data=config.data, split=config.split))
    pixels, words = [], []
    for i in range(config.samples):
        explained = explanation(model, samples[i * len(samples) // config.samples], config.questions)
        seen = faithfulness(explained, seed=i, draws=config.draws)
        pixels += [seen] * (seen.whole > seen.nothing)
        if len(explained.words) >= FEWEST_WORDS:
            read = word_faithfulness(explained, seed=i, draws=config.draws)
            words += [read] * (read.whole > read.nothing)
    span = statistics.mean(one.whole - one.nothing for one in pixels)
    found = {
        "deletion": [(one.random_deletion - one.deletion) / span for one in pixels],
        "insertion": [(one.insertion - one.random_insertion) / span for one in pixels],
    }
    if len(words) > 1:
        span = statistics.mean(one.whole - one.nothing for one in words)
        found["words"] = [(one.random_deletion - one.deletion) / span for one in words]
    return found


def explanation(model: Model, sample: Sample, asked: bool) -> Explanation:
    """Of the caption of a sample, or of the answer to its question."""
    image = decode.image(decode.image_member(sample))
    if asked:
        return explain_answer(model, image, question(sample).text)
    return explain_text(model, image, decode.captions(sample)[0])


def main(argv: list[str]) -> None:
    config = parse(ExplainBenchConfig, argv, "eval.bench.explain")
    print(f"{config.model} on {config.data}, {config.samples} images")
    for name, gains in measure(config).items():
        error = statistics.stdev(gains) / len(gains) ** 0.5
        better = sum(gain > 0 for gain in gains) / len(gains)
        print(
            f"{name:9} {statistics.mean(gains):+.3f} ± {error:.3f} of the score; better in {better:.0%} of {len(gains)}"
        )


if __name__ == "__main__":
    program.run(main)

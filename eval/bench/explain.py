"""Whether explanations mark what a score rests on, on real data: `python -m eval.bench.explain model=RUN data=SET`.

For images of a set and their captions the deletion and insertion test (`mm.explain.faithfulness`): what the score loses
on average while the marked pixels are blurred first, beside as many pixels elsewhere, and what it gains while they are
brought back first.
"""

import statistics

from pydantic import Field

from eval.models import load
from mm import program
from mm.config import Config, parse
from mm.data import decode
from mm.evaluators.sets import SetConfig, open_set
from mm.explain.explanation import explain_text
from mm.explain.faithfulness import faithfulness


class ExplainBenchConfig(Config):
    """A model, and images with captions."""

    model: str = "runs/demo"
    """As eval.suite takes it."""
    data: str = "data/emoji/val"
    """A set with captions."""
    split: str = "test"
    """Its part."""
    samples: int = Field(40, ge=2)
    """So many, spread evenly over the set."""
    draws: int = Field(4, ge=1)
    """Other places of each heat that it is compared with."""


def measure(config: ExplainBenchConfig) -> dict[str, list[float]]:
    """By image: what deletion and insertion gain over as many pixels elsewhere, as shares of what whole images have
    over blurred ones on average."""
    model, samples = load(config.model), open_set(SetConfig(data=config.data, split=config.split))
    found = []
    for i in range(config.samples):
        sample = samples[i * len(samples) // config.samples]
        image = decode.image(decode.image_member(sample))
        explained = explain_text(model, image, decode.captions(sample)[0])
        found.append(faithfulness(explained, seed=i, draws=config.draws))
    span = statistics.mean(one.whole - one.nothing for one in found)
    return {
        "deletion": [(one.random_deletion - one.deletion) / span for one in found],
        "insertion": [(one.insertion - one.random_insertion) / span for one in found],
    }


def main(argv: list[str]) -> None:
    config = parse(ExplainBenchConfig, argv, "eval.bench.explain")
    print(f"{config.model} on {config.data}, {config.samples} images")
    for name, gains in measure(config).items():
        error = statistics.stdev(gains) / len(gains) ** 0.5
        better = sum(gain > 0 for gain in gains) / len(gains)
        print(
            f"{name:9} {statistics.mean(gains):+.3f} ± {error:.3f} of the score; better in {better:.0%} of the images"
        )


if __name__ == "__main__":
    program.run(main)

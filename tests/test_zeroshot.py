import pytest
import torch
import torch.nn.functional as F

from mm import zeroshot
from mm.errors import UserError


class CountingEncoder:
    """Deterministic unit rows from the characters of a text; remembers what it was asked."""

    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen.append(list(texts))
        return torch.stack([self.one(t) for t in texts])

    def one(self, text):
        g = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31)
        return F.normalize(torch.randn(16, generator=g), dim=0)


TEMPLATES = ["a photo of a {c}.", "a drawing of a {}.", "{c}", "the {c} and the {c}", "a photo of a {}."]


@pytest.mark.parametrize("names", [["cat"], ["cat", "dog", "cat", "red {} bus", "c"]])
@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES])
def test_equals_the_plain_loop(names, templates):
    encode = CountingEncoder()
    weights = zeroshot.classifier(names, templates, encode)
    for name, row in zip(names, weights, strict=True):
        mean = sum(
            encode.one(t.replace("{c}", name) if "{c}" in t else t.replace("{}", name)) for t in templates
        )
        mean = mean / len(templates)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=1e-6)
    (asked,) = encode.seen
    assert len(asked) == len(set(asked)), "a repeated prompt was encoded twice"


def test_a_template_without_a_place_is_named():
    with pytest.raises(UserError, match="a photo"):
        zeroshot.classifier(["cat"], ["a photo"], CountingEncoder())

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mm.data.decode import BadSample, image
from mm.data.shards import Sample
from mm.data.transforms import AugmentConfig, TrainTransform
from mm.tasks.contrastive import PairPreparation, content_id

TRANSFORM = TrainTransform(16, AugmentConfig(scale=(0.3, 1.0), flip=0.5))


class Letters:
    """A tokenizer for which a letter is a token."""

    def __call__(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def pad(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        length = max(map(len, ids))
        padded = torch.tensor([one + [0] * (length - len(one)) for one in ids])
        return padded, padded > 0


def sample(seed: int, text: str = "a cat\nTwo  Cats") -> Sample:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30 + seed, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return Sample(str(seed), "s.tar", {"jpg": out.getvalue(), "txt": text.encode()})


def test_a_pair_is_a_function_of_the_sample_and_the_generator() -> None:
    prepare = PairPreparation(TRANSFORM, Letters(), templates=["{}", "photo: {}"])
    texts = set()
    for seed in range(30):
        item, again = (prepare(sample(seed % 3), random.Random(seed)) for _ in range(2))
        assert torch.equal(item.image, again.image) and item[1:] == again[1:]
        assert item.image_id == content_id(sample(seed % 3).members["jpg"])
        texts.add("".join(map(chr, item.ids)))
        rng = random.Random(seed)
        rng.choice("ab"), rng.choice("ab")
        assert torch.equal(item.image, TRANSFORM(image(sample(seed % 3).members["jpg"]), rng))
    assert texts == {"a cat", "Two  Cats", "photo: a cat", "photo: Two  Cats"}


def test_first_takes_the_first_caption_and_equal_words_have_an_equal_name() -> None:
    prepare = PairPreparation(TRANSFORM, Letters(), captions="first")
    assert all(prepare(sample(0), random.Random(s)).text_id == content_id(b"a cat") for s in range(9))
    assert prepare(sample(0, " A  CAT"), random.Random(0)).text_id == content_id(b"a cat")
    assert 0 <= content_id(b"") < 2**63 and content_id(b"a") != content_id(b"b")


def test_what_cannot_be_used_is_a_bad_sample() -> None:
    prepare = PairPreparation(TRANSFORM, Letters())
    broken = Sample("a", "s.tar", {"jpg": sample(0).members["jpg"][:700], "txt": b"a"})
    for bad in (broken, Sample("a", "s.tar", {"txt": b"a"}), sample(0, " ")):
        with pytest.raises(BadSample):
            prepare(bad, random.Random(0))

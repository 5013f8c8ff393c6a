"""Re-ranking: against judging every pair of a query's best one by one, and the same on any ranks."""

import pytest
import torch

from mm.data.decode import captions as captions_of
from mm.data.shards import ShardSet
from mm.errors import UserError
from mm.evaluators import RetrievalConfig, evaluate
from mm.fusion import FusionConfig
from mm.models.fused import Fused
from mm.tasks.retrieval import MatchingConfig, RetrievalTaskConfig, build_retrieval
from tests import tiny
from tests.dist import run_ranks

TOPS = [1, 3, 1000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rerank")
    tiny.captioned(root / "captions", 14, captions=2)
    return root / "captions"


def build():
    model = tiny.towers()
    torch.manual_seed(1)
    fusion = FusionConfig(width=16, heads=2, layers=1)
    task = build_retrieval(RetrievalTaskConfig(matching=MatchingConfig(fusion=fusion)), tiny.given(model))
    return Fused(model, task.heads).eval()


def figures_of(folder, top, by="sum", batch=8):
    torch.set_num_threads(1)
    config = RetrievalConfig(data=str(folder), workers=0, batch=batch, rerank=top, rerank_by=by)
    return evaluate(build(), {"set": config})["set"]


def plain(folder, top, by):
    """Recall@1 both ways, from every pair judged alone."""
    model = build()
    samples = list(ShardSet(str(folder)))
    pictures = [tiny.given(model.towers).transform(_encoded(s), None) for s in samples]
    texts = [(i, text) for i, s in enumerate(samples) for text in captions_of(s)]
    image, text = model.encode_image(pictures), model.encode_text([t for _, t in texts])
    scores = image @ text.T
    judged = torch.stack([model.match([picture] * len(texts), [t for _, t in texts]) for picture in pictures])
    if by == "sum":
        judged = judged.logit() + model.towers().scale.item() * scores
    found = {}
    for way, rows, logits in (("image_to_text", scores, judged), ("text_to_image", scores.T, judged.T)):
        hits = 0
        for q in range(len(rows)):
            best = rows[q].topk(min(top, rows.shape[1])).indices
            first = int(best[logits[q][best].argmax()])
            owner = (q, texts[first][0]) if way == "image_to_text" else (texts[q][0], first)
            hits += owner[0] == owner[1]
        found[way] = hits / len(rows)
    return found


def _encoded(sample):
    from mm.data.decode import EncodedImage

    return EncodedImage(sample.members["png"])


@pytest.mark.parametrize("by", ["sum", "head"])
@pytest.mark.parametrize("top", TOPS)
def test_the_best_of_each_query_stand_in_a_new_order(folder, top, by):
    found, expected = figures_of(folder, top, by), plain(folder, top, by)
    for way, value in expected.items():
        assert found[f"{way}_recall@1_reranked"] == pytest.approx(value)
        if top == 1:
            assert found[f"{way}_recall@1_reranked"] == found[f"{way}_recall@1"]
        assert found[f"{way}_recall@1_reranked_error"] >= 0


def test_what_is_beyond_the_first_stays_where_it_was(folder):
    found = figures_of(folder, 5)
    for way in ("image_to_text", "text_to_image"):
        # the same five stand first, in another order
        assert found[f"{way}_recall@5_reranked"] == found[f"{way}_recall@5"]
        assert found[f"{way}_recall@10_reranked"] == found[f"{way}_recall@10"]


@pytest.mark.parametrize("ranks", [3])
def test_figures_are_the_same_bits_on_any_ranks(folder, ranks):
    alone = figures_of(folder, 3)
    assert all(figures == alone for figures in run_ranks(figures_of, ranks, folder, 3))


def test_a_model_that_does_not_match_cannot_rerank(folder):
    with pytest.raises(UserError, match="has no MatchingHead; its heads are: none"):
        evaluate(tiny.towers(), {"set": RetrievalConfig(data=str(folder), workers=0, rerank=3)})

"""What is measured of evaluation: both sides get the same, and the rows say whether a bar is met."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from eval.bench import evaluation, evaluation_peer
from eval.bench.evaluation_suite import Apart, Found
from eval.bench.measure import Seconds
from mm import zeroshot


def test_both_have_the_same_text_tower(tmp_path: Path) -> None:
    import open_clip

    ours, theirs = evaluation_peer.models(1, tmp_path)
    names, templates = evaluation_peer.imagenet(3, 2)
    prompts = [zeroshot.prompt(template, name) for template in templates for name in names]
    assert len(set(prompts)) == 6
    with torch.no_grad():
        expected = F.normalize(theirs.encode_text(open_clip.get_tokenizer("ViT-B-32")(prompts)), dim=1)
    assert torch.allclose(ours.encode_text(prompts), expected, atol=1e-6)


@pytest.mark.parametrize("captions", [1, 3])
def test_recall_is_that_of_the_whole_matrix(captions: int) -> None:
    settings = {"images": 40, "captions": captions, "dim": 16, "noise": 2.0}
    image, text, image_of_text = evaluation_peer.features(settings)
    assert torch.allclose(image.norm(dim=1), torch.ones(40))
    assert torch.allclose(text.norm(dim=1), torch.ones(40 * captions))
    found = evaluation_peer.recall_ours(settings)
    scores = image @ text.T
    for k in evaluation_peer.KS:
        to_text = (image_of_text[scores.topk(k, dim=1).indices] == torch.arange(40)[:, None]).any(1)
        to_image = (scores.T.topk(k, dim=1).indices == image_of_text[:, None]).any(1)
        assert found["figures"][f"text@{k}"] == pytest.approx(float(to_text.double().mean()))
        assert found["figures"][f"image@{k}"] == pytest.approx(float(to_image.double().mean()))
    assert 0 < found["figures"]["image@1"] < 1 and found["bytes"] >= 0


def test_rows_tell_what_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 100 * evaluation.MIB
    answers = {
        "classifier": {
            "theirs": [[9, 8], [90, 8]],
            "ours": [[2, 1], [20, 1]],
            "repeated": [[2, 1], [20, 1.01]],
            "again": [[0.2, 0.01], [2, 0.01]],
            "difference": 1e-7,
            "prompts": 800,
            "tokens": 9.0,
        },
        "recall_theirs": {"seconds": [26, 52], "bytes": 7 * held, "figures": {"text@1": 0.25}},
        "recall_ours": {"seconds": [1, 2], "bytes": held, "figures": {"text@1": 0.2502}},
    }
    monkeypatch.setattr(evaluation, "run", lambda job, *_: json.loads(json.dumps(answers[job])))
    rows = evaluation.measure(evaluation.EvaluationConfig(parts=["classifier", "recall", "large"]))
    assert [row.bar for row in rows] == ["E1"] * 4 + ["E2"] * 4
    assert [row.met for row in rows] == [True, True, True, False, True, True, False, True]
    assert rows[0].figure == "4.50x wall, 8.00x CPU" and rows[5].figure == "100 v 700 MiB: 1/7.0"


def test_rows_of_the_suite_count_each_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Found(
        theirs=[Seconds(36, 36)],
        first=[Seconds(12, 10)],
        again=[Seconds(0.5, 0.5)],
        embedded=[Seconds(2.1, 2.1)],
        start=[Seconds(2, 2)],
        pillow=[Seconds(13, 10)],
        apart=[Apart("photos", "accuracy", 0.5, 0.49, 300), Apart("photos", "accuracy@5", 0.7, 0.7, 300)],
        apart_pillow=[Apart("photos", "accuracy", 0.5, 0.50000001, 300)],
    )
    monkeypatch.setattr(evaluation, "run_suite", lambda *_: found)
    rows = evaluation.measure(evaluation.EvaluationConfig(parts=["suite"]))
    assert [row.met for row in rows] == [True, False, False, True, True, True]
    assert rows[0].figure == "3.00x wall, 3.60x CPU" and rows[1].figure == "1.0e-02; 1 of 2 differ"
    assert rows[4].figure == "4.2% wall, 5.0% CPU" and rows[5].asked == ""

import os
from pathlib import Path

import pytest
import torch

from mm.evaluators import ClassificationConfig, RetrievalConfig, outcome
from mm.evaluators.embedding import embedding
from mm.evaluators.store import Store, digest, model_hash
from mm.models.two_tower import TwoTowerConfig, build_two_tower
from tests import test_evaluators, tiny
from tests.dist import run_ranks
from tests.test_evaluators import TinyTwoTower, sets_of

folder = test_evaluators.folder


def figures(folder, store, model=None, **common):
    model = model or TinyTwoTower()
    with embedding(model, store=Store(Path(store), "model") if store else None) as embed:
        found = {name: outcome(embed, one).figures for name, one in sets_of(folder, **common).items()}
    return found, model.calls


def test_what_is_kept_is_not_computed_again(folder, tmp_path):
    plain, _ = figures(folder, None)
    first, calls = figures(folder, tmp_path / "store")
    assert first == plain and calls
    again, calls = figures(folder, tmp_path / "store")
    assert again == plain and not [call for call in calls if call[0] in ("image", "text")]


@pytest.mark.parametrize("change", [{"limit": 20}, {"batch": 3}])
def test_other_rows_are_other_entries(folder, tmp_path, change):
    figures(folder, tmp_path / "store")
    found, calls = figures(folder, tmp_path / "store", **change)
    for name, plain in figures(folder, None, **change)[0].items():
        # a text's row may come from a batch of other texts: other roundings
        assert found[name] == pytest.approx(plain, abs=1e-6)
    assert [call for call in calls if call[0] == "image"]


def test_a_changed_shard_is_read_again(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    original, other = (RetrievalConfig(data=str(place)) for place in (folder, copy))
    before = digest(other, tmp_path / "memory")
    assert before == digest(original) == digest(other, tmp_path / "memory")
    shard = sorted(copy.rglob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert digest(other, tmp_path / "memory") != before


def test_a_damaged_entry_is_made_anew(folder, tmp_path):
    plain, _ = figures(folder, tmp_path / "store")
    for path in (tmp_path / "store").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "store" / "digests.json").write_text("{")
    found, calls = figures(folder, tmp_path / "store")
    assert found == plain and calls
    assert not figures(folder, tmp_path / "store")[1]


def test_where_nothing_can_be_written_nothing_is_kept(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    store = tmp_path / "file" / "store"
    assert figures(folder, store)[0] == figures(folder, None)[0]
    assert capsys.readouterr().out.count("embeddings are not kept") == 1


def test_texts_are_kept_one_by_one(tmp_path):
    model = TinyTwoTower()
    with embedding(model, store=Store(tmp_path, "m")) as embed:
        rows = embed.texts(["red", "a red apple", "red"], 8)
        assert torch.equal(rows[0], rows[2])
    with embedding(model, store=Store(tmp_path, "m")) as embed:
        model.calls.clear()
        more = embed.texts(["green", "red"], 8)
        assert [n for kind, n in model.calls if kind == "text"] == [1]
        assert torch.equal(more[1], rows[0])
    with embedding(model, store=Store(tmp_path, "other")) as embed:
        model.calls.clear()
        embed.texts(["green", "red"], 8)
        assert [n for kind, n in model.calls if kind == "text"] == [2]


def tiny_model():
    torch.manual_seed(0)
    return build_two_tower(TwoTowerConfig.model_validate(tiny.TOWERS))


def test_a_model_is_known_by_its_weights_and_preprocessing():
    model = tiny_model()
    name = model_hash(model)
    assert name == model_hash(tiny_model())
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1e-6
    assert model_hash(model) != name
    other = tiny_model()
    other.image.spec = other.image.spec | {"resize_mode": "squash"}
    assert model_hash(other) != name


def kept_over_ranks(folder, store):
    return figures(folder, store)[0]


def test_ranks_share_what_is_kept(folder, tmp_path):
    plain, _ = figures(folder, None)
    for _ in range(2):
        found = run_ranks(kept_over_ranks, 2, folder, str(tmp_path / "store"))
        assert all(one == plain for one in found)
    assert figures(folder, tmp_path / "store")[0] == plain


def test_the_folder_can_be_named_in_the_environment(monkeypatch, tmp_path):
    from eval.suite import SuiteConfig

    monkeypatch.setitem(os.environ, "MM_EMBEDDINGS", str(tmp_path))
    sets = {"a": ClassificationConfig(data="x"), "b": RetrievalConfig(data="x")}
    assert SuiteConfig(model="x", sets=sets).cache == tmp_path

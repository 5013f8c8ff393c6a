"""Configs: what is read is what was written, and every mistake is named at once."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from mm.config import Config, differences, dump, load, parse
from mm.config.types import plain
from mm.errors import UserError


class Classify(Config):
    kind: Literal["classify"] = "classify"
    shards: str
    """Shards to classify."""
    k: tuple[int, ...] = (1, 5)


class Retrieve(Config):
    kind: Literal["retrieve"] = "retrieve"
    temperature: float = 3
    """Of the scores."""

    @model_validator(mode="after")
    def positive(self) -> "Retrieve":
        if self.temperature < 0:
            raise UserError("the temperature is negative; give a positive one")
        return self


Kind = Annotated[Classify | Retrieve, Field(discriminator="kind")]


class Optim(Config):
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Weight decay of the matrices."""


class Program(Config):
    out: Path
    """Run folder."""
    optim: Optim = Optim(lr=5)
    """The optimiser."""
    sets: dict[str, Kind] = {}
    ema: Optim | None = None
    one: Kind = Retrieve(temperature=4)
    betas: tuple[float, float] = (0.9, 0.999)
    samples: int | None = 12_800_000
    size: int | tuple[int, int] = 224
    projection: Literal["linear", "mlp"] = "linear"
    names: list[Optim] = []
    compile: bool = False


def read(*overrides: str, file: Path | None = None) -> Program:
    return load(Program, file, ["out=x", *overrides])


def mistakes(*overrides: str, file: Path | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(Program, file, overrides)
    first, *lines = str(caught.value).split("\n  ")
    assert first.startswith(f"{len(lines)} mistake")
    return lines


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("1.5e+3", 1.5e3),
        (".5", 0.5),
        ("5.", 5.0),
        ("12_000", 12000.0),
        ("1", 1.0),
    ],
)
def test_numbers_as_people_write_them(text: str, number: float) -> None:
    value = read(f"optim.lr={text}").optim.lr
    assert value == number
    assert type(value) is float


def test_overrides_reach_every_kind_of_place() -> None:
    config = read(
        "samples=12_800", "betas.0=0.8", "sets.a={kind: classify, shards: s}", "sets.b.kind=retrieve",
        "size=[1, 2]", "ema.lr=4", "one.temperature=1e-05", "names=[{lr: 1}, {lr: 2}]", "names.1.lr=7",
        "compile=yes",
    )  # fmt: skip
    assert config.samples == 12_800
    assert config.betas == (0.8, 0.999)
    assert config.sets == {"a": Classify(shards="s"), "b": Retrieve()}
    assert config.size == (1, 2)
    assert config.ema == Optim(lr=4)
    assert config.one == Retrieve(temperature=1e-5)
    assert [optim.lr for optim in config.names] == [1, 7]
    assert config.compile is True
    assert read("samples=null").samples is None
    assert read("samples=1e6").samples == 1_000_000


def test_a_section_given_in_part_keeps_its_default(tmp_path: Path) -> None:
    assert read("optim.weight_decay=0.2").optim == Optim(lr=5, weight_decay=0.2)
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  weight_decay: 0.2\none:\n  kind: classify\n  shards: s\n")
    config = read(file=file)
    assert config.optim == Optim(lr=5, weight_decay=0.2)
    assert config.one == Classify(shards="s")
    assert read("optim.weight_decay=0.3", file=file).optim == Optim(lr=5, weight_decay=0.3)


def test_all_mistakes_at_once() -> None:
    lines = mistakes(
        "optim.lrr=3", "lr=3", "sets.im={kind: classify, shard: 3, k: [x]}", "sets.q.kind=retrive",
        "sets.z={}", "one.temperature=-1", "ema=[3]", "projection=linera", "size=abc", "optim.lr=-1",
        "samples=1.5", "nonsense", "betas.7=3", "projection.a=b", "compile=3",
        "sets.r={kind: retrieve, shards: a, lr: 2}",
    )  # fmt: skip
    assert set(lines) == {
        "nonsense: expected key=value",
        "betas.7=3: betas has the places 0 to 1",
        'projection.a=b: projection is "linera", it has no keys',
        "out: missing; Run folder.",
        "optim.lr = -1: expected greater than 0",
        'optim.lrr = 3: unknown key; did you mean "optim.lr"?',
        "sets.im.shards: missing; Shards to classify.",
        'sets.im.k.0 = "x": expected a whole number',
        'sets.im.shard = 3: unknown key; did you mean "sets.im.shards"?',
        'sets.q.kind = "retrive": expected "classify" or "retrieve"; did you mean "retrieve"?',
        'sets.r.shards = "a": unknown key of kind "retrieve", though one of others; leave it out',
        'sets.r.lr = 2: unknown key; did you mean "optim.lr" or "ema.lr" or "names.NAME.lr"?',
        'sets.z.kind: missing; expected "classify" or "retrieve"',
        "ema = [3]: expected a section with the keys lr, weight_decay",
        "one: the temperature is negative; give a positive one",
        "samples = 1.5: expected a whole number",
        'size = "abc": expected a whole number or a list',
        'projection = "linera": expected "linear" or "mlp"; did you mean "linear"?',
        "compile = 3: expected true or false",
        'lr = 3: unknown key; did you mean "optim.lr" or "ema.lr" or "names.NAME.lr"?',
    }


def test_a_union_member_named_like_a_key_keeps_its_path() -> None:
    class Loss(Config):
        kind: Literal["loss"]
        loss: float

    class Other(Config):
        kind: Literal["other"]

    class Both(Config):
        sets: dict[str, Annotated[Loss | Other, Field(discriminator="kind")]]

    with pytest.raises(UserError, match=r"sets\.a\.loss: missing"):
        load(Both, None, ["sets.a.kind=loss"])
    with pytest.raises(UserError, match=r'sets\.a\.loss = "x": expected a number'):
        load(Both, None, ["sets.a={kind: loss, loss: x}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1, 2\nb: 3\n", "line 2"),
        ("a: 1\na: 2\n", 'line 2, column 1: the key "a" is given twice'),
        ("- a\n- b\n", "expected keys and values"),
        ("a:\n\t- b\n", "line 2"),
        ("? [a]\n: b\n", "a key must be plain text"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match="broken.yaml") as caught:
        load(Program, file)
    assert message in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "pretrain.yaml").touch()
    with pytest.raises(UserError, match=r"there is no config .*pretrian\.yaml; .* has pretrain\.yaml"):
        load(Program, tmp_path / "pretrian.yaml")
    with pytest.raises(UserError, match="there is no folder"):
        load(Program, tmp_path / "nowhere" / "pretrain.yaml")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"is a folder.*did you mean .*config\.yaml"):
        load(Program, tmp_path)
    with pytest.raises(UserError, match="2 mistakes"):
        load(Program, tmp_path / "x.yaml", ["nonsense"])


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read(file=tmp_path / "empty.yaml") == read()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
optims = st.builds(Optim, lr=st.floats(min_value=5e-324, allow_infinity=False), weight_decay=numbers)


@given(
    st.builds(
        Program,
        out=st.sampled_from([Path("runs/x"), Path("/1e5"), Path("3"), Path("no")]),
        optim=optims,
        sets=st.dictionaries(names, st.builds(Classify, shards=st.text() | st.just("1e-05")), max_size=3),
        ema=st.none() | optims,
        one=st.builds(Retrieve, temperature=st.floats(min_value=0, allow_infinity=False)),
        betas=st.tuples(numbers, numbers),
        samples=st.none() | st.integers(),
        size=st.integers() | st.tuples(st.integers(), st.integers()),
        names=st.lists(optims, max_size=2),
    )
)
def test_dump_and_load_give_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, config: Program
) -> None:
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8", newline="")
    assert load(Program, file) == config
    assert plain(load(Program, file)) == plain(config)


@pytest.mark.parametrize(
    "text", ["1e-05", "12_000", "0x1f", "010", "1:30", "no", "on", "null", "~", "2020-01-01", ""]
)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(dump(Program(out=Path("x"), sets={text or "a": Classify(shards=text)})))
    assert list(load(Program, file).sets.items()) == [(text or "a", Classify(shards=text))]


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read().optim.lr = 3  # type: ignore[misc]


def test_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("out: a\n")
    for rank in (["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"], []):
        assert parse(Program, [*rank, str(file), "optim.lr=2"], "p").optim.lr == 2
    with pytest.raises(UserError, match="unknown option --lr=3"):
        parse(Program, [str(file), "--lr=3"], "p")
    with pytest.raises(UserError, match=r"optim\.lr: expected key=value"):
        parse(Program, [str(file), "optim.lr", "3"], "p")


def test_help_lists_every_key_with_its_docstring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Program, ["--help"], "python -m train.pretrain")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m train.pretrain [CONFIG.yaml] [key=value ...]")
    for line in (
        "out: path, required",
        "    Run folder.",
        "  optim.lr: number > 0 = 5.0",
        "    sets.NAME.shards: text, required",
        "    sets.NAME.temperature: number = 3",
        "size: whole number | list of whole number = 224",
        'projection: "linear" | "mlp" = "linear"',
        "  ema.lr: number > 0 = 0.001",
        "  names.NAME.lr: number > 0 = 0.001",
    ):
        assert line in shown.splitlines()

    file = tmp_path / "c.yaml"
    file.write_text("out: here\noptim: {lr: 1e-7}\n")
    with pytest.raises(SystemExit):
        parse(Program, [str(file), "--help", "samples=3"], "p")
    shown = capsys.readouterr().out
    assert 'out: path = "here"' in shown
    assert "  optim.lr: number > 0 = 1e-07" in shown
    assert "samples: whole number | null = 3" in shown


def test_differences_name_path_and_both_values() -> None:
    old = {"optim": {"lr": 0.001, "eps": 1e-8}, "gone": 1, "same": [1, 2], "out": Path("a")}
    new = {"optim": {"lr": 0.002, "eps": 1e-8}, "same": (1, 2), "out": "a", "added": {"x": None}}
    assert differences(old, new) == [
        "optim.lr: 0.001 -> 0.002",
        "gone: 1 -> absent",
        "added.x: absent -> null",
    ]
    assert differences(new, new) == []
    assert differences(plain(read()), plain(read("optim.lr=1"))) == ["optim.lr: 5.0 -> 1.0"]

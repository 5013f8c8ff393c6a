import pytest

from eval.bench import decode_speed
from mm.data.decode import EncodedImage
from mm.data.transforms import AugmentConfig, TrainTransform


def test_photographs_have_the_sizes_asked_for() -> None:
    sizes = [EncodedImage(data).size for data in decode_speed.jpegs(6, 300, 500, least=130_000)]
    assert all(300 <= side <= 500 for size in sizes for side in size) and len(set(sizes)) == 6
    assert all(height * width >= 130_000 for height, width in sizes)


@pytest.mark.parametrize("seed", range(2))
def test_pixels_are_those_of_open_clip_for_the_same_box(seed: int) -> None:
    photos = decode_speed.jpegs(3, 450, 700, seed=seed)
    off = decode_speed.difference(TrainTransform(224, AugmentConfig(scale=(0.6, 1.0))), photos)
    assert off.largest <= 2 and off.mean < 0.05
    scaled = TrainTransform(224, AugmentConfig(scale=(0.6, 1.0), dct_scaling=True))
    assert decode_speed.difference(scaled, photos).mean < 6


def test_every_figure_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = decode_speed.measure(decode_speed.DecodeConfig(photos=1, turns=1))
    assert [row.asked for row in rows] == [">= 2.5x", "<= 2 levels", ">= 3x"] and rows[1].met
    assert "open_clip" in capsys.readouterr().out


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        decode_speed.main(["--help"])
    assert not stop.value.code and "eval.bench.decode_speed" in capsys.readouterr().out

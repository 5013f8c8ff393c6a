"""What is measured of videos: the readers give the same frames, and ours decodes fewer."""

from eval.bench import video
from eval.bench.video_decode import Film, compare, make, ours, plain


def test_the_same_frames_in_less_time() -> None:
    film = Film("small", 64, 80, 8, 10)
    found = compare(film, {"ours": ours, "plain": plain}, files=1, turns=3)
    assert found["ours"].apart == 0 and found["ours"].cpu == 1
    assert found["plain"].cpu > 1.2
    assert len(ours(make(film, 1))) == 8


def test_every_kind_of_video_encoder_is_in_the_table() -> None:
    from mm.encoders.video import VIDEO_ENCODERS

    assert set(video.KINDS) == set(VIDEO_ENCODERS)

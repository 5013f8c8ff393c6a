"""Labels counted before a run, without the images; files of lines."""

import pytest

from mm.data.labels import count_labels
from mm.data.lines import read_lines
from mm.errors import UserError
from tests import tiny
from tests.shard_server import serving


def test_every_class_is_counted_and_what_has_no_label_is_left_out(tmp_path):
    folder = tiny.labelled(tmp_path / "a", 22)
    assert count_labels(str(folder), 4) == {0: 6, 1: 6, 2: 5, 3: 5}
    tiny.write(tmp_path / "b", [{"cls": b"1"}, {"png": b"x"}, {"cls": b"cat"}, {"cls": b" 2\n"}])
    assert count_labels([str(folder), str(tmp_path / "b")], 5) == {0: 6, 1: 7, 2: 6, 3: 5, 4: 0}


def test_a_label_beyond_the_classes_names_its_sample(tmp_path):
    folder = tiny.labelled(tmp_path / "a", 8)
    with pytest.raises(UserError, match=r"sample 000003 of .* has class 3, but there are 3 class names"):
        count_labels(str(folder), 3)


def test_shards_behind_a_url_are_not_fetched_for_it(tmp_path):
    folder = tiny.labelled(tmp_path / "a", 8)
    with serving(folder) as server:
        assert count_labels(server.url, 4) is None
        assert not any(name.endswith(".tar") for name in server.count())


def test_lines_are_read_as_they_are_and_empty_ones_named(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text(" red \ngreen\n\n")
    assert read_lines(file) == ["red", "green"]
    for text, message in (("red\n\ngreen\n", "line 2 of .* is empty"), ("\n", "is empty")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_lines(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_lines(tmp_path / "none.txt")

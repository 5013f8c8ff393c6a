"""mm.cli: the command as a user runs it."""

import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from mm import cli
from mm.data.writer import ShardWriter
from mm.errors import UserError


def mm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mm.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_help_is_instant_and_imports_no_torch() -> None:
    code = "import sys; from mm.cli import dispatch; dispatch(['--help']); assert 'torch' not in sys.modules"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mm data make" in done.stdout and time.monotonic() - start < 3  # 0.1 s on an idle machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dat"], "did you mean data"),
        (["data", "mak"], "did you mean make"),
        (["data", "make", "emojy"], "did you mean emoji"),
        (["data", "make", "emoji", "szie=3"], 'did you mean "size"'),
        (["data", "make", "emoji", "--size"], "expected key=value"),
        (["data", "make", "emoji", "other.yaml"], "expected key=value"),
        (["data", "index", "/nowhere"], "/nowhere"),
        (["reprt"], "did you mean report"),
        (["report", "/nowhere"], "/nowhere is not a run folder"),
        (["report", "a", "b"], "a is not a run folder"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.dispatch(arguments)
    assert message in str(caught.value)


def test_tools_take_shards_before_keys(tmp_path: Path, capsys) -> None:
    with ShardWriter(tmp_path / "a") as writer:
        writer.add("0", {"txt": b"a word", "jpg": b"no image"})
    with pytest.raises(SystemExit) as ended:
        cli.dispatch(["data", "check", str(tmp_path / "a"), f"out={tmp_path / 'found'}", "workers=0"])
    assert ended.value.code == 1 and (tmp_path / "found" / "check.json").exists()
    assert "damaged" in capsys.readouterr().out
    for name in cli.TOOLS:
        with pytest.raises(SystemExit) as ended:
            cli.dispatch(["data", name, "--help"])
        assert ended.value.code == 0
        assert f"usage: mm data {name} SHARDS ..." in capsys.readouterr().out
        with pytest.raises(UserError, match="shards"):
            cli.dispatch(["data", name, "sharts=3"])


def test_exit_status_and_no_traceback() -> None:
    done = mm("data", "make", "emojy")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no source") and len(done.stderr.splitlines()) == 1


def test_help_lists_sources_and_keys(capsys) -> None:
    cli.dispatch(["data", "make", "--help"])
    assert "emoji" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.dispatch(["data", "make", "emoji", "--help"])
    assert caught.value.code == 0 and "split_seed" in capsys.readouterr().out
    for arguments in ([], ["data"], ["data", "index"], ["data", "make"], ["report"], ["report", "-h"]):
        cli.dispatch(arguments)
        assert capsys.readouterr().out.startswith("usage: mm")


def test_index(tmp_path: Path, capsys) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name in ("000.jpg", "000.txt", "001.jpg", "001.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    cli.dispatch(["data", "index", str(tmp_path)])
    assert "1 shards with 2 samples" in capsys.readouterr().out
    assert (tmp_path / "sizes.json").exists() and (tmp_path / "00000.idx").exists()


def test_report(tmp_path: Path, capsys) -> None:
    rows = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli.dispatch(["report", str(tmp_path)])
    page = tmp_path / "report.html"
    assert capsys.readouterr().out == f"{page}\n" and "<html" in page.read_text()

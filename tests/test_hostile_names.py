"""File names that are not UTF-8, hold escape sequences, or are no files, as the commands see and print them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from skimage.data import astronaut  # noqa: F401  # the photograph is beside it

from effkernels.cli import main
from effkernels.engine.images import example_image

NAMES = (b"caf\xe9.png", b"\x1b[2J\x1b]0;title\x07.png", b"two\nlines.png", b"\xe2\x80\xaegnp.exe.png", b"$\\frac.png")
SHOWN = (r"caf\xe9.png", r"\x1b[2J\x1b]0;title\x07.png", r"two\nlines.png", r"\u202egnp.exe.png", r"$\frac.png")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Photographs and damaged files of hostile names, and a named pipe."""
    folder = tmp_path / "album"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(example_image(), folder / os.fsdecode(name))
        (folder / os.fsdecode(b"bad-" + name)).write_bytes(b"no image")
    os.mkfifo(folder / "pipe.png")
    return folder


def run(*arguments: object, encoding: str = "utf-8") -> tuple[int, str, str]:
    """Return a command in a process of its own, whose output is read as a terminal of that encoding would."""
    command = [sys.executable, "-m", "effkernels", *map(str, arguments)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)


def assert_harmless(text: str) -> None:
    assert [line for line in text.splitlines() if not line.isprintable()] == []


def assert_all_are_named(out: str, err: str) -> None:
    """Every image of the album in the output, every broken one among the errors, both harmless."""
    for text in (out, err):
        assert_harmless(text)
        assert "Traceback" not in text
    for shown in SHOWN:
        assert f"album/{shown} " in out
        assert f"album/bad-{shown}: not an image file" in err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_predict(album: Path, encoding: str) -> None:
    status, out, err = run(
        "predict", album, album / "pipe.png", album / ("a" * 300), "--img-size", 64, encoding=encoding
    )
    assert status == 1
    assert_all_are_named(out, err)
    assert "pipe.png is a named pipe; a file is needed" in err
    assert f"{'a' * 300}: File name too long" in err


def test_predict_gives_the_very_names_as_json(album: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["predict", str(album), "--img-size", "64", "--json"]) == 1
    report = json.loads(capsysbinary.readouterr().out)
    files = {os.fsencode(one["file"]) for one in report["predictions"]}
    assert files == {os.fsencode(album) + b"/" + name for name in NAMES}
    assert all(reason.isprintable() for one in report["failures"] for reason in [one["reason"]])


def test_cam(album: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `scaling` is not installed")
    output = tmp_path / os.fsdecode(b"map\xff\x1b[2J.png")
    status, out, err = run("cam", album, album / "pipe.png", "--img-size", 64, "--output", output)
    assert status == 1
    assert output.stat().st_size > 1000
    assert_all_are_named(out, err)
    assert r"wrote " in err
    assert r"map\xff\x1b[2J.png" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--example", "--weights", "NAME"],
        ["predict", "--example", "--labels", "NAME"],
        ["predict", "--example", "--model", "NAME"],
        ["export", "--format", "safetensors", "--output", "x.safetensors", "--checkpoint", "NAME"],
        ["convert", "NAME", "--to", "timm", "--output", "x.pth"],
        ["convert", "x", "--to", "NAME", "--output", "x.pth"],
        ["convert", "x", "--to", "timm", "--output", "NAME"],
        ["cam", "--example", "--weights", "NAME"],
        ["cam", "--example", "--model", "NAME"],
        ["cam", "--example", "--output", "NAME"],
        ["scale", "--network", "NAME.json"],
        ["scale", "--network", "NAME"],
        ["scale", "--table", "growth", "--growth-phi", "1", "--png", "--output", "folder", "--accuracy", "NAME"],
        ["search", "--network", "NAME"],
        ["search", "--evaluate", "NAME"],
        ["search", "--evaluate", "none", "--save", "NAME"],
        ["explain", "NAME"],
        ["bench", "--contender", "NAME"],
        ["NAME"],
        ["info", "NAME"],
    ],
    ids=lambda words: " ".join(words),
)
def test_no_message_is_obeyed(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"\xff\x1b[2J\r")
    with pytest.raises(SystemExit) as stopped:
        main([word.replace("NAME", name) for word in arguments])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert_harmless(message)
    assert r"\x1b[2J" in message

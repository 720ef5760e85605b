"""A training that is stopped, by a signal or in any other way, goes on bit for bit; several processes train as one.

What gets a signal or starts processes is a process of its own. The rest runs in that of the test, because a process
takes three seconds to start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from training_runs import (
    MODEL,
    NAME,
    PROGRAM,
    arguments_for,
    assert_same_weights,
    log_of,
    make_folder,
    numbers_of,
    status_of,
)

from effkernels.models import registry

# What draws random numbers or keeps a state: augmentation, dropping, averaging, loss scaling, momentum, the schedule.
EPOCHS = 4
RECIPE = ("--epochs", str(EPOCHS), "--checkpoint-steps", "1", "--model-ema-decay", "0.9", "--drop-path", "0.3",
          "--precision", "amp_float16", "--augment", "randaugment", "--clip-grad", "5",
          "--img-size", "16")  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module", autouse=True)
def _small_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._MODELS, NAME, MODEL)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos"), 16)


def heed_ctrl_c() -> None:
    """Undo what a shell does to commands that it starts in the background: they and what they start ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(arguments: list[str], launcher: list[str] | None = None) -> subprocess.Popen[str]:
    command = [*(launcher or [sys.executable]), str(PROGRAM), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C of a test ends this process and not the test's
        preexec_fn=heed_ctrl_c,
    )


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started, at once."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    for member in family:
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            os.kill(member, signal.SIGKILL)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_checkpoint(output: Path, process: subprocess.Popen[str], epoch: int) -> None:
    """Wait until a training has written a checkpoint of the given epoch or a later one."""
    while True:
        ended = process.poll() is not None
        if (output / "checkpoint.pt").exists():
            state = torch.load(output / "checkpoint.pt", weights_only=True)
            if state["epoch"] >= epoch:
                return
        assert not ended, process.communicate()
        time.sleep(0.02)


def stopped(
    arguments: list[str],
    output: Path,
    epoch: int,
    stop: Callable[[subprocess.Popen[str]], None],
    launcher: list[str] | None = None,
) -> tuple[int, str, str]:
    """Run a training and stop it after a checkpoint of the given epoch; exit status, output, errors.

    On a loaded machine it may end before that checkpoint is noticed; then it runs again.
    """
    for _ in range(5):
        process = start(arguments, launcher)
        wait_for_checkpoint(output, process, epoch)
        stop(process)
        found = finished(process)
        if found[0] != 0:
            return found
        shutil.rmtree(output)
    raise AssertionError("the training ended before it was stopped, every time")


@pytest.fixture(scope="module")
def unbroken(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert status_of(arguments_for(photos, output, *RECIPE)) == 0
    return output


def test_a_killed_training_goes_on_bit_for_bit(photos: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    status, _, _ = stopped(arguments_for(photos, output, *RECIPE), output, 0, subprocess.Popen.kill)
    assert status == -signal.SIGKILL
    process = start(["train", "--resume", str(output)])
    wait_for_checkpoint(output, process, 2)
    process.kill()  # a second time, unless it has ended
    finished(process)
    assert status_of(["train", "--resume", str(output)]) == 0
    assert numbers_of(output) == numbers_of(unbroken)
    assert_same_weights(output, unbroken)


def test_the_number_of_workers_changes_no_bit(photos: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert status_of(arguments_for(photos, output, *RECIPE, "--workers", "2")) == 0
    assert_same_weights(output, unbroken)


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(photos: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    status, _, err = stopped(
        arguments_for(photos, output, *RECIPE), output, 1, lambda process: process.send_signal(signal.SIGINT)
    )
    assert status == 130
    assert "Traceback" not in err
    assert f"this goes on from there: effkernels train --resume {output}" in err.splitlines()[-1]
    assert status_of(["train", "--resume", str(output)]) == 0
    assert_same_weights(output, unbroken)


def test_a_finished_training_writes_its_results_again(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "checkpoint.pt").write_bytes((unbroken / "checkpoint.pt").read_bytes())
    assert status_of(["train", "--resume", str(output)]) == 0
    assert f"after {EPOCHS} epochs" in capsys.readouterr().out
    assert numbers_of(output) == numbers_of(unbroken)
    assert_same_weights(output, unbroken)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is not a checkpoint of a training, or is damaged"), ("weights", "format=None; allowed: 'effkernels")],
    ids=["empty", "weights"],
)
def test_what_is_no_checkpoint_of_a_training(
    content: bytes | str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pt").write_bytes(content)
    else:
        torch.save({"weight": torch.ones(1)}, tmp_path / "checkpoint.pt")
    assert status_of(["train", "--resume", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"--resume {tmp_path}: " in err
    assert message in err


def test_other_images_than_the_training_began_with(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((unbroken / "checkpoint.pt").read_bytes())
    fewer = make_folder(tmp_path / "fewer", 8)
    assert status_of(["train", "--resume", str(tmp_path), "--data", str(fewer)]) == 2
    assert "images to train with of 3 classes, and the training began with 39 of 3" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_as_one_network(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    status, out, err = finished(start(arguments_for(photos, output, *RECIPE), TORCHRUN))
    assert status == 0, err
    assert len(out.splitlines()) == 2, "only the first process prints"
    assert [record["epoch"] for record in log_of(output)] == [*range(1, EPOCHS + 1)]
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    assert state["processes"] == 2
    assert state["model"]["bn1.num_batches_tracked"] == EPOCHS * (39 // 2 // 8)

    assert status_of(["train", "--resume", str(output)]) == 2
    assert "go on with torchrun --nproc-per-node 2" in capsys.readouterr().err

    killed = tmp_path / "killed"
    # The processes of torchrun have groups of their own, and would wait for each other.
    stopped(arguments_for(photos, killed, *RECIPE), killed, 1, lambda process: kill_tree(process.pid), TORCHRUN)
    status, _, err = finished(start(["train", "--resume", str(killed)], TORCHRUN))
    assert status == 0, err
    assert numbers_of(killed) == numbers_of(output)
    assert_same_weights(killed, output)

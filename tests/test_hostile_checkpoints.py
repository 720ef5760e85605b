"""Checkpoints that are damaged or made up: each loads and equals what it holds, or is refused by the one error."""

from __future__ import annotations

import json
import os
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import THOROUGH
from peer_models import small_timm_b0

import effkernels
from benchmarks.fuzz import _checkpoints as cases
from benchmarks.fuzz import inputs
from effkernels.cam.networks import load_network_weights
from effkernels.cli import main
from effkernels.models import CheckpointError, load_checkpoint, read_checkpoint
from effkernels.scaling import MOBILENET_V1, scale

pytest.importorskip("safetensors", reason="the extra `models` is not installed")


def test_a_short_run_of_the_fuzzer_finds_nothing() -> None:
    assert inputs.run(seconds=8 if THOROUGH else 3, seed=13) == []


class TestEveryCaseOfTheFuzzer:
    @pytest.mark.parametrize("name", cases.CONTENTS)
    def test_contents(self, name: str, tmp_path: Path) -> None:
        make, loads = cases.CONTENTS[name]
        cases._save(make(cases._state()), tmp_path / "file.pth")
        assert cases.check(tmp_path / "file.pth", cases._state() if loads else cases.REFUSED) is None

    @pytest.mark.parametrize("name", cases.WEIGHTS)
    @pytest.mark.parametrize("key", ["conv_stem.weight", "blocks.1.0.se.conv_reduce.bias", "classifier.weight"])
    def test_weights(self, name: str, key: str, tmp_path: Path) -> None:
        change, loads = cases.WEIGHTS[name]
        state = cases._state()
        changed = change(state[key])
        cases._save({**state, key: changed}, tmp_path / "file.pth")
        if loads and isinstance(changed, torch.Tensor):
            state[key] = changed.detach().float()
        assert cases.check(tmp_path / "file.pth", state if loads else cases.REFUSED) is None

    @pytest.mark.parametrize("text", cases._NOTES, ids=range(len(cases._NOTES)))
    def test_notes(self, text: str, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file(cases._state(), tmp_path / "file.safetensors", {"effkernels": text})
        assert cases.check(tmp_path / "file.safetensors", cases.REFUSED) is None


class TestTheError:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.to(torch.float8_e4m3fn), "has the dtype float8_e4m3fn; allowed: float32"),
            (lambda t: t.to_sparse(), r"has the layout sparse_coo; save tensor\.to_dense\(\)"),
            (
                lambda t: torch.ones(1).expand(2**38),
                r"\(274877906944,\) is expanded from 1 stored numbers; save tensor",
            ),
            (lambda t: t.to("meta"), "is on the device 'meta' and has no values"),
            (lambda t: t.double() * 1e300, r"has a value of .*; the model's float32 ends at 3\.403e\+38"),
        ],
    )
    def test_has_the_file_the_key_and_what_to_do(self, change: Any, message: str, tmp_path: Path) -> None:
        file = tmp_path / "b0.pth"
        state = small_timm_b0().state_dict()
        torch.save({"state_dict": {**state, "conv_head.weight": change(state["conv_head.weight"])}}, file)
        with pytest.raises(CheckpointError, match=message) as error:
            load_checkpoint("efficientnet_b0", file)
        assert (error.value.file, error.value.key) == (file, "conv_head.weight")
        assert "conv_head.weight" in str(error.value)
        assert str(error.value).startswith(str(file))

    def test_of_a_pipe_a_device_and_a_long_name(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.pth")
        for file in (tmp_path / "pipe.pth", Path("/dev/zero"), tmp_path / ("a" * 300)):
            with pytest.raises(OSError, match=r"a file is needed|File name too long"):
                read_checkpoint(file)

    def test_names_are_printed_harmlessly(self, tmp_path: Path) -> None:
        file = tmp_path / os.fsdecode(b"\xff\x1b[2J.pth")
        file.write_bytes(b"no checkpoint")
        with pytest.raises(CheckpointError) as error:
            read_checkpoint(file)
        assert r"\xff\x1b[2J.pth is not" in str(error.value)
        assert str(error.value).isprintable()
        assert error.value.file == file


class TestNothingIsAllocated:
    @pytest.mark.parametrize(
        "changed",
        [
            {"classifier.weight": torch.ones(2**40, 0), "classifier.bias": torch.ones(5)},
            {"classifier.weight": torch.ones(2**62, 0)},
            {"classifier.weight": torch.tensor(1.0)},
            {"classifier.weight": torch.ones(30_000_000)},
            {"conv_stem.weight": torch.ones(32, 2**40, 0, 3)},
            {"conv_stem.weight": torch.ones(32, 0, 3, 3)},
        ],
    )
    def test_for_a_model_that_a_file_asks_for(self, changed: dict[str, torch.Tensor], tmp_path: Path) -> None:
        """By a name the model is made with as many classes and channels as the file has."""
        torch.save({**small_timm_b0().state_dict(), **changed}, tmp_path / "b0.pth")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError):
            load_checkpoint("efficientnet_b0", tmp_path / "b0.pth")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes

    def test_for_what_is_compressed(self, tmp_path: Path) -> None:
        torch.save(small_timm_b0().state_dict(), tmp_path / "plain.pth")
        with (
            zipfile.ZipFile(tmp_path / "plain.pth") as plain,
            zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry))
            packed.writestr("plain/data/zeros", bytes(10**7))
        with pytest.raises(CheckpointError, match=r"says that it holds \d+: it is compressed"):
            read_checkpoint(tmp_path / "packed.pth")


class TestStateDicts:
    """`convert_state_dict` takes tensors and no file; the same is refused."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: torch.ones(1).expand(2**38), "is expanded from 1 stored numbers"),
            (lambda t: t.to_sparse(), "layout sparse_coo"),
            (lambda t: t.to(torch.int8), "dtype int8"),
            (lambda t: t.to(torch.complex64), "dtype complex64"),
        ],
    )
    def test_hostile_tensors(self, change: Any, message: str) -> None:
        state = small_timm_b0().state_dict()
        with pytest.raises(CheckpointError, match=message) as error:
            effkernels.convert_state_dict({**state, "bn2.weight": change(state["bn2.weight"])}, "timm", "torchvision")
        assert (error.value.file, error.value.key) == (None, "bn2.weight")

    def test_negative_variances(self) -> None:
        state = small_timm_b0().state_dict()
        with pytest.raises(CheckpointError, match=r"bn2\.running_var has negative variances, the least -"):
            effkernels.convert_state_dict({**state, "bn2.running_var": -state["bn2.running_var"]}, "timm", "nvidia")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bn_eps": float("nan")}, "bn_eps='nan'; allowed"), ({"bn_momentum": 10**400}, "bn_momentum="),
     ({"pad_type": "full"}, "pad_type='full'; allowed")],
)  # fmt: skip
def test_what_a_caller_gives_is_checked_before_the_model_is_changed(options: Any, message: str, tmp_path: Path) -> None:
    cases._save(cases._state(), tmp_path / "file.pth")
    model = cases._template()
    before = cases._snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, tmp_path / "file.pth", **options)
    assert cases._snapshot(model) == before


class TestCommands:
    """One loader serves all: exit status 2 and one message."""

    @pytest.fixture(scope="class")
    def hostile(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        file = tmp_path_factory.mktemp("hostile") / "cycle.pth"
        content: dict[str, Any] = {}
        content["state_dict"] = content
        torch.save(content, file)
        return file

    @pytest.mark.parametrize(
        "command",
        [
            ["predict", "--example", "--weights", "FILE"],
            ["export", "--format", "safetensors", "--output", "OUT.safetensors", "--checkpoint", "FILE"],
            ["convert", "FILE", "--to", "torchvision", "--output", "OUT.pth"],
            ["cam", "--example", "--output", "OUT.png", "--weights", "FILE"],
            ["cam", "--example", "--output", "OUT.png", "--model", "mobilenet_v1", "--weights", "FILE"],
        ],
        ids=lambda command: " ".join(command[:1] + command[-3:-2]),
    )
    @pytest.mark.parametrize("kind", ["cycle", "pipe", "missing"])
    def test_refuse_it(
        self, command: list[str], kind: str, hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = {"cycle": hostile, "pipe": tmp_path / "pipe.pth", "missing": tmp_path / "missing.pth"}[kind]
        if kind == "pipe":
            os.mkfifo(file)
        messages = {"cycle": "holds a dict that holds itself", "pipe": "is a named pipe", "missing": "No such file"}
        words = [str(file) if word == "FILE" else word.replace("OUT", str(tmp_path / "out")) for word in command]
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert messages[kind] in last
        assert last.startswith(f"effkernels {command[0]}: ")

    def test_other_networks_weights_are_checked_alike(self, tmp_path: Path) -> None:
        network = scale(MOBILENET_V1, width=0.25)
        state = network.build(num_classes=4).state_dict()
        key = next(iter(state))
        torch.save(state, tmp_path / "right.pth")
        assert torch.equal(load_network_weights(network, str(tmp_path / "right.pth")).state_dict()[key], state[key])
        for changed, message in (
            (state[key].to(torch.int8), "dtype int8"),
            (state[key].double() * 1e300, "the model's float32 ends at"),
            (torch.ones(1).expand(2**38), "is expanded"),
        ):
            torch.save({**state, key: changed}, tmp_path / "wrong.pth")
            with pytest.raises(CheckpointError, match=message) as error:
                load_network_weights(network, str(tmp_path / "wrong.pth"))
            assert (error.value.file, error.value.key) == (tmp_path / "wrong.pth", key)


def test_the_notes_of_this_project_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    note = {"pad_type": "same", "bn_eps": 0.002, "bn_momentum": 0.03, "native_size": 64, "source": "timm"}
    save_file(cases._state(), tmp_path / "file.safetensors", {"effkernels": json.dumps(note)})
    model = load_checkpoint(cases._template(), tmp_path / "file.safetensors")
    assert (model.pad_type, model.bn1.eps, model.bn1.momentum) == ("same", 0.002, 0.03)
    cases._template.cache_clear()

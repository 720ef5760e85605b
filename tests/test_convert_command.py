"""`effkernels convert`: what it writes and refuses to write, and what --verify finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peer_models import small_timm_b0
from torch import Tensor

import effkernels
from effkernels.cli import main
from effkernels.models import conversion_check, read_checkpoint
from effkernels.models.conversion import convert
from effkernels.models.peers import import_torchvision

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """timm's B0; shared, so take copies to change it."""
    return small_timm_b0().state_dict()


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a training script keeps it."""
    file = tmp_path_factory.mktemp("given") / "timm.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    return file


def assert_holds(file: Path, wanted: State) -> None:
    """The very tensors; in which order is the file format's affair."""
    found = read_checkpoint(file).tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    try:
        status = main(["convert", *map(str, arguments)])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_writes_what_the_library_loads(
    capsys: pytest.CaptureFixture[str], state: State, file: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"nvidia{suffix}"
    status, text, err = run(capsys, file, "--to", "nvidia", "--output", out, "--model", "efficientnet_b0")
    assert status == 0
    assert list(tmp_path.iterdir()) == [out]
    assert_holds(out, effkernels.convert_state_dict(state, None, "nvidia")[0])
    assert f"360 tensors in {out}" in text
    assert "padding                symmetric" in text
    assert "    model = EfficientNet(arch=effnet_b0_layers, dropout=0.2, bn_epsilon=1e-05, bn_momentum=0.1)" in text
    assert "trt=True" in err


def test_safetensors_hold_the_semantics(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    out = tmp_path / "out.safetensors"
    arguments = (file, "--to", "torchvision", "--output", out, "--model", "tf_efficientnet_b0", "--json")
    status, text, err = run(capsys, *arguments)
    assert status == 0
    report = json.loads(text)
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    semantics = json.loads(metadata["effkernels"])
    assert semantics == {key: report[key] for key in semantics}
    assert (semantics["source"], semantics["target"], semantics["variant"]) == ("timm", "torchvision", "b0")
    assert (semantics["pad_type"], semantics["bn_eps"], semantics["native_size"]) == ("same", 1e-3, 224)
    assert all(warning in err for warning in semantics["warnings"])
    assert report["output"] == str(out)
    assert report["verification"] is None


def test_overwrites_only_when_told(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    out.write_text("precious")
    arguments = (file, "--to", "lukemelas", "--output", out)
    status, text, err = run(capsys, *arguments)
    assert (status, text) == (2, "")
    assert f"--output {out} exists; --force overwrites it" in err
    assert out.read_text() == "precious"
    assert run(capsys, *arguments, "--force")[0] == 0
    assert read_checkpoint(out).layout.name == "lukemelas"


def test_a_failed_write_leaves_the_old_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path
) -> None:
    def half(tensors: State, part: Path) -> None:
        part.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.pth"
    out.write_text("precious")
    monkeypatch.setattr(torch, "save", half)
    status, _, err = run(capsys, file, "--to", "lukemelas", "--output", out, "--force")
    assert status == 2
    assert "No space left on device" in err
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_can_be_converted_in_place(
    capsys: pytest.CaptureFixture[str], state: State, file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.safetensors"
    assert run(capsys, file, "--to", "huggingface", "--output", own)[0] == 0
    assert run(capsys, own, "--from", "huggingface", "--to", "timm", "--output", own, "--force")[0] == 0
    assert_holds(own, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "keras", "--output", "x.pth"], "invalid choice: 'keras'"),
        (["--output", "x.pth"], "--to"),
        (["--to", "timm", "--output", "x.onnx"], "the name must end in one of .pth, .pt, .safetensors"),
        (["--to", "timm", "--output", "nowhere/x.pth"], "there is no folder nowhere"),
        (["--to", "timm", "--output", "x.pth", "--from", "nvidia"], "--from nvidia: the keys in"),
        (["--to", "timm", "--output", "x.pth", "--model", "b3"], "--model b3: variant is b3, but the tensors"),
        (["--to", "timm", "--output", "x.pth", "--model", "resnet50"], "--model resnet50: "),
        (["--to", "timm", "--output", "x.pth", "--verify"], "--verify: the meaning of the weights is not known"),
    ],
)
def test_wrong_arguments(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text, err = run(capsys, file, *arguments)
    assert (status, text) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_wrong_files(capsys: pytest.CaptureFixture[str], state: State, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save({key: value for key, value in state.items() if key != "bn2.bias"}, tmp_path / "gap.pth")
    for name, message in (
        ("none.pth", "none.pth"),
        ("text.pth", "text.pth is not"),
        ("gap.pth", f"{tmp_path / 'gap.pth'}: state_dict (timm keys) is not that of a b0\n  missing (1): bn2.bias"),
    ):
        status, _, err = run(capsys, tmp_path / name, "--to", "nvidia", "--output", tmp_path / "x.pth")
        assert status == 2
        assert message in err


def test_verified(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    arguments = (file, "--to", "torchvision", "--output", out, "--model", "efficientnet_b0", "--verify")
    status, text, _ = run(capsys, *arguments)
    assert status == 0
    assert out.exists()
    assert text.count("same logits") == 2
    assert "224x224" in text
    assert "169x169" in text


def test_what_does_not_verify_is_not_written(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    arguments = (file, "--to", "torchvision", "--output", out, "--model", "tf_efficientnet_b0", "--verify")
    status, text, err = run(capsys, *arguments, "--json")
    assert status == 1
    assert not out.exists()
    report = json.loads(text)
    assert report["output"] is None
    assert not report["verification"]["passed"]
    assert not any(one["same"] or one["expected"] for one in report["verification"]["comparisons"])
    assert f"{out} is not written: the logits differ" in err


def test_verified_without_the_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path
) -> None:
    """Then our own model replaces theirs, which finds wrong tensors in wrong places as well."""
    for package in ("efficientnet_pytorch", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "out.pth"
    arguments = (file, "--to", "lukemelas", "--output", out, "--model", "tf_efficientnet_b0", "--verify", "--json")
    status, text, _ = run(capsys, *arguments)
    assert status == 0
    verification = json.loads(text)["verification"]
    assert verification["source"] == "effkernels, in place of timm (not installed)"
    assert verification["target"] == "effkernels, in place of lukemelas (not installed)"


def test_verification_finds_a_wrong_tensor(state: State) -> None:
    conversion = convert(state, None, "torchvision", variant="efficientnet_b0")
    first, second = "features.2.1.block.0.1.weight", "features.2.1.block.1.1.weight"
    tensors = conversion.tensors
    tensors[first], tensors[second] = tensors[second], tensors[first]
    found = conversion_check.verify(state, conversion, (65,))
    assert not found.passed
    assert found.comparisons[0].expected


def test_verification_loads_strictly(state: State) -> None:
    conversion = convert(state, None, "torchvision", variant="efficientnet_b0")
    del conversion.tensors["features.8.0.weight"]
    with pytest.raises(conversion_check.VerificationError, match=r"torchvision .* does not take the weights"):
        conversion_check.verify(state, conversion, (65,))


def test_a_model_that_cannot_be_built_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path
) -> None:
    import_torchvision()
    from torchvision import models

    monkeypatch.delattr(models, "efficientnet_b0")
    out = tmp_path / "out.pth"
    arguments = (file, "--to", "torchvision", "--output", out, "--model", "efficientnet_b0", "--verify")
    status, text, err = run(capsys, *arguments)
    assert (status, text) == (1, "")
    assert "does not build the model as shown: module 'torchvision.models' has no attribute" in err
    assert not out.exists()


def test_weights_of_unknown_meaning_are_converted_with_a_warning(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    status, text, err = run(capsys, file, "--to", "torchvision", "--output", tmp_path / "out.pt")
    assert status == 0
    assert text.count("not known") == 3
    assert "build the model by" not in text
    assert "do not distinguish efficientnet_b0" in err
    assert read_checkpoint(tmp_path / "out.pt").layout.name == "torchvision"

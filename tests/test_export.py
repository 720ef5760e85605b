"""export_model and `effkernels export`: what is in the files, that they compute the same elsewhere, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors
import torch
from parity import assert_parity, assert_same_precision, joined
from peer_models import images, in_both_layouts, in_float64, randomise, small
from torch import Tensor, nn
from without_package import run_python

import effkernels
from effkernels import _library, export
from effkernels.cli import main
from effkernels.export import ExportError, export_model, formats
from effkernels.export.sizes import Range, Sizes
from effkernels.models import EfficientNet, EfficientNetFeatures, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
needs_library = pytest.mark.skipif(not _library.is_loaded(), reason=f"no library: {_library.load_error()}")


@pytest.fixture(scope="module")
def b0() -> EfficientNet:
    found = randomise(effkernels.create_model("efficientnet_b0", device="meta", num_classes=7))
    assert isinstance(found, EfficientNet)
    return found


def assert_same_logits(
    run: Callable[[Tensor], Tensor],
    model: nn.Module,
    *shapes: tuple[int, int, int],
    rule: Callable[[Tensor, Sequence[Tensor], Tensor, str], None] = assert_parity,
) -> None:
    """Assert a rule over all the shapes (batch, height, width) at once; by default the tolerance rule."""
    with torch.inference_mode(), effkernels.backend("reference"):
        inputs = [images(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        plain = zip(*(in_both_layouts(model, x) for x in inputs), strict=True)
        truth = joined([in_float64(model, x) for x in inputs])
        rule(joined([run(x) for x in inputs]), [joined(way) for way in plain], truth, "logits")


def left_in(folder: Path) -> list[str]:
    """Return all files in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_ranges_are_written_as_they_are_read() -> None:
    assert [str(Range.of("n", value)) for value in (8, (8, 8), (1, 64))] == ["8", "8", "1:64"]


def test_every_size_that_is_tried_is_allowed() -> None:
    for batch, image in ((1, 224), (8, (64, 1024)), ((1, 64), (33, 40)), ((3, 4), 64)):
        sizes = Sizes.of(batch, image, 3)
        example = sizes.example()
        tried = [(n, h, w) for (h, w), batches in sizes.probes() for n in batches] + [(example[0], *example[2:])]
        for n, height, width in tried:
            assert sizes.batch.clamp(n) == n
            assert (sizes.image.clamp(height), sizes.image.clamp(width)) == (height, width)
        assert len({n for n, _, _ in tried}) >= (1 if sizes.batch.fixed else 2)


# ----------------------------------------------------------------------------------------------------- PyTorch programs


@needs_library
def test_a_program_runs_without_the_package(tmp_path: Path) -> None:
    model = small(pad_type="same")
    done = export_model(model, tmp_path / "net.pt2", "pt2", batch_size=(1, 8), image_size=(64, 160))
    assert left_in(tmp_path) == ["libeffkernels.so", "net.pt2"]
    assert done.library == tmp_path / "libeffkernels.so"
    assert done.input_shape == "1:8,3,64:160,64:160"
    assert done.error <= done.limit
    assert set(done.operators) <= {f"effkernels::{name}" for name in effkernels.ops.backends.OPERATORS}
    assert "effkernels::expand_depthwise_squeeze" in done.operators
    x = images(8, 65, 131)
    torch.save(x, tmp_path / "x.pt")
    run_python(
        "import torch\n"
        "torch.ops.load_library('libeffkernels.so')\n"
        "run = torch.export.load('net.pt2').module()\n"
        "x = torch.load('x.pt')\n"
        "torch.save(run(x), 'y.pt')\n"
        "try: run(x[:, :, :50])\n"
        "except AssertionError: pass\n"
        "else: raise SystemExit('a size outside of the range was taken')\n",
        tmp_path,
    )
    found = torch.load(tmp_path / "y.pt")
    assert_same_logits(lambda _: found, model, (8, 65, 131))


def test_without_fused_operators_no_library_is_needed(tmp_path: Path) -> None:
    with effkernels.backend("reference"):
        done = export_model(small(), tmp_path / "net.pt2", "pt2", batch_size=2, image_size=64)
    assert (done.library, done.operators) == (None, ())
    assert left_in(tmp_path) == ["net.pt2"]
    run_python("import torch; torch.export.load('net.pt2').module()(torch.zeros(2, 3, 64, 64))", tmp_path)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_programs_of_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    done = export_model(small(), tmp_path / "net.pt2", "pt2", image_size=64, dtype=dtype)
    assert done.dtype == str(dtype).removeprefix("torch.")
    program = torch.export.load(tmp_path / "net.pt2")
    assert program.module()(images(2, 64, 64).to(dtype)).dtype == dtype
    assert {value.dtype for value in program.state_dict.values() if value.is_floating_point()} == {dtype}


def test_a_backbone_gives_all_its_maps(tmp_path: Path) -> None:
    backbone = randomise(EfficientNetFeatures(small().architecture))
    export_model(backbone, tmp_path / "maps.pt2", "pt2", image_size=64)
    found = torch.export.load(tmp_path / "maps.pt2").module()(images(2, 64, 64))
    assert [tuple(y.shape) for y in found] == [tuple(y.shape) for y in backbone(images(2, 64, 64))]


# ----------------------------------------------------------------------------------------------------------------- ONNX


def in_onnxruntime(file: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def assert_standard(file: Path, opset: int) -> None:
    """A valid ONNX model with nothing in it but standard operators, and no folder of this machine."""
    proto = onnx.load(file)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert str(ROOT).encode() not in file.read_bytes()


def test_onnx_is_one_file_of_standard_operators(tmp_path: Path) -> None:
    model, file = small(), tmp_path / "net.onnx"
    done = export_model(model, file, "onnx", image_size="dynamic")
    assert left_in(tmp_path) == ["net.onnx"]
    assert done.library is None
    assert_standard(file, 20)
    proto = onnx.load(file)
    axes = [size.dim_param or size.dim_value for size in proto.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    noted = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(noted["effkernels"])["input_shape"] == "1:64,3,64:1024,64:1024"
    assert_same_logits(in_onnxruntime(file), model, (1, 64, 64), (64, 75, 133), rule=assert_same_precision)


@pytest.mark.parametrize("opset", [pytest.param(18, marks=pytest.mark.thorough), 23])
def test_onnx_of_the_opset_asked_for_leaves_the_model_as_it_is(opset: int, tmp_path: Path) -> None:
    """Its own choice of a backend would put fused operators into the graph."""
    model, file = small(pad_type="same", backend="auto").train(), tmp_path / "net.onnx"
    before = copy.deepcopy(model.state_dict())
    export_model(model, file, "onnx", image_size=64, opset=opset)
    assert model.training
    assert model.backend == "auto"
    assert all(p.requires_grad for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert_standard(file, opset)
    model.eval().backend = None
    assert_same_logits(in_onnxruntime(file), model, (1, 64, 64), (64, 64, 64), rule=assert_same_precision)


@pytest.mark.slow
def test_onnx_of_a_network_with_same_padding(tmp_path: Path) -> None:
    model = small(pad_type="same")
    export_model(model, tmp_path / "net.onnx", "onnx", image_size="dynamic")
    assert_standard(tmp_path / "net.onnx", 20)
    assert_same_logits(
        in_onnxruntime(tmp_path / "net.onnx"), model, (1, 65, 97), (2, 224, 64), rule=assert_same_precision
    )


# ---------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(("pad_type", "bn_eps"), [("", 1e-5), ("same", 1e-3), ("same_native", 1e-3)])
def test_weights_read_back_with_their_meaning(b0: EfficientNet, pad_type: str, bn_eps: float, tmp_path: Path) -> None:
    """A name alone implies one padding and one eps; the file says which ones its weights have."""
    model = copy.deepcopy(b0)
    model.set_padding(pad_type)
    model.set_norm(eps=bn_eps, momentum=0.02)
    done = export_model(model, tmp_path / "net.safetensors", "safetensors", image_size=64)
    assert done.library is None
    for name in ("efficientnet_b0", "tf_efficientnet_b0"):
        again = load_checkpoint(name, tmp_path / "net.safetensors").eval()
        assert isinstance(again, EfficientNet)
        assert (again.pad_type, again.bn1.eps, again.bn1.momentum, again.num_classes) == (pad_type, bn_eps, 0.02, 7)
        with torch.inference_mode():
            x = images(2, 65, 96)
            assert torch.equal(again(x), model(x))
    overridden = load_checkpoint("efficientnet_b0", tmp_path / "net.safetensors", pad_type="", bn_eps=1e-5)
    assert (overridden.pad_type, overridden.bn1.eps, overridden.bn1.momentum) == ("", 1e-5, 0.02)


def test_the_file_of_weights_is_everybodys(b0: EfficientNet, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    export_model(b0, file, "safetensors", image_size=64, dtype=torch.bfloat16)
    with safetensors.safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
        noted = json.loads(opened.metadata()["effkernels"])
        assert set(opened.keys()) == set(b0.state_dict())
        assert opened.get_tensor("conv_stem.weight").dtype == torch.bfloat16
    assert (noted["model"], noted["pad_type"], noted["dtype"]) == ("efficientnet_b0", "", "bfloat16")
    (tmp_path / "usual").touch()
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_damaged_note_is_refused(b0: EfficientNet, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(b0.state_dict(), tmp_path / "net.safetensors", {"effkernels": "not JSON"})
    with pytest.raises(effkernels.models.CheckpointError, match="metadata under 'effkernels'"):
        load_checkpoint("efficientnet_b0", tmp_path / "net.safetensors")


# ------------------------------------------------------------------------------------------------------------- refusals


def wrong(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the network, but its first logit 0.1 % off."""
    return lambda x: run(x) * torch.tensor([1.001] + [1.0] * 9)


@pytest.mark.parametrize("spoil", [wrong, lambda run: lambda x: run(x)[:1], lambda run: lambda x: run(x) * torch.nan])
def test_a_file_that_computes_something_else_is_not_left(
    spoil: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = formats.FORMATS["pt2"]
    spoiled = dataclasses.replace(kind, write=lambda job: spoil(kind.write(job)))
    monkeypatch.setitem(formats.FORMATS, "pt2", spoiled)
    with pytest.raises(ExportError, match=r"as pt2 differs from the network: error .*, limit "):
        export_model(small(), tmp_path / "net.pt2", "pt2", image_size=64)
    assert left_in(tmp_path) == []


def test_a_network_that_cannot_be_traced_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class FixedSize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) + torch.ones(2, 3 * 64 * 64)

    for network in (Branches(), FixedSize()):
        with pytest.raises(ExportError, match=r"torch\.export cannot trace"):
            export_model(network, tmp_path / "net.pt2", "pt2", image_size=64)
    assert left_in(tmp_path) == []


def test_triton_operators_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are Python, which is not where the file runs."""
    monkeypatch.setattr(formats.Job, "operators", property(lambda job: ("effkernels_triton::conv_bn_act",)))
    with pytest.raises(ExportError, match="Triton kernels, which need Python"):
        export_model(small(), tmp_path / "net.pt2", "pt2", image_size=64)
    with pytest.raises(ExportError, match="should be plain PyTorch"):
        export_model(small(), tmp_path / "net.onnx", "onnx", image_size=64)


@pytest.mark.parametrize(
    ("name", "format", "options", "message"),
    [
        ("a.pt2", "tflite", {}, "format='tflite'; allowed: aoti, onnx, pt2, safetensors"),
        ("a.pth", "pt2", {}, "allowed for format='pt2': a name that ends in .pt2"),
        ("a.pt2", "pt2", {"batch_size": 0}, "batch_size=0; allowed: at least 1"),
        ("a.pt2", "pt2", {"batch_size": (4, 2)}, r"batch_size=\(4, 2\); allowed: a range from a smaller number"),
        ("a.pt2", "pt2", {"image_size": (32, 64)}, r"image_size=\(32, 64\); allowed: a range from at least 33"),
        ("a.pt2", "pt2", {"image_size": "any"}, "image_size='any'; allowed: a number"),
        ("a.pt2", "pt2", {"dtype": torch.float64}, "dtype=torch.float64; allowed for format='pt2'"),
        ("a.onnx", "onnx", {"dtype": torch.bfloat16}, "allowed for format='onnx': torch.float32"),
        ("a.onnx", "onnx", {"device": "cuda"}, "device='cuda'; allowed for format='onnx', whose files run on any"),
        ("a.pt2", "pt2", {"device": "meta"}, "device='meta'; allowed for format='pt2': cpu, cuda"),
        ("a.onnx", "onnx", {"opset": 17}, "opset=17; allowed: 18 to 23"),
        ("a.pt2", "pt2", {"opset": 20}, "opset=20 is for format='onnx'"),
        ("a.safetensors", "safetensors", {}, "is for classifiers of create_model"),
    ],
)
def test_wrong_arguments_are_named(
    name: str, format: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(small(), tmp_path / name, format, **{"image_size": 64, **options})
    assert left_in(tmp_path) == []


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        export_model(effkernels.create_model("efficientnet_b0", device="meta"), tmp_path / "a.pt2", "pt2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finds no GPU; allowed here: cpu"):
        export_model(small(), tmp_path / "a.pt2", "aoti", device="cuda")


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxruntime"), ("safetensors", "safetensors")])
def test_a_missing_package_is_named_with_its_extra(
    format: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    message = f"{package} is not installed: pip install 'effkernels[export]'"
    with pytest.raises(ImportError, match=re.escape(message)):
        export_model(small(), tmp_path / f"a.{format}", format)


def test_files_are_replaced_only_when_asked(tmp_path: Path) -> None:
    file, library = tmp_path / "net.pt2", tmp_path / "libeffkernels.so"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"net\.pt2' exists already"):
        export_model(small(), file, "pt2", image_size=64)
    assert file.read_text() == "mine"
    export_model(small(), file, "pt2", image_size=64, overwrite=True)
    assert torch.export.load(file)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_model(small(), tmp_path / "nowhere" / "net.pt2", "pt2")
    if _library.is_loaded():
        library.write_text("another build")
        with pytest.raises(FileExistsError, match="exists already and is another build"):
            export_model(small(), tmp_path / "other.pt2", "pt2", image_size=64)
        assert library.read_text() == "another build"
        assert left_in(tmp_path) == ["libeffkernels.so", "net.pt2"]


# --------------------------------------------------------------------------------------------------------- command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of `effkernels export`."""
    try:
        status = main(["export", *map(str, arguments)])
    except SystemExit as left:
        status = int(left.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


def test_the_command_exports_a_checkpoint(b0: EfficientNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(b0.state_dict(), tmp_path / "mine.pth")
    output, common = tmp_path / "net.pt2", ("--checkpoint", tmp_path / "mine.pth", "--image-size", "64")
    arguments = ("--model", "efficientnet_b0", *common, "--format", "pt2", "--batch-size", "1:4", "--output", output)
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["file"] == str(output)
    assert report["input_shape"] == "1:4,3,64,64"
    assert report["checked"] == [[1, 3, 64, 64], [2, 3, 64, 64], [4, 3, 64, 64]]
    assert torch.export.load(output).module()(images(3, 64, 64)).shape == (3, 7)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert "--force" in err


def test_the_command_warns_of_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.safetensors"
    status, _, err = run(capsys, "--format", "safetensors", "--image-size", "64", "--output", file)
    assert status == 0
    assert "the weights of efficientnet_b0 are RANDOM" in err
    assert run(capsys, "--format", "safetensors", "--image-size", "64", "--output", file, "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --format, --output"),
        (["--format", "coreml", "--output", "a"], "invalid choice: 'coreml'"),
        (["--format", "pt2", "--output", "a.onnx"], "a name that ends in .pt2"),
        (["--format", "pt2", "--output", "a.pt2", "--model", "resnet50"], "--model: unknown model 'resnet50'"),
        (["--format", "pt2", "--output", "a.pt2", "--batch-size", "1:2:3"], "'1:2:3' is neither a number nor a range"),
        (["--format", "pt2", "--output", "a.pt2", "--batch-size", "0"], "batch_size=0; allowed: at least 1"),
        (["--format", "pt2", "--output", "a.pt2", "--image-size", "big"], "'big' is neither a number nor a range"),
        (["--format", "pt2", "--output", "a.pt2", "--checkpoint", "nowhere.pth"], "--checkpoint nowhere.pth"),
        (["--format", "pt2", "--output", "a.pt2", "--device", "tpu"], "--device tpu"),
        (["--format", "pt2", "--output", "a.pt2", "--precision", "amp"], "invalid choice: 'amp'"),
        (["--format", "pt2", "--output", "nowhere/a.pt2"], "there is no folder nowhere"),
        (["--format", "onnx", "--output", "a.onnx", "--opset", "99"], "opset=99; allowed: 18 to 23"),
    ],
)
def test_wrong_arguments_of_the_command(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert left_in(tmp_path) == []


def test_a_failed_check_is_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = formats.FORMATS["safetensors"]
    spoiled = dataclasses.replace(kind, write=lambda job: lambda x: kind.write(job)(x) * 1.001)
    monkeypatch.setitem(export.FORMATS, "safetensors", spoiled)
    file = tmp_path / "net.safetensors"
    status, out, err = run(capsys, "--format", "safetensors", "--image-size", "64", "--output", file)
    assert (status, out) == (1, "")
    assert "differs from the network" in err
    assert left_in(tmp_path) == []

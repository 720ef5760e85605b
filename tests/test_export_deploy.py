"""docs/deployment.md, run as written: exports here, what runs the files in processes without effkernels."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from parity import assert_parity, assert_same_precision
from peer_models import images, in_both_layouts, in_float64, small
from torch import Tensor
from without_package import environment, run_python

import effkernels
from effkernels import _library
from effkernels.cli import main
from effkernels.export import export_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "deployment.md"
TORCH = Path(torch.__path__[0])


def reason_not_to_run() -> str:
    """Return what this machine lacks to build an AOTInductor package and a program; "" for nothing."""
    if not _library.is_loaded():
        return f"no operator library: {_library.load_error()}"
    tools = [name for name in (os.environ.get("CXX") or "g++", "cmake", "make", "ldd") if not shutil.which(name)]
    if tools:
        return f"not installed: {', '.join(tools)}"
    header = TORCH / "include/torch/csrc/inductor/aoti_package/model_package_loader.h"
    return "" if header.exists() else f"this torch comes without headers: {header.name}"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("deploy"),
    pytest.mark.skipif(bool(reason_not_to_run()), reason=reason_not_to_run()),
]


def blocks(language: str) -> list[str]:
    """Return the page's code in a language, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def command(line: str, folder: Path) -> str:
    """Standard output of a command of the page; only effkernels itself can import effkernels."""
    program, *arguments = shlex.split(line)
    if program == "effkernels":  # four exports load torch's compiler once
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
            patch.chdir(folder)
            assert main(arguments) == 0, line
        return output.getvalue()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, **environment(folder), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder after every command of the page, and what each of them printed."""
    folder = tmp_path_factory.mktemp("deployment")
    (folder / "tests").symlink_to(ROOT / "tests")
    for code in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", code)
        assert name, f"a program without its name in the first line:\n{code}"
        (folder / name[1]).write_text(code)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    if find_spec("openvino") is None:
        lines.remove("python openvino_serve.py")
    return folder, {line: command(line, folder) for line in lines}


def raw(file: Path, *shape: int) -> Tensor:
    return torch.from_numpy(numpy.fromfile(file, numpy.float32)).reshape(shape)


def test_every_program_gives_the_models_logits(served: tuple[Path, dict[str, str]]) -> None:
    folder, _ = served
    model = effkernels.models.load_checkpoint("efficientnet_b0", folder / "b0.safetensors").eval()
    x = raw(folder / "images.raw", 4, 3, 224, 224)
    with torch.inference_mode(), effkernels.backend("reference"):
        plain, truth = in_both_layouts(model, x), in_float64(model, x)
    for name in ("python", "cpp", "program"):
        assert_parity(raw(folder / f"{name}.raw", 4, 1000), plain, truth, name)
    assert_same_precision(raw(folder / "onnx.raw", 4, 1000), plain, truth, "onnx")


def test_openvino_computes_in_float32_where_it_is_asked_to(served: tuple[Path, dict[str, str]]) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    folder, _ = served
    model = effkernels.models.load_checkpoint("efficientnet_b0", folder / "b0.safetensors").eval()
    x = raw(folder / "images.raw", 4, 3, 224, 224)
    with torch.inference_mode(), effkernels.backend("reference"):
        plain, truth = in_both_layouts(model, x), in_float64(model, x)
    assert_same_precision(raw(folder / "openvino.raw", 4, 1000), plain, truth)
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return  # this processor has nothing but float32
    unasked = core.compile_model(folder / "b0.onnx", "CPU")
    assert unasked.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
    with pytest.raises(AssertionError, match="error"):
        assert_same_precision(torch.from_numpy(unasked(x.numpy())[0]), plain, truth)


def test_cpp_and_python_give_the_same_bits(served: tuple[Path, dict[str, str]]) -> None:
    folder, _ = served
    assert (folder / "cpp.raw").read_bytes() == (folder / "python.raw").read_bytes()


def test_no_python_is_linked(served: tuple[Path, dict[str, str]]) -> None:
    folder, printed = served
    linked = printed["ldd build/deploy/run_package"] + command("ldd libeffkernels.so", folder)
    assert "libtorch_cpu.so" in linked
    assert [line for line in linked.splitlines() if "python" in Path(line.split(" => ")[0]).name] == []


def test_the_excerpt_on_the_page_is_of_the_program() -> None:
    source = " ".join((ROOT / "tests/deploy/run_package.cpp").read_text().split())
    lines = [line for block in blocks("cpp") for line in block.splitlines()]
    assert [line for line in lines if " ".join(line.split()) not in source] == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("b0.pt2", 2, "usage: run_package"),
        ("b0.pt2 images.raw 4 3 224 none out.raw", 2, "'none' is not a size"),
        ("--device tpu b0.pt2 images.raw 4 3 224 224 out.raw", 2, "--device tpu; allowed: cpu, cuda"),
        ("b0.pt2 images.raw 2 3 224 224 out.raw", 1, "2408448 bytes, and the shape given has 1204224"),
        ("b0.pt2 images.raw 4 3 112 448 out.raw", 1, "a size of 112; the package is for (1:64,3,224,224)"),
        ("b0.pt2 nowhere.raw 4 3 224 224 out.raw", 1, "nowhere.raw: cannot be read"),
        ("b0.pt2 images.raw 4 3 224 224 nowhere/out.raw", 1, "nowhere/out.raw: cannot be written"),
        ("--library none.so b0.pt2 images.raw 4 3 224 224 out.raw", 1, "the operator library cannot be loaded: none"),
        ("alone/b0.pt2 images.raw 4 3 224 224 out.raw", 1, "Could not find schema for effkernels::"),
    ],
)
def test_the_program_says_what_is_wrong(
    arguments: str, status: int, message: str, served: tuple[Path, dict[str, str]]
) -> None:
    folder, _ = served
    (folder / "alone").mkdir(exist_ok=True)
    shutil.copy(folder / "b0.pt2", folder / "alone")
    words: Sequence[str] = ["build/deploy/run_package", *arguments.split()]
    done = subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == status
    assert message in done.stderr


def test_a_package_with_open_sizes_and_same_padding(served: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Padding that depends on the size goes through the package as symbols, and the dtype through its metadata."""
    folder, _ = served
    model, dtype = small(pad_type="same").to(torch.bfloat16), torch.bfloat16
    done = export_model(model, tmp_path / "net.pt2", "aoti", image_size=(64, 160), dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libeffkernels.so", "net.pt2"]
    assert done.error <= done.limit
    x = images(64, 97, 66).to(dtype)
    x.float().numpy().tofile(tmp_path / "x.raw")
    command(f"{folder}/build/deploy/run_package net.pt2 x.raw 64 3 97 66 y.raw", tmp_path)
    with torch.inference_mode(), effkernels.backend("reference"):
        plain, truth = in_both_layouts(model, x), in_float64(model, x)
    assert_parity(raw(tmp_path / "y.raw", 64, 10).to(dtype), plain, truth)
    run_python(
        "import torch\n"
        "torch.ops.load_library('libeffkernels.so')\n"
        "run = torch._inductor.aoti_load_package('net.pt2')\n"
        "assert run(torch.zeros(1, 3, 64, 160, dtype=torch.bfloat16)).shape == (1, 10)\n"
        "assert run(torch.zeros(64, 3, 64, 64, dtype=torch.bfloat16)).shape == (64, 10)\n"
        "try: run(torch.zeros(65, 3, 64, 64, dtype=torch.bfloat16))\n"
        "except RuntimeError as error: assert 'too large at 0, expected to be <= 64' in str(error)\n"
        "else: raise SystemExit('a batch outside of the range was taken')\n",
        tmp_path,
    )

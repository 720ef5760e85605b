"""The compiled library and the package around it: what it links, what it registers, how it is configured and packed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import effkernels
from effkernels import _library
from effkernels.ops import backends

ROOT = Path(__file__).resolve().parents[1]

needs_library = pytest.mark.skipif(not _library.is_loaded(), reason=f"no library: {_library.load_error()}")


def run(*command: str | Path, **options: object) -> str:
    """Standard output of a command; its error output is in the failure's message."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def tool(name: str) -> str:
    """Path of a program that the dev extra installs beside Python."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"{name} is part of the dev extra and was not found"
    return found


def test_the_library_is_built_and_loaded() -> None:
    assert _library.load_error() is None
    assert _library.is_loaded()


# ------------------------------------------------------------------------------------------------- the binary's edges


@needs_library
def test_only_the_stable_abi_of_torch_is_used() -> None:
    audit = json.loads(run(tool("torch-abi-audit"), "--json", _library.LIBRARY_FILE))
    [library] = audit["bundled_libs"]
    torch_use = library["torch"]
    assert library["error"] is None
    assert torch_use["uses_torch"]
    assert torch_use["stable"]
    assert torch_use["unstable_symbols"] == torch_use["unknown_shim_symbols"] == []
    oldest = tuple(int(part) for part in torch_use["min_torch_version"].split(".")[:2])
    assert oldest <= _library.OLDEST_TORCH


@needs_library
def test_undefined_symbols_are_the_c_shim_and_the_system() -> None:
    lines = run("nm", "-D", "--undefined-only", _library.LIBRARY_FILE).splitlines()
    symbols = [line.split()[-1] for line in lines if line.split()[0] == "U"]
    foreign = [name for name in symbols if "@" not in name and not re.match(r"(aoti_torch|torch)_\w+$", name)]
    assert foreign == [], "symbols that no versioned system library and no C shim of torch provides"
    assert any(name.startswith("aoti_torch_library_") for name in symbols)
    assert [name for name in symbols if name.startswith(("Py", "_Py", "cuda", "__cuda"))] == []


@needs_library
def test_it_exports_nothing_and_links_only_torch_cpu() -> None:
    assert run("nm", "-D", "--defined-only", _library.LIBRARY_FILE).split() == []
    dynamic = run("readelf", "-d", _library.LIBRARY_FILE)
    needed = re.findall(r"NEEDED.*\[([^\]]+)\]", dynamic)
    system = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|librt|ld-linux.*)\.so(\.\d+)?$"
    assert [name for name in needed if not re.match(system, name)] == ["libtorch_cpu.so"]
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


# ------------------------------------------------------------------------------------------------------ registrations


@needs_library
@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_every_operator_has_a_cpu_kernel(operator: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"effkernels::{operator}", "CPU")


@needs_library
@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_cuda_kernels_are_registered_where_they_were_built(operator: str) -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"effkernels::{operator}", "CUDA")
    assert registered == _library.build_info()["cuda"]


@needs_library
def test_build_info_says_what_was_built() -> None:
    info = _library.build_info()
    assert info["version"] == effkernels.__version__
    assert re.match(r"2\.\d+", info["torch"])
    assert info["torch_target"] == "2.11"
    assert info["cpu_isas"][-1] == "plain"
    assert set(info["cpu_isas"]) <= {"amx_bf16", "avx512_bf16", "avx512", "avx2", "plain"}
    assert info["cuda"] == bool(info["cuda_version"]) == bool(info["cuda_archs"])
    if info["cuda"]:
        assert info["cuda_archs"][-1].endswith("-virtual"), "PTX, so that later GPUs run it too"


@needs_library
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")
@pytest.mark.parametrize("stream", ["current", "side"])
def test_a_cuda_kernel_runs_on_the_current_stream(stream: str) -> None:
    x, weight = torch.randn(2, 32, 33, 35, device="cuda"), torch.randn(32, 1, 3, 3, device="cuda")
    expected = effkernels.ops.reference.depthwise_bn_act_squeeze(x, weight, padding=(1, 1, 1, 1))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if stream == "side" else torch.cuda.current_stream()):
        with effkernels.backend("cuda"):
            results = [effkernels.ops.depthwise_bn_act_squeeze(x, weight, padding=(1, 1, 1, 1)) for _ in range(2)]
        torch.cuda.current_stream().synchronize()
    for first, second, reference in zip(*results, expected, strict=True):
        assert torch.equal(first, second), "the same bits from run to run"
        torch.testing.assert_close(first, reference, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------- without a usable library


def copied_package(folder: Path) -> Path:
    """Return a copy of the package without its compiled part; the folder to put on PYTHONPATH."""
    shutil.copytree(ROOT / "effkernels", folder / "effkernels", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return folder


def import_copy(folder: Path) -> list[str]:
    """is_loaded, load_error and the result of an operator in a fresh interpreter that imports the copy."""
    code = (
        "import torch, effkernels; from effkernels import _library;"
        "y = effkernels.ops.depthwise_bn_act(torch.ones(1, 8, 5, 5), torch.ones(8, 1, 3, 3));"
        "print(effkernels.__file__, _library.is_loaded(), _library.load_error(), y.sum().item(), sep='\\n')"
    )
    lines = run(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": str(folder)}, cwd=folder).splitlines()
    assert Path(lines[0]).is_relative_to(folder)
    return lines[1:]


def test_without_the_library_the_reference_answers(tmp_path: Path) -> None:
    loaded, reason, total = import_copy(copied_package(tmp_path))
    assert loaded == "False"
    assert "is missing" in reason
    assert "make build" in reason
    assert float(total) == 9 * 9 * 8


@pytest.mark.parametrize("version", [effkernels.__version__, "0.0.1"])
def test_a_library_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path, version: str) -> None:
    library = copied_package(tmp_path) / "effkernels" / "lib"
    library.mkdir()
    (library / "libeffkernels.so").write_bytes(b"not a library")
    (library / "build_info.json").write_text(json.dumps({"version": version}))
    loaded, reason, total = import_copy(tmp_path)
    assert loaded == "False"
    assert ("could not load" if version == effkernels.__version__ else f"has version {version} and") in reason
    assert float(total) == 9 * 9 * 8


# ------------------------------------------------------------------------------------------------------ configuration


def configure(folder: Path, *options: str) -> tuple[int, str]:
    """Exit status and messages of a CMake configuration; every run of white space is one blank."""
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", ninja, python, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def without_nvcc() -> str:
    """Return the option that hides every place where nvcc may be found."""
    folders = {Path("/usr/local/cuda/bin"), *(Path(part) for part in os.environ["PATH"].split(os.pathsep) if part)}
    hidden = [str(folder) for folder in folders if (folder / "nvcc").exists()]
    return f"-DCMAKE_IGNORE_PATH={';'.join(hidden)}"


def test_cuda_off_builds_the_cpu_part_only(tmp_path: Path) -> None:
    status, messages = configure(tmp_path, "-DEFFKERNELS_CUDA=off")
    assert status == 0, messages
    assert "CPU part only, because EFFKERNELS_CUDA=off" in messages
    info = json.loads((tmp_path / "build_info.json").read_text())
    assert (info["cuda"], info["cuda_version"], info["cuda_archs"]) == (False, None, [])


def test_a_missing_nvcc_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    status, messages = configure(tmp_path / "auto", without_nvcc())
    assert status == 0, messages
    assert "CPU part only, because nvcc is neither on PATH" in messages
    status, messages = configure(tmp_path / "on", "-DEFFKERNELS_CUDA=on", without_nvcc())
    assert status != 0
    assert "EFFKERNELS_CUDA=on, but the CUDA kernels cannot be built" in messages


@pytest.mark.parametrize(
    ("option", "allowed"),
    [("EFFKERNELS_CUDA=maybe", "allowed: auto, on, off"), ("EFFKERNELS_CUDA_ARCHS=sm_90", "a list such as")],
)
def test_a_wrong_option_is_named_with_what_is_allowed(tmp_path: Path, option: str, allowed: str) -> None:
    status, messages = configure(tmp_path, f"-D{option}")
    assert status != 0
    assert option in messages
    assert allowed in messages


# -------------------------------------------------------------------------------------------------------- the Makefile


def commands_of(target: str, folder: Path, gpus: str) -> str:
    """The commands that make would run in a clone without an environment, on a machine with these GPUs."""
    library = [f"{name}={folder / file}" for name, file in (("LIBRARY", ".built"), ("CPU_LIBRARY", ".built-cpu"))]
    return run("make", "-n", "-C", ROOT, target, f"VENV={folder / 'venv'}", *library, f"THIS_MACHINE={gpus}")


@pytest.mark.parametrize(("gpus", "cpu_part_alone"), [("", True), ("90", False)])
def test_bench_installs_what_it_compares_with_and_builds_what_can_run(
    tmp_path: Path, gpus: str, cpu_part_alone: bool
) -> None:
    commands = commands_of("bench", tmp_path, gpus)
    assert "install --no-compile -c constraints.txt timm rich" in commands
    assert ".[dev]" not in commands
    assert commands.count("build_ext") == 1
    assert ("EFFKERNELS_CUDA=off" in commands) == cpu_part_alone


def test_bench_keeps_a_whole_library(tmp_path: Path) -> None:
    (tmp_path / ".built").touch()
    assert "EFFKERNELS_CUDA=off" not in commands_of("bench", tmp_path, "")


def test_every_included_file_outside_csrc_leads_to_a_new_build() -> None:
    sources = re.search(r"^NATIVE_SOURCES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sources is not None
    included = {
        (source.parent / name).resolve().relative_to(ROOT)
        for source in (ROOT / "csrc").rglob("*.*")
        if source.suffix != ".pyc"
        for name in re.findall(r'^#include "(\.\./.*)"', source.read_text(), re.MULTILINE)
    }
    outside = {str(file) for file in included if file.parts[0] != "csrc"}
    assert outside
    assert outside <= set(sources[1].split())


@pytest.mark.parametrize("target", ["setup", "test"])
def test_setup_and_test_install_and_build_everything(tmp_path: Path, target: str) -> None:
    (tmp_path / ".built-cpu").touch()
    commands = commands_of(target, tmp_path, "")
    assert ".[dev]" in commands
    assert commands.count("build_ext") == 1
    assert "EFFKERNELS_CUDA=off" not in commands


def test_one_worker_runs_all_tests_of_a_group(tmp_path: Path) -> None:
    """The tests of the wheel, and others, share a folder that only one process at a time may write."""
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_group.py").write_text(
        "import os, pathlib, pytest, time\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "@pytest.mark.xdist_group('one')\n"
        "def test(number):\n"
        "    time.sleep(0.2)\n"
        "    pathlib.Path(f'ran_in_{os.getpid()}').touch()\n"
    )
    run(sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", tmp_path, cwd=tmp_path)
    assert len(list(tmp_path.glob("ran_in_*"))) == 1


# ---------------------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree. The options of the present build are kept, so that nothing is compiled anew: they name
    the build in the cache too, from where the library may have come.
    """
    folder, info = tmp_path_factory.mktemp("wheel"), _library.build_info()
    archs = [arch.removesuffix("-real") for arch in info.get("cuda_archs", []) if arch.endswith("-real")]
    options = {"EFFKERNELS_CUDA_ARCHS": ";".join(archs)} if info.get("cuda") else {"EFFKERNELS_CUDA": "off"}
    flags = ["--no-build-isolation", "--no-deps", "--disable-pip-version-check", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", ROOT, *flags, "-w", folder, env={**os.environ, **options})
    [file] = folder.glob("*.whl")
    return file


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_serves_every_python_and_needs_torch_and_triton(wheel: Path) -> None:
    assert re.fullmatch(rf"effkernels-{re.escape(effkernels.__version__)}-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata_name] = [name for name in names if name.endswith("/METADATA")]
        metadata = archive.read(metadata_name).decode()
    files = {"lib/libeffkernels.so", "lib/build_info.json", "plan/kernel_counts.json", "py.typed"}
    assert {f"effkernels/{file}" for file in files} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"effkernels"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    lines = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    required = [Requirement(line) for line in lines]
    runtime = {str(item) for item in required if not (item.marker and "extra" in str(item.marker))}
    assert runtime == {"torch>=2.11", 'triton; platform_system == "Linux"'}


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_becomes_a_manylinux_wheel_without_libtorch(wheel: Path, tmp_path: Path) -> None:
    """The last two commands of `make wheel`, on the wheel of the present build."""
    recipe = (ROOT / "Makefile").read_text()
    excluded = re.findall(r"--exclude '([^']+)'", recipe)
    assert excluded == ["libtorch*", "libc10*"]
    flags = [word for pattern in excluded for word in ("--exclude", pattern)]
    path = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    run(tool("auditwheel"), "repair", *flags, "--wheel-dir", tmp_path, wheel, env=path)
    [tagged] = tmp_path.glob("*.whl")
    oldest = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_\w+", tagged.name)]
    glibc = int(os.confstr("CS_GNU_LIBC_VERSION").split(".")[1])  # type: ignore[union-attr]
    assert oldest
    assert max(oldest) <= glibc
    with zipfile.ZipFile(tagged) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert libraries == ["effkernels/lib/libeffkernels.so"]
    run(tool("twine"), "check", "--strict", tagged)


def runtime_packages(folder: Path) -> Path:
    """A folder that holds torch, triton and what these require, and nothing else of this environment, as links."""
    folder.mkdir()
    wanted, seen = ["torch", "triton"], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            top = Path(file.parts[0])
            source, link = Path(str(distribution.locate_file(top))), folder / top
            if top.name not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(source)
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_checks_itself_in_an_environment_with_torch_alone(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch.pth").write_text(f"{runtime_packages(tmp_path / 'packages')}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EFFKERNELS"))}
    origin = run(python, "-c", "import effkernels; print(effkernels.__file__)", cwd=tmp_path, env=clean).strip()
    assert Path(origin).is_relative_to(site)
    answer = run(python.with_name("effkernels"), "check", cwd=tmp_path, env=clean)
    assert re.search(r"\b(\d+) of \1 passed", answer), answer

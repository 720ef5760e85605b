"""Build and load the emulated CUDA kernels: one Python module per flavour (CMakeLists.txt says what each is for).

Run as a program it builds the given flavours; `environment asan` prints the environment variables that a process with
the asan flavour needs.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "csrc"))

import build_cache  # noqa: E402

TREES = HERE.parent.parent / "build"
FLAVOURS = ("plain", "race", "asan")
# One report per fault and not per program, and no stop at the first: sanitizers.cpp makes an exception of it.
ASAN_OPTIONS = "detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0:detect_stack_use_after_return=0"


class CannotBuild(Exception):
    """This machine lacks what the emulator is built or loaded with; the message says what."""


class BuildFailed(Exception):
    """The sources do not compile; the message has the end of the compiler's."""


def tree(flavour: str) -> Path:
    """Return the folder where a flavour is built."""
    return TREES / f"emulation-{flavour}"


def module_name(flavour: str) -> str:
    return f"effkernels_emulated_{flavour}"


@functools.cache
def build(flavour: str) -> ModuleType:
    """Build what changed and import the module; its operators are in torch.ops from then on.

    Raises:
        CannotBuild: there is no compiler, no build tool, or no AddressSanitizer in this process.
        BuildFailed: the sources do not compile.
    """
    if flavour == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise CannotBuild("the asan flavour runs in a process with libasan preloaded: make test-asan")
    compile_flavour(flavour)
    import torch  # noqa: F401 (the module links its libraries)

    name = module_name(flavour)
    spec = importlib.util.spec_from_file_location(name, tree(flavour) / f"{name}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_flavour(flavour: str) -> None:
    """Build what changed of a flavour; its tree is shared by the processes of a test run."""
    if importlib.util.find_spec("pybind11") is None:
        raise CannotBuild("pybind11 was not found; run: pip install pybind11")
    import pybind11

    facts = {
        "flavour": flavour,
        "flags": " ".join(_fast_flags()),
        "python": sys.version,
        "pybind11": importlib.metadata.version("pybind11"),
    }
    options = (
        f"-DEFFKERNELS_FLAVOUR={flavour}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DEFFKERNELS_FAST_FLAGS={';'.join(_fast_flags())}",
    )
    compile_project("emulator", HERE, tree(flavour), f"{module_name(flavour)}.so", facts, options)


def compile_project(
    kind: str, project: Path, tree: Path, file: str, facts: Mapping[str, str], options: Iterable[str] = ()
) -> None:
    """Build what changed of a CMake project of the tests, or take it from the cache of builds.

    Args:
        kind: its name in the cache.
        project: the folder of its CMakeLists.txt.
        tree: the folder to build in, which the processes of a test run share.
        file: what is built, in that folder.
        facts: what it is made of beside its sources and torch.
        options: of CMake.

    Raises:
        CannotBuild: there is no compiler or no build tool.
        BuildFailed: the sources do not compile.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise CannotBuild(f"the C++ compiler {compiler} was not found")
    with _one_at_a_time(tree):
        known = {**facts, "torch": importlib.metadata.version("torch")}
        name = build_cache.key(build_cache.sources(project), known)
        stamp = tree / "restored"
        if stamp.exists() and stamp.read_text() == name:
            return
        if build_cache.restore(kind, name, [file], tree):
            stamp.write_text(name)
            return
        stamp.unlink(missing_ok=True)
        _run(_configure(project, tree, options))
        _run([_tool("cmake"), "--build", str(tree)])
        build_cache.keep(kind, name, [file], tree)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _configure(project: Path, tree: Path, options: Iterable[str]) -> list[str]:
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    return [
        _tool("cmake"),
        *("-S", str(project), "-B", str(tree), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DEFFKERNELS_TORCH_ROOT={Path(torch.origin).parent}",
        "-DCMAKE_BUILD_TYPE=",
        *options,
    ]


def _fast_flags() -> list[str]:
    """Return flags for instructions of this machine that make fmaf and conversions many times faster."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []
    return [f"-m{name}" for name in ("avx2", "fma", "f16c") if name in words]


def _tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise CannotBuild(f"{name} was not found; run: pip install {name}")
    return found


def _run(command: list[str]) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
    }  # libasan is not for tools
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise BuildFailed(f"this does not build: {' '.join(command)}\n{tail}")


def asan_environment() -> dict[str, str]:
    """Return the environment of a process that loads the asan flavour: libasan, with libstdc++ for exceptions."""
    compiler = os.environ.get("CXX", "c++")
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(str(Path(path.stdout.strip()).resolve()))
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": ASAN_OPTIONS}


if __name__ == "__main__":
    if sys.argv[1:2] == ["environment"]:
        print(" ".join(f"{name}={value}" for name, value in asan_environment().items()))
    else:
        for flavour in sys.argv[1:] or FLAVOURS:
            compile_flavour(flavour)

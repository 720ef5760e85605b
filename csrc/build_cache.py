"""Finished builds, kept by what they were made of, for whoever builds the same sources again in another folder.

``EFFKERNELS_BUILD_CACHE`` names the folder that holds them; without it nothing is kept and nothing is looked up. A
build is known by the text of every source, the versions of the tools and the options: whatever changes one of them
builds.
setup.py (the library) and tests/emulation/build.py (the emulator) use it; continuous integration sets it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "EFFKERNELS_BUILD_CACHE"
# Builds of one kind that are kept; the one that was used longest ago goes first.
MOST = 6
# Variables that compilers and CMake read.
READ_BY_TOOLS = (
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "CMAKE_BUILD_TYPE"),
    *("CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
)


def sources(*folders: Path) -> list[Path]:
    """Return every file that a build of these folders may read."""
    found = [
        ROOT / "CMakeLists.txt",
        ROOT / "setup.py",
        ROOT / "effkernels/_version.py",
        ROOT / "effkernels/ops/schemas.inc",
    ]
    for folder in (ROOT / "csrc", *folders):
        found += [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return found


def version_of(*command: str) -> str:
    """Return what a tool prints of its version; "" where it is not there."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _nvcc() -> str:
    """Return the nvcc that CMakeLists.txt would find."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    given = os.environ.get("CUDACXX") or "nvcc"
    return shutil.which(given) or next(
        (str(path) for home in homes if home and (path := Path(home, "bin/nvcc")).is_file()), given
    )


def key(files: Iterable[Path], facts: Mapping[str, str]) -> str:
    """Return the name of a build: a digest of its sources, its tools and its options."""
    digest = hashlib.sha256()
    known = {
        **facts,
        **{name: os.environ.get(name, "") for name in READ_BY_TOOLS},
        "compiler": version_of(os.environ.get("CXX") or "c++", "--version"),
        "nvcc": version_of(_nvcc(), "--version"),
    }
    for name, value in sorted(known.items()):
        digest.update(f"{name}={value}\0".encode())
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)}:{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _folder() -> Path | None:
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else None


def restore(kind: str, name: str, files: Sequence[str], into: Path) -> bool:
    """Copy the files of a finished build into a folder; False where there is none, or no cache."""
    cache = _folder()
    if cache is None or not all((cache / kind / name / file).is_file() for file in files):
        return False
    into.mkdir(parents=True, exist_ok=True)
    for file in files:
        _replace(cache / kind / name / file, into / file)
    os.utime(cache / kind / name)
    return True


def keep(kind: str, name: str, files: Sequence[str], folder: Path) -> None:
    """Keep the files of a finished build. A cache that cannot be written is no error: the build is done."""
    cache = _folder()
    if cache is None:
        return
    try:
        (cache / kind).mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=cache / kind, prefix=".new-"))
        for file in files:
            shutil.copy2(folder / file, new)
        if (cache / kind / name).exists():  # another process was first
            shutil.rmtree(new)
        else:
            os.replace(new, cache / kind / name)
        kept = sorted(
            (path for path in (cache / kind).iterdir() if path.name[0] != "."), key=lambda p: p.stat().st_mtime
        )
        for old in kept[:-MOST]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        print(f"effkernels: {VARIABLE}={cache}: this build is not kept: {error}")


def _replace(source: Path, target: Path) -> None:
    """Copy a file so that nobody ever reads half of it, and a library in use stays whole."""
    new = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.copy2(source, new)
    os.replace(new, target)

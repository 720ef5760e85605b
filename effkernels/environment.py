"""Describe the machine of a measurement: processor, caches, GPU, library versions, commit. Reads only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from effkernels._version import __version__

# The instruction sets that decide which kernels run, of a list of some hundred flags.
_FEATURES_SHOWN = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "bf16", "sve",
)  # fmt: skip


@cache
def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo (empty without such a file)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    entry = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in entry.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_model() -> str:
    """Return the processor's name as its maker gives it, or the architecture if the system does not report it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine() or "unknown CPU"


def cpu_features() -> list[str]:
    """Return the instruction sets of this processor that matter to the kernels, in a fixed order."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [feature for feature in _FEATURES_SHOWN if feature in flags]


def last_level_cache_bytes(device: torch.device) -> int:
    """Return the size of the largest cache, where a repeated input could stay; 32 MiB if it is not reported."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", file.read_text(encoding="ascii").strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes) or 32 << 20


def device_name(device: torch.device, threads: int) -> str:
    """Return the name for a result row: a GPU's, or the processor's with the number of threads used."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{cpu_model()}, {threads} thread{'s' if threads != 1 else ''}"


def file_stem(name: str) -> str:
    """Return a device name as a file name: 'AMD EPYC, 2 threads' becomes 'amd-epyc-2-threads'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _driver_version() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions that affect a measurement; ``packages`` are added if they are installed."""
    found: dict[str, str | None] = {
        "effkernels": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
        "driver": _driver_version() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
    found.update({package: version for package in packages if (version := installed_version(package))})
    return found


@cache
def commit() -> tuple[str | None, bool | None]:
    """Return the commit of the source tree this package is imported from, and whether the tree differs from it.

    For a copy of the tree without git's own folder, EFFKERNELS_COMMIT names its commit, in the form of
    ``git describe --always --abbrev=40 --dirty``.

    (None, None) for an installed wheel: a git repository that merely contains the environment is not ours, so the
    top of the work tree must be the folder that holds the package, and git must track this file.
    """
    told = os.environ.get("EFFKERNELS_COMMIT", "")
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return _told_commit(told)
        git("ls-files", "--error-unmatch", "effkernels/environment.py")
        # The run that asks appends to result files, which must not count as changed source.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return _told_commit(told)


def _told_commit(told: str) -> tuple[str | None, bool | None]:
    """Split "<hash>-dirty" into the commit and whether the tree differs from it; (None, None) without a hash."""
    if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", told):
        return None, None
    return told[:40], told.endswith("-dirty")


def python_version() -> str:
    """Return the interpreter in one line."""
    return f"{platform.python_implementation()} {platform.python_version()} on {sys.platform} {platform.machine()}"

"""Finds and loads the compiled library, which registers ``torch.ops.effkernels``.

Loading never raises: without the library every operator still runs, through Triton or the reference, and
`load_error` says in one line why the library is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from effkernels._version import __version__

LIBRARY_FOLDER = Path(__file__).resolve().parent / "lib"
LIBRARY_FILE = LIBRARY_FOLDER / "libeffkernels.so"
BUILD_INFO_FILE = LIBRARY_FOLDER / "build_info.json"
OLDEST_TORCH = (2, 11)


def _read_build_info() -> dict[str, Any]:
    try:
        info = json.loads(BUILD_INFO_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


def _torch_release() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _load(info: dict[str, Any]) -> str | None:
    """Load the library; the reason why not, in one line, or None."""
    if not LIBRARY_FILE.is_file():
        return f"the compiled library is not there ({LIBRARY_FILE}); build it with `make build`"
    if info.get("version") != __version__:
        built = info.get("version", "unknown")
        return f"the compiled library is of version {built} and the package of {__version__}; run `make build`"
    if _torch_release() < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}, which the library needs"
    try:
        torch.ops.load_library(LIBRARY_FILE)
    except (OSError, RuntimeError) as error:
        return f"torch {torch.__version__} could not load {LIBRARY_FILE}: {' '.join(str(error).split())}"
    return None


_build_info = _read_build_info()
_load_error = _load(_build_info)


def is_loaded() -> bool:
    """Whether the operators of the compiled library are registered in this process."""
    return _load_error is None


def load_error() -> str | None:
    """One line that says why the compiled library is not in use; None where it is."""
    return _load_error


def build_info() -> dict[str, Any]:
    """How the library was built; an empty dictionary where there is none.

    Keys: ``version``, ``cuda`` (bool), ``cuda_version`` (str or None), ``cuda_archs`` (list), ``cuda_reason``
    (why CUDA was built or not), ``compiler``, ``build_type``, ``torch`` (whose headers were used),
    ``torch_target`` (the oldest torch that can load it), ``cpu_isas`` (widest first).
    """
    return dict(_build_info)


def cuda_problem(capability: tuple[int, int], driver: int) -> str:
    """Why the CUDA kernels of the library run on no GPU of a capability; "" where they do.

    Machine code runs on every later minor version of its major one; PTX, which the driver compiles, on everything
    later, by a driver that is not older than the compiler that wrote it.

    Args:
        capability: (9, 0) for sm_90.
        driver: the newest CUDA that the driver knows, as it says so: 13000 for 13.0.
    """
    number = 10 * capability[0] + capability[1]
    built = str(_build_info.get("cuda_version") or "")
    newest = tuple(map(int, built.split(".")[:2])) if built else (0, 0)
    known = (driver // 1000, driver % 1000 // 10)
    if known[0] < newest[0]:
        return f"the library was built with CUDA {built} and the driver knows CUDA up to {known[0]}.{known[1]}"
    archs = [str(arch) for arch in _build_info.get("cuda_archs", [])]
    by_driver = False
    for arch in archs:
        name, _, kind = arch.partition("-")
        if not name.isdigit():
            if name == f"{number}a":  # sm_90a and its like run on their own capability alone
                return ""
        elif kind != "virtual" and int(name) // 10 == capability[0] and int(name) <= number:
            return ""
        elif kind == "virtual" and int(name) <= number:
            by_driver = True
    if by_driver and known < newest:
        return (
            f"the library has no machine code for sm_{number}, and the driver, which knows CUDA up to "
            f"{known[0]}.{known[1]}, cannot compile what CUDA {built} wrote; "
            f"build it for this GPU: EFFKERNELS_CUDA_ARCHS={number} make build"
        )
    if by_driver:
        return ""
    return (
        f"the library is built for {', '.join(archs) or 'no GPU'}, which sm_{number} cannot run; "
        f"build it for this GPU: EFFKERNELS_CUDA_ARCHS={number} make build"
    )

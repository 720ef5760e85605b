"""Find and load the compiled library, which registers ``torch.ops.effkernels``.

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
    """Load the library. Return None, or the reason in one line why it cannot be loaded."""
    if not LIBRARY_FILE.is_file():
        return f"the compiled library is missing ({LIBRARY_FILE}); build it with `make build`"
    if info.get("version") != __version__:
        built = info.get("version", "unknown")
        return f"the compiled library has version {built} and the package {__version__}; run `make build`"
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
    """Return whether the operators of the compiled library are registered in this process."""
    return _load_error is None


def load_error() -> str | None:
    """Return one line that says why the compiled library is not in use; None if it is."""
    return _load_error


def build_info() -> dict[str, Any]:
    """Return how the library was built; an empty dictionary without a library.

    Keys: ``version``, ``cuda`` (bool), ``cuda_version`` (str or None), ``cuda_archs`` (list), ``cuda_reason``
    (why CUDA was built or not), ``compiler``, ``build_type``, ``torch`` (whose headers were used),
    ``torch_target`` (the oldest torch that can load it), ``cpu_isas`` (widest first).
    """
    return dict(_build_info)


def cuda_problem(capability: tuple[int, int], driver: int) -> str:
    """Return why the library's CUDA kernels cannot run on a GPU of a capability; "" if they can.

    Machine code runs on every later minor version of its major one; PTX, which the driver compiles, on everything
    later, if the driver is not older than the compiler that wrote it.

    Args:
        capability: (9, 0) for sm_90.
        driver: the newest CUDA version that the driver supports, as it reports it: 13000 for 13.0.
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
            f"{known[0]}.{known[1]}, cannot compile the PTX of CUDA {built}; "
            f"build it for this GPU: EFFKERNELS_CUDA_ARCHS={number} make build"
        )
    if by_driver:
        return ""
    return (
        f"the library is built for {', '.join(archs) or 'no GPU'}, which sm_{number} cannot run; "
        f"build it for this GPU: EFFKERNELS_CUDA_ARCHS={number} make build"
    )

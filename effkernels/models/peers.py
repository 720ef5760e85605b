"""Imports of the libraries effkernels is compared with: timm, torchvision, transformers and efficientnet_pytorch.

None of them is needed to run effkernels. They are the other side of the parity tests and of the benchmarks, and their
checkpoints are what users bring. Import them through these functions: beside a CPU-only torch, torchvision from PyPI
carries a compiled library that cannot be loaded, and its Python part then fails on two missing operator schemas.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

# A torch.library.Library takes its definitions away when it is collected, so it has to live as long as the process.
_TORCHVISION_SCHEMAS: torch.library.Library | None = None


def import_timm() -> ModuleType:
    """timm (pip package ``timm``), with torchvision, which it imports, made to work first.

    Raises:
        ImportError: timm is not installed; the message says how to install it.
    """
    _define_torchvision_schemas()
    return _import("timm", "timm")


def import_torchvision() -> ModuleType:
    """torchvision (pip package ``torchvision``), usable for its models and transforms beside a CPU-only torch too.

    Raises:
        ImportError: torchvision is not installed; the message says how to install it.
    """
    _define_torchvision_schemas()
    return _import("torchvision", "torchvision")


def import_transformers() -> ModuleType:
    """Hugging Face's transformers (pip package ``transformers``), with torchvision, which it imports, made to work.

    Raises:
        ImportError: transformers is not installed; the message says how to install it.
    """
    _define_torchvision_schemas()
    return _import("transformers", "transformers")


def import_lukemelas() -> ModuleType:
    """lukemelas' EfficientNet-PyTorch (pip package ``efficientnet_pytorch``).

    Raises:
        ImportError: the package is not installed; the message says how to install it.
    """
    return _import("efficientnet_pytorch", "efficientnet_pytorch")


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing != module:
            raise ImportError(
                f"{package} needs the package {missing!r}, which is not installed: pip install {missing}"
            ) from error
        raise ImportError(
            f"{package} is not installed; it is one of the libraries that effkernels is compared with: "
            f"pip install --no-deps {package} beside the extra effkernels[dev], or `make setup` in a clone"
        ) from error


def _define_torchvision_schemas() -> None:
    """Declare ``torchvision::nms`` and ``torchvision::qnms`` where torchvision's own library will not load.

    torchvision registers fakes for both at import, which fails while the operators are unknown. Only the schemas are
    declared: the operators stay without a kernel, no classification model calls them. The library is tried first,
    because a schema that it later defines as well would be an error, and only beside a torch without CUDA (elsewhere
    a library that does not load is a broken installation, and torchvision's own message says so).
    """
    global _TORCHVISION_SCHEMAS
    if _TORCHVISION_SCHEMAS is not None or torch.version.cuda is not None or torch.version.hip is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return
    for folder in spec.submodule_search_locations or ():
        for library in sorted(Path(folder).glob("_C*")):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(library))
    schemas = {
        "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    }
    missing = [name for name in schemas if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _TORCHVISION_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _TORCHVISION_SCHEMAS.define(schemas[name])

"""The libraries that effkernels is compared with: importable beside any torch, never imported unasked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from effkernels.models.peers import import_lukemelas, import_timm, import_torchvision


@pytest.mark.parametrize(
    ("imports", "module"),
    [(import_timm, "timm"), (import_torchvision, "torchvision"), (import_lukemelas, "efficientnet_pytorch")],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, imports: Callable, module: str) -> None:
    assert imports().__name__ == module
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} is not installed; .*pip install --no-deps {module}"):
        imports()


def test_importing_effkernels_imports_none_of_them() -> None:
    names = "timm", "torchvision", "efficientnet_pytorch", "matplotlib", "safetensors"
    code = f"import sys, effkernels; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torchvision_comes_first_or_second() -> None:
    """timm imports torchvision, so either order has to declare what torchvision misses beside a CPU-only torch."""
    for first, second in (("timm", "torchvision"), ("torchvision", "timm")):
        code = f"from effkernels.models import peers; peers.import_{first}(); peers.import_{second}()"
        code += "; import torchvision.ops"
        subprocess.run([sys.executable, "-c", code], check=True)

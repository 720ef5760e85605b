"""Networks as files that run elsewhere: AOTInductor packages, ONNX, PyTorch programs, safetensors weights."""

from __future__ import annotations

from effkernels.export.core import Exported, export_model
from effkernels.export.formats import FORMATS, ExportError

__all__ = ["FORMATS", "ExportError", "Exported", "export_model"]

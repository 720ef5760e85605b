"""Fused MBConv operators for PyTorch, and the compound-scaled networks built on them."""

from __future__ import annotations

# _library leads: it registers torch.ops.effkernels, which the modules after it extend.
from effkernels import _library, nn, ops  # noqa: F401
from effkernels._version import __version__
from effkernels.engine import InferenceEngine
from effkernels.export import export_model
from effkernels.models import convert_state_dict, create_model, list_models
from effkernels.ops import reference
from effkernels.ops.backends import backend
from effkernels.optimize import convert_sync_batchnorm, fold_bn_, optimize_, restore_

__all__ = [
    "InferenceEngine",
    "__version__",
    "backend",
    "convert_state_dict",
    "convert_sync_batchnorm",
    "create_model",
    "export_model",
    "fold_bn_",
    "list_models",
    "nn",
    "ops",
    "optimize_",
    "reference",
    "restore_",
]

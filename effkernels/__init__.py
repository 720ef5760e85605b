"""Fused MBConv operators for PyTorch, and the compound-scaled networks built on them."""

from __future__ import annotations

# _library leads: it registers torch.ops.effkernels, which the modules after it extend.
from effkernels import _library, nn, ops, reference  # noqa: F401
from effkernels._version import __version__
from effkernels.backends import backend
from effkernels.models import create_model, list_models

__all__ = ["__version__", "backend", "create_model", "list_models", "nn", "ops", "reference"]

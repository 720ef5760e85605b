"""Import other libraries of models beside any torch: the names for users of `models/peers.py`."""

from __future__ import annotations

from effkernels.models.peers import import_lukemelas, import_timm, import_torchvision, import_transformers

__all__ = ["import_lukemelas", "import_timm", "import_torchvision", "import_transformers"]

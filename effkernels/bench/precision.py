"""The precisions that commands offer, and what each means on a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

# timm's names: the 16-bit ones cast weights and input, the amp ones leave float32 weights and autocast.
PRECISIONS = ("float32", "bfloat16", "float16", "amp", "amp_bfloat16", "amp_float16")


class Precision(NamedTuple):
    """A precision resolved for a device.

    Attributes:
        name: 'float32', 'bfloat16', 'float16', 'amp_bfloat16' or 'amp_float16'.
        dtype: of weights and input.
        autocast: dtype of autocast, None if there is none.
    """

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.autocast or self.dtype

    @classmethod
    def of(cls, name: str, device_type: str) -> Precision:
        """Resolve one of `PRECISIONS`; 'amp' means float16 on a GPU and bfloat16 on a CPU."""
        if name not in PRECISIONS:
            raise ValueError(f"precision={name!r} is not known; allowed: {', '.join(PRECISIONS)}")
        if name == "amp":
            name = "amp_float16" if device_type == "cuda" else "amp_bfloat16"
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name.startswith("amp_"):
            return cls(name, torch.float32, dtypes[name.removeprefix("amp_")])
        return cls(name, dtypes[name], None)

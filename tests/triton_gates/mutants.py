"""A small matrix product that keeps every rule, and ways of compiling it that break one each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from effkernels.triton._common import activate


@triton.jit(do_not_specialize=["rows", "in_vectors", "out_vectors"])
def product(
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    in_vectors,
    out_vectors,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    COPIES: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y = act(x @ weight^T) by tiles; the loop's body COPIES times over."""
    in_channels = in_vectors * VECTOR
    out_channels = out_vectors * VECTOR
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, in_channels, STEP * COPIES):
        for copy in tl.static_range(COPIES):
            k = start + copy * STEP + tl.arange(0, STEP)
            inside = (k < in_channels)[None, :]
            x_at = x_ptr + (row * in_channels)[:, None] + k[None, :]
            weight_at = weight_ptr + (column * in_channels)[:, None] + k[None, :]
            x = tl.load(x_at, mask=(row < rows)[:, None] & inside, other=0.0)
            weight = tl.load(weight_at, mask=(column < out_channels)[:, None] & inside, other=0.0)
            total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    total = activate(total, ACTIVATION)
    inside = (row < rows)[:, None] & (column < out_channels)[None, :]
    tl.store(y_ptr + (row * out_channels)[:, None] + column[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Way:
    """A way of compiling `product`."""

    dtype: torch.dtype = torch.bfloat16
    VECTOR: int = 8
    ROWS: int = 128
    COLUMNS: int = 64
    STEP: int = 64
    COPIES: int = 1
    ACTIVATION: str = "silu_by_tanh"
    num_warps: int = 4
    num_stages: int = 3

    def compile(self) -> Any:
        """Triton's compiled kernel, for the GPU that the active driver names."""
        x, weight, y = (torch.empty(8, dtype=self.dtype, device="meta") for _ in range(3))
        options = dataclasses.asdict(self)
        del options["dtype"]
        return product.warmup(x, weight, y, 3136, 18, 12, grid=(1,), **options)


EXACT = Way(torch.float32, VECTOR=4, ROWS=64, STEP=32, ACTIVATION="silu", num_warps=8)
WAYS: dict[str, Way] = {
    "good": Way(),
    "exact": EXACT,
    "one warp": Way(num_warps=1),
    "element by element": Way(VECTOR=1),
    "waiting for every load": Way(num_stages=1),
    "eight stages": Way(COLUMNS=128, num_warps=8, num_stages=8),
    "two special functions": Way(ACTIVATION="silu"),
    "unrolled": dataclasses.replace(EXACT, COPIES=10, num_stages=1),
}

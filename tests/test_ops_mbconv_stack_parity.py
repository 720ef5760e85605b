"""mbconv_stack on every backend, a GPU's among them: as exact as plain PyTorch, by the rule of parity."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend, need
from parity import assert_parity

from effkernels import ops
from effkernels._norm import gather_norms
from effkernels.ops import reference
from effkernels.ops.call import OpCall, in_float64

# Two late blocks of B0, on small planes and with fewer channels: one launch where there are clusters.
CALLS = (
    OpCall.on("mbconv", (2, 32, 7, 7), 5, out_channels=32, expanded=192, reduced=8, residual=True, activation="silu"),
    OpCall.on("mbconv", (2, 32, 7, 7), 3, out_channels=48, expanded=192, reduced=8, activation="silu"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_two_blocks(backend: Backend, dtype: torch.dtype) -> None:
    need(backend, "mbconv", dtype)
    drawn = [call.arguments(dtype, backend.device, seed=seed) for seed, call in enumerate(CALLS)]
    x = drawn[0]["x"]

    def stacked(exact: bool) -> list[dict[str, object]]:
        blocks = []
        for call, arguments in zip(CALLS, drawn, strict=True):
            given = gather_norms(in_float64(arguments) if exact else arguments)
            blocks.append(
                {name: a for name, a in given.items() if name not in ("x", "allow_tf32")} | {"residual": call.residual}
            )
        return blocks

    with torch.no_grad():
        y = ops.mbconv_stack(x, stacked(exact=False))
        plain = reference.mbconv_stack(x, stacked(exact=False))
        truth = reference.mbconv_stack(x.double(), stacked(exact=True))
    assert_parity(y, plain, truth)

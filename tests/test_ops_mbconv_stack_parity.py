"""mbconv_stack on every backend, a GPU's among them: as exact as plain PyTorch, by the rule of parity."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import Backend, need
from parity import assert_parity

from effkernels import ops
from effkernels._norm import gather_norms
from effkernels.ops import reference
from effkernels.ops.call import OpCall, in_float64


def chain(channels: tuple[int, ...], plane: tuple[int, int], expansion: int) -> tuple[OpCall, ...]:
    """Return blocks of two images that follow each other, with kernels of 5x5 and 3x3 in turn."""
    blocks = []
    for number, (given, made) in enumerate(pairwise(channels)):
        sizes = {"out_channels": made, "expanded": given * expansion, "reduced": 8, "residual": given == made}
        blocks.append(OpCall.on("mbconv", (2, given, *plane), (5, 3)[number % 2], activation="silu", **sizes))
    return tuple(blocks)


# In one launch each: two late blocks of B0, with fewer channels, in clusters where there are any; and more blocks than
# the memories that the items of a queue use in turn, on planes that no cluster holds, of which the first has no
# expansion.
FIRST = OpCall.on("mbconv", (2, 32, 40, 44), expanded=0, out_channels=16, reduced=8)
STACKS = {
    "clusters": chain((32, 32, 48), (7, 7), 6),
    "queue": (FIRST, *chain((16, 16, 24, 24, 24, 8, 16), (40, 44), 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_blocks_that_follow_each_other(backend: Backend, name: str, dtype: torch.dtype) -> None:
    need(backend, "mbconv", dtype)
    if name == "queue" and backend.name.startswith("triton"):
        pytest.skip("Triton runs the blocks one by one: the first stack shows it")
    calls = STACKS[name]
    drawn = [call.arguments(dtype, backend.device, seed=seed) for seed, call in enumerate(calls)]
    x = drawn[0]["x"]

    def stacked(exact: bool) -> list[dict[str, object]]:
        blocks = []
        for call, arguments in zip(calls, drawn, strict=True):
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

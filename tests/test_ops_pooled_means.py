"""The pooled means keep to the tolerance rule for images of any size and of any values."""

from __future__ import annotations

import op_cases
import pytest
import torch
from conftest import Backend, need
from parity import assert_within, errors

from effkernels import ops
from effkernels.ops import reference

# Long rows, long columns, bands of the CPU's kernels and a part of one, the planes of a network.
PLANES = ((28, 112), (112, 28), (3, 700), (700, 3), (61, 75), (14, 14), (1, 9))
OPS = ("depthwise_bn_act_squeeze", op_cases.EXPAND_OP)


def images(height: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 24, height, width)
    level = torch.rand(1, 24, 1, 1, generator=generator) + 0.1
    return {
        "one level in each channel": level.expand(shape),
        "a level and noise": level + 0.01 * torch.randn(shape, generator=generator),
        "random": torch.rand(shape, generator=generator),
        "halves that cancel": torch.rand(shape, generator=generator) * torch.tensor([1.0, -1.0]).repeat(width)[:width],
    }


def call(op: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    identity = torch.eye(x.shape[1], dtype=x.dtype).view(x.shape[1], x.shape[1], 1, 1)
    weights = {"weight": torch.ones(x.shape[1], 1, 1, 1, dtype=x.dtype)}
    return {"x": x, **weights, **({"expand_weight": identity} if op == op_cases.EXPAND_OP else {})}


@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_means_of_any_image(op: str, plane: tuple[int, int], backend: Backend) -> None:
    """Without norm and activation y is x itself, so that the means alone are judged."""
    need(backend, op, torch.float32)
    for name, image in images(*plane).items():
        if backend.name == "triton" and backend.device == "cpu" and name == "one level in each channel":
            continue  # interpreted, a sum along an axis is NumPy's, one row after the other; on a GPU it is a tree
        x = image.contiguous(memory_format=torch.channels_last)
        _, truth = getattr(reference, op)(**call(op, x.double()))
        own = [errors(getattr(reference, op)(**call(op, one))[1], truth) for one in (x, x.contiguous())]
        arguments = {key: t.to(backend.device) for key, t in call(op, x).items()}
        _, pooled = getattr(ops, op)(**arguments)
        assert_within(pooled, own, truth, f"{name}: means of {op}")

"""torch.compile takes a whole training step as one graph, and the operators keep their contracts."""

from __future__ import annotations

import copy

import pytest
import torch
from peer_models import images
from test_training_blocks import build, image, step
from torch import Tensor, nn
from torch.library import opcheck

from effkernels import _library
from effkernels.nn import set_recompute


@pytest.mark.parametrize("recompute", [None, "expand"])
def test_a_compiled_step_equals_an_eager_one(recompute: str | None) -> None:
    model, x = nn.Sequential(build("mbconv"), build("stride2-same")), images(3, 9, 11, 24)
    set_recompute(model, recompute)
    other = copy.deepcopy(model)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 2):
        model.zero_grad()
        other.zero_grad()
        wanted, found = loss(model, x[:batch]), compiled(other, x[:batch])
        wanted.backward()
        found.backward()
        assert torch.equal(found, wanted)
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(q.grad, p.grad), name
        for (name, p), q in zip(model.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(q, p), name


def test_inductor_takes_the_step_as_one_graph() -> None:
    block, other = build("mbconv"), build("mbconv")
    x = image(block)
    found = step(torch.compile(other, fullgraph=True), x)
    wanted = step(block, x)
    torch.testing.assert_close(found["y"], wanted["y"])
    torch.testing.assert_close(other.conv_dw.weight.grad, wanted["conv_dw.weight"])


def _norm(channels: int) -> tuple[Tensor, ...]:
    return tuple(torch.rand(channels) + 0.5 for _ in range(4))


@pytest.mark.skipif(not _library.is_loaded(), reason="the compiled operators are not there")
def test_the_kernels_keep_their_contracts() -> None:
    t, g = torch.randn(2, 5, 6, 20), torch.randn(2, 5, 6, 20)
    weight, factor, vector = torch.randn(20, 1, 3, 3), torch.rand(2, 20), torch.rand(20)
    norm, ops = _norm(20), torch.ops.effkernels
    pads = [1, 1, 1, 1]
    for op, arguments in (
        (ops.training_statistics, (t, vector, vector, 1e-3)),
        (ops.training_norm_act, (t, *norm, "silu", factor, g)),
        (ops.training_squeeze, (t, *norm, "relu6")),
        (ops.training_gradient_sums, (g, t, *norm, "gelu", factor, True)),
        (ops.training_norm_backward, (g, t, *norm, "silu", vector, vector, vector, factor)),
        (ops.training_depthwise, (t, *norm, "silu", weight, vector, 1, pads, vector, None, 1e-3)),
        (
            ops.training_depthwise_backward,
            (g, t, *norm, "silu", factor, factor, vector, vector, vector, t, *norm, "silu", weight, 1, pads),
        ),
    ):
        opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))

"""The norm as one value, the signatures that the schemas give, and the second names of activations and gates."""

from __future__ import annotations

import op_cases
import pytest
import torch
import torch.nn.functional as F
from op_cases import ALL_OPS, IMAGE_OPS, Case
from torch import Tensor, nn

import effkernels
from effkernels import ops
from effkernels._norm import gather_norms
from effkernels.nn import ConvBnAct, MBConv, SqueezeExcite
from effkernels.ops import _signature, reference

WAYS = ("auto", "reference")
SECOND_NAMES = (("swish", "silu"), ("hardswish", "hard_swish"))


def batch_norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, affine=affine).eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_norm_of_a_module(way: str, affine: bool) -> None:
    norm, x, weight = batch_norm(6, affine), torch.randn(2, 4, 5, 7), torch.randn(6, 4, 1, 1)
    with torch.no_grad(), effkernels.backend(way):
        found = ops.pointwise_bn_act(x, weight, None, ops.Norm.of(norm), activation="relu")
        torch.testing.assert_close(found, F.relu(norm(F.conv2d(x, weight))))
        without = ops.pointwise_bn_act(x, weight, activation="relu")
        torch.testing.assert_close(without, F.relu(F.conv2d(x, weight)))


def test_the_order_is_that_of_batch_norm() -> None:
    mean, var, weight, bias = (torch.rand(4) + 0.5 for _ in range(4))
    z = torch.randn(2, 4, 3, 3)
    found = ops.pointwise_bn_act(z, torch.eye(4).view(4, 4, 1, 1), None, ops.Norm(mean, var, weight, bias, 1e-4))
    torch.testing.assert_close(found, F.batch_norm(z, mean, var, weight, bias, eps=1e-4))


def test_the_norm_of_what_has_none() -> None:
    with pytest.raises(TypeError, match=r"norm is GroupNorm; allowed: a batch norm of torch\.nn"):
        ops.Norm.of(nn.GroupNorm(2, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no running statistics; allowed: track_running_stats=True"):
        ops.Norm.of(nn.BatchNorm2d(4, track_running_stats=False))


@pytest.mark.parametrize("op", IMAGE_OPS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", [torch.ones(8), (torch.ones(8),) * 5, nn.BatchNorm2d(8), 1.0])
def test_a_norm_that_is_none(wrong: object, way: str, op: str) -> None:
    arguments = gather_norms(Case(op, channels=8).draw())
    for name in [name for name in arguments if name.endswith("norm")]:
        with effkernels.backend(way), pytest.raises(TypeError, match=rf"^{op}: {name} is \w+; allowed: effkernels.ops"):
            getattr(ops, op)(**arguments | {name: wrong})


@pytest.mark.parametrize("op", ALL_OPS)
def test_arguments_survive_the_dispatcher(op: str) -> None:
    """An argument at its position in the schema arrives under its name in the reference."""
    signature = _signature.Signature(op)
    arguments = op_cases.positional(op, Case(op, bias=True, gated=True, residual=True).draw())
    named = dict(zip(signature.names, signature.group(arguments), strict=True))
    again = getattr(reference, op)(**named)
    wanted = op_cases.overload(op)(*arguments)
    for y, w in zip(*(r if isinstance(r, tuple) else (r,) for r in (again, wanted)), strict=True):
        torch.testing.assert_close(y, w, rtol=1e-4, atol=1e-4)


def test_schemas_are_those_of_the_library(compiled: None) -> None:
    for op, schema in _signature.SCHEMAS.items():
        assert str(op_cases.overload(op)._schema) == str(torch._C.parse_schema(f"effkernels::{schema}"))
        recorded = getattr(torch.ops.effkernels, f"recorded_{op}").default._schema
        assert str(recorded).replace(f"recorded_{op}(Tensor recording, ", f"{op}(") == f"effkernels::{schema}"


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("way", [*WAYS, "overload"])
def test_second_names(way: str, op: str) -> None:
    case = Case(op, gated=True)
    arguments = case.draw()
    kinds = [name for name in arguments if name.endswith("activation") and name != "gate_activation"]

    def outputs(second: str, gate: str) -> tuple[Tensor, ...]:
        given = arguments | dict.fromkeys(kinds, second)
        if "gate_activation" in arguments:
            given["gate_activation"] = gate
        if way != "overload":
            with effkernels.backend(way):
                return op_cases.run(ops, case, given)
        found = op_cases.overload(op)(*op_cases.positional(op, given))
        return found if isinstance(found, tuple) else (found,)

    for second, first in SECOND_NAMES:
        pairs = zip(outputs(second, "hardsigmoid"), outputs(first, "hard_sigmoid"), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_second_names_of_modules() -> None:
    for second, first in SECOND_NAMES:
        options = {"se_channels": 2, "gate_activation": "hardsigmoid"}
        assert str(MBConv(8, 8, activation=second, **options)) == str(MBConv(8, 8, activation=first, **options))
        assert str(ConvBnAct(8, 8, 1, activation=second)) == str(ConvBnAct(8, 8, 1, activation=first))
        assert isinstance(SqueezeExcite(8, 2, activation=second, gate_activation="hardsigmoid").gate, nn.Hardsigmoid)
    assert set(reference.ALIASES.values()) <= {*reference.ACTIVATIONS, *reference.GATES}

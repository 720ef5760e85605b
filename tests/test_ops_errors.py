"""Bad input: each a clear error that names the operator, the argument, its value and what is allowed.

The same mistakes go through both ways, the checks in Python (reference, shape functions) and those in C++.
"""

from __future__ import annotations

import math
from typing import Any

import op_cases
import pytest
import torch
from op_cases import ALL_OPS, DEPTHWISE_OPS, EXPAND_OP, IMAGE_OPS, POOL_OP, Case, flat

import effkernels
from effkernels import ops
from effkernels.ops import backends

NAN = math.nan
T = torch.zeros

SE_OPS = ("depthwise_bn_act_gate", "depthwise_bn_act_se")
DEPTHWISE_ARGUMENT_OPS = (*DEPTHWISE_OPS, EXPAND_OP)
WINDOW_OPS = (*DEPTHWISE_ARGUMENT_OPS, "conv_bn_act")

# Operators, the arguments to replace in a good call, and what the message must contain beside the operator's name.
MISTAKES: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    # ranks and shapes; the good call has x (2, 8, 6, 7), 5 output channels and 3 reduced ones
    (IMAGE_OPS, {"x": T(8, 6, 7)}, r"x has shape \(8, 6, 7\); allowed: four dimensions \(N, C, H, W\)"),
    (IMAGE_OPS, {"x": T(2, 0, 6, 7)}, r"x has shape \(2, 0, 6, 7\); allowed: at least one channel, row and column"),
    (IMAGE_OPS, {"x": T(2, 8, 0, 7)}, r"x has shape \(2, 8, 0, 7\); allowed: at least one channel, row and column"),
    (DEPTHWISE_OPS, {"x": T(2, 9, 6, 7)}, r"weight has shape \(8, 1, 3, 3\); allowed: \(9, 1, 3, 3\)"),
    (DEPTHWISE_OPS, {"weight": T(8, 3, 3)}, r"weight has shape \(8, 3, 3\); allowed: \(C, 1, KH, KW\)"),
    (DEPTHWISE_OPS, {"weight": T(8, 8, 3, 3)}, r"weight has shape \(8, 8, 3, 3\); allowed: \(C, 1, KH, KW\)"),
    (
        DEPTHWISE_OPS,
        {"weight": T(8, 1, 14, 3)},
        "weight is a depthwise kernel of 14x3; allowed: 1 to 13 for",
    ),
    (DEPTHWISE_OPS, {"weight": T(8, 1, 3, 0)}, "weight is a depthwise kernel of 3x0; allowed: 1 to 13 for its height"),
    (
        ("pointwise_bn_act", POOL_OP),
        {"weight": T(5, 8, 3, 3)},
        r"weight has shape \(5, 8, 3, 3\); allowed: \(Cout, Cin, 1, 1\)",
    ),
    (("pointwise_bn_act", POOL_OP), {"weight": T(5, 8)}, r"weight has shape \(5, 8\); allowed: \(Cout, Cin, 1, 1\)"),
    (("conv_bn_act",), {"weight": T(5, 8)}, r"weight has shape \(5, 8\); allowed: \(Cout, Cin, KH, KW\)"),
    (
        ("pointwise_bn_act", POOL_OP, "conv_bn_act"),
        {"x": T(2, 9, 6, 7)},
        r"weight has shape \(5, 8, \d, \d\); allowed",
    ),
    (("pointwise_bn_act",), {"gate": T(2, 9)}, r"gate has shape \(2, 9\); allowed: \(2, 8\)"),
    (("pointwise_bn_act",), {"gate": T(2, 8, 1, 1)}, r"gate has shape \(2, 8, 1, 1\); allowed: \(2, 8\)"),
    (("pointwise_bn_act",), {"gate": T(3, 8)}, r"gate has shape \(3, 8\); allowed: \(2, 8\)"),
    (("pointwise_bn_act",), {"residual": T(2, 5, 6, 6)}, r"residual has shape \(2, 5, 6, 6\); allowed.*\(2, 5, 6, 7\)"),
    (("pointwise_bn_act",), {"residual": T(2, 5)}, r"residual has shape \(2, 5\); allowed"),
    (DEPTHWISE_OPS, {"bias": T(7)}, r"bias has shape \(7\,?\); allowed: \(8\,?\)"),
    (IMAGE_OPS, {"norm_weight": T(4)}, r"norm_weight has shape \(4\,?\); allowed"),
    (IMAGE_OPS, {"norm_bias": T(4)}, r"norm_bias has shape \(4\,?\); allowed"),
    (IMAGE_OPS, {"norm_mean": T(5, 8)}, r"norm_mean has shape \(5, 8\); allowed"),
    (IMAGE_OPS, {"norm_var": T(())}, r"norm_var has shape \(\); allowed"),
    ((*SE_OPS, "squeeze_excite_gate"), {"w_reduce": T(3, 9)}, r"w_reduce has shape \(3, 9\); allowed"),
    ((*SE_OPS, "squeeze_excite_gate"), {"w_reduce": T(0, 8)}, r"w_reduce has shape \(0, 8\); allowed.*R at least 1"),
    ((*SE_OPS, "squeeze_excite_gate"), {"w_reduce": T(3)}, r"w_reduce has shape \(3\,?\); allowed"),
    ((*SE_OPS, "squeeze_excite_gate"), {"w_expand": T(8, 4)}, r"w_expand has shape \(8, 4\); allowed"),
    ((*SE_OPS, "squeeze_excite_gate"), {"w_expand": T(8, 3, 3, 1)}, r"w_expand has shape \(8, 3, 3, 1\); allowed"),
    ((*SE_OPS, "squeeze_excite_gate"), {"b_reduce": T(8)}, r"b_reduce has shape \(8\,?\); allowed"),
    ((*SE_OPS, "squeeze_excite_gate"), {"b_expand": T(3)}, r"b_expand has shape \(3\,?\); allowed"),
    (("squeeze_excite_gate",), {"pooled": T(2, 8, 1, 1)}, r"pooled has shape \(2, 8, 1, 1\); allowed: two dimensions"),
    # the operator with two convolutions says which one it means
    ((EXPAND_OP,), {"x": T(2, 9, 6, 7)}, r"expand_weight has shape \(5, 8, 1, 1\); allowed: .*9"),
    ((EXPAND_OP,), {"expand_weight": T(5, 8)}, r"expand_weight has shape \(5, 8\); allowed: \(Cout, Cin, 1, 1\)"),
    ((EXPAND_OP,), {"expand_weight": T(6, 8, 1, 1), "expand_bias": T(6)}, r"expand_norm_mean has shape \(5\,?\)"),
    ((EXPAND_OP,), {"weight": T(6, 1, 3, 3)}, r"weight has shape \(6, 1, 3, 3\); allowed: \(5, 1, 3, 3\)"),
    ((EXPAND_OP,), {"weight": T(5, 1, 4, 15)}, "weight is a depthwise kernel of 4x15; allowed: 1 to 13 for its height"),
    ((EXPAND_OP,), {"expand_bias": T(8)}, r"expand_bias has shape \(8\,?\); allowed: \(5\,?\)"),
    ((EXPAND_OP,), {"expand_norm_mean": None}, "expand_norm_mean and expand_norm_var belong together"),
    (
        (EXPAND_OP,),
        {"expand_norm_mean": None, "expand_norm_var": None},
        "expand_norm_mean and expand_norm_var.*or none",
    ),
    ((EXPAND_OP,), {"expand_norm_eps": -1.0}, "expand_norm_eps=-1.*; allowed: finite and not negative"),
    ((EXPAND_OP,), {"expand_activation": "tanh"}, "expand_activation='tanh' is not known; allowed: identity, relu"),
    ((EXPAND_OP,), {"stride": 3}, "stride=3; allowed: 1, 2"),
    ((EXPAND_OP,), {"dilation": 5}, "allowed: at least one output"),
    # the norm
    (IMAGE_OPS, {"norm_mean": None}, "norm_mean and norm_var belong together.*allowed: both or neither"),
    (IMAGE_OPS, {"norm_var": None}, "norm_mean and norm_var belong together.*allowed: both or neither"),
    (IMAGE_OPS, {"norm_mean": None, "norm_var": None}, "norm_mean and norm_var.*allowed: all of the norm or none"),
    (IMAGE_OPS, {"norm_eps": NAN}, "norm_eps=nan; allowed: finite and not negative"),
    (IMAGE_OPS, {"norm_eps": math.inf}, "norm_eps=inf; allowed: finite and not negative"),
    (IMAGE_OPS, {"norm_eps": -1.0}, "norm_eps=-1.*; allowed: finite and not negative"),
    # names
    (IMAGE_OPS, {"activation": "swish6"}, "activation='swish6' is not known; allowed: identity, relu, relu6, silu"),
    (SE_OPS, {"se_activation": ""}, "se_activation='' is not known; allowed: identity, relu"),
    (("squeeze_excite_gate",), {"activation": "tanh"}, "activation='tanh' is not known; allowed: identity, relu"),
    (
        (*SE_OPS, "squeeze_excite_gate"),
        {"gate_activation": "softmax"},
        "gate_activation='softmax' is not known; allowed: sigmoid, hard_sig",
    ),
    # geometry
    (DEPTHWISE_OPS, {"stride": 0}, "stride=0; allowed: 1, 2"),
    (DEPTHWISE_OPS, {"stride": 3}, "stride=3; allowed: 1, 2"),
    (("conv_bn_act",), {"stride": 0}, "stride=0; allowed: 1 to 2"),
    (DEPTHWISE_OPS, {"dilation": 0}, "dilation=0; allowed: 1 to 2"),
    (WINDOW_OPS, {"padding": (1, -1, 1, 1)}, r"padding=\(1, -1, 1, 1\); allowed: four numbers from 0 to 2"),
    (WINDOW_OPS, {"padding": (0, 0, 0, 0), "x": T(2, 8, 2, 7)}, "allowed: at least one output"),
    (DEPTHWISE_OPS, {"dilation": 5}, "allowed: at least one output"),
    # sizes whose products do not fit into 64 bits
    (DEPTHWISE_ARGUMENT_OPS, {"dilation": 2**31}, "dilation=2147483648; allowed: 1 to 2"),
    (("conv_bn_act",), {"stride": 2**31}, "stride=2147483648; allowed: 1 to 2"),
    (WINDOW_OPS, {"padding": (2**31, 0, 0, 0)}, r"padding=\(2147483648, 0, 0, 0\); allowed: four numbers from 0 to 2"),
    (WINDOW_OPS, {"padding": (2**62,) * 4}, "padding=.*; allowed: four numbers from 0 to 2"),
    (WINDOW_OPS, {"padding": (2**31 - 1,) * 4}, "the result has shape .*; allowed: sizes whose product is at most 2"),
    (WINDOW_OPS, {"padding": (2**31 - 1,) * 4, "x": T(0, 8, 6, 7)}, "the result has shape .*; allowed: sizes whose"),
]

# The same for dtypes, where Python raises TypeError.
WRONG_DTYPES: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (IMAGE_OPS, {"weight": T(1).half()}, "weight has dtype float16; allowed: float32"),
    (IMAGE_OPS, {"norm_mean": T(1).double()}, "norm_mean has dtype float64; allowed: float32"),
    (("pointwise_bn_act",), {"residual": T(1).bfloat16()}, "residual has dtype bfloat16; allowed"),
    (("pointwise_bn_act",), {"gate": T(1).half()}, "gate has dtype float16; allowed: float32"),
    ((*SE_OPS, "squeeze_excite_gate"), {"b_reduce": T(1).half()}, "b_reduce has dtype float16; allowed: float32"),
    (SE_OPS, {"w_expand": T(1).half()}, "w_expand has dtype float16; allowed: float32"),
    (("squeeze_excite_gate",), {"pooled": T(1).half()}, "pooled has dtype float16; allowed: float32"),
]


def good(op: str) -> dict[str, Any]:
    shape = {"channels": 8, "out_channels": 5, "reduced": 3, "height": 6, "width": 7}
    return Case(op, bias=True, gated=True, residual=True, **shape).draw()


def each(table: list[tuple[tuple[str, ...], dict[str, Any], str]]) -> list[Any]:
    def words(changes: dict[str, Any]) -> str:
        values = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
        return ",".join(f"{k}={v}" for k, v in values.items()).replace(" ", "")

    return [
        pytest.param(op, changes, message, id=f"{op}-{words(changes)}")
        for names, changes, message in table
        for op in names
    ]


@pytest.mark.parametrize(("op", "changes", "message"), each(MISTAKES))
def test_reference_way(op: str, changes: dict[str, Any], message: str) -> None:
    arguments = good(op) | changes
    with backends.backend("reference"), pytest.raises(ValueError, match=f"^{op}: .*{message}"):
        getattr(flat(ops), op)(**arguments)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("op", "changes", "message"), each(MISTAKES))
def test_compiled_way(op: str, changes: dict[str, Any], message: str) -> None:
    arguments = good(op) | changes
    with pytest.raises(ValueError, match=f"^{op}: .*{message}"):
        getattr(flat(ops), op)(**arguments)
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):  # the operator itself, without `effkernels.ops`
        op_cases.overload(op)(*op_cases.positional(op, arguments))
    with pytest.raises(ValueError, match=f"^{op}: .*{message}"):  # the shape function says the same
        getattr(flat(ops), op)(**{k: a.to("meta") if isinstance(a, torch.Tensor) else a for k, a in arguments.items()})


@pytest.mark.parametrize(("op", "changes", "message"), each(WRONG_DTYPES))
def test_wrong_dtypes(op: str, changes: dict[str, Any], message: str) -> None:
    arguments = good(op)
    arguments |= {name: arguments[name].to(t.dtype) for name, t in changes.items()}
    with backends.backend("reference"), pytest.raises(TypeError, match=f"^{op}: {message}"):
        getattr(flat(ops), op)(**arguments)
    if backends.choose(op, arguments.get("x", torch.zeros(1, 1))) != "reference":
        with pytest.raises(TypeError, match=f"^{op}: {message}"):
            getattr(flat(ops), op)(**arguments)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("way", ["auto", "reference"])
def test_input_that_is_no_image(way: str, op: str) -> None:
    name = "pooled" if op == "squeeze_excite_gate" else "x"
    with backends.backend(way):
        with pytest.raises(TypeError, match=f"^{op}: the input is list; allowed: Tensor"):
            getattr(flat(ops), op)(**good(op) | {name: [1.0]})
        integers = good(op)[name].long()
        with pytest.raises(TypeError, match=f"^{op}: {name} has dtype int64; allowed: float"):
            getattr(flat(ops), op)(**good(op) | {name: integers})


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("way", ["auto", "reference"])
def test_tensors_on_two_devices(way: str, op: str) -> None:
    """Tensors on "meta" represent another device here, because every machine has it."""
    arguments = good(op)
    name = "w_reduce" if op == "squeeze_excite_gate" else "weight"
    arguments[name] = arguments[name].to("meta")
    with (
        backends.backend(way),
        pytest.raises(ValueError, match=f"^{op}: {name} is on meta, the input on"),
    ):
        getattr(flat(ops), op)(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op", ALL_OPS)
def test_tensors_on_cpu_and_gpu(op: str) -> None:
    arguments = good(op)
    name = "w_reduce" if op == "squeeze_excite_gate" else "weight"
    arguments[name] = arguments[name].cuda()
    with pytest.raises(ValueError, match=f"^{op}: {name} is on"):
        getattr(flat(ops), op)(**arguments)


@pytest.mark.parametrize("op", WINDOW_OPS)
def test_padding_of_two_numbers(op: str) -> None:
    with backends.backend("reference"), pytest.raises(ValueError, match=f"^{op}: padding has 2 numbers; allowed: four"):
        getattr(flat(ops), op)(**good(op) | {"padding": (1, 1)})
    with pytest.raises(ValueError, match=f"^{op}: padding has 2 numbers; allowed: four"):
        getattr(flat(ops), op)(**good(op) | {"padding": (1, 1)})


@pytest.mark.parametrize("op", ALL_OPS)
def test_a_good_call_passes_both_ways(op: str) -> None:
    for way in ("auto", "reference"):
        with backends.backend(way):
            outputs = op_cases.run(effkernels.ops, Case(op), good(op))
            assert all(torch.isfinite(y).all() for y in outputs)

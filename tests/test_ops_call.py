"""The description of a call: its tensors are those that the operator takes, and it can be read from them again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import ALL_OPS, DTYPES

from effkernels import ops
from effkernels.ops import reference
from effkernels.ops._signature import Signature
from effkernels.ops.call import OpCall, run, tensors

MANY_CHANNELS = ("pointwise_bn_act", "pointwise_bn_act_pool", "conv_bn_act", "expand_depthwise_squeeze", "mbconv")


def call_of(op: str, **changes: Any) -> OpCall:
    shape = (3, 8) if op == "squeeze_excite_gate" else (3, 8, 7, 9)
    out = {"out_channels": 12} if op in MANY_CHANNELS else {}
    return OpCall.on(op, shape, **out, **changes)


def full(op: str) -> OpCall:
    """A call with every tensor that the operator takes and with options that are not the defaults."""
    options: dict[str, Any] = {"activation": "relu6"}
    if op != "squeeze_excite_gate":
        options |= {"bias": True}
    if op == "pointwise_bn_act":
        options |= {"gated": True, "residual": True}
    elif "depthwise" in op or op == "mbconv":
        options |= {"kernel": (5, 3), "dilation": 2, "stride": 2}
    if op == "mbconv":
        options |= {"residual": True}
    return call_of(op, **options)


@pytest.mark.parametrize("op", ALL_OPS)
def test_tensors_and_options_are_the_arguments_of_the_schema(op: str) -> None:
    call = full(op)
    left_out = {"norm_eps", "expand_norm_eps", "project_norm_eps", "allow_tf32"}  # these keep the operator's default
    assert {*call.shapes(), *call.options()} | left_out >= set(Signature(op).flat_names)
    assert {*call.shapes(), *call.options()} <= set(Signature(op).flat_names)


@pytest.mark.parametrize("norm", ["full", "statistics", "none"])
@pytest.mark.parametrize("op", ALL_OPS)
def test_a_call_is_read_from_its_arguments(op: str, norm: str) -> None:
    changes = {} if op == "squeeze_excite_gate" else {"norm": norm}
    squeezes = {"se_bias": False, "matrix_rank": 2} if "w_reduce" in Signature(op).flat_names else {}
    for call in (full(op).with_(**changes), call_of(op, **changes, **squeezes)):
        assert OpCall.of(op, call.arguments()) == call


def test_tensors_that_fit_no_description_are_refused() -> None:
    arguments = call_of("expand_depthwise_squeeze").arguments() | {"expand_norm_weight": None}
    with pytest.raises(ValueError, match=r"expand_depthwise_squeeze: tensors of the shapes .* are no call that OpCall"):
        OpCall.of("expand_depthwise_squeeze", arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_results_and_bytes_are_those_of_its_tensors(op: str, dtype: torch.dtype, one_thread: None) -> None:
    call = full(op)
    arguments = call.arguments(dtype)
    results = run(ops, op, arguments)
    assert all(y.isfinite().all() for y in results)
    assert call.bytes_moved(dtype) == sum(t.nbytes for t in (*dict(tensors(arguments)).values(), *results))
    fakes = run(reference, op, call.arguments(dtype, "meta"))
    assert [(y.shape, y.dtype) for y in fakes] == [(y.shape, y.dtype) for y in results]


def test_values_follow_from_the_seed() -> None:
    first, same, other = (dict(tensors(call_of("pointwise_bn_act").arguments(seed=seed))) for seed in (1, 1, 2))
    assert all(torch.equal(t, same[name]) for name, t in first.items())
    assert not any(torch.equal(t, other[name]) for name, t in first.items())


def test_images_are_repeated_up_to_the_batch() -> None:
    """Drawing each image of a large batch would take minutes."""
    call = full("pointwise_bn_act")
    few, many = call.with_(batch=2).arguments(), call.with_(batch=5).arguments(images=2)
    for name, t in tensors(many):
        if name in ("x", "gate", "residual"):
            assert torch.equal(t, torch.cat([few[name], few[name], few[name][:1]]))
        else:
            assert torch.equal(t, few[name])


def test_types_of_single_tensors_can_be_chosen() -> None:
    arguments = full("pointwise_bn_act").arguments(torch.bfloat16, dtypes={"weight": torch.float32})
    wide = {name for name, t in tensors(arguments) if t.dtype == torch.float32}
    assert wide == {"weight", "bias", "norm_mean", "norm_var", "norm_weight", "norm_bias"}


def test_words() -> None:
    assert str(full("pointwise_bn_act")) == "pointwise_bn_act 3x8x7x9 to 12, gate, residual"
    assert str(full("depthwise_bn_act")) == "depthwise_bn_act 3x8x7x9 5x3 stride 2, dilation 2"
    assert str(call_of("conv_bn_act", stride=2)) == "conv_bn_act 3x8x7x9 3x3 stride 2 to 12"
    assert str(call_of("expand_depthwise_squeeze")) == "expand_depthwise_squeeze 3x8x7x9 to 12, 3x3 stride 1"
    assert str(call_of("mbconv", residual=True)) == "mbconv 3x8x7x9 through 48 to 12, 3x3 stride 1, residual"
    assert str(call_of("squeeze_excite_gate")) == "squeeze_excite_gate 3x8"

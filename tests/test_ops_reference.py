"""The reference itself: equal to the modules a user would write, on every device and dtype, with exact strides."""

from __future__ import annotations

import op_cases
import pytest
import torch
import torch.nn.functional as F
from op_cases import ALL_OPS, DTYPES, LAYOUTS, ODD_CHANNELS, ODD_PLANES, Case, flat
from parity import assert_exact_channels_last
from torch import Tensor, nn

import effkernels
from effkernels.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")

EXCITE = ("w_reduce", "b_reduce", "w_expand", "b_expand", "se_activation", "gate_activation")
ACTIVATION_MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "hard_swish": nn.Hardswish(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}
GATE_MODULES = {"sigmoid": nn.Sigmoid(), "hard_sigmoid": nn.Hardsigmoid()}


def test_every_name_has_its_module() -> None:
    assert tuple(ACTIVATION_MODULES) == reference.ACTIVATIONS
    assert tuple(GATE_MODULES) == reference.GATES


def batch_norm(arguments: dict, channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-5).eval().double()
    norm.load_state_dict(
        {
            "weight": arguments["norm_weight"],
            "bias": arguments["norm_bias"],
            "running_mean": arguments["norm_mean"],
            "running_var": arguments["norm_var"],
            "num_batches_tracked": torch.tensor(0),
        }
    )
    return norm


def padded(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 3, 2, 1)])
def test_depthwise_is_convolution_norm_and_activation(padding: tuple[int, int, int, int], activation: str) -> None:
    case = Case("depthwise_bn_act", kernel=(5, 5), stride=2, dilation=2, padding=padding, activation=activation)
    arguments = op_cases.in_float64(case.draw())
    y = flat(reference).depthwise_bn_act(**arguments)
    z = F.conv2d(padded(arguments["x"], padding), arguments["weight"], None, 2, 0, 2, groups=case.channels)
    torch.testing.assert_close(y, ACTIVATION_MODULES[activation](batch_norm(arguments, case.channels)(z)))
    again, pooled = flat(reference).depthwise_bn_act_squeeze(**arguments)
    assert torch.equal(again, y)
    torch.testing.assert_close(pooled, y.mean((2, 3)))


@pytest.mark.parametrize("gate", reference.GATES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_squeeze_and_excitation_is_two_convolutions(activation: str, gate: str) -> None:
    case = Case("depthwise_bn_act_se", bias=True, se_activation=activation, gate_activation=gate)
    arguments = op_cases.in_float64(case.draw())
    shared = {k: v for k, v in arguments.items() if k not in EXCITE}
    y = flat(reference).depthwise_bn_act(**shared)
    hidden = F.conv2d(y.mean((2, 3), keepdim=True), arguments["w_reduce"], arguments["b_reduce"])
    logits = F.conv2d(ACTIVATION_MODULES[activation](hidden), arguments["w_expand"], arguments["b_expand"])
    factor = GATE_MODULES[gate](logits)
    torch.testing.assert_close(flat(reference).depthwise_bn_act_se(**arguments), y * factor)
    kept, found = flat(reference).depthwise_bn_act_gate(**arguments)
    assert torch.equal(kept, y)
    torch.testing.assert_close(found, factor[:, :, 0, 0])


def test_pointwise_multiplies_before_and_adds_after() -> None:
    case = Case("pointwise_bn_act", gated=True, residual=True, bias=True)
    arguments = op_cases.in_float64(case.draw())
    gated = arguments["x"] * arguments["gate"][:, :, None, None]
    z = batch_norm(arguments, case.out_channels)(F.conv2d(gated, arguments["weight"], arguments["bias"]))
    wanted = F.silu(z) + arguments["residual"]
    torch.testing.assert_close(flat(reference).pointwise_bn_act(**arguments), wanted)


def test_conv_is_convolution_norm_and_activation() -> None:
    case = Case("conv_bn_act", kernel=(3, 2), stride=2, padding=(0, 1, 2, 0), bias=True)
    arguments = op_cases.in_float64(case.draw())
    z = F.conv2d(padded(arguments["x"], case.padding), arguments["weight"], arguments["bias"], 2)
    wanted = F.silu(batch_norm(arguments, case.out_channels)(z))
    torch.testing.assert_close(flat(reference).conv_bn_act(**arguments), wanted)


@pytest.mark.parametrize("given", [("norm_weight",), ("norm_bias",), ()])
def test_a_missing_norm_parameter_counts_as_one_or_zero(given: tuple[str, ...]) -> None:
    case = Case("depthwise_bn_act", norm="statistics")
    arguments = op_cases.in_float64(case.draw())
    ones, zeros = torch.ones(case.channels).double(), torch.zeros(case.channels).double()
    wanted = flat(reference).depthwise_bn_act(**arguments, norm_weight=ones, norm_bias=zeros)
    some = {"norm_weight": ones, "norm_bias": zeros}
    found = flat(reference).depthwise_bn_act(**arguments, **{name: some[name] for name in given})
    torch.testing.assert_close(found, wanted)


def test_running_statistics_have_gradients_where_asked_for() -> None:
    """F.batch_norm itself takes them for constants."""
    arguments = op_cases.in_float64(Case("depthwise_bn_act", channels=3, height=4, width=5).draw())
    mean, var = arguments.pop("norm_mean").requires_grad_(), arguments.pop("norm_var").requires_grad_()

    def function(norm_mean: Tensor, norm_var: Tensor) -> Tensor:
        return flat(reference).depthwise_bn_act(**arguments, norm_mean=norm_mean, norm_var=norm_var)

    assert torch.autograd.gradcheck(function, (mean, var))


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_strides_and_dtypes(dtype: torch.dtype, op: str) -> None:
    for layout in LAYOUTS:
        for channels in ODD_CHANNELS:
            for height, width in ODD_PLANES:
                for batch in (0, 1, 3):
                    shape = {"channels": channels, "out_channels": channels, "height": height, "width": width}
                    case = Case(op, dtype, batch=batch, **shape, layout=layout, parameters="same")
                    arguments = case.draw()
                    outputs = op_cases.run(reference, case, arguments)
                    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
                    shapes = op_cases.run(reference, case, meta)
                    for y, m in zip(outputs, shapes, strict=True):
                        assert (y.shape, y.dtype, y.stride()) == (m.shape, m.dtype, m.stride())
                        if y.dim() == 4:
                            assert_exact_channels_last(y)
                            assert y.dtype == dtype


@pytest.mark.parametrize("op", ALL_OPS)
def test_float64_runs_the_reference(op: str) -> None:
    case = Case(op)
    arguments = op_cases.in_float64(case.draw())
    ours = op_cases.run(effkernels.ops, case, arguments)
    theirs = op_cases.run(reference, case, arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="activation='swish6' is not known; allowed: identity, relu"):
        reference.activate(torch.zeros(1), "swish6")
    with pytest.raises(ValueError, match="gate_activation='tanh' is not known; allowed: sigmoid, hard_sigmoid"):
        reference.apply_gate(torch.zeros(1), "tanh")

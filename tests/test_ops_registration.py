"""The registrations of the compiled operators in torch: shapes, gradients, autocast, FLOPs, compile and export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_cases
import pytest
import torch
from op_cases import ALL_OPS, DTYPES, Case, flat
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import effkernels
from effkernels import ops
from effkernels.ops import reference

pytestmark = pytest.mark.usefixtures("compiled", "one_thread")

OPCHECK_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

# One of three is enough for each run: shapes and strides of every layout are tests of their own.
LAYOUTS = [
    pytest.param("contiguous", marks=pytest.mark.thorough),
    pytest.param("channels_last", marks=pytest.mark.thorough),
    "sliced",
]


def case_of(op: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    """Return a small case that uses every optional argument of the operator."""
    full = {"channels": 8, "out_channels": 7, "reduced": 3, "height": 6, "width": 7}
    return Case(op, dtype, bias=True, gated=True, residual=True, **(full | changes))


def with_gradients(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: a.detach().requires_grad_() if isinstance(a, Tensor) else a for k, a in arguments.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ALL_OPS)
def test_opcheck(op: str, layout: str) -> None:
    arguments = case_of(op, layout=layout).draw()
    torch.library.opcheck(op_cases.overload(op), op_cases.positional(op, arguments), test_utils=OPCHECK_TESTS)
    differentiable = op_cases.positional(op, with_gradients(arguments))
    torch.library.opcheck(op_cases.overload(op), differentiable, test_utils=OPCHECK_TESTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_fakes_have_the_shapes_strides_and_dtypes_of_the_results(op: str, dtype: torch.dtype) -> None:
    for batch in (0, 1, 3):
        for channels, height, width in ((1, 1, 1), (1, 5, 1), (7, 1, 4), (8, 6, 7)):
            for stride in (1, 2):
                shape = {"batch": batch, "channels": channels, "height": height, "width": width, "stride": stride}
                case = case_of(op, dtype, **shape, padding=(1, 2, 3, 1), parameters="same")
                arguments = case.draw()
                real = op_cases.run(ops, case, arguments)
                meta = {k: a.to("meta") if isinstance(a, Tensor) else a for k, a in arguments.items()}
                for module in (ops, reference):
                    fake = op_cases.run(module, case, meta)
                    assert [(t.shape, t.stride(), t.dtype) for t in fake] == [
                        (t.shape, t.stride(), t.dtype) for t in real
                    ]


def gradients(module: Any, case: Case, arguments: dict[str, Any]) -> dict[str, Tensor | None]:
    """Return the gradient of a fixed weighting of all outputs with respect to every tensor argument."""
    arguments = with_gradients(arguments)
    outputs = op_cases.run(module, case, arguments)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y.double() * torch.randn(y.shape, generator=generator).double()).sum() for y in outputs)
    named = dict(op_cases.tensors(arguments))
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("parameters", ["float32", "same", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_gradients_are_those_of_the_reference(op: str, dtype: torch.dtype, parameters: str) -> None:
    if op == "squeeze_excite_gate":
        parameters = "same"
    case = case_of(op, dtype, parameters=parameters, stride=2, layout="contiguous")
    arguments = case.draw()
    ours, theirs = gradients(ops, case, arguments), gradients(reference, case, arguments)
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        assert gradient is not None, name
        assert gradient.dtype == arguments[name].dtype, name
        assert torch.equal(gradient, theirs[name]), name


@pytest.mark.parametrize("op", ALL_OPS)
def test_gradients_are_right_in_value(op: str) -> None:
    """Held against finite differences of the float64 reference along one direction, all arguments at once."""
    case = case_of(op, activation="silu")
    arguments = case.draw()
    ours = gradients(ops, case, arguments)
    exact = op_cases.in_float64(arguments)
    directions = {name: torch.randn(t.shape, dtype=torch.float64) for name, t in op_cases.tensors(exact)}
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).double() for y in op_cases.truth(case, arguments)]

    def loss(step: float) -> float:
        moved = {k: a + step * directions[k] if isinstance(a, Tensor) else a for k, a in exact.items()}
        outputs = op_cases.run(reference, case, moved)
        return float(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)))

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    analytic = float(sum((g.double() * directions[name]).sum() for name, g in ours.items() if g is not None))
    assert analytic == pytest.approx(numeric, rel=1e-3)


@pytest.mark.parametrize("op", ALL_OPS)
def test_second_derivatives_are_those_of_the_reference(op: str) -> None:
    def penalty(module: Any) -> list[Tensor]:
        case = case_of(op)
        arguments = with_gradients(case.draw())
        named = [t for _, t in op_cases.tensors(arguments)]
        outputs = op_cases.run(module, case, arguments)
        first = torch.autograd.grad(sum(y.square().sum() for y in outputs), named, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), named)
        return list(second)

    for ours, theirs in zip(penalty(ops), penalty(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_only_the_gradients_asked_for() -> None:
    case = case_of("pointwise_bn_act")
    arguments = case.draw()
    arguments["gate"].requires_grad_()
    op_cases.run(ops, case, arguments)[0].sum().backward()
    assert arguments["gate"].grad is not None
    assert all(t.grad is None for name, t in op_cases.tensors(arguments) if name != "gate")


def test_one_output_of_two_is_enough_for_backward() -> None:
    case = case_of("depthwise_bn_act_squeeze")
    for i in (0, 1):
        arguments = with_gradients(case.draw())
        op_cases.run(ops, case, arguments)[i].sum().backward()
        again = with_gradients(case.draw())
        op_cases.run(reference, case, again)[i].sum().backward()
        assert torch.equal(arguments["x"].grad, again["x"].grad)


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    case = case_of("depthwise_bn_act")
    arguments = with_gradients(case.draw())
    y = op_cases.run(ops, case, arguments)[0]
    with torch.no_grad():
        arguments["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_asked_for(mode: Callable[[], Any]) -> None:
    case = case_of("depthwise_bn_act_gate")
    with mode():
        outputs = op_cases.run(ops, case, with_gradients(case.draw()))
    assert all(not y.requires_grad and y.grad_fn is None for y in outputs)


@pytest.mark.parametrize("op", ALL_OPS)
def test_forward_mode_and_functional_transforms_are_right_or_refused(op: str) -> None:
    """Tangents never get lost: the result is that of the reference, or there is an error."""
    case = case_of(op)
    arguments = case.draw()
    name = "pooled" if op == "squeeze_excite_gate" else "x"
    rest = {k: a for k, a in arguments.items() if k != name}

    def function(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda t: op_cases.run(module, case, {name: t, **rest})[0]

    t = arguments[name]
    wanted = torch.func.grad(lambda t: function(reference)(t).square().sum())(t)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(torch.func.grad(lambda t: function(ops)(t).square().sum())(t), wanted)
            _, tangent = torch.func.jvp(function(reference), (t,), (torch.ones_like(t),))
            try:
                _, found = torch.func.jvp(function(ops), (t,), (torch.ones_like(t),))
            except (NotImplementedError, RuntimeError):
                continue
            torch.testing.assert_close(found, tangent)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample_apart() -> None:
    """torch.vmap over torch.func.grad, as a researcher takes per-sample gradients."""
    arguments = case_of("depthwise_bn_act", batch=3).draw()
    images, weight = arguments.pop("x"), arguments.pop("weight")

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        return flat(ops).depthwise_bn_act(image[None], weight, **arguments).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(weight, images)
    wanted = torch.stack([torch.func.grad(loss)(weight, image) for image in images])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["compiled", "reference"])
def test_autocast(where: str, dtype: torch.dtype, op: str) -> None:
    """x and matrices are cast and everything else stays, on either way of computing; gradients come back in float32."""
    case = case_of(op)
    arguments = with_gradients(case.draw())
    cast = {"x", "residual", "w_reduce", "w_expand", "expand_weight", "project_weight"}
    cast |= set() if "depthwise" in op or op == "mbconv" else {"weight"}
    expected = {
        name: a.detach().to(dtype) if name in cast else a.detach() if isinstance(a, Tensor) else a
        for name, a in arguments.items()
    }
    with effkernels.backend("auto" if where == "compiled" else "reference"):
        wanted = op_cases.run(ops, case, with_gradients(expected))  # the reference rounds a trained norm elsewhere
        with torch.autocast("cpu", dtype):
            found = op_cases.run(ops, case, arguments)
            loss = sum(y.float().sum() for y in found)
            inside = torch.autograd.grad(loss, [t for _, t in op_cases.tensors(arguments)], retain_graph=True)
        outside = torch.autograd.grad(loss, [t for _, t in op_cases.tensors(arguments)])
    for y, w in zip(found, wanted, strict=True):
        assert y.dtype == w.dtype
        assert torch.equal(y, w)
    for (name, t), a, b in zip(op_cases.tensors(arguments), inside, outside, strict=True):
        assert a.dtype == t.dtype, name
        assert torch.equal(a, b), f"{name}: backward inside autocast differs from backward outside"


def test_autocast_does_not_change_float64() -> None:
    case = case_of("pointwise_bn_act")
    arguments = op_cases.in_float64(case.draw())
    with torch.autocast("cpu", torch.bfloat16):
        y = op_cases.run(ops, case, arguments)[0]
    assert y.dtype == torch.float64
    assert torch.equal(y, op_cases.run(reference, case, arguments)[0])


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("matrix_rank", [2, 4])
def test_flops_are_those_of_the_reference(matrix_rank: int, device: str, op: str) -> None:
    for batch in (0, 1, 3):
        case = case_of(op, batch=batch, kernel=(5, 5), padding=(2, 2, 2, 2), stride=2, matrix_rank=matrix_rank)
        arguments = case.draw(device=device)
        counts = []
        for module in (ops, reference):
            with FlopCounterMode(display=False) as counter:
                op_cases.run(module, case, arguments)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1]
        assert (counts[0] > 0) == (batch > 0)

"""The namespace effkernels_triton: schemas, shapes, gradients, autocast, FLOPs, one graph, one launch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import op_cases
import pytest
import torch
import torch._dynamo.testing
from conftest import THOROUGH, Backend
from hypothesis import given, settings
from op_cases import DEPTHWISE_OPS, DTYPES, Case, flat
from test_ops_parity import any_case, check
from test_ops_registration import LAYOUTS, OPCHECK_TESTS, case_of, with_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import effkernels
from effkernels import ops, triton
from effkernels._norm import gather_norms
from effkernels.ops import backends, reference

TRITON_OPS = tuple(triton.FAMILIES)


def overload(op: str, namespace: str = "effkernels_triton") -> Any:
    return getattr(getattr(torch.ops, namespace), op).default


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels launched, in order."""
    from effkernels.triton import _launch

    names: list[str] = []
    run = _launch.run

    def counted(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        run(kernel, grid, *args, **options)

    monkeypatch.setattr(_launch, "run", counted)
    return names


@settings(max_examples=50 if THOROUGH else 20)
@given(case=any_case())
def test_any_interpreted_shape(case: Case, interpreted: None) -> None:
    check(case, Backend("triton", "cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", TRITON_OPS)
def test_opcheck(op: str, layout: str, interpreted: None) -> None:
    arguments = case_of(op, layout=layout).draw()
    torch.library.opcheck(overload(op), op_cases.positional(op, arguments), test_utils=OPCHECK_TESTS)
    differentiable = op_cases.positional(op, with_gradients(arguments))
    torch.library.opcheck(overload(op), differentiable, test_utils=OPCHECK_TESTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", TRITON_OPS)
def test_fakes_have_the_shapes_strides_and_dtypes_of_the_results(
    op: str, dtype: torch.dtype, interpreted: None
) -> None:
    for batch in (0, 1, 3):
        for channels, height, width in ((1, 1, 1), (7, 1, 4), (8, 6, 7)):
            shape = {"batch": batch, "channels": channels, "height": height, "width": width, "stride": 2}
            arguments = case_of(op, dtype, **shape, padding=(1, 2, 3, 1), parameters="same").draw()
            real = op_cases.run(ops, Case(op), arguments)
            meta = {k: a.to("meta") if isinstance(a, Tensor) else a for k, a in arguments.items()}
            fake = op_cases.run(ops, Case(op), meta)
            assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


@pytest.mark.parametrize("op", TRITON_OPS)
def test_gradients_are_those_of_the_reference(op: str, interpreted: None) -> None:
    def gradients(module: Any) -> tuple[Tensor, ...]:
        arguments = with_gradients(case_of(op, stride=2).draw())
        outputs = op_cases.run(module, Case(op), arguments)
        weights = [torch.linspace(-1, 1, y.numel()).reshape(y.shape) for y in outputs]
        loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(loss, [t for _, t in op_cases.tensors(arguments)])

    for ours, theirs in zip(gradients(ops), gradients(reference), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", TRITON_OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, op: str, interpreted: None) -> None:
    case = case_of(op)
    arguments = case.draw()
    cast = {"x", "residual", "w_reduce", "w_expand", "expand_weight", "project_weight"}
    cast |= set() if "depthwise" in op or op == "mbconv" else {"weight"}
    expected = {name: a.to(dtype) if name in cast and a is not None else a for name, a in arguments.items()}
    wanted = op_cases.run(ops, case, expected)
    with torch.autocast("cpu", dtype):
        found = op_cases.run(ops, case, arguments)
    for y, w in zip(found, wanted, strict=True):
        assert y.dtype == w.dtype
        assert torch.equal(y, w)


@pytest.mark.parametrize("op", TRITON_OPS)
def test_flops_are_those_of_the_reference(op: str, interpreted: None) -> None:
    case = case_of(op, kernel=(5, 5), padding=(2, 2, 2, 2), stride=2)
    counts = []
    for module in (ops, reference):
        with FlopCounterMode(display=False) as counter:
            op_cases.run(module, case, case.draw(device="meta"))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("op", TRITON_OPS)
def test_each_operator_is_one_graph_for_all_sizes(op: str, interpreted: None) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(getattr(ops, op), backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for batch, height, width in ((2, 9, 11), (3, 12, 10), (5, 14, 13)):
        case = case_of(op, batch=batch, height=height, width=width, layout="contiguous")
        arguments = case.draw()
        outputs = function(**gather_norms(arguments))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for y, wanted in zip(outputs, op_cases.run(ops, case, arguments), strict=True):
            assert torch.equal(y, wanted)
            assert y.stride() == wanted.stride()
        frames.add(counter.frame_count)  # the first call may trace twice, to make eps a constant
    assert len(frames) == 1
    named = {str(node.target) for node in counter.graphs[-1].graph.nodes if node.op == "call_function"}
    assert f"effkernels_triton.{op}.default" in named


@pytest.mark.slow
@pytest.mark.parametrize("op", TRITON_OPS)
def test_inductor(op: str, interpreted: None) -> None:
    torch._dynamo.reset()
    function = torch.compile(getattr(ops, op), fullgraph=True)
    arguments = case_of(op).draw()
    outputs = function(**gather_norms(arguments))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for y, wanted in zip(outputs, op_cases.run(ops, Case(op), arguments), strict=True):
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("op", TRITON_OPS)
def test_export(op: str, interpreted: None) -> None:
    arguments = case_of(op).draw()
    names = [name for name, _ in op_cases.tensors(arguments)]
    others = {k: a for k, a in arguments.items() if k not in names}

    class Call(torch.nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return op_cases.run(ops, Case(op), dict(zip(names, given, strict=True)) | others)

    given = tuple(arguments[name] for name in names)
    exported = torch.export.export(Call(), given)
    for y, wanted in zip(exported.module()(*given), Call()(*given), strict=True):
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("op", [*DEPTHWISE_OPS, "squeeze_excite_gate"])
def test_one_launch(op: str, launches: list[str], interpreted: None) -> None:
    """Images small enough for one program to scale; the next test has a larger one."""
    case = case_of(op, batch=3, channels=40, height=14, width=15)
    op_cases.run(ops, case, case.draw())
    assert len(launches) == 1


def test_a_large_image_is_scaled_by_a_second_launch(launches: list[str], interpreted: None) -> None:
    case = case_of("depthwise_bn_act_se", batch=1, channels=64, height=40, width=40)
    arguments = case.draw()
    (y,) = op_cases.run(ops, case, arguments)
    assert launches == ["depthwise_kernel", "scale_kernel"]
    torch.testing.assert_close(y, op_cases.run(reference, case, arguments)[0])


def test_an_empty_batch_launches_nothing(launches: list[str], interpreted: None) -> None:
    for op in TRITON_OPS:
        op_cases.run(ops, Case(op), case_of(op, batch=0).draw())
    assert launches == []


@pytest.mark.parametrize("op", DEPTHWISE_OPS[1:])
def test_counters_are_left_at_zero(op: str, monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    """So that the next launch of the stream can use them, without a fill in between."""
    from effkernels.triton import _launch

    kept = torch.zeros(64, dtype=torch.int32)
    used: list[int] = []

    def counters(device: torch.device, count: int) -> Tensor:
        used.append(count)
        return kept

    monkeypatch.setattr(_launch, "counters", counters)
    case = case_of(op, batch=2, channels=104, height=17, width=20)
    arguments = case.draw()
    first = op_cases.run(ops, case, arguments)
    assert used[0] > 0
    assert kept.count_nonzero() == 0
    second = op_cases.run(ops, case, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", DEPTHWISE_OPS)
def test_parity_over_several_tiles_and_groups(
    op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, interpreted: None
) -> None:
    """As a GPU cuts the work: interpreted programs are larger otherwise, to be fewer."""
    from effkernels.triton import depthwise

    monkeypatch.setattr(depthwise, "_THREADS", 128)
    case = case_of(op, dtype, batch=1, channels=104, height=12, width=9, padding=(1, 0, 2, 1), layout="sliced")
    x = case.draw()["x"]
    plan = depthwise.plan(x, torch.empty(1, 104, 11, 10), (3, 3), 1, 1)
    assert plan.tiles > 1
    assert plan.groups > 1
    check(case, Backend("triton", "cpu"))


@pytest.mark.parametrize("op", DEPTHWISE_OPS)
def test_offsets_of_64_bits_change_nothing(op: str, monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    from effkernels.triton import _launch

    case = case_of(op, channels=24, height=9, width=10, layout="sliced", padding=(1, 2, 0, 3))
    arguments = case.draw()
    narrow = op_cases.run(ops, case, arguments)
    monkeypatch.setattr(_launch, "is_wide", lambda *images: True)
    assert all(torch.equal(a, b) for a, b in zip(op_cases.run(ops, case, arguments), narrow, strict=True))


def test_float64_is_refused_by_the_operator_itself(interpreted: None) -> None:
    arguments = op_cases.in_float64(case_of("depthwise_bn_act").draw())
    with pytest.raises(TypeError, match=r"depthwise_bn_act: dtype=torch.float64 is not supported; allowed: "):
        overload("depthwise_bn_act")(*op_cases.positional("depthwise_bn_act", arguments))


def test_bad_arguments_are_named(interpreted: None) -> None:
    arguments = case_of("depthwise_bn_act").draw() | {"dilation": 0}
    with pytest.raises(ValueError, match="depthwise_bn_act: dilation=0; allowed: 1 to 2"):
        flat(ops).depthwise_bn_act(**arguments)


@pytest.mark.parametrize("op", TRITON_OPS)
def test_reasons(op: str) -> None:
    def reason(device: str, dtype: torch.dtype = torch.float32, **call: Any) -> str:
        decision = backends.can_run_triton(op, device=device, dtype=dtype, **call)
        assert decision.ok == (not decision.reason)
        return decision.reason

    if not triton.INSTALLED:
        assert reason("cuda") == "triton is not installed"
        return
    assert reason("cuda") == ""
    assert reason("meta") == ""
    assert reason("xpu") == "device=xpu is not supported; allowed: cuda"
    only = "cuda, and cpu where TRITON_INTERPRET=1 is set before the start"
    assert reason("cpu") == ("" if triton.INTERPRETED else f"device=cpu is not supported; allowed: {only}")
    assert "dtype=torch.float64 is not supported" in reason("cuda", torch.float64)
    assert ("a depthwise kernel of 14x14; allowed" in reason("cuda", kernel_size=14)) == (
        "depthwise" in op or op == "mbconv"
    )


@pytest.mark.parametrize("op", backends.OPERATORS)
def test_without_the_library_a_gpu_runs_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton.INSTALLED:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(backends, "_COMPILED_CUDA", frozenset())

    class OnGpu(Tensor):
        is_cuda, is_cpu, device = True, False, torch.device("cuda:0")

    x = torch.zeros((2, 3) if op == "squeeze_excite_gate" else (2, 3, 4, 5)).as_subclass(OnGpu)
    with effkernels.backend("auto"):
        assert backends.choose(op, x) == ("triton" if op in TRITON_OPS else "reference")


def test_a_package_without_triton_works() -> None:
    program = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
sys.modules["triton"] = None
import torch
import effkernels
from effkernels.ops import backends
x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3)
effkernels.ops.depthwise_bn_act(x, weight)
print(backends.can_run_triton("depthwise_bn_act", device="cuda", dtype=torch.float32).reason)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "triton is not installed"), done.stderr


def test_a_package_that_runs_no_triton_kernel_imports_no_triton() -> None:
    program = """
import sys
import torch
import effkernels
effkernels.ops.depthwise_bn_act(torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3))
print("effkernels.triton.depthwise" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr

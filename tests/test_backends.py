"""The choice of a backend: what it depends on, the reasons it gives, and how it is forced."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from called_operators import CalledOperators
from op_cases import ALL_OPS, DTYPES, Case, flat
from torch import Tensor

import effkernels
from effkernels import _library, ops, triton
from effkernels.ops import backends


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a package whose library was never built."""
    monkeypatch.setattr(backends, "_COMPILED_CPU", frozenset())
    monkeypatch.setattr(backends, "_COMPILED_CUDA", frozenset())
    monkeypatch.setattr(_library, "is_loaded", lambda: False)
    monkeypatch.setattr(_library, "load_error", lambda: "the compiled library is not there")


def test_operators_are_those_of_the_schema(compiled: None) -> None:
    registered = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    # Of the processor and of the GPU, which compute nothing; steps of the training blocks, which nobody else calls.
    others = ("cpu_", "cuda_", "training_")
    computing = {name for namespace, name in registered if namespace == "effkernels" and not name.startswith(others)}
    stack = {"mbconv_stack"}  # runs where mbconv does
    recorded = {f"recorded_{name}" for name in {*backends.OPERATORS, *stack}}  # the same, with a recording of the call
    assert computing - recorded == {*backends.OPERATORS, *stack} == set(ops.__all__) - {"Norm"}
    assert set(backends.OPERATORS) == set(ALL_OPS)
    assert computing >= recorded


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int32, torch.complex64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_choice_and_reason_agree(device: str, dtype: torch.dtype, op: str) -> None:
    """The short way that choose() takes for most calls gives what can_run_cpu says."""
    x = torch.zeros((2, 3) if op == "squeeze_excite_gate" else (2, 3, 4, 5), device=device).to(dtype)
    decision = backends.can_run_cpu(op, device=device, dtype=dtype)
    assert backends.choose(op, x) == ("cpu" if decision.ok else "reference")
    assert decision.ok == (not decision.reason)


@pytest.mark.parametrize("op", ALL_OPS)
def test_choice_does_not_depend_on_batch_height_and_width(op: str) -> None:
    chosen = {backends.choose(op, torch.zeros(n, 8, h, w)) for n in (0, 1, 5) for h in (1, 9) for w in (1, 300)}
    assert len(chosen) == 1


def test_reasons(compiled: None) -> None:
    op = "depthwise_bn_act"
    float32 = torch.float32
    assert backends.can_run_cpu(op, device="cpu", dtype=float32) == (True, "")
    assert backends.can_run_cpu(op, device="cuda:1", dtype=float32).reason == "device=cuda:1 is not cpu"
    assert backends.can_run_cpu(op, device="cpu", dtype=torch.float64).reason == (
        "dtype=torch.float64 is not supported; allowed: torch.float32, torch.float16, torch.bfloat16"
    )
    assert backends.can_run_cpu(op, device="cpu", dtype=float32, kernel_size=(3, 14)).reason == (
        "a depthwise kernel of 3x14; allowed: 1 to 13 for its height and its width"
    )
    for name in ALL_OPS:
        if name not in triton.FAMILIES:
            found = backends.can_run_triton(name, device="cuda", dtype=float32).reason
            assert found == f"no Triton implementation of {name}"
    assert (
        "'depthwise' is not an operator; allowed: "
        in backends.can_run_cpu("depthwise", device="cpu", dtype=float32).reason
    )
    for name in ALL_OPS:
        here = backends.can_run_cuda(name, device="cpu", dtype=float32)
        assert not here.ok
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"effkernels::{name}", "CUDA")
        expected = "device=cpu is not cuda" if has_kernel else f"the compiled library has no CUDA kernel of {name}"
        assert here.reason == expected


def test_a_driver_or_a_gpu_that_is_too_old_is_the_reason(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    monkeypatch.setattr(backends, "_COMPILED_CUDA", frozenset(ALL_OPS))
    monkeypatch.setattr(_library, "_build_info", {"cuda_version": "13.0.88", "cuda_archs": ["90-real"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    def reason(driver: int) -> str:
        monkeypatch.setattr(backends, "_cuda_problems", {})
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        return backends.can_run_cuda("conv_bn_act", device="cuda:0", dtype=torch.float32).reason

    assert reason(13000) == ""
    assert reason(13010) == ""
    assert reason(12080) == "the library was built with CUDA 13.0.88 and the driver knows CUDA up to 12.8"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert reason(13000) == "compute capability 7.5 of cuda:0 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    assert reason(13000).startswith("the library is built for 90-real, which sm_89 cannot run; build it for this GPU")


@pytest.mark.parametrize(
    ("archs", "capability", "driver", "problem"),
    [
        (["90-real", "90-virtual"], (9, 0), 13000, ""),
        (["80-real"], (8, 6), 13000, ""),  # a later minor version
        (["86-real"], (8, 0), 13000, "the library is built for 86-real, which sm_80 cannot run"),
        (["80-real"], (9, 0), 13000, "the library is built for 80-real, which sm_90 cannot run"),
        (["80-virtual"], (9, 0), 13000, ""),
        (["80-virtual"], (9, 0), 13020, ""),
        (["80-virtual", "80-real"], (12, 0), 13000, ""),
        (["90-virtual"], (8, 0), 13000, "the library is built for 90-virtual, which sm_80 cannot run"),
        (["90a-real"], (9, 0), 13000, ""),
        (["90a-real"], (10, 0), 13000, "the library is built for 90a-real, which sm_100 cannot run"),
        (["90a-virtual"], (12, 0), 13000, "the library is built for 90a-virtual, which sm_120 cannot run"),
        ([], (9, 0), 13000, "the library is built for no GPU, which sm_90 cannot run"),
        (["90-real"], (9, 0), 12080, "the library was built with CUDA 13.1.80 and the driver knows CUDA up to 12.8"),
        # Machine code of the same major CUDA version runs; PTX of a later one is not understood.
        (["90-real"], (9, 0), 13000, ""),
        (["80-virtual"], (9, 0), 13000, "the library has no machine code for sm_90, and the driver"),
    ],
)
def test_code_for_the_gpu_is_looked_for(
    archs: list[str], capability: tuple[int, int], driver: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = "13.1.80" if "driver" in problem else "13.0.88"
    monkeypatch.setattr(_library, "_build_info", {"cuda_version": version, "cuda_archs": archs})
    found = _library.cuda_problem(capability, driver)
    assert found == "" if not problem else found.startswith(problem)


@pytest.mark.parametrize("op", ALL_OPS)
def test_without_the_library_everything_runs_through_the_reference(op: str, without_library: None) -> None:
    arguments = Case(op).draw()
    x = arguments.get("x", arguments.get("pooled"))
    assert backends.choose(op, x) == "reference"
    getattr(flat(ops), op)(**arguments)
    for can_run in (backends.can_run_cpu, backends.can_run_cuda):
        assert can_run(op, device="cpu", dtype=torch.float32).reason == "the compiled library is not there"


def test_backend_is_set_for_a_while() -> None:
    before = backends.selected()
    with effkernels.backend("reference"):
        assert backends.selected() == "reference"
        with effkernels.backend("auto"):
            assert backends.selected() == "auto"
        assert backends.selected() == "reference"
        with pytest.raises(KeyError), effkernels.backend("cpu"):
            raise KeyError
        assert backends.selected() == "reference"
    assert backends.selected() == before


def test_backends_entered_and_left_in_any_order() -> None:
    """As several threads enter and leave: the last one entered of those that are not left counts."""
    before = backends.selected()
    for order in itertools.permutations(range(3)):
        names = ["reference", "cpu", "reference"]
        entered = [effkernels.backend(name) for name in names]
        for block in entered:
            block.__enter__()
        left = set()
        for i in order:
            entered[i].__exit__(None, None, None)
            left.add(i)
            active = [name for j, name in enumerate(names) if j not in left]
            assert backends.selected() == (active[-1] if active else before)


def test_a_backend_for_one_call(compiled: None) -> None:
    x = torch.zeros(1, 8, 5, 5)
    assert backends.choose("pointwise_bn_act", x, backend="reference") == "reference"
    assert backends.choose("pointwise_bn_act", x, backend="cpu") == "cpu"
    with effkernels.backend("reference"):
        assert backends.choose("pointwise_bn_act", x, backend="cpu") == "cpu"
        assert backends.choose("pointwise_bn_act", x, backend="auto") == "reference"
    with pytest.raises(ValueError, match="backend='gpu' is not a backend; allowed: auto, cuda, triton, cpu, reference"):
        backends.choose("pointwise_bn_act", x, backend="gpu")
    with pytest.raises(RuntimeError, match="pointwise_bn_act: backend='cuda' was asked for and cannot run: "):
        backends.choose("pointwise_bn_act", x, backend="cuda")


@pytest.mark.parametrize("op", ALL_OPS)
def test_every_operator_takes_a_backend(op: str, compiled: None) -> None:
    arguments = Case(op).draw()
    with CalledOperators() as seen:
        plain = getattr(flat(ops), op)(**arguments, backend="reference")
    assert "effkernels" not in seen.namespaces
    with effkernels.backend("reference"):
        asked = getattr(flat(ops), op)(**arguments)
        with CalledOperators() as seen:
            getattr(flat(ops), op)(**arguments, backend="cpu")
    assert "effkernels" in seen.namespaces
    torch.testing.assert_close(plain, asked, rtol=0, atol=0)


class Wrapper(Tensor):
    """A tensor without data of its own, as quantised and distributed tensors are."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten"
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.held, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.mark.parametrize("op", ["pointwise_bn_act", "depthwise_bn_act", "conv_bn_act"])
@pytest.mark.parametrize("which", ["x", "weight"])
def test_a_tensor_subclass_is_computed_by_pytorch(which: str, op: str) -> None:
    arguments = Case(op).draw()
    wrapped = {**arguments, which: Wrapper(arguments[which])}
    torch.testing.assert_close(
        getattr(flat(ops), op)(**wrapped), getattr(flat(ops), op)(**arguments, backend="reference")
    )
    with pytest.raises(RuntimeError, match=f"{op}: backend='cpu' was asked for and cannot run: {which} is a Wrapper; "):
        getattr(flat(ops), op)(**wrapped, backend="cpu")


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("op", ALL_OPS)
def test_vmap_runs_through_the_reference(op: str, backend: str, compiled: None) -> None:
    arguments = Case(op).draw()
    name = "pooled" if op == "squeeze_excite_gate" else "x"
    x = arguments.pop(name)

    def call(x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return getattr(flat(ops), op)(**{name: x}, **arguments, backend=backend)

    many = torch.vmap(call)(torch.stack([x, 2 * x]))
    for i, one in enumerate((x, 2 * x)):
        wanted = getattr(flat(ops), op)(**{name: one}, **arguments, backend="reference")
        found = tuple(t[i] for t in many) if isinstance(many, tuple) else many[i]
        torch.testing.assert_close(found, wanted)


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="backend='gpu' is not a backend; allowed: auto, cuda, triton, cpu, reference"),
        effkernels.backend("gpu"),
    ):
        pass


@pytest.mark.parametrize("op", ALL_OPS)
def test_a_forced_backend_that_cannot_run_says_why(op: str) -> None:
    arguments = Case(op).draw()
    reason = backends.can_run_triton(op, device="cpu", dtype=torch.float32).reason
    assert reason, "Triton runs on the CPU only where it interprets its kernels"
    asked = f"{op}: backend='triton' was asked for and cannot run: {reason}"
    with effkernels.backend("triton"), pytest.raises(RuntimeError, match=re.escape(asked)):
        getattr(flat(ops), op)(**arguments)
    doubles = {k: a.double() if isinstance(a, Tensor) else a for k, a in arguments.items()}
    reason = "dtype=torch.float64 is not supported" if _library.is_loaded() else "the compiled library"
    with effkernels.backend("cpu"), pytest.raises(RuntimeError, match=f"{op}: backend='cpu' was asked for.*{reason}"):
        getattr(flat(ops), op)(**doubles)


def test_a_forced_reference_calls_no_compiled_operator(compiled: None) -> None:
    for name, expected in (("reference", {"aten"}), ("cpu", {"effkernels"})):
        with effkernels.backend(name), CalledOperators() as seen:
            flat(ops).depthwise_bn_act(**Case("depthwise_bn_act").draw())
        assert {n for n in seen.namespaces if n in ("effkernels",)} == expected & {"effkernels"}


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("", "auto"), (None, "auto")])
def test_environment_variable(value: str | None, expected: str) -> None:
    assert run_python("from effkernels.ops import backends; print(backends.selected())", value) == (0, expected, "")


def test_environment_variable_with_a_bad_value() -> None:
    code, _, error = run_python("import effkernels", "gpu")
    assert code != 0
    assert error == (
        "ValueError: EFFKERNELS_BACKEND='gpu' is not a backend; allowed: auto, cuda, triton, cpu, reference"
    )


def test_a_library_that_does_not_load_leaves_a_package_that_works() -> None:
    program = """
import torch

def fail(path):
    raise OSError("undefined symbol")

torch.ops.load_library = fail
import effkernels
from effkernels.ops import backends
x, weight = torch.randn(1, 8, 5, 5, requires_grad=True), torch.randn(8, 1, 3, 3)
y = effkernels.ops.depthwise_bn_act(x, weight, padding=(1, 1, 1, 1), activation="silu")
y.sum().backward()
print(backends.choose("depthwise_bn_act", x), tuple(x.grad.shape), hasattr(torch.ops.effkernels, "depthwise_bn_act"))
"""
    assert run_python(program, None) == (0, "reference (1, 8, 5, 5) False", "")


def run_python(program: str, variable: str | None) -> tuple[int, str, str]:
    """Exit status, output and last line of errors of `program` in a process with EFFKERNELS_BACKEND set."""
    environment = {k: v for k, v in os.environ.items() if k != "EFFKERNELS_BACKEND"}
    if variable is not None:
        environment["EFFKERNELS_BACKEND"] = variable
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip(), "".join(done.stderr.strip().splitlines()[-1:])


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_allow_tf32_follows_the_setting_for_convolutions(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from effkernels.ops import _tf32

    convolutions, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    on_gpu = type("OnGpu", (), {"is_cuda": True, "dtype": torch.float32})()
    half = type("OnGpu", (), {"is_cuda": True, "dtype": torch.float16})()
    try:
        # The recurrent nets are set the other way: torch.backends.cudnn.allow_tf32 now raises, this must not.
        rnn_before = torch.backends.cudnn.rnn.fp32_precision
        torch.backends.cudnn.rnn.fp32_precision = "ieee" if precision == "tf32" else "tf32"
        convolutions.fp32_precision = precision
        assert _tf32.resolve(None, on_gpu) == (precision == "tf32")
        assert _tf32.resolve(True, on_gpu) is True
        assert _tf32.resolve(False, on_gpu) is False
        assert _tf32.resolve(None, half) is False
        assert _tf32.resolve(None, torch.zeros(1)) is False
    finally:
        convolutions.fp32_precision = before
        torch.backends.cudnn.rnn.fp32_precision = rnn_before


@pytest.mark.parametrize("allowed", [True, False])
def test_allow_tf32_follows_the_older_setting_too(allowed: bool) -> None:
    from effkernels.ops import _tf32

    on_gpu = type("OnGpu", (), {"is_cuda": True, "dtype": torch.float32})()
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = allowed
        assert _tf32.resolve(None, on_gpu) is allowed
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_reading_the_tf32_setting_does_not_break_a_graph() -> None:
    from effkernels.ops import _tf32

    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def function(x: Tensor) -> Tensor:
        return x + 1 if _tf32._convolutions_may_use_tf32() else x - 1

    expected = 1.0 if torch.backends.cudnn.conv.fp32_precision == "tf32" else -1.0
    assert function(torch.zeros(1)).item() == expected
    assert counter.frame_count == 1

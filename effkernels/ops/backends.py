"""Choose the implementation that runs an operator, and give the reason why another one does not.

Four rooms can hold an operator: `cuda` and `cpu` (the compiled library), `triton`, and `reference` (plain PyTorch,
which runs everything). `can_run_cuda`, `can_run_cpu` and `can_run_triton` answer for one operator with the exact
reason, and `choose` picks. Three things can ask for a backend, the first that does counts: the argument `backend` of a
call (a module of effkernels.nn and a model keep their own and pass it on), the last entered `with` block of

    with effkernels.backend("reference"):
        y = model(x)

and the environment variable EFFKERNELS_BACKEND, which is read once, at import.

A choice depends on device, dtype, channels, kernel size, stride and activation only, never on batch, height or width,
so that a trace with dynamic sizes stays one graph. Where both kinds of kernels run on a GPU, the compiled ones do,
unless `effkernels tune` found the Triton kernel faster there (effkernels.triton.tuned_plan). What the `with` blocks
ask for is a plain module variable, which torch.compile guards; it belongs to the process, not to a thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from effkernels import _library, triton
from effkernels._recorded_tensor import RecordedTensor
from effkernels.ops._trace import constant_in_a_trace
from effkernels.ops.reference import canonical_name
from effkernels.triton import tuned_plan
from effkernels.triton.tuned_plan import BackendKey

BACKENDS: tuple[str, ...] = ("cuda", "triton", "cpu", "reference")
OPERATORS: tuple[str, ...] = (
    "depthwise_bn_act",
    "depthwise_bn_act_squeeze",
    "squeeze_excite_gate",
    "depthwise_bn_act_gate",
    "depthwise_bn_act_se",
    "pointwise_bn_act",
    "pointwise_bn_act_pool",
    "expand_depthwise_squeeze",
    "mbconv",
    "conv_bn_act",
)
BLOCK = "mbconv"
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
DEPTHWISE_KERNEL_SIZES: tuple[int, ...] = tuple(range(1, 14))
"""The allowed heights, and the allowed widths, of a depthwise kernel."""

_ALLOWED_NAMES = ("auto", *BACKENDS)
_OLDEST_CUDA_CAPABILITY = (8, 0)


class Decision(NamedTuple):
    """The answer whether a backend can run an operator, and the reason in one line if not ("" if it can)."""

    ok: bool
    reason: str


def _compiled_for(dispatch_key: str) -> frozenset[str]:
    """Return the operators for which the compiled library holds a kernel of that device."""
    if not _library.is_loaded():
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in OPERATORS if has_kernel(f"effkernels::{op}", dispatch_key))


# Registrations do not change after the library is loaded, so they are asked for once.
_COMPILED_CPU = _compiled_for("CPU")
_COMPILED_CUDA = _compiled_for("CUDA")


def _checked(name: str, source: str) -> str:
    if name not in _ALLOWED_NAMES:
        raise ValueError(f"{source}={name!r} is not a backend; allowed: {', '.join(_ALLOWED_NAMES)}")
    return name


_cuda_problems: dict[int, str] = {}  # by device index: why the compiled kernels cannot run there, "" where they can
_cuda_runs_on: dict[int, bool] = {}  # by device index: whether they can
# By device index: the calls that Triton is faster at, as (op, dtype, channels, kernel size, stride, activation).
_faster_by_triton: dict[int, dict[tuple[object, ...], str]] = {}
_at_start: str = _checked(os.environ.get("EFFKERNELS_BACKEND") or "auto", "EFFKERNELS_BACKEND")
_selected: str = _at_start
_entered: list[_Entered] = []  # the `with` blocks that are not left yet, in the order in which they were entered
_entering = threading.Lock()


class _Entered:
    """One `with` block; two that name the same backend are not equal."""

    def __init__(self, name: str) -> None:
        self.name = name


def selected() -> str:
    """Return the backend now asked for by `backend` or the environment: "auto" or one of `BACKENDS`."""
    return _selected


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a `with` block; "auto" lets `choose` pick.

    A forced backend that cannot run an operator raises RuntimeError with the reason when that operator is called.
    The choice holds for the whole process, not only for the calling thread. Where several threads are inside of blocks,
    the block that was entered last counts, in whatever order they are left.

    Raises:
        ValueError: name is neither "auto" nor one of `BACKENDS`.
    """
    global _selected
    _checked(name, "backend")
    if torch.compiler.is_compiling():  # in traced code, where no other thread has a part and a lock has no meaning
        before = _selected
        _selected = name
        try:
            yield
        finally:
            _selected = before
        return
    entered = _Entered(name)
    try:  # around all of it: an interrupt must not leave the backend forced
        with _entering:
            _entered.append(entered)
            _selected = name
        yield
    finally:
        with _entering:
            _entered[:] = [block for block in _entered if block is not entered]
            _selected = _entered[-1].name if _entered else _at_start


def can_run_cpu(
    op: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    channels: int | None = None,
    kernel_size: int | tuple[int, int] | None = None,
    stride: int | None = None,
    activation: str | None = None,
) -> Decision:
    """Return whether the compiled CPU kernels run `op`.

    Args:
        op: one of `OPERATORS`.
        device, dtype: of x. On "meta" it is the shape function of the compiled operator that runs.
        channels, kernel_size, stride, activation: of the call; None where they are not known or do not apply.
            A kernel size is (height, width), or one number for both.
    """
    return _can_run_compiled(op, "cpu", _COMPILED_CPU, torch.device(device), dtype, kernel_size)


def can_run_cuda(
    op: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    channels: int | None = None,
    kernel_size: int | tuple[int, int] | None = None,
    stride: int | None = None,
    activation: str | None = None,
) -> Decision:
    """Return whether the compiled CUDA kernels run `op`. Arguments as in `can_run_cpu`."""
    device = torch.device(device)
    decision = _can_run_compiled(op, "cuda", _COMPILED_CUDA, device, dtype, kernel_size)
    if decision.ok and device.type == "cuda":
        problem = _cuda_problem(device.index)
        if problem:
            return Decision(False, problem)
    return decision


def can_run_triton(
    op: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    channels: int | None = None,
    kernel_size: int | tuple[int, int] | None = None,
    stride: int | None = None,
    activation: str | None = None,
) -> Decision:
    """Return whether a Triton kernel runs `op`, also one of `effkernels.triton.TRAINING_STEPS`; arguments as in
    `can_run_cpu`.

    It runs on a GPU, and on the CPU if Triton interprets its kernels in this process (TRITON_INTERPRET=1, for tests).
    """
    if op not in OPERATORS and op not in triton.TRAINING_STEPS:
        return Decision(False, f"{op!r} is not an operator; allowed: {', '.join(OPERATORS)}")
    problem = triton.problem_of(op, torch.device(device))
    if problem:
        return Decision(False, problem)
    return _can_run_call(op, dtype, kernel_size)


def choose(
    op: str,
    x: Tensor,
    weight: Tensor | None = None,
    stride: int = 1,
    activation: str = "identity",
    backend: str = "auto",
) -> str:
    """Return the backend that runs `op` on `x`: one of `BACKENDS`.

    It is "reference" where a fused operator cannot be called and plain PyTorch can, whatever was asked for: inside a
    transform of torch.func, under torch.jit.trace and under torch.onnx.export.

    Args:
        op: one of `OPERATORS`.
        x: the first input of the operator, (N, C, H, W) or (N, C); only its device, dtype and channels count.
        weight: of the convolution, (C_out, C_in, KH, KW), where there is one; only its kernel size counts.
        stride, activation: of the call.
        backend: one of `BACKENDS`, or "auto" for what the function `backend` and the environment ask for.

    Raises:
        TypeError: x is not a tensor.
        ValueError: backend is neither "auto" nor one of `BACKENDS`.
        RuntimeError: the backend asked for cannot run the operator; the message has the reason.
    """
    asked = _selected if backend == "auto" else backend
    if asked == "reference" and isinstance(x, Tensor):
        return "reference"
    # The ways of nearly every call come first: this runs some fifty times in one forward of a small network.
    if not (is_readable(x) and (weight is None or is_readable(weight))):
        return _choose_for_subclass(op, x, weight, asked)
    if _needs_plain_pytorch():
        return "reference"
    if asked == "auto":
        if x.is_cpu:
            return "cpu" if op in _COMPILED_CPU and x.dtype in DTYPES else "reference"
        if x.is_cuda and op in _COMPILED_CUDA and x.dtype in DTYPES and _cuda_runs(x.get_device()):
            faster = _faster_by_triton.get(x.get_device())
            if not faster:  # nothing is tuned on this GPU
                return "cuda"
            return faster.get((op, x.dtype, *_sizes_of(x, weight), stride, canonical_name(activation)), "cuda")
        candidates = BACKENDS if x.is_cuda else ("cpu", "reference")
    else:
        candidates = (_checked(asked, "backend"),)
    channels, kernel_size = _sizes_of(x, weight)
    reason = ""
    for name in candidates:
        if name == "reference":
            return name
        decision = _CAN_RUN[name](
            op,
            device=x.device,
            dtype=x.dtype,
            channels=channels,
            kernel_size=kernel_size,
            stride=stride,
            activation=activation,
        )
        if decision.ok:
            return name
        reason = decision.reason
    raise RuntimeError(f"{op}: backend={asked!r} was asked for and cannot run: {reason}")


def takes_block(x: Tensor, backend: str = "auto") -> bool:
    """Return whether an MBConv block of x is best called as one operator, `mbconv`, and not as its parts.

    It is where that operator may be one launch: on a GPU, in float16 and bfloat16, by the compiled kernels. Where
    `effkernels tune` found that Triton is faster at some calls, the parts are chosen one by one. On "meta" it is as on
    a GPU.

    Args:
        x: the input of the block; only its device and dtype count.
        backend: as of `choose`.
    """
    asked = _selected if backend == "auto" else backend
    if x.is_cpu or asked in ("triton", "reference") or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return x.device.type == "meta" or (x.is_cuda and BLOCK in _COMPILED_CUDA and not _is_tuned(x.get_device()))


# The tensors whose data a kernel can read, and those that stand for one in a trace or a recording.
_TENSOR_TYPES = frozenset({Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor, RecordedTensor})


def is_readable(tensor: Tensor) -> bool:
    """Return False for a subclass of Tensor that handles operators itself, as quantised ones do."""
    if type(tensor) in _TENSOR_TYPES:
        return True
    return isinstance(tensor, Tensor) and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _choose_for_subclass(op: str, x: Tensor, weight: Tensor | None, asked: str) -> str:
    """Return the choice if x or weight is of a subclass of Tensor that decides itself what an operator does with it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: the input is {type(x).__name__}; allowed: Tensor")
    if _checked(asked, "backend") == "auto" or _needs_plain_pytorch():
        return "reference"
    name, found = ("weight", weight) if is_readable(x) else ("x", x)
    raise RuntimeError(
        f"{op}: backend={asked!r} was asked for and cannot run: {name} is a {type(found).__name__}; allowed: Tensor, "
        f"Parameter"
    )


# Called by a trace of torch.compile and torch.export too: what it looks at is not for their graphs.
@constant_in_a_trace
def _needs_plain_pytorch() -> bool:
    """Return whether the context knows PyTorch's own operators only: torch.func, torch.jit.trace, torch.onnx.export.

    The exporter of torch.onnx runs torch.export, and before torch.jit.trace.
    """
    return (
        _in_transform()
        or _is_tracing()
        or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())  # the second one alone takes 1 us
    )


_in_transform = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


_CAN_RUN = {"cuda": can_run_cuda, "triton": can_run_triton, "cpu": can_run_cpu}


def key_of(
    op: str, x: Tensor, weight: Tensor | None = None, stride: int = 1, activation: str = "identity"
) -> BackendKey:
    """Return the key of a call in the tuned plans; arguments as in `choose`."""
    return BackendKey(op, str(x.dtype).removeprefix("torch."), *_sizes_of(x, weight), stride, activation)


def _sizes_of(x: Tensor, weight: Tensor | None) -> tuple[int | None, tuple[int, int] | None]:
    """Return the channels and kernel size (height, width) of a call, None where there is none."""
    channels = x.shape[1] if x.dim() > 1 else None
    return channels, (weight.shape[2], weight.shape[3]) if weight is not None and weight.dim() == 4 else None


def depthwise_kernel_problem(height: int, width: int) -> str:
    """Why no kernel of this project runs a depthwise convolution of height x width taps; "" where they all do."""
    if height in DEPTHWISE_KERNEL_SIZES and width in DEPTHWISE_KERNEL_SIZES:
        return ""
    allowed = f"{DEPTHWISE_KERNEL_SIZES[0]} to {DEPTHWISE_KERNEL_SIZES[-1]} for its height and its width"
    return f"a depthwise kernel of {height}x{width}; allowed: {allowed}"


def _can_run_compiled(
    op: str,
    name: str,
    compiled: frozenset[str],
    device: torch.device,
    dtype: torch.dtype,
    kernel_size: int | tuple[int, int] | None,
) -> Decision:
    if op not in OPERATORS:
        return Decision(False, f"{op!r} is not an operator; allowed: {', '.join(OPERATORS)}")
    if not _library.is_loaded():
        return Decision(False, _library.load_error() or "the compiled library is not loaded")
    if op not in compiled:
        return Decision(False, f"the compiled library has no {name.upper()} kernel of {op}")
    if device.type not in (name, "meta"):
        return Decision(False, f"device={device} is not {name}")
    return _can_run_call(op, dtype, kernel_size)


def _can_run_call(op: str, dtype: torch.dtype, kernel_size: int | tuple[int, int] | None) -> Decision:
    """Return the reason why no backend with kernels of its own can run a call, or ""."""
    if dtype not in DTYPES:
        return Decision(False, f"dtype={dtype} is not supported; allowed: {', '.join(map(str, DTYPES))}")
    problem = ""
    if kernel_size is not None and ("depthwise" in op or op == "mbconv"):
        problem = depthwise_kernel_problem(*((kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size))
    return Decision(not problem, problem)


# A trace must not see the dictionaries that this fills on the way: it would guard their state of before.
@constant_in_a_trace
def _cuda_runs(index: int) -> bool:
    """Return whether the compiled kernels run on a GPU. The first call reads the tuned plans of all GPUs."""
    found = _cuda_runs_on.get(index)
    if found is None:
        found = _cuda_runs_on[index] = _cuda_problem(index) == ""
        if not _faster_by_triton:
            _faster_by_triton.update({i: _read_faster_by_triton(i) for i in range(torch.cuda.device_count())})
    return found


@constant_in_a_trace
def _is_tuned(index: int) -> bool:
    """Return whether the tuned plan of a GPU knows calls that Triton is faster at, or no compiled kernel runs there."""
    return not _cuda_runs(index) or bool(_faster_by_triton.get(index))


def _read_faster_by_triton(index: int) -> dict[tuple[object, ...], str]:
    device = torch.device("cuda", index)
    found: dict[tuple[object, ...], str] = {}
    for key, backend in tuned_plan.read(tuned_plan.device_name(device) or "").faster_backends().items():
        dtype = next((dtype for dtype in DTYPES if str(dtype) == f"torch.{key.dtype}"), None)
        if backend != "triton" or dtype is None or key.op not in OPERATORS:
            continue
        if can_run_triton(key.op, device=device, dtype=dtype, channels=key.channels, kernel_size=key.kernel_size).ok:
            known_by = (key.op, dtype, *key[2:])
            found[known_by] = backend
    return found


@constant_in_a_trace
def _cuda_problem(index: int | None) -> str:
    """Why this process's GPU cannot run the compiled kernels; "" where it can. Constant per device, hence cached."""
    index = torch.cuda.current_device() if index is None else index
    if index not in _cuda_problems:
        _cuda_problems[index] = _find_cuda_problem(index)
    return _cuda_problems[index]


def _find_cuda_problem(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CUDA_CAPABILITY:
        return f"compute capability {'.'.join(map(str, capability))} of cuda:{index} is below 8.0"
    return _library.cuda_problem(capability, torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]

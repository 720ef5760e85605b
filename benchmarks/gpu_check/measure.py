"""Measures one operator call or one block: contenders with the same inputs, parity first, then times in turns.

On a GPU every contender's calls are captured in a CUDA graph, so that the time is the kernels' and not that of Python
and the launches; the rows say so by "-graph". On a CPU the calls are timed as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import effkernels
from effkernels import environment, ops
from effkernels.bench import timing
from effkernels.bench.op_timing import as_run, copied, temporary_graphs, triton_launches
from effkernels.bench.timing import Row, Statistics
from effkernels.ops import backends, reference
from effkernels.ops.call import OpCall, PreparedCall, in_float64, prepared, run
from effkernels.ops.parity import errors, judge

# Results of this many images are compared with float64: every operator works image by image.
_PARITY_IMAGES = 2
_ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """One contender of one case.

    Attributes:
        error: relative L2 to float64; None if it computes only a part of the operator.
        launches: of one call, where they are counted.
    """

    contender: str
    statistics: Statistics
    error: float | None
    launches: int | None


@dataclass(frozen=True)
class Refused:
    """A contender that did not run, and why."""

    contender: str
    reason: str
    ours: bool


def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes per microsecond that a large copy within the device's memory reads and writes, the median of many."""
    source = torch.randint(0, 255, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = timing.time_in_turns({"copy": lambda number: target.copy_(source)}, device=device, rounds=_ROUNDS)
    return 2 * source.nbytes / timing.summarise(times["copy"]).median_us


def launch_count() -> int | None:
    """Launches of this library in this process so far; None if there is no counter or no CUDA."""
    if not torch.cuda.is_available() or not hasattr(torch.ops.effkernels, "cuda_launches"):
        return None
    return int(torch.ops.effkernels.cuda_launches())


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        prepare: makes a call on inputs of its own.
        backend: of this project, whose results have to be right; "" for another's.
        whole: it computes the case and not a part of it.
    """

    prepare: Callable[[], PreparedCall]
    backend: str = ""
    whole: bool = True


def bare(case: OpCall, device: torch.device) -> tuple[str, Any] | None:
    """PyTorch's convolution or product alone, without norm, activation or squeeze-and-excitation, by its library."""
    convolution_by, product_by = ("cudnn ", "cublas ") if device.type == "cuda" else ("", "")
    if case.op == "pointwise_bn_act":

        def product(x: Tensor, weight: Tensor, **others: Any) -> Tensor:
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            return rows @ weight.flatten(1).t()

        return f"{product_by}product alone", SimpleNamespace(pointwise_bn_act=product)
    if not (case.op.startswith("depthwise") or case.op == "conv_bn_act"):
        return None
    padding = case.padding
    if padding[0] != padding[1] or padding[2] != padding[3]:
        return None

    def convolution(x: Tensor, weight: Tensor, **others: Any) -> Tensor:
        groups = x.shape[1] // weight.shape[1]
        return torch.nn.functional.conv2d(
            x, weight, stride=others["stride"], padding=(padding[0], padding[2]), groups=groups
        )

    return f"{convolution_by}convolution alone", SimpleNamespace(**{case.op: convolution})


def ours(op: str, dtype: torch.dtype, device: torch.device, kernel_size: int | None = None) -> list[str]:
    """Return every backend of this project that runs a call, the compiled ones first."""
    can_run = {"cuda": backends.can_run_cuda, "cpu": backends.can_run_cpu, "triton": backends.can_run_triton}
    found = [
        name for name, decide in can_run.items() if decide(op, device=device, dtype=dtype, kernel_size=kernel_size).ok
    ]
    return found or ["reference"]


def on_backend(call: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Return a function that runs on one backend, whatever the one in force."""

    def forced(*args: Any, **options: Any) -> Any:
        with effkernels.backend(backend):
            return call(*args, **options)

    return forced


def contenders(
    case: OpCall, dtype: torch.dtype, device: torch.device, modes: Sequence[str | None]
) -> dict[str, Contender]:
    """Return the contenders of an operator call, by name.

    Args:
        modes: of torch.compile, None for its default.
    """

    arguments = case.arguments(dtype, device, images=_PARITY_IMAGES)

    def of(module: Any, **how: Any) -> Contender:
        return Contender(lambda: prepared(module, case.op, copied(arguments)), **how)

    def only(function: Any, **how: Any) -> Contender:
        return of(SimpleNamespace(**{case.op: function}), **how)

    weight = arguments.get("weight")
    found = {
        f"effkernels-{name}": only(on_backend(getattr(ops, case.op), name), backend=name)
        for name in ours(case.op, dtype, device, None if weight is None else weight.shape[3])
    }
    found["eager-channels-last"] = of(reference)
    alone = bare(case, device)
    if alone:
        found[alone[0]] = of(alone[1], whole=False)
    for mode in modes:
        found[compiled_name(mode)] = only(torch.compile(getattr(reference, case.op), mode=mode, dynamic=False))
    return found


def compiled_name(mode: str | None) -> str:
    """Return the contender's name of a mode of torch.compile."""
    return "compile" if mode is None else "compile-max-autotune"


def measure(
    case: OpCall, dtype: torch.dtype, device: torch.device, modes: Sequence[str | None] = ()
) -> tuple[list[Measured], list[Refused]]:
    """Time every contender of an operator call.

    Returns:
        The contenders that ran, and those that did not or were wrong.
    """
    torch._dynamo.reset()
    few = case.with_(batch=min(case.batch, _PARITY_IMAGES)).arguments(dtype, device)
    truth = run(reference, case.op, in_float64(few))
    plain = run(reference, case.op, copied(few))
    copies = timing.input_count(case.bytes_moved(dtype), environment.last_level_cache_bytes(device))
    return compare(contenders(case, dtype, device, modes), truth, plain, copies, device)


def compare(
    contenders: Mapping[str, Contender],
    truth: Sequence[Tensor],
    plain: Sequence[Tensor],
    copies: int,
    device: torch.device,
) -> tuple[list[Measured], list[Refused]]:
    """Time contenders in turns, each after its results were held against float64.

    Args:
        truth, plain: results of the first images in float64, and those of plain PyTorch in the dtype that is timed.
        copies: how many inputs a contender has, so that none is in the cache when its turn comes again.
    """
    runs: dict[str, timing.Run] = {}
    parity: dict[str, float | None] = {}
    launches: dict[str, int] = {}
    refused = []
    with temporary_graphs():
        for name, contender in contenders.items():
            label = f"{name}-graph" if device.type == "cuda" else name
            try:
                calls = [contender.prepare() for _ in range(copies)]
                outputs, counted = _counted(calls[0], contender.backend)
                if counted is not None:
                    launches[label] = counted
                results = tuple(output[: len(true)] for output, true in zip(outputs, truth, strict=False))
                if contender.backend:
                    ok, error, limit = judge(results, plain, truth)
                    if not ok:
                        raise ArithmeticError(f"wrong: error {error:.1e}, limit {limit:.1e}; not timed")
                pairs = zip(results, truth, strict=contender.whole)
                parity[label] = max(errors(got, true).l2 for got, true in pairs) if contender.whole else None
                runs[label] = as_run(calls, device)
            except Exception as failure:  # the others are still wanted
                reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
                refused.append(Refused(label, reason, bool(contender.backend)))
        if not runs:
            return [], refused
        times = timing.time_in_turns(runs, device=device, warmup=2, rounds=_ROUNDS)
        runs.clear()  # the graphs go before what they count with comes back
    calls_per_run = copies if device.type == "cuda" else 1
    measured = [
        Measured(name, timing.summarise([time / calls_per_run for time in samples]), parity[name], launches.get(name))
        for name, samples in times.items()
    ]
    return measured, refused


def _counted(call: PreparedCall, backend: str) -> tuple[tuple[Tensor, ...], int | None]:
    """Return the results of a call, and its launches by the counter of its backend; None without a counter."""
    before = launch_count()
    with triton_launches() as names:
        outputs = call()
    if backend == "triton":
        return outputs, len(names)
    if backend == "cuda" and before is not None:
        return outputs, (launch_count() or 0) - before
    return outputs, None


def rows_of(
    measured: Sequence[Measured],
    *,
    suite: str,
    case: str,
    batch: int,
    size: int,
    dtype: torch.dtype,
    device_name: str,
    date: str,
    bandwidth: float,
) -> list[Row]:
    """Result rows of one case.

    Args:
        suite, case: as rows name them.
        size: bytes that the case cannot avoid to move.
        bandwidth: bytes per microsecond of a copy; the floor is the time that the case's bytes take at it.
    """
    return [
        timing.make_row(
            one.statistics,
            suite=suite,
            case=case,
            contender=one.contender,
            device=device_name,
            dtype=str(dtype).removeprefix("torch."),
            batch=batch,
            date=date,
            rel_error=one.error,
            floor_us=round(size / bandwidth, 3),
            bytes=size,
            launches=one.launches,
        )
        for one in measured
    ]

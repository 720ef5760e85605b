"""Measures one operator call: contenders with the same inputs, parity first, then times in turns.

On a GPU every contender's calls are captured in a CUDA graph, so that the time is the kernels' and not that of Python
and the launches; the rows say so by "-graph". On a CPU the calls are timed as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from effkernels import backends, benchmark, environment, ops, reference
from effkernels.benchmark import Row, Statistics
from effkernels.check import errors, judge
from effkernels.op_case import OpCase

# Results of this many images are compared with float64: every operator works image by image.
_PARITY_IMAGES = 2
_ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """One contender of one case.

    Attributes:
        error: relative L2 to float64; None where it computes only a part of the operator.
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
    times = benchmark.time_in_turns({"copy": lambda number: target.copy_(source)}, device=device, rounds=_ROUNDS)
    return 2 * source.nbytes / benchmark.summarise(times["copy"]).median_us


def enlarged(case: OpCase, batch: int, dtype: torch.dtype, device: torch.device) -> OpCase:
    """The case with its images repeated up to a batch, on the device: drawing each anew would take minutes."""
    words = case.shape.partition("x")[2]
    repeated = {}
    for name, tensor in case.tensors.items():
        value = tensor.to(device, torch.float32 if tensor.ndim == 1 or name == "pooled" else dtype)
        if name in ("x", "pooled", "gate", "residual"):
            value = value.repeat(-(-batch // case.batch), *[1] * (value.ndim - 1))[:batch]
        repeated[name] = value
    return replace(case, shape=f"{batch}x{words}", batch=batch, tensors=repeated)


def launch_count() -> int | None:
    """Launches of this library in this process so far; None where there is no counter or no CUDA."""
    if not torch.cuda.is_available() or not hasattr(torch.ops.effkernels, "cuda_launches"):
        return None
    return int(torch.ops.effkernels.cuda_launches())


def bare(case: OpCase, device: torch.device) -> tuple[str, Any] | None:
    """PyTorch's convolution or product alone, without norm, activation or squeeze-and-excitation, by its library."""
    convolution_by, product_by = ("cudnn ", "cublas ") if device.type == "cuda" else ("", "")
    if case.op == "pointwise_bn_act":

        def product(x: Tensor, weight: Tensor, **others: Any) -> Tensor:
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            return rows @ weight.flatten(1).t()

        return f"{product_by}product alone", SimpleNamespace(pointwise_bn_act=product)
    if not (case.op.startswith("depthwise") or case.op == "conv_bn_act"):
        return None
    padding = case.options["padding"]
    if padding[0] != padding[1] or padding[2] != padding[3]:
        return None

    def convolution(x: Tensor, weight: Tensor, **others: Any) -> Tensor:
        groups = x.shape[1] // weight.shape[1]
        return torch.nn.functional.conv2d(
            x, weight, stride=others["stride"], padding=(padding[0], padding[2]), groups=groups
        )

    return f"{convolution_by}convolution alone", SimpleNamespace(**{case.op: convolution})


def contenders(case: OpCase, dtype: torch.dtype, device: torch.device, modes: Sequence[str | None]) -> dict[str, Any]:
    """By name: a module with the operator.

    Args:
        modes: of torch.compile, None for its default.
    """
    first = case.tensors["x" if "x" in case.tensors else "pooled"]
    x = torch.empty((1, *first.shape[1:]), dtype=dtype if "x" in case.tensors else torch.float32, device=device)
    found: dict[str, Any] = {f"effkernels-{backends.choose(case.op, x, case.tensors.get('weight'))}": ops}
    found["eager-channels-last"] = reference
    alone = bare(case, device)
    if alone:
        found[alone[0]] = alone[1]
    for mode in modes:
        compiled = torch.compile(getattr(reference, case.op), mode=mode, dynamic=False)
        found["compile" if mode is None else "compile-max-autotune"] = SimpleNamespace(**{case.op: compiled})
    return found


def in_graph(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
    """All calls, one after the other, as one CUDA graph."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def measure(
    case: OpCase, batch: int, dtype: torch.dtype, device: torch.device, modes: Sequence[str | None] = ()
) -> tuple[OpCase, list[Measured], list[Refused]]:
    """Time every contender of a case.

    Args:
        case: with a batch of at most a few images.
        batch: the batch that is timed.

    Returns:
        The case at its full batch, the contenders that ran, and those that did not or were wrong.
    """
    torch._dynamo.reset()
    rounded = case.rounded(dtype)
    small = replace(rounded, tensors={name: _first_images(name, t) for name, t in rounded.tensors.items()})
    truth = small.prepare(reference, torch.float64, device)()
    plain = small.prepare(reference, dtype, device)()
    large = enlarged(rounded, batch, dtype, device)
    copies = benchmark.input_count(large.bytes_moved(dtype), environment.last_level_cache_bytes(device))
    runs: dict[str, benchmark.Run] = {}
    parity: dict[str, float | None] = {}
    launches: dict[str, int] = {}
    refused = []
    for name, module in contenders(large, dtype, device, modes).items():
        ours, whole = module is ops, not name.endswith(" alone")
        label = f"{name}-graph" if device.type == "cuda" else name
        try:
            calls = [large.prepare(module, dtype, device) for _ in range(copies)]
            before = launch_count()
            outputs = calls[0]()
            if ours and before is not None:
                launches[label] = (launch_count() or 0) - before
            results = tuple(output[: len(true)] for output, true in zip(outputs, truth, strict=False))
            if ours:
                ok, error, limit = judge(results, plain, truth)
                if not ok:
                    raise ArithmeticError(f"wrong: error {error:.1e}, limit {limit:.1e}; not timed")
            pairs = zip(results, truth, strict=whole)
            parity[label] = max(errors(got, true).l2 for got, true in pairs) if whole else None
            runs[label] = _as_run(calls, device)
        except Exception as failure:  # the others are still wanted
            refused.append(Refused(label, f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}", ours))
    if not runs:
        return large, [], refused
    calls_per_run = copies if device.type == "cuda" else 1
    times = benchmark.time_in_turns(runs, device=device, warmup=2, rounds=_ROUNDS)
    measured = [
        Measured(
            name, benchmark.summarise([time / calls_per_run for time in times[name]]), parity[name], launches.get(name)
        )
        for name in runs
    ]
    return large, measured, refused


def _first_images(name: str, tensor: Tensor) -> Tensor:
    return tensor[:_PARITY_IMAGES] if name in ("x", "pooled", "gate", "residual") else tensor


def _as_run(calls: Sequence[Callable[[], object]], device: torch.device) -> benchmark.Run:
    if device.type == "cuda":
        replay = in_graph(calls, device)
        return lambda number: replay()
    return lambda number: calls[number % len(calls)]()


def rows_of(
    case: OpCase,
    measured: Sequence[Measured],
    *,
    dtype: torch.dtype,
    device_name: str,
    date: str,
    bandwidth: float,
) -> list[Row]:
    """Result rows of one case.

    Args:
        bandwidth: bytes per microsecond of a copy; the floor is the time that the case's bytes take at it.
    """
    size = case.bytes_moved(dtype)
    return [
        benchmark.make_row(
            one.statistics,
            suite="op",
            case=f"{case.op} {case.shape}",
            contender=one.contender,
            device=device_name,
            dtype=str(dtype).removeprefix("torch."),
            batch=case.batch,
            date=date,
            rel_error=one.error,
            floor_us=round(size / bandwidth, 3),
            bytes=size,
            launches=one.launches,
        )
        for one in measured
    ]

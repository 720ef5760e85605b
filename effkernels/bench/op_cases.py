"""One operator call against plain PyTorch and torch.compile; parity first, then time in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from effkernels import environment, ops
from effkernels.bench import timing
from effkernels.bench.measure import WRONG, Options, Refusal, measure
from effkernels.bench.op_timing import copied
from effkernels.bench.timing import Row
from effkernels.ops import backends, reference
from effkernels.ops.call import OpCall, in_float64, input_of, prepared, run
from effkernels.ops.parity import errors

CONTENDERS = {
    "effkernels": "this package's operator",
    "eager": "the equivalent PyTorch",
    "compile": "the equivalent PyTorch under torch.compile",
}


class _Compiled:
    """The reference of one operator under torch.compile, in place of a module that holds it."""

    def __init__(self, op: str) -> None:
        setattr(self, op, torch.compile(getattr(reference, op), dynamic=False))


def dtype_name(dtype: torch.dtype) -> str:
    """Return 'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def backend_of(call: OpCall, arguments: Mapping[str, Any]) -> str:
    """Return the backend that the automatic choice gives a call."""
    return backends.choose(call.op, input_of(arguments), arguments.get("weight"))


def measure_op(
    call: OpCall,
    dtype: torch.dtype,
    contenders: Sequence[str],
    device: torch.device,
    options: Options,
    *,
    threads: int,
    date: str,
    advance: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure an operator call; the tensors are in channels_last memory, which is what PyTorch is fastest with.

    Args:
        contenders: names of `CONTENDERS`.
        threads, date, advance, report: as of `networks.run_case`.

    Returns:
        Rows in the order of ``contenders``, and the contenders that did not run.
    """
    torch._dynamo.reset()
    arguments = call.arguments(dtype, device)
    truth = run(reference, call.op, in_float64(call.arguments(dtype)))
    size, flops = call.bytes_moved(dtype), call.flops()
    copies = timing.input_count(size, environment.last_level_cache_bytes(device))
    labels: dict[str, str] = {}
    parity: dict[str, float] = {}
    runs: dict[str, timing.Run] = {}
    refusals: list[Refusal] = []
    with torch.inference_mode():
        plain = _error(prepared(reference, call.op, copied(arguments))(), truth)
        for name in contenders:
            module: Any = {"effkernels": ops, "eager": reference}.get(name)
            label = f"effkernels-{backend_of(call, arguments)}" if name == "effkernels" else name
            reason = None
            if label == "effkernels-reference":
                reason = "no kernel takes this call here (see: effkernels info)"
            else:
                try:
                    calls = [prepared(module or _Compiled(call.op), call.op, copied(arguments)) for _ in range(copies)]
                    error = _error(calls[0](), truth)
                    if not error <= WRONG * max(plain, torch.finfo(dtype).eps):
                        reason = f"wrong: off by {error:.1e} from float64, plain PyTorch by {plain:.1e}; not timed"
                except Exception as failure:  # a foreign compiler may raise anything
                    reason = f"failed: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            if reason is not None:
                refusals.append(Refusal(name, str(call), reason))
                for _ in range(options.rounds):
                    advance(name)
                continue
            labels[name], parity[name] = label, error
            runs[name] = lambda number, calls=calls: calls[number % len(calls)]()  # type: ignore[misc]
        if not runs:
            return [], refusals
        measured = measure(
            runs,
            device,
            options,
            dtype=dtype,
            advance=advance,
            report=lambda line: report(f"{call}, {dtype_name(dtype)}: {line}"),
        )
    rows = []
    for name in runs:
        row = timing.make_row(
            timing.summarise(measured.times[name]),
            suite="op",
            case=str(call),
            contender=labels[name],
            device=environment.device_name(device, threads),
            dtype=dtype_name(dtype),
            batch=call.batch,
            date=date,
            rel_error=parity[name],
            bytes=size,
            flops=flops,
            floor_us=measured.floor_us(size, flops),
        )
        rows.append(dataclasses.replace(row, name=name, **measured.fields(name)))
    return rows, refusals


def _error(results: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    return max(errors(got, true).l2 for got, true in zip(results, truth, strict=True))

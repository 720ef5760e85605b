"""The cost of one call: an operator with next to no work, through each of its faces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from effkernels import environment, ops
from effkernels.bench import timing
from effkernels.bench.measure import Options, Refusal, measure
from effkernels.bench.timing import Row, Run
from effkernels.ops import reference
from effkernels.ops.call import OpCall, prepared

CASE = "depthwise_bn_act 1x8x1x1 3x3 stride 1"
CONTENDERS = ("effkernels.ops", "torch.ops.effkernels", "eager", "conv2d alone")


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the same depthwise operator on eight values, by contender.

    Its time is that of the call itself: argument checks and choice of backend in Python, the dispatcher, the adaptor.
    One bare convolution of PyTorch is measured for comparison.
    """
    arguments = OpCall.on("depthwise_bn_act", (1, 8, 1, 1)).arguments(torch.float32, device)
    call, plain = (prepared(module, "depthwise_bn_act", arguments) for module in (ops, reference))
    x, weight, mean, var, scale, shift = (
        arguments[name] for name in ("x", "weight", "norm_mean", "norm_var", "norm_weight", "norm_bias")
    )
    compiled = torch.ops.effkernels.depthwise_bn_act.default
    convolution = torch.nn.functional.conv2d
    found: dict[str, Callable[[], object]] = {
        "effkernels.ops": call,
        "torch.ops.effkernels": lambda: compiled(
            x, weight, None, mean, var, scale, shift, 1e-5, 1, (1, 1, 1, 1), 1, "silu"
        ),
        "eager": plain,
        "conv2d alone": lambda: convolution(x, weight, padding=1, groups=8),
    }
    assert tuple(found) == CONTENDERS
    return found


def measure_overhead(
    contenders: Sequence[str],
    device: torch.device,
    options: Options,
    *,
    threads: int,
    date: str,
    advance: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure `calls` in inference mode.

    Args:
        contenders: names of `CONTENDERS`.
        threads, date, advance, report: as of `networks.run_case`.

    Returns:
        Rows in the order of ``contenders``, and no refusal.
    """
    with torch.inference_mode():
        of_faces = calls(device)
        measured = measure(
            {name: _ignoring_number(of_faces[name]) for name in contenders},
            device,
            options,
            advance=advance,
            report=lambda line: report(f"{CASE}: {line}"),
        )
    rows = []
    for name in contenders:
        row = timing.make_row(
            timing.summarise(measured.times[name]),
            suite="overhead",
            case=CASE,
            contender=name,
            device=environment.device_name(device, threads),
            dtype="float32",
            batch=1,
            date=date,
        )
        rows.append(dataclasses.replace(row, name=name, **measured.fields(name)))
    return rows, []


def _ignoring_number(call: Callable[[], object]) -> Run:
    return lambda number: call()

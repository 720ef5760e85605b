"""``effkernels explain``: what a network would launch on a GPU, the least time that could take, and an estimate."""

from __future__ import annotations

import argparse
import textwrap

from effkernels import console
from effkernels.bench.foreign import fused_on_meta, training_on_meta
from effkernels.commands.common import UsageError, add_json, building, check_output, model_source, positive, writing
from effkernels.files import printable, write_text
from effkernels.models.sources import FORMS, input_size_of_source
from effkernels.plan import gpus
from effkernels.plan.gpus import Gpu
from effkernels.plan.launches import PRECISIONS, Plan, Totals, plan_model, plan_network
from effkernels.plan.time_estimate import (
    CLOCKS_PER_INSTRUCTION,
    COPY_SHARE,
    EAGER_US,
    FOREIGN_US,
    MODES,
    OVERLAPPING,
    TERMS,
)
from effkernels.plan.training_step import StepPlan, plan_step, plan_step_of
from effkernels.report import planned

TEXT = "List the kernels that a model launches on a GPU, with bytes, FLOPs and floor times. Needs no GPU."
WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"{FORMS}; models of others are planned as optimize_ leaves them"
    )
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="default: the model's own")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--no-tf32",
        action="store_true",
        help="exact float32 convolutions, not in TF32, which is PyTorch's default",
    )
    names = ", ".join(gpu.name for gpu in gpus.GPUS)
    parser.add_argument("--device", default=gpus.DEFAULT_GPU, metavar="GPU", help=f"{names}; default: %(default)s")
    parser.add_argument(
        "--model-time",
        action="store_true",
        help="an estimate of the time of each launch, its terms apart, instead of bytes, FLOPs and floors",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="a training step, forward and backward, beside the same network in plain PyTorch",
    )
    parser.add_argument(
        "--recompute", choices=("expand",), help="with --train: what the backward computes again, to save memory"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write the forward's estimates as a page with pictures; instead of the tables"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the launch plan of a model."""
    try:
        gpu = gpus.find(arguments.device)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from error
    if arguments.recompute and not arguments.train:
        raise UsageError("--recompute is for a training step; allowed: with --train")
    if arguments.html and (arguments.train or arguments.json):
        raise UsageError(f"--html is for the forward of a model; allowed: without {_other(arguments)}")
    file = arguments.html and check_output("--html", arguments.html, force=arguments.force, suffixes=(".html", ".htm"))
    if arguments.train:
        return _explain_training(arguments, gpu)
    try:
        plan = _plan(arguments, gpu)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print(plan.to_json())
        return 0
    if file:
        with writing("--html", file):
            write_text(file, planned.page(plan, gpu).html())
        console.note(f"explain: {printable(file)}")
        return 0
    title = f"{plan.model}@{plan.img_size}, batch {plan.batch_size}, {plan.precision} on {gpu.title}"
    if arguments.model_time:
        _print_times(f"{title}: an estimate, microseconds", plan)
        print()
        print(_meaning_of_times())
        for mode in MODES:
            print(f"estimated, {mode}: {plan.estimated_us(mode):.1f} us")
        return 0
    _print_launches(f"{title}: the launches of one forward", plan)
    print()
    _print_blocks("per part of the network", plan)
    print()
    print(_meaning(plan, gpu))
    print(f"launches: {plan.totals.launches}")
    return 0


def _other(arguments: argparse.Namespace) -> str:
    return "--train" if arguments.train else "--json"


def _plan(arguments: argparse.Namespace, gpu: Gpu) -> Plan:
    source = model_source(arguments.model, "MODEL")
    options = {
        "gpu": gpu,
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "allow_tf32": not arguments.no_tf32,
    }
    if source.is_own:
        return plan_model(arguments.model, img_size=arguments.img_size, **options)
    with building("MODEL"):
        channels, height, width = input_size_of_source(source)
        if arguments.img_size is not None:
            height = width = arguments.img_size
        network, report = fused_on_meta(source, (channels, height, width), PRECISIONS[arguments.precision])
    console.note(
        f"explain: {arguments.model} as optimize_ leaves it on this machine's CPU: {report.fused} of "
        f"{len(report.blocks)} blocks fused; all else is PyTorch's"
    )
    return plan_network(network, (channels, height, width), name=arguments.model, **options)


def _explain_training(arguments: argparse.Namespace, gpu: Gpu) -> int:
    """Print the launch plan of a training step."""
    if arguments.model_time or arguments.no_tf32:
        given = "--model-time" if arguments.model_time else "--no-tf32"
        raise UsageError(f"{given} is for the forward of a model in eval mode; allowed: without --train")
    try:
        plan = _plan_step(arguments, gpu)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print(plan.to_json())
        return 0
    title = f"{plan.model}@{plan.img_size}, batch {plan.batch_size}, {plan.precision} on {gpu.title}"
    _print_step(f"{title}: a training step, fused", plan)
    print()
    _compare_steps("fused beside plain PyTorch", plan)
    print()
    print(_meaning_of_step())
    return 0


def _plan_step(arguments: argparse.Namespace, gpu: Gpu) -> StepPlan:
    source = model_source(arguments.model, "MODEL")
    options = {"gpu": gpu, "batch_size": arguments.batch_size, "precision": arguments.precision}
    if source.is_own:
        return plan_step(arguments.model, img_size=arguments.img_size, recompute=arguments.recompute, **options)
    if arguments.recompute:
        raise UsageError(f"--recompute is for a model of effkernels.list_models(), and MODEL is {arguments.model}")
    with building("MODEL"):
        img_size = arguments.img_size or input_size_of_source(source)[-1]
        fused, plain, report = training_on_meta(source, PRECISIONS[arguments.precision])
    console.note(
        f'explain: {arguments.model} as optimize_(model, mode="training") leaves it: {report.fused} of '
        f"{len(report.blocks)} blocks fused; all else is PyTorch's"
    )
    return plan_step_of(fused, plain, name=arguments.model, img_size=img_size, **options)


_FEW_BYTES = 0.002  # of a step: such operators share a row


def _print_step(title: str, plan: StepPlan) -> None:
    step, rows = plan.fused, []
    for phase in dict.fromkeys(row.phase for row in step.rows):
        ours = [row for row in step.rows if row.phase == phase]
        shown = [row for row in ours if row.bytes >= _FEW_BYTES * step.bytes]
        others = [row for row in ours if row not in shown]
        for row in shown:
            rows.append([phase, row.op, *_step_amounts(row.launches, row.bytes, row.flops, row.floor_us)])
        sums = (sum(getattr(row, name) for row in others) for name in ("launches", "bytes", "flops", "floor_us"))
        rows.append([phase, "others", *_step_amounts(*sums)])
    rows.append(["sum", "", *_step_amounts(step.launches, step.bytes, step.flops, step.floor_us)])
    console.table(title, ["phase", "operator", "launches", "MB", "MFLOP", "floor us"], rows)


def _compare_steps(title: str, plan: StepPlan) -> None:
    rows = [
        [
            step.of,
            *_step_amounts(step.launches, step.bytes, step.flops, step.floor_us),
            f"{step.saved_bytes / 1e6:.1f}",
        ]
        for step in (plan.fused, plan.plain)
    ]
    shares = ["", f"{plan.share_of_bytes:.2f}", "", "", f"{plan.share_of_saved:.2f}"]
    rows.append(["share", *shares])
    console.table(title, ["step", "launches", "MB", "MFLOP", "floor us", "saved MB"], rows)


def _step_amounts(launches: int, moved: int, flops: int, floor_us: float) -> list[str]:
    return [str(launches), f"{moved / 1e6:.1f}", f"{flops / 1e6:.1f}", f"{floor_us:.1f}"]


def _meaning_of_step() -> str:
    text = (
        "An operator counts as one launch that reads each of its arguments once and writes each result once; this is "
        "counted, not measured. floor: the longer of what bytes and FLOPs take at the GPU's published rates. saved: "
        "tensors that the forward keeps for the backward, without parameters and buffers. Loss and optimizer are left "
        "out."
    )
    return textwrap.fill(text, WIDTH)


def _print_launches(title: str, plan: Plan) -> None:
    columns = ["layer", "kernel", "grid", "block", "shared B", "MB", "MFLOP", "special M", "floor us", "limit"]
    rows = []
    for launch in plan.launches:
        grid = "-" if launch.grid is None else str(launch.grid)
        if launch.cluster > 1:
            grid += f"/{launch.cluster}"
        if launch.cooperative:
            grid += "*"
        rows.append(
            [
                launch.layer,
                launch.kernel,
                grid,
                "-" if launch.block is None else "x".join(map(str, launch.block)),
                "-" if launch.shared_bytes is None else str(launch.shared_bytes),
                *_amounts(Totals.of([launch])),
                launch.limited_by,
            ]
        )
    rows.append(["sum", "", "", "", "", *_amounts(plan.totals), ""])
    console.table(title, columns, rows)


def _print_blocks(title: str, plan: Plan) -> None:
    rows = [[name, str(sums.launches), *_amounts(sums)] for name, sums in plan.by_block().items()]
    rows.append(["sum", str(plan.totals.launches), *_amounts(plan.totals)])
    console.table(title, ["part", "launches", "MB", "MFLOP", "special M", "floor us"], rows)


_SHORT = {"special": "spec", "tensor": "tens", "latency": "lat", "prologue": "pro"}


def _print_times(title: str, plan: Plan) -> None:
    columns = ["layer", "kernel", "grid", "blocks", "MB", *(_SHORT.get(term, term) for term in TERMS), "us"]
    rows = []
    for launch in plan.launches:
        time = launch.time
        terms = {term: _short(getattr(time, term)) for term in TERMS}
        terms[time.longest] += "*"
        threads = "-" if launch.block is None else f"{time.blocks}x{launch.block[0] * launch.block[1]}"
        rows.append(
            [
                launch.layer,
                launch.kernel,
                "-" if launch.grid is None else str(launch.grid),
                threads,
                _short(launch.bytes / 1e6),
                *terms.values(),
                _short(time.us),
            ]
        )
    sums = [_short(sum(getattr(launch.time, term) for launch in plan.launches)) for term in TERMS]
    whole = _short(sum(launch.time.us for launch in plan.launches))
    rows.append(["sum", "", "", "", _short(plan.totals.bytes / 1e6), *sums, whole])
    console.table(title, columns, rows, gap=" ")


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _meaning_of_times() -> str:
    lines = [
        "An estimate: computed from the launch plan and from instructions counted in the machine code for sm_90, not "
        f"measured. A launch takes its longest term of {', '.join(OVERLAPPING)} (marked *), then prologue, tail and "
        f"last. dram: bytes at {100 * COPY_SHARE:.0f} % of the published bandwidth; l2, l1: bytes on the way from "
        "there; issue: all instructions, 4 a clock; fma, alu, special, tensor: those of one unit; latency: what the "
        f"blocks wait for, a warp that issues every {CLOCKS_PER_INSTRUCTION:g} clocks at most; prologue: waits for "
        "parameters; tail: the last, partial wave of blocks; last: the block that arrives last forms the gate of "
        "squeeze-and-excitation. blocks: that a multiprocessor holds, by threads. PyTorch's own kernels: bytes and "
        f"FLOPs, at least {FOREIGN_US:g} us.",
        "The sums below add the gaps between launches: in a CUDA graph, in one with programmatic dependent launch, and "
        f"in eager mode, where the host takes {EAGER_US:g} us for a call. The constants, which of them are published "
        "and which assumed: effkernels/plan/time_estimate.py.",
    ]
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines)


def _amounts(sums: Totals) -> list[str]:
    """Megabytes, millions of FLOPs and of special-function operations, microseconds."""
    values = (sums.bytes / 1e6, sums.flops / 1e6, sums.special_functions / 1e6, sums.floor_us)
    return [f"{value:.{3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0}f}" for value in values]


def _meaning(plan: Plan, gpu: Gpu) -> str:
    tensor = f"{gpu.tensor / 1e12:g}"
    if plan.precision == "float32":
        tensor = f"{gpu.tf32 / 1e12:g} (TF32)" if plan.allow_tf32 else "no"
    lines = [
        "floor: computed, not measured. Each launch takes at least the longest of its bytes at "
        f"{gpu.bandwidth / 1e9:.0f} GB/s, its FLOPs at {tensor} TFLOP/s in tensor cores or {gpu.float32 / 1e12:g} "
        f"outside of them, and its special functions at {gpu.special_functions / 1e12:.2f} T/s. These rates are "
        "published ones and never quite reached; the time to start launches is extra; and data that is still in the "
        f"L2 cache ({gpu.l2 / 2**20:.0f} MiB) can arrive sooner than its floor says.",
        "MB: every argument, parameter and result once, scratch memory written and read. grid: blocks, /N in clusters "
        "of N, * all resident at once. aten:: are PyTorch's own kernels, one launch each; their grids are not known "
        "here.",
    ]
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines)

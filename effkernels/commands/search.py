"""``effkernels search``: the coefficients of compound scaling, or a baseline to scale, found by training candidates."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effkernels import console
from effkernels.cam.figure import figure_formats
from effkernels.commands.common import UsageError, add_json, check_output, device_of, positive
from effkernels.optimize import optimize_
from effkernels.plan import gpus
from effkernels.plan.launches import PRECISIONS
from effkernels.scaling import digits
from effkernels.scaling.baseline_search import DIGITS_SPACE, WEIGHT, BaselineResult, search_baseline
from effkernels.scaling.catalog import FORMS, find_network
from effkernels.scaling.coefficient_search import SAMPLERS, search
from effkernels.scaling.files import network_to_dict, save_network
from effkernels.scaling.latency import Latency, MeasuredLatency, PlannedLatency
from effkernels.scaling.network import DEPTH_ROUNDINGS, Network, Rounding, StagedNetwork
from effkernels.scaling.results import SearchResult
from effkernels.scaling.workers import BACKENDS

TEXT = "Search for the coefficients of compound scaling, or for a baseline to scale. Without flags: on digits, minutes."
_WHAT = ("coefficients", "baseline")
_DIGITS = "digits"
# On the digits a finer grid makes many networks that so few digits cannot rank.
_DIGITS_GRID, _DIGITS_TOLERANCE = 0.1, 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--what",
        choices=_WHAT,
        default=_WHAT[0],
        help="coefficients: alpha, beta, gamma of a network (step 1 of the method). baseline: a network, from a space "
        "of small MBConv networks. Default: %(default)s",
    )
    parser.add_argument("--network", metavar="NETWORK", help=f"{_DIGITS} (default), {FORMS}".replace("%", "%%"))
    parser.add_argument("--data", choices=(_DIGITS,), help="train on scikit-learn's digits; the default")
    parser.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="your own: called with a candidate, returns its accuracy. none: nothing is trained, candidates are listed",
    )
    parser.add_argument("--num-classes", type=positive, metavar="N", help="of the candidates (digits 10, else 1000)")
    parser.add_argument("--in-chans", type=positive, metavar="N", help="of the images (digits 1, else 3)")
    parser.add_argument("--seeds", type=positive, metavar="N", help="trainings on digits (coefficients 3, baseline 1)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="of each training on digits (default: 12)")
    _add_space(parser)
    _add_cost(parser)
    _add_running(parser)
    add_json(parser)


def _add_space(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is tried")
    group.add_argument(
        "--constraint",
        type=_constraint,
        default=2.0,
        metavar="X|latency",
        help="value of alpha * beta^2 * gamma^2, or latency: all candidates as large as --budget-ms allows "
        "(default: 2)",
    )
    group.add_argument(
        "--grid", type=float, metavar="STEP", help=f"of alpha, beta, gamma (digits {_DIGITS_GRID}, else 0.05)"
    )
    group.add_argument(
        "--tolerance", type=float, metavar="SHARE", help=f"of the constraint (digits {_DIGITS_TOLERANCE}, else 0.1)"
    )
    group.add_argument("--phi", type=float, default=1.0, help="candidates are alpha^phi deeper ... (default: 1)")
    group.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="default: %(default)s")
    group.add_argument("--trials", type=positive, metavar="N", help="networks (optuna 30, baseline 40)")
    group.add_argument("--seed", type=int, default=0, help="of the sampler (default: 0)")
    group.add_argument("--divisor", type=positive, metavar="N", help="of channels (digits 2, else 8)")
    group.add_argument("--round-depth", choices=DEPTH_ROUNDINGS, help="of layers (digits nearest, else up)")
    group.add_argument(
        "--round-resolution", type=positive, metavar="N", help="pixels are a multiple of it (default: 1)"
    )


def _add_cost(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("latency")
    names = ", ".join(gpu.name for gpu in gpus.GPUS)
    group.add_argument(
        "--latency",
        action="store_true",
        help="measure every candidate (for a baseline: make it the cost); implied by --constraint latency",
    )
    group.add_argument("--budget-ms", type=float, metavar="MS", help="of one forward, for --constraint latency")
    group.add_argument(
        "--device", metavar="NAME", help=f"cpu, cuda or cuda:N: measured here; {names}: planned, a lower bound"
    )
    group.add_argument("--batch-size", type=positive, default=1, metavar="N", help="default: %(default)s")
    group.add_argument("--precision", choices=tuple(PRECISIONS), help="default: float32 on a CPU, else bfloat16")
    group.add_argument(
        "--target", type=float, metavar="T", help="of a baseline: multiply-adds or ms (default: the first network's)"
    )
    group.add_argument("--weight", type=float, default=WEIGHT, help="w of a baseline's reward (default: %(default)s)")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the search runs, and its output files")
    group.add_argument("--workers", type=positive, metavar="N", help="candidates at a time (default: one per core)")
    group.add_argument("--threads", type=positive, metavar="N", help="of PyTorch in each (default: cores per worker)")
    group.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="default: %(default)s")
    group.add_argument(
        "--journal", type=Path, metavar="FILE", help="finished evaluations; the same command continues after them"
    )
    group.add_argument("--retry-failed", action="store_true", help="evaluate again what failed according to --journal")
    group.add_argument("--save", type=Path, metavar="FILE.json", help="the best network; `effkernels scale` reads it")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="accuracy over cost, the best marked")
    group.add_argument("--force", action="store_true", help="overwrite --save and --plot")


def _constraint(text: str) -> float | str:
    if text == "latency":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor latency") from error


def run(arguments: argparse.Namespace) -> int:
    """Search, and print the ranking."""
    _check_outputs(arguments)
    try:
        result = _search(arguments)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print(json.dumps(_report(result), indent=1))
    else:
        result.table().show("text")
    problems = [problem for problem in (_plot(result, arguments.plot), _save(result, arguments.save)) if problem]
    for problem in problems:  # after the result, which took the time
        console.note(f"search: {problem}")
    return 0 if result.best is not None and not problems else 1


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it."""
    if arguments.save is not None:
        check_output("--save", arguments.save, force=arguments.force, suffixes=(".json",))
    if arguments.plot is not None:
        try:
            formats = [f".{one}" for one in figure_formats()]
        except ImportError as error:
            raise UsageError(f"--plot: {error}") from error
        check_output("--plot", arguments.plot, force=arguments.force, suffixes=formats)


def _search(arguments: argparse.Namespace) -> SearchResult | BaselineResult:
    evaluate, on_digits = _evaluate(arguments)
    if evaluate is None and arguments.what == "baseline":
        raise UsageError("--evaluate none: a baseline is found by its accuracy; allowed: MODULE:FUNCTION")
    classes = arguments.num_classes or (digits.CLASSES if on_digits else 1000)
    channels = arguments.in_chans or (digits.CHANNELS if on_digits else 3)
    cores = len(os.sched_getaffinity(0))
    workers = arguments.workers or cores
    running: dict[str, Any] = {
        "num_classes": classes,
        "in_chans": channels,
        "seed": arguments.seed,
        "workers": workers,
        "threads": arguments.threads or max(1, cores // workers),
        "backend": arguments.backend,
        "journal": arguments.journal,
        "retry_failed": arguments.retry_failed,
        "report": console.note,
    }
    if arguments.what == "baseline":
        assert evaluate is not None
        return search_baseline(
            evaluate,
            space=DIGITS_SPACE,
            trials=arguments.trials or 40,
            target=arguments.target,
            weight=arguments.weight,
            latency=_latency(arguments, classes, channels, None) if arguments.latency else None,
            **running,
        )
    network = _network(arguments.network)
    wants_latency = arguments.latency or arguments.constraint == "latency"
    small = on_digits or network is digits.DIGITS_NETWORK
    return search(
        network,
        evaluate,
        constraint=arguments.constraint,
        tolerance=_given(arguments.tolerance, _DIGITS_TOLERANCE if small else 0.1),
        grid=_given(arguments.grid, _DIGITS_GRID if small else 0.05),
        sampler=arguments.sampler,
        trials=arguments.trials or 30,
        phi=arguments.phi,
        rounding=_rounding(arguments, digits.DIGITS_ROUNDING if small else Rounding()),
        latency=_latency(arguments, classes, channels, network) if wants_latency else None,
        budget_ms=arguments.budget_ms,
        **running,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _evaluate(arguments: argparse.Namespace) -> tuple[Callable[..., Any] | None, bool]:
    """Return the evaluation, and whether it is that of the digits."""
    if arguments.evaluate is not None and arguments.data is not None:
        raise UsageError("--evaluate and --data: allowed: one of them")
    if arguments.evaluate is None:
        seeds = arguments.seeds or (1 if arguments.what == "baseline" else 3)
        epochs = {} if arguments.epochs is None else {"epochs": arguments.epochs}
        return digits.DigitsEvaluation(seeds=seeds, **epochs), True
    if arguments.seeds or arguments.epochs:
        raise UsageError("--seeds and --epochs are only for the digits, not for your own --evaluate")
    if arguments.evaluate == "none":
        return None, False
    module, _, name = arguments.evaluate.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for good: the workers look there too
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--evaluate {arguments.evaluate}: {error}; allowed: MODULE:FUNCTION or none") from error
    if not callable(function):
        raise UsageError(f"--evaluate {arguments.evaluate} is a {type(function).__name__}; allowed: a function")
    return function, False


def _network(name: str | None) -> Network:
    if name is None or name == _DIGITS:
        return digits.DIGITS_NETWORK
    return find_network(name)


def _rounding(arguments: argparse.Namespace, default: Rounding) -> Rounding:
    return Rounding(
        divisor=arguments.divisor or default.divisor,
        depth=arguments.round_depth or default.depth,
        resolution=arguments.round_resolution or default.resolution,
    )


def _latency(arguments: argparse.Namespace, classes: int, channels: int, network: Network | None) -> Latency:
    own = network is None or isinstance(network, StagedNetwork)
    common: dict[str, Any] = {
        "batch_size": arguments.batch_size,
        "num_classes": classes,
        "in_chans": channels,
        "prepare": None if own else optimize_,  # another library's network gets its fused kernels here
    }
    if arguments.device in [gpu.name for gpu in gpus.GPUS]:
        return PlannedLatency(arguments.device, precision=arguments.precision or "bfloat16", **common)
    device = device_of(arguments.device)
    default = "float32" if device.type == "cpu" else "bfloat16"
    return MeasuredLatency(str(device), precision=arguments.precision or default, **common)


def _plot(result: SearchResult | BaselineResult, path: Path | None) -> str | None:
    """Draw the result. Return None, or why it is not drawn."""
    if path is not None:
        try:
            result.plot(path)
        except (OSError, ValueError) as error:
            return f"--plot {path}: {getattr(error, 'strerror', None) or error}"
    return None


def _save(result: SearchResult | BaselineResult, path: Path | None) -> str | None:
    """Write the best network. Return None, or why it is not written."""
    if path is None:
        return None
    if result.best is None:
        return f"--save {path}: no candidate was evaluated"
    network = result.best.network
    if not isinstance(network, StagedNetwork):
        return f"--save {path}: {network.name} is another library's network, which a file cannot hold"
    try:
        save_network(network, path)
    except (OSError, ValueError) as error:
        return f"--save {path}: {getattr(error, 'strerror', None) or error}"
    return None


def _report(result: SearchResult | BaselineResult) -> dict[str, Any]:
    report = result.to_dict()
    if result.best is not None and isinstance(result.best.network, StagedNetwork):
        try:
            report["best_network"] = network_to_dict(result.best.network)
        except ValueError:  # built by a function of the user's own
            report["best_network"] = None
    return report

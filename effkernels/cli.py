"""The command line: ``effkernels info | check | bench | predict``. Flags have timm's names where timm has them.

Results go to standard output, progress and warnings to standard error. Exit status: 0 all well, 1 something failed
(a check, a contender, an image), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import effkernels
from effkernels import _library, backends, console, environment

DEFAULT_MODEL = "efficientnet_b0"
DEFAULT_CONTENDERS = ("effkernels", "eager", "eager-channels-last", "compile")


class UsageError(Exception):
    """Arguments that argparse accepts and the command cannot work with; reported in one line, exit status 2."""


# ------------------------------------------------------------------------------------------------------------ info


def _cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use in this process."""
    return str(torch.ops.effkernels.cpu_isa("")) if _library.is_loaded() else None


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": environment.cpu_model(),
            "threads": torch.get_num_threads(),
            "features": environment.cpu_features(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "kernel_isa": _cpu_isa(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _decisions(device: str) -> list[dict[str, Any]]:
    """For every operator and backend whether it runs on a device, in float32, and why not."""
    asked = {"cuda": backends.can_run_cuda, "triton": backends.can_run_triton, "cpu": backends.can_run_cpu}
    return [
        {"device": device, "op": op, "backend": name, "ok": decision.ok, "reason": decision.reason}
        for op in backends.OPERATORS
        for name, can_run in asked.items()
        for decision in [can_run(op, device=device, dtype=torch.float32)]
    ]


def info(arguments: argparse.Namespace) -> int:
    """Print what is installed and what can run here."""
    devices = _devices()
    report = {
        "version": effkernels.__version__,
        "commit": environment.commit()[0],
        "library": {
            "loaded": _library.is_loaded(),
            "error": _library.load_error(),
            "build": _library.build_info(),
        },
        "versions": environment.versions("timm", "torchvision", "onnxruntime", "openvino"),
        "devices": devices,
        "backend": backends.selected(),
        "operators": [decision for device in devices for decision in _decisions(device["device"])],
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"effkernels {report['version']}, {environment.python_version()}")
    print("library    " + ("loaded" if _library.is_loaded() else f"not loaded: {_library.load_error()}"))
    for key, value in _library.build_info().items():
        print(f"  {key:<12} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    print("versions")
    for package, version in environment.versions("timm", "torchvision", "onnxruntime", "openvino").items():
        print(f"  {package:<12} {version or 'none'}")
    for device in devices:
        print(f"device {device['device']}")
        for key, value in device.items():
            if key != "device":
                print(f"  {key:<16} {', '.join(value) if isinstance(value, list) else value}")
    print(f"backend    {backends.selected()} (float32; `reference` runs everything)")
    for device in devices:
        _print_decisions(device["device"], _decisions(device["device"]))
    return 0


def _print_decisions(device: str, decisions: Sequence[dict[str, Any]]) -> None:
    """One line per backend where the answer is the same for all operators, else one line per operator."""
    for name in dict.fromkeys(decision["backend"] for decision in decisions):
        mine = [decision for decision in decisions if decision["backend"] == name]
        running = [decision["op"] for decision in mine if decision["ok"]]
        print(f"  on {device}, {name:<6} runs {', '.join(running) if running else 'nothing'}")
        reasons = dict.fromkeys(
            # The reason of an operator often contains its name; the same sentence is wanted once.
            decision["reason"].replace(decision["op"], "this operator")
            for decision in mine
            if not decision["ok"]
        )
        for reason in reasons:
            print(f"      not the others: {reason}" if running else f"      {reason}")


# ----------------------------------------------------------------------------------------------------------- check


def check(arguments: argparse.Namespace) -> int:
    """Hold every operator and EfficientNet-B0 against float64 on every backend that runs here."""
    from effkernels.check import run_checks

    findings = []
    for finding in run_checks(_device(arguments.device)):
        findings.append(finding)
        if not arguments.json:
            print(finding.line(), flush=True)
    checked = [finding for finding in findings if finding.ok is not None]
    failed = [finding for finding in checked if not finding.ok]
    if arguments.json:
        report = {"ok": bool(checked) and not failed, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        print(f"{len(checked) - len(failed)} of {len(checked)} passed")
    if not checked:
        console.note(f"check: nothing to check but the reference itself: {_library.load_error() or 'no kernel runs'}")
    return 0 if checked and not failed else 1


# --------------------------------------------------------------------------------------------------------- predict


def predict(arguments: argparse.Namespace) -> int:
    """Classify photographs."""
    try:
        import numpy  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise UsageError(f"predict needs {error.name}: pip install 'effkernels[models]'") from error
    from effkernels.contenders import Case
    from effkernels.predict import Failure, Prediction, Preprocessing, classify, find_images, read_labels

    _known_models([arguments.model])
    device = _device(arguments.device)
    circumstances = Case(arguments.model, 1, 1, arguments.precision, str(device))
    labels = None
    if arguments.labels:
        try:
            labels = read_labels(Path(arguments.labels))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--labels {arguments.labels}: {error}") from error
    model = _model_with_weights(arguments.model, arguments.weights, arguments.num_classes)
    if labels is not None and len(labels) != model.num_classes:
        raise UsageError(f"--labels {arguments.labels}: {len(labels)} lines for a model of {model.num_classes} classes")
    model = model.eval().to(device, circumstances.dtype)

    files, failures = find_images(arguments.image)
    predictions: list[Prediction] = []
    with console.progress("predict", len(files)) as advance:
        for result in classify(
            model,
            files,
            preprocessing=Preprocessing.of(model.config, arguments.img_size),
            topk=arguments.topk,
            labels=labels,
            batch_size=arguments.batch_size,
            amp_dtype=circumstances.autocast_dtype,
        ):
            if isinstance(result, Failure):
                failures.append(result)
            else:
                predictions.append(result)
            advance(result.file)
    if arguments.format == "json":
        report = {
            "model": arguments.model,
            "weights": arguments.weights,
            "predictions": [asdict(prediction) for prediction in predictions],
            "failures": [asdict(failure) for failure in failures],
        }
        print(json.dumps(report, indent=2))
    elif predictions:
        rows = [
            [prediction.file if rank == 0 else "", score.label, f"{score.probability:.4f}"]
            for prediction in predictions
            for rank, score in enumerate(prediction.scores)
        ]
        console.table(f"{arguments.model}: {len(predictions)} images", ["image", "class", "probability"], rows)
    for failure in failures:
        console.note(f"predict: {failure.file}: {failure.reason}")
    return 1 if failures else 0


def _model_with_weights(name: str, weights: str | None, num_classes: int) -> Any:
    from effkernels.models import CheckpointError

    if weights is None:
        console.note(
            f"WARNING: no --weights given: the weights of {name} are RANDOM and its predictions mean nothing. Give a "
            "checkpoint of timm, torchvision or lukemelas: --weights FILE"
        )
        torch.manual_seed(0)
        return effkernels.create_model(name, num_classes=num_classes)
    try:
        return effkernels.create_model(name, num_classes=num_classes, checkpoint_path=weights)
    except (CheckpointError, OSError) as error:
        raise UsageError(f"--weights {weights}: {error}") from error


# ----------------------------------------------------------------------------------------------------------- bench


def bench(arguments: argparse.Namespace) -> int:
    """Time networks against each other."""
    from effkernels import benchmark
    from effkernels.contenders import CONTENDERS, Case
    from effkernels.model_benchmark import Options, case_name, run_case, steps
    from effkernels.models import model_config

    device = _device(arguments.device)
    if arguments.list_contenders:
        _print_contenders(str(device), arguments.model[0])
        return 0
    _known_models(arguments.model)
    contenders = _known_contenders(arguments.contender, CONTENDERS, device)
    threads = arguments.threads or torch.get_num_threads()
    options = Options(arguments.warmup, arguments.rounds, memory=not arguments.no_memory)
    cases = [
        Case(
            model,
            arguments.img_size or model_config(model).input_size[-1],
            batch,
            arguments.precision,
            str(device),
            threads,
            arguments.channels_last,
        )
        for model in arguments.model
        for batch in arguments.batch_size
    ]
    date = benchmark.run_date()
    rows, refusals = [], []
    with console.progress("bench", len(cases) * steps(contenders, options)) as advance:
        for case in cases:
            new_rows, new_refusals = run_case(case, contenders, options, date=date, advance=advance)
            if arguments.results_file:
                # After each case, so that a run that is broken off keeps what it measured.
                benchmark.append_rows(Path(arguments.results_file), new_rows)
            rows.append((case, new_rows))
            refusals += new_refusals
    if arguments.json:
        report = {
            "rows": [asdict(row) for _, measured in rows for row in measured],
            "refusals": [asdict(refusal) for refusal in refusals],
        }
        print(json.dumps(report, indent=2))
    else:
        for case, measured in rows:
            if measured:
                title = f"{case_name(case)}, batch {case.batch}, {case.dtype_name}, {measured[0].device}"
                console.table(title, *_result_table(measured))
    for refusal in refusals:
        console.note(f"bench: {refusal.case}: {refusal.contender}: {refusal.reason}")
    if arguments.results_file:
        console.note(f"bench: rows appended to {arguments.results_file}")
    asked = set(arguments.contender or ())
    incomplete = any(refusal.contender in asked for refusal in refusals)
    return 1 if incomplete or not any(measured for _, measured in rows) else 0


def _result_table(rows: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells; the last column is the time relative to the first row's."""
    first = rows[0]
    columns = [
        "contender", "median ms", "p95 ms", "p99 ms", "images/s", "peak MB", "rel. error", f"x {first.contender}",
    ]  # fmt: skip
    cells = [
        [
            row.contender,
            f"{row.median_us / 1e3:.2f}",
            f"{row.p95_us / 1e3:.2f}",
            f"{row.p99_us / 1e3:.2f}",
            f"{row.images_per_s:.1f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
            f"{row.rel_error:.1e}",
            f"{row.median_us / first.median_us:.2f}",
        ]
        for row in rows
    ]
    return columns, cells


def _print_contenders(device: str, model: str) -> None:
    from effkernels.contenders import CONTENDERS, Case

    case = Case(model, 224, 1, device=device)
    cells = [
        [contender.name, contender.description, contender.unavailable(case) or "yes"]
        for contender in CONTENDERS.values()
    ]
    console.table(f"contenders for {model} on {device}", ["name", "what", "available"], cells)


def _known_contenders(names: Sequence[str] | None, known: dict[str, Any], device: torch.device) -> list[str]:
    if names is None:
        return list(DEFAULT_CONTENDERS)
    if "all" in names:
        return [name for name, contender in known.items() if device.type in contender.devices]
    for name in names:
        if name not in known:
            raise UsageError(f"--contender {name}: not known; allowed: all, {', '.join(known)}")
    return list(dict.fromkeys(names))


# ------------------------------------------------------------------------------------------------------- arguments


def _device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one and the CPU otherwise."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; allowed: cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: allowed: cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UsageError(f"--device {name}: torch {torch.__version__} is {built} and finds no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return device


def _known_models(names: Sequence[str]) -> None:
    from effkernels.models import model_config

    for name in names:
        try:
            model_config(name)
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    from effkernels.contenders import PRECISIONS

    parser = argparse.ArgumentParser(prog="effkernels", description="Fused MBConv operators and EfficientNet.")
    parser.add_argument("--version", action="version", version=f"effkernels {effkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    one = command("info", info, "Show version, build, devices, and which backend can run which operator.")
    one.add_argument("--json", action="store_true", help="print JSON")

    one = command("check", check, "Check every operator and EfficientNet-B0 against float64 on this machine.")
    one.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    one.add_argument("--json", action="store_true", help="print JSON")

    one = command("predict", predict, "Classify photographs.")
    one.add_argument("image", nargs="+", metavar="IMAGE", help="a file, a folder (searched in depth) or a glob pattern")
    one.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="default: %(default)s")
    one.add_argument("--weights", metavar="FILE", help="checkpoint (.pth, .safetensors) of timm, torchvision, lukemelas")
    one.add_argument("--num-classes", type=_positive, default=1000, metavar="N", help="default: %(default)s")
    one.add_argument("--labels", metavar="FILE", help="text file with one class label per line")
    one.add_argument("--topk", type=_positive, default=5, metavar="K", help="default: %(default)s")
    one.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="default: %(default)s")
    one.add_argument("--img-size", type=_positive, metavar="PIXELS", help="default: the model's own")
    one.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    one.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    one.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    one.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")

    one = command("bench", bench, "Time networks against each other, in turns in one process.")
    one.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME", help=f"default: {DEFAULT_MODEL}")
    one.add_argument("--batch-size", type=_positive, nargs="+", default=[1], metavar="N", help="default: 1")
    one.add_argument("--img-size", type=_positive, metavar="PIXELS", help="default: each model's own")
    one.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    one.add_argument(
        "--channels-last",
        action="store_true",
        help="channels_last input for contenders that name no layout (effkernels, timm, torchvision)",
    )
    one.add_argument(
        "--contender", nargs="+", metavar="NAME", help=f"or 'all'; default: {' '.join(DEFAULT_CONTENDERS)}"
    )
    one.add_argument("--list-contenders", action="store_true", help="list contenders and whether they can run, and stop")
    one.add_argument("--results-file", metavar="FILE", help="append the rows to this file, one JSON object per line")
    one.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    one.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: PyTorch's own number)")
    one.add_argument("--warmup", type=_positive, default=3, metavar="N", help="calls of each first; default: %(default)s")
    one.add_argument("--rounds", type=_positive, default=20, metavar="N", help="turns of each; default: %(default)s")
    one.add_argument("--no-memory", action="store_true", help="do not measure peak memory (a process per contender)")
    one.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is returned, wrong arguments exit with 2 as argparse does."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except UsageError as error:
        parser.exit(2, f"effkernels {parsed.command}: {error}\n")
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130

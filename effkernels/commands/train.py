"""``effkernels train``: a classifier from a folder of images, or from scikit-learn's digits."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effkernels import console
from effkernels.bench.precision import Precision
from effkernels.commands.common import UsageError, add_device, add_json, device_of, positive, reading
from effkernels.files import printable
from effkernels.train.checkpoint import FILE_NAME, read_training
from effkernels.train.data import load_data
from effkernels.train.optimizers import DEFAULTS
from effkernels.train.options import AUGMENTATIONS, DIGITS, OPTIMIZERS, PRECISIONS, OptionError, TrainOptions
from effkernels.train.processes import Processes
from effkernels.train.training import FILES, LABELS, LOG, PLOT, WEIGHTS, Result, Training, TrainingError

TEXT = "Train a classifier."

# What may differ from the start of a training when it goes on: where things are, and not what is computed.
_CHANGEABLE = ("data", "workers", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command. Those without a value are absent, so that --resume knows which were given."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "--data", metavar="FOLDER", help=f"folders train and val of class folders, or class folders; or {DIGITS}"
    )
    parser.add_argument("--output", metavar="FOLDER", help="for checkpoint, log, plot, weights, labels")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the training in this folder, as it was begun")
    parser.add_argument("--force", action="store_true", help="overwrite a training in --output")
    add_json(parser)
    _add_network(parser.add_argument_group("network"))
    _add_recipe(parser.add_argument_group("recipe"))
    _add_images(parser.add_argument_group("images"))
    _add_running(parser.add_argument_group("how it runs"))


def _add_network(group: Any) -> None:
    group.add_argument("--model", metavar="NAME", help="NAME or NAME.TAG; default: efficientnet_b0")
    group.add_argument("--weights", metavar="FILE", help="start from a checkpoint (.pth, .safetensors)")
    group.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    group.add_argument("--num-classes", type=positive, metavar="N", help="default: those of the data")
    group.add_argument("--drop", type=float, metavar="P", help="dropout (default: the paper's for the model)")
    group.add_argument("--drop-path", type=float, metavar="P", help="stochastic depth (default: 0)")


def _add_recipe(group: Any) -> None:
    lrs = ", ".join(f"{name} {default.lr:g}" for name, default in DEFAULTS.items())
    decays = ", ".join(f"{name} {default.weight_decay:g}" for name, default in DEFAULTS.items())
    group.add_argument("--epochs", type=positive, metavar="N", help="default: 30")
    group.add_argument("--batch-size", type=positive, metavar="N", help="of each process (default: 64)")
    group.add_argument("--opt", choices=OPTIMIZERS, help="default: adamw")
    group.add_argument("--lr", type=float, metavar="RATE", help=f"the highest (default: {lrs})")
    group.add_argument("--weight-decay", type=float, metavar="W", help=f"default: {decays}")
    group.add_argument("--momentum", type=float, metavar="M", help="of sgd and rmsprop (default: 0.9)")
    group.add_argument("--warmup-epochs", type=float, metavar="N", help="before the cosine (default: at most 1)")
    group.add_argument("--min-lr", type=float, metavar="RATE", help="at the end of the cosine (default: 0)")
    group.add_argument("--smoothing", type=float, metavar="S", help="of the labels (default: 0.1)")
    group.add_argument("--clip-grad", type=float, metavar="NORM", help="largest norm of the gradient")
    group.add_argument("--model-ema-decay", type=float, metavar="D", help="keep a moving average of the weights")
    group.add_argument("--seed", type=int, metavar="N", help="default: 0")


def _add_images(group: Any) -> None:
    group.add_argument("--img-size", type=positive, metavar="PIXELS", help="default: the model's own; digits 32")
    group.add_argument("--val-split", type=float, metavar="SHARE", help="held out without a folder val (default: 0.2)")
    group.add_argument("--augment", choices=AUGMENTATIONS, help="default: basic (crops and mirroring)")
    group.add_argument("--scale", type=float, metavar="SHARE", help="least share of a crop (default: 0.08; digits 0.7)")
    group.add_argument("--hflip", type=float, metavar="P", help="probability of mirroring (default: 0.5; digits 0)")
    group.add_argument(
        "--workers", type=int, metavar="N", help="that load images (default: cores, at most 8; digits 0)"
    )


def _add_running(group: Any) -> None:
    add_device(group)
    group.add_argument("--precision", choices=PRECISIONS, help="default: float32")
    group.add_argument("--sync-bn", action="store_true", help="statistics of norms over all processes")
    group.add_argument("--checkpoint-steps", type=int, metavar="N", help="also a checkpoint every N steps of an epoch")


def run(arguments: argparse.Namespace) -> int:
    """Train, and print what came of it."""
    try:
        import numpy  # noqa: F401
        import PIL  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise UsageError(f"train needs {error.name}: pip install 'effkernels[train]'") from error
    given = dict(vars(arguments))
    as_json, force = given.pop("json", False), given.pop("force", False)
    folder = given.pop("resume", None)
    given.pop("command", None)
    try:
        options, state = _begun(given, force) if folder is None else _resumed(folder, given)
        return _train(options, state, as_json)
    except OptionError as error:
        flag = f"--{error.option.replace('_', '-')}"
        value = "" if error.value is True else f" {printable(error.value)}"
        raise UsageError(f"{flag}{value}: {error.reason}") from error


def _begun(given: dict[str, Any], force: bool) -> tuple[TrainOptions, None]:
    for name in ("data", "output"):
        if name not in given:
            raise UsageError(f"--{name} is needed; or --resume FOLDER to go on with a training")
    options = TrainOptions(**given)
    output = Path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {printable(output)}: {error.strerror}") from error
    there = [name for name in FILES if (output / name).exists()]
    if there and not force and _is_first():
        raise UsageError(
            f"--output {printable(output)}: {', '.join(there)} exist; --force overwrites, --resume goes on"
        )
    if not os.access(output, os.W_OK | os.X_OK):
        raise UsageError(f"--output {printable(output)}: the folder cannot be written to")
    return options, None


def _resumed(folder: str, given: dict[str, Any]) -> tuple[TrainOptions, dict[str, Any]]:
    fixed = [name for name in given if name not in _CHANGEABLE]
    if fixed:
        flag = f"--{fixed[0].replace('_', '-')}"
        allowed = ", ".join(f"--{name}" for name in _CHANGEABLE)
        raise UsageError(f"{flag} {printable(given[fixed[0]])}: a training goes on as it was begun; allowed: {allowed}")
    try:
        state = read_training(Path(folder) / FILE_NAME)
        return replace(TrainOptions.from_dict(state["options"]), output=folder, **given), state
    except OptionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--resume {printable(folder)}: {reason}") from error


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _device(options: TrainOptions, processes: Processes) -> torch.device:
    device = device_of(options.device)
    if processes.count == 1 or device.type == "cpu":
        return device
    if options.device not in (None, "cuda"):
        raise UsageError(f"--device {options.device}: allowed with torchrun: cpu, cuda; each process has its own GPU")
    return device_of(f"cuda:{processes.local_rank}")


def _train(options: TrainOptions, state: dict[str, Any] | None, as_json: bool) -> int:
    try:
        processes = Processes.of_environment()
    except ValueError as error:
        raise UsageError(str(error)) from error
    device = _device(options, processes)
    with processes.joined(device):
        with reading("--data", options.data):
            data = load_data(options)
        flag, source = ("--weights", options.weights) if options.weights else ("--pretrained", options.model)
        try:
            with reading(flag, source):
                training = Training(
                    options,
                    data,
                    processes=processes,
                    device=device,
                    autocast=Precision.of(options.precision, device.type).autocast,
                    say=lambda message: console.note(f"train: {message}"),
                    state=state,
                )
        except OptionError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if state is None:
                raise
            raise UsageError(f"--resume {printable(options.output)}: {error}") from error  # it does not fit
        total = training.remaining_steps
        progress = console.progress("train", total) if processes.is_first else nullcontext(lambda step: None)
        try:
            with progress as advance:
                result = training.run(advance)
        except KeyboardInterrupt:
            _explain_stop(options, processes, "stopped")
            return 130
        except (TrainingError, torch.OutOfMemoryError) as error:
            _explain_stop(options, processes, str(error))
            return 1
    if not processes.is_first:
        return 0
    _print_result(options, result, as_json)
    for problem in result.problems:
        console.note(f"train: not written: {problem}")
    return 1 if result.problems else 0


def _explain_stop(options: TrainOptions, processes: Processes, reason: str) -> None:
    if not processes.is_first:
        return
    console.note(f"train: {reason}")
    output = Path(options.output)
    try:
        state = read_training(output / FILE_NAME)
    except (OSError, ValueError):
        console.note("train: no checkpoint was written yet")
        return
    step = f" and {state['step']} steps" if state["step"] else ""
    torchrun = f"torchrun --nproc-per-node {processes.count} -m " if processes.count > 1 else ""
    command = f"{torchrun}effkernels train --resume {shlex.quote(str(output))}"
    console.note(f"train: the last checkpoint has {state['epoch']} epochs{step}; this goes on from there: {command}")


def _print_result(options: TrainOptions, result: Result, as_json: bool) -> None:
    output = Path(options.output)
    command = (
        f"effkernels predict IMAGE --model {options.model} --weights {shlex.quote(str(output / WEIGHTS))} "
        f"--labels {shlex.quote(str(output / LABELS))} --img-size {result.img_size}"
    )
    if as_json:
        files = {"weights": WEIGHTS, "labels": LABELS, "log": LOG, "plot": PLOT, "checkpoint": FILE_NAME}
        there = {name: str(output / file) for name, file in files.items() if (output / file).exists()}
        report = {
            "model": options.model,
            "data": options.data,
            "epochs": result.epochs,
            "accuracy": result.accuracy,
            "loss": result.loss,
            "skipped": result.skipped,
            "img_size": result.img_size,
            "files": there,
            "problems": list(result.problems),
            "predict": command,
        }
        print(json.dumps(report, indent=2))
        return
    console.say(f"{options.model}: accuracy {result.accuracy:.4f}, loss {result.loss:.4f} after {result.epochs} epochs")
    if result.skipped:
        console.say(f"{result.skipped} images could not be read and were skipped")
    console.say(command)

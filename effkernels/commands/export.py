"""``effkernels export``: a network as a file that runs elsewhere."""

from __future__ import annotations

import argparse
import json

import torch
from torch import nn

from effkernels import console
from effkernels.bench.precision import Precision
from effkernels.commands.common import (
    DEFAULT_MODEL,
    MODEL_HELP,
    UsageError,
    add_json,
    building,
    device_of,
    model_source,
    positive,
    reading,
)
from effkernels.export import FORMATS, Exported, ExportError, export_model
from effkernels.models.sources import ModelSource, unwrapped
from effkernels.optimize import optimize_

TEXT = "Export a network to a file that runs without this package, and check that it computes the same."
PRECISIONS = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    holds = "; ".join(f"{name}: {kind.holds}" for name, kind in FORMATS.items())
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help=MODEL_HELP)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint",
        "--weights",
        metavar="FILE",
        help=".pth or .safetensors of timm, torchvision, lukemelas, Hugging Face or NVIDIA",
    )
    weights.add_argument("--pretrained", action="store_true", help="the weights that the model's library publishes")
    parser.add_argument("--format", required=True, choices=FORMATS, help=holds)
    parser.add_argument("--output", required=True, metavar="FILE", help="ends in .pt2, .onnx or .safetensors")
    parser.add_argument(
        "--batch-size", type=_size, default=(1, 64), metavar="N|MIN:MAX", help="images in a call (default: 1:64)"
    )
    parser.add_argument(
        "--image-size",
        "--img-size",
        type=_image_size,
        metavar="N|MIN:MAX|dynamic",
        help="pixels of either side; height and width are free of each other in a range (default: the model's own)",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="that will run it: cpu or cuda (default: cpu)")
    parser.add_argument("--opset", type=positive, metavar="N", help="version of the ONNX operators (default: 20)")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export a network."""
    source = model_source(arguments.model)
    device = device_of(arguments.device)
    model = _model(source, arguments)
    # What is not ours calls the fused operators only after optimize_; an ONNX file has none of them.
    if not source.is_own and not FORMATS[arguments.format].on_reference:
        report = optimize_(unwrapped(model))
        console.note(f"export: optimize_ fused {report.fused} of {len(report.blocks)} blocks of {arguments.model}")
    try:
        exported = export_model(
            model,
            arguments.output,
            arguments.format,
            batch_size=arguments.batch_size,
            image_size=arguments.image_size,
            dtype=Precision.of(arguments.precision, device.type).dtype,
            device=device,
            opset=arguments.opset,
            overwrite=arguments.force,
        )
    except ExportError as error:
        console.note(f"export: {error}")
        return 1
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        weights = {"checkpoint": arguments.checkpoint, "pretrained": arguments.pretrained}
        print(json.dumps({"model": arguments.model, **weights, **exported.to_dict()}, indent=2))
    else:
        _print(arguments.model, exported)
    return 0


def _model(source: ModelSource, arguments: argparse.Namespace) -> nn.Module:
    if arguments.checkpoint is not None:
        with reading("--checkpoint", arguments.checkpoint):
            return source.build(checkpoint=arguments.checkpoint)
    if arguments.pretrained:
        with building("--pretrained"):
            return source.build(pretrained=True)
    if source.library != "file":  # a function of a file decides on its weights
        console.note(
            f"WARNING: no --checkpoint given: the weights of {arguments.model} are RANDOM and the file is only "
            "good for a trial"
        )
    torch.manual_seed(0)
    with building():
        return source.build()


def _print(model: str, exported: Exported) -> None:
    console.say(f"{exported.file}: {model} as {exported.format}, {exported.bytes / 1e6:.1f} MB")
    print(f"  needs beside it  {exported.library or 'nothing'}")
    print(f"  input            ({exported.input_shape.replace(',', ', ')}) {exported.dtype}")
    print(f"  checked at       {', '.join('x'.join(map(str, shape)) for shape in exported.checked)}")
    print(f"  error            {exported.error:.1e}, limit {exported.limit:.1e}")


def _size(text: str) -> int | tuple[int, int]:
    """Parse a number, or two with a colon between them; export_model checks whether they are allowed."""
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range such as 1:64")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _image_size(text: str) -> int | tuple[int, int] | str:
    return text if text == "dynamic" else _size(text)

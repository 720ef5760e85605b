"""``effkernels convert``: a checkpoint from one library's names to another's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from effkernels import console
from effkernels.commands.common import UsageError, add_json, check_output, reading, writing
from effkernels.files import replacing
from effkernels.models import CheckpointError, read_checkpoint
from effkernels.models.conversion import LIBRARIES, Conversion, convert
from effkernels.models.conversion_check import Verification, VerificationError, verify
from effkernels.models.recipes import PAD_TITLES

TEXT = "Convert a checkpoint of EfficientNet from one library to another, and print how to build its model."
SUFFIXES = (".pth", ".pt", ".safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    names = ", ".join(LIBRARIES)
    parser.add_argument("file", metavar="FILE", help="checkpoint (.pth, .safetensors); nothing in it is run")
    parser.add_argument("--to", required=True, choices=LIBRARIES, metavar="LIBRARY", help=names)
    parser.add_argument(
        "--from", dest="source", choices=LIBRARIES, metavar="LIBRARY", help="default: recognised by the keys"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="OUT",
        help="a .pth or .pt file, or a .safetensors file, which also holds the semantics in its metadata",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="such as tf_efficientnet_b0; needed for timm's weights, whose keys do not show how they were trained "
        "(default: the variant is recognised by the shapes)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the logits of the two libraries' models on random images first; nothing is written and the exit "
        "status is 1 if they differ at the native size, or elsewhere without a known reason",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert a checkpoint."""
    output = Path(arguments.output)
    write = _writer(output, arguments.force)
    with reading("FILE", arguments.file):
        checkpoint = read_checkpoint(arguments.file)
    if arguments.source not in (None, checkpoint.layout.name):
        raise UsageError(
            f"--from {arguments.source}: the keys in {arguments.file} are those of {checkpoint.layout.name}"
        )
    try:
        conversion = convert(checkpoint.tensors, arguments.source, arguments.to, variant=arguments.model)
    except CheckpointError as error:
        raise UsageError(f"{arguments.file}: {error}") from error
    except ValueError as error:
        raise UsageError(f"--model {arguments.model}: {error}") from error
    verification = None
    if arguments.verify:
        try:
            verification = verify(checkpoint.tensors, conversion)
        except ValueError as error:
            raise UsageError(f"--verify: {error}") from error
        except VerificationError as error:
            console.note(f"convert: {output} is not written: {error}")
            return 1
    passed = verification is None or verification.passed
    if passed:
        with writing("--output", output):
            write(conversion)
    report = _report(arguments.file, output if passed else None, conversion, verification)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, conversion, verification)
    for warning in conversion.semantics.warnings:
        console.note(f"convert: {warning}")
    if not passed:
        console.note(f"convert: {output} is not written: the logits differ")
    return 0 if passed else 1


def _writer(output: Path, force: bool) -> Callable[[Conversion], None]:
    """Return the function that writes the file, after every check that can be made before the work."""
    check_output("--output", output, force=force, suffixes=SUFFIXES)
    if output.suffix.lower() == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise UsageError(f"--output {output}: {error.name} is needed: pip install 'effkernels[models]'") from error

    def write(conversion: Conversion) -> None:
        # Own memory for every tensor: views would drag the storage they look into along.
        tensors = {
            key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in conversion.tensors.items()
        }
        with replacing(output) as part:
            try:
                if output.suffix.lower() == ".safetensors":
                    metadata = {"format": "pt", "effkernels": json.dumps(_semantics(conversion))}
                    save_file(tensors, part, metadata)
                else:
                    torch.save(tensors, part)
            except Exception as error:  # PyTorch and safetensors have types of their own for a full disk
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise OSError(getattr(error, "strerror", None) or f"it could not be written: {reason}") from error

    return write


def _semantics(conversion: Conversion) -> dict[str, Any]:
    return {
        "source": conversion.source.name,
        "target": conversion.target.name,
        "in_chans": conversion.in_chans,
        "num_classes": conversion.num_classes,
        **asdict(conversion.semantics),
    }


def _report(
    file: str, output: Path | None, conversion: Conversion, verification: Verification | None
) -> dict[str, Any]:
    return {
        "file": file,
        "output": None if output is None else str(output),
        "tensors": len(conversion.tensors),
        **_semantics(conversion),
        "verification": None if verification is None else {**asdict(verification), "passed": verification.passed},
    }


def _print(report: dict[str, Any], conversion: Conversion, verification: Verification | None) -> None:
    semantics = conversion.semantics
    rows = [
        ["source", conversion.source.name],
        ["target", conversion.target.name],
        ["variant", str(semantics.variant)],
        ["native size", f"{semantics.native_size}x{semantics.native_size}"],
        ["image channels", str(conversion.in_chans)],
        ["classes", str(conversion.num_classes or "no classifier")],
        ["padding", "not known" if semantics.pad_type is None else PAD_TITLES[semantics.pad_type]],
        ["eps of the norms", _number(semantics.bn_eps)],
        ["momentum of the norms", _number(semantics.bn_momentum)],
    ]
    written = f"{report['tensors']} tensors in {report['output']}" if report["output"] else "nothing written"
    console.table(f"{report['file']}: {written}", ["the weights", ""], rows)
    if verification is not None:
        print()
        verdicts = [
            [
                f"{one.size}x{one.size}",
                f"{one.error:.1e}",
                f"{one.limit:.1e}",
                "same logits" if one.same else "other logits" if one.expected else "other logits, see the warning",
            ]
            for one in verification.comparisons
        ]
        title = f"{verification.target} against {verification.source}"
        console.table(title, ["images", "error", "limit", "verdict"], verdicts)
    if semantics.build is not None:
        print(f"\nbuild the model by\n\n{_indented(semantics.build)}")


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:g}"


def _indented(code: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in code.splitlines())

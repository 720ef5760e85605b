"""``effkernels check``: parity on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from effkernels import _library, console
from effkernels.bench.check import run_checks
from effkernels.commands.common import add_device, add_json, device_of
from effkernels.ops.parity import full_float32

TEXT = "Check every operator and EfficientNet-B0 against float64 on this machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_device(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Hold every operator and EfficientNet-B0 against float64 on every backend that runs here."""
    full_float32()
    findings = []
    for finding in run_checks(device_of(arguments.device)):
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

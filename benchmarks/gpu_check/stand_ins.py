"""Stand-ins for the tools of the CUDA toolkit in a dry run: they print what the tools print, and check nothing."""

from __future__ import annotations

import sys
from pathlib import Path

# A program with the command line of nvcc: what it "compiles" can be started and does nothing.
_NVCC = """
import pathlib
target = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
target.write_text("#!/bin/sh\\n")
target.chmod(0o755)
"""

# It finds the planted mistake, and runs everything else.
_SANITIZER = """
import subprocess
tool, command = sys.argv[2], sys.argv[3:]
if command[-1] == tool:
    print("========= ERROR SUMMARY: 1 error")
    sys.exit(0)
status = subprocess.run(command).returncode
print("========= COMPUTE-SANITIZER\\n========= ERROR SUMMARY: 0 errors")
sys.exit(status)
"""

# It runs the program and reports one kernel.
_NCU = """
import subprocess
status = subprocess.run(sys.argv[sys.argv.index(sys.executable):]).returncode
print("==PROF== Connected to process 1")
print('"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"')
print('"","","us","register/thread"')
print('"0","void effkernels::stand_in<float>(effkernels::Params)","1.0","32"')
sys.exit(status)
"""

_TOOLS = {"nvcc": _NVCC, "compute-sanitizer": _SANITIZER, "ncu": _NCU}


def stand_in(name: str, folder: Path) -> Path:
    """Return a program in ``folder`` that replaces a tool."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"stand-in-{name}"
    program.write_text(f"#!{sys.executable}\nimport sys\n{_TOOLS[name]}", encoding="utf-8")
    program.chmod(0o755)
    return program

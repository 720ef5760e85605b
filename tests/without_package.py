"""Python processes that cannot import effkernels, as where an exported network runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process in which `import effkernels` fails, and a package checks its inputs; uses `folder`."""
    stub = folder / "without_effkernels"
    stub.mkdir(exist_ok=True)
    (stub / "effkernels.py").write_text("raise ImportError('this process is to run without effkernels')\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EFFKERNELS"))}
    return {**kept, "PYTHONPATH": str(stub), "AOTI_RUNTIME_CHECK_INPUTS": "1", "OMP_NUM_THREADS": "1"}


def run_python(code: str, folder: Path) -> str:
    """Standard output of Python code that runs in `folder`; its error output is in the failure's message."""
    proof = "import importlib.util, sys\nassert 'effkernels.py' in importlib.util.find_spec('effkernels').origin\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", proof + code],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

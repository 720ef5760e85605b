"""Write effkernels/plan/kernel_counts.json and the tables of docs/kernels.md from the built library; report
which claims do not hold."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.kernel_economy import table
from benchmarks.kernel_economy.counts import count_kernels
from benchmarks.kernel_economy.reading import ToolMissing, read_kernels
from benchmarks.kernel_economy.rules import broken_claims
from effkernels import _library
from effkernels.plan import kernel_counts


def main() -> int:
    """Write the tables; with --check only compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_economy", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page is out of date")
    check = parser.parse_args().check
    if not _library.build_info().get("cuda"):
        print(f"no CUDA kernels in the library: {_library.load_error() or 'built without nvcc'}", file=sys.stderr)
        return 2
    try:
        kernels = read_kernels(_library.LIBRARY_FILE)
        counts = kernel_counts.to_json(count_kernels(kernels))
        counts_before = kernel_counts.FILE.read_text(encoding="utf-8") if kernel_counts.FILE.exists() else ""
        if not check:
            kernel_counts.FILE.write_text(counts, encoding="utf-8")  # the page's estimates read it
        with tempfile.TemporaryDirectory() as folder:
            text = table.section(kernels, Path(folder))
    except ToolMissing as missing:
        print(missing, file=sys.stderr)
        return 2
    broken = broken_claims(kernels)
    for line in broken:
        print(line, file=sys.stderr)
    before = table.PAGE.read_text(encoding="utf-8")
    after = table.SECTION.replaced(before, text)
    if check:
        stale = [
            name
            for name, old, new in (
                ("docs/kernels.md", before, after),
                ("effkernels/plan/kernel_counts.json", counts_before, counts),
            )
            if old != new
        ]
        for name in stale:
            print(f"{name} is out of date: make kernels-table", file=sys.stderr)
        return 1 if broken or stale else 0
    table.PAGE.write_text(after, encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

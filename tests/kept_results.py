"""What a slow reading of unchanged sources gave, kept beside the finished builds (csrc/build_cache.py).

The compiled code of the kernels is the same as long as its sources and tools are. Without ``EFFKERNELS_BUILD_CACHE``
nothing is kept.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

import build_cache  # noqa: E402

_FILE = "result.pickle"


def python_sources(*folders: str) -> list[Path]:
    """Return this file and every Python, CUDA and C++ source below folders, or the files themselves."""
    found = [Path(__file__)]
    for name in folders:
        path = ROOT / name
        found += [path] if path.is_file() else sorted(one for one in path.rglob("*.*") if one.suffix in _SOURCES)
    return found


_SOURCES = (".py", ".cu", ".cuh", ".h", ".cpp", ".inc", ".json")


def kept(kind: str, files: Iterable[Path], facts: Mapping[str, str], make: Callable[[], Any]) -> Any:
    """Return what `make` returns, from the cache where it was made of the same files, tools and facts.

    Args:
        kind: of the result; results of one kind displace each other.
        files: all that `make` reads, its own code among it.
        facts: versions and options, by name.
        make: returns what pickle can store.
    """
    name = build_cache.key(files, facts)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if build_cache.restore(kind, name, [_FILE], folder):
            return pickle.loads(zlib.decompress((folder / _FILE).read_bytes()))
        result = make()
        (folder / _FILE).write_bytes(zlib.compress(pickle.dumps(result), 1))
        build_cache.keep(kind, name, [_FILE], folder)
        return result

"""The rules of the house that a reader relies on: which file may include, import or contain what."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "effkernels"
KERNEL_FILES = [file for room in ("cpu", "cuda") for file in sorted((ROOT / "csrc" / room).iterdir())]

# The table of docs/architecture.md from its bottom to its top: a module may import its own layer and every lower one.
# What is not listed is the command line, which may import everything.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"cam", "train"}),
    frozenset({"scaling"}),
    frozenset({"report"}),
    frozenset({"bench"}),
    # `import effkernels`, and the names for users of files further down.
    frozenset({"__init__", "peers", "predict"}),
    frozenset({"engine"}),
    frozenset({"export", "optimize"}),
    frozenset({"plan"}),
    frozenset({"models"}),
    frozenset({"nn"}),
    frozenset({"ops"}),
    frozenset({"triton"}),
    frozenset({"_library", "_norm", "_recorded_tensor", "console", "environment", "files"}),
    frozenset({"_version"}),
)


def layer_of(room: str) -> int:
    return next((index for index, rooms in enumerate(LAYERS) if room in rooms), -1)


def imported_rooms(file: Path) -> set[str]:
    """Return the parts of the package that a file imports anywhere in it, `ops` for effkernels.ops.depthwise."""
    known = {path.stem for path in PACKAGE.iterdir()}
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names if name.split(".")[0] == "effkernels"]
        rooms |= {part[1] if part[1:] and part[1] in known else "__init__" for part in parts}
    return rooms


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downward(file: Path) -> None:
    own = layer_of(file.relative_to(PACKAGE).with_suffix("").parts[0])
    assert [room for room in sorted(imported_rooms(file)) if layer_of(room) < own] == []


def imports() -> set[tuple[str, str]]:
    """Return which room imports which other one, as pairs."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        found |= {(own, room) for room in imported_rooms(file) if room != own}
    return found


def reachable(arrows: set[tuple[str, str]], room: str) -> set[str]:
    found: set[str] = set()
    ahead = {room}
    while ahead:
        ahead = {to for at, to in arrows if at in ahead} - found
        found |= ahead
    return found


def test_no_room_imports_itself_through_others() -> None:
    arrows = imports()
    assert [room for room in sorted({at for at, _ in arrows}) if room in reachable(arrows, room)] == []


@pytest.mark.parametrize("file", [ROOT / "csrc/params.h", *KERNEL_FILES], ids=lambda file: file.name)
def test_kernels_never_include_torch(file: Path) -> None:
    assert re.findall(r'#include\s*[<"](?:torch|ATen|c10)/', file.read_text()) == []


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda file: file.name)
def test_inline_ptx_is_in_one_file(file: Path) -> None:
    if file.name != "ptx.cuh":
        assert re.findall(r"\basm\b\s*(?:volatile)?\s*\(", file.read_text()) == []


def test_every_native_source_is_built() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in {".cpp", ".cu"}]
    assert [str(file.relative_to(ROOT)) for file in sources if str(file.relative_to(ROOT)) not in listed] == []


def test_the_architecture_page_names_every_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = [path.name for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name != "__pycache__"]
    rooms += [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert [room for room in rooms if f"{room}/" not in text] == []


if __name__ == "__main__":
    found = imports()
    rooms = sorted({room for arrow in found for room in arrow}, key=lambda room: len(reachable(found, room)))
    circles = [room for room in rooms if room in reachable(found, room)]
    for room in rooms:
        print(f"{room:17} -> {', '.join(sorted(to for at, to in found if at == room))}")
    print(f"{len(rooms)} rooms, {len(found)} arrows, in circles: {', '.join(circles) or 'none'}")

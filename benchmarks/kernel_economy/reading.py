"""Reads registers, memory and instructions of every kernel from nvcc's output, by cuobjdump and nvdisasm.

Both are part of the CUDA toolkit, or from PyPI as nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
# As CMakeLists.txt compiles the kernels.
NVCC_FLAGS = ("-O3", "-std=c++17", "-Wno-deprecated-gpu-targets", "-I", str(ROOT / "csrc"))

_TYPES = {"__nv_bfloat16": "bfloat16", "__half": "float16", "float": "float32"}
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class ToolMissing(Exception):
    """A program that is needed to read kernels is not on this machine."""


def find_tool(name: str) -> Path:
    """Return a program of the CUDA toolkit: on PATH, under /usr/local/cuda, or in this Python's nvidia packages.

    Raises:
        ToolMissing: it is in none of these places; the message says how to get it.
    """
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders.append(Path("/usr/local/cuda/bin"))
    nvidia = importlib.util.find_spec("nvidia")
    for package in (nvidia.submodule_search_locations or ()) if nvidia else ():
        folders += sorted(Path(package).glob("*/bin"), reverse=True)
    found = shutil.which(name) or next((str(f / name) for f in folders if os.access(f / name, os.X_OK)), None)
    if found is None:
        advice = "install the CUDA toolkit" if name == "nvcc" else f"pip install nvidia-cuda-{name}"
        raise ToolMissing(f"{name} is not on this machine; {advice}")
    return Path(found)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: as in the source, with template arguments: "depthwise_strips<bfloat16, 3, 1, 7>".
        arch: the architecture of its machine code, 90 for sm_90.
        registers: of a thread.
        stack, local: bytes of a thread in local memory.
        shared: static shared memory of a block in bytes, with what the system reserves (1024 from sm_90 on).
        max_threads, min_blocks: of its __launch_bounds__, 0 where they are not given.
        instructions: how often each instruction stands in the code, by opcode with modifiers ("LDG.E.128.CONSTANT").
        listing: the instructions of the disassembly, of the kernels whose loops are counted; "" of the others.
    """

    name: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    max_threads: int
    min_blocks: int
    instructions: Counter[str]
    listing: str = field(default="", repr=False, kw_only=True)

    @property
    def family(self) -> str:
        """The name without template arguments."""
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The template arguments, those of a traits struct among them in its place."""
        return tuple(re.findall(r"-?\w+", self.name.partition("<")[2]))

    @property
    def element_bytes(self) -> int:
        """The bytes of an element of the images: of the first type among the template arguments, else 4."""
        return next((_ELEMENT_BYTES[name] for name in self.arguments if name in _ELEMENT_BYTES), 4)

    def count(self, opcode: str, *modifiers: str) -> int:
        """Instructions with this opcode and all of these modifiers."""
        wanted = {opcode, *modifiers}
        return sum(
            times
            for name, times in self.instructions.items()
            if name.split(".")[0] == opcode and wanted <= set(name.split("."))
        )

    def accesses(self, opcode: str) -> Counter[int]:
        """Global-memory instructions of an opcode (LDG, STG, LDGSTS) by width in bytes."""
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        found: Counter[int] = Counter()
        for name, times in self.instructions.items():
            first, *modifiers = name.split(".")
            if first == opcode:
                found[next((widths[m] for m in modifiers if m in widths), 4)] += times
        return found

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory: spilled registers, and arrays that registers could not hold."""
        return self.count("LDL") + self.count("STL")

    @property
    def special_functions(self) -> Counter[str]:
        """Special-function instructions by kind (TANH, EX2, RCP, RSQ ...)."""
        found: Counter[str] = Counter()
        for name, times in self.instructions.items():
            opcode, *modifiers = name.split(".")
            if opcode == "MUFU":
                found[modifiers[0]] += times
        return found

    def resident_blocks(self, threads: int, shared_bytes: int = 0) -> int:
        """Blocks of ``threads`` threads that fit a multiprocessor at once, by registers, threads and shared memory.

        Args:
            shared_bytes: dynamic shared memory of a block.
        """
        shared, most_threads, most_blocks = _MULTIPROCESSORS.get(self.arch, _MULTIPROCESSORS[80])
        warps = -(-threads // 32)
        by_registers = 65536 // 256 // -(-self.registers * 32 // 256) // warps if self.registers else most_blocks
        by_shared = shared // max(1, self.shared + shared_bytes + (1024 if self.arch < 90 else 0))
        return min(by_registers, by_shared, most_threads // (32 * warps), most_blocks)


# Shared memory in bytes, threads and blocks of one multiprocessor (CUDA C++ Programming Guide, compute capabilities).
_MULTIPROCESSORS = {80: (167936, 2048, 32), 86: (102400, 1536, 16), 89: (102400, 1536, 24), 90: (233472, 2048, 32)}


def short_name(demangled: str) -> str:
    """A kernel's name as a reader says it: no namespaces, no parameters, the arguments of traits structs in place.

    "void effkernels::cuda::depthwise<effkernels::cuda::Traits<__half, 3, 1> >(float*)" gives
    "depthwise<float16, 3, 1>".
    """
    name = demangled.removeprefix("void ").replace("(anonymous namespace)::", "")
    depth = 0
    for position, character in enumerate(name):  # up to the parameter list: the first bracket outside of < >
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:position]
            break
    name = re.sub(r"\([\w:]+\)(-?\d+)", r"\1", name)  # (bool)1, (effkernels::DType)2
    head, bracket, inside = re.sub(r"\b(?:\w+::)+", "", name).partition("<")
    if not bracket:
        return head
    words = re.findall(r"-?\w+", re.sub(r"\w+<", "", inside))
    return f"{head}<{', '.join(_TYPES.get(word, word) for word in words)}>"


def _output(command: Sequence[str | Path], text: str | None = None) -> str:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{find_tool('nvdisasm').parent}"}
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _sections(listing: str) -> Iterator[tuple[int, str]]:
    """(architecture, text) of each embedded binary of a cuobjdump listing."""
    parts = re.split(r"^Fatbin (?:elf|ptx) code:\n", listing, flags=re.MULTILINE)
    for part in parts[1:] or parts:
        match = re.search(r"^arch = sm_(\d+)", part, flags=re.MULTILINE) or re.search(r"sm_(\d+)", part)
        if match:
            yield int(match[1]), part


# What the mangled name of a kernel whose loops are not counted contains.
_WITHOUT_LISTING = ("depthwise_any",)


# A line of the disassembly that cuobjdump or nvdisasm prints: address, predicate, opcode with modifiers, operands.
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", flags=re.MULTILINE)


def opcodes(code: str) -> Counter[str]:
    """Return how often each opcode is in a disassembly, by its name with modifiers; NOPs are left out."""
    return Counter(opcode for _, _, opcode, _ in INSTRUCTION.findall(code) if opcode != "NOP")


def _instructions(listing: str) -> dict[tuple[int, str], tuple[Counter[str], str]]:
    """By (architecture, mangled name): how often each opcode is in the disassembly, and the disassembly."""
    found = {}
    for arch, text in _sections(listing):
        for function in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
            name, _, code = function.partition("\n")
            kept = ""
            if not any(word in name for word in _WITHOUT_LISTING):
                kept = "\n".join(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s.*?;", code, flags=re.MULTILINE))
            found[arch, name.strip()] = opcodes(code), kept
    return found


def _launch_bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """By mangled name: threads and blocks of __launch_bounds__, from the PTX."""
    found = {}
    for entry in re.split(r"\.entry ", ptx)[1:]:
        name = re.match(r"[\w$]+", entry)
        head = entry[: entry.index("{")]
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+), (\d+))?", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        count = 0
        if threads:
            count = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        assert name is not None
        found[name[0]] = (count, int(blocks[1]) if blocks else 0)
    return found


def _resources(listing: str) -> dict[tuple[int, str], dict[str, int]]:
    found = {}
    for arch, text in _sections(listing):
        for name, numbers in re.findall(r"Function ([\w$]+):\s*\n\s*(REG:.*)", text):
            found[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", numbers)}
    return found


def read_kernels(binary: Path) -> list[Kernel]:
    """Return every kernel in an object file, a library or a program that nvcc built, by name and architecture.

    Raises:
        ToolMissing: cuobjdump, nvdisasm or c++filt is not there.
    """
    cuobjdump = find_tool("cuobjdump")
    find_tool("nvdisasm")
    if shutil.which("c++filt") is None:
        raise ToolMissing("c++filt is not on this machine; install binutils")
    resources = _resources(_output([cuobjdump, "--dump-resource-usage", binary]))
    instructions = _instructions(_output([cuobjdump, "--dump-sass", binary]))
    bounds = _launch_bounds(_output([cuobjdump, "--dump-ptx", binary]))
    mangled = sorted({name for _, name in resources if (_, name) in instructions})
    demangled = dict(zip(mangled, _output(["c++filt"], "\n".join(mangled)).splitlines(), strict=True))
    kernels = []
    for (arch, name), numbers in resources.items():
        if (arch, name) not in instructions:
            continue
        threads, blocks = bounds.get(name, (0, 0))
        kernels.append(
            Kernel(
                short_name(demangled[name]),
                arch,
                numbers["REG"],
                numbers["STACK"],
                numbers["LOCAL"],
                numbers["SHARED"],
                threads,
                blocks,
                instructions[arch, name][0],
                listing=instructions[arch, name][1],
            )
        )
    return sorted(kernels, key=lambda kernel: (kernel.arch, natural_key(kernel.name)))


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts 5 before 16."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def compile_sources(sources: Iterable[Path], arch: int, folder: Path, workers: int = 2) -> list[Path]:
    """Object files of CUDA sources for one architecture, with its PTX beside it."""
    nvcc = find_tool("nvcc")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.sm_{arch}.o"
        code = f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]"
        _run_nvcc([nvcc, *NVCC_FLAGS, "-gencode", code, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(compile_one, sources))


def _run_nvcc(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-2000:]}")


def nvcc_version() -> str:
    """Return the release of nvcc, "13.0.88"."""
    match = re.search(r"V(\d+\.\d+\.\d+)", _output_of_nvcc())
    return match[1] if match else "unknown"


def _output_of_nvcc() -> str:
    return subprocess.run([str(find_tool("nvcc")), "--version"], capture_output=True, text=True, check=True).stdout

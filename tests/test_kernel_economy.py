"""The compiled code of the kernels: every claim of benchmarks/kernel_economy holds in the library that ships.

Read from machine code, so it needs nvcc's output and a disassembler, but no GPU. Covered: every architecture that the
library was built for, and the kernels of `COMPILED_HERE` for sm_80 too.
"""

from __future__ import annotations

import fcntl
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kept_results import kept, python_sources
from listings import STRIPS, listing

from benchmarks.kernel_economy import limits, reading, rules, table
from benchmarks.kernel_economy.counts import count_kernels, stem_parts
from benchmarks.kernel_economy.loops import Flow, PartMissing, instructions_of
from benchmarks.kernel_economy.pointwise import Tile, pointwise_parts, tiles
from benchmarks.kernel_economy.reading import Kernel, ToolMissing
from benchmarks.kernel_economy.rules import Claim, Rule
from effkernels import _library
from effkernels.plan import kernel_counts

TESTS = Path(__file__).parent


def need_tools(*names: str) -> None:
    try:
        for name in names:
            reading.find_tool(name)
    except ToolMissing as missing:
        pytest.skip(str(missing))


# One process compiles or reads the kernels; the others go on meanwhile.
pytestmark = pytest.mark.xdist_group("kernel-economy")


READERS = python_sources(
    "benchmarks/kernel_economy", "effkernels/plan/kernel_counts.py", "effkernels/plan/kernel_counts.json"
)


def _of_library(kind: str, folder: Path, files: Sequence[Path], make: Callable[[], Any]) -> Any:
    """Return what is read of the library that ships: by one process, and kept as long as library and reader are."""
    with open(folder / f"{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = folder / f"{kind}-{_library.LIBRARY_FILE.stat().st_mtime_ns}.pickle"
        if not known.exists():
            tools = {name: str(reading.find_tool(name)) for name in ("cuobjdump", "nvdisasm")}
            found = kept(kind, [_library.LIBRARY_FILE, *files], tools, make)
            known.write_bytes(pickle.dumps(found))
            return found
        return pickle.loads(known.read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all processes of a test run."""
    if not _library.build_info().get("cuda"):
        pytest.skip(f"the library holds no CUDA kernels: {_library.build_info().get('cuda_reason', 'it is not built')}")
    need_tools("cuobjdump", "nvdisasm")
    return tmp_path_factory.getbasetemp().parent


@pytest.fixture(scope="module")
def shipped(folder: Path) -> list[Kernel]:
    """The kernels of the library that ships; disassembling them takes 20 seconds."""
    kernels: list[Kernel] = _of_library("kernels", folder, READERS, lambda: reading.read_kernels(_library.LIBRARY_FILE))
    return kernels


@dataclass(frozen=True)
class Judged:
    """What is asked of all kernels: the claims that are broken, those that a kernel met, architectures, counts."""

    broken: list[str]
    met: set[str]
    archs: set[int]
    counts: str


@pytest.fixture(scope="module")
def judged(folder: Path, request: pytest.FixtureRequest) -> Judged:
    def judge() -> Judged:
        kernels: list[Kernel] = request.getfixturevalue("shipped")
        return Judged(
            rules.broken_claims(kernels),
            {claim.pattern for kernel in kernels if (claim := rules.claim_of(kernel))},
            {kernel.arch for kernel in kernels},
            kernel_counts.to_json(count_kernels(kernels)),
        )

    found: Judged = _of_library("claims", folder, [*READERS, Path(__file__)], judge)
    return found


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    """The kernels of kernel_economy_mutants.cu by name."""
    need_tools("nvcc", "cuobjdump", "nvdisasm")
    folder = tmp_path_factory.mktemp("mutants")
    (object_file,) = reading.compile_sources([TESTS / "kernel_economy_mutants.cu"], 90, folder)
    return {kernel.name: kernel for kernel in reading.read_kernels(object_file)}


class TestTheLibrary:
    def test_keeps_every_claim(self, judged: Judged) -> None:
        assert not judged.broken, "\n".join(judged.broken)

    def test_has_kernels_of_every_claim(self, judged: Judged) -> None:
        """A claim that nothing matches is a slip of its pattern."""
        assert [claim.pattern for claim in rules.CLAIMS if claim.pattern not in judged.met] == []

    def test_holds_machine_code_of_each_architecture(self, judged: Judged) -> None:
        built = {int(arch.removesuffix("-real")) for arch in _library.build_info()["cuda_archs"] if "real" in arch}
        assert judged.archs == built


class TestThePage:
    def test_tables_are_up_to_date(
        self, folder: Path, judged: Judged, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """docs/kernels.md says what the library holds; comparable only where the compiler is the same."""
        need_tools("nvcc")
        page = table.PAGE.read_text(encoding="utf-8")
        if 90 not in judged.archs:
            pytest.skip("the library was not built for sm_90, which the tables are of")
        if table.caption(reading.nvcc_version()) not in page:
            pytest.skip(f"the tables are of another compiler than nvcc {reading.nvcc_version()}")
        made_of = python_sources("benchmarks/kernel_economy", "effkernels", "csrc")
        section: str = _of_library(
            "tables", folder, made_of, lambda: table.section(request.getfixturevalue("shipped"), tmp_path)
        )
        assert page == table.SECTION.replaced(page, section), "run: make kernels-table"

    def test_a_page_without_markers_is_refused(self) -> None:
        with pytest.raises(ValueError, match="must be there once"):
            table.SECTION.replaced("# CUDA kernels", "text")


# sm_90 is what continuous integration builds and reads. Of sm_80 a release reads the kernels that networks spend their
# time in; the other types differ in the conversions only.
COMPILED_HERE = ("conv.cu", "depthwise_bfloat16.cu", "expand_depthwise_bfloat16.cu", "pointwise_bfloat16.cu")


@pytest.mark.slow
@pytest.mark.thorough
def test_claims_hold_for_sm_80(tmp_path: Path) -> None:
    need_tools("nvcc", "cuobjdump", "nvdisasm")
    binaries = reading.compile_sources([reading.SOURCES / name for name in COMPILED_HERE], 80, tmp_path)
    kernels = [kernel for binary in binaries for kernel in reading.read_kernels(binary)]
    assert {kernel.family for kernel in kernels} >= {"conv_stem", "depthwise_strips", "expand_depthwise", "pointwise"}
    assert rules.broken_claims(kernels) == []


class TestTheCounts:
    def test_file_is_what_the_disassembly_gives(self, judged: Judged) -> None:
        """effkernels/plan/kernel_counts.json, comparable only where the compiler is the same."""
        need_tools("nvcc")
        if 90 not in judged.archs:
            pytest.skip("the library was not built for sm_90, which the counts are of")
        if table.caption(reading.nvcc_version()) not in table.PAGE.read_text(encoding="utf-8"):
            pytest.skip(f"the counts are of another compiler than nvcc {reading.nvcc_version()}")
        assert kernel_counts.FILE.read_text(encoding="utf-8") == judged.counts, "run: make kernels-table"


class TestTheLoops:
    def test_blocks_end_at_branches_and_begin_where_they_lead(self) -> None:
        flow = Flow(instructions_of(listing(*STRIPS)))
        assert [block[0].address for block in flow.blocks] == [
            *(0x10, 0x20, 0x40, 0x60, 0x70, 0xB0, 0xC0, 0x100, 0x120, 0x140)
        ]
        by_address = {block[0].address: number for number, block in enumerate(flow.blocks)}
        assert {flow.blocks[to][0].address for to in flow.next[by_address[0xB0]]} == {0xC0, 0x100}
        assert flow.next[by_address[0x140]] == []
        assert {(flow.blocks[loop.first][0].address, len(loop.instructions)) for loop in flow.loops()} == {
            *{(0x40, 3), (0x70, 4), (0x20, 18)}
        }


def counted(*lines: str) -> Flow:
    return Flow(instructions_of(listing(*lines)))


class TestTheStem:
    # A block that reads norm, weights and one window, then tiles: put it, multiply, read the next one, norm,
    # activation, store. It goes back to 0x90 for more channels, and after 0x270 for the next tile.
    LISTING = (
        "@P0 BRA 0x40",  # 10: the loop over channels; a norm that is not there
        "MUFU.RSQ R4, R4",
        "FFMA R4, R4, R5, R6",
        "@P1 BRA 0x10",  # 40
        "LDG.E.U16 R4, [R2.64]",  # 50: the loop over weights
        "STS.U16 [R9], R4",
        "@P0 BRA 0x50",
        "LDG.E.128 R4, [R2.64]",  # 80: the first window
        "@P6 BRA 0x120",  # 90: the loop over tiles: more channels of the same one
        "@P1 BRA 0xe0",  # a0: channels_last skips the turn
        "PRMT R4, R4, 0x5410, R5",
        "PRMT R5, R4, 0x7632, R5",
        "PRMT R6, R4, 0x7632, R5",
        "STS.128 [R9], R4",  # e0
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "NOP",
        "NOP",
        "LDS R4, [R9]",  # 120
        "HMMA.16816.F32.BF16 R4, R4, R5, RZ",
        "@P2 BRA 0x190",  # 140: no other tile
        "@P3 BRA 0x180",
        "LDG.E.64 R4, [R2.64]",  # 160: narrow
        "BRA 0x190",
        "LDG.E.128 R4, [R2.64]",  # 180: wide
        "FFMA R4, R4, R5, R6",  # 190
        "BRX R8 -0x1a0",
        "FMUL R4, R4, R4",  # 1b0: not swish, longer
        "FMUL R4, R4, R4",
        "FMUL R4, R4, R4",
        "BRA 0x200",
        "MUFU.TANH R4, R4",  # 1f0
        "@P4 BRA 0x230",  # 200: channels that vectors do not divide
        "STG.E.128 [R2.64], R4",
        "BRA 0x240",
        "STG.E.U16 [R2.64], R4",  # 230
        "@P6 BRA 0x90",  # 240: more channels
        "IADD3 R1, R1, 0x1, RZ",
        "IADD3 R1, R1, 0x1, RZ",
        "@P5 BRA 0x90",  # 270
        "EXIT",
    )

    def test_each_part_of_the_work_is_counted(self) -> None:
        parts = stem_parts(counted(*self.LISTING))
        assert parts["prologue"].issued == 1, "the first window"
        assert (parts["norm"].issued, parts["norm"].special) == (4, 1), "not the way without a norm"
        assert parts["weights"].issued == 3
        tile = parts["tile"]
        assert tile.issued == 2 + 2 + 5 + 2 + 1 + 3 + 1 + 3, "channels_last, a window, and the step to the next tile"
        assert (tile.tensor, tile.special, tile.fma, tile.memory) == (1, 1, 1, 4)
        assert parts["tile.planes"].issued == tile.issued + 3
        assert parts["channels"].issued == 1 + 3 + 2 + 1 + 3 + 1, "no window, no next tile"

    def test_code_without_the_loop_is_an_error(self) -> None:
        with pytest.raises(PartMissing, match="no loop with a barrier and FFMA"):
            stem_parts(counted("FFMA R4, R4, R5, R6", "@P0 BRA 0x10", "EXIT"))


class TestThePointwiseKernel:
    # Two copies of x and one of the weights for a stage, two products a step.
    LISTING = (
        "MOV R0, 0x1",  # 10
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",  # 20: the loop over the first stages of the weights
        "@P0 BRA 0x20",
        "@P0 BRA 0x70",  # 40
        "LDG.E R4, [R2.64]",
        "MUFU.RSQ R4, R4",
        "@P0 BRA 0x90",  # 70: the loop over the first stages of x
        "VIMNMX R5, R5, R6, PT",  # the rows of the first tile
        *["LDGSTS.E.BYPASS.128 [R1], [R2.64]"] * 2,  # 90
        "@P0 BRA 0x70",
        "CS2R R24, SRZ",  # c0: the loop over tiles
        "BAR.SYNC.DEFER_BLOCKING 0x0",  # d0: the loop over steps
        "@P1 BRA 0x120",
        *["VIMNMX R5, R5, R6, PT"] * 2,  # f0: the rows of the next tile
        "IADD3 R7, R7, 0x1, RZ",
        *["LDGSTS.E.BYPASS.128 [R1], [R2.64]"] * 2,  # 120
        "@P2 BRA 0x160",
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",  # 150: weights that are not kept
        "LDSM.16.M88.4 R40, [R12]",  # 160
        *["HMMA.16816.F32.BF16 R24, R40, R14, R24"] * 2,
        "@P3 BRA 0xd0",
        "@P4 BRA 0x1d0",  # 1a0
        *["FMUL R4, R4, R4"] * 2,  # 1b0: a longer way to no result
        "FFMA R4, R4, R5, R6",  # 1d0
        "MUFU.TANH R4, R4",
        "STG.E.64 [R2.64], R4",
        "@P5 BRA 0xc0",
        "EXIT",
    )

    def test_each_part_of_the_work_is_counted(self) -> None:
        parts = pointwise_parts(counted(*self.LISTING))
        assert parts["prologue"].issued == 4, "with the norm, without the loops over stages"
        assert (parts["prologue"].special, parts["prologue"].trips) == (1, 1)
        assert parts["weights"].issued == 2
        assert parts["fill"].issued == 4, "the rows of a tile are part of the tile"
        step = parts["step"]
        assert step.issued == 2 + 2 + 1 + 1 + 2 + 1
        assert (step.tensor, step.memory, step.wavefronts) == (2, 3, 12)
        assert parts["step.weights"].issued == 1
        tile = parts["tile"]
        assert tile.issued == 1 + 3 + 1 + 4, "its beginning, the rows of the next one, its end"
        assert (tile.fma, tile.special, tile.memory) == (1, 1, 1)
        for name in ("tile.gate", "tile.residual"):
            assert parts[name].issued == 0

    def test_code_without_the_loops_is_an_error(self) -> None:
        with pytest.raises(PartMissing, match="no loop with a barrier, FFMA and LDGSTS"):
            pointwise_parts(counted("FFMA R4, R4, R5, R6", "@P0 BRA 0x10", "EXIT"))

    def test_tiles_are_those_of_the_source(self) -> None:
        assert len(tiles()) == 14
        assert {Tile(64, 144, 4, 1, 1), Tile(256, 16, 4, 1, 1)} <= {*tiles()}


class TestTheLimits:
    def test_more_instructions_than_allowed_break_the_claim(
        self, shipped: list[Kernel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        by_name = {kernel.name: kernel for kernel in shipped if kernel.arch == 90}
        if not by_name:
            pytest.skip("the library was not built for sm_90, which the limits are of")
        for name, units in (
            ("pointwise<bfloat16, 0, 7, 0, false>", ["block", "tile", "step"]),
            ("conv_stem<bfloat16>", ["value, x channels_last", "value, x contiguous", "block"]),
            ("depthwise_strips<bfloat16, 3, 1, 7>", ["value"]),
            ("depthwise_strips<bfloat16, 5, 2, 2>", ["value"]),
        ):
            assert rules.within_limits(by_name[name]) is None
            limited = [one for one in limits.issued_by(by_name[name]) if one.most is not None]
            assert [one.unit for one in limited] == units
            for one in limited:
                broken = limits.Issued(one.unit, one.counters, 0.9 * one.counters.issued).broken
                assert broken is not None
                assert f"for each {one.unit}; the claim" in broken
        monkeypatch.setattr(limits, "_STEM_BLOCK", 100)
        assert "instructions for each block" in (rules.within_limits(by_name["conv_stem<bfloat16>"]) or "")


GOOD = "good<bfloat16, 1>"
PRODUCT = "product<bfloat16>"


class TestTheRules:
    """Each rule passes a good kernel and finds the kernel that is bad in its way."""

    @pytest.mark.parametrize(
        ("rule", "good", "bad"),
        [
            (rules.in_registers, "hungry<bfloat16, 128>", "hungry<bfloat16, 1024>"),
            (rules.in_registers, GOOD, "local_array<bfloat16>"),
            (rules.wide_loads(1), GOOD, "scalar_loads<bfloat16>"),
            (rules.overlaps_safely, GOOD, "read_only_loads<bfloat16>"),
            (rules.overlaps_safely, GOOD, "does_not_wait<bfloat16>"),
            (rules.wide_stores, GOOD, "scalar_stores<bfloat16>"),
            (rules.some_wide_stores(1), GOOD, "scalar_stores<bfloat16>"),
            (rules.launch_bounds_kept, GOOD, "two_special_functions<bfloat16>"),
            (rules.resident_threads(1024), GOOD, "hungry<bfloat16, 128>"),
            (rules.one_tanh_per_element(rules.stored_elements), GOOD, "two_special_functions<bfloat16>"),
            (rules.adds_in_order, GOOD, "float_atomics<bfloat16>"),
            (rules.tensor_cores, PRODUCT, GOOD),
            (rules.copies_asynchronously, PRODUCT, GOOD),
            (rules.exact_products, "hungry<bfloat16, 128>", PRODUCT),
        ],
        ids=lambda value: getattr(value, "__qualname__", str(value)),
    )
    def test_find_their_mutant(self, mutants: dict[str, Kernel], rule: Rule, good: str, bad: str) -> None:
        assert rule(mutants[good]) is None
        assert rule(mutants[bad])

    def test_report_what_is_wrong_and_where(self, mutants: dict[str, Kernel]) -> None:
        claims = [Claim(r"scalar_\w+<.*>", "", (rules.wide_loads(1), rules.wide_stores))]
        kernels = [mutants["scalar_loads<bfloat16>"], mutants["scalar_stores<bfloat16>"]]
        first, second = rules.broken_claims(kernels, claims)
        assert first == "scalar_loads<bfloat16> (sm_90): 0 loads of 16 bytes; the claim is at least 1"
        assert second.startswith("scalar_stores<bfloat16> (sm_90): no store of 16 bytes")

    def test_a_kernel_without_a_claim_is_reported(self, mutants: dict[str, Kernel]) -> None:
        assert rules.broken_claims([mutants[GOOD]], []) == [f"{GOOD} (sm_90): no claim: add one to CLAIMS"]

    def test_local_memory_breaks_every_claim(self, mutants: dict[str, Kernel]) -> None:
        claim = Claim(".*", "", ())
        assert claim.broken(mutants["local_array<bfloat16>"])
        assert not claim.broken(mutants[GOOD])


def kernel(registers: int, arch: int = 90, **changes: object) -> Kernel:
    values = {"stack": 0, "local": 0, "shared": 1024 if arch >= 90 else 0, "max_threads": 128, "min_blocks": 1}
    return Kernel("k", arch, registers, **{**values, "instructions": Counter(), **changes})  # type: ignore[arg-type]


class TestReading:
    @pytest.mark.parametrize(
        ("demangled", "name"),
        [
            ("void effkernels::cuda::scale<float, 4>(effkernels::ScaleParams)", "scale<float32, 4>"),
            (
                "void effkernels::cuda::strips<effkernels::cuda::StripsTraits<__nv_bfloat16, 3, (bool)1> >(int)",
                "strips<bfloat16, 3, 1>",
            ),
            ("effkernels::cuda::(anonymous namespace)::fill(float*)", "fill"),
            ("void a::b<a::C<__half, -1>, (a::D)2>(a::E<float>)", "b<float16, -1, 2>"),
        ],
    )
    def test_short_names(self, demangled: str, name: str) -> None:
        assert reading.short_name(demangled) == name

    def test_access_widths(self) -> None:
        instructions = Counter(
            {"LDG.E.128.CONSTANT": 3, "LDG.E.64": 1, "LDG.E": 2, "LDG.E.U16": 5, "LDGSTS.E.BYPASS.LTC128B.128": 7}
        )
        assert kernel(32, instructions=instructions).accesses("LDG") == {16: 3, 8: 1, 4: 2, 2: 5}
        assert kernel(32, instructions=instructions).accesses("LDGSTS") == {16: 7}

    @pytest.mark.parametrize(
        ("registers", "threads", "shared", "arch", "blocks"),
        [
            (32, 128, 0, 90, 16),  # 2048 threads
            (33, 128, 0, 90, 12),  # registers come in steps of 8 a thread: 40
            (255, 128, 0, 90, 2),
            (64, 256, 0, 80, 4),
            (32, 32, 0, 80, 32),  # the most blocks
            (32, 128, 100 * 1024, 90, 2),  # shared memory
            (32, 128, 48 * 1024, 80, 3),
            (32, 128, 0, 89, 12),  # 1536 threads
        ],
    )
    def test_occupancy(self, registers: int, threads: int, shared: int, arch: int, blocks: int) -> None:
        """As the CUDA occupancy calculator has it."""
        assert kernel(registers, arch).resident_blocks(threads, shared) == blocks

    def test_a_missing_tool_is_named_with_the_way_to_get_it(self) -> None:
        with pytest.raises(ToolMissing, match=r"nvlens is not on this machine; pip install nvidia-cuda-nvlens"):
            reading.find_tool("nvlens")

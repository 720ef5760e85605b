"""The compiled code of the kernels: every claim of benchmarks/kernel_economy holds in the library that ships.

Read from machine code, so it needs nvcc's output and a disassembler, but no GPU. Covered: every architecture that the
library was built for, and the kernels of `COMPILED_HERE` for sm_80 too.
"""

from __future__ import annotations

import fcntl
import pickle
from collections import Counter
from pathlib import Path

import pytest
from listings import STRIPS, listing

from benchmarks.kernel_economy import reading, rules, table
from benchmarks.kernel_economy.conv_loops import issued_by_stem
from benchmarks.kernel_economy.counts import count_kernels
from benchmarks.kernel_economy.loops import Flow, instructions_of, issued_by_strips
from benchmarks.kernel_economy.pointwise_loops import Tile, issued_by_tiles, tiles
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


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """The kernels of the library that ships; disassembled once for all processes of a test run, it takes 20 seconds."""
    if not _library.build_info().get("cuda"):
        pytest.skip(f"the library holds no CUDA kernels: {_library.build_info().get('cuda_reason', 'it is not built')}")
    need_tools("cuobjdump", "nvdisasm")
    folder = tmp_path_factory.getbasetemp().parent
    with open(folder / "kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = folder / f"kernels-{_library.LIBRARY_FILE.stat().st_mtime_ns}.pickle"
        if not known.exists():
            known.write_bytes(pickle.dumps(reading.read_kernels(_library.LIBRARY_FILE)))
        kernels: list[Kernel] = pickle.loads(known.read_bytes())
    return kernels


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    """The kernels of kernel_economy_mutants.cu by name."""
    need_tools("nvcc", "cuobjdump", "nvdisasm")
    folder = tmp_path_factory.mktemp("mutants")
    (object_file,) = reading.compile_sources([TESTS / "kernel_economy_mutants.cu"], 90, folder)
    return {kernel.name: kernel for kernel in reading.read_kernels(object_file)}


class TestTheLibrary:
    def test_keeps_every_claim(self, shipped: list[Kernel]) -> None:
        broken = rules.broken_claims(shipped)
        assert not broken, "\n".join(broken)

    def test_has_kernels_of_every_claim(self, shipped: list[Kernel]) -> None:
        """A claim that nothing matches is a slip of its pattern."""
        met = {claim.pattern for kernel in shipped if (claim := rules.claim_of(kernel))}
        assert [claim.pattern for claim in rules.CLAIMS if claim.pattern not in met] == []

    def test_holds_machine_code_of_each_architecture(self, shipped: list[Kernel]) -> None:
        built = {int(arch.removesuffix("-real")) for arch in _library.build_info()["cuda_archs"] if "real" in arch}
        assert {kernel.arch for kernel in shipped} == built


class TestThePage:
    def test_tables_are_up_to_date(self, shipped: list[Kernel], tmp_path: Path) -> None:
        """docs/kernels.md says what the library holds; comparable only where the compiler is the same."""
        need_tools("nvcc")
        page = table.PAGE.read_text(encoding="utf-8")
        if 90 not in {kernel.arch for kernel in shipped}:
            pytest.skip("the library was not built for sm_90, which the tables are of")
        if table.caption(reading.nvcc_version()) not in page:
            pytest.skip(f"the tables are of another compiler than nvcc {reading.nvcc_version()}")
        expected = table.with_section(page, table.section(shipped, tmp_path))
        assert page == expected, "run: make kernels-table"

    def test_a_page_without_markers_is_refused(self) -> None:
        with pytest.raises(ValueError, match="must be there once"):
            table.with_section("# CUDA kernels", "text")


# sm_90 is what continuous integration builds. Of sm_80 it compiles the kernels that networks spend their time in; the
# other types differ in the conversions only.
COMPILED_HERE = ("conv.cu", "depthwise_bfloat16.cu", "pointwise_bfloat16.cu")


@pytest.mark.slow
def test_claims_hold_for_sm_80(tmp_path: Path) -> None:
    need_tools("nvcc", "cuobjdump", "nvdisasm")
    binaries = reading.compile_sources([reading.SOURCES / name for name in COMPILED_HERE], 80, tmp_path)
    kernels = [kernel for binary in binaries for kernel in reading.read_kernels(binary)]
    assert {kernel.family for kernel in kernels} >= {"conv_stem", "depthwise_strips", "pointwise"}
    assert rules.broken_claims(kernels) == []


class TestTheCounts:
    def test_file_is_what_the_disassembly_gives(self, shipped: list[Kernel]) -> None:
        """effkernels/plan/kernel_counts.json, comparable only where the compiler is the same."""
        need_tools("nvcc")
        if 90 not in {kernel.arch for kernel in shipped}:
            pytest.skip("the library was not built for sm_90, which the counts are of")
        if table.caption(reading.nvcc_version()) not in table.PAGE.read_text(encoding="utf-8"):
            pytest.skip(f"the counts are of another compiler than nvcc {reading.nvcc_version()}")
        expected = kernel_counts.to_json(count_kernels(shipped))
        assert kernel_counts.FILE.read_text(encoding="utf-8") == expected, "run: make kernels-table"

    def test_strips_agree_with_the_instructions_for_each_value(self, shipped: list[Kernel]) -> None:
        """Two ways to count one strip: part by part, and the whole way around it."""
        counts = count_kernels(shipped)
        for size, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
            name = f"depthwise_strips<bfloat16, {size}, {stride}, {7 if stride == 1 else 4}>"
            (kernel,) = (one for one in shipped if one.name == name and one.arch == 90)
            parts = counts[name.replace(" ", "")].parts
            values = rules.strip_elements(kernel)
            by_parts = (parts["strip"].issued + size * parts["row"].issued) / values
            assert by_parts == pytest.approx(rules.issued(kernel).inside, rel=0.05), name


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

    def test_the_way_of_swish_is_counted_and_rows_as_often_as_the_kernel_has_them(self) -> None:
        code = instructions_of(listing(*STRIPS))
        found = issued_by_strips(code, kernel=1, stride=1, strip=1, vector=1)
        # IADD3, BRA, 3 or 4 of a row, BRX, MUFU, BRA, STG, BRA
        assert (found.inside, found.border) == (10, 11)
        assert found.pipes == {"ALU": 6, "memory": 2, "FMA": 1, "special": 1}

    def test_code_without_the_loops_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="2 FFMA and 2 LDG"):
            issued_by_strips(instructions_of(listing(*STRIPS)), kernel=2, stride=1, strip=1, vector=1)


class TestTheStem:
    # A block that loads one window, then tiles: put it, multiply, read the next one, norm, activation, store.
    LISTING = (
        "LDG.E R0, [R2.64]",  # 10: parameters, in a loop
        "@P0 BRA 0x10",
        "LDG.E.128 R4, [R2.64]",  # 30: the first window
        "@P1 BRA 0x80",  # 40: the loop over tiles: channels_last skips the turn
        "PRMT R4, R4, 0x5410, R5",
        "PRMT R5, R4, 0x7632, R5",
        "PRMT R6, R4, 0x7632, R5",
        "STS.128 [R9], R4",  # 80
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDS R4, [R9]",
        "HMMA.16816.F32.BF16 R4, R4, R5, RZ",
        "@P2 BRA 0x120",  # c0: no other tile
        "@P3 BRA 0x100",
        "LDG.E.64 R4, [R2.64]",  # e0: narrow
        "BRA 0x120",
        "LDG.E.128 R4, [R2.64]",  # 100: wide
        "IADD3 R1, R1, 0x1, RZ",
        "FFMA R4, R4, R5, R6",  # 120
        "BRX R8 -0x130",
        "FMUL R4, R4, R4",  # 140: not swish, longer
        "FMUL R4, R4, R4",
        "FMUL R4, R4, R4",
        "BRA 0x190",
        "MUFU.TANH R4, R4",  # 180
        "@P4 BRA 0x1d0",  # 190: channels that vectors do not divide
        "STG.E.128 [R2.64], R4",
        "BRA 0x1e0",
        "NOP",
        "STG.E.U16 [R2.64], R4",  # 1d0
        "@P5 BRA 0x40",  # 1e0
        "EXIT",
    )

    @pytest.mark.parametrize(("planes", "turned"), [(False, 0), (True, 3)])
    def test_parts_of_a_tile_are_told_apart(self, planes: bool, turned: int) -> None:
        found = issued_by_stem(instructions_of(listing(*self.LISTING)), planes)
        # Branch, turn; BRA, LDG, IADD3 of the next window; after the stores the branch back.
        assert found.window == {"ALU": 1 + turned + 2 + 1, "memory": 1}
        # The put and the barrier are in the block of the product here.
        assert found.product == {"shared": 2, "tensor": 1, "ALU": 2}
        assert found.epilogue == {"FMA": 1, "special": 1, "ALU": 3, "memory": 1}
        assert found.prologue == {"memory": 2, "ALU": 1}
        assert found.tile.total() == 16 + turned
        assert found.for_each_value() == (16 + turned) / 32
        assert found.for_each_value(tiles=2) == (16 + turned + 1.5) / 32

    def test_code_without_the_loop_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no loop with a barrier and a product"):
            issued_by_stem(instructions_of(listing("FFMA R4, R4, R5, R6", "@P0 BRA 0x10", "EXIT")), planes=False)


class TestThePointwiseLoops:
    # One warp, a tile of 16 x 8: two copies of x and one of the weights for a stage, two products a step.
    TILE = Tile(16, 8, 1, 1, 1)
    LISTING = (
        "MOV R0, 0x1",  # 10
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",  # 20: the loop over the first stages of the weights
        "@P0 BRA 0x20",
        *["LDG.E R4, [R2.64]"] * 4,  # 40: the norm
        *["LDGSTS.E.BYPASS.128 [R1], [R2.64]"] * 2,  # 80: the loop over the first stages of x
        "@P0 BRA 0x80",
        "CS2R R24, SRZ",  # b0: the loop over tiles
        "BAR.SYNC.DEFER_BLOCKING 0x0",  # c0: the loop over steps
        "@P1 BRA 0x110",
        *["VIMNMX R5, R5, R6, PT"] * 2,  # e0: the rows of the next tile
        "IADD3 R7, R7, 0x1, RZ",
        *["LDGSTS.E.BYPASS.128 [R1], [R2.64]"] * 2,  # 110
        "@P2 BRA 0x150",
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",  # 140: weights that are not kept
        "LDSM.16.M88.4 R40, [R12]",  # 150
        *["HMMA.16816.F32.BF16 R24, R40, R14, R24"] * 2,
        "@P3 BRA 0xc0",
        "@P4 BRA 0x1c0",  # 190
        *["FMUL R4, R4, R4"] * 2,  # 1a0: a longer way to no result
        "FFMA R4, R4, R5, R6",  # 1c0
        "MUFU.TANH R4, R4",
        "STG.E.64 [R2.64], R4",
        "@P5 BRA 0xb0",
        "EXIT",
    )

    def test_each_part_of_the_work_is_counted(self) -> None:
        found = issued_by_tiles(instructions_of(listing(*self.LISTING)), self.TILE, takes_gate=False)
        assert found.prologue.total() == 10 + 2 * 2 + 2 * 3, "each loop over the first stages is run three times"
        assert found.tile == {"ALU": 4}
        assert found.step == {"ALU": 4, "load/store": 2, "shared": 1, "tensor": 2}
        assert found.weights == {"load/store": 1}
        assert found.epilogue == {"ALU": 2, "FMA": 1, "special": 1, "load/store": 1}
        assert found.residual.total() == 0

    def test_code_without_the_loops_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="0 loops of 4 HMMA and a barrier"):
            issued_by_tiles(instructions_of(listing(*self.LISTING)), Tile(32, 8, 1, 1, 1), takes_gate=False)
        with pytest.raises(ValueError, match="copies of a step"):
            issued_by_tiles(instructions_of(listing(*self.LISTING)), self.TILE, takes_gate=True)

    def test_tiles_are_those_of_the_source(self) -> None:
        assert len(tiles()) == 12
        assert Tile(64, 144, 4, 1, 1) in tiles()

    def test_more_instructions_than_budgeted_break_the_claim(
        self, shipped: list[Kernel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = next((k for k in shipped if k.name == "pointwise<bfloat16, 0, 7, 0, false>" and k.arch == 90), None)
        if one is None:
            pytest.skip("the library was not built for sm_90, which the budget is of")
        assert rules.within_pointwise_budget(one) is None
        for budget in ((1, 999, 999), (999, 1, 999), (999, 999, 1)):
            monkeypatch.setitem(rules._POINTWISE_BUDGET, ("identity", 128, 16), budget)
            assert rules.within_pointwise_budget(one)


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

"""Triton's compiled kernels for GPUs that this machine lacks: no spills, wide accesses, tensor cores, short code.

Each architecture is compiled by a process of its own (tests/triton_gates), at the shapes of EfficientNet and at
odd ones. The interpreter's tests say that a kernel is right, and accept code that does not compile; these are the other
half. EFFKERNELS_TEST_GATES_PYTHON names the Python whose Triton compiles, if not this one's: `make test-gates`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kept_results import kept, python_sources
from triton_gates import amd, rules
from triton_gates.amd import AmdKernel
from triton_gates.calls import BFLOAT16, CALLS, TRAINING
from triton_gates.rules import TritonKernel

from benchmarks.kernel_economy.rules import (
    Rule,
    exact_products,
    in_registers,
    one_tanh_per_element,
    resident_threads,
    some_wide_stores,
    stored_elements,
    tensor_cores,
    wide_loads,
    wide_stores,
)
from effkernels import triton as families

TESTS = Path(__file__).parent
ARCHITECTURES = (80, 90)
# The one of the usual run; the others, and AMD's, are of a thorough one.
USUAL = 90
THOROUGH = os.environ.get("EFFKERNELS_TEST_THOROUGH", "") not in ("", "0")
COMPILED_BY = os.environ.get("EFFKERNELS_TEST_GATES_PYTHON") or sys.executable


# All that the compiled kernels and what is read of them are made of.
SOURCES = python_sources(
    *("effkernels/ops", "effkernels/triton", "effkernels/_norm.py", "effkernels/_library.py"),
    *("effkernels/plan/kernel_counts.py", "tests/triton_gates", "benchmarks/kernel_economy"),
)

# One process compiles or reads the kernels; the others go on meanwhile.
pytestmark = pytest.mark.xdist_group("triton-gates")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(arch, marks=[pytest.mark.thorough] if arch != USUAL else [], id=f"sm_{arch}")
        for arch in ARCHITECTURES
    ],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what triton_gates.worker read; compiled once for all processes of a test run."""
    need_triton()
    return readings(request.param, tmp_path_factory.getbasetemp().parent)


def need_triton() -> None:
    if sys.executable == COMPILED_BY and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")


def readings(arch: int | str, folder: Path) -> dict[str, Any]:
    """Return what triton_gates.worker read, by one process of a test run; kept as long as the sources are the same."""
    target = folder / f"triton-{arch}-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}.pickle"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            target.write_bytes(pickle.dumps(_read_or_kept(arch, folder)))
    found: dict[str, Any] = pickle.loads(target.read_bytes())
    return found


def _read_or_kept(arch: int | str, folder: Path) -> dict[str, Any]:
    calls = [] if THOROUGH else ["usual"]
    target = folder / f"triton-{arch}-{os.getpid()}.worker"

    def read() -> dict[str, Any]:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(target.with_suffix(".cache")),  # a warm cache would hide the compile time
            "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
        }
        command = [COMPILED_BY, "-m", "triton_gates.worker", str(arch), str(target), *calls]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = pickle.loads(target.read_bytes())
        return found

    if sys.executable != COMPILED_BY:
        return read()
    found: dict[str, Any] = kept("triton-gates", SOURCES, {**versions(), "arch": str(arch), "calls": str(calls)}, read)
    return found


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "triton")} | {"python": sys.version}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[AmdKernel]:
    """The kernels for an AMD GPU."""
    need_triton()
    found: list[AmdKernel] | None = readings(amd.ARCHITECTURE, tmp_path_factory.getbasetemp().parent)["calls"]
    if found is None:
        pytest.skip("this Triton has no compiler for AMD's GPUs")
    return found


class TestTheKernels:
    def test_keep_every_claim(self, compiled: dict[str, Any]) -> None:
        broken = rules.all_broken(compiled["calls"])
        assert not broken, "\n".join(broken)

    def test_every_kernel_with_a_claim_is_compiled(self, compiled: dict[str, Any]) -> None:
        assert {kernel.name for kernel in compiled["calls"]} == set(rules.CLAIMS)

    def test_every_operator_of_triton_is_compiled_in_both_sizes_of_a_number(self) -> None:
        own_kernels = set(families.FAMILIES) - {"mbconv"}  # which launches those of other operators
        wanted = {(op, size) for op in own_kernels for size in (2, 4)}
        assert wanted <= {(call.op, call.dtype.itemsize) for call in CALLS}
        assert set(families.TRAINING_STEPS) == {call.op for call in TRAINING}


@pytest.mark.thorough
class TestForAmd:
    def test_kernels_are_sound(self, kernels: list[AmdKernel]) -> None:
        assert {kernel.name for kernel in kernels} == set(rules.CLAIMS)
        broken = [line for kernel in kernels for line in amd.broken(kernel)]
        assert not broken, "\n".join(broken)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scratch": 16}, "16 bytes of scratch"),
            ({"shared": 2**17}, "bytes of shared memory"),
            ({"instructions": Counter(["buffer_load_dwordx4"])}, "no matrix instruction"),
            ({"instructions": Counter(["v_mfma_f32_32x32x8_bf16"])}, "no load of 16 bytes"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_is_not_sound_is_found(self, kernels: list[AmdKernel], change: dict[str, Any], message: str) -> None:
        good = next(kernel for kernel in kernels if kernel.name == "pointwise_kernel" and kernel.call.wide)
        (line,) = amd.broken(dataclasses.replace(good, **change))
        assert message in line


class TestTheRules:
    """Each rule passes a good kernel and finds the one that is bad in its way."""

    @pytest.mark.parametrize(
        ("rule", "good", "bad"),
        [
            (in_registers, "good", "one warp"),
            (rules.no_narrow_loads, "good", "element by element"),
            (wide_stores, "good", "element by element"),
            (some_wide_stores(1), "good", "element by element"),
            (wide_loads(1), "good", "element by element"),
            (rules.copies_asynchronously, "good", "waiting for every load"),
            (tensor_cores, "good", "exact"),
            (exact_products, "exact", "good"),
            (rules.shared_fits, "good", "eight stages"),
            (one_tanh_per_element(stored_elements), "good", "two special functions"),
            (rules.short_code, "exact", "unrolled"),
            (resident_threads(256), "good", "one warp"),
        ],
        ids=lambda value: getattr(value, "__qualname__", str(value)),
    )
    def test_find_their_mutant(self, compiled: dict[str, Any], rule: Rule, good: str, bad: str) -> None:
        mutants = compiled["mutants"]
        assert rule(mutants[good]) is None
        assert rule(mutants[bad])

    def test_a_slow_compilation_is_found(self, compiled: dict[str, Any]) -> None:
        good: TritonKernel = compiled["mutants"]["good"]
        assert 0 < good.seconds <= rules.MOST_SECONDS
        assert rules.compiles_quickly(good) is None
        assert rules.compiles_quickly(dataclasses.replace(good, seconds=rules.MOST_SECONDS + 1))

    def test_a_product_of_cut_off_factors_is_found(self, compiled: dict[str, Any]) -> None:
        kernel: TritonKernel = next(k for k in compiled["calls"] if k.call.allow_tf32)
        assert rules.broken(kernel) == []
        assert "no rounding to TF32" in rules.broken(dataclasses.replace(kernel, roundings=0))[0]

    def test_swish_that_is_computed_more_than_once_is_found(self, compiled: dict[str, Any]) -> None:
        """Of a pixel that two lanes of a strip need, or that no output does."""
        kernel: TritonKernel = next(
            k for k in compiled["calls"] if k.name == "expand_depthwise_kernel" and k.call.dtype is BFLOAT16
        )
        assert rules.broken(kernel) == []
        more = dataclasses.replace(kernel, instructions=kernel.instructions + Counter({"MUFU.TANH": 4}))
        assert "swish takes one for each" in rules.broken(more)[0]

    def test_a_kernel_without_a_claim_is_reported(self, compiled: dict[str, Any]) -> None:
        assert "no claim" in rules.broken(compiled["mutants"]["good"])[0]

    def test_a_broken_claim_names_the_call(self, compiled: dict[str, Any]) -> None:
        kernel: TritonKernel = next(k for k in compiled["calls"] if k.name == "scale_kernel")
        (line,) = rules.broken(dataclasses.replace(kernel, instructions=kernel.instructions + Counter({"LDL": 2})))
        assert str(kernel.call) in line
        assert "2 loads and stores of local memory" in line


def test_the_page_has_these_readings(compiled: dict[str, Any]) -> None:
    """docs/kernels.md shows what the pinned Triton made for sm_90: `make kernels-table` writes it."""
    from triton_gates import table

    page = table.PAGE.read_text(encoding="utf-8")
    version = page.partition(table.SECTION.begin)[2].partition("Compiled by Triton ")[2].split(" ")[0]
    if compiled["triton"] != version:
        pytest.skip(f"the page is of Triton {version}")
    if any(kernel.arch != 90 for kernel in compiled["calls"]):
        return
    if THOROUGH:
        assert table.SECTION.replaced(page, table.section(compiled["calls"])) == page, "make kernels-table"
    assert set(table.section(compiled["calls"]).splitlines()) <= set(page.splitlines()), "make kernels-table"

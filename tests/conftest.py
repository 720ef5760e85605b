"""The one backend fixture: a test that asks for it runs once for every backend this machine has.

The reference is not among them: it is the yardstick that each of them is held against.
"""

from __future__ import annotations

import triton_interpreter  # first: it decides what the import of effkernels finds

# isort: split
import ctypes
import functools
import gc
import os
import platform
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import op_cases
import pytest
import torch
from amx import model as amx_model
from emulation.build import CannotBuild
from emulation.control import A100, H200, Emulation, Emulator, emulator
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from effkernels import _library
from effkernels.ops import backends
from effkernels.ops.parity import full_float32

# A collection of cycles goes through a million objects, the tests and the libraries, and takes half a second. With
# Python's own threshold of 700 it does so every few seconds: a fifth of the time of tests that trace networks.
gc.set_threshold(20_000)

# Every float32 comparison of the tests; TF32 has cases and a yardstick of its own in tests/gpu/test_tf32.py.
full_float32()

# Runs what the default run leaves out: see _is_left_to_another, and the marker "thorough".
THOROUGH = os.environ.get("EFFKERNELS_TEST_THOROUGH", "") not in ("", "0")

# Hypothesis takes some of its numbers from the sources that are loaded, which depend on the tests that ran before.
if hasattr(providers, "is_local_module_file"):
    setattr(providers, "is_local_module_file", lambda path: False)  # noqa: B010 (mypy knows no such name)

# One fixed set of examples per test and no time limit: a run says the same thing on every machine and under any load.
settings.register_profile(
    "effkernels",
    derandomize=True,
    deadline=None,
    max_examples=30 if THOROUGH else 15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("effkernels")

# Of the last one, the instructions of amx_bf16 are a model in C++ (tests/amx).
AMX_MODEL = "amx_bf16-model"
CPU_INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "plain", AMX_MODEL)
# Those that differ from the next one in products of bfloat16 alone.
BFLOAT16_SETS = ("amx_bf16", "avx512_bf16", AMX_MODEL)

# "race" or "asan": the tests run on the emulated CUDA kernels of that flavour alone (make test-race, make test-asan).
# "triton": they run on interpreted Triton kernels alone (make test-triton).
FLAVOUR = os.environ.get("EFFKERNELS_TEST_FLAVOUR") or "plain"

ABOUT_VALUES = (
    "test_nan_spreads_as_in_pytorch",
    "test_infinity_spreads_as_in_pytorch",
    # All of test_ops_special_values.py, but for what depends on the type: test_results_overflow_as_rounding_does.
    "test_activations_and_gates",
    "test_means",
    "test_excitation",
    "test_gate_norm_and_residual",
)
ABOUT_ACCESSES = ("test_every_element_is_written", "test_nothing_around_a_sliced_input_is_touched")
# Fields of a Case that change what is computed with an element and nothing else.
VALUES = ("activation", "expand_activation", "se_activation", "gate_activation", "norm", "matrix_rank")

# Operators of which amx_bf16 has no kernels of its own.
WITHOUT_PRODUCTS = (*op_cases.DEPTHWISE_OPS, "squeeze_excite_gate")

# Operators that have a kernel in clusters, and another one for devices without them.
IN_CLUSTERS = ("depthwise_bn_act_se", "mbconv", "mbconv_stack")

# Operators that have hundreds of shapes; interpreted, which takes half a second for each, every second one runs.
SAMPLED = op_cases.DEPTHWISE_OPS

# By the end of a test's id. Each order and each moment of landing meets both devices: one with clusters, one without.
# The two of each order differ in both, see _is_left_to_another.
EMULATIONS = {
    "plain": {
        "forward-early": Emulation("forward", "early", H200),
        "forward-late": Emulation("forward", "late", A100),
        "reverse-early": Emulation("reverse", "early", A100),
        "reverse-late": Emulation("reverse", "late", H200),
        "random-early": Emulation("random", "early", H200),
        "random-late": Emulation("random", "late", A100),
    },
    "race": {
        "race": Emulation("random", "late", H200, "race"),
        "race-without-clusters": Emulation("forward", "early", A100, "race"),
    },
    "asan": {
        "asan": Emulation("forward", "late", H200, "asan"),
        "asan-without-clusters": Emulation("forward", "late", A100, "asan"),
    },
}


@dataclass(frozen=True)
class Backend:
    """One way of running the operators, as a test's id names it.

    Attributes:
        name: whose kernels run, one of effkernels.ops.backends.BACKENDS.
        device: where its tensors live.
        isa: the CPU instruction set to force; None elsewhere.
        emulated: the key in EMULATIONS of CUDA kernels that run on the CPU, in place of the CPU's; None elsewhere.
    """

    name: str
    device: str
    isa: str | None = None
    emulated: str | None = None

    def __str__(self) -> str:
        if self.emulated is not None:
            return f"{self.name}-emulated-{self.emulated}"
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    def emulator(self) -> Emulator:
        """Return the emulator of an emulated backend, with that backend's settings."""
        assert self.emulated is not None
        how = EMULATIONS[FLAVOUR][self.emulated]
        found = emulator(how.flavour)
        found.configure(how)
        return found

    @contextmanager
    def active(self) -> Iterator[None]:
        """Force this backend, and its instruction set, for a while."""
        with ExitStack() as stack:
            if self.emulated is not None:
                stack.enter_context(self.emulator().in_place_of_cpu())
            if self.isa == AMX_MODEL:
                stack.enter_context(amx_model.in_place_of_cpu())
            elif self.isa is not None:
                torch.ops.effkernels.cpu_isa(self.isa)
                stack.callback(torch.ops.effkernels.cpu_isa, "auto")
            stack.enter_context(backends.backend(self.name if self.emulated is None else "cpu"))
            yield

    def runs(self, op: str, dtype: torch.dtype) -> backends.Decision:
        """Return whether this backend has `op` in `dtype`, and why not."""
        if self.emulated is not None:
            has = op in self.emulator().operators()
            return backends.Decision(has, "" if has else f"the library has no CUDA kernel of {op}")
        can_run = {"cpu": backends.can_run_cpu, "cuda": backends.can_run_cuda, "triton": backends.can_run_triton}
        return can_run[self.name](op, device=self.device, dtype=dtype)


def offers(isa: str) -> bool:
    if isa == AMX_MODEL:  # its kernels are compiled for the level below
        return offers("avx512_bf16")
    try:
        return bool(torch.ops.effkernels.cpu_isa(isa) == isa)
    except RuntimeError:
        return False
    finally:
        torch.ops.effkernels.cpu_isa("auto")


@functools.cache
def cpu_instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of the CPU kernels that this machine has."""
    return tuple(isa for isa in CPU_INSTRUCTION_SETS if offers(isa))


def available_backends() -> list[Backend]:
    """Every backend of this machine: the CPU kernels once per instruction set, the CUDA kernels emulated in several
    orders, and on the GPU, where there is one, beside the Triton kernels. Of another flavour, what it is about alone.
    """
    found = []
    if FLAVOUR == "triton":
        return [Backend("triton", "cpu")] if triton_interpreter.ACTIVE else []
    emulated = [Backend("cuda", "cpu", emulated=name) for name in EMULATIONS[FLAVOUR]] if _library.is_loaded() else []
    if FLAVOUR != "plain":
        return emulated
    if _library.is_loaded():
        found += [Backend("cpu", "cpu", isa) for isa in cpu_instruction_sets()]
    if torch.cuda.is_available():
        found += [Backend("cuda", "cuda"), Backend("triton", "cuda")]
    return found + emulated


def _parameters() -> list[object]:
    return [pytest.param(b, id=str(b)) for b in available_backends()] or _no_backend()


def _groups() -> list[object]:
    """The backends on the CPU together, for they have the same yardsticks, and each of a GPU by itself."""
    found = available_backends()
    on_cpu = [b for b in found if b.device == "cpu"]
    groups: list[object] = [pytest.param(on_cpu, id="cpu")] if on_cpu else []
    groups += [pytest.param([b], id=str(b)) for b in found if b.device != "cpu"]
    return groups or _no_backend()


def _no_backend() -> list[object]:
    reason = f"no backend beside the reference: {_library.load_error()}"
    return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out a file that has no test for a flavour, unread: to import all of them takes as long as many tests.

    A test for a flavour names a fixture, which is named in its file.
    """
    if FLAVOUR == "plain" or not collection_path.match("test_*.py"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    return True if not any(name in text for name in ("backend", "emulated", "interpreted")) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what runs on the emulator, leave out what a flavour cannot show, and give tests that differ only in the
    backend or the instruction set to one worker, one after the other, so that they share one yardstick.
    """
    for item in items:
        if _is_emulated(item):
            item.add_marker("emulated")
        if _is_interpreted(item):
            item.add_marker("interpreted")
    all_cases = {(item.location[0], case) for item in items if (case := _case_of(item)) is not None}
    positions = _positions(items)
    kept, left_out = [], []
    for item in items:
        elsewhere = item.get_closest_marker("thorough") is not None or _is_left_to_another(item, all_cases, positions)
        (left_out if _is_of_another_flavour(item) or (elsewhere and not THOROUGH) else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
    first_seen: dict[str, int] = {}
    for position, item in enumerate(items):
        first_seen.setdefault(_apart_from_backend(item), position)
    items.sort(key=lambda item: first_seen[_apart_from_backend(item)])
    if config.pluginmanager.hasplugin("xdist"):
        shared = Counter(map(_apart_from_backend, items))
        for item in items:
            if _case_of(item) is not None and shared[_apart_from_backend(item)] > 1:
                group = f"case-{zlib.crc32(_apart_from_backend(item).encode()):08x}"
                item.add_marker(pytest.mark.xdist_group(group))


def _is_emulated(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    chosen = [parameters.get("backend"), *(parameters.get("backends_together") or ())]
    return "emulated" in getattr(item, "fixturenames", ()) or any(
        isinstance(one, Backend) and one.emulated is not None for one in chosen
    )


def _is_interpreted(item: pytest.Item) -> bool:
    chosen = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
    return "interpreted" in getattr(item, "fixturenames", ()) or (
        isinstance(chosen, Backend) and chosen.name == "triton" and chosen.device == "cpu"
    )


def _is_of_another_flavour(item: pytest.Item) -> bool:
    if FLAVOUR in ("race", "asan"):
        return not _shows_more_when_checked(item)
    if FLAVOUR == "triton":
        return not _shows_more_when_interpreted(item)
    return FLAVOUR == "plain" and _is_interpreted(item)


def _shows_more_when_checked(item: pytest.Item) -> bool:
    """Return whether the accesses of a test can differ from those of every other test.

    What the race and the asan flavour check depends on the shapes and on which inputs are given, never on values, and
    float16 and bfloat16 take the same ways. A run that is some ten times as slow need not repeat the rest.
    """
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if parameters.get("dtype") is torch.bfloat16 or getattr(item, "originalname", "") in ABOUT_VALUES:
        return False
    case = parameters.get("case")
    if not isinstance(case, op_cases.Case):
        return True
    return case.dtype is not torch.bfloat16 and not _is_about_values(case)


def _shows_more_when_interpreted(item: pytest.Item) -> bool:
    """Return whether an interpreted test can find what every other one does not.

    Kernels compute in float32 whatever the type, so that values (activations, gates, norms, NaN) are tried in float32
    alone. What a 16-bit type changes, the width of a vector and the rounding, float16 and bfloat16 share: bfloat16
    runs at every shape, float16 those of test_triton_*.py. Of these, test_any_interpreted_shape replaces
    test_any_shape, with fewer examples.
    """
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    name, dtype, case = getattr(item, "originalname", ""), parameters.get("dtype"), parameters.get("case")
    if name == "test_any_shape":
        return False
    if isinstance(case, op_cases.Case):
        return case.dtype is torch.float32 or (case.dtype is torch.bfloat16 and not _is_about_values(case))
    if name in ABOUT_VALUES:
        return dtype is torch.float32
    return dtype is not torch.float16 or name not in ABOUT_ACCESSES


Positions = dict[tuple[str, str, str], dict[int, int]]


def _positions(items: Sequence[pytest.Item]) -> Positions:
    """Number the values of each parameter of each test function, by the identity of the value.

    The indices that pytest keeps are no such numbers: for an argument of the function itself it is that of the call.
    """
    found: Positions = {}
    for item in items:
        for name, value in getattr(getattr(item, "callspec", None), "params", {}).items():
            values = found.setdefault((*_function_of(item), name), {})
            values.setdefault(id(value), len(values))
    return found


def _function_of(item: pytest.Item) -> tuple[str, str]:
    return item.nodeid.split("::", 1)[0], item.nodeid.split("::", 1)[1].split("[", 1)[0]


def _is_left_to_another(
    item: pytest.Item, all_cases: Collection[tuple[str, op_cases.Case]], positions: Positions
) -> bool:
    """Return whether a test of the same shape in another dtype, or a neighbour of it, covers this one.

    Neighbouring parameters take turns: the three dtypes of a shape meet the three thread orders of the emulator, and
    each order meets every kernel, on both devices and with both moments of landing. An operator whose kernels differ
    between the devices runs on both each time. The race flavour finds a missing barrier in any order.

    On a CPU, a shape runs on every instruction set in float32; a 16-bit type, which differs in loads and stores alone,
    takes the next one with each shape. Those of BFLOAT16_SETS have other code for bfloat16 alone, and run it at every
    shape; amx_bf16 and its model have it for products alone.

    Interpreted, a case of an operator that is about a shape, and a test with several parameters, runs in float32 or in
    bfloat16, and of the depthwise operators' shapes every second one runs. Of whole networks, five seconds each, B0
    runs, in float32 and bfloat16.
    """
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return False
    if FLAVOUR == "triton" and item.location[0].endswith("test_models_parity.py"):
        return callspec.params.get("name") != "efficientnet_b0" or callspec.params.get("dtype") is torch.float16
    chosen, case = callspec.params.get("backend"), callspec.params.get("case")
    isa = chosen.isa if isinstance(chosen, Backend) else callspec.params.get("isa")
    is_case = isinstance(case, op_cases.Case)
    dtype = case.dtype if is_case else callspec.params.get("dtype")
    if isa in ("amx_bf16", AMX_MODEL) and is_case and case.op in WITHOUT_PRODUCTS:
        return True
    if isa in BFLOAT16_SETS and isinstance(dtype, torch.dtype):
        return dtype is not torch.bfloat16
    others = {
        name: positions[(*_function_of(item), name)][id(value)]
        for name, value in callspec.params.items()
        if name not in ("backend", "isa")
    }
    if not others:
        return False
    number = _number_of(case) if is_case else sum(others.values())
    turn = number + op_cases.DTYPES.index(case.dtype) if is_case else number
    if isinstance(chosen, Backend) and chosen.emulated is not None:
        emulations = list(EMULATIONS[FLAVOUR])  # two neighbours differ in the device
        order, device = divmod(emulations.index(chosen.emulated), 2)
        on_both = is_case and case.op in IN_CLUSTERS
        orders = len(emulations) // 2
        return order != turn % orders or not (on_both or device == (turn if orders == 1 else number // orders) % 2)
    sets = [name for name in cpu_instruction_sets() if name not in BFLOAT16_SETS]
    if isa in sets and dtype in (torch.float16, torch.bfloat16):
        has_float32 = not is_case or (item.location[0], case.with_(dtype=torch.float32)) in all_cases
        return has_float32 and sets.index(isa) != turn % len(sets)
    if FLAVOUR == "triton" and is_case and not _is_about_values(case):
        wanted = (torch.float32, torch.bfloat16)[number % 2]
        repeated = case.dtype is not wanted and (item.location[0], case.with_(dtype=wanted)) in all_cases
        return repeated or (number // 2 % 2 == 1 and case.op in SAMPLED)
    if FLAVOUR == "triton" and not is_case and dtype in op_cases.DTYPES and len(others) > 1:
        return dtype is not (torch.float32, torch.bfloat16)[(number - others["dtype"]) % 2]
    return False


def _number_of(case: op_cases.Case) -> int:
    """A number of a case that is the same in every dtype, in every process."""
    return zlib.crc32(repr(case.with_(dtype=torch.float32)).encode())


def _is_about_values(case: op_cases.Case) -> bool:
    usual = op_cases.Case(case.op)
    return any(getattr(case, field) != getattr(usual, field) for field in VALUES)


def _case_of(item: pytest.Item) -> op_cases.Case | None:
    case = getattr(getattr(item, "callspec", None), "params", {}).get("case")
    return case if isinstance(case, op_cases.Case) else None


def _apart_from_backend(item: pytest.Item) -> str:
    """Return the id of a test without the id of its backend or instruction set."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    chosen = parameters.get("backend", parameters.get("isa"))
    return item.nodeid if chosen is None else item.nodeid.replace(f"[{chosen}-", "[").replace(f"[{chosen}]", "")


@pytest.fixture(scope="session", autouse=True)
def _no_tuned_plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' tuned plans and those of this machine's user apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFKERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_numbers(request: pytest.FixtureRequest) -> None:
    """Draw the same random numbers in a test each time, so that what fails once fails again."""
    torch.default_generator.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=_parameters())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend of this machine in turn, forced for the length of the test."""
    chosen: Backend = request.param
    need_built(chosen)
    with chosen.active():
        yield chosen


@pytest.fixture(params=_groups())
def backends_together(request: pytest.FixtureRequest) -> list[Backend]:
    """The backends of one device, for a test of many cases that has the yardsticks of one case at a time.

    None of them is forced. One that cannot be built is left out: the tests of `backend` say why.
    """
    found = []
    for one in request.param:
        with suppress(pytest.skip.Exception):
            need_built(one)
            found.append(one)
    return found


def need_built(backend: Backend) -> None:
    """Build what a backend needs beside the library; skips the test where this machine cannot."""
    if backend.emulated is not None:
        built_emulator()
    if backend.isa == AMX_MODEL:
        need_amx_model()


def built_emulator() -> Emulator:
    """Return the emulator in the flavour of this run; skips the test where this machine cannot build it."""
    try:
        return emulator(FLAVOUR)
    except CannotBuild as reason:
        pytest.skip(f"no emulated CUDA kernels: {reason}")


def may_use_tiles() -> bool:
    """Return whether Linux has granted this process the tiles of AMX."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    get_permissions, tile_data, arch_prctl = 0x1022, 1 << 18, 158
    granted = ctypes.c_uint64(0)
    refused = ctypes.CDLL(None).syscall(arch_prctl, get_permissions, ctypes.byref(granted))
    return not refused and bool(granted.value & tile_data)


def need_amx_model() -> None:
    """Skip the test where the operators over the model of the tile instructions cannot be built."""
    try:
        amx_model.build()
    except CannotBuild as reason:
        pytest.skip(f"no model of the tile instructions: {reason}")


@pytest.fixture
def emulated() -> Emulator:
    """The emulator, as if nothing had run on it: forward order, copies at once, an H200."""
    found = built_emulator()
    found.configure(Emulation(flavour=FLAVOUR))
    return found


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Forces the Triton kernels, interpreted; skips a test in a process where Triton does not interpret."""
    if not triton_interpreter.ACTIVE:
        pytest.skip("needs a process in which Triton interprets its kernels: make test-triton")
    with backends.backend("triton"):
        yield


def need(backend: Backend, op: str, dtype: torch.dtype) -> None:
    """Skip the test, with the backend's own reason, where it cannot run `op`."""
    decision = backend.runs(op, dtype)
    if not decision.ok:
        pytest.skip(f"{backend}: {decision.reason}")


@pytest.fixture(params=CPU_INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the CPU kernels of every instruction set that this machine has."""
    name: str = request.param
    if not offers(name):
        pytest.skip(f"the CPU kernels of {name} are not built, or this processor does not run them")
    if name == AMX_MODEL:
        need_amx_model()
    with Backend("cpu", "cpu", name).active():
        yield name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keeps PyTorch to one thread, for tests of many small calls."""
    with op_cases.one_thread():
        yield


@pytest.fixture
def compiled() -> None:
    """Skips a test that needs the compiled library where there is none."""
    if not _library.is_loaded():
        pytest.skip(f"needs the compiled library: {_library.load_error()}")

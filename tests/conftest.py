"""The one backend fixture: a test that asks for it runs once for every backend this machine has.

The reference is not among them: it is the yardstick that each of them is held against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import op_cases
import pytest
import torch
from hypothesis import HealthCheck, settings

from effkernels import _library, backends

# One fixed set of examples per test and no time limit: a run says the same thing on every machine and under any load.
settings.register_profile(
    "effkernels",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("effkernels")

CPU_INSTRUCTION_SETS = ("avx512", "avx2", "plain")


@dataclass(frozen=True)
class Backend:
    """One way of running the operators, as a test's id names it.

    Attributes:
        name: the backend to force, one of effkernels.backends.BACKENDS.
        device: where its tensors live.
        isa: the CPU instruction set to force; None elsewhere.
    """

    name: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Force this backend, and its instruction set, for a while."""
        if self.isa is not None:
            torch.ops.effkernels.cpu_isa(self.isa)
        try:
            with backends.backend(self.name):
                yield
        finally:
            if self.isa is not None:
                torch.ops.effkernels.cpu_isa("auto")

    def runs(self, op: str, dtype: torch.dtype) -> backends.Decision:
        """Whether this backend has `op` in `dtype`, and why not."""
        can_run = {"cpu": backends.can_run_cpu, "cuda": backends.can_run_cuda, "triton": backends.can_run_triton}
        return can_run[self.name](op, device=self.device, dtype=dtype)


def _offers(isa: str) -> bool:
    try:
        return bool(torch.ops.effkernels.cpu_isa(isa) == isa)
    except RuntimeError:
        return False
    finally:
        torch.ops.effkernels.cpu_isa("auto")


def available_backends() -> list[Backend]:
    """Every backend of this machine: the CPU kernels once per instruction set, and the GPU's where there is one."""
    found = []
    if _library.is_loaded():
        found += [Backend("cpu", "cpu", isa) for isa in CPU_INSTRUCTION_SETS if _offers(isa)]
    if torch.cuda.is_available():
        found.append(Backend("cuda", "cuda"))
    return found


def _parameters() -> list[object]:
    found: list[object] = [pytest.param(b, id=str(b)) for b in available_backends()]
    reason = f"no backend beside the reference: {_library.load_error()}"
    return found or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that differ only in the backend follow each other, so that they can share one yardstick."""
    first_seen: dict[tuple[object, ...], int] = {}
    for position, item in enumerate(items):
        first_seen.setdefault(_apart_from_backend(item), position)
    items.sort(key=lambda item: first_seen[_apart_from_backend(item)])


def _apart_from_backend(item: pytest.Item) -> tuple[object, ...]:
    callspec = getattr(item, "callspec", None)
    if callspec is None or "backend" not in callspec.params:
        return (item.nodeid,)
    others = tuple(value for name, value in callspec.indices.items() if name != "backend")
    return (item.location[0], getattr(item, "originalname", item.name), others)


@pytest.fixture(params=_parameters())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend of this machine in turn, forced for the length of the test."""
    chosen: Backend = request.param
    with chosen.active():
        yield chosen


def need(backend: Backend, op: str, dtype: torch.dtype) -> None:
    """Skip the test, with the backend's own reason, where it cannot run `op`."""
    decision = backend.runs(op, dtype)
    if not decision.ok:
        pytest.skip(f"{backend}: {decision.reason}")


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

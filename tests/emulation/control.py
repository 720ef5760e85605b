"""The emulator as the tests see it: how its next launches run, what they did, and the operators over them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from emulation.build import build
from torch import Tensor

ORDERS = ("forward", "reverse", "random")
COPIES = ("early", "late")
# As torch.ops.effkernels.cuda_plan takes them: capability, multiprocessors, shared memory per multiprocessor and per
# block, threads, blocks and registers per multiprocessor, largest cluster.
H200 = (90, 132, 233472, 232448, 2048, 32, 65536, 16)
A100 = (80, 108, 167936, 166912, 2048, 32, 65536, 1)


@dataclass(frozen=True)
class Emulation:
    """One way of running the emulated kernels.

    Attributes:
        order: in which threads, warps and blocks run.
        copies: whether cp.async lands at once or when it is waited for.
        limits: of the device.
        flavour: of the build: what is checked (CMakeLists.txt).
        seed: of the random order.
        residents: blocks of an ordinary launch that run at a time.
    """

    order: str = "forward"
    copies: str = "early"
    limits: tuple[int, ...] = H200
    flavour: str = "plain"
    seed: int = 1
    residents: int = 4


class Emulator:
    """One flavour of the emulator, built and imported."""

    def __init__(self, flavour: str) -> None:
        self.flavour = flavour
        self.module: ModuleType = build(flavour)
        self.namespace = "effkernels_emulated" if flavour == "plain" else f"effkernels_emulated_{flavour}"

    def configure(self, how: Emulation) -> None:
        """Set how the next launches run, and forget what earlier tests left: streams, captures, records."""
        assert how.flavour == self.flavour
        self.module.set_order(how.order, how.seed)
        self.module.set_copies(how.copies)
        self.module.set_residents(how.residents)
        self.module.use_device(list(how.limits))
        self.module.set_stream(0)
        self.module.set_capturing(False)
        self.module.fail_allocations(0)
        self.module.clear_launches()

    def run(
        self,
        name: str,
        input: Tensor | None = None,
        output: Tensor | None = None,
        n: int = 0,
        *,
        grid: int | Sequence[int] = 1,
        block: int | Sequence[int] = 32,
        shared_bytes: int = 0,
        cluster: int = 1,
        cooperative: bool = False,
        overlaps: bool = False,
    ) -> str:
        """Run a kernel of selftest.cu; the name of the CUDA error, which is cudaSuccess where the launch took place.

        Raises:
            RuntimeError: what the kernel did wrong.
        """

        def three(size: int | Sequence[int]) -> list[int]:
            given = [size] if isinstance(size, int) else list(size)
            return given + [1] * (3 - len(given))

        error: str = self.module.run(
            name,
            grid=three(grid),
            block=three(block),
            shared_bytes=shared_bytes,
            cluster=cluster,
            cooperative=cooperative,
            overlaps=overlaps,
            input=0 if input is None else input.data_ptr(),
            output=0 if output is None else output.data_ptr(),
            n=n,
        )
        return error

    def launches(self) -> list[dict[str, Any]]:
        """Return what was launched since `configure`, with the bytes that the race flavour counted."""
        records: list[dict[str, Any]] = self.module.launches()
        return records

    def operators(self) -> frozenset[str]:
        """Return the operators of the library that this one runs over emulated kernels."""
        return operators_of(self.namespace, "CPU")

    @contextmanager
    def in_place_of_cpu(self) -> Iterator[None]:
        """Let the CPU's operators of the library run on the emulated kernels for a while."""
        with in_place_of_library(self.namespace, {"CPU": self.operators()}):
            yield


@functools.cache
def operators_of(namespace: str, key: str) -> frozenset[str]:
    """Return the operators that a library of the tests has registered under a dispatch key."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = (str(name) for name in torch._C._dispatch_get_all_op_names())
    own = [name.split("::")[1].split(".")[0] for name in names if name.startswith(f"{namespace}::")]
    return frozenset(op for op in own if has_kernel(f"{namespace}::{op}", key))


@contextmanager
def in_place_of_library(namespace: str, operators: Mapping[str, Collection[str]]) -> Iterator[None]:
    """Let operators of the library be computed by those of the tests' library `namespace` for a while.

    Args:
        operators: those of each dispatch key.
    """
    library = torch.library.Library("effkernels", "IMPL")
    try:
        with warnings.catch_warnings():  # torch warns of the first operator that is overridden
            warnings.simplefilter("ignore", UserWarning)
            for key, names in operators.items():
                for op in sorted(names):
                    library.impl(op, getattr(getattr(torch.ops, namespace), op).default, key)
        yield
    finally:
        library._destroy()


@functools.cache
def emulator(flavour: str) -> Emulator:
    """Return the one emulator of a flavour in this process."""
    return Emulator(flavour)

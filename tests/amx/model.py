"""The CPU's operators at the level amx_bf16 over a model of the tile instructions, for processors without them.

`tiles.h` computes in C++ what the instructions do. The kernels are those of csrc/cpu, compiled into a library of their
own, which the tests run in place of the CPU's operators of the product. They are in it twice: with calls of the model
in place of the instructions, and with the instructions, as the product has them. Where the processor refuses those,
`trap.cpp` lets the model compute them, one signal each.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from emulation.build import TREES, compile_project
from emulation.control import in_place_of_library, operators_of
from torch import Tensor

NAME = "effkernels_amx_model"
HERE = Path(__file__).resolve().parent


@functools.cache
def build() -> ctypes.CDLL:
    """Build what changed and register the operators, in the namespace `NAME`; return the library.

    Raises:
        CannotBuild: there is no compiler or no build tool.
        BuildFailed: the sources do not compile.
    """
    tree = TREES / "amx-model"
    compile_project("amx-model", HERE, tree, f"{NAME}.so", {})
    torch.ops.load_library(tree / f"{NAME}.so")
    return ctypes.CDLL(str(tree / f"{NAME}.so"))


@contextmanager
def in_place_of_cpu(kernels: str = "amx_bf16") -> Iterator[None]:
    """Let the CPU's operators run at the level amx_bf16 for a while, recordings and plans, too.

    Args:
        kernels: "amx_bf16", over the model, or "amx_bf16_instructions".

    Raises:
        RuntimeError: the compiler does not know the instructions.
    """
    build()
    key = "CompositeExplicitAutograd"
    choose = getattr(torch.ops, NAME).cpu_isa
    choose(kernels)
    try:
        with in_place_of_library(NAME, {"CPU": operators_of(NAME, "CPU"), key: operators_of(NAME, key) - {"cpu_isa"}}):
            yield
    finally:
        choose("amx_bf16")


@dataclass(frozen=True)
class Counts:
    """What the model did: configurations of tiles loaded and released, products of two tiles."""

    configurations: int
    releases: int
    products: int

    def __sub__(self, before: Counts) -> Counts:
        return Counts(
            self.configurations - before.configurations,
            self.releases - before.releases,
            self.products - before.products,
        )


def counts() -> Counts:
    """Return what the model did since the process started, in all threads."""
    found = (ctypes.c_int64 * 3)()
    build().amx_model_counts(found)
    return Counts(*found)


def pays(pixels: int, out_channels: int, in_channels: int) -> bool:
    """Return whether a product goes by tiles: `pays_by_tiles` of csrc/cpu/amx.h."""
    numbers = (ctypes.c_int64(number) for number in (pixels, out_channels, in_channels))
    return bool(build().amx_pays(*numbers))


def product(name: str, sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return sums + a @ b as one instruction computes it.

    Args:
        name: of what computes it: "model" or "instructions".
        sums: (rows, columns), float32.
        a: (rows, 2 * words), bfloat16.
        b: (2 * words, columns), bfloat16.
    """
    (rows, columns), words = sums.shape, a.shape[1] // 2
    result = sums.contiguous().clone()
    left, right = a.contiguous(), b.reshape(words, 2, columns).transpose(1, 2).contiguous()
    call = getattr(build(), f"amx_product_of_{name}")
    call(rows, columns, words, *(ctypes.c_void_p(t.data_ptr()) for t in (left, right, result)))
    return result

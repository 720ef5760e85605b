"""The promises of the Triton kernels, and the check that the compiled code keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from triton_gates.calls import FLOAT32, CompiledCall, CompiledStep

from benchmarks.kernel_economy.reading import Kernel
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

# Of an A100 and of an H100 or H200, for which the kernels are compiled.
MULTIPROCESSORS = {80: 108, 90: 132}
# Of a block. Kernels do not ask for the architecture, so what is compiled for sm_80 must also fit sm_86 and sm_89.
MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024}
# The longest kernel here has 2500; beyond, the instruction cache (128 KB, 16 bytes each) is not for one kernel alone.
MOST_INSTRUCTIONS = 6000
# Processor seconds, the assembler's among them. A user waits this long at the first call of a new kind.
MOST_SECONDS = 10.0


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """One kernel as Triton compiled it. `shared` counts what a block asks for at launch.

    Attributes:
        call: of the operator, or the step of training, that launches it; None for a kernel of the tests.
        roundings: to TF32, in the PTX.
        seconds: processor time of its compilation.
    """

    call: CompiledCall | CompiledStep | None
    roundings: int
    seconds: float

    @property
    def element_bytes(self) -> int:
        """The bytes of an element of the images: of the call, and of a kernel of the tests by its name."""
        return super().element_bytes if self.call is None else self.call.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.arch}, {self.registers} registers) of {self.call}"


def shared_fits(kernel: TritonKernel) -> str | None:
    """A block's shared memory is available on every GPU that runs this code."""
    most = MOST_SHARED[kernel.arch] + (1024 if kernel.arch >= 90 else 0)
    return None if kernel.shared <= most else f"{kernel.shared} bytes of shared memory; {most} is the most"


def short_code(kernel: TritonKernel) -> str | None:
    """No loop is unrolled beyond measure."""
    count = kernel.instructions.total()
    return None if count <= MOST_INSTRUCTIONS else f"{count} instructions; {MOST_INSTRUCTIONS} is the most"


def compiles_quickly(kernel: TritonKernel) -> str | None:
    """Nobody waits long at the first call."""
    if kernel.seconds <= MOST_SECONDS:
        return None
    return f"compiled for {kernel.seconds:.1f} seconds; {MOST_SECONDS:.0f} is the most"


def no_narrow_loads(kernel: TritonKernel) -> str | None:
    """Nothing is read by elements of 16 bits, through registers or asynchronously."""
    narrow = kernel.accesses("LDG")[2] + kernel.accesses("LDGSTS")[2]
    return f"{narrow} loads of 2 bytes" if narrow else None


def copies_asynchronously(kernel: TritonKernel) -> str | None:
    """The slices of the factors come by 16-byte cp.async while earlier ones are multiplied; so may narrower ones."""
    return None if kernel.accesses("LDGSTS")[16] else "no 16-byte cp.async"


def rounds_to_tf32(kernel: TritonKernel) -> str | None:
    """Both factors of a TF32 product are rounded to the nearest: a tensor core alone would cut bits off."""
    return None if kernel.roundings else "no rounding to TF32"


EVERY: tuple[Rule, ...] = (in_registers, shared_fits, short_code, compiles_quickly, resident_threads(256))


def _pointwise(call: CompiledCall) -> Iterator[Rule]:
    yield exact_products if call.exact else tensor_cores
    if call.allow_tf32:
        yield rounds_to_tf32
    if call.wide:
        yield from (copies_asynchronously, no_narrow_loads, wide_stores)
        yield from _swish(call)


def _pointwise_pool(call: CompiledCall) -> Iterator[Rule]:
    yield exact_products if call.exact else tensor_cores
    if call.wide:
        yield from (copies_asynchronously, no_narrow_loads)


def _depthwise(call: CompiledCall) -> Iterator[Rule]:
    if not call.wide:
        return
    yield wide_loads(call.kernel[1])  # a row of inputs, at the least
    yield some_wide_stores(1)
    if not call.reduced:
        yield wide_stores
        yield from _swish(call)
        if call.weight is FLOAT32:  # weights of 16 bits are read as they are stored, a tap of a channel at a time
            yield no_narrow_loads


def _swish(call: CompiledCall) -> Iterator[Rule]:
    if call.activation == "silu" and call.dtype is not FLOAT32:
        yield one_tanh_per_element(stored_elements)


def _scale(call: CompiledCall) -> Iterator[Rule]:
    yield from (wide_loads(), wide_stores)


def _conv(call: CompiledCall) -> Iterator[Rule]:
    yield exact_products if call.exact else tensor_cores
    if call.allow_tf32:
        yield rounds_to_tf32
    if call.out_channels * call.dtype.itemsize % 16 == 0:  # the input is gathered, whatever its channels
        yield wide_stores
        yield from _swish(call)


def _norm_act(call: CompiledCall) -> Iterator[Rule]:
    yield from (wide_loads(), no_narrow_loads, wide_stores, *_swish(call))


def _squeeze_excite(call: CompiledCall) -> Iterator[Rule]:
    yield from ()  # a few kilobytes from L2: nothing but what every kernel promises


def _expand_depthwise(call: CompiledCall) -> Iterator[Rule]:
    yield exact_products if call.exact else tensor_cores
    if call.allow_tf32:
        yield rounds_to_tf32
    if call.wide:
        yield from (copies_asynchronously, some_wide_stores(1))
        if call.weight is FLOAT32:
            yield no_narrow_loads
        if call.activation == "silu" and call.dtype is not FLOAT32:
            yield one_tanh_per_pixel


def one_tanh_per_pixel(kernel: TritonKernel) -> str | None:
    """Swish costs one special-function instruction for each expanded pixel of a strip and each that it stores."""
    from effkernels.triton.expand_depthwise import cut_of, inputs_of  # not before the worker said which GPU it is

    call = kernel.call
    assert isinstance(call, CompiledCall)
    kernel_size = call.kernel[0]  # a square one
    cut = cut_of(kernel_size, call.stride, call.dtype, call.exact, call.wide, kernel.arch // 10)
    stored = 8 * kernel.accesses("STG")[16]
    wanted = stored + stored // cut.strip * call.stride * inputs_of(cut.strip, kernel_size, call.stride)
    found = kernel.special_functions["TANH"]
    return None if found == wanted else f"{found} MUFU.TANH for {wanted} pixels; swish takes one for each"


def no_atomics(kernel: TritonKernel) -> str | None:
    """Sums meet in a fixed order: results are stored, and another launch adds them."""
    found = sum(kernel.count(opcode) for opcode in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG"))
    return f"{found} atomic instructions" if found else None


def _apply(call: CompiledStep) -> Iterator[Rule]:
    if call.wide:
        yield from (wide_loads(2), no_narrow_loads, wide_stores)


def _statistics(call: CompiledStep) -> Iterator[Rule]:
    yield no_atomics
    if call.wide:
        yield from (wide_loads(4), no_narrow_loads)


def _walk(call: CompiledStep) -> Iterator[Rule]:
    """Of sums and of convolutions: a thread may have less than a vector of 16-bit channels, for want of registers."""
    yield no_atomics
    if call.wide:
        yield from (no_narrow_loads, wide_loads(2 if call.kernel <= 5 else 0))


def _join(call: CompiledStep) -> Iterator[Rule]:
    yield no_atomics


# By the name of the kernel: what it promises beside EVERY, for a call that launches it.
CLAIMS: dict[str, Callable[[Any], Iterator[Rule]]] = {
    "pointwise_kernel": _pointwise,
    "pointwise_pool_kernel": _pointwise_pool,
    "depthwise_kernel": _depthwise,
    "expand_depthwise_kernel": _expand_depthwise,
    "scale_kernel": _scale,
    "conv_kernel": _conv,
    "norm_act_kernel": _norm_act,
    "squeeze_excite_kernel": _squeeze_excite,
    "apply_kernel": _apply,
    "statistics_kernel": _statistics,
    "sums_kernel": _walk,
    "convolve_kernel": _walk,
    "weight_gradient_kernel": _walk,
    "join_kernel": _join,
}


def broken(kernel: TritonKernel) -> list[str]:
    """Return one line for everything that is not as claimed."""
    if kernel.call is None or kernel.name not in CLAIMS:
        return [f"{kernel}: no claim: add one to CLAIMS"]
    rules = (*EVERY, *CLAIMS[kernel.name](kernel.call))
    return [f"{kernel}: {message}" for rule in rules if (message := rule(kernel))]


def all_broken(kernels: Iterable[TritonKernel]) -> list[str]:
    return [line for kernel in kernels for line in broken(kernel)]

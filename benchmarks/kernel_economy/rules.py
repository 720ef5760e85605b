"""The claims of every kernel family, and the check that the compiled code keeps them.

A family without an entry in `CLAIMS` is an error of its own: a new kernel says what it promises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.kernel_economy.counts import strip, strip_elements
from benchmarks.kernel_economy.limits import EXPANDED_VALUES, LANE_VALUES, WINDOW_VALUES, issued_by
from benchmarks.kernel_economy.pointwise import epilogue_of, tile_of
from benchmarks.kernel_economy.reading import Kernel

Rule = Callable[[Kernel], str | None]  # what is wrong, or None


def in_registers(kernel: Kernel) -> str | None:
    """Nothing in local memory: no spilled register, no array that is indexed at run time."""
    if kernel.stack or kernel.local or kernel.local_accesses:
        return (
            f"{kernel.stack} bytes of stack, {kernel.local} of local memory, {kernel.local_accesses} loads and stores "
            "of local memory; a kernel keeps everything in registers and shared memory"
        )
    return None


def wide_loads(at_least: int = 1) -> Rule:
    """At least so many 16-byte reads of global memory are in the code, into registers or shared memory."""

    def rule(kernel: Kernel) -> str | None:
        found = kernel.accesses("LDG")[16] + kernel.accesses("LDGSTS")[16]
        return None if found >= at_least else f"{found} loads of 16 bytes; the claim is at least {at_least}"

    return rule


def wide_stores(kernel: Kernel) -> str | None:
    """Results leave in 16-byte stores, and no store is as narrow as an element of 16 bits."""
    stores = kernel.accesses("STG")
    if not stores[16]:
        return "no store of 16 bytes"
    narrow = stores[1] + stores[2]
    return f"{narrow} stores of 1 or 2 bytes beside the wide ones" if narrow else None


def some_wide_stores(at_least: int) -> Rule:
    """At least so many 16-byte stores are in the code; so may be narrow ones, for channels that do not divide."""

    def rule(kernel: Kernel) -> str | None:
        found = kernel.accesses("STG")[16]
        return None if found >= at_least else f"{found} stores of 16 bytes; the claim is at least {at_least}"

    return rule


def overlaps_safely(kernel: Kernel) -> str | None:
    """A launch may start before the one ahead of it has ended: nothing is read through the read-only path.

    That no global memory is touched before the wait is what the race checker of the emulator holds (race.cpp).
    """
    read_only = sum(times for name, times in kernel.instructions.items() if "CONSTANT" in name.split("."))
    if read_only:
        return f"{read_only} loads through the read-only path, while the launch ahead may still write"
    if kernel.arch >= 90 and not kernel.count("ACQBULK"):
        return "no wait for the launch ahead (ACQBULK)"
    return None


def copies_asynchronously(kernel: Kernel) -> str | None:
    """Global memory goes to shared memory by 16-byte cp.async."""
    found = kernel.accesses("LDGSTS")
    return None if found[16] and not (found.total() - found[16]) else "no 16-byte cp.async, or a narrower one beside it"


def tensor_cores(kernel: Kernel) -> str | None:
    """Products run on the tensor cores; HMMA has its factors by ldmatrix where the type has 16 bits."""
    if not (kernel.count("HMMA") or kernel.count("HGMMA")):
        return "no tensor-core instruction (HMMA, HGMMA)"
    if kernel.element_bytes == 2 and kernel.count("HMMA") and not kernel.count("LDSM"):
        return "no ldmatrix (LDSM)"
    return None


def exact_products(kernel: Kernel) -> str | None:
    """Float32 products by fused multiply-add, not on the tensor cores."""
    if kernel.count("HMMA") or kernel.count("HGMMA"):
        return "tensor-core instructions in a kernel that promises exact float32"
    return None if kernel.count("FFMA") else "no fused multiply-add (FFMA)"


def adds_in_order(kernel: Kernel) -> str | None:
    """No atomic addition of floats, whose order would differ from run to run."""
    found = [
        name
        for name in kernel.instructions
        if name.split(".")[0] in ("RED", "ATOM", "ATOMG", "ATOMS", "REDG")
        and {"F32", "F64", "F16x2"} & set(name.split("."))
    ]
    return f"atomic additions of floats: {', '.join(sorted(found))}" if found else None


def training_tile_stored_wide(kernel: Kernel) -> str | None:
    """Every pixel of a thread's strip is stored by one instruction of 16 bytes."""
    size, stride = int(kernel.arguments[1]), int(kernel.arguments[2])
    pixels = 7 if kernel.family == "training_depthwise" and size and stride == 1 else 4  # trained_strip in training.h
    found = kernel.accesses("STG")[16]
    return None if found >= pixels else f"{found} stores of 16 bytes for {pixels} pixels of a strip"


def training_products(kernel: Kernel) -> str | None:
    """The multiply-adds of a row of taps are in the code one after the other, of a strip or, backward, of both
    gradients: nothing is looked up by an index.
    """
    size, stride = int(kernel.arguments[1]), int(kernel.arguments[2])
    vector = 16 // kernel.element_bytes
    pixels = 7 if stride == 1 else 4
    # Backward: 4 pixels of the input by the taps that reach them, and 4 results by a row of taps.
    wanted = size * vector * (pixels if kernel.family == "training_depthwise" else 4 // stride + 4)
    found = kernel.count("FFMA")
    return None if found >= wanted else f"{found} FFMA; the claim is at least {wanted}"


def resident_threads(at_least: int) -> Rule:
    """Registers leave room for so many threads on a multiprocessor, in blocks of the size of __launch_bounds__."""

    def rule(kernel: Kernel) -> str | None:
        if not kernel.max_threads:
            return "no __launch_bounds__"
        threads = kernel.max_threads * kernel.resident_blocks(kernel.max_threads)
        if threads >= at_least:
            return None
        return f"{kernel.registers} registers leave room for {threads} threads; the claim is {at_least}"

    return rule


def launch_bounds_kept(kernel: Kernel) -> str | None:
    """As many blocks fit on a multiprocessor, by their registers, as __launch_bounds__ asks for."""
    if not (kernel.max_threads and kernel.min_blocks):
        return "no __launch_bounds__ with a number of blocks"
    blocks = kernel.resident_blocks(kernel.max_threads)
    if blocks >= kernel.min_blocks:
        return None
    return f"{kernel.registers} registers leave room for {blocks} blocks; __launch_bounds__ says {kernel.min_blocks}"


def one_tanh_per_element(elements: Callable[[Kernel], int]) -> Rule:
    """In 16-bit types swish costs one special-function instruction: the code has one MUFU.TANH per element.

    Args:
        elements: how many elements of the result a pass through the code activates.
    """

    def rule(kernel: Kernel) -> str | None:
        if kernel.element_bytes != 2:
            return None
        found, wanted = kernel.special_functions["TANH"], elements(kernel)
        if found == wanted:
            return None
        return f"{found} MUFU.TANH for {wanted} elements; swish takes one for each"

    return rule


def stored_elements(kernel: Kernel) -> int:
    """Elements in the 16-byte stores, and one for each store as narrow as an element."""
    size = kernel.element_bytes
    stores = kernel.accesses("STG")
    return stores[16] * (16 // size) + stores[size]


def row_of_inputs(kernel: Kernel) -> str | None:
    """Every input vector under a strip and the taps in hand is read by one 16-byte load, all in the code at once."""
    size, stride = int(kernel.arguments[1]), int(kernel.arguments[2])
    taps = size or 4  # of a row; kTaps of DepthwiseTraits
    return wide_loads((strip(kernel) - 1) * stride + taps)(kernel)


def window_of_inputs(kernel: Kernel) -> str | None:
    """Every input vector under a short strip is read by one 16-byte load, all in the code at once."""
    size, stride = int(kernel.arguments[1]), int(kernel.arguments[2])
    return wide_loads(size * ((strip(kernel) - 1) * stride + size))(kernel)


def within_limits(kernel: Kernel) -> str | None:
    """No more instructions for each unit of work than limits.py allows."""
    return next((message for one in issued_by(kernel) if (message := one.broken)), None)


def lane_values(_: Kernel) -> int:
    """Values of the result that a lane of conv and conv_stem activates at once."""
    return LANE_VALUES


def strip_stored_wide(kernel: Kernel) -> str | None:
    """Every pixel of a strip is stored by one instruction of 16 bytes."""
    found = kernel.accesses("STG")[16]
    return None if found >= strip(kernel) else f"{found} stores of 16 bytes for {strip(kernel)} pixels of a strip"


QUEUE_STRIPS = (7, 2, 4, 2, 7, 2, 4, 2)  # pixels of the strips of mbconv_queue, with expansion
COPIED_STRIPS = (7, 2, 7, 2)  # the same without, of 32 channels and of 48


def group_elements(kernel: Kernel) -> int:
    """Elements that expand_depthwise activates in its code: a thread's of one fragment, of two, and of a strip."""
    return 3 * EXPANDED_VALUES + strip_elements(kernel)


def mbconv_elements(kernel: Kernel) -> int:
    """The same of mbconv, with a thread's of the depthwise convolution by tensor cores."""
    return 3 * EXPANDED_VALUES + int(kernel.arguments[3]) * WINDOW_VALUES


def queue_elements(kernel: Kernel) -> int:
    """Elements that mbconv_queue activates in its code: those of every expand_depthwise, of strips without expansion,
    and a vector of a thread in each of the tiles whose sums go through shared memory (pointwise_item_built in
    pointwise.h)."""
    return sum(3 * EXPANDED_VALUES + 8 * pixels for pixels in QUEUE_STRIPS) + 8 * sum(COPIED_STRIPS) + 2 * 8


def tile_stored_wide(kernel: Kernel) -> str | None:
    """A thread's values of a row are stored by one instruction for each 16 bytes, what is left of a warp's columns by
    one of 8 or 4 bytes, where there are so few.
    """
    tile = tile_of(kernel)
    fragments, lines = tile.columns // tile.warps_n // 8, 2 * (tile.rows // tile.warps_m // 16)
    wanted = Counter({16: lines * (fragments // 4), 8: lines * (fragments % 4 // 2), 4: lines * (fragments % 2)})
    found = kernel.accesses("STG")
    return None if found == wanted else f"stores by bytes {dict(found)}; a tile takes {dict(wanted)}"


def tile_elements(kernel: Kernel) -> int:
    """Elements that the code of a pointwise kernel activates by swish: all of a thread's, none, or a vector."""
    tile = tile_of(kernel)
    columns = tile.columns // tile.warps_n
    if epilogue_of(kernel) == "any":
        return min(columns // 4, 8)
    return tile.rows // tile.warps_m * columns // 32 if epilogue_of(kernel) == "silu" else 0


@dataclass(frozen=True)
class Claim:
    """The claim of the kernels whose whole name matches ``pattern``.

    Attributes:
        says: the claim in words, for docs/kernels.md.
    """

    pattern: str
    says: str
    rules: tuple[Rule, ...]

    def broken(self, kernel: Kernel) -> list[str]:
        """Return which parts of the claim, and of the rules for every kernel, are broken."""
        return [message for rule in (in_registers, overlaps_safely, *self.rules) if (message := rule(kernel))]


_TYPE16 = "(?:bfloat16|float16)"

# The first pattern that matches counts: the wide paths before the general ones.
CLAIMS: tuple[Claim, ...] = (
    Claim(
        rf"depthwise_strips<{_TYPE16}, [03579], [12], [47]>",
        "16-byte loads of every input, 16-byte stores, 3 blocks of 128 threads; instructions within their limits",
        (
            *(row_of_inputs, wide_stores, strip_stored_wide, within_limits),
            *(launch_bounds_kept, resident_threads(384), one_tanh_per_element(strip_elements)),
        ),
    ),
    Claim(
        r"depthwise_strips<float32, [03579], [12], [47]>",
        "16-byte loads of every input, 16-byte stores, 4 blocks of 128 threads",
        (row_of_inputs, wide_stores, strip_stored_wide, launch_bounds_kept, resident_threads(512)),
    ),
    Claim(
        r"depthwise_strips<\w+, [35], [12], 2>",
        "16-byte loads of a whole window before its first use, 16-byte stores, 2 blocks of 128 threads; instructions "
        "within their limits (16-bit types)",
        (
            *(window_of_inputs, wide_stores, strip_stored_wide, within_limits),
            *(launch_bounds_kept, resident_threads(256), one_tanh_per_element(strip_elements)),
        ),
    ),
    Claim(
        rf"depthwise_any<(?:{_TYPE16}, 8|float32, 4)>",
        "16-byte loads and stores, 4 blocks of 128 threads",
        (wide_loads(), wide_stores, launch_bounds_kept, resident_threads(512), one_tanh_per_element(stored_elements)),
    ),
    Claim(
        r"depthwise_any<\w+, 1>",
        "any channel count: element by element, 4 blocks of 128 threads",
        (launch_bounds_kept, resident_threads(512)),
    ),
    Claim(
        r"depthwise_resident<\w+, [35], [12], [47], (?:true|false)>",
        "16-byte loads of every input, 16-byte stores, one block of 256 threads beside the result that it holds",
        (row_of_inputs, wide_stores, launch_bounds_kept, resident_threads(256), one_tanh_per_element(strip_elements)),
    ),
    Claim(
        rf"pointwise<{_TYPE16}, 0, \d+, [01], false>",
        "16-byte cp.async, tensor cores, a store for each 16 bytes of a thread's columns, the blocks that its tile "
        "claims; instructions within their limits",
        (
            *(copies_asynchronously, tensor_cores, tile_stored_wide, launch_bounds_kept),
            *(one_tanh_per_element(tile_elements), within_limits),
        ),
    ),
    Claim(
        rf"pointwise<{_TYPE16}, 0, \d+, 2, false>",
        "16-byte cp.async, tensor cores, the blocks that its tile claims, one copy of the activations",
        (copies_asynchronously, tensor_cores, launch_bounds_kept, one_tanh_per_element(tile_elements)),
    ),
    Claim(
        rf"pointwise_pool<{_TYPE16}, 0, \d+, [12], false>",
        "16-byte cp.async, tensor cores, the blocks that its tile claims, one copy of the activations",
        (copies_asynchronously, tensor_cores, launch_bounds_kept, one_tanh_per_element(tile_elements)),
    ),
    Claim(
        rf"expand_depthwise<{_TYPE16}, [35], [12], [247]>",
        "16-byte cp.async, tensor cores, 16-byte stores of every pixel, 3 blocks of 128 threads; instructions within "
        "their limits",
        (
            *(copies_asynchronously, tensor_cores, wide_stores, strip_stored_wide, within_limits),
            *(launch_bounds_kept, resident_threads(384), one_tanh_per_element(group_elements)),
        ),
    ),
    Claim(
        rf"mbconv_queue<{_TYPE16}>",
        "16-byte cp.async, tensor cores, 16-byte stores, 3 blocks of 128 threads; the code of every expand_depthwise "
        "and of pointwise for every tile of 128 threads and up to 64 columns",
        (
            *(copies_asynchronously, tensor_cores, wide_stores, adds_in_order),
            *(launch_bounds_kept, resident_threads(384), one_tanh_per_element(queue_elements)),
        ),
    ),
    Claim(
        rf"mbconv<{_TYPE16}, [35], [12], (?:4|14)>",
        "16-byte cp.async, tensor cores, 16-byte stores, one block of 256 threads beside the image that it holds",
        (
            *(copies_asynchronously, tensor_cores, wide_stores, launch_bounds_kept, resident_threads(256)),
            one_tanh_per_element(mbconv_elements),
        ),
    ),
    Claim(
        rf"mbconv_stack<{_TYPE16}>",
        "16-byte cp.async, tensor cores, 16-byte stores, one block of 256 threads; the code of mbconv for "
        "every kernel size, stride and window",
        (copies_asynchronously, tensor_cores, wide_stores, launch_bounds_kept, resident_threads(256)),
    ),
    Claim(
        r"pointwise_pool<float32, 1, \d+, 2, false>",
        "16-byte cp.async, tensor cores, the blocks that its tile claims",
        (copies_asynchronously, tensor_cores, launch_bounds_kept),
    ),
    Claim(
        r"pointwise_pool<float32, 2, \d+, 2, false>",
        "16-byte cp.async, exact multiply-adds, 3 blocks",
        (copies_asynchronously, exact_products, launch_bounds_kept),
    ),
    Claim(
        r"pointwise<float32, 1, \d+, 2, false>",
        "16-byte cp.async, tensor cores, 16-byte stores, the blocks that its tile claims",
        (copies_asynchronously, tensor_cores, wide_stores, launch_bounds_kept),
    ),
    Claim(
        r"pointwise<float32, 2, \d+, 2, false>",
        "16-byte cp.async, exact multiply-adds, 16-byte stores, 3 blocks",
        (copies_asynchronously, exact_products, wide_stores, launch_bounds_kept),
    ),
    Claim(
        r"pointwise(?:_pool)?<\w+, [01], \d+, 2, true>",
        "any type and alignment: element by element, tensor cores",
        (tensor_cores, launch_bounds_kept),
    ),
    Claim(
        r"pointwise(?:_pool)?<float32, 2, \d+, 2, true>",
        "any type and alignment: element by element, exact multiply-adds",
        (exact_products, launch_bounds_kept),
    ),
    Claim(
        rf"conv_stem<{_TYPE16}>",
        "16-byte loads and stores, tensor cores, 3 blocks of 256 threads; instructions within their limits",
        (
            *(wide_loads(3), some_wide_stores(4), tensor_cores, within_limits),
            *(launch_bounds_kept, resident_threads(768), one_tanh_per_element(lane_values)),
        ),
    ),
    Claim(
        r"conv_stem<float32>",
        "16-byte loads and stores, exact multiply-adds, 3 blocks of 256 threads",
        (wide_loads(3), some_wide_stores(8), exact_products, launch_bounds_kept),
    ),
    Claim(
        rf"conv<{_TYPE16}>",
        "tensor cores, 3 blocks of 256 threads, 16-byte stores where the channels divide",
        (
            *(some_wide_stores(4), tensor_cores, launch_bounds_kept, resident_threads(768)),
            one_tanh_per_element(lane_values),
        ),
    ),
    Claim(r"conv<float32>", "exact multiply-adds, 3 blocks of 256 threads", (exact_products, launch_bounds_kept)),
    Claim(
        rf"(?:norm_act|scale_by_gate)<(?:{_TYPE16}, 8|float32, 4)>",
        "16-byte loads and stores, 1024 threads",
        (wide_loads(), wide_stores, resident_threads(1024)),
    ),
    Claim(r"(?:norm_act|scale_by_gate)<\w+, 1>", "element by element, 1024 threads", (resident_threads(1024),)),
    Claim(r"squeeze_excite_gate<\w+>", "2 blocks of 256 threads", (launch_bounds_kept, resident_threads(512))),
    Claim(
        rf"training_product<{_TYPE16}, 0, \d+, [02], false>",
        "16-byte cp.async, tensor cores, 16-byte stores, the blocks that its tile claims, no atomic addition of floats",
        (copies_asynchronously, tensor_cores, some_wide_stores(1), launch_bounds_kept, adds_in_order),
    ),
    Claim(
        r"training_product<float32, 1, \d+, 2, false>",
        "16-byte cp.async, tensor cores, 16-byte stores, the blocks that its tile claims, no atomic addition of floats",
        (copies_asynchronously, tensor_cores, some_wide_stores(1), launch_bounds_kept, adds_in_order),
    ),
    Claim(
        r"training_product<float32, 2, \d+, 2, false>",
        "16-byte cp.async, exact multiply-adds, 16-byte stores, 3 blocks, no atomic addition of floats",
        (copies_asynchronously, exact_products, some_wide_stores(1), launch_bounds_kept, adds_in_order),
    ),
    Claim(
        r"training_product<\w+, [01], \d+, 2, true>",
        "any type and alignment: element by element, tensor cores, no atomic addition of floats",
        (tensor_cores, launch_bounds_kept, adds_in_order),
    ),
    Claim(
        r"training_product<float32, 2, \d+, 2, true>",
        "any type and alignment: element by element, exact multiply-adds, no atomic addition of floats",
        (exact_products, launch_bounds_kept, adds_in_order),
    ),
    Claim(
        r"training_(?:running|norm_gradient|excite|excite_backward|excite_parameters|product_weights|product_gradient)",
        "vectors of channels and small matrices: 1024 threads, no atomic addition of floats",
        (resident_threads(1024), adds_in_order),
    ),
    Claim(
        rf"training_statistics<(?:{_TYPE16}, 8|float32, 4)>",
        "8 loads of 16 bytes before the first is used, 2 blocks of 256 threads, no atomic addition of floats",
        (wide_loads(8), launch_bounds_kept, resident_threads(512), adds_in_order),
    ),
    Claim(
        rf"training_(?:norm_act|norm_backward)<(?:{_TYPE16}, 8|float32, 4)>",
        "16-byte loads and stores, 3 blocks of 256 threads",
        (wide_loads(2), wide_stores, launch_bounds_kept, resident_threads(768)),
    ),
    Claim(
        rf"training_squeeze<(?:{_TYPE16}, 8|float32, 4)>",
        "16-byte loads of two pixels at once, 2 blocks of 256 threads, no atomic addition of floats",
        (wide_loads(2), launch_bounds_kept, resident_threads(512), adds_in_order),
    ),
    Claim(
        rf"training_gradient_sums<(?:{_TYPE16}, 8|float32, 4)>",
        "16-byte loads and stores, 2 blocks of 256 threads, no atomic addition of floats",
        (wide_loads(2), wide_stores, launch_bounds_kept, resident_threads(512), adds_in_order),
    ),
    Claim(
        rf"training_depthwise(?:_backward)?<(?:{_TYPE16}, [35], [12], 8|float32, [35], [12], 4)>",
        "16-byte cp.async, a 16-byte store for each pixel of a strip, 3 blocks of 128 threads, the multiply-adds of a "
        "row of taps without a loop, no atomic addition of floats",
        (
            *(copies_asynchronously, training_tile_stored_wide, training_products),
            *(launch_bounds_kept, resident_threads(384), adds_in_order),
        ),
    ),
    Claim(
        rf"training_depthwise(?:_backward)?<(?:{_TYPE16}, 0, [12], 8|float32, 0, [12], 4)>",
        "16-byte cp.async, a 16-byte store for each pixel of a strip, 3 blocks of 128 threads, no atomic addition of "
        "floats",
        (copies_asynchronously, training_tile_stored_wide, launch_bounds_kept, resident_threads(384), adds_in_order),
    ),
    Claim(
        r"training_\w+<\w+(?:, 0, [12])?, 1>",
        "any channel count: element by element, as many blocks as asked for, no atomic addition of floats",
        (launch_bounds_kept, adds_in_order),
    ),
)


def claim_of(kernel: Kernel, claims: Sequence[Claim] = CLAIMS) -> Claim | None:
    """Return the first claim whose pattern matches the kernel's whole name."""
    return next((claim for claim in claims if re.fullmatch(claim.pattern, kernel.name)), None)


def broken_claims(kernels: Iterable[Kernel], claims: Sequence[Claim] = CLAIMS) -> list[str]:
    """Return one line for everything that is not as claimed, and for every kernel without a claim."""
    lines = []
    for kernel in kernels:
        claim = claim_of(kernel, claims)
        broken = ["no claim: add one to CLAIMS"] if claim is None else claim.broken(kernel)
        lines += [f"{kernel.name} (sm_{kernel.arch}): {message}" for message in broken]
    return lines

"""The emulator computes what CUDA defines: conversions to the bit, warp and matrix instructions against their
definitions, atomics, barriers, and the errors of the approximate instructions within their documented bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulation.control import COPIES, ORDERS, Emulation, Emulator
from torch import Tensor

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(params=ORDERS)
def in_order(request: pytest.FixtureRequest, emulated: Emulator) -> Emulator:
    emulated.configure(Emulation(request.param, flavour=emulated.flavour))
    return emulated


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit; a NaN is like any other NaN."""
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


def run(emulated: Emulator, name: str, input: Tensor | None, output: Tensor, n: int = 0, **options) -> Tensor:
    assert emulated.run(name, input, output, n, **options) == "cudaSuccess"
    return output


def every_float_near(dtype: torch.dtype) -> Tensor:
    """Every finite value of `dtype`, the middle between it and the next, the floats beside the middle, and others."""
    bits = torch.arange(0x8000, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    values = values[values.isfinite()]
    middles = (values[:-1].double() + values[1:].double()).div(2).float()
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    beyond = torch.tensor([65519.0, 65520.0, 65521.0, 3.3961e38, 3.4e38, 1e-45, 1e-40, torch.inf, torch.nan])
    anything = torch.randint(-(2**31), 2**31, (100_000,), generator=generator()).to(torch.int32).view(torch.float32)
    found = torch.cat([values, middles, middles.nextafter(up), middles.nextafter(down), beyond, anything])
    return torch.cat([found, -found])


@pytest.mark.parametrize("name", HALVES)
def test_conversion_to_float(emulated: Emulator, name: str) -> None:
    """All 65536 of them."""
    halves = torch.arange(-0x8000, 0x8000).to(torch.int16).view(HALVES[name])
    floats = run(emulated, f"{name}_to_float", halves, torch.empty(0x10000), 0x10000)
    assert same_bits(floats, halves.float())


@pytest.mark.parametrize("name", HALVES)
def test_conversion_from_float(emulated: Emulator, name: str) -> None:
    floats = every_float_near(HALVES[name])
    halves = run(emulated, f"float_to_{name}", floats, torch.empty(floats.numel(), dtype=HALVES[name]), floats.numel())
    assert same_bits(halves, floats.to(HALVES[name]))


@pytest.mark.parametrize("name", HALVES)
def test_packed_arithmetic_rounds_once(emulated: Emulator, name: str) -> None:
    dtype = HALVES[name]
    pairs = 2048
    x = (torch.randn(3, 2 * pairs, generator=generator()) * 2.0 ** torch.randint(-9, 7, (3, 2 * pairs))).to(dtype)
    output = run(emulated, f"packed_{name}", x, torch.empty(3, 2 * pairs, dtype=dtype), pairs)
    a, b, c = x.double()
    # Where float64 holds the exact result, rounding it once is the definition. It does for products and, at these
    # exponents, for sums.
    for found, exact in zip(output, (a * b + c, a * b, a + b), strict=True):
        nearest = exact.to(dtype)
        neighbours = torch.stack(
            [nearest.nextafter(torch.full_like(nearest, side)) for side in (-torch.inf, torch.inf)]
        )
        error = (found.double() - exact).abs()
        assert (error <= (neighbours.double() - exact).abs().amin(0)).all()
        assert (error <= (nearest.double() - exact).abs()).all()


def test_tf32(emulated: Emulator) -> None:
    """10 bits of mantissa, to nearest, ties away from zero."""
    floats = torch.randn(4096, generator=generator())
    ties = (floats.view(torch.int32) & ~0x1FFF | 0x1000).view(torch.float32)
    x = torch.cat([floats, ties, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    bits = run(emulated, "float_to_tf32", x, torch.empty(x.numel(), dtype=torch.int32), x.numel())
    found = bits.view(torch.float32)
    assert same_bits(found[-5:], x[-5:])
    found, x = found[:-5].double(), x[:-5].double()
    assert (bits[:-5] & 0x1FFF == 0).all()
    unit = 2.0 ** (x.abs().log2().floor() - 10)
    magnitude = (x.abs() / unit + 0.5).floor() * unit
    assert torch.equal(found, magnitude.copysign(x))


@pytest.mark.parametrize(
    ("name", "exact", "bound"),
    [
        ("tanh_approx", torch.tanh, lambda x: torch.full_like(x, 2.0**-11)),
        ("expf", torch.exp, lambda x: (2 + (1.173 * x).abs().floor()) * 2.0**-23 + 2.0**-23),
        ("fdividef", lambda x: 3 / x, lambda x: torch.full_like(x, 2.0**-22 + 2.0**-23)),
    ],
)
def test_approximations(
    emulated: Emulator, name: str, exact: Callable[[Tensor], Tensor], bound: Callable[[Tensor], Tensor]
) -> None:
    """As wrong as the instruction may be, and no more: a tolerance that holds here holds on a GPU."""
    x = torch.randn(20_000, generator=generator()) * 8
    found = run(emulated, name, x, torch.empty_like(x), x.numel())
    error = (found.double() / exact(x.double()) - 1).abs()
    assert (error <= bound(x.double())).all()
    assert (error > bound(x.double()) / 4).float().mean() > 0.2
    assert torch.equal(found, run(emulated, name, x, torch.empty_like(x), x.numel()))
    ends = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    assert same_bits(run(emulated, name, ends, torch.empty_like(ends), ends.numel()), exact(ends))


def test_fast_division_by_the_largest_numbers(emulated: Emulator) -> None:
    """Between 2^126 and 2^128 the GPU's quotient is 0."""
    x = torch.tensor([2.0**126, 2.0**127, -(2.0**127)])
    found = run(emulated, "fdividef", x, torch.empty_like(x), x.numel())
    assert found[0] == pytest.approx(3 * 2.0**-126)
    assert found[1:].tolist() == [0, 0]


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(in_order: Emulator, transposed: bool) -> None:
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16, generator=generator())
    output = torch.empty(32, 4, 2, dtype=torch.int16)
    run(in_order, "ldmatrix_trans" if transposed else "ldmatrix", matrices, output, shared_bytes=512)
    wanted = matrices.mT if transposed else matrices
    # Lane 4i + j holds row i, columns 2j and 2j + 1, of each matrix.
    assert torch.equal(output, wanted.reshape(4, 32, 2).transpose(0, 1))


@pytest.mark.parametrize("name", HALVES)
def test_mma_of_16_bit_factors(in_order: Emulator, name: str) -> None:
    dtype = HALVES[name]
    a, b = (torch.randn(shape, generator=generator()).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator())
    operands = torch.cat([a.flatten(), b.flatten(), c.flatten().view(dtype)])
    d = run(in_order, f"mma_{name}", operands, torch.empty(16, 8))
    torch.testing.assert_close(d.double(), a.double() @ b.double() + c.double(), rtol=1e-6, atol=1e-5)


def test_mma_of_tf32_factors(in_order: Emulator) -> None:
    """The factors are cut, not rounded, to TF32, if the kernel does not round them."""
    a, b = (torch.randn(shape, generator=generator()) for shape in ((16, 8), (8, 8)))
    c = torch.randn(16, 8, generator=generator())
    operands = torch.cat([a.flatten(), b.flatten(), c.flatten()])

    def cut(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    def rounded(x: Tensor) -> Tensor:
        return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32).double()

    for n, factor in enumerate((cut, rounded)):
        d = run(in_order, "mma_tf32", operands, torch.empty(16, 8), n)
        torch.testing.assert_close(d.double(), factor(a) @ factor(b) + c.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shuffles(in_order: Emulator, n: int) -> None:
    x = torch.randint(1000, (32,), dtype=torch.int32, generator=generator())
    output = run(in_order, "shuffles", x, torch.empty(32, 4, dtype=torch.int32), n)
    for lane in range(32):
        segment, place = lane & ~7, lane & 7
        wanted = [
            x[segment + n],
            x[lane ^ n],
            x[lane + n] if place + n < 8 else x[lane],
            x[lane - n] if place >= n else x[lane],
        ]
        assert output[lane].tolist() == [int(w) for w in wanted]


@pytest.mark.parametrize("pattern", [0, 1, 0x00F3A5FF, 0xFFFF0000, 0xFFFFFFFF])
def test_votes(in_order: Emulator, pattern: int) -> None:
    x = torch.tensor([pattern >> lane & 1 for lane in range(32)], dtype=torch.int32)
    output = run(in_order, "votes", x, torch.empty(32, 3, dtype=torch.int32))
    for lane in range(32):
        half = 0x0000FFFF if lane < 16 else 0xFFFF0000
        assert int(output[lane, 0]) & 0xFFFFFFFF == pattern & half
        assert output[lane, 1:].tolist() == [pattern & half != 0, pattern & half == half]


def test_atomics(in_order: Emulator) -> None:
    output = torch.zeros(7, dtype=torch.int32)
    output[3], output[5] = -100, 1
    run(in_order, "atomics", None, output, grid=5, block=64)
    threads = range(5 * 64)
    product = pow(3, len(threads), 2**32)
    assert output.tolist() == [
        sum(threads),
        len(threads) % 10,
        max(t * 7919 % 1000 for t in threads),
        len(threads) - 1 - 5,
        -len(threads),
        product - 2**32 * (product >= 2**31),
        1234,
    ]


@pytest.mark.parametrize("copies", COPIES)
def test_grid_barrier(in_order: Emulator, copies: str) -> None:
    in_order.module.set_copies(copies)
    blocks, rounds = 40, 3
    output = torch.zeros(1 + 2 * blocks, dtype=torch.int32)
    run(in_order, "grid_barrier", None, output, rounds, grid=blocks, cooperative=True)
    assert output[0] == 2 * rounds * blocks
    assert output[1 + blocks :].tolist() == [100 * (rounds - 1) + (i + 1) % blocks for i in range(blocks)]


def test_orders_differ_and_seeds_repeat(emulated: Emulator) -> None:
    """The block of 64 that runs last differs between forward, reverse and each seed."""

    def last_written(order: str, seed: int) -> float:
        emulated.configure(Emulation(order, seed=seed, flavour=emulated.flavour))
        output = torch.zeros(4096)
        run(emulated, "last_block_to_start", None, output, grid=64)
        return float(output[0])

    assert last_written("forward", 1) == 63
    assert last_written("reverse", 1) == 0
    random = [last_written("random", seed) for seed in range(8)]
    assert random == [last_written("random", seed) for seed in range(8)]
    assert len(set(random)) > 3

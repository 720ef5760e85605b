"""Every operator on every backend is as exact as PyTorch itself (parity.py), at ordinary and at odd shapes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import op_cases
import pytest
import torch
from conftest import FLAVOUR, THOROUGH, Backend, need
from hypothesis import example, given, settings
from hypothesis import strategies as st
from op_cases import (
    ALL_OPS,
    BLOCK_OP,
    DEPTHWISE_OPS,
    DTYPES,
    EXPAND_OP,
    IMAGE_OPS,
    LAYOUTS,
    ODD_CHANNELS,
    ODD_PLANES,
    OTHER_KERNELS,
    POOL_OP,
    SQUARE_KERNELS,
    Case,
)
from parity import Errors, assert_exact_channels_last, assert_within, errors, joined
from torch import Tensor

import effkernels

# An output of a few elements is judged by luck: draws are joined until there are this many elements in the first
# output, or as often as DRAWS. PyTorch's own error in a smaller output (the means, a gate) is the largest of several
# such sets of draws, each as large as what it is the yardstick of.
ENOUGH_ELEMENTS = 2048
DRAWS = 16

ACTIVATIONS = effkernels.ops.reference.ACTIVATIONS
GATES = effkernels.ops.reference.GATES


@dataclass
class Draw:
    """The arguments of one call and what the yardsticks make of them.

    Attributes:
        same_dtype: the outputs of plain PyTorch in the same dtype, in each of its ways: on the device, and on the CPU.
    """

    arguments: dict[str, Any]
    same_dtype: tuple[tuple[Tensor, ...], ...]
    truth: tuple[Tensor, ...]

    def ways(self, output: int) -> list[Tensor]:
        """Return one output in each of PyTorch's ways."""
        return [outputs[output] for outputs in self.same_dtype]


@lru_cache(maxsize=64)  # the backends of one case follow each other (conftest.py) and share its yardsticks
def drawn(case: Case, seed: int, device: str) -> Draw:
    arguments = case.draw(seed, device)
    # cuDNN's sums of few channels are exact by chance, and those of other orders are as right.
    placed = [arguments] if device == "cpu" else [arguments, op_cases.on_cpu(arguments)]
    with op_cases.one_thread():
        same_dtype = tuple(op_cases.run(effkernels.ops.reference, case, one) for one in placed)
        return Draw(arguments, same_dtype, op_cases.truth(case, arguments))


def check(case: Case, backend: Backend) -> None:
    """Assert the tolerance rule, the strides and the repeatability of one case on one backend."""
    need(backend, case.op, case.dtype)
    if FLAVOUR in ("race", "asan"):
        # They watch accesses, which depend on no value: one draw shows all. The plain flavour judges the values of the
        # very same kernels.
        with op_cases.one_thread():
            for y in op_cases.run(effkernels.ops, case, case.draw(0, backend.device)):
                if y.dim() == 4:
                    assert_exact_channels_last(y)
        return
    results, yardsticks = [], []
    for seed in range(DRAWS):
        draw = drawn(case, seed, backend.device)
        with op_cases.one_thread():
            outputs = op_cases.run(effkernels.ops, case, draw.arguments)
        if seed == 0:
            again = op_cases.run(effkernels.ops, case, draw.arguments)
            assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True)), "two runs differ"
        for y, wanted in zip(outputs, draw.truth, strict=True):
            assert y.shape == wanted.shape
            if y.dim() == 4:
                assert_exact_channels_last(y)
        results.append(outputs)
        yardsticks.append(draw)
        if (seed + 1) * outputs[0].numel() >= ENOUGH_ELEMENTS or outputs[0].numel() == 0:
            break
    for i in range(len(results[0])):
        mine = joined([outputs[i] for outputs in results])
        truth = joined([draw.truth[i] for draw in yardsticks])
        own = errors_of_ways(yardsticks, i, truth)
        if mine.numel() < ENOUGH_ELEMENTS:
            own += own_errors(case, i, len(yardsticks), backend.device)
        assert_within(mine, own, truth, f"{case}, output {i}")


def errors_of_ways(draws: Sequence[Draw], output: int, truth: Tensor) -> list[Errors]:
    """PyTorch's own error in an output of several draws together, in each of its ways."""
    return [errors(joined(several), truth) for several in zip(*(draw.ways(output) for draw in draws), strict=True)]


@lru_cache(maxsize=256)
def own_errors(case: Case, output: int, together: int, device: str) -> list[Errors]:
    """PyTorch's own error in an output, for several sets of `together` further draws each."""
    sets = max(4, DRAWS // together)
    draws = (drawn.__wrapped__(case, seed, device) for seed in range(together, (sets + 1) * together))
    found = []
    for several in iter(lambda: list(islice(draws, together)), []):
        found += errors_of_ways(several, output, joined([draw.truth[output] for draw in several]))
    return found


def in_turn(base: Case, **choices) -> Iterator[Case]:
    """`base` with each choice of each field in turn, the other fields as they are."""
    for name, values in choices.items():
        for value in values:
            yield base.with_(**{name: value})


def depthwise_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield from in_turn(
            Case("depthwise_bn_act", dtype),
            channels=ODD_CHANNELS,
            kernel=[(k, k) for k in SQUARE_KERNELS],
            stride=[1, 2],
            dilation=[2, 3],
            padding=[(0, 0, 0, 0), (0, 1, 0, 1), (3, 0, 2, 5), (13, 0, 0, 14)],
            activation=ACTIVATIONS,
            norm=["none", "statistics"],
            bias=[True],
            parameters=["same", "mixed"],
            batch=[0, 1, 3],
            layout=LAYOUTS,
        )
        for height, width in ODD_PLANES:
            for kernel in SQUARE_KERNELS:
                for stride in (1, 2):
                    half = kernel // 2
                    padding = (half, half + 1, half, half + 1)
                    shape = {"height": height, "width": width, "channels": 7 if kernel < 7 else 40}
                    yield Case("depthwise_bn_act", dtype, **shape, kernel=(kernel,) * 2, stride=stride, padding=padding)
        for kernel in SQUARE_KERNELS:
            for dilation in (2, 3):
                padding = (kernel, kernel, kernel + 2, kernel - 1)
                shape = {"kernel": (kernel,) * 2, "padding": padding, "height": 21, "width": 17}
                yield Case("depthwise_bn_act", dtype, **shape, dilation=dilation, stride=dilation - 1)
        yield from other_kernel_cases("depthwise_bn_act", dtype)


def other_kernel_cases(op: str, dtype: torch.dtype) -> Iterator[Case]:
    """Kernels that are not square, even or large, at stride 1 and 2, with paddings that differ and some that are larger
    than the kernel; every third dilated, or of channels that fill no vector.
    """
    for i, (height, width) in enumerate(OTHER_KERNELS):
        base = Case(op, dtype, kernel=(height, width), channels=40, height=15, width=19, bias=True)
        yield base.with_(padding=(height // 2, (height - 1) // 2, (width - 1) // 2, width // 2))  # as padding="same"
        yield base.with_(padding=(height, 0, 1, width + 3), stride=2, parameters="mixed")
        if i % 3 == 0:
            yield base.with_(padding=(height, height + 1, width + 2, width), dilation=2, stride=1 + i % 2)
        if i % 3 == 1:
            yield base.with_(padding=(2, height - 1, width - 1, 1), channels=7, stride=1 + i % 2)


def depthwise_with_squeeze_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for op in DEPTHWISE_OPS[1:]:
            base = Case(op, dtype, bias=True, kernel=(5, 5), padding=(1, 2, 1, 2), stride=2)
            yield from in_turn(
                base,
                channels=ODD_CHANNELS,
                stride=[1],
                parameters=["same", "mixed"],
                batch=[0, 1, 3],
                layout=["contiguous", "sliced"],
            )
            yield base.with_(kernel=(3, 3), height=1, width=1, padding=(1, 1, 1, 1), channels=100)
            for kernel in ((1, 11), (7, 1), (4, 3), (11, 11), (13, 13)):
                padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] - 1, 0)
                yield base.with_(kernel=kernel, padding=padding, stride=1 + (kernel[0] == 11), channels=72, width=23)
            if op != "depthwise_bn_act_squeeze":
                choices = {
                    "se_activation": ACTIVATIONS,
                    "gate_activation": GATES,
                    "reduced": [1, 33],
                    "matrix_rank": [2],
                }
                yield from in_turn(base, bias=[False], se_bias=[False], **choices)


def squeeze_excite_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield from in_turn(
            Case("squeeze_excite_gate", dtype, parameters="same"),
            channels=ODD_CHANNELS,
            reduced=[1, 8, 33],
            batch=[0, 1, 3],
            activation=ACTIVATIONS,
            gate_activation=GATES,
            matrix_rank=[2],
            se_bias=[False],
        )
        yield Case("squeeze_excite_gate", dtype, parameters="mixed", se_bias=False)


def pointwise_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        base = Case("pointwise_bn_act", dtype)
        yield from in_turn(
            base,
            channels=ODD_CHANNELS,
            out_channels=ODD_CHANNELS,
            activation=ACTIVATIONS,
            norm=["none", "statistics"],
            bias=[True],
            gated=[True],
            residual=[True],
            parameters=["same", "mixed"],
            batch=[0, 1, 3],
            layout=LAYOUTS,
        )
        full = base.with_(gated=True, residual=True, bias=True, parameters="mixed")
        yield from in_turn(full, layout=LAYOUTS, channels=[1, 7, 100, 384], out_channels=[1, 7, 100, 130], batch=[0, 5])
        for height, width in ODD_PLANES:
            yield full.with_(height=height, width=width, channels=40, out_channels=7)
        classifier = full.with_(height=1, width=1, channels=100, out_channels=40)
        yield from in_turn(classifier, layout=LAYOUTS, channels=[1, 7, 2100], out_channels=[1, 7], batch=[0, 1, 3, 23])


def pool_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        base = Case(POOL_OP, dtype, height=7, width=7, channels=40, out_channels=72, parameters="same")
        yield from in_turn(
            base,
            channels=[*ODD_CHANNELS, 320],
            out_channels=[*ODD_CHANNELS, 320],
            activation=ACTIVATIONS,
            norm=["none", "statistics"],
            bias=[True],
            parameters=["float32", "mixed"],
            batch=[0, 1, 3, 33],
            layout=LAYOUTS,
        )
        for height, width in (*ODD_PLANES, (1, 2), (8, 8), (9, 9), (10, 10), (19, 19), (33, 31)):
            for batch in (1, 3, 33) if height * width <= 100 else (1, 2):
                yield base.with_(height=height, width=width, batch=batch, channels=24, out_channels=136)
        yield base.with_(channels=7, out_channels=9, height=40, width=41, batch=1)  # converts, and parts of an image


def conv_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        base = Case("conv_bn_act", dtype, channels=3, stride=2, layout="contiguous")
        yield from in_turn(
            base,
            channels=[1, 7, 24],
            out_channels=ODD_CHANNELS,
            kernel=[(1, 1), (5, 5), (3, 2), (7, 7)],
            stride=[1, 2, 3],
            padding=[(0, 0, 0, 0), (0, 1, 0, 1), (2, 0, 1, 4)],
            activation=ACTIVATIONS,
            norm=["none", "statistics"],
            bias=[True],
            parameters=["same", "mixed"],
            batch=[0, 1, 3],
            layout=LAYOUTS,
        )
        for height, width in ODD_PLANES:
            yield base.with_(height=height, width=width, out_channels=32)
        for channels in (2, 3, 4):  # the CPU splits whole vectors of a channels_last image of few channels
            yield base.with_(channels=channels, height=5, width=53, out_channels=7, layout="channels_last")
            yield base.with_(channels=channels, height=5, width=53, out_channels=7, layout="sliced_rows", stride=1)
        # The stem of networks, which CUDA reads by vectors where rows divide by them: all of a row's ends and paddings.
        stem = base.with_(height=35, width=40, out_channels=48)
        for layout in LAYOUTS:
            yield from in_turn(
                stem.with_(layout=layout),
                width=[16, 36, 38, 72],
                padding=[(0, 0, 0, 0), (0, 1, 0, 1), (2, 0, 1, 4), (1, 3, 9, 0)],
                out_channels=[4, 7, 36],
                parameters=["same"],
            )


def expand_depthwise_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        base = Case(EXPAND_OP, dtype, channels=16, out_channels=40, kernel=(5, 5), padding=(1, 2, 1, 2), stride=2)
        yield from in_turn(
            base,
            channels=ODD_CHANNELS,
            out_channels=[1, 7, 8, 100],
            kernel=[(3, 3), (7, 7), (9, 9), (1, 7), (11, 1), (2, 4), (13, 13)],
            stride=[1],
            dilation=[2, 3],
            padding=[(0, 0, 0, 0), (3, 0, 2, 5), (13, 0, 0, 14)],
            activation=ACTIVATIONS,
            expand_activation=ACTIVATIONS,
            norm=["none", "statistics"],
            bias=[True],
            parameters=["same", "mixed"],
            batch=[0, 1, 3],
            layout=LAYOUTS,
        )
        for height, width in ODD_PLANES:
            for kernel in (3, 5):
                half = kernel // 2
                padding = (half, half + 1, half, half + 1)
                shape = {"height": height, "width": width, "channels": 7, "out_channels": 24}
                yield Case(EXPAND_OP, dtype, **shape, kernel=(kernel,) * 2, padding=padding, bias=True)
        yield base.with_(height=40, width=37, channels=24, out_channels=144, kernel=(3, 3), stride=1)


def block_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        base = Case(BLOCK_OP, dtype, channels=16, expanded=56, out_channels=24, reduced=4, height=9, width=10)
        yield from in_turn(
            base,
            channels=ODD_CHANNELS,
            expanded=[0, 7, 48, 100],
            out_channels=[1, 7, 8, 40],
            reduced=[0, 1, 3, 8],
            kernel=[(5, 5), (7, 7), (1, 7), (2, 4)],
            stride=[2],
            dilation=[2],
            padding=[(0, 0, 0, 0), (2, 0, 2, 1)],
            activation=ACTIVATIONS,
            expand_activation=ACTIVATIONS,
            se_activation=["relu"],
            gate_activation=["hard_sigmoid"],
            norm=["none", "statistics"],
            bias=[True],
            se_bias=[False],
            residual=[True],
            matrix_rank=[2],
            parameters=["same", "mixed"],
            batch=[0, 1, 3],
            layout=LAYOUTS,
        )
        for height, width in ODD_PLANES:
            yield base.with_(height=height, width=width, stride=2, residual=True, padding=(1, 2, 1, 2))
        yield from in_turn(
            base.with_(expanded=0),
            channels=[7, 24, 40],
            kernel=[(5, 5)],
            stride=[2],
            padding=[(2, 0, 2, 1)],
            reduced=[0],
            norm=["none"],
            batch=[0, 3],
            layout=["contiguous", "sliced"],
        )


def unique(cases: Iterator[Case]) -> list[object]:
    return [pytest.param(case, id=str(case)) for case in dict.fromkeys(cases)]


@pytest.mark.parametrize("case", unique(depthwise_cases()))
def test_depthwise(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", unique(depthwise_with_squeeze_cases()))
def test_depthwise_with_squeeze(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", unique(squeeze_excite_cases()))
def test_squeeze_excite(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", unique(pointwise_cases()))
def test_pointwise(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", unique(pool_cases()))
def test_pointwise_pool(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", unique(conv_cases()))
def test_conv(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", unique(expand_depthwise_cases()))
def test_expand_depthwise(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", unique(block_cases()))
def test_block(case: Case, backend: Backend) -> None:
    check(case, backend)


@st.composite
def any_case(draw) -> Case:
    op = draw(st.sampled_from(ALL_OPS))
    square = st.sampled_from(SQUARE_KERNELS).map(lambda size: (size, size))
    any_kernel = st.tuples(*(st.integers(1, 13 if "depthwise" in op else 5),) * 2)
    kernel = draw(square | any_kernel) if "depthwise" in op else draw(any_kernel)
    dilation = draw(st.integers(1, 3)) if "depthwise" in op else 1
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    padding = [draw(st.integers(0, max(kernel))) for _ in range(4)]
    padding[0] += max(0, (kernel[0] - 1) * dilation + 1 - height - padding[0] - padding[1])
    padding[3] += max(0, (kernel[1] - 1) * dilation + 1 - width - padding[2] - padding[3])
    return Case(
        op,
        draw(st.sampled_from(DTYPES)),
        batch=draw(st.integers(0, 4)),
        channels=draw(st.integers(1, 70)),
        out_channels=draw(st.integers(1, 70)),
        reduced=draw(st.integers(1, 20)),
        height=height,
        width=width,
        kernel=kernel,
        stride=draw(st.sampled_from((1, 2))),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dilation=dilation,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        expand_activation=draw(st.sampled_from(ACTIVATIONS)),
        se_activation=draw(st.sampled_from(ACTIVATIONS)),
        gate_activation=draw(st.sampled_from(GATES)),
        norm=draw(st.sampled_from(("full", "statistics", "none"))),
        bias=draw(st.booleans()),
        se_bias=draw(st.booleans()),
        gated=draw(st.booleans()),
        residual=draw(st.booleans()),
        parameters="same" if op == "squeeze_excite_gate" else draw(st.sampled_from(("float32", "same", "mixed"))),
        matrix_rank=draw(st.sampled_from((2, 4))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@settings(max_examples=200)
@given(case=any_case())
# A sum of 140 products, which lost too many digits where they were added one after the other.
@example(
    case=Case(
        "conv_bn_act",
        channels=35,
        out_channels=35,
        height=5,
        width=19,
        kernel=(2, 2),
        stride=2,
        padding=(0, 0, 0, 0),
        activation="identity",
    )
)
def test_any_shape(case: Case, backends_together: list[Backend]) -> None:
    """Cases take turns on the orders of emulated threads, two emulations each, as neighbouring parameters do."""
    emulated = [backend for backend in backends_together if backend.emulated is not None]
    orders = max(1, len(emulated) // 2)
    turn = zlib.crc32(repr(case).encode()) % orders
    for backend in backends_together:
        in_turn = THOROUGH or backend not in emulated or emulated.index(backend) // 2 == turn
        if in_turn and backend.runs(case.op, case.dtype).ok:
            with backend.active():
                check(case, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", IMAGE_OPS)
@pytest.mark.parametrize("layout", ["sliced", "sliced_rows"])
def test_nothing_around_a_sliced_input_is_touched(op: str, layout: str, dtype: torch.dtype, backend: Backend) -> None:
    """The storage around the slice is NaN: whatever reads it into a result, or writes to it, is found."""
    need(backend, op, dtype)
    for channels in ODD_CHANNELS:
        case = Case(op, dtype, channels=channels, layout=layout, residual=True)
        arguments = case.draw(0, backend.device)
        copies = {name: t.clone() for name, t in op_cases.tensors(arguments)}
        outputs = op_cases.run(effkernels.ops, case, arguments)
        assert all(torch.isfinite(y).all() for y in outputs)
        for name in ("x", "residual"):
            if name in arguments:
                op_cases.assert_surroundings_untouched(arguments[name], copies[name])
        for name, t in op_cases.tensors(arguments):
            assert torch.equal(t, copies[name]), f"{name} was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_every_element_is_written(op: str, dtype: torch.dtype, backend: Backend) -> None:
    """New memory comes filled with NaN here, so that an element left out shows."""
    need(backend, op, dtype)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(4, device=backend.device).isnan().all()
        for channels in ODD_CHANNELS:
            for height, width in ODD_PLANES:
                case = Case(op, dtype, channels=channels, out_channels=channels, height=height, width=width)
                outputs = op_cases.run(effkernels.ops, case, case.draw(0, backend.device))
                assert all(torch.isfinite(y).all() for y in outputs)
    finally:
        torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_nan_spreads_as_in_pytorch(op: str, dtype: torch.dtype, backend: Backend) -> None:
    """One NaN in an input makes NaN of exactly those elements of which PyTorch makes it."""
    need(backend, op, dtype)
    for activation in ACTIVATIONS:
        case = Case(op, dtype, activation=activation, se_activation=activation, gated=True, residual=True, bias=True)
        for name in ("pooled", "x", "gate", "residual", "norm_mean", "w_reduce"):
            arguments = case.draw(0, backend.device)
            if isinstance(arguments.get(name), Tensor):
                arguments[name][(0, 3, 5, 6)[: arguments[name].dim()] if name != "w_reduce" else (2, 3)] = torch.nan
                assert_not_finite_alike(case, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", IMAGE_OPS)
def test_infinity_spreads_as_in_pytorch(op: str, dtype: torch.dtype, backend: Backend) -> None:
    """So does an infinity; test_ops_special_values.py says what activations make of it."""
    need(backend, op, dtype)
    base = Case(op, dtype, residual=True, bias=True)
    cases = [base.with_(activation=activation, se_activation=activation) for activation in ACTIVATIONS]
    if op == "depthwise_bn_act":
        cases += [base.with_(activation="relu", kernel=kernel) for kernel in ((1, 11), (6, 2), (9, 1))]
    for case in cases:
        for value in (torch.inf, -torch.inf):
            arguments = case.draw(0, backend.device)
            arguments["x"][0, 3, 5, 6] = value
            assert_not_finite_alike(case, arguments)


def assert_not_finite_alike(case: Case, arguments: dict[str, Any]) -> None:
    """As PyTorch in float64: its vectorised gelu of float32 makes NaN of inf."""
    ours = op_cases.run(effkernels.ops, case, arguments)
    with op_cases.one_thread():
        theirs = op_cases.truth(case, arguments)
    for y, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(y.isnan(), wanted.isnan()), str(case)
        assert torch.equal(y.isposinf(), wanted.isposinf()), str(case)
        assert torch.equal(y.isneginf(), wanted.isneginf()), str(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_threads_do_not_change_the_result(op: str, dtype: torch.dtype, backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("threads are the CPU's")
    case = Case(op, dtype, batch=3, channels=40, height=28, width=28, gated=True, residual=True)
    arguments = case.draw(0)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(op_cases.run(effkernels.ops, case, arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

"""Promises of the CUDA kernels beside right numbers: one launch, the same bits always, counters left clean, 64-bit
addresses, and teams of blocks where an image fits on the chip. Shown on the emulated kernels."""

from __future__ import annotations

import math
from typing import Any

import op_cases
import pytest
import torch
from conftest import FLAVOUR
from emulation.control import A100, H200, Emulation, Emulator
from hypothesis import example, given, settings, strategies
from op_cases import Case
from parity import assert_parity
from torch import Tensor

import effkernels
from effkernels.plan.gpus import GPUS, Gpu
from effkernels.plan.launches import plan_model

DEVICES = {"H200": H200, "A100": A100}
# One multiprocessor: nothing fits a grid that is resident as a whole, and there are no clusters.
TINY = (80, 1, *A100[2:])

CASES = {
    "depthwise_bn_act": Case("depthwise_bn_act", torch.bfloat16, channels=40, height=30, width=29),
    "depthwise_bn_act_squeeze": Case("depthwise_bn_act_squeeze", torch.bfloat16, channels=40, height=60, width=59),
    "squeeze_excite_gate": Case("squeeze_excite_gate", torch.bfloat16, channels=144, batch=3, parameters="same"),
    "depthwise_bn_act_gate": Case("depthwise_bn_act_gate", torch.bfloat16, channels=264, height=30, width=29),
    "depthwise_bn_act_se": Case("depthwise_bn_act_se", torch.bfloat16, channels=264, height=30, width=29),
    "pointwise_bn_act": Case(
        "pointwise_bn_act", torch.bfloat16, channels=144, out_channels=24, gated=True, residual=True
    ),
    "pointwise_bn_act_pool": Case(op_cases.POOL_OP, torch.bfloat16, channels=40, out_channels=136, parameters="same"),
    "conv_bn_act": Case("conv_bn_act", torch.bfloat16, channels=3, out_channels=32, stride=2, layout="contiguous"),
    "expand_depthwise_squeeze": Case(
        "expand_depthwise_squeeze", torch.bfloat16, channels=24, out_channels=104, height=30, width=29
    ),
    "mbconv": Case(
        "mbconv", torch.bfloat16, channels=24, out_channels=24, height=9, width=8, residual=True, parameters="same"
    ),
}


def call(emulator: Emulator, op: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the outputs of one emulated CUDA operator."""
    outputs = getattr(getattr(torch.ops, emulator.namespace), op)(*op_cases.positional(op, arguments))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(case: Case, emulated: Emulator) -> None:
    """Assert the tolerance rule for an operator of one result on the emulator as it is set."""
    arguments = case.draw()
    (result,) = call(emulated, case.op, arguments)
    with op_cases.one_thread():
        (truth,), (plain,) = (
            op_cases.truth(case, arguments),
            op_cases.run(effkernels.ops.reference, case, arguments),
        )
    assert_parity(result, plain, truth, str(case))


def launches(emulator: Emulator) -> int:
    return int(getattr(torch.ops, emulator.namespace).cuda_launches())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", CASES)
def test_an_operator_is_one_launch(op: str, device: str, emulated: Emulator) -> None:
    emulated.configure(Emulation(flavour=emulated.flavour, limits=DEVICES[device]))
    arguments = CASES[op].draw()
    call(emulated, op, arguments)  # the first call on a device may take and fill memory for counters
    before = launches(emulated)
    call(emulated, op, arguments)
    assert launches(emulated) - before == 1


def test_what_does_not_fit_on_the_chip_is_two_launches(emulated: Emulator) -> None:
    emulated.configure(Emulation(flavour=emulated.flavour, limits=TINY))
    case = CASES["depthwise_bn_act_se"].with_(batch=2)
    arguments = case.draw()
    call(emulated, case.op, arguments)
    before = launches(emulated)
    call(emulated, case.op, arguments)
    assert launches(emulated) - before == 2


def test_a_team_that_the_gpu_has_no_room_for_is_two_launches(emulated: Emulator) -> None:
    """A limit of MPS, or a green context, leaves a grid fewer multiprocessors than the device has."""
    emulated.configure(Emulation(flavour=emulated.flavour, limits=A100))
    case = CASES["depthwise_bn_act_se"].with_(batch=2)
    arguments = case.draw()
    (expected,) = call(emulated, case.op, arguments)
    before = launches(emulated)
    emulated.module.refuse_cooperative(True)
    try:
        (found,) = call(emulated, case.op, arguments)
    finally:
        emulated.module.refuse_cooperative(False)
    assert launches(emulated) - before == 2
    (truth,), (plain,) = op_cases.truth(case, arguments), op_cases.run(effkernels.ops.reference, case, arguments)
    assert_parity(found, plain, truth)
    assert_parity(expected, plain, truth)


@pytest.mark.parametrize("op", ["depthwise_bn_act_gate", "depthwise_bn_act_se"])
@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_hidden_values_are_aligned_whatever_the_channels(op: str, dtype: torch.dtype, emulated: Emulator) -> None:
    """They are read 16 bytes at a time, and come after as many parameters and sums as there are channels."""
    for channels in (1, 2, 3, 5, 7):
        for reduced in (2, 4, 8):
            case = CASES["depthwise_bn_act_gate"].with_(
                op=op, dtype=dtype, channels=channels, reduced=reduced, height=5, width=6
            )
            arguments = case.draw()
            plain = op_cases.run(effkernels.ops.reference, case, arguments)
            for ours, theirs in zip(call(emulated, op, arguments), plain, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)  # parity is held in test_ops_parity


def test_limits_of_a_kernel_are_lifted_once_for_each_device(emulated: Emulator) -> None:
    """And never set to what one launch takes, which would be too little for another thread's."""
    case = CASES["depthwise_bn_act_se"].with_(channels=128, height=56, width=56)
    devices = [(90, 131, *H200[2:]), (90, 130, *H200[2:])]  # that no other test uses
    lifted = []
    for limits in (*devices, *devices):
        emulated.configure(Emulation(flavour=emulated.flavour, limits=limits))
        for height in (56, 48, 56):
            before = emulated.module.function_attributes_set()
            emulated.module.clear_launches()
            call(emulated, case.op, case.with_(height=height).draw())
            assert emulated.launches()[0]["shared_bytes"] > 48 * 1024
            lifted.append(emulated.module.function_attributes_set() - before)
    assert lifted == [2, 0, 0] * 2 + [0, 0, 0] * 2


def test_asking_for_the_limits_of_a_device_leaves_the_current_one(emulated: Emulator) -> None:
    other = emulated.module.use_device([80, 39, *A100[2:]])
    current = emulated.module.use_device(list(H200))
    limits_of = getattr(torch.ops, emulated.namespace).cuda_limits
    assert list(limits_of(other))[:2] == [80, 39]
    assert emulated.module.current_device() == current


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_table_of_gpus_says_what_the_library_finds(gpu: Gpu, emulated: Emulator) -> None:
    device = emulated.module.use_device(gpu.limits())
    assert list(getattr(torch.ops, emulated.namespace).cuda_limits(device)) == gpu.limits()


def test_a_convolution_of_many_channels_is_pytorchs_and_one_launch(emulated: Emulator) -> None:
    arguments = Case("conv_bn_act", channels=200, out_channels=40).draw()
    before = launches(emulated)
    call(emulated, "conv_bn_act", arguments)
    assert launches(emulated) - before == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", CASES)
def test_the_same_bits_whatever_the_order(op: str, device: str, emulated: Emulator) -> None:
    """Blocks, warps and threads in any order, asynchronous copies at any time: not one bit may change."""
    arguments = CASES[op].draw()
    results = []
    for order, copies, seed in (("forward", "early", 1), ("reverse", "late", 1), ("random", "late", 2)):
        emulated.configure(Emulation(order, copies, DEVICES[device], emulated.flavour, seed))
        results.append(call(emulated, op, arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --------------------------------------------------------------------------------------------------------- counters


def test_streams_do_not_share_counters(emulated: Emulator) -> None:
    """Nothing shows which stream is at work but the counters, which are separate: each call of each is right."""
    case = CASES["depthwise_bn_act_gate"]
    arguments = case.draw()
    expected = call(emulated, case.op, arguments)
    for stream in (1, 2, 1, 3, 2):
        emulated.module.set_stream(stream)
        assert all(torch.equal(a, b) for a, b in zip(call(emulated, case.op, arguments), expected, strict=True))


def test_counters_of_a_captured_launch_belong_to_its_graph(emulated: Emulator) -> None:
    case = CASES["depthwise_bn_act_gate"]
    arguments = case.draw()
    expected = call(emulated, case.op, arguments)
    assert emulated.module.counters_lent_to_graphs() == 0
    emulated.module.set_capturing(True)
    lent = []
    for _ in range(2):
        captured = call(emulated, case.op, arguments)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
        lent.append(emulated.module.counters_lent_to_graphs())
    assert 0 < lent[0] < lent[1], "launches of one graph may overlap those of another: nothing is shared"
    emulated.module.set_capturing(False)
    emulated.module.destroy_graphs()
    assert emulated.module.counters_lent_to_graphs() == 0
    before = emulated.module.allocated_bytes()
    emulated.module.set_capturing(True)
    call(emulated, case.op, arguments)
    emulated.module.set_capturing(False)
    emulated.module.destroy_graphs()
    assert emulated.module.allocated_bytes() == before, "what a graph gave back serves the next one"


def test_a_failed_allocation_is_an_error_and_no_more(emulated: Emulator) -> None:
    # A device that no other test uses has no counters yet.
    emulated.configure(Emulation(flavour=emulated.flavour, limits=(80, 37, *A100[2:])))
    case = CASES["depthwise_bn_act_gate"]
    arguments = case.draw()
    emulated.module.fail_allocations(1)
    with pytest.raises(RuntimeError, match="depthwise_bn_act_gate: the CUDA kernel could not be launched"):
        call(emulated, case.op, arguments)
    result = call(emulated, case.op, arguments)
    truth, plain = op_cases.truth(case, arguments), op_cases.run(effkernels.ops.reference, case, arguments)
    for ours, theirs, exact in zip(result, plain, truth, strict=True):
        assert_parity(ours, theirs, exact)


def test_a_refused_launch_leaves_the_counters_clean(emulated: Emulator) -> None:
    # 8 KB of shared memory: enough for 8 channels and 3x3, not for 9x9 and 1000 hidden values.
    emulated.configure(Emulation(flavour=emulated.flavour, limits=(80, 41, 8192, 8192, *A100[4:])))
    small = CASES["depthwise_bn_act_gate"].with_(channels=8, reduced=2)
    arguments = small.draw()
    expected = call(emulated, small.op, arguments)
    refused = CASES["depthwise_bn_act_gate"].with_(kernel=(9, 9), padding=(4, 4, 4, 4), reduced=1000)
    with pytest.raises(RuntimeError, match="depthwise_bn_act_gate: the CUDA kernel could not be launched"):
        call(emulated, refused.op, refused.draw())
    assert all(torch.equal(a, b) for a, b in zip(call(emulated, small.op, arguments), expected, strict=True))


# ------------------------------------------------------------------------------------------------------- large tensors


def spread(image: Tensor, stride_n: int, stride_h: int, stride_w: int) -> Tensor:
    """`image` with other strides, in memory of which only the touched pages come into being."""
    n, c, h, w = image.shape
    size = (n - 1) * stride_n + (h - 1) * stride_h + (w - 1) * stride_w + c
    view = torch.empty(size, dtype=image.dtype).as_strided(image.shape, (stride_n, 1, stride_h, stride_w))
    return view.copy_(image)


PAST_31_BITS = (1 << 31) + 64
# Strides of images, rows and columns; near elements are between those that are far apart.
STRIDES = {
    "images": (PAST_31_BITS, 64 * 7, 64),
    "rows": (16 * 7, PAST_31_BITS // 2, 16),
    "columns": (32, 16, PAST_31_BITS // 3),
}


@pytest.mark.parametrize("far_apart", STRIDES)
@pytest.mark.parametrize(
    "op", ["depthwise_bn_act_gate", "depthwise_bn_act_se", "pointwise_bn_act", op_cases.POOL_OP, "conv_bn_act"]
)
@pytest.mark.parametrize("channels", [16, 3])
def test_elements_past_31_bits(op: str, channels: int, far_apart: str, emulated: Emulator) -> None:
    """Offsets beyond 2^31 elements, over a mapping that is never filled."""
    case = Case(op, torch.bfloat16, channels=channels, height=5, width=7, batch=2, gated=True)
    arguments = case.draw()
    if far_apart == "columns":  # one row, or the rows would not fit between two columns
        arguments["x"] = arguments["x"][:, :, :1].contiguous(memory_format=torch.channels_last)
    near = call(emulated, op, arguments)
    far = call(emulated, op, {**arguments, "x": spread(arguments["x"], *STRIDES[far_apart])})
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 0, 1)], ids=str)
def test_an_infinity_reaches_only_the_windows_that_it_is_in(
    padding: tuple[int, int, int, int], layout: str, dtype: torch.dtype, emulated: Emulator
) -> None:
    """The stem reads pairs of values, some with a neighbour of the window in them."""
    case = Case("conv_bn_act", dtype, channels=3, stride=2, height=24, width=40, padding=padding, layout=layout)
    arguments = case.draw()
    for channel, row, column in ((0, 5, 8), (1, 6, 9), (2, 7, 15), (0, 0, 0), (2, 23, 39), (2, 12, 31), (0, 12, 32)):
        arguments["x"][0, channel, row, column] = torch.inf
    (y,) = call(emulated, case.op, arguments)
    (truth,) = op_cases.truth(case, arguments)
    assert torch.equal(y.isfinite(), truth.isfinite())
    assert 0 < int((~y.isfinite()).sum()) < y.numel() // 4


# ------------------------------------------------------------------------------------------------- what fits on a chip


def planned(op: str, shape: list[int], limits: tuple[int, ...], dtype: str = "bfloat16") -> list[dict[str, str]]:
    text = torch.ops.effkernels.cuda_plan(op, dtype, shape, list(limits))
    return [dict(part.split("=") for part in line.split()) for line in text.splitlines()]


def se_shape(batch: int, channels: int, plane: int, kernel: int, reduced: int) -> list[int]:
    return [batch, channels, plane, plane, kernel, kernel, 1, 1, *([kernel // 2] * 4), reduced]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize(
    ("channels", "plane", "kernel", "reduced"), [(32, 112, 3, 8), (144, 56, 3, 6), (240, 28, 5, 10), (1152, 7, 5, 48)]
)
def test_every_plane_of_b0_fits_a_cluster(batch: int, channels: int, plane: int, kernel: int, reduced: int) -> None:
    [launch] = planned("depthwise_bn_act_se", se_shape(batch, channels, plane, kernel, reduced), H200)
    assert launch["kernel"] == "depthwise_resident"
    cluster = int(launch["cluster"])
    assert 1 < cluster <= H200[7]
    assert int(launch["grid"]) == batch * cluster
    assert int(launch["shared"]) <= H200[3]


@pytest.mark.usefixtures("compiled")
def test_the_early_planes_of_b4_fit_no_cluster() -> None:
    """190 x 190 pixels of 144 channels are 10 MB: more than 16 blocks hold; a batch of them more than the whole GPU."""
    kernels = [one["kernel"] for one in planned("depthwise_bn_act_se", se_shape(32, 144, 190, 3, 6), H200)]
    assert kernels == ["depthwise_strips", "scale_by_gate"]


@pytest.mark.usefixtures("compiled")
def test_without_clusters_the_whole_grid_is_resident() -> None:
    [launch] = planned("depthwise_bn_act_se", se_shape(1, 1152, 7, 5, 48), A100)
    assert launch["cooperative"] == "1"
    assert launch["cluster"] == "1"
    assert int(launch["grid"]) <= A100[1]
    kernels = [one["kernel"] for one in planned("depthwise_bn_act_se", se_shape(256, 1152, 7, 5, 48), A100)]
    assert kernels == ["depthwise_strips", "scale_by_gate"]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 7, 24, 32, 144, 672, 1152, 2688, 3840])
@pytest.mark.parametrize("plane", [1, 7, 13, 56, 190])
@pytest.mark.parametrize("batch", [1, 3, 256])
def test_plans_stay_within_the_device(device: str, channels: int, plane: int, batch: int) -> None:
    limits = DEVICES[device]
    for dtype in ("float32", "bfloat16"):
        for op in ("depthwise_bn_act_gate", "depthwise_bn_act_se"):
            reduced = max(1, channels // 24)
            for launch in (
                *planned(op, se_shape(batch, channels, plane, 5, reduced), limits, dtype),
                *planned(op, se_shape(batch, channels, plane, 13, reduced), limits, dtype),
            ):
                assert 0 < int(launch["grid"]) < 1 << 31
                assert int(launch["shared"]) <= limits[3]
                assert int(launch["cluster"]) <= limits[7]
                if launch["cooperative"] == "1":
                    assert int(launch["grid"]) <= limits[1]


ACTIVATIONS = strategies.integers(0, 6)
CHANNELS = strategies.integers(1, 4096) | strategies.sampled_from([1152, 2688, 3840, 8192, 65536])
SIZES = strategies.integers(1, 600) | strategies.sampled_from([7, 14, 28, 56, 112])


@strategies.composite
def plannable(draw: strategies.DrawFn) -> tuple[str, list[int]]:
    """Return an operator and a call of it that a plan is made for."""
    op = draw(strategies.sampled_from(op_cases.ALL_OPS))
    batch = draw(strategies.integers(1, 2048))
    channels, out_channels, reduced = draw(CHANNELS), draw(CHANNELS), draw(strategies.integers(1, 8192) | CHANNELS)
    reduced, height, width = min(reduced, 8192), draw(SIZES), draw(SIZES)
    kernel = (draw(strategies.integers(1, 13)), draw(strategies.integers(1, 13)))
    stride = draw(strategies.integers(1, 3))
    padding = [kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2]
    yes = strategies.integers(0, 1)
    if op == "squeeze_excite_gate":
        return op, [batch, channels, reduced]
    if op == "pointwise_bn_act":
        return op, [batch, height, width, channels, out_channels, draw(yes), draw(yes), draw(yes), draw(ACTIVATIONS)]
    if op == op_cases.POOL_OP:
        return op, [batch, height, width, channels, out_channels, 0, 0, draw(yes), draw(ACTIVATIONS)]
    if op == "conv_bn_act":
        return op, [batch, draw(strategies.integers(1, 64)), out_channels, height, width, *kernel, stride, *padding]
    excites = op in ("depthwise_bn_act_gate", "depthwise_bn_act_se") or (op == "mbconv" and draw(yes))
    dilation = draw(strategies.integers(1, 2))
    padding = [side * dilation for side in padding]
    shape = [batch, channels, height, width, *kernel, stride, dilation, *padding, reduced if excites else 0]
    if op == op_cases.BLOCK_OP:
        return op, [*shape, draw(CHANNELS), out_channels, draw(yes), draw(yes), draw(ACTIVATIONS)]
    return op, [*shape, draw(CHANNELS), draw(yes), draw(ACTIVATIONS)] if op == op_cases.EXPAND_OP else shape


@pytest.mark.usefixtures("compiled")
@settings(max_examples=2000, deadline=None)
@given(call=plannable(), dtype=strategies.sampled_from(["float32", "float16", "bfloat16"]))
@example(call=("depthwise_bn_act_gate", se_shape(1024, 8192, 7, 7, 8192)), dtype="float32")
@example(call=("squeeze_excite_gate", [1024, 8192, 8192]), dtype="float32")
def test_no_plan_asks_for_more_than_any_gpu_has(call: tuple[str, list[int]], dtype: str) -> None:
    op, shape = call
    for gpu in GPUS:
        for launch in planned(op, shape, tuple(gpu.limits()), dtype):
            if "grid" not in launch:  # PyTorch's own
                continue
            across, down = map(int, launch["block"].split(","))
            assert 0 < across * down <= 1024
            assert 0 <= int(launch["shared"]) <= gpu.capability.shared_per_block, (gpu.name, launch)
            assert 1 <= int(launch["cluster"]) <= gpu.capability.largest_cluster
            assert int(launch["grid"]) % int(launch["cluster"]) == 0
            if launch["cooperative"] == "1":
                shared = int(launch["shared"]) + 1024
                resident = min(gpu.capability.shared_per_multiprocessor // shared, 2048 // (across * down))
                assert int(launch["grid"]) <= resident * gpu.multiprocessors, (gpu.name, launch)


def stem_shape(batch: int, size: int, out_channels: int) -> list[int]:
    return [batch, 3, out_channels, size, size, 3, 3, 2, 0, 1, 0, 1]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("size", "out_channels"), [(224, 32), (240, 32), (260, 32), (300, 40), (380, 48), (456, 48), (528, 56), (600, 64)]
)
def test_stems_of_efficientnet_fill_the_gpu(size: int, out_channels: int, dtype: str) -> None:
    """Read by vectors at every resolution, on 100 multiprocessors for one image; large batches in few, long blocks."""
    [one] = planned("conv_bn_act", stem_shape(1, size, out_channels), H200, dtype)
    [many] = planned("conv_bn_act", stem_shape(256, size, out_channels), H200, dtype)
    assert one["kernel"] == many["kernel"] == "conv_stem"
    assert int(one["grid"]) >= 100
    assert many["block"] == "256,1"
    tiles = 256 * math.ceil(size / 32) ** 2
    assert tiles // 8 <= int(many["grid"]) <= tiles // 4
    # A stem of rows that vectors do not divide is read element by element.
    [odd] = planned("conv_bn_act", stem_shape(1, size + 1, out_channels), H200, dtype)
    assert odd["kernel"] == "conv"


@pytest.mark.usefixtures("compiled")
def test_rows_beyond_32_bits_are_convolved_by_pytorch() -> None:
    """The fused kernels count in 32 bits within a tile of 16 rows."""
    kernels = {}
    for width in (1 << 21, 1 << 22):
        shape = [1, 3, 64, 2, width, 3, 3, 2, 0, 1, 0, 1]
        kernels[width] = [launch["kernel"] for launch in planned("conv_bn_act", shape, H200)]
    assert kernels == {1 << 21: ["conv_stem"], 1 << 22: ["aten::convolution", "norm_act"]}


@pytest.mark.usefixtures("compiled")
def test_a_wrong_request_for_a_plan_is_named() -> None:
    for arguments, message in (
        (("softmax", "bfloat16", [1], list(H200)), "op='softmax'"),
        (("squeeze_excite_gate", "float64", [1, 8, 2], list(H200)), "dtype='float64'"),
        (("squeeze_excite_gate", "float32", [1, 8], list(H200)), "shape of squeeze_excite_gate has 2 numbers"),
        (("squeeze_excite_gate", "float32", [1, 8, 2], [90]), "limits of squeeze_excite_gate has 1 numbers"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.effkernels.cuda_plan(*arguments)


# ------------------------------------------------------------------------------------------- every way to cut the work

# On a GPU of few multiprocessors small tensors are cut as large ones are on a large GPU: several rounds, tiles and
# images per block, and the large tiles of the matrix product.
FEW = {"clusters": (90, 1, *H200[2:7], 4), "no clusters": (80, 2, *A100[2:])}


def cut_cases(dtype: torch.dtype) -> list[Case]:
    cases = [
        Case("squeeze_excite_gate", dtype, channels=672, reduced=28, batch=9, parameters="same"),
        Case("conv_bn_act", dtype, channels=3, out_channels=40, stride=2, height=66, width=40, layout="contiguous"),
        Case("conv_bn_act", dtype, channels=3, out_channels=32, stride=2, height=130, width=72, batch=3),
        Case("conv_bn_act", dtype, channels=3, out_channels=72, stride=2, height=130, width=70, batch=3),
    ]
    for op in op_cases.DEPTHWISE_OPS:
        cases += [
            Case(op, dtype, channels=40, height=40, width=37, reduced=10, batch=3, bias=True),
            Case(op, dtype, channels=264, height=7, width=7, kernel=(5, 5), padding=(2, 2, 2, 2), reduced=12, batch=9),
            Case(op, dtype, channels=7, height=30, width=31, reduced=3, batch=5),
            Case(op, dtype, channels=96, height=28, width=28, stride=2, reduced=6, batch=2),
            Case(op, dtype, channels=136, height=29, width=30, kernel=(1, 11), padding=(0, 0, 5, 5), reduced=6),
            Case(op, dtype, channels=136, height=14, width=14, kernel=(13, 13), padding=(6, 6, 6, 6), stride=2),
        ]
    # An expansion, a projection, and any activation behind a gate: 1 image of many pixels, images that share a tile.
    product = Case("pointwise_bn_act", dtype, channels=144, height=14, width=14, batch=3, parameters="same")
    cases += [product.with_(out_channels=out_channels) for out_channels in (16, 64, 96, 128, 144)]
    for gated in (
        product.with_(gated=True, residual=True, activation="identity"),
        product.with_(gated=True, residual=True, activation="hard_swish", height=40, width=37, batch=1),
        product.with_(gated=True, residual=True, activation="identity", height=3, width=3, batch=41),
    ):
        cases += [gated.with_(out_channels=out_channels) for out_channels in (16, 24, 40, 48, 80, 320)]
    for stride, half in ((1, 1), (2, 1), (1, 2), (2, 2)):
        expand = Case(op_cases.EXPAND_OP, dtype, channels=40, out_channels=104, height=29, width=27, batch=2)
        cases.append(expand.with_(kernel=(2 * half + 1,) * 2, padding=(half,) * 4, stride=stride))
    # Tiles that end within an image, images that share a tile, and images that several blocks share.
    pooled = Case(op_cases.POOL_OP, dtype, channels=40, out_channels=136, height=7, width=7, parameters="same")
    cases += [pooled.with_(batch=batch, activation=a) for batch in (1, 3, 33) for a in ("silu", "gelu")]
    cases += [pooled.with_(batch=33, height=1, width=1), pooled.with_(batch=9, height=3, width=2, out_channels=7)]
    cases += [pooled.with_(channels=320, batch=5), pooled.with_(batch=1, height=40, width=41, out_channels=24)]
    # More slices than there are stages in the ring, and weights that are not kept.
    cases += [
        product.with_(channels=1160, out_channels=64, height=9, gated=True),
        product.with_(channels=32, out_channels=8, height=30, residual=True),
        product.with_(channels=32, out_channels=16, height=37, width=41, gated=True, activation="identity"),
    ]
    return cases


# The race and the asan flavour find in one order what they find in any.
FEW_ORDERS = (("forward", "late"), ("random", "early")) if FLAVOUR == "plain" else (("forward", "late"),)


@pytest.mark.parametrize("device", FEW)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case)) for dtype in op_cases.DTYPES for case in cut_cases(dtype)]
)
def test_parity_on_few_multiprocessors(case: Case, device: str, emulated: Emulator) -> None:
    arguments = case.draw()
    with op_cases.one_thread():
        truth, plain = op_cases.truth(case, arguments), op_cases.run(effkernels.ops.reference, case, arguments)
    for order in FEW_ORDERS:
        emulated.configure(Emulation(*order, FEW[device], emulated.flavour))
        for ours, theirs, exact in zip(call(emulated, case.op, arguments), plain, truth, strict=True):
            assert_parity(ours, theirs, exact, f"{case}, {order}")


def cut_of(case: Case, limits: tuple[int, ...]) -> dict[str, str]:
    """The plan of a pointwise operator."""
    shape = [case.batch, case.height, case.width, case.channels, case.out_channels, case.gated, case.residual, False]
    activation = effkernels.ops.reference.ACTIVATIONS.index(case.activation)
    dtype = str(case.dtype).removeprefix("torch.")
    [launch] = planned("pointwise_bn_act", [*map(int, shape), activation], limits, dtype)
    return launch


@pytest.mark.usefixtures("compiled")
def test_few_multiprocessors_meet_every_way_of_the_product() -> None:
    """The cases above would be worth little if they all took the same way."""
    cases = [case for dtype in op_cases.DTYPES for case in cut_cases(dtype) if case.op == "pointwise_bn_act"]
    found = [(case, cut_of(case, limits)) for case in cases for limits in FEW.values()]
    sixteen = {(one["tile"], one["epilogue"]) for case, one in found if case.dtype != torch.float32}
    assert len(sixteen) >= 12, sorted(sixteen)
    assert {int(tile) for tile, _ in sixteen} >= {*range(9), 12, 13}  # the others are for single images
    assert len({one["tile"] for case, one in found if case.dtype == torch.float32}) >= 2
    assert {int(one["tiles"]) for _, one in found} >= {1, 2, 3}
    assert {(one["keeps_weight"], int(one["steps"]) > 4) for _, one in found} >= {("0", True), ("1", True)}


# ------------------------------------------------------------------------------------- blocks that share input channels

SHARED = Case(
    "pointwise_bn_act",
    torch.bfloat16,
    channels=4096,
    out_channels=64,
    height=7,
    width=7,
    batch=1,
    gated=True,
    residual=True,
    parameters="same",
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_parity_of_blocks_that_share_input_channels(
    dtype: torch.dtype, batch: int, device: str, emulated: Emulator
) -> None:
    emulated.configure(Emulation("random", "late", DEVICES[device], emulated.flavour))
    # The race and the asan flavour watch accesses, which depend on no activation.
    for activation in ("identity", "hard_swish") if batch == 1 and FLAVOUR == "plain" else ("hard_swish",):
        case = SHARED.with_(dtype=dtype, batch=batch, activation=activation, channels=4096 - 8)
        assert int(cut_of(case, DEVICES[device])["parts"]) > 1
        arguments = case.draw()
        truth, plain = op_cases.truth(case, arguments), op_cases.run(effkernels.ops.reference, case, arguments)
        for _ in range(2):  # the first launch leaves the counters as it found them
            (found,) = call(emulated, case.op, arguments)
            assert_parity(found, plain[0], truth[0], str(case))


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_whichever_part_comes_last(device: str, emulated: Emulator) -> None:
    arguments = SHARED.draw()
    results = []
    for order, copies, seed in (("forward", "early", 1), ("reverse", "late", 1), ("random", "late", 2)):
        emulated.configure(Emulation(order, copies, DEVICES[device], emulated.flavour, seed))
        before = launches(emulated)
        results += call(emulated, SHARED.op, arguments)
        assert launches(emulated) - before <= 2, "one launch, and the first on a device may fill memory for counters"
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("compiled")
def test_scratch_memory_of_parts_is_planned() -> None:
    for dtype in op_cases.DTYPES:
        case = SHARED.with_(dtype=dtype)
        launch = cut_of(case, H200)
        parts = int(launch["parts"])
        tiles = int(launch["grid"]) // parts
        assert parts > 1
        assert int(launch["workspace"]) == 4 * (parts * 49 * case.out_channels + tiles)
        assert cut_of(case.with_(batch=2048), H200)["parts"] == "1", "enough tiles"


@pytest.mark.usefixtures("compiled")
def test_no_product_of_b0_at_batch_1_leaves_most_of_the_gpu_idle() -> None:
    """At least 100 blocks, or a tile of 16 x 16 for each: fewer channels for a block would cost more than they save."""
    for launch in plan_model("efficientnet_b0", gpu="h200", batch_size=1).launches:
        if launch.kernel == "pointwise":
            assert launch.grid is not None
            assert launch.grid >= 48, launch
    for channels, out_channels, plane in ((240, 80, 14), (480, 80, 14), (672, 112, 14), (672, 192, 7), (1152, 192, 7)):
        case = SHARED.with_(channels=channels, out_channels=out_channels, height=plane, width=plane, residual=False)
        smallest = -(-plane * plane // 16) * -(-out_channels // 16)
        assert int(cut_of(case.with_(activation="identity"), H200)["grid"]) >= min(100, smallest)

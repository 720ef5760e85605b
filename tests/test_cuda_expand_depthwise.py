"""expand_depthwise_squeeze in one CUDA launch: the blocks of networks on the emulated kernel, and the plan that decides
between one launch and two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, replace
from functools import cache

import op_cases
import pytest
import torch
from emulation.control import A100, H200, Emulation, Emulator
from op_cases import EXPAND_OP, Case
from parity import assert_parity
from test_cuda_kernels import call, launches, planned
from test_plan import recorded

import effkernels
from benchmarks.gpu_check.shapes import calls_of
from effkernels.ops.call import OpCall
from effkernels.plan import gpus
from effkernels.plan.gpus import GPUS
from effkernels.plan.launches import plan_call

HALVES = (torch.float16, torch.bfloat16)
PLANES = ((7, 9), (13, 14), (9, 21))
# A GPU of one multiprocessor walks down whole planes, others cut small ones into bands.
DEVICES = {"H200": H200, "A100": A100, "few": (90, 1, *H200[2:])}


@cache
def blocks_of(model: str) -> tuple[OpCall, ...]:
    """Return the distinct expand and depthwise halves of a network's blocks at its own resolution."""
    found = [one for one in calls_of(model) if one.op == EXPAND_OP and one.out_channels > one.channels]
    return tuple(dict.fromkeys(found))


def case_of(block: OpCall, dtype: torch.dtype, number: int = 0, **fields: object) -> Case:
    case = Case(
        EXPAND_OP,
        dtype,
        channels=block.channels,
        out_channels=block.out_channels,
        kernel=block.kernel,
        stride=block.stride,
        padding=block.padding,
        activation=block.activation,
        expand_activation=block.expand_activation,
        height=block.height,
        width=block.width,
        parameters=("same", "float32")[number % 2],
    )
    return replace(case, **fields)  # type: ignore[arg-type]


def same_padding(block: OpCall, height: int, width: int) -> tuple[int, int, int, int]:
    """Return TensorFlow's padding, which is larger at the end where it is odd."""
    sides: list[int] = []
    for size, kernel in ((height, block.kernel[0]), (width, block.kernel[1])):
        more = max(0, (-(-size // block.stride) - 1) * block.stride + kernel - size)
        sides += [more // 2, more - more // 2]
    return sides[0], sides[1], sides[2], sides[3]


def small_cases() -> Iterator[Case]:
    """Every block of B0 on small planes, the wide ones of B4 and B7 with few of their channels, tf_ padding."""
    shapes = {(b.channels, b.out_channels, b.kernel, b.stride): b for b in blocks_of("efficientnet_b0")}
    for number, block in enumerate(shapes.values()):
        height, width = PLANES[number % 3]
        for dtype in HALVES:
            for batch in (1, 3):
                yield case_of(block, dtype, number, height=height, width=width, batch=batch)
            padding = same_padding(block, width, height)
            yield case_of(block, dtype, number, height=width, width=height, padding=padding, batch=1)
    larger = (*blocks_of("efficientnet_b4"), *blocks_of("efficientnet_b7"))
    wide = {(b.channels, b.kernel, b.stride): b for b in larger if b.channels in (56, 160, 272, 448, 640)}
    for number, block in enumerate(wide.values()):
        yield case_of(block, HALVES[number % 2], number, out_channels=104, height=9, width=11, batch=2)


def odd_cases() -> Iterator[Case]:
    """What no network has: channels that 48 do not divide, images of a pixel, paddings of every kind."""
    for dtype in HALVES:
        base = Case(EXPAND_OP, dtype, channels=24, out_channels=56, height=11, width=10, parameters="same")
        yield from (base.with_(channels=c, out_channels=o) for c, o in ((8, 8), (16, 40), (72, 200)))
        for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
            one = base.with_(kernel=(kernel, kernel), stride=stride)
            half, most = kernel // 2, kernel - 1
            yield one.with_(padding=(0, 0, 0, 0), bias=True)
            yield one.with_(padding=(most, 0, 0, most), norm="statistics")
            yield one.with_(padding=(0, half, most, 1), batch=3)
            yield one.with_(padding=(half,) * 4, height=1, width=1, batch=1)
            yield one.with_(padding=(half,) * 4, height=40, width=37, batch=1)
            yield one.with_(padding=(half,) * 4, height=3, width=300, batch=1)
            yield one.with_(padding=(half,) * 4, activation="hard_swish", expand_activation="gelu", norm="none")
        yield from (base.with_(layout=layout) for layout in ("sliced", "sliced_rows", "contiguous", "expanded"))


def check(case: Case, emulated: Emulator) -> None:
    arguments = case.draw()
    result = call(emulated, case.op, arguments)
    with op_cases.one_thread():
        truth, plain = op_cases.truth(case, arguments), op_cases.run(effkernels.ops.reference, case, arguments)
    for ours, theirs, exact in zip(result, plain, truth, strict=True):
        assert_parity(ours, theirs, exact, str(case))


def plan_of(case: OpCall, limits: tuple[int, ...], dtype: str = "bfloat16") -> list[dict[str, str]]:
    activation = effkernels.ops.reference.ACTIVATIONS.index(case.expand_activation)
    shape = [case.batch, case.out_channels, case.height, case.width, *case.kernel, case.stride, case.dilation]
    return planned(EXPAND_OP, [*shape, *case.padding, 0, case.channels, 0, activation], limits, dtype)


def named(cases: Iterator[Case]) -> list[object]:
    return [pytest.param(case, id=str(case)) for case in dict.fromkeys(cases)]


class TestParity:
    @pytest.mark.parametrize("case", named(small_cases()))
    def test_blocks_of_networks_on_small_planes(self, case: Case, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        check(case, emulated)
        assert len(plan_of(case, H200)) == 1

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("case", named(odd_cases()))
    def test_odd_shapes(self, case: Case, device: str, emulated: Emulator) -> None:
        order, copies = {"H200": ("reverse", "early"), "A100": ("forward", "late"), "few": ("random", "late")}[device]
        emulated.configure(Emulation(order, copies, DEVICES[device], emulated.flavour))
        before = launches(emulated)
        check(case, emulated)
        assert launches(emulated) - before <= 2, "one launch, and the first on a device may fill memory for counters"

    @pytest.mark.slow
    @pytest.mark.parametrize("number", range(11))
    def test_blocks_of_b0_at_full_size(self, number: int, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        check(case_of(blocks_of("efficientnet_b0")[number], HALVES[number % 2], number, batch=1), emulated)


class TestLaunches:
    @pytest.mark.parametrize(
        "change",
        [
            {"channels": 20},
            {"out_channels": 100},
            {"kernel": (7, 7), "padding": (3, 3, 3, 3)},
            {"kernel": (3, 5)},
            {"dilation": 2, "padding": (2, 2, 2, 2)},
            {"padding": (3, 1, 1, 1)},
            {"padding": (1, 3, 1, 1)},
            {"dtype": torch.float32},
        ],
        ids=str,
    )
    def test_what_the_kernel_does_not_take_is_two_launches(self, change: dict[str, object], emulated: Emulator) -> None:
        case = replace(Case(EXPAND_OP, torch.float16, channels=24, out_channels=96), **change)  # type: ignore[arg-type]
        dtype = str(case.dtype).removeprefix("torch.")
        assert [one["kernel"] for one in plan_of(case, H200, dtype)][:1] == ["pointwise"]
        check(case, emulated)  # the first call on a device may take and fill memory for counters
        before = launches(emulated)
        call(emulated, case.op, case.draw())
        assert launches(emulated) - before == 2

    def test_an_input_that_is_not_aligned_is_two_launches(self, emulated: Emulator) -> None:
        """The plan without tensors assumes that they are."""
        case = Case(EXPAND_OP, torch.float16, channels=24, out_channels=96)
        arguments = case.draw()
        x = arguments["x"]
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        results = [call(emulated, case.op, arguments)]
        before = launches(emulated)
        results.append(call(emulated, case.op, {**arguments, "x": shifted.copy_(x)}))
        assert launches(emulated) - before == 2
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)

    def test_no_images(self, emulated: Emulator) -> None:
        case = Case(EXPAND_OP, torch.float16, channels=24, out_channels=96, batch=0)
        y, pooled = call(emulated, case.op, case.draw())
        assert (y.shape, pooled.shape) == ((0, 96, 13, 14), (0, 96))


@pytest.mark.usefixtures("compiled")
class TestPlan:
    @pytest.mark.parametrize("batch", [1, 32, 256])
    @pytest.mark.parametrize("model", ["efficientnet_b0", "efficientnet_b4", "efficientnet_b7"])
    @pytest.mark.parametrize("gpu", ["h200", "a100"])
    def test_blocks_of_networks_are_one_launch(self, model: str, batch: int, gpu: str) -> None:
        """All of them on an H200; on an A100 those whose weights leave room for two blocks on a multiprocessor."""
        limits = next(tuple(one.limits()) for one in GPUS if one.name == gpu)
        for block in blocks_of(model):
            found = plan_of(block.with_(batch=batch), limits)
            fits = gpu == "h200" or block.channels < 640
            assert (len(found) == 1) == fits, (block, found)
            if fits:
                assert found[0]["kernel"] == "expand_depthwise"

    def test_blocks_of_b0_are_one_launch_on_every_gpu(self) -> None:
        for gpu in GPUS:
            for block in blocks_of("efficientnet_b0"):
                assert len(plan_of(block, tuple(gpu.limits()))) == 1, (gpu.name, block)

    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    def test_the_cut_covers_the_image(self, gpu: object) -> None:
        limits = tuple(gpu.limits())  # type: ignore[attr-defined]
        blocks = (*blocks_of("efficientnet_b0"), *blocks_of("efficientnet_b7"))
        for block in blocks:
            for batch in (1, 7, 256):
                found = plan_of(block.with_(batch=batch), limits)
                if len(found) == 2:
                    continue
                cut = {name: int(value) for name, value in found[0].items() if value.isdigit()}
                out_height, out_width = (
                    (size + sum(pads) - kernel) // block.stride + 1
                    for size, pads, kernel in (
                        (block.height, block.padding[:2], block.kernel[0]),
                        (block.width, block.padding[2:], block.kernel[1]),
                    )
                )
                assert (cut["bands"] - 1) * cut["band_rows"] < out_height <= cut["bands"] * cut["band_rows"]
                assert (cut["column_tiles"] - 1) * cut["columns"] < out_width <= cut["column_tiles"] * cut["columns"]
                assert cut["tiles"] == cut["bands"] * cut["column_tiles"]
                assert cut["images"] == 1 or cut["tiles"] == 1, "sums of several blocks are of one image"
                units = -(-batch // cut["images"])
                assert cut["grid"] == units * -(-block.out_channels // 48) * cut["tiles"]
                assert cut["ring_rows"] == cut["group_rows"] + block.kernel[0] - 1
                assert cut["group_rows"] % block.stride == 0
                assert 2 * (cut["shared"] + 1024) <= limits[2], "two blocks on a multiprocessor"

    def test_few_images_are_cut_into_bands(self) -> None:
        """An early plane keeps more than a third of an H200 busy with one image; many images walk down whole ones."""
        for block in blocks_of("efficientnet_b0")[:2]:
            [one], [many] = plan_of(block, H200), plan_of(block.with_(batch=256), H200)
            assert int(one["grid"]) >= 132 / 3
            assert int(many["bands"]) <= 2

    def test_planes_beyond_32_bits_are_two_launches(self) -> None:
        """Offsets in an image have 32 bits, and rows of x are counted by a multiply that is exact below 2^31."""
        small = Case(EXPAND_OP, torch.bfloat16, channels=8, out_channels=8, batch=1)
        kernels = {}
        for height, width in ((1 << 21, 1), ((1 << 21) + 1, 1), (1 << 13, 1 << 13), (1 << 14, 1 << 13)):
            [first, *_] = plan_of(small.with_(height=height, width=width), H200)
            kernels[height, width] = first["kernel"]
        assert list(kernels.values()) == ["expand_depthwise", "pointwise", "expand_depthwise", "pointwise"]

    def test_explain_shows_one_launch_with_bytes_and_estimate(self) -> None:
        """x, y and the parameters, each byte once, and nothing of the expanded tensor; all terms of the estimate."""
        for batch in (1, 256):
            for block in blocks_of("efficientnet_b0"):
                one = block.with_(batch=batch)
                (recorded_call,) = recorded(one, torch.bfloat16)
                (launch,) = plan_call(recorded_call, gpus.find("h200"), allow_tf32=True)
                assert launch.kernel == "expand_depthwise"
                assert launch.bytes - 2 * launch.workspace_bytes == one.bytes_moved(torch.bfloat16)
                assert launch.unit == "tensor"
                assert launch.time.counted
                assert all(math.isfinite(value) and value >= 0 for value in astuple(launch.time))
                expanded = batch * one.out_channels * one.height * one.width
                results = recorded_call.results[0].numel()
                assert launch.special_functions == expanded + results + 2 * one.out_channels

    def test_two_launches_pass_the_expanded_tensor_on(self) -> None:
        one = OpCall.on(EXPAND_OP, (2, 24, 13, 14), out_channels=40)
        (recorded_call,) = recorded(one, torch.float32)
        first, second = plan_call(recorded_call, gpus.find("h200"), allow_tf32=False)
        expanded = 4 * 2 * 40 * 13 * 14
        assert first.bytes + second.bytes - 2 * (first.workspace_bytes + second.workspace_bytes) == (
            one.bytes_moved(torch.float32) + 2 * expanded
        )
        assert first.bytes - 2 * first.workspace_bytes == 4 * (2 * 24 * 13 * 14 + 24 * 40 + 4 * 40) + expanded
        assert first.special_functions == 2 * 2 * 40 * 13 * 14 + 40

"""mbconv by clusters, in one CUDA launch: the late blocks of networks on the emulated kernel, and the plan that decides
between it, the queue of items (test_cuda_mbconv_queue.py) and three launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from emulation.control import A100, H200, Emulation, Emulator
from op_cases import BLOCK_OP, Case
from test_cuda_expand_depthwise import same_padding
from test_cuda_kernels import call, check, launches, planned

import effkernels
from effkernels.models import create_model
from effkernels.nn import DepthwiseSeparable, MBConv, SqueezeExcite
from effkernels.nn.padding import explicit_padding
from effkernels.ops.call import OpCall
from effkernels.plan.gpus import GPUS

HALVES = (torch.float16, torch.bfloat16)
PLANES = ((7, 7), (5, 9), (10, 6))
# Other sizes of the largest cluster; with 1 there are none. On one multiprocessor a cluster takes images in turn.
DEVICES = {"H200": H200, "portable": (*H200[:7], 8), "few": (90, 1, *H200[2:]), "A100": A100}


@cache
def blocks_of(model: str, *, expand: bool = True) -> tuple[OpCall, ...]:
    """Return the distinct blocks of a network at its own resolution, those with expansion or those without."""
    network = create_model(model, device="meta", backend="cpu").eval()
    found: dict[OpCall, None] = {}

    def note(block: MBConv | DepthwiseSeparable, arguments: tuple[torch.Tensor, ...]) -> None:
        _, channels, height, width = arguments[0].shape
        se, conv = block.se, block.conv_dw
        found[
            OpCall(
                BLOCK_OP,
                channels=channels,
                expanded=block.conv_pw.out_channels if isinstance(block, MBConv) else 0,
                out_channels=(block.conv_pwl if isinstance(block, MBConv) else block.conv_pw).out_channels,
                reduced=se.conv_reduce.out_channels if isinstance(se, SqueezeExcite) else 0,
                height=height,
                width=width,
                kernel=conv.kernel_size,
                stride=conv.stride[0],
                padding=tuple(explicit_padding(conv, height, width)),
                residual=block.has_skip,
            )
        ] = None

    for module in network.modules():
        if type(module) is (MBConv if expand else DepthwiseSeparable):
            module.register_forward_pre_hook(note)
    size = effkernels.models.model_config(model).input_size[-1]
    network(torch.empty(1, 3, size, size, device="meta"))
    return tuple(found)


def case_of(block: OpCall, dtype: torch.dtype, number: int = 0, **fields: Any) -> Case:
    names = ("channels", "expanded", "out_channels", "reduced", "height", "width", "kernel", "stride", "padding")
    copied = {name: getattr(block, name) for name in (*names, "residual")}
    return Case(BLOCK_OP, dtype, **{**copied, "parameters": ("same", "float32")[number % 2], **fields})


def late_blocks(model: str) -> list[OpCall]:
    return [block for block in blocks_of(model) if block.height <= 14]


def small_cases() -> Iterator[Case]:
    """Every late block of B0 and some of B4 on small planes, tf_ padding, without squeeze-and-excitation."""
    for number, block in enumerate(late_blocks("efficientnet_b0")):
        height, width = PLANES[number % 3]
        one, other = HALVES[number % 2], HALVES[1 - number % 2]
        yield case_of(block, one, number, height=height, width=width, batch=1)
        yield case_of(block, other, number + 1, height=height, width=width, batch=3)
        padding = same_padding(block, width, height)
        yield case_of(block, one, number + 1, height=width, width=height, padding=padding, batch=1)
        yield case_of(block, other, number, height=height, width=width, batch=2, reduced=0)
    wide = {(b.channels, b.kernel, b.stride): b for b in blocks_of("efficientnet_b4") if b.channels in (160, 272, 448)}
    for number, block in enumerate(wide.values()):
        shape = {"expanded": 104, "height": 6, "width": 5, "batch": 2}
        yield case_of(block, HALVES[number % 2], number, **shape)


def odd_cases() -> Iterator[tuple[str, Case]]:
    """What no network has: channels that 48 do not divide, images of a pixel, paddings of every kind; on a device."""
    base = Case(BLOCK_OP, channels=24, expanded=56, out_channels=40, height=11, width=10, parameters="same")
    cases = []
    for channels, expanded, out in ((8, 8, 8), (16, 200, 24), (72, 104, 136)):
        cases.append(base.with_(channels=channels, expanded=expanded, out_channels=out))
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
        one = base.with_(kernel=(kernel, kernel), stride=stride)
        half, most = kernel // 2, kernel - 1
        cases += [
            one.with_(padding=(0, 0, 0, 0), bias=True),
            one.with_(padding=(most, 0, 0, most), norm="statistics", reduced=1),
            one.with_(padding=(0, half, most, 1), batch=7, residual=True),
            one.with_(padding=(half,) * 4, height=1, width=1, batch=1),
            one.with_(padding=(half,) * 4, height=20, width=17, batch=1, expanded=200),
            one.with_(padding=(half,) * 4, height=3, width=60, batch=1, reduced=0),
            one.with_(padding=(half,) * 4, activation="hard_swish", expand_activation="gelu", norm="none"),
        ]
    cases += [base.with_(layout=layout) for layout in ("sliced", "sliced_rows", "contiguous", "expanded")]
    for number, case in enumerate(cases):
        yield list(DEVICES)[number % 3], case.with_(dtype=HALVES[number % 2])
    yield from ((device, base.with_(dtype=torch.float16, batch=5)) for device in DEVICES)


def plan_of(case: OpCall, limits: tuple[int, ...], dtype: str = "bfloat16") -> list[dict[str, str]]:
    activation = effkernels.ops.reference.ACTIVATIONS.index(case.expand_activation)
    shape = [case.batch, case.expanded, case.height, case.width, *case.kernel, case.stride, case.dilation]
    inner = case.channels
    if not case.expanded:
        shape[1], inner, activation = case.channels, 0, 0
    others = [case.reduced, inner, case.out_channels, int(case.residual), 0, activation]
    return planned(BLOCK_OP, [*shape, *case.padding, *others], limits, dtype)


def reference_of(case: Case, arguments: dict[str, Any]) -> torch.Tensor:
    """Return the block without norms and gate, in float64, what is between its stages rounded as the operator does."""
    conv2d, channels = torch.nn.functional.conv2d, case.expanded
    expanded = conv2d(arguments["x"].double(), arguments["expand_weight"].double()).to(case.dtype).double()
    weight, padding = arguments["weight"].double(), case.padding[0]
    convolved = conv2d(expanded, weight, stride=case.stride, padding=padding, groups=channels)
    convolved = convolved.clamp(0, 6).to(case.dtype).double()
    return conv2d(convolved, arguments["project_weight"].double())


def named(cases: Iterator[Case]) -> list[object]:
    return [pytest.param(case, id=str(case)) for case in dict.fromkeys(cases)]


class TestParity:
    @pytest.mark.parametrize("case", named(small_cases()))
    def test_blocks_of_networks_on_small_planes(self, case: Case, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        before = launches(emulated)
        check(case, emulated)
        assert launches(emulated) - before == 1

    @pytest.mark.parametrize(
        ("device", "case"), [pytest.param(*one, id="-".join(map(str, one))) for one in odd_cases()]
    )
    def test_odd_shapes(self, device: str, case: Case, emulated: Emulator) -> None:
        order, copies = {
            "H200": ("reverse", "early"),
            "portable": ("forward", "late"),
            "few": ("random", "late"),
            "A100": ("forward", "late"),
        }[device]
        emulated.configure(Emulation(order, copies, DEVICES[device], emulated.flavour))
        check(case, emulated)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", range(6))
    def test_late_blocks_of_b0_at_full_size(self, number: int, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        check(case_of(late_blocks("efficientnet_b0")[number], HALVES[number % 2], number, batch=1), emulated)

    def test_clusters_of_every_size(self, emulated: Emulator) -> None:
        """A cluster has as many blocks as the largest that the GPU has room for, or fewer."""
        for largest in (2, 4, 8, 16):
            limits = (*H200[:7], largest)
            emulated.configure(Emulation("random", "late", limits, emulated.flavour))
            case = Case(BLOCK_OP, torch.float16, channels=16, expanded=48 * largest, out_channels=24, height=6, width=5)
            check(case, emulated)
            assert [one["cluster"] for one in emulated.launches()] == [largest]

    @pytest.mark.parametrize("parameters", ["same", "float32"])
    def test_more_taps_and_norms_than_a_thread_reads_ahead(self, parameters: str, emulated: Emulator) -> None:
        """Four vectors of taps of 5x5 for each of 256 threads, and 32 norms a warp for 2 times 8 warps."""
        limits = (90, 1, *H200[2:7], 2)
        emulated.configure(Emulation("random", "late", limits, emulated.flavour))
        sizes = {"channels": 16, "expanded": 48 * 14, "out_channels": 24, "height": 5, "width": 5}
        case = Case(BLOCK_OP, torch.bfloat16, **sizes, kernel=(5, 5), padding=(2, 2, 2, 2), parameters=parameters)
        (line,) = plan_of(case, limits)
        assert (line["kernel"], int(line["groups"])) == ("mbconv", 7)
        check(case, emulated)

    @pytest.mark.parametrize("name", ["weight", "w_reduce", "w_expand"])
    def test_parameters_that_are_not_aligned_are_read_one_by_one(self, name: str, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        for parameters in ("same", "float32"):
            case = Case(BLOCK_OP, torch.float16, channels=16, expanded=104, out_channels=24, parameters=parameters)
            arguments = case.draw()
            (expected,) = call(emulated, case.op, arguments)
            parameter = arguments[name]
            moved = torch.empty(parameter.numel() + 1, dtype=parameter.dtype)[1:].view(parameter.shape)
            before = launches(emulated)
            (result,) = call(emulated, case.op, {**arguments, name: moved.copy_(parameter)})
            assert launches(emulated) - before == 1
            assert torch.equal(result, expected)

    @pytest.mark.parametrize("reduced", [1, 3, 6, 300])
    def test_any_number_of_hidden_values(self, reduced: int, emulated: Emulator) -> None:
        """Rows of w_expand of any length; more hidden values than threads."""
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        sizes = {"channels": 16, "expanded": 104, "out_channels": 24, "height": 5, "width": 6, "batch": 1}
        for parameters in ("same", "float32"):
            case = Case(BLOCK_OP, torch.bfloat16, **sizes, reduced=reduced, parameters=parameters)
            (line,) = plan_of(case, H200)
            assert line["kernel"] == "mbconv"
            check(case, emulated)

    @pytest.mark.parametrize(
        ("size", "windows"),
        [((14, 14), 14), ((14, 13), 14), ((16, 12), 14), ((17, 29), 14), ((7, 7), 4), ((8, 4), 4), ((9, 5), 4)],
    )
    def test_windows_of_both_widths(self, size: tuple[int, int], windows: int, emulated: Emulator) -> None:
        """Two parts of 8 rows by 14 or 4 columns each: whole ones, and some that are cut or not there."""
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        for kernel, dtype in ((3, torch.float16), (5, torch.bfloat16)):
            half = (kernel // 2,) * 4
            sizes = {"channels": 8, "expanded": 56, "out_channels": 8, "height": size[0], "width": size[1]}
            case = Case(BLOCK_OP, dtype, **sizes, kernel=(kernel, kernel), padding=half, batch=1, parameters="same")
            (line,) = plan_of(case, H200, str(dtype).removeprefix("torch."))
            assert (line["kernel"], int(line["window_columns"])) == ("mbconv", windows)
            check(case, emulated)

    @pytest.mark.parametrize("kernel", [3, 5])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("plane", [7, 14])
    def test_an_infinite_channel_spoils_no_other(
        self, kernel: int, stride: int, plane: int, emulated: Emulator
    ) -> None:
        """Its tensor cores multiply it by the zeros between the taps of other channels, which is NaN. ReLU6 makes
        finite values of it again; the largest numbers are infinite once they are rounded to float16."""
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        half = (kernel // 2,) * 4
        sizes = {"channels": 8, "expanded": 56, "out_channels": 8, "height": plane, "width": plane, "reduced": 0}
        case = Case(BLOCK_OP, torch.float16, **sizes, kernel=(kernel, kernel), stride=stride, padding=half, batch=1,
                    parameters="same", norm="none", expand_activation="identity", activation="relu6")  # fmt: skip
        arguments = case.draw()
        (line,) = plan_of(case, H200, "float16")
        assert line["kernel"] == "mbconv"
        arguments["x"][:, :, plane // 2, plane // 3] = 300
        arguments["expand_weight"].fill_(0.125)
        arguments["expand_weight"][10] = -300
        arguments["expand_weight"][19] = 300
        (result,) = call(emulated, case.op, arguments)
        expanded = torch.nn.functional.conv2d(arguments["x"].double(), arguments["expand_weight"].double()).half()
        assert expanded[:, 10].isinf().any()
        assert expanded[:, 19].isinf().any()
        assert expanded.isfinite().sum() > 0.9 * expanded.numel()
        truth = reference_of(case, arguments)
        assert truth.isfinite().all()
        torch.testing.assert_close(result.double(), truth, rtol=4e-3, atol=4e-3)

    def test_several_passes_and_one_slot_of_weights(self, emulated: Emulator) -> None:
        """Where the sums of all output channels, or the weights of all groups, do not fit beside the rest."""
        limits = (90, 1, *H200[2:3], 62_000, *H200[4:7], 4)
        emulated.configure(Emulation("random", "late", limits, emulated.flavour))
        sizes = {"channels": 64, "expanded": 576, "out_channels": 64, "height": 6, "width": 6}
        case = Case(BLOCK_OP, torch.bfloat16, **sizes, batch=3, residual=True)
        (line,) = plan_of(case, limits)
        assert (int(line["weight_slots"]), int(line["groups"]), int(line["images"])) == (1, 3, 3)
        assert int(line["passes"]) > 1
        assert int(line["shared"]) <= limits[3]
        check(case, emulated)


class TestLaunches:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"channels": 20}, "compiled"),
            ({"expanded": 100}, "compiled"),
            ({"out_channels": 20}, "vectors"),
            ({"kernel": (7, 7), "padding": (3, 3, 3, 3)}, "compiled"),
            ({"dilation": 2, "padding": (2, 2, 2, 2)}, "compiled"),
            ({"dtype": torch.float32}, "float32"),
        ],
        ids=str,
    )
    def test_what_the_kernel_does_not_take_is_three_launches(
        self, change: dict[str, Any], reason: str, emulated: Emulator
    ) -> None:
        emulated.configure(Emulation(flavour=emulated.flavour))
        case = replace(Case(BLOCK_OP, torch.float16, channels=24, expanded=96, out_channels=24), **change)
        dtype = str(case.dtype).removeprefix("torch.")
        lines = plan_of(case, H200, dtype)
        kernels = [line["kernel"] for line in lines]
        assert kernels[0] == kernels[2] == "pointwise"
        assert kernels[1].startswith("depthwise")
        assert reason in lines[0]["reason"]
        check(case, emulated)  # the first call on a device may take and fill memory for counters
        before = launches(emulated)
        call(emulated, case.op, case.draw())
        assert launches(emulated) - before == 3

    @pytest.mark.parametrize(("limits", "plane"), [(A100, 14), (H200, 120)], ids=["no clusters", "a large plane"])
    def test_what_no_cluster_holds_is_a_queue(self, limits: tuple[int, ...], plane: int) -> None:
        case = Case(BLOCK_OP, torch.float16, channels=24, expanded=96, out_channels=24, height=plane, width=plane)
        (line,) = plan_of(case, limits)
        assert line["kernel"] == "mbconv_queue"

    def test_a_cluster_that_the_gpu_has_no_room_for_is_answered_by_a_smaller_one(self, emulated: Emulator) -> None:
        """And then by a queue of items; disabled multiprocessors may leave no group of them that large."""
        emulated.configure(Emulation(flavour=emulated.flavour))
        sizes = {"channels": 16, "expanded": 480, "out_channels": 24, "height": 7, "width": 7}
        case = Case(BLOCK_OP, torch.float16, **sizes, parameters="same")
        check(case, emulated)
        assert [one["cluster"] for one in emulated.launches()] == [10]
        for room, clusters in ((9, [5]), (2, [1])):
            emulated.module.refuse_clusters_above(room)
            try:
                check(case, emulated)
                emulated.module.clear_launches()
                check(case, emulated)
            finally:
                emulated.module.refuse_clusters_above(16)
            assert [one["cluster"] for one in emulated.launches()] == clusters

    def test_an_input_that_is_not_aligned_is_three_launches(self, emulated: Emulator) -> None:
        """The plan without tensors assumes that they are."""
        emulated.configure(Emulation(flavour=emulated.flavour))
        case = Case(BLOCK_OP, torch.float16, channels=24, expanded=96, out_channels=24, height=7, width=7)
        arguments = case.draw()
        x = arguments["x"]
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        (aligned,) = call(emulated, case.op, arguments)
        call(emulated, case.op, {**arguments, "x": shifted.copy_(x)})
        before = launches(emulated)
        (other,) = call(emulated, case.op, {**arguments, "x": shifted})
        assert launches(emulated) - before == 3
        torch.testing.assert_close(aligned, other, rtol=2e-2, atol=1e-2)

    def test_no_images(self, emulated: Emulator) -> None:
        case = Case(BLOCK_OP, torch.float16, channels=24, expanded=96, out_channels=24, batch=0)
        (y,) = call(emulated, case.op, case.draw())
        assert y.shape == (0, 24, 13, 14)


@pytest.mark.usefixtures("compiled")
class TestPlan:
    def test_late_blocks_of_b0_are_one_launch_for_few_images(self) -> None:
        for block in late_blocks("efficientnet_b0"):
            for batch in (1, 2, 4, 8):
                (line,) = plan_of(block.with_(batch=batch), H200)
                assert line["kernel"] == "mbconv"
                assert int(line["images"]) == 1

    def test_many_images_are_a_queue(self) -> None:
        """They fill the GPU, and adding sums of blocks that each have all pixels costs more than reading them again."""
        for block in late_blocks("efficientnet_b0"):
            (line,) = plan_of(block.with_(batch=256), H200)
            assert line["kernel"] == "mbconv_queue"

    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    def test_the_cut_covers_the_block(self, gpu: Any) -> None:
        limits = tuple(gpu.limits())
        for block in (*blocks_of("efficientnet_b0"), *blocks_of("efficientnet_b4"), *blocks_of("efficientnet_b7")):
            for batch in (1, 7, 16, 32):
                lines = plan_of(block.with_(batch=batch), limits)
                if lines[0]["kernel"] != "mbconv":
                    assert len(lines) == 1 or lines[0]["reason"]
                    continue
                cut = {name: int(value) for name, value in lines[0].items() if value.isdigit()}
                team, groups = cut["team"], cut["groups"]
                assert 1 < team <= limits[7] or cut["channel_groups"] == groups
                assert cut["cluster"] == team
                assert (team - 1) * groups < cut["channel_groups"] <= team * groups
                assert cut["channel_groups"] == -(-block.expanded // 48)
                assert cut["grid"] == -(-batch // cut["images"]) * team
                assert cut["weight_slots"] in (1, groups)
                assert cut["ring_slots"] in (1, groups)
                assert cut["ring_slots"] == 1 or cut["weight_slots"] == groups
                assert cut["tile_columns"] <= (96, 112)[cut["projected"]]
                assert (cut["passes"] - 1) * cut["pass_columns"] < block.out_channels
                assert block.out_channels <= cut["passes"] * cut["pass_columns"]
                assert cut["shared"] <= limits[3]

    def test_a_plane_too_large_for_32_bits_is_three_launches(self) -> None:
        small = Case(BLOCK_OP, torch.bfloat16, channels=8, expanded=8, out_channels=8, batch=1)
        lines = plan_of(small.with_(height=1 << 20, width=1 << 10), H200)
        assert "shared-memory" in lines[0]["reason"] or "compiled" in lines[0]["reason"]

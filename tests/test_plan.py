"""The launch plan: complete, pure, and its counts held against counts made in other ways."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import op_cases
import pytest
import torch
from emulation.control import Emulation, Emulator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effkernels
from effkernels import ops
from effkernels.bench import check
from effkernels.commands.common import why_no_gpu
from effkernels.models import EfficientNet, peers
from effkernels.models.architecture import Architecture
from effkernels.ops.call import OpCall, prepared, run
from effkernels.plan import gpus, launches
from effkernels.plan.gpus import GPUS
from effkernels.plan.launches import PRECISIONS, Plan, PlannedLaunch, Totals, plan_call, plan_model
from effkernels.plan.record import RecordedCall, record_calls
from effkernels.plan.time_estimate import TimeEstimate

pytestmark = pytest.mark.usefixtures("compiled")

CLASSES = 1000


@dataclass
class Count:
    """The bytes and FLOPs of one part of the network, added up by hand."""

    bytes: int
    special_functions: int


def counted_by_hand(
    architecture: Architecture, batch: int, size: int, dtype: torch.dtype, one_launch: Collection[str] = ()
) -> dict[str, Count]:
    """Return the bytes and special functions per part of an EfficientNet, from nothing but the table of its stages.

    Bytes: what each operator reads and writes, with nothing left on the chip in between, but for the blocks of
    `one_launch`, of which only input, result and parameters count. Special functions: one for a
    swish in 16-bit types and two in float32, two for a sigmoid, one per channel of a norm.
    """
    swish = 2 if dtype == torch.float32 else 1
    found: dict[str, Count] = {}

    def norm(channels: int) -> int:
        return 4 * channels

    def part(name: str, elements: int, special: int) -> None:
        found[name] = Count(elements * dtype.itemsize, special)

    side = math.ceil(size / 2)
    channels = architecture.stem_channels
    result = batch * channels * side**2
    part("conv_stem", batch * 3 * size**2 + 27 * channels + norm(channels) + result, swish * result + channels)
    for stage_number, stage in enumerate(architecture.stages):
        for layer in range(stage.layers):
            stride = stage.stride if layer == 0 else 1
            reduced = max(1, round(channels * architecture.se_ratio))
            wide, out = channels * stage.expansion, stage.channels
            out_side = math.ceil(side / stride)
            x, expanded = batch * channels * side**2, batch * wide * side**2
            inner, result = batch * wide * out_side**2, batch * out * out_side**2
            gates = batch * wide
            elements = special = 0
            if stage.expansion > 1:
                elements += x + channels * wide + norm(wide) + expanded
                special += swish * expanded + wide
            excite = 2 * wide * reduced + wide + reduced
            elements += expanded + stage.kernel_size**2 * wide + norm(wide) + excite + inner + gates
            special += swish * inner + wide + 2 * batch * reduced + 2 * gates
            elements += inner + gates + wide * out + norm(out) + result
            special += out
            name = f"blocks.{stage_number}.{layer}"
            if name in one_launch:
                elements -= 2 * (expanded * (stage.expansion > 1) + inner + gates)
            elif stride == 1 and channels == out:
                elements += x
            part(name, elements, special)
            channels, side = out, out_side
    head = architecture.head_channels
    maps = batch * head * side**2
    of_head = batch * channels * side**2 + channels * head + norm(head) + batch * head  # the means of the maps
    part("conv_head", of_head, swish * maps + head)
    part("classifier", batch * head + head * CLASSES + CLASSES + batch * CLASSES, 0)
    return found


def model_on_meta(name: str) -> EfficientNet:
    model = effkernels.create_model(name, device="meta").eval()
    assert isinstance(model, EfficientNet)
    return model


def parts_of(planned: Plan, architecture: Architecture) -> dict[str, list[str]]:
    """Return the parts of the network that each layer of a plan has: of a stack from its first block to its last."""
    blocks = [f"blocks.{number}.{layer}" for number, s in enumerate(architecture.stages) for layer in range(s.layers)]
    found = {}
    for one in planned.launches:
        found[one.layer] = [one.block_of_network]
        if one.stacked > 1:
            first, last = one.layer.split("-")
            found[one.layer] = blocks[blocks.index(first) : blocks.index(f"blocks.{last}") + 1]
    return found


def without_workspace(launches: tuple[PlannedLaunch, ...], part: str) -> int:
    """Return the bytes of a part of the network but for scratch memory, which is the kernel's own business."""
    return sum(one.bytes - 2 * one.workspace_bytes for one in launches if one.block_of_network == part)


class TestCounts:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize(
        ("name", "size", "batch"),
        [("efficientnet_b0", 224, 1), ("efficientnet_b0", 224, 32), ("tf_efficientnet_b4", 380, 2)],
    )
    def test_bytes_and_special_functions_are_those_counted_by_hand(
        self, name: str, size: int, batch: int, precision: str
    ) -> None:
        planned = plan_model(name, batch_size=batch, img_size=size, precision=precision)
        architecture = model_on_meta(name).architecture
        parts = parts_of(planned, architecture)
        one_launch = {part for one in planned.launches if one.kernel.startswith("mbconv") for part in parts[one.layer]}
        assert bool(one_launch) == (precision != "float32")
        by_hand = counted_by_hand(architecture, batch, size, PRECISIONS[precision], one_launch)
        for stack in (one.layer for one in planned.launches if one.stacked > 1):
            counts = [by_hand.pop(part) for part in parts[stack]]
            by_hand[stack] = Count(sum(one.bytes for one in counts), sum(one.special_functions for one in counts))
        assert {part: without_workspace(planned.launches, part) for part in planned.by_block()} == {
            part: count.bytes for part, count in by_hand.items()
        }
        assert {part: sums.special_functions for part, sums in planned.by_block().items()} == {
            part: count.special_functions for part, count in by_hand.items()
        }

    def test_activations_are_those_of_one_kernel_per_stage(self) -> None:
        """Megabytes per image and block of B0 in 16-bit types, counted before there was a kernel; gates come on top. In
        float32, half of the bytes: a block is not one launch there."""
        published = [2.810, 6.573, 4.064, 2.471, 1.693, 1.035, 0.847, 0.847, 0.828, 1.185, 1.185, 0.721, 0.508, 0.508,
                     0.508, 0.502]  # fmt: skip
        one, two = (
            plan_model("efficientnet_b0", gpu="a100", batch_size=batch, precision="float32").launches
            for batch in (1, 2)
        )
        widths = {}
        channels = 32
        for number, stage in enumerate(model_on_meta("efficientnet_b0").architecture.stages):
            for layer in range(stage.layers):
                widths[f"blocks.{number}.{layer}"] = channels * stage.expansion
                channels = stage.channels
        per_image = [
            (without_workspace(two, block) - without_workspace(one, block)) / 2 - 2 * 2 * width
            for block, width in widths.items()
        ]
        assert [round(count / 1e6, 3) for count in per_image] == published
        stem = (without_workspace(two, "conv_stem") - without_workspace(one, "conv_stem")) / 2
        assert round((sum(per_image) + stem) / 1e6, 1) == 27.4

    @pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b3"])
    def test_flops_are_those_pytorch_counts_in_its_own_operators(self, name: str) -> None:
        images = torch.empty(3, 3, 224, 224, device="meta")
        with effkernels.backend("reference"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model_on_meta(name)(images)
        assert plan_model(name, batch_size=3, img_size=224).totals.flops == counter.get_total_flops()

    @pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
    def test_bytes_of_a_call_are_those_of_the_benchmarks(self, dtype: torch.dtype) -> None:
        for case in check.op_calls():
            (call,) = recorded(case, dtype)
            assert launches.moved_bytes(call) == case.bytes_moved(dtype), str(case)

    def test_a_tensor_read_twice_counts_once_and_an_expanded_one_as_stored(self) -> None:
        x = torch.empty(2, 8, 4, 4, device="meta", memory_format=torch.channels_last)
        weight = torch.empty(8, 8, 1, 1, device="meta")
        call = RecordedCall("effkernels::pointwise_bn_act", "", {"x": x, "weight": weight, "residual": x}, [x], 0)
        assert launches.moved_bytes(call) == (2 * 2 * 8 * 16 + 64) * 4
        expanded = torch.empty(1, 8, 1, 1, device="meta").expand(2, 8, 4, 4)
        call = RecordedCall("aten::add", "", {"self": x, "other": expanded}, [x], 0)
        assert launches.moved_bytes(call) == (2 * 2 * 8 * 16 + 8) * 4

    def test_eager_pytorch_launches_ten_times_as_often_and_moves_six_times_the_bytes(self) -> None:
        """The claim of docs/gpu.md about B0 in bfloat16, counted by the same rule over timm's network."""
        peers.import_timm()
        import timm

        images = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16, device="meta")
        with torch.device("meta"):
            eager = timm.create_model("efficientnet_b0").eval().to(torch.bfloat16)
        calls = record_calls(eager, images.to(memory_format=torch.channels_last))
        ours = plan_model("efficientnet_b0", batch_size=256).totals
        assert len(calls) > 10 * ours.launches
        assert sum(launches.moved_bytes(call) for call in calls) > 6 * ours.bytes


class CallsAnOperator(nn.Module):
    def __init__(self, case: OpCall, dtype: torch.dtype) -> None:
        super().__init__()
        self.call = prepared(ops, case.op, case.arguments(dtype, "meta"))

    def forward(self, images: Tensor) -> Any:
        return self.call()


def recorded(case: OpCall, dtype: torch.dtype) -> list[RecordedCall]:
    """Return the calls that one call of an operator records."""
    return record_calls(CallsAnOperator(case, dtype), torch.empty(0, device="meta"))


class TestLaunches:
    @pytest.mark.parametrize("batch", [1, 32, 256])
    @pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS])
    def test_a_block_of_b0_takes_one(self, gpu: str, batch: int) -> None:
        planned = plan_model("efficientnet_b0", gpu=gpu, batch_size=batch)
        blocks = {name: sums.launches for name, sums in planned.by_block().items() if name.startswith("blocks.")}
        parts = parts_of(planned, model_on_meta("efficientnet_b0").architecture).values()
        assert len({part for named in parts for part in named if part.startswith("blocks.")}) == 16
        assert max(blocks.values()) == 1

    @pytest.mark.parametrize("batch", [1, 8, 256])
    def test_b0_on_a_gpu_with_clusters(self, batch: int) -> None:
        """Few images: clusters hold those of the small planes, from blocks.3.1 on, and those before are items of a
        queue. Many images: all are items of one queue."""
        planned = plan_model("efficientnet_b0", gpu="h200", batch_size=batch)
        stacks = [(one.kernel, one.layer, one.stacked) for one in planned.launches if one.stacked > 1]
        few = [("mbconv_queue", "blocks.0.0-3.0", 6), ("mbconv_stack", "blocks.3.1-6.0", 10)]
        assert stacks == (few if batch <= 8 else [("mbconv_queue", "blocks.0.0-6.0", 16)])

    def test_every_operator_of_a_forward_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counted by PyTorch's profiler in a forward that really runs, cut into operators as on a GPU."""
        monkeypatch.setattr("effkernels.nn.mbconv._keeps_expanded", lambda x, backend: False)
        model = effkernels.create_model("efficientnet_b0").eval()
        with torch.inference_mode(), torch.profiler.profile() as profile:
            model(torch.zeros(1, 3, 32, 32))
        ran = {event.key: event.count for event in profile.key_averages() if event.key.startswith("effkernels::")}
        assert ran
        with torch.no_grad():
            calls = record_calls(model_on_meta("efficientnet_b0"), torch.empty(1, 3, 32, 32, device="meta"))
        assert ran == Counter(call.op for call in calls if call.op.startswith("effkernels::"))

    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    @pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
    def test_every_operator_has_launches_within_the_gpus_limits(self, dtype: torch.dtype, gpu: gpus.Gpu) -> None:
        for case in check.op_calls():
            (call,) = recorded(case, dtype)
            launches = plan_call(call, gpu, allow_tf32=True)
            assert 1 <= len(launches) <= (3 if case.op == op_cases.BLOCK_OP else 2), str(case)
            for launch in launches:
                if launch.grid is None or launch.block is None or launch.shared_bytes is None:
                    assert launch.kernel.startswith("aten::")
                    continue
                assert launch.grid >= 1
                assert 1 <= launch.block[0] * launch.block[1] <= 1024
                assert 0 <= launch.shared_bytes <= gpu.capability.shared_per_block
                assert 1 <= launch.cluster <= gpu.capability.largest_cluster
                assert launch.grid % launch.cluster == 0
                if launch.cooperative:
                    assert launch.grid <= gpu.multiprocessors * gpu.capability.blocks_per_multiprocessor

    def test_operators_that_promise_one_launch_have_one(self) -> None:
        promised = set(op_cases.ALL_OPS) - {"conv_bn_act", "depthwise_bn_act_se", op_cases.EXPAND_OP, op_cases.BLOCK_OP}
        for case in check.op_calls():
            if case.op in promised:
                (call,) = recorded(case, torch.bfloat16)
                assert len(plan_call(call, gpus.find("a100"), allow_tf32=True)) == 1

    def test_squeeze_and_excitation_that_fits_no_cluster_takes_a_second_pass(self) -> None:
        """The result is written once and read and written once more; the gate goes from the first to the second."""
        small, large = (
            plan_call(recorded(case, torch.bfloat16)[0], gpus.find("h200"), allow_tf32=True)
            for case in (OpCall.on("depthwise_bn_act_se", (2, 64, size, size), reduced=4) for size in (14, 380))
        )
        assert len(small) == 1
        first, second = large
        result, gate = 2 * 64 * 380**2 * 2, 2 * 64 * 2
        assert second.bytes == 2 * result + gate
        parameters = 2 * (9 * 64) + 2 * (2 * 4 * 64) + 4 * (4 * 64 + 64 + 4)
        assert first.bytes - 2 * first.workspace_bytes == 2 * result + gate + parameters
        assert (second.flops, second.special_functions) == (0, 0)

    def test_a_convolution_of_pytorchs_is_activated_in_a_second_pass(self) -> None:
        case = OpCall.on("conv_bn_act", (2, 64, 32, 32), out_channels=128, stride=2)
        (call,) = recorded(case, torch.bfloat16)
        first, second = plan_call(call, gpus.find("h200"), allow_tf32=True)
        assert (first.kernel, first.is_own, first.grid) == ("aten::convolution", False, None)
        norm = 4 * 4 * 128
        assert (second.is_own, second.flops, second.bytes) == (True, 0, 2 * call.results[0].nbytes + norm)
        assert first.special_functions == 0
        assert second.special_functions == call.results[0].numel() + 128
        assert first.bytes == case.bytes_moved(torch.bfloat16) - norm

    def test_layers_are_module_paths(self) -> None:
        model = model_on_meta("efficientnet_b0")
        planned = plan_model("efficientnet_b0")
        parts = parts_of(planned, model.architecture).values()
        layers = {one.layer for one in planned.launches if one.stacked == 1}
        assert layers | {part for named in parts for part in named} <= {path for path, _ in model.named_modules()}
        assert [launch.layer for launch in planned.launches] == [
            "conv_stem", "blocks.0.0-3.0", "blocks.3.1-6.0", "conv_head", "classifier",
        ]  # fmt: skip

    def test_pytorchs_own_are_listed_and_views_are_not(self) -> None:
        planned = plan_model("efficientnet_b0", batch_size=2)
        foreign = [launch for launch in planned.launches if not launch.is_own]
        assert [(launch.layer, launch.kernel) for launch in foreign] == [
            ("classifier", "aten::addmm"),
        ]
        assert all(launch.grid is launch.block is launch.shared_bytes is None for launch in foreign)

    def test_a_module_that_does_not_fuse_shows_its_parts(self) -> None:
        model = model_on_meta("efficientnet_b0")
        model.blocks[0][0].conv_dw.register_forward_hook(lambda *_: None)
        calls = record_calls(model, torch.empty(1, 3, 64, 64, device="meta"))
        parts = [call.op for call in calls if call.layer.startswith("blocks.0.0")]
        assert {"aten::convolution", "aten::mean", "aten::sigmoid"} <= set(parts)


def small_calls() -> list[OpCall]:
    """Calls of every operator and every kernel that are quick to emulate."""
    product = partial(OpCall.on, "pointwise_bn_act", activation="identity")
    stem = partial(OpCall.on, "conv_bn_act", stride=2)
    return [
        product((2, 24, 9, 7), out_channels=40),
        product((2, 24, 9, 7), out_channels=40, gated=True, residual=True),
        product((1, 7, 5, 5), out_channels=11, gated=True),
        product((2, 24, 30, 31), out_channels=48, activation="silu"),
        product((1, 2048, 5, 5), out_channels=32, activation="hard_swish", gated=True, residual=True),
        stem((2, 3, 20, 18), out_channels=32),
        stem((2, 3, 20, 24), out_channels=32),
        stem((1, 40, 9, 9), out_channels=24),
        OpCall.on("depthwise_bn_act", (2, 24, 13, 14)),
        OpCall.on("depthwise_bn_act", (1, 7, 9, 9), 5, stride=2),
        OpCall.on("depthwise_bn_act_squeeze", (1, 160, 26, 28), 5),
        OpCall.on("depthwise_bn_act_gate", (2, 24, 13, 14), stride=2),
        OpCall.on("depthwise_bn_act_gate", (1, 160, 26, 28), 5),
        OpCall.on("depthwise_bn_act_se", (2, 64, 14, 14), 5),
        OpCall.on("depthwise_bn_act_se", (2, 7, 14, 14)),
        OpCall.on("squeeze_excite_gate", (3, 40)),
        OpCall.on("expand_depthwise_squeeze", (2, 24, 13, 14), out_channels=104),
        OpCall.on("expand_depthwise_squeeze", (1, 16, 30, 31), 5, out_channels=96, stride=2),
        OpCall.on("expand_depthwise_squeeze", (1, 7, 9, 9), out_channels=12),
        OpCall.on("mbconv", (1, 16, 7, 7), out_channels=16, residual=True),
        OpCall.on("mbconv", (2, 24, 9, 10), 5, out_channels=40, stride=2),
        OpCall.on("mbconv", (2, 24, 45, 50), out_channels=24, residual=True),
        OpCall.on("mbconv", (1, 7, 9, 9), out_channels=12),
        OpCall.on("mbconv", (2, 40, 23, 20), expanded=0, out_channels=16),
        OpCall.on("mbconv", (1, 56, 9, 10), expanded=0, out_channels=24),
        OpCall.on("mbconv", (2, 32, 9, 8), 5, expanded=0, out_channels=16),
    ]


class TestEmulated:
    """The plan against what the kernels do when they run."""

    @pytest.mark.parametrize("gpu", ["h200", "a100"])
    @pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
    def test_kernels_are_launched_as_planned(self, emulated: Emulator, dtype: torch.dtype, gpu: str) -> None:
        for case in small_calls():
            planned, launched = planned_and_launched(emulated, case, dtype, gpu)
            assert [(one.grid, one.block, one.shared_bytes, one.cluster, one.cooperative) for one in planned] == [
                (one["grid"][0], one["block"][:2], one["shared_bytes"], one["cluster"], one["cooperative"])
                for one in launched
            ], str(case)

    @pytest.mark.parametrize("gpu", ["h200", "a100"])
    @pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
    def test_planned_bytes_are_those_that_kernels_touch(self, emulated: Emulator, dtype: torch.dtype, gpu: str) -> None:
        """Each byte of memory that a launch reads and each that it writes, counted once by the emulator. It leaves out
        what atomics touch: the counters of arrivals, at most two a block, which the plan counts as scratch memory.
        """
        if emulated.flavour != "race":
            pytest.skip("only the race flavour of the emulator counts bytes: make test-race")
        for case in small_calls():
            planned, launched = planned_and_launched(emulated, case, dtype, gpu)
            for one, counted in zip(planned, launched, strict=True):
                assert one.grid is not None
                left_out = one.bytes - counted["unique_bytes_read"] - counted["unique_bytes_written"]
                counters = 2 * 2 * 4 * one.grid if one.workspace_bytes > 0 else 0
                assert 0 <= left_out <= counters, f"{case}: {one.kernel}"


def planned_and_launched(
    emulated: Emulator, case: OpCall, dtype: torch.dtype, gpu: str
) -> tuple[list[PlannedLaunch], list[dict[str, Any]]]:
    """This project's kernels of a call, as planned for a GPU and as the emulated GPU launched them."""
    limits = gpus.find(gpu).limits()
    emulated.configure(Emulation(limits=tuple(limits), flavour=emulated.flavour))
    with emulated.in_place_of_cpu(), effkernels.backend("cpu"), torch.no_grad():
        run(ops, case.op, case.arguments(dtype))
    (call,) = recorded(case, dtype)
    return [one for one in plan_call(call, gpus.find(gpu), allow_tf32=False) if one.is_own], emulated.launches()


class TestFloor:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    def test_is_the_longest_of_what_the_rates_allow(self, gpu: gpus.Gpu, precision: str) -> None:
        rates = {"tensor": gpu.tensor, "tf32": gpu.tf32, "float32": gpu.float32}
        for launch in plan_model("efficientnet_b0", gpu=gpu, batch_size=8, precision=precision).launches:
            times = {
                "memory": launch.bytes / gpu.bandwidth,
                launch.unit: launch.flops / rates[launch.unit],
                "special": launch.special_functions / (16 * gpu.multiprocessors * gpu.clock),
            }
            assert launch.floor_us == pytest.approx(1e6 * max(times.values()))
            assert times[launch.limited_by] == max(times.values())

    def test_tf32_is_for_float32_convolutions(self) -> None:
        with_tf32, exact, half = (
            {launch.layer: launch.unit for launch in plan_model("efficientnet_b0", **options).launches}
            for options in (
                {"precision": "float32"},
                {"precision": "float32", "allow_tf32": False},
                {"precision": "float16"},
            )
        )
        assert with_tf32["conv_head"] == "tf32"
        assert with_tf32["classifier"] == "float32"
        assert set(exact.values()) == {"float32"}
        assert half["conv_head"] == half["classifier"] == "tensor"
        assert with_tf32["blocks.0.0.conv_dw"] == exact["blocks.0.0.conv_dw"] == "float32"


class TestPlan:
    def test_sums(self) -> None:
        planned = plan_model("efficientnet_b0", batch_size=4)
        assert planned.totals == Totals.of(planned.launches)
        assert planned.totals.launches == len(planned.launches)
        for field in ("launches", "bytes", "flops", "special_functions"):
            assert sum(getattr(sums, field) for sums in planned.by_block().values()) == getattr(planned.totals, field)
        assert sum(sums.floor_us for sums in planned.by_block().values()) == pytest.approx(planned.totals.floor_us)

    def test_json_round_trip(self) -> None:
        planned = plan_model("efficientnet_b0", gpu="l4")
        text = planned.to_json()
        assert Plan.from_json(text) == planned
        report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert report["totals"]["launches"] == len(report["launches"]) == len(planned.launches)
        assert report["blocks"].keys() == planned.by_block().keys()

    def test_is_a_pure_function(self) -> None:
        first = plan_model("efficientnet_b1", batch_size=3, precision="float16")
        torch.manual_seed(7)
        with effkernels.backend("reference"):
            assert plan_model("efficientnet_b1", batch_size=3, precision="float16") == first
        assert plan_model("efficientnet_b1", gpu="H200", batch_size=3, img_size=240, precision="float16") == first

    def test_nothing_stays_attached(self) -> None:
        hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
        before = [dict(registered) for registered in hooks]
        plan_model("efficientnet_b0")
        with pytest.raises(ValueError, match="needed are images"):
            record_calls(model_on_meta("efficientnet_b0"), torch.empty(1, 4, 32, 32, device="meta"))
        assert [dict(registered) for registered in hooks] == before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "efficientnet_b9"}, "unknown model 'efficientnet_b9': did you mean efficientnet_b"),
            ({"gpu": "v100"}, "'v100' is not in the table of GPUs; allowed: a100, h100, h200, l4, rtx4090, rtx5090"),
            ({"precision": "int8"}, "precision='int8' is not known; allowed: float32, float16, bfloat16"),
            ({"batch_size": 0}, "batch_size=0 must be at least 1"),
            ({"img_size": -1}, "img_size=-1 must be at least 1"),
        ],
    )
    def test_wrong_arguments_are_named(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plan_model(**({"name": "efficientnet_b0"} | arguments))

    def test_without_the_library_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("effkernels._library.is_loaded", lambda: False)
        monkeypatch.setattr("effkernels._library.load_error", lambda: "no such file")
        with pytest.raises(RuntimeError, match=r"a plan needs the compiled library.*no such file"):
            plan_model("efficientnet_b0")


class TestGpus:
    @pytest.mark.parametrize("name", ["h200", "H200", "RTX 4090", "rtx-4090", "RTX5090"])
    def test_names(self, name: str) -> None:
        assert gpus.find(name).name == name.lower().replace(" ", "").replace("-", "")

    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    def test_published_figures_agree_with_each_other(self, gpu: gpus.Gpu) -> None:
        lanes = 64 if gpu.capability.number == 80 else 128  # float32 multiply-adds per clock and multiprocessor
        assert gpu.float32 == pytest.approx(2 * lanes * gpu.multiprocessors * gpu.clock, rel=0.01)
        assert gpu.tf32 == pytest.approx(gpu.tensor / 2, rel=0.01)
        assert gpu.capability.shared_per_multiprocessor - gpu.capability.shared_per_block == 1024
        assert (gpu.capability.largest_cluster > 1) == (gpu.capability.number >= 90)
        assert gpu.source

    def test_limits_have_the_order_of_the_library(self) -> None:
        assert gpus.find("a100").limits() == [80, 108, 167936, 166912, 2048, 32, 65536, 1]
        assert gpus.find("h200").limits() == [90, 132, 233472, 232448, 2048, 32, 65536, 16]

    def test_table_is_right_about_the_gpu_of_this_machine(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip(why_no_gpu())
        name = torch.cuda.get_device_name()
        gpu = gpus.of_this_machine()
        if gpu is None:
            pytest.skip(f"{name} is not in the table of GPUs")
        assert gpu.limits() == torch.ops.effkernels.cuda_limits(torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(0)
        assert gpu.multiprocessors == properties.multi_processor_count
        assert gpu.l2 == properties.L2_cache_size
        assert gpu.memory * 2**30 == pytest.approx(properties.total_memory, rel=0.05)

    def test_a_machine_without_a_gpu_has_no_entry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert gpus.of_this_machine() is None

    def test_plans_depend_only_on_limits(self) -> None:
        """Another GPU with the same limits has the same launches, at other floors."""
        h200 = gpus.find("h200")
        slow = replace(h200, name="slow", bandwidth=h200.bandwidth / 2)
        fast, other = (plan_model("efficientnet_b0", gpu=gpu).launches for gpu in (h200, slow))
        assert [replace(launch, floor_us=0, limited_by="", time=TimeEstimate()) for launch in fast] == [
            replace(launch, floor_us=0, limited_by="", time=TimeEstimate()) for launch in other
        ]
        assert all(a.floor_us <= b.floor_us for a, b in zip(fast, other, strict=True))

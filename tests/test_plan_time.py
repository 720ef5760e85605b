"""The time estimate of planned launches: its terms by hand, and what must hold of every estimate."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import effkernels
from effkernels.models import model_config
from effkernels.plan import gpus, kernel_counts, time_estimate
from effkernels.plan.gpus import GPUS, Gpu
from effkernels.plan.kernel_counts import Counters, KernelCounts
from effkernels.plan.launches import Plan, PlannedLaunch, plan_call, plan_model
from effkernels.plan.queue_order import QueuedBlock, QueueOrder, end_of_queue, in_order
from effkernels.plan.record import RecordedCall, record_calls
from effkernels.plan.time_estimate import MODES, OVERLAPPING, TERMS, TimeEstimate, estimate, forward_us

pytestmark = pytest.mark.usefixtures("compiled")

H200 = gpus.find("h200")
B0_TO_B7 = tuple(f"efficientnet_b{number}" for number in range(8))


@functools.cache
def calls_of(name: str, batch: int) -> tuple[RecordedCall, ...]:
    """The calls of a forward in bfloat16 at the model's own size."""
    size = model_config(name).input_size[-1]
    model = effkernels.create_model(name, device="meta", dtype=torch.bfloat16, backend="cpu").eval()
    images = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    return tuple(record_calls(model, images))


def launches_of(name: str, batch: int, gpu: Gpu) -> list[PlannedLaunch]:
    return [launch for call in calls_of(name, batch) for launch in plan_call(call, gpu, allow_tf32=True)]


class TestEveryLaunch:
    # B4 to B6 have launches of the kinds of B3 and B7: at a batch of 256 seconds are for their many items alone.
    @pytest.mark.parametrize(
        ("name", "batch"),
        [(name, 1) for name in B0_TO_B7]
        + [pytest.param(name, 256, marks=[pytest.mark.thorough] * (name[-1] in "456")) for name in B0_TO_B7],
    )
    def test_of_every_network_has_an_estimate_on_every_gpu(self, name: str, batch: int) -> None:
        for gpu in GPUS:
            for launch in launches_of(name, batch, gpu):
                time, where = launch.time, f"{launch.layer} on {gpu.name}"
                assert time.counted == launch.is_own, f"{where}: {launch.variant} is not counted"
                terms = {term: getattr(time, term) for term in TERMS}
                assert all(math.isfinite(value) and value >= 0 for value in terms.values()), f"{where}: {terms}"
                assert time.us > 0, where
                assert (time.blocks >= 1) == launch.is_own, where

    def test_is_the_sum_of_its_parts(self) -> None:
        for launch in launches_of("efficientnet_b0", 32, H200):
            time = launch.time
            longest = max(getattr(time, term) for term in OVERLAPPING)
            assert getattr(time, time.longest) == longest
            assert time.us == pytest.approx(longest + time.prologue + time.tail + time.last)

    def test_takes_no_less_than_its_floor_where_bytes_come_from_memory(self) -> None:
        for launch in launches_of("efficientnet_b0", 256, H200):
            if launch.limited_by == "memory" and launch.bytes > 4 * H200.l2:
                assert launch.time.us >= launch.floor_us, launch.layer

    def test_b0_takes_no_longer_than_it_was_made_for(self) -> None:
        """On an H200 in bfloat16: 1.4 ms at batch 256, and 90 us at batch 1, in a graph of dependent launches."""
        mode = "graph with dependent launches"
        for batch, most in ((256, 1400), (1, 90)):
            plan = plan_model("efficientnet_b0", gpu=H200, batch_size=batch, precision="bfloat16")
            assert plan.estimated_us(mode) <= most

    @pytest.mark.parametrize("precision", ["float32", "float16"])
    def test_other_types_are_counted_too(self, precision: str) -> None:
        launches = plan_model("efficientnet_b0", batch_size=2, precision=precision).launches
        assert all(launch.time.counted for launch in launches if launch.is_own)

    def test_takes_no_less_time_for_more_images(self) -> None:
        by_batch = [plan_model("efficientnet_b0", batch_size=batch).estimated_us() for batch in (1, 8, 64, 256)]
        assert by_batch == sorted(by_batch)

    @pytest.mark.parametrize("rate", ["bandwidth", "clock", "l2_bytes_per_clock"])
    def test_takes_no_less_time_on_a_slower_gpu(self, rate: str) -> None:
        slower = replace(H200, **{rate: getattr(H200, rate) // 2})
        for batch in (1, 256):
            fast, slow = (launches_of("efficientnet_b0", batch, gpu) for gpu in (H200, slower))
            for one, other in zip(fast, slow, strict=True):
                assert other.time.us >= one.time.us - 1e-9, one.layer


class TestForward:
    TIMES = (TimeEstimate(dram=2.0, prologue=1.0), TimeEstimate(issue=20.0, last=1.0))

    def test_adds_a_gap_before_each_launch_of_a_graph(self) -> None:
        assert forward_us(self.TIMES, "graph") == pytest.approx(3 + 21 + 2 * time_estimate.GRAPH_GAP_US)

    def test_has_shorter_gaps_where_the_next_launch_starts_early(self) -> None:
        dependent = forward_us(self.TIMES, "graph with dependent launches")
        assert dependent == pytest.approx(3 + 21 + 2 * time_estimate.DEPENDENT_GAP_US)

    def test_parts_of_a_launch_follow_each_other(self) -> None:
        """Each part takes its own longest term: what limits one does not overlap what limits another."""
        together = time_estimate.one_after_the_other(self.TIMES)
        assert together.us == pytest.approx(3 + 21)
        assert together.issue == 20
        assert together.longest == "latency"

    def test_waits_for_the_host_in_eager_mode_and_only_then(self) -> None:
        host, gap = time_estimate.EAGER_US, time_estimate.GRAPH_GAP_US
        short = (TimeEstimate(dram=0.5),) * 10
        assert forward_us(short, "eager") == pytest.approx(10 * host + 0.5)
        long = (TimeEstimate(dram=100.0),) * 10
        assert forward_us(long, "eager") == pytest.approx(host + 10 * 100 + 9 * gap)

    def test_of_a_plan_is_that_of_its_launches(self) -> None:
        plan = plan_model("efficientnet_b0", batch_size=4)
        for mode in MODES:
            assert plan.estimated_us(mode) == pytest.approx(forward_us([one.time for one in plan.launches], mode))

    def test_unknown_modes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="mode='stream' is not known; allowed: graph, "):
            forward_us(self.TIMES, "stream")


def test_json_keeps_every_term() -> None:
    plan = plan_model("efficientnet_b0", batch_size=2, gpu="l4")
    assert Plan.from_json(plan.to_json()) == plan


# ---------------------------------------------------------------------------------------------------- terms by hand

CLOCKS_PER_US = H200.clock / 1e6
ISSUED = {"prologue": 100.0, "taps": 10.0, "row": 30.0, "row.border": 50.0, "strip": 200.0, "image": 40.0}


def depthwise_call(batch: int) -> RecordedCall:
    """depthwise_bn_act of 64 channels at 14x14, 3x3 stride 1: two strips of 7 in each row, both at a border."""
    x = torch.empty(batch, 64, 14, 14, dtype=torch.bfloat16, device="meta")
    arguments: dict[str, Any] = {
        "x": x,
        "weight": torch.empty(64, 1, 3, 3, dtype=torch.bfloat16, device="meta"),
        "stride": 1,
        "padding": [1, 1, 1, 1],
        "activation": "silu",
    }
    return RecordedCall("effkernels::depthwise_bn_act", "layer", arguments, [torch.empty_like(x)], 0)


def depthwise_line(**changes: int) -> dict[str, str]:
    """A block for each image: 8 vectors of channels by 14 lanes, and 2 rounds."""
    sizes = {
        "grid": 64, "shared": 0, "channel_vectors": 8, "vector": 8, "lanes": 14, "strip": 7, "rounds": 2, "images": 1,
        "channel_groups": 1, "tiles": 1, "team": 0, "row_blocks": 1, "slabs": 1,
    }  # fmt: skip
    line = {name: str(value) for name, value in (sizes | changes).items()}
    return {"kernel": "depthwise_strips", "variant": "counted", "block": "128,1", **line}


def counts_of(parts: Mapping[str, Counters]) -> dict[str, KernelCounts]:
    return {"counted": KernelCounts(64, parts)}


class TestDepthwiseByHand:
    COUNTS = counts_of({name: Counters(issued=issued, trips=1) for name, issued in ISSUED.items()})
    CALL = depthwise_call(64)

    def time(self, **changes: int) -> TimeEstimate:
        moved = 2 * 64 * 64 * 14 * 14 * 2
        line = depthwise_line(**changes)
        return estimate(line, self.CALL, H200, moved=moved, flops=0, rate=H200.float32, counts=self.COUNTS)

    def test_issue(self) -> None:
        # 28 strips an image; 112 threads are 4 warps for 14 lanes. A warp has 4 strips below each other: three of the
        # groups of an image's column (rows 0 to 3, 4 to 7, 8 to 11) and rows 12 and 13 run all 3 rows of taps.
        strips = 64 * 28 * 4 / 14 * (200 + 3 * 50)
        # 9 taps of 64 channels are 72 vectors; a pass is 4 of them for each of 128 threads.
        blocks = 64 * (4 * 100 + 4 * 72 / 512 * 10 + 4 * 40)
        assert self.time().issue == pytest.approx((strips + blocks) / 4 / 64 / CLOCKS_PER_US)

    def test_latency_and_prologue(self) -> None:
        waits = time_estimate.L2_LATENCY  # for the taps, and the norm that was asked for before them
        issued = 100 + 72 / 512 * 10 + 2 * (200 + 3 * 50) + 40
        # x is in L2; the second and third row of a strip are the first of its neighbours below, which L1 has by then.
        rows = 2 * (time_estimate.L2_LATENCY + 2 * time_estimate.L1_LATENCY)
        clocks = issued * time_estimate.CLOCKS_PER_INSTRUCTION + rows
        time = self.time()
        assert time.prologue == pytest.approx(waits / CLOCKS_PER_US)
        assert time.latency == pytest.approx(clocks / CLOCKS_PER_US)

    def test_bytes(self) -> None:
        time, image_bytes = self.time(), 64 * 64 * 14 * 14 * 2
        assert time.dram == 0, "x and y are in L2"
        # Columns of x under a strip: 9 for 7 outputs. 64 multiprocessors have a block each.
        moved = image_bytes * 9 / 7 + image_bytes
        whole, each = moved / H200.l2_bytes_per_clock, moved / 64 / time_estimate.L2_BYTES_OF_MULTIPROCESSOR
        assert time.l2 == pytest.approx(max(whole, each) / CLOCKS_PER_US)

    def test_one_block_is_not_faster_than_many_for_the_same_work(self) -> None:
        many = self.time()
        one = self.time(grid=1, images=64)
        assert one.us > 10 * many.us
        assert one.latency > many.latency
        assert one.issue > many.issue

    def test_bytes_beyond_half_of_l2_come_from_memory(self) -> None:
        small = replace(H200, l2=2**20)
        moved = 2 * 64 * 64 * 14 * 14 * 2
        time = estimate(depthwise_line(), self.CALL, small, moved=moved, flops=0, rate=H200.float32, counts=self.COUNTS)
        assert time.dram == pytest.approx(1e6 * moved / (time_estimate.COPY_SHARE * H200.bandwidth))
        assert time.latency > self.time().latency

    def test_more_bytes_take_no_less_time(self) -> None:
        line = depthwise_line()
        times = [
            estimate(line, self.CALL, H200, moved=moved, flops=0, rate=1.0, counts=self.COUNTS).us
            for moved in (0, 10**7, 10**8, 10**9)
        ]
        assert times == sorted(times)
        assert times[-1] > times[0]


class TestPointwiseByHand:
    """512 rows of 128 channels to 64: two blocks, each two tiles of 128 x 64 in 4 steps of 32 channels, 4 warps."""

    X = torch.empty(2, 128, 16, 16, dtype=torch.bfloat16, device="meta")
    CALL = RecordedCall(
        "effkernels::pointwise_bn_act",
        "layer",
        {
            "x": X, "weight": torch.empty(64, 128, 1, 1, dtype=torch.bfloat16, device="meta"),
            "gate": None, "residual": None, "activation": "identity",
        },
        [torch.empty(2, 64, 16, 16, dtype=torch.bfloat16, device="meta")],
        2 * 512 * 128 * 64,
    )  # fmt: skip
    LINE: Mapping[str, str] = {
        "kernel": "pointwise", "variant": "counted", "block": "128,1", "grid": "2", "shared": "50000", "rows": "128",
        "columns": "64", "steps": "4", "parts": "1", "tiles": "2", "row_tiles": "4", "column_tiles": "1",
        "gate_images": "0", "keeps_weight": "1",
    }  # fmt: skip
    COUNTS = counts_of(
        {
            "prologue": Counters(issued=400, trips=4),
            "weights": Counters(issued=10),
            "fill": Counters(issued=20),
            "step": Counters(issued=100, tensor=32, memory=12, wavefronts=40, fma=8, alu=20),
            "step.gated": Counters(issued=1000),
            "step.weights": Counters(issued=50),
            "tile": Counters(issued=300, fma=20, special=64),
            "tile.gate": Counters(issued=110),
            "tile.residual": Counters(issued=200),
            "gate": Counters(issued=17),
        }
    )

    def time(self, **changes: str) -> TimeEstimate:
        return estimate({**self.LINE, **changes}, self.CALL, H200, moved=0, flops=0, rate=1.0, counts=self.COUNTS)

    def test_units(self) -> None:
        time, us = self.time(), 1 / CLOCKS_PER_US  # of the two multiprocessors that have a block, for one block each
        tiles = 2 * (4 * 100 + 300)
        assert time.issue == pytest.approx(4 * (400 + 3 * (10 + 20) + tiles) / 4 * us)
        assert time.fma == pytest.approx(4 * 2 * (4 * 8 + 20) * 32 / 128 * us)
        assert time.alu == pytest.approx(4 * 2 * 4 * 20 * 32 / 64 * us)
        assert time.special == pytest.approx(4 * 2 * 64 * 32 / 16 * us)
        assert time.l1 == pytest.approx(4 * 2 * 4 * 40 * us)
        operations = H200.tensor * time_estimate.MMA_SHARE[90] / H200.multiprocessors
        assert time.tensor == pytest.approx(1e6 * 4 * 2 * 4 * 32 * 4096 / operations)

    def test_latency(self) -> None:
        time = self.time()
        assert time.prologue == pytest.approx(4 * time_estimate.L2_LATENCY / CLOCKS_PER_US)
        issued = 400 + 3 * (10 + 20) + 2 * (4 * 100 + 300)
        clocks = issued * time_estimate.CLOCKS_PER_INSTRUCTION + time_estimate.L2_LATENCY  # the first slice
        assert time.latency == pytest.approx(clocks / CLOCKS_PER_US)

    def test_gates_cost_instructions_in_each_tile_and_step(self) -> None:
        """More of a tile, another way through a step, and a second pass of copies in every stage."""
        arguments = {**self.CALL.arguments, "gate": torch.empty(2, 128, dtype=torch.bfloat16, device="meta")}
        line = {**self.LINE, "gate_images": "33"}  # a thread copies one of 32
        call = replace(self.CALL, arguments=arguments)
        gated = estimate(line, call, H200, moved=0, flops=0, rate=1.0, counts=self.COUNTS)
        more = 3 * 17 + 2 * (110 + 4 * (1000 - 100 + 17))
        assert gated.issue - self.time().issue == pytest.approx(4 * more / 4 / CLOCKS_PER_US)

    def test_weights_that_are_not_kept_are_copied_for_each_tile(self) -> None:
        kept, copied = self.time(), self.time(keeps_weight="0")
        assert copied.issue - kept.issue == pytest.approx(4 * 2 * 4 * 50 / 4 / CLOCKS_PER_US)
        # 64 x 128 weights by two blocks, or by four tiles.
        more = 2 * 64 * 128 * 2 / 2 / time_estimate.L2_BYTES_OF_MULTIPROCESSOR
        assert copied.l2 - kept.l2 == pytest.approx(more / CLOCKS_PER_US)

    def test_l2(self) -> None:
        """Each block reads its rows of x and all weights."""
        moved = 2 * (512 * 128 + 2 * 64 * 128 + 512 * 64)
        each = moved / 2 / time_estimate.L2_BYTES_OF_MULTIPROCESSOR
        assert self.time().l2 == pytest.approx(each / CLOCKS_PER_US)

    def test_blocks_of_a_multiprocessor(self) -> None:
        assert self.time().blocks == 4  # by 51,024 of 233,472 bytes


class TestMBConvByHand:
    """A block of 32 to 96 to `outer` channels at 7x7, 3x3, by two blocks of a cluster of 48 expanded channels."""

    COUNTS = counts_of(
        {
            "prologue": Counters(issued=500, trips=3),
            "norm": Counters(issued=100),
            "copy": Counters(issued=80, trips=1),
            "window": Counters(issued=200),
            "window.row": Counters(issued=40),
            "tile.0": Counters(issued=60),
            "tile.0.columns": Counters(issued=5),
            "tile.0.slice": Counters(issued=30),
            "tile.0.slice.columns": Counters(issued=7),
            "add": Counters(issued=110, trips=1),
            "add.other": Counters(issued=15, trips=1),
        }
    )

    def time(self, outer: int, kernel: int = 3, **changes: int) -> TimeEstimate:
        x = torch.empty(1, 32, 7, 7, dtype=torch.bfloat16, device="meta")
        arguments: dict[str, Any] = {
            "x": x, "weight": torch.empty(96, 1, kernel, kernel, dtype=torch.bfloat16, device="meta"), "stride": 1,
            "padding": [kernel // 2] * 4, "expand_activation": "silu", "activation": "silu", "w_reduce": None,
        }  # fmt: skip
        y = torch.empty(1, outer, 7, 7, dtype=torch.bfloat16, device="meta")
        sizes = {
            "grid": 2, "shared": 100_000, "team": 2, "cluster": 2, "groups": 1, "passes": 1, "images": 1, "lanes": 1,
            "slices": 1, "weight_slots": 1, "ring_slots": 1, "pass_columns": outer, "ring_rows": 9,
            "ring_row_bytes": 1056, "held_pixels": 64, "projected": 0, "tile_columns": outer, "waits_first": 0,
            **changes,
        }  # fmt: skip
        line = {name: str(value) for name, value in sizes.items()}
        line |= {"kernel": "mbconv", "variant": "counted", "block": "256,1"}
        call = RecordedCall("effkernels::mbconv", "layer", arguments, [y], 0)
        return estimate(line, call, H200, moved=0, flops=0, rate=1.0, counts=self.COUNTS)

    def test_latency(self) -> None:
        # 4 warps take the norms of 48 channels of the first two stages, 2 those of 64 output channels. 9 taps of 48
        # channels are 54 vectors. 6 vectors of channels are windows of as many warps, 4 tiles of 16 pixels and 64
        # columns those of others, with two slices of 32 channels each. 49 pixels of 8 vectors are fewer than two
        # blocks' threads.
        windows, tiles = 200 + 3 * 40, 60 + 8 * 5 + 2 * (30 + 8 * 7)
        issued = 500 + 100 + 80 + windows + tiles + (110 + 2 * 15)
        waits = 1 + 2 + 1  # for x, for both blocks twice, for the sums of both
        clocks = issued * time_estimate.CLOCKS_PER_INSTRUCTION + waits * time_estimate.L2_LATENCY
        assert self.time(64).latency == pytest.approx(clocks / CLOCKS_PER_US)

    def test_a_warp_waits_for_no_parameters_before_its_third_norm(self) -> None:
        """The first and second one are asked for before weights and x."""
        assert self.time(4 * 32).prologue == 0  # 8 warps with one norm each,
        assert self.time(12 * 32).prologue == 0  # with two,
        waits = time_estimate.L2_LATENCY / CLOCKS_PER_US
        assert self.time(13 * 32).prologue == pytest.approx(waits)  # and one with three

    def test_large_kernels_have_more_rows_of_taps(self) -> None:
        more = 40 * (5 - 3) * time_estimate.CLOCKS_PER_INSTRUCTION  # 25 taps are 150 vectors, still one of a thread
        assert self.time(64, kernel=5).latency - self.time(64).latency == pytest.approx(more / CLOCKS_PER_US)

    def test_a_block_that_follows_asks_for_its_parameters_while_it_waits(self) -> None:
        """Unless they would be where the sums of the block before are."""
        alone = self.time(64).latency
        saved = time_estimate.L2_LATENCY / CLOCKS_PER_US
        assert self.time(64, follows=1).latency == pytest.approx(alone - saved)
        assert self.time(64, follows=1, waits_first=1).latency == pytest.approx(alone)


class TestTail:
    CALL = depthwise_call(64)
    COUNTS = TestDepthwiseByHand.COUNTS

    def time(self, multiprocessors: int) -> TimeEstimate:
        gpu = replace(H200, multiprocessors=multiprocessors)
        return estimate(depthwise_line(), self.CALL, gpu, moved=0, flops=0, rate=1.0, counts=self.COUNTS)

    def test_whole_waves_have_none(self) -> None:
        blocks = self.time(64).blocks
        assert 64 % blocks == 0
        assert self.time(64 // blocks).tail == 0

    def test_a_partial_wave_takes_no_less_than_a_block(self) -> None:
        time = self.time(7)
        waves = 64 / 7 / time.blocks
        part = waves - int(waves)
        assert part > 0
        longest = getattr(time, time.longest)
        chain = (time.latency + time.prologue) / waves
        assert time.tail == pytest.approx(max(0.0, chain - longest * part / waves))
        assert time.tail > 0


def units_in(order: QueueOrder, units: slice) -> set[int]:
    return set(range(order.units)[units])


class TestQueueOrder:
    """When the last item of a queue ends: by hand."""

    ORDER = QueueOrder(
        units=3,
        images=1,
        expand_items=2,
        ahead=1,
        first_round=0,
        project_items=6,
        columns=2,
        unit_rows=10,
        item_rows=10,
    )
    NEXT = replace(ORDER, first_round=4)

    def end(self, slots: int, expand: float, gate: float, project: float, **changes: int) -> float:
        return end_of_queue(slots, QueuedBlock(replace(self.ORDER, **changes), 0.0, expand, gate, 0.0, project, 0.0))

    def test_one_block_does_one_item_after_the_other(self) -> None:
        assert self.end(1, 5.0, 0.0, 3.0) == 6 * 5 + 6 * 3

    def test_where_all_run_at_once_a_unit_is_expanded_gated_and_projected(self) -> None:
        assert self.end(12, 5.0, 1.0, 3.0) == 5 + 1 + 3

    def test_two_blocks_share_the_items_evenly(self) -> None:
        assert self.end(2, 5.0, 0.0, 3.0) == 3 * 5 + 3 * 3

    def test_an_item_waits_for_the_gate_of_its_unit(self) -> None:
        # Two blocks expand units 0 and 1, project 0, expand 2, project 1 and 2. Of these, 2 waits for its gate.
        assert self.end(2, 5.0, 4.0, 3.0) == 5 + 5 + 3 + 5 + max(3, 4) + 3

    def test_an_item_with_rows_of_two_units_waits_for_both(self) -> None:
        # Both expand unit 0, then unit 1; all items have rows of it.
        assert self.end(2, 5.0, 1.0, 3.0, units=2, project_items=2, item_rows=16) == 5 + 5 + 1 + 3

    def test_blocks_of_a_network_follow_each_other_where_all_run_at_once(self) -> None:
        """Items start before their input is there, and wait for it."""
        first = QueuedBlock(self.ORDER, 2.0, 5.0, 1.0, 1.0, 3.0, 0.25)
        second = QueuedBlock(self.NEXT, 2.0, 7.0, 1.0, 0.5, 3.0, 0.25)
        assert end_of_queue(24, first, second) == (5 + 1 + 3 - 1) + (7 - 2 + 1 + 3 - 0.5) + 0.25

    def test_a_block_of_a_network_fills_the_end_of_the_one_before(self) -> None:
        """Two do one item after the other, without a wait: eighteen items of each block of the network are nine."""
        blocks = [QueuedBlock(order, 0.0, 5.0, 0.0, 0.0, 4.0, 1.0) for order in (self.ORDER, self.NEXT)]
        assert end_of_queue(2, *blocks) == 2 * (6 * 6 + 6 * 5) / 2

    def test_what_a_block_still_projects_comes_between_what_the_next_one_expands(self) -> None:
        first, second = replace(self.ORDER, ahead=3), replace(self.NEXT, ahead=3)
        found = [f"{of.block}{'p' if of.unit is None else of.unit}" for of in in_order([first, second])]
        # Rounds 0, 1, 2, 3: one each; 4 and 5: what is projected, then what is expanded; 6 to 9: one each.
        assert found == ["00", "01", "02", "0p", "0p", "10", "0p", "11", "12", "1p", "1p", "1p"]

    def test_images_of_a_unit_may_be_of_several_units_before(self) -> None:
        before, order = replace(self.ORDER, units=6, images=2), replace(self.ORDER, units=3, images=5)
        assert [order.units_before(unit, before) for unit in range(3)] == [slice(0, 3), slice(2, 5), slice(5, 6)]
        assert [before.units_before(unit, order) for unit in (0, 2, 5)] == [slice(0, 1), slice(0, 2), slice(2, 3)]

    @pytest.mark.parametrize("gpu", ["h200", "a100", "l4"])
    @pytest.mark.parametrize(
        ("name", "batch"), [("efficientnet_b0", 1), ("efficientnet_b0", 61), ("efficientnet_b4", 7)]
    )
    def test_an_item_waits_for_items_before_it_alone(
        self, name: str, batch: int, gpu: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So that a queue ends whatever number of thread blocks runs at a time."""
        queues: list[list[QueueOrder]] = []

        def keep(_: int, *blocks: QueuedBlock) -> float:
            queues.append([block.order for block in blocks])
            return 0.0

        monkeypatch.setattr(time_estimate, "end_of_queue", keep)
        launches_of(name, batch, gpus.find(gpu))
        assert max(map(len, queues)) > 1
        for orders in queues:
            self.check_order(orders)

    def check_order(self, orders: list[QueueOrder]) -> None:
        expanded: list[set[int]] = [set() for _ in orders]
        projected: list[set[int]] = [set() for _ in orders]
        for of in in_order(orders):
            number, order = of.block, orders[of.block]
            if of.unit is None:
                for item in of.items:
                    assert expanded[number].issuperset(units_in(order, order.units_under(item)))
                    assert item not in projected[number]
                    projected[number].add(item)
                continue
            assert of.unit not in expanded[number]
            expanded[number].add(of.unit)
            if number > 0:
                before = orders[number - 1]
                units = units_in(before, order.units_before(of.unit, before))
                read = {
                    item for item in range(before.project_items) if units & units_in(before, before.units_under(item))
                }
                assert projected[number - 1] >= read
            if number > 1:  # whose memory is used again
                assert len(projected[number - 2]) == orders[number - 2].project_items
        assert [len(one) for one in expanded] == [order.units for order in orders]
        assert [len(one) for one in projected] == [order.project_items for order in orders]

    @pytest.mark.parametrize("batch", [1, 32, 256])
    def test_a_launch_ends_no_sooner_than_its_parts_and_its_share(self, batch: int) -> None:
        queues = [one for one in launches_of("efficientnet_b0", batch, H200) if one.kernel == "mbconv_queue"]
        assert queues
        for one in queues:
            assert one.time.tail >= 0
            assert one.time.tail < 0.25 * one.time.us or batch < 256, one.layer


# -------------------------------------------------------------------------------------------------------- the counts


class TestCounts:
    def test_file_reads_back(self) -> None:
        text = kernel_counts.FILE.read_text(encoding="utf-8")
        assert kernel_counts.to_json(kernel_counts.from_json(text)) == text

    def test_one_kernel_a_line_sorted(self) -> None:
        first, *lines, last, end = kernel_counts.FILE.read_text(encoding="utf-8").split("\n")
        assert (first, last, end) == ("{", "}", "")
        names = [line.split('"')[1] for line in lines]
        assert names == sorted(kernel_counts.shipped())

    def test_arithmetic(self) -> None:
        one, two = Counters(issued=3, fma=1), Counters(issued=4, trips=2)
        assert one + two * 2 == Counters(issued=11, fma=1, trips=4)
        assert (one + two) - two == one
        assert kernel_counts.total([(one, 2), (two, 0.5)]) == Counters(issued=8, fma=2, trips=1)

    @pytest.mark.parametrize("kernel", ["depthwise_strips<bfloat16,3,1,7>", "pointwise<bfloat16,0,1,1,false>"])
    def test_units_are_no_more_than_what_is_issued(self, kernel: str) -> None:
        for name, part in kernel_counts.shipped()[kernel].parts.items():
            if not part.issued:
                continue
            units = part.fma + part.alu + part.special + part.memory + part.tensor
            assert units <= part.issued + 0.01, name  # three digits

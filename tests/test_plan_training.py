"""The launch plan of a training step, and the FLOP formulas that it counts by."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effkernels
from effkernels.nn import MBConv
from effkernels.plan import gpus
from effkernels.plan.training_step import Step, plan_step, record_step

GPU = gpus.find("h200")


def flops_of(block: MBConv, x: torch.Tensor) -> tuple[int, int]:
    """FLOPs of a forward and of its backward, as PyTorch's counter adds them up."""
    with FlopCounterMode(display=False) as forward:
        y = block(x)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.ones_like(y))
    return forward.get_total_flops(), backward.get_total_flops()


class TestFlops:
    def test_of_a_block_are_those_of_its_convolutions(self) -> None:
        block = MBConv(16, 24, expansion=6, stride=2, se_channels=4).train()
        expand, depthwise, project = 16 * 16 * 16 * 96, 8 * 8 * 96 * 9, 8 * 8 * 96 * 24
        gate = 2 * 96 * 4
        forward, backward = flops_of(block, torch.randn(3, 16, 16, 16, requires_grad=True))
        assert forward == 2 * 3 * (expand + depthwise + project + gate)
        assert backward == 2 * forward

    def test_leave_out_gradients_that_nobody_wants(self) -> None:
        block = MBConv(16, 24, expansion=6).train().requires_grad_(False)
        block.conv_pwl.weight.requires_grad_()
        _, backward = flops_of(block, torch.randn(3, 16, 16, 16))
        assert backward == 2 * 2 * 3 * 16 * 16 * 96 * 24  # the project's product, for its weight and for what it reads

    def test_of_the_expanded_tensor_count_again_where_it_is_computed_again(self) -> None:
        block = MBConv(16, 24, expansion=6).train()
        x = torch.randn(2, 16, 8, 8, requires_grad=True)
        _, kept = flops_of(block, x)
        effkernels.nn.set_recompute(block, "expand")
        _, again = flops_of(block, x)
        assert again - kept == 2 * 2 * 8 * 8 * 16 * 96

    def test_are_known_without_the_plan(self) -> None:
        code = (
            "import torch, effkernels; from torch.utils.flop_counter import FlopCounterMode\n"
            "block = effkernels.nn.MBConv(8, 8).train()\n"
            "with FlopCounterMode(display=False) as flops: block(torch.randn(2, 8, 4, 4))\n"
            "print(flops.get_total_flops())"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(run.stdout) == 2 * 2 * 4 * 4 * (8 * 48 + 9 * 48 + 48 * 8)


def step_of(block: MBConv, of: str = "fused") -> Step:
    images = torch.empty(2, 16, 10, 10, device="meta").contiguous(memory_format=torch.channels_last)
    return record_step(block.to("meta").train(), images, GPU, of)


class TestStep:
    def test_counts_the_bytes_of_the_depthwise_convolution_as_by_hand(self) -> None:
        rows = {(row.phase, row.op): row for row in step_of(MBConv(16, 16, expansion=4)).rows}
        forward = rows["forward", "effkernels::training_depthwise"]
        image, vectors, weight = 4 * 2 * 10 * 10 * 64, 4 * 64, 4 * 64 * 9
        # In and out; the norm before, weight and bias of the norm after, and the six vectors of it.
        assert (forward.launches, forward.bytes) == (1, 2 * image + 12 * vectors + weight)
        assert forward.flops == 2 * 2 * 10 * 10 * 64 * 9
        assert forward.floor_us == pytest.approx(1e6 * max(forward.bytes / GPU.bandwidth, forward.flops / GPU.float32))
        backward = rows["backward", "effkernels::training_depthwise_backward"]
        assert backward.bytes >= 4 * image + 2 * weight
        assert backward.flops == 2 * forward.flops

    def test_saves_what_the_training_page_lists(self) -> None:
        block = MBConv(16, 16, expansion=4)
        pixels = 4 * 2 * 10 * 10
        images = pixels * (16 + 64 + 64 + 16)  # the input, the expanded, the depthwise and the projected tensor
        small = step_of(block).saved_bytes - images
        assert 0 < small < 0.1 * images  # statistics and the gate

    def test_nothing_is_recorded_of_a_block_in_plain_pytorch_but_pytorchs_operators(self) -> None:
        block = MBConv(16, 16, expansion=4, backend="reference")
        plain = step_of(block, "plain")
        assert all(row.op.startswith("aten::") for row in plain.rows)
        fused = step_of(MBConv(16, 16, expansion=4))
        assert plain.bytes > fused.bytes
        # The products are the same, but for those of the input's channels alone.
        assert plain.flops == pytest.approx(fused.flops, rel=0.2)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b4"])
def test_a_step_moves_half_the_bytes_of_plain_pytorch_in_no_more_launches(name: str) -> None:
    plan = plan_step(name, batch_size=64)
    assert plan.share_of_bytes <= 0.5
    assert plan.fused.launches <= plan.plain.launches
    assert plan.share_of_saved <= 0.40
    report = json.loads(plan.to_json())
    assert report["fused"]["totals"]["bytes"] == plan.fused.bytes
    assert math.isclose(report["share_of_bytes"], plan.share_of_bytes)


def test_recompute_saves_memory_for_flops() -> None:
    kept, again = (plan_step("efficientnet_b0", batch_size=8, recompute=which) for which in (None, "expand"))
    assert again.share_of_saved <= 0.25
    assert again.fused.flops > kept.fused.flops


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int8"}, "precision='int8' is not known; allowed: float32, float16, bfloat16"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"img_size": -1}, "img_size=-1 must be at least 1"),
        ({"recompute": "all"}, "recompute='all' is not known; allowed: None, 'expand'"),
        ({"gpu": "h2000"}, "h2000"),
    ],
)
def test_wrong_arguments(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        plan_step("efficientnet_b0", **wrong)  # type: ignore[arg-type]

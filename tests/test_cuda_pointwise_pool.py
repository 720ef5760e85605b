"""pointwise_bn_act_pool in CUDA: what its plan divides, one launch without the image, and sums in a fixed order."""

from __future__ import annotations

from itertools import product

import op_cases
import pytest
import torch
from emulation.control import A100, H200, ORDERS, Emulation, Emulator
from op_cases import POOL_OP, Case
from test_cuda_kernels import FEW, call, check, launches, planned

import effkernels
from effkernels.plan.gpus import GPUS
from effkernels.plan.launches import plan_model

HEAD = Case(POOL_OP, torch.bfloat16, channels=320, out_channels=1280, height=7, width=7, parameters="same")
# An image of many pixels, which several blocks share.
LARGE = Case(POOL_OP, torch.bfloat16, channels=24, out_channels=40, height=40, width=41, batch=2, parameters="same")


def cut_of(case: Case, limits: tuple[int, ...]) -> dict[str, int]:
    """Return the numbers of the plan of a call, which is one launch."""
    activation = effkernels.ops.reference.ACTIVATIONS.index(case.activation)
    shape = [case.batch, case.height, case.width, case.channels, case.out_channels, 0, 0, 0, activation]
    [launch] = planned(POOL_OP, shape, limits, str(case.dtype).removeprefix("torch."))
    assert launch["kernel"] == "pointwise_pool"
    return {name: int(value) for name, value in launch.items() if value.isdigit()}


@pytest.mark.usefixtures("compiled")
class TestPlan:
    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    @pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
    def test_the_blocks_cover_all_images_and_channels(self, dtype: torch.dtype, gpu: object) -> None:
        limits = tuple(gpu.limits())
        for batch, side, (channels, out_channels) in product(
            (1, 3, 33, 256), (1, 7, 8, 10, 12, 19, 40, 112), ((320, 1280), (640, 2560), (7, 9))
        ):
            case = HEAD.with_(
                dtype=dtype, batch=batch, height=side, width=side, channels=channels, out_channels=out_channels
            )
            cut = cut_of(case, limits)
            pixels = side * side
            rows = cut["tiles"] * cut["rows"]
            if cut["parts"] == 1:
                assert cut["images"] * pixels <= rows < cut["images"] * pixels + cut["rows"]
            else:
                assert cut["images"] == 1
                assert (cut["parts"] - 1) * rows < pixels <= cut["parts"] * rows
            groups = -(-batch // cut["images"])
            assert cut["column_tiles"] * cut["columns"] >= out_channels
            assert cut["grid"] == groups * cut["parts"] * cut["column_tiles"]
            assert cut["shared"] <= limits[3]

    def test_whole_images_need_no_scratch_memory(self) -> None:
        for batch, side in product((64, 256), (7, 8, 10)):
            cut = cut_of(HEAD.with_(batch=batch, height=side, width=side), H200)
            assert (cut["parts"], cut["workspace"]) == (1, 0)

    def test_parts_of_an_image_write_a_sum_for_each_channel(self) -> None:
        cut = cut_of(LARGE, H200)
        assert cut["parts"] > 1
        arrivals = LARGE.batch * cut["column_tiles"]
        assert cut["workspace"] == 4 * (cut["parts"] * LARGE.batch * LARGE.out_channels + arrivals)

    def test_tiles_of_a_large_batch_are_full(self) -> None:
        """A tile of its own for each image of 49 pixels would be filled to 77 percent."""
        cut = cut_of(HEAD.with_(batch=256), H200)
        assert cut["images"] * 49 >= 0.9 * cut["tiles"] * cut["rows"]

    @pytest.mark.parametrize("batch", [1, 256])
    def test_the_head_of_b0_is_one_launch_without_its_image(self, batch: int) -> None:
        plan = plan_model("efficientnet_b0", batch_size=batch)
        *_, head, classifier = plan.launches
        assert (head.layer, head.kernel, classifier.layer) == ("conv_head", "pointwise_pool", "classifier")
        of_x, of_y = 2 * batch * 320 * 49, 2 * batch * 1280
        norm = 4 * 2 * 1280  # four vectors of 16 bits
        assert head.bytes - 2 * head.workspace_bytes == of_x + of_y + 2 * 320 * 1280 + norm
        assert head.flops == 2 * batch * 49 * 320 * 1280


# Sizes of the last images of networks, at batches that fill no tile, in each dtype in turn.
SIZES = [
    HEAD.with_(batch=batch, height=side, width=side, channels=40, out_channels=out, dtype=dtype, activation=activation)
    for number, (batch, side) in enumerate(product((1, 3, 33), (1, 7, 8, 9, 10)))
    for dtype, out, activation in (
        (op_cases.DTYPES[number % 3], (72, 130, 264)[number % 3], "silu"),
        (op_cases.DTYPES[(number + 1) % 3], (9, 72)[number % 2], "gelu"),
    )
]


class TestKernel:
    @pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in SIZES])
    @pytest.mark.parametrize("device", FEW)
    def test_parity_with_several_tiles_of_a_block(self, device: str, case: Case, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", FEW[device], emulated.flavour))
        check(case, emulated)

    def test_blocks_that_share_an_image(self, emulated: Emulator) -> None:
        """In any order, and the counters are zero again after a launch."""
        for number, order in enumerate(ORDERS):
            emulated.configure(Emulation(order, "late", H200, emulated.flavour, number))
            for dtype in op_cases.DTYPES:
                check(LARGE.with_(dtype=dtype), emulated)
                before = launches(emulated)
                check(LARGE.with_(dtype=dtype, out_channels=24), emulated)
                assert launches(emulated) - before == 1

    @pytest.mark.parametrize("case", [LARGE, HEAD.with_(batch=5, out_channels=200)], ids=str)
    def test_the_same_bits_in_every_order(self, case: Case, emulated: Emulator) -> None:
        arguments = case.draw()
        results = []
        for seed, order in enumerate((*ORDERS, "random", "random")):
            emulated.configure(Emulation(order, "early", A100, emulated.flavour, seed=seed))
            results.append(call(emulated, case.op, arguments)[0])
        assert all(torch.equal(results[0], other) for other in results[1:])

    def test_an_infinite_image_leaves_the_others_alone(self, emulated: Emulator) -> None:
        """Values of a tile are added to their own image alone, and none is multiplied away."""
        case = HEAD.with_(batch=5, channels=24, out_channels=72)
        arguments = case.draw()
        (before,) = call(emulated, case.op, arguments)
        arguments["x"][2] = float("nan")
        (after,) = call(emulated, case.op, arguments)
        assert after[2].isnan().all()
        others = [0, 1, 3, 4]
        assert torch.equal(after[others], before[others])

"""mbconv as items of a queue, in one CUDA launch: blocks of every size on the emulated kernel, the order of the items,
and the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulation.control import A100, H200, ORDERS, Emulation, Emulator
from op_cases import BLOCK_OP, Case
from test_cuda_expand_depthwise import same_padding
from test_cuda_kernels import call, check, launches
from test_cuda_mbconv import HALVES, blocks_of, case_of, plan_of

from effkernels.plan.gpus import GPUS
from effkernels.plan.launches import Plan, plan_model

# Without clusters every block is a queue. One multiprocessor runs two or three blocks at a time, so that few units are
# expanded ahead.
FEW = (80, 1, *A100[2:])
DEVICES = {"A100": A100, "few": FEW}
PLANES = ((14, 9), (7, 11), (13, 16))


def cut_of(line: dict[str, str]) -> dict[str, int]:
    return {name: int(value) for name, value in line.items() if value.isdigit()}


def cases() -> Iterator[tuple[str, Case]]:
    """Blocks of B0 on small planes, more images than are expanded ahead, and what no network has; on a device."""
    found: list[Case] = []
    by_shape = {(b.kernel, b.stride, b.channels): b for b in blocks_of("efficientnet_b0")}
    for number, block in enumerate(by_shape.values()):
        height, width = PLANES[number % 3]
        kernel_padding = same_padding(block, height, width) if number % 2 else block.padding
        shape: dict[str, Any] = {"height": height, "width": width, "padding": kernel_padding}
        narrow = {"expanded": min(block.expanded, 200)}
        found.append(case_of(block, HALVES[number % 2], 0, **shape, **narrow, batch=(1, 3, 12)[number % 3]))
    base = Case(BLOCK_OP, channels=24, expanded=56, out_channels=40, height=11, width=10, parameters="same")
    found += [
        base.with_(batch=14, expanded=104, out_channels=136),
        base.with_(reduced=0, batch=5, residual=True),
        base.with_(norm="none", expand_activation="gelu", activation="hard_swish"),
        base.with_(padding=(2, 0, 1, 2), bias=True, norm="statistics", reduced=1),
        base.with_(kernel=(5, 5), padding=(4, 0, 0, 4), batch=9, height=1, width=1),
        base.with_(kernel=(5, 5), stride=2, padding=(0, 2, 4, 1), height=23, width=31, expanded=8, batch=4),
        base.with_(height=3, width=60, channels=8, out_channels=8),
        base.with_(layout="sliced"),
        base.with_(layout="contiguous", batch=8),
    ]
    # Without expansion: items of 32 channels, of 48, several of each, the last one narrower.
    alone = base.with_(expanded=0)
    found += [
        *(alone.with_(channels=channels, batch=1 + channels % 3) for channels in (8, 32, 40, 48, 56, 64, 88, 104)),
        alone.with_(channels=32, height=70, width=23, batch=2, norm="none"),
        alone.with_(channels=16, batch=14, out_channels=16),
        alone.with_(channels=40, out_channels=40, residual=True, reduced=0, height=5, width=61),
        alone.with_(channels=32, padding=(2, 0, 1, 2), bias=True, activation="hard_swish", batch=5),
        alone.with_(channels=24, height=1, width=1, padding=(0, 2, 2, 0)),
        alone.with_(channels=48, layout="sliced"),
        alone.with_(channels=48, layout="contiguous", batch=3),
        alone.with_(channels=32, height=3, width=7, batch=1, norm="statistics"),
        alone.with_(channels=32, height=2, width=7, batch=1),
    ]
    for number, case in enumerate(found):
        yield list(DEVICES)[number % 2], case.with_(dtype=HALVES[number // 2 % 2])
    yield from (("few", case.with_(dtype=dtype)) for case, dtype in zip(MANY_ROWS, HALVES, strict=True))


# Tiles of 192 and of 256 rows, some of two images, the last one partly filled.
_ROWS = Case(BLOCK_OP, out_channels=24, batch=3, parameters="same")
MANY_ROWS = (
    _ROWS.with_(channels=24, expanded=104, residual=True, height=30, width=29),
    _ROWS.with_(channels=32, expanded=0, out_channels=16, height=37, width=41),
)


class TestParity:
    @pytest.mark.parametrize(("device", "case"), [pytest.param(*one, id="-".join(map(str, one))) for one in cases()])
    def test_one_launch_gives_the_block(self, device: str, case: Case, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", DEVICES[device], emulated.flavour))
        check(case, emulated)  # the first call on a device may take and fill memory for counters
        before = launches(emulated)
        check(case, emulated)  # counters are zero again
        assert launches(emulated) - before == 1

    @pytest.mark.parametrize(
        ("expanded", "kernel", "stride"), [(104, 3, 1), (104, 3, 2), (104, 5, 1), (104, 5, 2), (0, 3, 1)]
    )
    def test_short_strips(self, expanded: int, kernel: int, stride: int, emulated: Emulator) -> None:
        """Where the images are few, the work of a plane has to suffice for all threads of the GPU."""
        found = 0
        for size in (20, 33, 61):
            sizes = {"channels": 24, "expanded": expanded, "out_channels": 16, "height": size, "width": size - 5}
            half = (kernel // 2,) * 4
            case = Case(BLOCK_OP, torch.float16, **sizes, kernel=(kernel, kernel), stride=stride, padding=half, batch=1,
                        parameters="same")  # fmt: skip
            (line,) = plan_of(case, A100, "float16")
            if (line["kernel"], line.get("expand_strip")) != ("mbconv_queue", "2"):
                continue
            found += 1
            emulated.configure(Emulation("random", "late", A100, emulated.flavour))
            check(case, emulated)
        assert found

    @pytest.mark.parametrize("at_once", [1, 2, 7])
    def test_any_number_of_blocks_may_run_at_a_time(self, at_once: int, emulated: Emulator) -> None:
        """One block by itself never waits: what it would wait for has a smaller number."""
        case = Case(BLOCK_OP, torch.bfloat16, channels=16, expanded=56, out_channels=24, batch=9, parameters="same")
        for number, order in enumerate(ORDERS):
            emulated.configure(Emulation(order, "late", FEW, emulated.flavour, number, at_once))
            check(case, emulated)

    def test_the_same_bits_in_every_order(self, emulated: Emulator) -> None:
        case = Case(BLOCK_OP, torch.float16, channels=16, expanded=104, out_channels=24, batch=5, parameters="same")
        arguments = case.draw()
        results = []
        for seed, order in enumerate((*ORDERS, "random", "random")):
            emulated.configure(Emulation(order, "early", FEW, emulated.flavour, seed=seed))
            results.append(call(emulated, case.op, arguments)[0])
        assert all(torch.equal(results[0], other) for other in results[1:])

    @pytest.mark.parametrize(
        "change", [{"kernel": (5, 5), "padding": (2,) * 4}, {"stride": 2}, {"channels": 20}], ids=str
    )
    def test_without_expansion_other_kernels_take_two_launches(
        self, change: dict[str, Any], emulated: Emulator
    ) -> None:
        emulated.configure(Emulation("forward", "late", H200, emulated.flavour))
        case = Case(BLOCK_OP, torch.float16, **{"channels": 24, "expanded": 0, "out_channels": 16, **change})
        check(case, emulated)
        before = launches(emulated)
        check(case, emulated)
        assert launches(emulated) - before == 2

    @pytest.mark.slow
    def test_first_block_of_b0_at_full_size(self, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        check(case_of(blocks_of("efficientnet_b0", expand=False)[0], HALVES[0], batch=1), emulated)

    @pytest.mark.thorough("full size")
    @pytest.mark.parametrize("number", [0, 3])
    def test_early_blocks_of_b0_at_full_size(self, number: int, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        check(case_of(blocks_of("efficientnet_b0")[number], HALVES[number % 2], batch=1), emulated)


@pytest.mark.usefixtures("compiled")
class TestPlan:
    def test_many_rows_take_large_tiles(self) -> None:
        cuts = [cut_of(plan_of(case.with_(dtype=torch.bfloat16), FEW)[0]) for case in MANY_ROWS]
        assert [(cut["project_rows"], cut["project_columns"]) for cut in cuts] == [(192, 24), (256, 16)]

    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    def test_the_items_cover_the_block(self, gpu: Any) -> None:
        limits = tuple(gpu.limits())
        first = [
            block
            for name in ("efficientnet_b0", "efficientnet_b4", "efficientnet_b7")
            for block in blocks_of(name, expand=False)
        ]
        for block in (*first, *blocks_of("efficientnet_b0"), *blocks_of("efficientnet_b4")):
            for batch in (1, 7, 256):
                lines = plan_of(block.with_(batch=batch), limits)
                if lines[0]["kernel"] != "mbconv_queue":
                    assert len(lines) == 1 or "shared-memory" in lines[0]["reason"]
                    continue
                cut = cut_of(lines[0])
                assert cut["grid"] == cut["items"] == cut["expand_grid"] + cut["project_grid"]
                assert cut["units"] == -(-batch // cut["expand_images"])
                assert cut["expand_grid"] == cut["units"] * cut["expand_channel_groups"] * cut["expand_tiles"]
                groups = -(-cut["project_row_tiles"] // cut["project_tiles"])
                assert cut["project_grid"] == groups * cut["project_column_tiles"]
                assert cut["project_column_tiles"] * cut["project_columns"] >= block.out_channels
                assert cut["expand_bands"] * cut["expand_band_rows"] >= block._result_size[0]
                assert cut["expand_column_tiles"] * cut["expand_columns"] >= block._result_size[1]
                assert cut["expand_channel_groups"] * cut["expand_channels"] >= (block.expanded or block.channels)
                assert 1 <= cut["ahead"] <= cut["units"]
                assert cut["shared"] <= limits[3]

    def test_more_items_are_between_the_kinds_than_blocks_run(self) -> None:
        """So that waits are rare."""
        for block in blocks_of("efficientnet_b0"):
            (line,) = plan_of(block.with_(batch=256), H200)
            cut = cut_of(line)
            at_once = H200[1] * min(3, H200[2] // (cut["shared"] + 1024))
            of_unit = cut["expand_grid"] // cut["units"]
            assert cut["ahead"] == cut["units"] or (cut["ahead"] - 1) * of_unit >= at_once

    def test_the_workspace_is_the_depthwise_result(self) -> None:
        block = blocks_of("efficientnet_b0")[0].with_(batch=256)
        (line,) = plan_of(block, H200)
        result = 256 * block.expanded * 56 * 56 * 2
        assert result < int(line["workspace"]) < 1.02 * result


# Megabytes an image: the result of each depthwise convolution written and read once, and 15 percent on top.
FLOORS = {"efficientnet_b0": 13.9, "efficientnet_b4": 111.6}


@pytest.mark.usefixtures("compiled")
class TestNetworks:
    @pytest.mark.parametrize("name", FLOORS)
    def test_bytes_of_many_images(self, name: str) -> None:
        plan: Plan = plan_model(name, batch_size=256)
        assert plan.totals.bytes <= 1.15 * FLOORS[name] * 1e6 * 256

    @pytest.mark.parametrize(("batch", "most"), [(1, 5), (256, 4)])
    def test_launches_of_b0(self, batch: int, most: int) -> None:
        assert plan_model("efficientnet_b0", batch_size=batch).totals.launches <= most

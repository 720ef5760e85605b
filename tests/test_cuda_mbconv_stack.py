"""mbconv_stack on the emulator: several blocks in one launch, in clusters or as items of a queue, what shares none, and
the pure function that decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emulation.control import A100, H200, ORDERS, Emulation, Emulator
from op_cases import BLOCK_OP, Case, one_thread
from parity import assert_parity
from test_cuda_kernels import launches, planned
from test_cuda_mbconv import blocks_of, case_of, late_blocks

from effkernels._norm import Norm, gather_norms
from effkernels.models import create_model
from effkernels.nn import MBConv
from effkernels.ops import reference
from effkernels.ops.call import OpCall
from effkernels.ops.mbconv_stack import flatten
from effkernels.plan.gpus import GPUS

HALVES = (torch.float16, torch.bfloat16)


def chain(*cases: Case) -> list[Case]:
    """Return the cases as blocks that follow each other: channels and planes of each are those that it is given."""
    found: list[Case] = []
    for case in cases:
        if found:
            before = found[-1]
            height, width = before._result_size
            sizes = {"batch": before.batch, "channels": before.out_channels, "height": height, "width": width}
            case = case.with_(**sizes, dtype=before.dtype)
        found.append(case)
    return found


def block(out: int, kernel: int = 3, stride: int = 1, **fields: Any) -> Case:
    half = (kernel // 2,) * 4
    sizes = {"channels": 16, "expanded": 96, "height": 9, "width": 8, "reduced": 4, "parameters": "same"}
    return Case(BLOCK_OP, torch.float16, **{**sizes, "out_channels": out, "kernel": (kernel, kernel), "stride": stride,
                                            "padding": half, **fields})  # fmt: skip


def entry(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a block as an entry of `mbconv_stack`."""
    given = gather_norms({name: value for name, value in arguments.items() if name not in ("x", "allow_tf32")})
    return {**given, "residual": case.residual}


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    def of(value: Any) -> Any:
        if isinstance(value, Norm):
            return Norm(*map(of, value))
        return value.double() if isinstance(value, torch.Tensor) else value

    return {name: of(value) for name, value in given.items()}


def check(cases: Sequence[Case], emulated: Emulator) -> None:
    drawn = [case.draw(seed=position) for position, case in enumerate(cases)]
    x = drawn[0]["x"]
    blocks = [entry(case, arguments) for case, arguments in zip(cases, drawn, strict=True)]
    result = getattr(torch.ops, emulated.namespace).mbconv_stack(x, *flatten(blocks), False)
    with one_thread():
        truth = reference.mbconv_stack(x.double(), [in_float64(given) for given in blocks])
        plain = reference.mbconv_stack(x, blocks)
    assert_parity(result, plain, truth, " then ".join(map(str, cases)))


def of_network(network: str, batch: int = 1, dtype: torch.dtype = torch.bfloat16, *, whole: bool = False) -> list[Case]:
    """Return all MBConv blocks of a network in their order, each as often as it is there; `whole`: the first stage's,
    which have no expansion, too."""
    known = {(b.channels, b.height, b.kernel, b.stride, b.out_channels): b for b in blocks_of(network)}
    found: list[Case] = []
    model = create_model(network, device="meta", backend="cpu")
    size = next(iter(known.values())).height
    for number, module in enumerate(m for m in model.modules() if type(m) is MBConv):
        conv = module.conv_dw
        sizes = (module.conv_pw.in_channels, size, conv.kernel_size, conv.stride[0], module.conv_pwl.out_channels)
        found.append(case_of(known[sizes], dtype, number, batch=batch))
        size = -(-size // conv.stride[0])
    first = blocks_of(network, expand=False) if whole else ()
    return [*(case_of(block, dtype, batch=batch) for block in first), *found]


def lines_of(cases: Sequence[OpCall], limits: tuple[int, ...], dtype: str = "bfloat16") -> list[dict[str, str]]:
    shape: list[int] = []
    for case in cases:
        inner, activation = case.channels, reference.ACTIVATIONS.index(case.expand_activation)
        if not case.expanded:
            inner = activation = 0
        shape += [case.batch, case.expanded or case.channels, case.height, case.width]
        shape += [*case.kernel, case.stride, case.dilation, *case.padding]
        shape += [case.reduced, inner, case.out_channels, int(case.residual), 0, activation]
    return planned("mbconv_stack", shape, limits, dtype)


SMALL = {
    "residual, stride, 5x5, no excitation": (
        block(16, residual=True),
        block(24, 5, stride=2, expanded=200),
        block(24, 5, residual=True, reduced=0),
        block(40, 3, expanded=104, activation="hard_swish"),
    ),
    "other windows": (
        block(24, 5, width=30, height=5, expanded=48),
        block(24, 5, residual=True),
        block(8, 3, stride=2),
    ),
    "wide windows": (
        block(16, 3, height=14, width=14),
        block(24, 5),
        block(24, 5, residual=True),
        block(8, 3, stride=2),
    ),
}


class TestParity:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("name", SMALL)
    def test_small_stacks(self, name: str, batch: int, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        first, *others = SMALL[name]
        cases = chain(first.with_(batch=batch, dtype=HALVES[batch % 2]), *others)
        check(cases, emulated)
        before = launches(emulated)
        check(cases, emulated)
        assert launches(emulated) - before == 1

    def test_a_cluster_takes_images_in_turn_and_some_of_its_blocks_idle(self, emulated: Emulator) -> None:
        limits = (90, 1, *H200[2:7], 4)
        emulated.configure(Emulation("reverse", "early", limits, emulated.flavour))
        cases = chain(block(16, batch=3, residual=True), block(24, expanded=192), block(24, 5, expanded=48))
        lines = lines_of(cases, limits, "float16")
        assert [(line["kernel"], line["cluster"], line["team"]) for line in lines] == [
            ("mbconv_stack", "4", team) for team in ("2", "4", "1")
        ]
        assert {line["images"] for line in lines} == {"3"}
        check(cases, emulated)

    def test_parameters_of_the_next_block_where_others_still_read(self, emulated: Emulator) -> None:
        """They are asked for before the last barrier of a block ends, unless they would be where its sums are."""
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        small = {"height": 4, "width": 4, "reduced": 0}
        cases = chain(block(16, expanded=96, **small), block(320, expanded=480, reduced=0), block(16, expanded=96))
        lines = lines_of(cases, H200, "float16")
        assert {line["kernel"] for line in lines} == {"mbconv_stack"}
        assert [line["waits_first"] for line in lines] == ["0", "1", "0"]
        for order in ORDERS:
            emulated.configure(Emulation(order, "late", H200, emulated.flavour))
            check(cases, emulated)

    @pytest.mark.slow
    def test_last_blocks_of_b0_at_full_size(self, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        cases = of_network("efficientnet_b0")[5:]
        assert {line["kernel"] for line in lines_of(cases, H200)} == {"mbconv_stack"}
        check(cases, emulated)


# Without clusters all blocks are a queue; one multiprocessor runs two or three thread blocks of it at a time.
FEW = (80, 1, *A100[2:])


class TestQueue:
    """More blocks of the network than there are memories that they use in turn, and what differs among them."""

    BLOCKS = (
        block(24, expanded=56, reduced=1),
        block(24, 5, residual=True),
        block(40, 3, stride=2, expanded=104, reduced=0, activation="hard_swish"),
        block(40, 3, residual=True, expanded=8),
        block(16, 5, stride=2, norm="none", bias=True),
        block(16, 5, residual=True, expand_activation="relu6"),
        block(136, 3, reduced=40),
        block(24, expanded=0),
        block(24, expanded=0, residual=True),
    )

    @pytest.mark.parametrize("batch", [1, 5, 14])
    def test_every_block_gives_what_it_gives_alone(self, batch: int, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", (A100, FEW)[batch % 2], emulated.flavour))
        cases = chain(self.BLOCKS[0].with_(batch=batch, height=13, width=11, dtype=HALVES[batch % 2]), *self.BLOCKS[1:])
        check(cases, emulated)
        before = launches(emulated)
        check(cases, emulated)  # counters are zero again
        assert launches(emulated) - before == 1

    @pytest.mark.parametrize(("at_once", "batch"), [(1, 9), (2, 3), (7, 3)])
    def test_any_number_of_thread_blocks_may_run_at_a_time(self, at_once: int, batch: int, emulated: Emulator) -> None:
        cases = chain(self.BLOCKS[0].with_(batch=batch, dtype=torch.bfloat16), *self.BLOCKS[1:5])
        for number, order in enumerate(ORDERS):
            emulated.configure(Emulation(order, "late", FEW, emulated.flavour, number, at_once))
            check(cases, emulated)

    def test_the_same_bits_in_every_order(self, emulated: Emulator) -> None:
        cases = chain(self.BLOCKS[0].with_(batch=5, dtype=torch.bfloat16), *self.BLOCKS[1:])
        drawn = [case.draw(seed=position) for position, case in enumerate(cases)]
        blocks = [entry(case, arguments) for case, arguments in zip(cases, drawn, strict=True)]
        run, results = getattr(torch.ops, emulated.namespace).mbconv_stack, []
        for seed, order in enumerate((*ORDERS, "random", "random")):
            emulated.configure(Emulation(order, "early", FEW, emulated.flavour, seed=seed))
            results.append(run(drawn[0]["x"], *flatten(blocks), False))
        assert all(torch.equal(results[0], other) for other in results[1:])

    def test_more_blocks_than_a_launch_has(self, emulated: Emulator) -> None:
        emulated.configure(Emulation("reverse", "early", FEW, emulated.flavour))
        cases = chain(*[block(16, residual=number > 0, batch=2, expanded=8, height=5, width=4) for number in range(22)])
        check(cases, emulated)
        before = launches(emulated)
        check(cases, emulated)
        assert launches(emulated) - before == 2

    @pytest.mark.slow
    def test_all_blocks_of_b0_at_full_size(self, emulated: Emulator) -> None:
        emulated.configure(Emulation("random", "late", A100, emulated.flavour))
        cases = of_network("efficientnet_b0", whole=True)
        assert {line["kernel"] for line in lines_of(cases, A100)} == {"mbconv_queue"}
        check(cases, emulated)


class TestLaunches:
    def test_a_block_that_does_not_fit_divides_a_stack(self, emulated: Emulator) -> None:
        emulated.configure(Emulation(flavour=emulated.flavour))
        cases = chain(block(16), block(24), block(24, expanded=100), block(16), block(16, 5, residual=True))
        check(cases, emulated)
        before = launches(emulated)
        check(cases, emulated)
        assert launches(emulated) - before == 1 + 3 + 1

    @pytest.mark.parametrize("limits", [A100, H200], ids=["A100", "H200"])
    def test_blocks_share_a_launch_with_clusters_and_without(self, limits: tuple[int, ...], emulated: Emulator) -> None:
        cases = chain(block(16), block(24, stride=2), block(16))
        emulated.configure(Emulation("forward", "late", limits, emulated.flavour))
        check(cases, emulated)
        before = launches(emulated)
        check(cases, emulated)
        assert launches(emulated) - before == 1

    def test_a_cluster_that_the_gpu_has_no_room_for_is_answered_by_a_smaller_one(self, emulated: Emulator) -> None:
        emulated.configure(Emulation(flavour=emulated.flavour))
        cases = chain(block(16, expanded=480, height=7, width=7), block(16, expanded=144))
        for room, clusters in ((16, [10]), (9, [5]), (2, [1])):
            emulated.module.refuse_clusters_above(room)
            try:
                check(cases, emulated)
                emulated.module.clear_launches()
                check(cases, emulated)
            finally:
                emulated.module.refuse_clusters_above(16)
            assert [one["cluster"] for one in emulated.launches()] == clusters

    def test_no_images(self, emulated: Emulator) -> None:
        cases = chain(block(24, stride=2, batch=0), block(16))
        blocks = [entry(case, case.draw()) for case in cases]
        x = cases[0].draw()["x"]
        assert getattr(torch.ops, emulated.namespace).mbconv_stack(x, *flatten(blocks), False).shape == (0, 16, 5, 4)


@pytest.mark.usefixtures("compiled")
class TestPlan:
    def test_the_late_blocks_of_b0_are_one_launch_for_few_images(self) -> None:
        cases = of_network("efficientnet_b0")
        for batch in (1, 8):
            lines = lines_of([case.with_(batch=batch) for case in cases], H200)
            stacked = [line for line in lines if line["kernel"] == "mbconv_stack"]
            assert {line["at"] for line in stacked} == {str(number) for number in range(5, 15)}
            assert {line["stacked"] for line in stacked} == {"10"}

    def test_many_images_are_one_queue(self) -> None:
        lines = lines_of(of_network("efficientnet_b0", batch=256, whole=True), H200)
        assert [line["kernel"] for line in lines] == ["mbconv_queue"] * 16
        assert {line["stacked"] for line in lines} == {"16"}
        assert len({(line["grid"], line["shared"]) for line in lines}) == 1
        assert int(lines[0]["grid"]) == sum(int(line["items"]) for line in lines)

    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    def test_a_multiprocessor_holds_as_many_of_a_queue_as_of_each_of_its_blocks(self, gpu: Any) -> None:
        """Those that need more shared memory, for fewer of them, have a launch of their own."""
        limits = tuple(gpu.limits())
        for batch in (1, 64, 256):
            cases = of_network("efficientnet_b4", batch=batch)
            shared = {line["at"]: int(line["shared"]) for line in lines_of(cases, limits) if "queue" in line["kernel"]}
            for number, of_launch in shared.items():
                (alone,) = lines_of([cases[int(number)]], limits)
                if alone["kernel"] == "mbconv_queue":
                    assert limits[2] // (of_launch + 1024) >= min(3, limits[2] // (int(alone["shared"]) + 1024))

    @pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
    def test_blocks_of_a_stack_share_the_cluster_and_each_covers_its_channels(self, gpu: Any) -> None:
        limits = tuple(gpu.limits())
        for batch in (1, 7, 16):
            lines = lines_of([case.with_(batch=batch) for case in of_network("efficientnet_b0")], limits)
            assert sorted({int(line["at"]) for line in lines}) == list(range(15))
            for line in lines:
                if line["kernel"] != "mbconv_stack":
                    continue
                team, cluster, images = (int(line[name]) for name in ("team", "cluster", "images"))
                assert team <= cluster <= limits[7]
                assert (team - 1) * int(line["groups"]) < int(line["channel_groups"]) <= team * int(line["groups"])
                assert int(line["grid"]) == -(-batch // images) * cluster
                assert int(line["shared"]) <= limits[3]
                same = [one for one in lines if one["kernel"] == "mbconv_stack"]
                assert len({(one["cluster"], one["images"], one["shared"]) for one in same}) == 1

    def test_a_launch_has_twenty_blocks_at_most(self) -> None:
        case = late_blocks("efficientnet_b0")[2].with_(batch=1)
        stacked = [line["stacked"] for line in lines_of([case] * 24, H200)]
        assert stacked == ["20"] * 20 + ["4"] * 4


class TestKeptPlans:
    """A plan weighs hundreds of cuts, and is kept for the next call of its shape."""

    def test_a_shape_is_planned_once(self) -> None:
        kept = torch.ops.effkernels.cuda_plans_kept
        cases = [case.with_(batch=3) for case in of_network("efficientnet_b0")]
        first = lines_of(cases, H200)
        before = kept()
        assert lines_of(cases, H200) == first
        assert kept() == before

    @pytest.mark.parametrize(
        "changes",
        [{"batch": 29}, {"kernel": (3, 3), "padding": (1,) * 4}, {"residual": False}, {"reduced": 0}],
        ids=str,
    )
    def test_another_shape_has_its_own(self, changes: dict[str, Any]) -> None:
        case = late_blocks("efficientnet_b0")[2].with_(batch=27)
        assert case.residual
        assert case.reduced > 0
        one, other = (lines_of([case.with_(**more)], H200) for more in ({}, changes))
        assert lines_of([case], H200) == one
        assert lines_of([case.with_(**changes)], H200) == other
        if "residual" not in changes:  # which takes no part in the cut
            assert one != other

    def test_another_gpu_has_its_own(self) -> None:
        cases = [case.with_(batch=2) for case in of_network("efficientnet_b0")]
        assert lines_of(cases, H200) != lines_of(cases, A100)
        assert {line["kernel"] for line in lines_of(cases, A100)} == {"mbconv_queue"}

    def test_they_do_not_grow_without_end(self) -> None:
        case = late_blocks("efficientnet_b0")[0]
        for batch in range(1, 601):
            lines_of([case.with_(batch=batch)], H200)
        assert 1 <= torch.ops.effkernels.cuda_plans_kept() <= 512

    def test_a_launch_keeps_its_plan(self, emulated: Emulator) -> None:
        kept = getattr(torch.ops, emulated.namespace).cuda_plans_kept
        emulated.configure(Emulation("random", "late", H200, emulated.flavour))
        check(chain(*SMALL["other windows"]), emulated)
        before = kept()
        check(chain(*SMALL["other windows"]), emulated)
        assert kept() == before > 0

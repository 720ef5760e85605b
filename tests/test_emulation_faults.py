"""The emulator reports every kind of fault in a kernel by name: one small wrong kernel for each kind of fault
(tests/emulation/selftest.cu), and beside it, where there is one, the same kernel done right.

A kind that only one flavour sees is tested in its run: make test-race, make test-asan.
"""

from __future__ import annotations

import pytest
import torch
from emulation.control import A100, COPIES, ORDERS, Emulation, Emulator
from torch import Tensor

IN_RACE = ("race",)
IN_ASAN = ("asan",)
CHECKED_BY_THE_COMPILER = ("race", "asan")


def only_in(emulated: Emulator, flavours: tuple[str, ...]) -> None:
    if emulated.flavour not in flavours:
        runs = " and ".join(f"make test-{flavour}" for flavour in flavours)
        pytest.skip(f"this kind of fault is found by {runs}")


@pytest.fixture(params=[(order, copies) for order in ORDERS for copies in COPIES], ids="-".join)
def in_every_order(request: pytest.FixtureRequest, emulated: Emulator) -> Emulator:
    """The emulator in each order and with both moments at which a copy can land."""
    order, copies = request.param
    emulated.configure(Emulation(order, copies, flavour=emulated.flavour))
    return emulated


def data(elements: int = 4096) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(0))


def run(emulated: Emulator, name: str, n: int = 0, **options) -> Tensor:
    output = torch.zeros(4096)
    assert emulated.run(name, data(), output, n, **options) == "cudaSuccess"
    return output


def assert_reported(emulated: Emulator, message: str, name: str, n: int = 0, **options) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(emulated, name, n, **options)
    run(emulated, "copy_words", 100)  # and the next launch finds nothing left of it


# --------------------------------------------------------------------------------------------------- races and barriers
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rotate_block", {"block": 64, "shared_bytes": 256}),
        ("rotate_warp", {"shared_bytes": 128}),
        ("count_blocks", {"grid": 5}),
    ],
)
def test_race(in_every_order: Emulator, name: str, options: dict[str, int]) -> None:
    run(in_every_order, name, **options)
    only_in(in_every_order, IN_RACE)
    missing = "atomic" if name == "count_blocks" else "barrier"
    where = "between blocks on global memory" if name == "count_blocks" else "inside a block on shared memory"
    message = (
        rf"race {where}.*selftest\.cu:\d+ is not ordered after.*selftest\.cu:\d+ by block \d+ thread \d+, by block"
    )
    assert_reported(in_every_order, message, f"{name}_without_{missing}", **options)


def test_missing_barrier_gives_wrong_results_in_some_order(emulated: Emulator) -> None:
    if emulated.flavour == "race":
        pytest.skip("the race flavour reports it before there is a result")
    wrong = []
    for order in ORDERS:
        emulated.configure(Emulation(order, flavour=emulated.flavour))
        output = run(emulated, "rotate_block_without_barrier", block=64, shared_bytes=256)
        wrong.append(not torch.equal(output[:64], data()[:64].roll(-1)))
    assert all(wrong)


@pytest.mark.parametrize("missing", ["fence", "atomic"])
def test_last_arrival(in_every_order: Emulator, missing: str) -> None:
    """The last block to arrive reads what the others wrote: by a fence before and an atomic at the counter."""
    output = run(in_every_order, "last_arrival", grid=9, shared_bytes=4)
    assert output[1] == pytest.approx(float(data()[:36].sum()), rel=1e-5)
    only_in(in_every_order, IN_RACE)
    message = r"race between blocks on global memory.*selftest\.cu:\d+ is not ordered after the \w+ at selftest\.cu:\d+"
    assert_reported(in_every_order, message, f"last_arrival_without_{missing}", grid=9, shared_bytes=4)


@pytest.mark.parametrize("missing", ["fence", "acquire"])
def test_queue(in_every_order: Emulator, missing: str) -> None:
    """A block waits for one that started before it, and reads what it wrote."""
    output = run(in_every_order, "queue_of_pairs", grid=40, block=64, shared_bytes=4).view(torch.int32)
    values = output[41 : 41 + 40 * 64].view(20, 2, 64)
    assert torch.equal(values[:, 1], values[:, 0])
    assert values[:, 0, 3].tolist() == [200 * pair + 3 for pair in range(20)]
    only_in(in_every_order, IN_RACE)
    message = r"race between blocks on global memory.*selftest\.cu:\d+ is not ordered after the \w+ at selftest\.cu:\d+"
    assert_reported(in_every_order, message, f"queue_without_{missing}", grid=40, block=64, shared_bytes=4)


@pytest.mark.parametrize("residents", [1, 2])
def test_queue_that_waits_for_a_block_that_may_not_have_started(residents: int, emulated: Emulator) -> None:
    emulated.configure(Emulation(flavour=emulated.flavour, residents=residents))
    options = {"grid": 4, "block": 64, "shared_bytes": 4}
    run(emulated, "queue_of_pairs", **options)
    if residents == 1:
        assert_reported(emulated, "deadlock.*only a cooperative launch may wait for", "queue_of_later", **options)
    else:
        run(emulated, "queue_of_later", **options)


def test_last_arrival_without_atomic_gives_wrong_results_in_some_order(emulated: Emulator) -> None:
    if emulated.flavour == "race":
        pytest.skip("the race flavour reports it before there is a result")
    right = []
    for order in ORDERS:
        emulated.configure(Emulation(order, flavour=emulated.flavour))
        output = run(emulated, "last_arrival_without_atomic", grid=9, shared_bytes=4)
        right.append(float(output[1]) == pytest.approx(float(data()[:36].sum()), rel=1e-5))
    assert not all(right)


def test_launch_that_may_overlap_the_one_ahead(in_every_order: Emulator) -> None:
    run(in_every_order, "overlapping", overlaps=True)
    run(in_every_order, "overlapping_without_wait")
    message = "the thread leaves without wait_for_previous.*thread \\(3,0,0\\)"
    assert_reported(in_every_order, message, "overlapping_without_wait", overlaps=True)


def test_global_memory_touched_before_the_launch_ahead_has_ended(in_every_order: Emulator) -> None:
    only_in(in_every_order, ("race",))
    message = "read of global memory at .* before wait_for_previous"
    assert_reported(in_every_order, message, "overlapping_too_early", overlaps=True)


def test_divergent_barrier(in_every_order: Emulator) -> None:
    message = (
        r"divergent barrier: .*already wait in __syncthreads at selftest\.cu:\d+, .* at selftest\.cu:\d+, by block"
    )
    assert_reported(in_every_order, message, "diverge_block", block=64)


def test_divergent_warp(in_every_order: Emulator) -> None:
    assert_reported(in_every_order, "divergent warp: lanes already wait in (__syncwarp|__ballot_sync)", "diverge_warp")


def test_deadlock(in_every_order: Emulator) -> None:
    message = r"deadlock, no thread can go on: 1 threads in __syncthreads at selftest\.cu.*31 threads in __syncwarp"
    assert_reported(in_every_order, message, "wait_apart")
    assert_reported(in_every_order, "deadlock, threads spin on what nobody changes: .*selftest", "spin_forever", grid=3)
    assert_reported(in_every_order, "deadlock.*only a cooperative launch may wait for", "wait_for_grid", grid=40)
    run(in_every_order, "wait_for_grid", grid=40, cooperative=True)


def test_collective_with_wrong_lanes(in_every_order: Emulator) -> None:
    message = r"__shfl_sync: the lane is not in the mask that it gives at selftest\.cu:\d+, by block \(0,0,0\) thread"
    assert_reported(in_every_order, message, "shuffle_outside_mask")
    assert_reported(in_every_order, "__shfl_sync reads lane 9, which is not in the mask", "shuffle_from_outside_mask")
    assert_reported(in_every_order, "(needs all 32 lanes|a lane leaves the kernel while)", "mma_without_a_lane")
    assert_reported(in_every_order, r"mma \(float16\) needs all 32 lanes", "mma_without_a_lane", block=30)


# ----------------------------------------------------------------------------------------------------------- memory
def test_uninitialised_shared_memory(in_every_order: Emulator) -> None:
    if in_every_order.flavour == "race":
        message = r"uninitialised shared memory, byte 12, read at selftest\.cu:\d+, by block \(0,0,0\) thread \(3,0,0\)"
        assert_reported(in_every_order, message, "read_uninitialised", shared_bytes=128)
        return
    run(in_every_order, "rotate_block", block=64, shared_bytes=256)  # leaves its values in the memory
    output = run(in_every_order, "read_uninitialised", shared_bytes=256)
    assert output[:32].isnan().tolist() == [i == 3 for i in range(32)]


@pytest.mark.parametrize("begin", [28, -3])
def test_shared_memory_out_of_bounds(in_every_order: Emulator, begin: int) -> None:
    options = {"shared_bytes": 128, "grid": 6}
    run(in_every_order, "write_shared", 0, **options)
    assert_reported(in_every_order, "out of bounds.*shared memory", "write_shared", begin, **options)
    only_in(in_every_order, CHECKED_BY_THE_COMPILER)
    assert_reported(in_every_order, "out of bounds.*shared memory", "read_shared", begin, **options)


def test_copy_out_of_bounds(in_every_order: Emulator) -> None:
    message = r"out of bounds: cp\.async of 16 bytes at byte 256 of 256 bytes of shared memory at selftest\.cu:\d+"
    assert_reported(in_every_order, message, "copy_async_to", 64, shared_bytes=256)
    assert_reported(in_every_order, "out of bounds: ldmatrix of 16 bytes", "ldmatrix_at", 128, shared_bytes=256)


def test_global_memory_out_of_bounds(emulated: Emulator) -> None:
    only_in(emulated, IN_ASAN)
    for begin in (4096 - 5, -40):
        for name in ("write_global", "read_global"):
            message = (
                r"out of bounds \(AddressSanitizer\): heap-buffer-overflow, (READ|WRITE) of size 4 at selftest\.cu:\d+"
            )
            assert_reported(emulated, message, name, begin)


def test_global_memory_out_of_bounds_is_left_in_the_canaries(emulated: Emulator) -> None:
    """The other flavours leave this to tests that put guard values around an output."""
    if emulated.flavour == "asan":
        pytest.skip("the asan flavour reports it: test_global_memory_out_of_bounds")
    around = torch.zeros(64)
    emulated.run("write_global", None, around[16:32], 16 - 5, block=8)
    assert around.nonzero().flatten().tolist() == list(range(27, 35))


@pytest.mark.parametrize("name", ["read_vector_ldg", "read_vector_ldcg", "write_vector_stcg", "copy_async_at"])
def test_misaligned_vector(emulated: Emulator, name: str) -> None:
    run(emulated, name, 4, shared_bytes=256)
    message = r"misaligned address: .* of 16 bytes at an address that is 4 modulo 16 at selftest\.cu:\d+, by block"
    assert_reported(emulated, message, name, 1, shared_bytes=256)


def test_misaligned_in_shared_memory(emulated: Emulator) -> None:
    message = r"misaligned address: {} of 16 bytes at byte {} of shared memory at selftest\.cu:\d+, by block"
    assert_reported(emulated, message.format(r"cp\.async", 4), "copy_async_to", 1, shared_bytes=256)
    assert_reported(emulated, message.format("ldmatrix", 2), "ldmatrix_at", 1, shared_bytes=256)


def test_misaligned_plain_vector(emulated: Emulator) -> None:
    run(emulated, "read_vector_plain", 4)
    only_in(emulated, CHECKED_BY_THE_COMPILER)
    message = r"misaligned address: .*uint4.* at an address that is 4 modulo 16 at selftest\.cu:\d+, by block"
    assert_reported(emulated, message, "read_vector_plain", 1)


# ------------------------------------------------------------------------------------------------------------ copies
@pytest.mark.parametrize("order", ORDERS)
def test_copy_used_before_it_is_waited_for(emulated: Emulator, order: str) -> None:
    """The late mode finds it; in the early mode it goes unseen, as it may on a GPU."""
    options = {"shared_bytes": 512}
    for copies in COPIES:
        emulated.configure(Emulation(order, copies, flavour=emulated.flavour))
        assert torch.equal(run(emulated, "copy_async_used", **options)[:32], data()[:32])
        if copies == "late" and emulated.flavour == "race":
            assert_reported(emulated, "uninitialised shared memory", "copy_async_used_without_wait", **options)
        else:
            output = run(emulated, "copy_async_used_without_wait", **options)[:32]
            assert output.isnan().all() if copies == "late" else torch.equal(output, data()[:32])


def test_copy_over_what_is_still_read(in_every_order: Emulator) -> None:
    only_in(in_every_order, IN_RACE)
    assert_reported(in_every_order, "race inside a block on shared memory", "copy_async_too_early", shared_bytes=128)


def test_copy_not_waited_for_at_the_end(in_every_order: Emulator) -> None:
    message = r"the thread exits with cp\.async copies that were not waited for at selftest\.cu:\d+, by block"
    assert_reported(in_every_order, message, "copy_async_not_waited_for", shared_bytes=256)


# ----------------------------------------------------------------------------------------------------------- clusters
def test_cluster(in_every_order: Emulator) -> None:
    options = {"grid": 8, "cluster": 4, "shared_bytes": 128}
    output = run(in_every_order, "cluster_sum", 4, **options)
    wanted = data()[:256].view(2, 4, 32).sum(1, keepdim=True).expand(2, 4, 32).flatten()
    torch.testing.assert_close(output[:256], wanted)
    message = "rank 4 in a cluster of 4"
    assert_reported(in_every_order, message, "cluster_sum_of_wrong_rank", 4, **options)


def test_cluster_without_its_first_barrier(in_every_order: Emulator) -> None:
    options = {"grid": 4, "cluster": 4, "shared_bytes": 128}
    name = "cluster_sum_without_first_barrier"
    if in_every_order.flavour == "race":
        assert_reported(in_every_order, "(race between blocks on|uninitialised) shared memory", name, 4, **options)
    else:
        assert run(in_every_order, name, 4, **options)[:128].isnan().any()


def test_shared_memory_of_a_block_that_has_exited(in_every_order: Emulator) -> None:
    options = {"grid": 4, "cluster": 4, "shared_bytes": 128}
    if in_every_order.flavour == "plain":
        output = run(in_every_order, "cluster_read_after_exit", **options)
        assert output[32:128].isnan().all()
    else:
        message = "(a block that has exited|AddressSanitizer.*poison)"
        assert_reported(in_every_order, message, "cluster_read_after_exit", **options)


# ------------------------------------------------------------------------------------------------------- launch limits
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"block": 1025}, "cudaErrorInvalidConfiguration"),
        ({"block": (32, 33)}, "cudaErrorInvalidConfiguration"),
        ({"block": (1, 1, 65)}, "cudaErrorInvalidConfiguration"),
        ({"block": 0}, "cudaErrorInvalidConfiguration"),
        ({"grid": 0}, "cudaErrorInvalidConfiguration"),
        ({"grid": 2**31}, "cudaErrorInvalidConfiguration"),
        ({"grid": (1, 65536)}, "cudaErrorInvalidConfiguration"),
        ({"shared_bytes": 232449}, "cudaErrorInvalidValue"),
        ({"grid": 32, "cluster": 32}, "cudaErrorInvalidClusterSize"),
        ({"grid": 6, "cluster": 4}, "cudaErrorInvalidConfiguration"),
        ({"grid": 133, "cooperative": True, "shared_bytes": 200000}, "cudaErrorCooperativeLaunchTooLarge"),
        ({"grid": 265, "cooperative": True, "block": 1024, "registers": 32}, "cudaErrorCooperativeLaunchTooLarge"),
        ({"grid": 133, "cooperative": True, "block": 1024, "registers": 64}, "cudaErrorCooperativeLaunchTooLarge"),
    ],
)
def test_launch_limits(emulated: Emulator, options: dict[str, int], error: str) -> None:
    """A launch that CUDA would refuse is refused by the same error, and nothing runs."""
    given = dict(options)
    emulated.module.use_device(list(Emulation().limits), given.pop("registers", 64))
    output = torch.zeros(4096)
    assert emulated.run("copy_words", data(), output, 4096, **given) == error
    assert not output.any()
    assert emulated.launches() == []


@pytest.mark.parametrize(
    "options",
    [
        {"block": 1024},
        {"shared_bytes": 232448},
        {"grid": 16, "cluster": 16},
        {"grid": 132, "cooperative": True, "shared_bytes": 200000},
    ],
)
def test_launch_at_its_limit(emulated: Emulator, options: dict[str, int]) -> None:
    output = torch.zeros(4096)
    assert emulated.run("copy_words", data(), output, 4096, **options) == "cudaSuccess"
    assert torch.equal(output, data())


def test_a_device_without_clusters(emulated: Emulator) -> None:
    emulated.configure(Emulation(limits=A100, flavour=emulated.flavour))
    assert emulated.run("cluster_sum", data(), torch.zeros(4096), 2, grid=2, cluster=2, shared_bytes=128) == (
        "cudaErrorInvalidClusterSize"
    )
    assert_reported(emulated, "cluster_sync on a device without clusters", "cluster_sum", 1, shared_bytes=128)

"""The operators on PyTorch's streams, in CUDA graphs and on a second device. These tests need a GPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import op_cases
import pytest
import torch
from op_cases import ALL_OPS, BLOCK_OP, DEPTHWISE_OPS, EXPAND_OP, Case
from torch import Tensor

import effkernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Sizes at which several blocks share an image, so that partial sums and counters are at work.
CASES = [
    *(Case(op, torch.bfloat16, channels=96, height=56, width=56, reduced=4) for op in DEPTHWISE_OPS),
    *(Case(op, torch.float32, channels=40, height=13, width=14, kernel=(5, 5)) for op in DEPTHWISE_OPS),
    Case("pointwise_bn_act", torch.bfloat16, channels=96, out_channels=24, gated=True, residual=True),
    Case("conv_bn_act", torch.bfloat16, channels=3, out_channels=32, height=64, width=64, stride=2),
    Case("squeeze_excite_gate", torch.bfloat16, channels=672, reduced=28),
    Case(EXPAND_OP, torch.bfloat16, channels=24, out_channels=96, height=56, width=56),
    Case(BLOCK_OP, torch.bfloat16, channels=112, expanded=672, out_channels=112, residual=True),
]


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    with effkernels.backend("cuda"), torch.inference_mode():
        yield
    torch.cuda.synchronize()


def call_of(case: Case, device: str = "cuda", seed: int = 0) -> tuple[dict[str, Any], Callable[[], tuple[Tensor, ...]]]:
    """Return the arguments of a case and a function that calls the operator on them."""
    arguments = case.draw(seed, device)
    return arguments, lambda: op_cases.run(effkernels.ops, case, arguments)


def same(results: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


def first_input(arguments: dict[str, Any]) -> Tensor:
    found: Tensor = arguments["pooled"] if "pooled" in arguments else arguments["x"]
    return found


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Return a graph of one call, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


def test_every_operator_is_among_the_cases() -> None:
    assert {case.op for case in CASES} == set(ALL_OPS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call_runs_on_the_current_stream(case: Case) -> None:
    """It waits for the work before it there: on another stream it would read the input too early."""
    arguments, call = call_of(case)
    wanted = call()
    given = first_input(arguments)
    kept = given.clone()
    given.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # some ten milliseconds
        given.copy_(kept)
        results = call()
    side.synchronize()
    assert same(results, wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_streams_at_once(case: Case) -> None:
    """Launches that overlap do not meet in counters or partial sums."""
    calls = [call_of(case, seed=seed)[1] for seed in range(2)]
    wanted = [call() for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for stream, call, kept in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(call())
    torch.cuda.synchronize()
    assert all(same(result, one) for kept, one in zip(results, wanted, strict=True) for result in kept)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_capture_and_replay(case: Case) -> None:
    """A replay computes on what the input holds then, as often as wanted, and calls beside it stay right."""
    arguments, call = call_of(case)
    other = first_input(call_of(case, seed=1)[0])
    given = first_input(arguments)
    before = given.clone()
    given.copy_(other)
    wanted_other = call()
    given.copy_(before)
    wanted = call()
    graph, outputs = captured(call)
    for value, expected in ((before, wanted), (other, wanted_other), (before, wanted)):
        given.copy_(value)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert same(outputs, expected)
        assert same(call(), expected)
    del graph
    given.copy_(other)
    assert same(call(), wanted_other), "a call after the graph is gone"


@pytest.mark.parametrize("op", ["depthwise_bn_act_gate", "depthwise_bn_act_se"])
def test_two_graphs_and_calls_at_once(op: str) -> None:
    """Each graph has counters of its own, wherever it is replayed."""
    case = Case(op, torch.bfloat16, batch=8, channels=96, height=56, width=56, reduced=4)
    first, second = (call_of(case, seed=seed)[1] for seed in range(2))
    wanted = [first(), second()]
    graphs = [captured(first), captured(second)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, (graph, _outputs) in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            beside = first()
    torch.cuda.synchronize()
    assert all(same(outputs, one) for (_, outputs), one in zip(graphs, wanted, strict=True))
    assert same(beside, wanted[0])


def test_results_are_the_same_bits_every_time() -> None:
    for case in CASES:
        _, call = call_of(case.with_(batch=16))
        first = call()
        assert all(same(call(), first) for _ in range(10)), str(case)


def test_a_whole_network_in_a_graph() -> None:
    """EfficientNet-B0 replayed gives the bits of the plain call."""
    torch.manual_seed(0)
    model = effkernels.create_model("efficientnet_b0", device="cuda", dtype=torch.bfloat16).eval()
    model.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 224, 224, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    others = torch.randn_like(images)
    wanted, wanted_others = model(images), model(others)
    given = images.clone(memory_format=torch.channels_last)
    graph, (logits,) = captured(lambda: (model(given),))
    for value, expected in ((images, wanted), (others, wanted_others)):
        given.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(logits, expected)


# What each operator promises; the others take one launch.
LAUNCHES = {"depthwise_bn_act_se": (1, 2), EXPAND_OP: (1, 2), BLOCK_OP: (1, 3)}


def test_launches_are_counted() -> None:
    """The counter and the promise agree."""
    for case in CASES:
        _, call = call_of(case)
        call()
        before = torch.ops.effkernels.cuda_launches()
        call()
        counted = torch.ops.effkernels.cuda_launches() - before
        assert counted in LAUNCHES.get(case.op, (1,)), f"{case}: {counted} launches"


def test_the_host_does_not_wait() -> None:
    """A call returns while the GPU is still busy with what came before."""
    for case in CASES:
        _, call = call_of(case)
        call()
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)  # some two hundred milliseconds
        call()
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), f"{case}: the call waited for the GPU"
        torch.cuda.synchronize()


LOGITS = """
import torch, effkernels
torch.manual_seed(0)
model = effkernels.create_model("efficientnet_b0", device="cuda", dtype=torch.bfloat16, backend="cuda").eval()
images = torch.randn(2, 3, 224, 224, device="cuda").bfloat16()
with torch.inference_mode():
    logits = model(images)
    for _ in range(20):  # a long queue of short launches
        assert torch.equal(model(images), logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(images)
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, logits)
print(logits.float().cpu().numpy().tobytes().hex())
"""


def test_launches_that_overlap_change_no_bit() -> None:
    """Programmatic dependent launch, and every launch after the end of the one ahead: the same logits."""
    found = set()
    for setting in ("1", "0"):
        environment = {**os.environ, "EFFKERNELS_OVERLAP_LAUNCHES": setting}
        done = subprocess.run(
            [sys.executable, "-c", LOGITS], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_second_device(case: Case) -> None:
    """It runs where its tensors are, whichever device is current, and gives the same bits."""
    wanted = call_of(case)[1]()
    results = call_of(case, "cuda:1")[1]()
    assert all(result.device.index == 1 for result in results)
    assert same(tuple(result.cpu() for result in results), tuple(one.cpu() for one in wanted))


def test_a_copied_network_shares_nothing() -> None:
    """Two copies of a network on two streams at once."""
    torch.manual_seed(0)
    model = effkernels.create_model("efficientnet_b0", device="cuda", dtype=torch.bfloat16).eval()
    models = [model, copy.deepcopy(model)]
    images = torch.randn(2, 3, 224, 224, device="cuda").bfloat16()
    wanted = model(images)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in models]
    results = []
    for _ in range(5):
        for stream, one in zip(streams, models, strict=True):
            with torch.cuda.stream(stream):
                results.append(one(images))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in results)

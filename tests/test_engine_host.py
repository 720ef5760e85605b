"""Recorded forwards on the CPU: the same bits as the model's, other operators between ours, new weights, memory."""

from __future__ import annotations

import copy
import gc
import resource
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import SIZE, first_stages, images, small_network
from torch import Tensor

from effkernels import _library, ops
from effkernels._recorded_tensor import NotRecordableError
from effkernels.engine import InferenceEngine
from effkernels.engine.cpu_recording import Recording

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")
OURS = torch.ops.effkernels


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def channels_last(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last)


def assert_repeats(work: Any, x: Tensor, **arguments: Any) -> Recording:
    """Check that a recording of `work(x)` gives the same bits as the call, for other values in x, again and again."""
    recording = Recording(work, x)
    for seed in (5, 6, 5):
        x.copy_(channels_last(*x.shape, seed=seed))
        wanted = work(x)
        recording.replay()
        found = recording.output
        pairs = [(found, wanted)] if isinstance(wanted, Tensor) else zip(found, wanted, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    return recording


# ------------------------------------------------------------------------------------------------------- operators


def norm(channels: int) -> ops.Norm:
    mean, var, weight, bias = (torch.full((channels,), value) for value in (0.2, 1.3, 0.9, 0.1))
    return ops.Norm(mean, var, weight, bias)


def excite(channels: int) -> dict[str, Any]:
    weights = {"w_reduce": (4, channels), "b_reduce": (4,), "w_expand": (channels, 4), "b_expand": (channels,)}
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])  # with the weights kept in another form, and without
def test_every_operator(batch: int, dtype: torch.dtype) -> None:
    x = channels_last(batch, 40, 9, 11).to(dtype)
    wide, depthwise, larger = torch.randn(72, 40, 1, 1), torch.randn(40, 1, 3, 3), torch.randn(72, 1, 5, 5)
    dense = torch.randn(8, 40, 3, 3)
    first: dict[str, Any] = {"norm": norm(40), "padding": (1, 1, 1, 1), "activation": "silu"}
    gated = {**first, **excite(40)}
    stem = {"norm": norm(8), "padding": (1, 1, 1, 1)}
    both = {"expand_norm": norm(72), "norm": norm(72), "padding": (2, 2, 2, 2)}
    assert_repeats(lambda x: ops.depthwise_bn_act(x, depthwise, **first), x)
    assert_repeats(lambda x: ops.depthwise_bn_act_squeeze(x, depthwise, **first), x)
    assert_repeats(lambda x: ops.depthwise_bn_act_gate(x, depthwise, **gated), x)
    assert_repeats(lambda x: ops.depthwise_bn_act_se(x, depthwise, **gated), x)
    assert_repeats(lambda x: ops.conv_bn_act(x, dense, **stem), x)
    assert_repeats(lambda x: ops.pointwise_bn_act(x, wide, activation="silu"), x)
    assert_repeats(lambda x: ops.expand_depthwise_squeeze(x, wide, larger, **both), x)


def test_the_gate_alone() -> None:
    pooled, weights = torch.rand(2, 40), tuple(excite(40).values())
    recording = Recording(lambda x: ops.squeeze_excite_gate(x, *weights), pooled)
    pooled.mul_(-3.0)
    recording.replay()
    assert torch.equal(recording.output, ops.squeeze_excite_gate(pooled, *weights))


def test_results_may_reuse_the_memory_of_results_but_not_of_kept_weights() -> None:
    """A chain long enough that memory is used again, with weights laid out on the way."""
    weights = [torch.randn(64, 64, 1, 1, generator=torch.Generator().manual_seed(i)) / 8 for i in range(12)]
    same = norm(64)

    def chain(x: Tensor) -> Tensor:
        for weight in weights:
            x = ops.pointwise_bn_act(x, weight, norm=same, activation="relu6")
        return x

    recording = assert_repeats(chain, channels_last(1, 64, 8, 8))
    one = 64 * 64 * 4
    assert recording.weight_bytes == 12 * one
    assert 2 * one <= recording.result_bytes <= 3 * one


def test_other_operators_between_ours_are_repeated_too() -> None:
    weight = torch.randn(16, 16, 1, 1) / 4

    def mixed(x: Tensor) -> tuple[Tensor, Tensor]:
        y = ops.pointwise_bn_act(x, weight)
        z = torch.nn.functional.max_pool2d(y, 3, 2, 1)  # makes something new
        z = z.flatten(2).unflatten(2, (4, 4))  # copies, for all its name says
        z = z.contiguous(memory_format=torch.channels_last).relu_()  # writes its argument
        y = ops.pointwise_bn_act(z, weight, activation="silu")
        return y.mean((2, 3)), torch.cat([y, z], 1)[:, 3:, ::2]

    assert_repeats(mixed, channels_last(2, 16, 8, 8))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda x: x + 1, "no kernel of effkernels"),
        (lambda x: ops.pointwise_bn_act(x, torch.ones(2, 4, 1, 1)) * float(x.sum()), "reads values"),
        (lambda x: ops.pointwise_bn_act(x.contiguous(), torch.ones(2, 4, 1, 1)), "cannot be recorded; allowed"),
        (lambda x: ops.pointwise_bn_act(x, torch.ones(2, 4, 1, 1), gate=torch.ones(1, 4, 2)[:, :, 0]), "gate would be"),
        (lambda x: ops.squeeze_excite_gate(x[0, 0].T, torch.ones(2, 5), None, torch.ones(5, 2), None), "pooled"),
    ],
)
def test_what_cannot_be_repeated_is_refused(work: Any, message: str) -> None:
    x = channels_last(1, 4, 5, 6)
    with pytest.raises(NotRecordableError, match=message):
        Recording(work, x)


def test_pieces_are_numbered_and_live_as_long_as_their_recording() -> None:
    x, weight = channels_last(1, 16, 8, 8), torch.ones(16, 16, 1, 1)
    with pytest.raises(RuntimeError, match="recording is no recording; allowed: a tensor of cpu_recording"):
        OURS.cpu_recording_replay(x, 1)
    native = OURS.cpu_recording()
    assert OURS.cpu_recording_cut(native) == 0
    with pytest.raises(RuntimeError, match="piece=1 of a recording is not there; allowed: 1 to 0"):
        OURS.cpu_recording_replay(native, 1)
    output = OURS.recorded_pointwise_bn_act(
        native, x, weight, None, None, None, None, None, 0.0, None, None, "identity", False
    )
    assert [OURS.cpu_recording_cut(native) for _ in range(2)] == [1, 0]
    assert OURS.cpu_recording_bytes(native)[0] >= output.nbytes
    again = native.detach()
    del native
    x.mul_(2.0)
    OURS.cpu_recording_replay(again, 1)  # another reference is enough
    assert torch.equal(output, ops.pointwise_bn_act(x, weight))
    del again
    x.mul_(2.0)
    assert torch.equal(output * 2.0, ops.pointwise_bn_act(x, weight))  # its memory stays for whoever holds it


def test_a_recording_gives_its_memory_back() -> None:
    x = channels_last(1, 64, 8, 8)
    weights = [torch.randn(64, 64, 1, 1) for _ in range(4)]

    def chain(x: Tensor) -> Tensor:
        for weight in weights:
            x = ops.pointwise_bn_act(x, weight)
        return x

    kept = [weakref.ref(weight) for weight in weights]
    recording = Recording(chain, x)
    weights.clear()
    gc.collect()
    assert all(weight() is not None for weight in kept), "replays read them"
    before = _mapped_bytes()
    for _ in range(20):
        recording = Recording(chain, x) if weights else recording
    del recording
    gc.collect()
    assert not any(weight() is not None for weight in kept)
    assert _mapped_bytes() < before


def _mapped_bytes() -> int:
    """Return the address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_a_recorded_operator_takes_part_in_no_other_recording() -> None:
    """Two recordings are made at once, in one thread and in two, and each sees its own calls alone."""
    x, weight = channels_last(1, 16, 8, 8), torch.ones(16, 16, 1, 1)
    rest = (weight, None, None, None, None, None, 0.0, None, None, "identity", False)
    first, second = OURS.cpu_recording(), OURS.cpu_recording()
    OURS.recorded_pointwise_bn_act(first, x, *rest)
    ops.pointwise_bn_act(x, weight)
    assert OURS.cpu_recording_cut(second) == 0
    other = threading.Thread(target=lambda: OURS.recorded_pointwise_bn_act(second, x, *rest))
    other.start()
    other.join()
    assert (OURS.cpu_recording_cut(first), OURS.cpu_recording_cut(second)) == (1, 1)


# ---------------------------------------------------------------------------------------------------------- engines


def kinds(engine: InferenceEngine) -> set[str]:
    return {bucket.runner for bucket in engine.report.buckets}


def test_a_recorded_engine_gives_the_bits_of_an_eager_one() -> None:
    model = small_network(10)
    recorded = InferenceEngine(model, batch_sizes=(1, 2, 5), input_size=SIZE)
    eager = InferenceEngine(model, batch_sizes=(1, 2, 5), input_size=SIZE, cuda_graph=False)
    assert (kinds(recorded), kinds(eager)) == ({"recorded"}, {"eager"})
    for count in (1, 2, 3, 5, 7, 1):
        x = images(count, seed=count)
        assert torch.equal(recorded(x), eager(x))


def test_an_engine_of_feature_maps_is_recorded() -> None:
    model = first_stages()
    engine = InferenceEngine(model, batch_sizes=(2,), input_size=SIZE)
    assert kinds(engine) == {"recorded"}
    x = images(2)
    for found, wanted in zip(engine(x), model(x.contiguous(memory_format=torch.channels_last)), strict=True):
        assert torch.equal(found, wanted)


def test_new_weights_are_recorded_anew() -> None:
    """Of one image the kernels keep the weights in another form, which new values must reach."""
    with torch.inference_mode(False):
        model = small_network(10)
    engine = InferenceEngine(model, batch_sizes=(1, 3), input_size=SIZE)
    x = images(1)
    before = engine(x)
    with torch.inference_mode(False), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert torch.equal(engine(x), before)
    engine.refresh()
    wanted = InferenceEngine(model, batch_sizes=(1, 3), input_size=SIZE, cuda_graph=False)(x)
    assert not torch.equal(wanted, before)
    assert torch.equal(engine(x), wanted)
    assert kinds(engine) <= {"recorded", "not prepared"}


def test_the_memory_of_recordings_is_in_the_bound() -> None:
    model = small_network(10)
    bounds = [
        InferenceEngine(copy.deepcopy(model), batch_sizes=(1, 2), input_size=SIZE, cuda_graph=how).memory_bound_bytes
        for how in (False, True)
    ]
    weights = sum(value.nbytes for value in model.parameters())
    assert bounds[0] + weights / 2 < bounds[1] < bounds[0] + 2 * weights

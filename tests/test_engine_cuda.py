"""The way of an engine on a GPU, on the CPU: calls are recorded as operators, streams and events only noted.

What CUDA itself does with them, tests/gpu/test_engine_on_gpu.py shows on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from engine_models import (
    SIZE,
    NotedCuda,
    NotedStream,
    Returning,
    Sum,
    first_stages,
    images,
    sum_engine,
)
from torch import Tensor

from effkernels.engine import InferenceEngine
from effkernels.engine.cuda import CudaDevice, Uploads

pytestmark = pytest.mark.usefixtures("cuda")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> NotedCuda:
    """Engines made in this test take the way of a GPU, on the CPU."""
    noted = NotedCuda()

    def record_stream(tensor: Tensor, stream: NotedStream) -> None:
        noted.notes.append(("used on", stream.name))

    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    monkeypatch.setattr(
        "effkernels.engine.inference.engine_device", lambda device, threads: CudaDevice(torch.device("cpu", 0), noted)
    )
    return noted


def test_replays_give_the_bits_of_the_model(compiled: None) -> None:
    backbone = first_stages()
    engine = InferenceEngine(backbone, batch_sizes=(1, 4), input_size=SIZE)
    assert [bucket.runner for bucket in engine.report.buckets] == ["cuda graph"] * 2
    for count in (0, 1, 3, 6):
        x = images(count, seed=count).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted = backbone(x)
        assert all(map(torch.equal, engine(x), wanted))


def test_the_model_is_not_called_again() -> None:
    engine = sum_engine()
    copied = engine._prepared._model
    assert isinstance(copied, Sum)
    copied.calls.clear()
    assert engine(torch.ones(6, 3, 2, 2)).tolist() == [[12.0]] * 6
    assert copied.calls == []


def test_results_outlive_later_calls() -> None:
    engine = sum_engine(Returning(lambda x: {"sum": x.sum((1, 2, 3)), "same": x}))
    inputs = [torch.full((3, 3, 2, 2), float(value)) for value in range(4)]
    results = [engine(x) for x in inputs]
    for value, result in enumerate(results):
        assert result["sum"].tolist() == [12.0 * value] * 3
        assert torch.equal(result["same"], inputs[value])


def test_nothing_of_an_earlier_call_is_left() -> None:
    """A row that is padding now held an image before; its values must not be computed on."""
    engine = sum_engine(Returning(lambda x: x + 0 * x.sum()), batch_sizes=(4,))  # a model that mixes its rows
    engine(torch.full((4, 3, 2, 2), float("nan")))
    assert torch.equal(engine(torch.ones(1, 3, 2, 2)), torch.ones(1, 3, 2, 2))


def test_new_weights_reach_the_recordings(compiled: None) -> None:
    model = first_stages()
    engine = InferenceEngine(model, batch_sizes=(2,), input_size=SIZE)
    x = images(3).contiguous(memory_format=torch.channels_last)
    before = engine(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.bn1.running_mean.add_(0.1)  # type: ignore[union-attr, operator]
        wanted = model(x)
    assert all(map(torch.equal, engine(x), before))
    engine.refresh()
    assert all(map(torch.equal, engine(x), wanted))
    assert not any(map(torch.equal, before, wanted))


def test_what_cannot_be_recorded_runs_as_it_is(cuda: NotedCuda) -> None:
    engine = sum_engine(Returning(lambda x: x.sum((1, 2, 3)) * (2 if x.sum().item() > 0 else 1)))
    for bucket in engine.report.buckets:
        assert bucket.runner == "eager"
        assert bucket.reason == ("recording failed: RuntimeError: operation not permitted when the stream is capturing")
    assert engine(torch.ones(3, 3, 2, 2)).tolist() == [24.0] * 3
    assert cuda.recording_into == [], "the allocator keeps every tensor that is freed while it believes in a recording"


def test_graphs_can_be_switched_off() -> None:
    engine = sum_engine(cuda_graph=False)
    assert {(bucket.runner, bucket.reason) for bucket in engine.report.buckets} == {("eager", "cuda_graph=False")}


def test_work_comes_after_the_callers_and_before_its_next(cuda: NotedCuda) -> None:
    engine = sum_engine(batch_sizes=(1, 4))
    assert cuda.notes.count(("record graph",)) == 2
    cuda.notes.clear()
    engine(torch.ones(5, 3, 2, 2))
    upload = [
        ("host waits for", "slot"), ("enter", "copies"), ("record", "slot", "copies"), ("leave", "copies"),
        ("wait", "engine", "slot"), ("used on", "engine"),
    ]  # fmt: skip
    assert cuda.notes == [
        ("wait", "engine", "caller"),
        ("enter", "engine"),
        *(tuple(word.replace("slot", "slot 0") for word in note) for note in upload),
        *(tuple(word.replace("slot", "slot 1") for word in note) for note in upload),
        ("used on", "caller"),
        ("leave", "engine"),
        ("wait", "caller", "engine"),
    ]


def test_the_caller_waits_for_a_call_that_failed_too(cuda: NotedCuda) -> None:
    engine = sum_engine(cuda_graph=False, warm_up=False)
    engine._prepared._model = Returning(lambda x: x.no_such_method())
    cuda.notes.clear()
    with pytest.raises(AttributeError, match="no_such_method"):
        engine(torch.ones(1, 3, 2, 2))
    assert cuda.notes[-1] == ("wait", "caller", "engine")


def test_a_submitted_image_is_waited_for(cuda: NotedCuda) -> None:
    with sum_engine() as engine:
        cuda.notes.clear()
        assert engine.submit(torch.ones(3, 2, 2)).result(60).item() == 12.0
    made, waited = cuda.notes.index(("record", "moment", "caller")), cuda.notes.index(("wait", "engine", "moment"))
    assert made < waited < cuda.notes.index(("record", "slot 0", "copies"))


def test_what_the_allocator_reserved_is_part_of_the_bound(cuda: NotedCuda) -> None:
    engine = sum_engine(batch_sizes=(1, 4))
    assert engine.memory_bound_bytes == engine.report.weight_bytes + (2 << 20)
    buffers = 3 * 2 * 2 * 4 + 4  # the input and the result of an image
    assert engine.report.buffer_bytes == (1 + 4 + 4) * buffers


def test_a_buffer_is_written_only_after_its_last_copy(cuda: NotedCuda) -> None:
    uploads = Uploads(torch.device("cpu"), cuda.Stream(torch.device("cpu")), cuda)
    for _ in range(3):
        uploads.upload(torch.ones(2), torch.float32)

    def one(event: str) -> list[tuple[str, ...]]:
        return [
            ("host waits for", event),
            ("enter", "copies"),
            ("record", event, "copies"),
            ("leave", "copies"),
            ("wait", "engine", event),
            ("used on", "engine"),
        ]

    assert cuda.notes == one("slot 0") + one("slot 1") + one("slot 0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_layout_arrive(cuda: NotedCuda, dtype: torch.dtype) -> None:
    """Also when a buffer is used again for less, for more, and for another layout or dtype."""
    uploads = Uploads(torch.device("cpu"), cuda.Stream(torch.device("cpu")), cuda)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(count, 3, 5, 4, generator=generator) for count in (2, 1, 4, 3)]
    given += [given[0].to(memory_format=torch.channels_last), given[2][::2, :, 1:], given[0].double(), given[0][:0]]
    results = [uploads.upload(tensor, dtype) for tensor in given]
    for tensor, result in zip(given, results, strict=True):
        assert torch.equal(result, tensor.to(dtype)), "a later upload must not change an earlier one"
    assert results[4].is_contiguous(memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (1, 7, 9, 3), dtype=torch.uint8, generator=generator)
    assert torch.equal(uploads.upload(pixels, torch.uint8), pixels)

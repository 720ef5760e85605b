"""`InferenceEngine.submit`: single images of many threads, and what goes wrong with one of them."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import numpy
import PIL.Image
import pytest
import skimage.data
import torch
from engine_models import SIZE, Sum, images, small_network, sum_engine
from torch import Tensor, nn

from effkernels._recorded_tensor import RecordedTensor
from effkernels.engine import InferenceEngine, QueueFull
from effkernels.engine.preprocess import transform

PATIENCE_S = 60  # against hangs alone
LONG_MS = 600_000.0


def full_of(value: float) -> Tensor:
    """Return an image whose answer of `Sum` is 12 times the value."""
    return torch.full((3, 2, 2), float(value))


class Gate(nn.Module):
    """Stops in its forward until `go`; then gives the sums, or raises for a sum that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.register_module("inner", Sum())

    started, go = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        type(self).started.set()
        assert type(self).go.wait(PATIENCE_S)
        result: Tensor = self.inner(x)  # type: ignore[operator]
        if not bool(result.isfinite().all()):
            raise ArithmeticError("not finite")
        return result


@pytest.fixture
def gate() -> type[Gate]:
    """Open: closed by a test that wants it so."""
    Gate.started.clear()
    Gate.go.set()
    return Gate


def test_hundreds_of_requests_from_many_threads() -> None:
    with sum_engine(batch_sizes=(1, 4, 16), max_queue=1000) as engine, ThreadPoolExecutor(12) as pool:
        futures = list(pool.map(lambda value: engine.submit(full_of(value)), range(600)))
        assert [future.result(PATIENCE_S).tolist() for future in futures] == [[12.0 * value] for value in range(600)]
        stats = engine.stats()
    assert (stats.requests, stats.completed, stats.failed, stats.pending, stats.images) == (600, 600, 0, 0, 600)
    assert stats.mean_fill is not None
    assert 0 < stats.mean_fill <= 1
    assert stats.latency_p50_ms is not None
    assert stats.latency_p99_ms is not None
    assert 0 < stats.latency_p50_ms <= stats.latency_p99_ms


def test_a_network_gives_the_bits_of_one_image_alone(compiled: None) -> None:
    model = small_network(classes=0)
    x = images(24)
    with torch.inference_mode():
        wanted = torch.cat([model(image[None]) for image in x])
    with InferenceEngine(model, batch_sizes=(1, 4), input_size=SIZE) as engine, ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(engine.submit, x))
        assert torch.equal(torch.stack([future.result(PATIENCE_S) for future in futures]), wanted)


class Both(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"image": x, "mean": (x.mean((1, 2, 3)), None)}


def test_photographs_of_every_kind_beside_tensors() -> None:
    photographs: list[Any] = []
    for turn, size in enumerate([(64, 64), (90, 70), (64, 64), (70, 90), (200, 64)]):
        image = PIL.Image.fromarray(skimage.data.astronaut()).rotate(20 * turn).resize(size)
        photographs += [image, numpy.array(image), torch.from_numpy(numpy.array(image))]
    with InferenceEngine(Both(), batch_sizes=(4, 16), input_size=32, optimize=False, max_latency_ms=50) as engine:
        wanted = [engine.preprocess([image])[0] for image in photographs]
        order = [*photographs, *wanted, *(image.double() for image in wanted)]
        results = [future.result(PATIENCE_S) for future in [engine.submit(image) for image in order]]
        for index, result in enumerate(results):
            image = wanted[index % len(wanted)]
            assert torch.equal(result["image"], image)
            assert result["mean"][0].shape == ()
            assert result["mean"][1] is None
            assert not result["image"].is_inference()
        addresses = {result["image"].untyped_storage().data_ptr() for result in results}
        assert len(addresses) == len(results), "every result has memory of its own"


def damaged_image() -> PIL.Image.Image:
    """Return an image that Pillow opens, and finds damaged when it decodes it."""
    file = io.BytesIO()
    PIL.Image.fromarray(skimage.data.astronaut()).save(file, "JPEG")
    return PIL.Image.open(io.BytesIO(file.getvalue()[:5000]))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (full_of(1)[:2], ValueError, r"images have shape \(2, 2, 2\); allowed: a floating tensor \(3, 2, 2\)"),
        (full_of(1)[None], ValueError, r"shape \(1, 3, 2, 2\)"),
        (full_of(1).to("meta"), ValueError, "images are on meta"),
        (full_of(1).to_sparse(), TypeError, r"images of layout torch\.sparse_coo; allowed: torch\.strided"),
        (full_of(1).to_mkldnn(), TypeError, r"images of layout torch\._mkldnn"),
        (torch.nested.as_nested_tensor([full_of(1)[0], full_of(1)[1]]), TypeError, "images of layout nested"),
        (full_of(1).to(torch.complex64), TypeError, r"dtype torch\.complex64"),
        (RecordedTensor(full_of(1), nn.Identity()), TypeError, "images of class RecordedTensor; allowed: torch.Tensor"),
        (
            torch.zeros(1, 1, 3, dtype=torch.uint8).expand(1 << 19, 1 << 19, 3),
            ValueError,
            "an image has 524288 x 524288 pixels; allowed: at most 178956970",
        ),
        (torch.zeros(4, 4, 3, dtype=torch.uint8).to_sparse(), TypeError, r"an image of layout torch\.sparse_coo"),
        (numpy.zeros((5, 5), numpy.uint8), ValueError, r"an image has shape \(5, 5\); allowed: \(H, W, C\)"),
        (numpy.zeros((5, 5, 3)), TypeError, r"dtype torch\.float64; allowed: torch\.uint8"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), TypeError, r"dtype torch\.int64"),
        ("photo.png", TypeError, "an image is str"),
        (None, TypeError, "an image is NoneType"),
        (damaged_image(), OSError, "truncated"),
    ],
    ids=lambda value: None if isinstance(value, (Tensor, numpy.ndarray, PIL.Image.Image)) else str(value)[:20],
)
def test_a_bad_image_fails_without_the_others(bad: Any, error: type[Exception], message: str) -> None:
    with sum_engine(max_latency_ms=LONG_MS) as engine:
        futures = [engine.submit(full_of(value)) for value in range(3)]
        failing = engine.submit(bad)
        futures += [engine.submit(full_of(value)) for value in range(3, 6)]
        engine.close()
        assert [future.result(0).item() for future in futures] == [12.0 * value for value in range(6)]
        with pytest.raises(error, match=message):
            failing.result(0)
        stats = engine.stats()
        assert (stats.requests, stats.completed, stats.failed) == (7, 6, 1)


def test_an_image_that_cannot_be_prepared_fails_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch of images of one size, which are prepared together."""

    def faulty(pixels: Tensor, *arguments: Any) -> Tensor:
        if bool((pixels == 13).any()):
            raise MemoryError("no room for the unlucky")
        return transform(pixels, *arguments)

    monkeypatch.setattr("effkernels.engine.inference.transform", faulty)
    with sum_engine(max_latency_ms=LONG_MS) as engine:
        pixels = [numpy.full((5, 5, 3), value, numpy.uint8) for value in (1, 13, 200, 13)]
        futures = [engine.submit(image) for image in pixels]
        wanted = engine(engine.preprocess([pixels[0], pixels[2]]))
        assert torch.equal(futures[0].result(PATIENCE_S), wanted[0])
        assert torch.equal(futures[2].result(PATIENCE_S), wanted[1])
        errors = [futures[row].exception(0) for row in (1, 3)]
        assert [type(error) for error in errors] == [MemoryError] * 2
        assert errors[0] is not errors[1]


def test_a_model_that_raises_fails_one_batch(gate: type[Gate]) -> None:
    with sum_engine(gate(), batch_sizes=(2,), max_latency_ms=LONG_MS) as engine:
        values = [1, 2, 3, float("inf"), 4, 5]
        futures = [engine.submit(full_of(value)) for value in values]
        failed = [future.exception(PATIENCE_S) for future in futures]
    assert [type(error) for error in failed] == [
        type(None), type(None), ArithmeticError, ArithmeticError, type(None), type(None),
    ]  # fmt: skip
    assert failed[2] is not failed[3], "two threads may raise them at once"
    assert futures[5].result(0).item() == 60.0


def test_a_full_queue_says_so(gate: type[Gate]) -> None:
    with sum_engine(gate(), batch_sizes=(1,), max_queue=3) as engine:
        gate.started.clear()
        gate.go.clear()
        futures = [engine.submit(full_of(0))]
        assert gate.started.wait(PATIENCE_S)
        futures += [engine.submit(full_of(value)) for value in range(1, 4)]
        with pytest.raises(QueueFull, match="max_queue=3"):
            engine.submit(full_of(9))
        assert engine.stats().pending == 4
        gate.go.set()
        assert [future.result(PATIENCE_S).item() for future in futures] == [0.0, 12.0, 24.0, 36.0]
        assert engine.stats().rejected == 1


def test_cancelled_images_are_not_computed(gate: type[Gate]) -> None:
    with sum_engine(gate(), batch_sizes=(1,)) as engine:
        gate.started.clear()
        gate.go.clear()
        first = engine.submit(full_of(0))
        assert gate.started.wait(PATIENCE_S)
        waiting = [engine.submit(full_of(value)) for value in range(1, 4)]
        assert waiting[1].cancel()
        before = engine.stats().images
        engine.close(wait=False)
        gate.go.set()
        assert [future.result(PATIENCE_S).item() for future in (first, waiting[0], waiting[2])] == [0.0, 12.0, 36.0]
        engine.close()
        assert engine.stats().images - before == 3
        assert engine.stats().cancelled == 1


def test_close_cancels_if_asked(gate: type[Gate]) -> None:
    engine = sum_engine(gate(), max_latency_ms=LONG_MS)
    futures = [engine.submit(full_of(value)) for value in range(3)]
    engine.close(cancel_futures=True)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)
    with pytest.raises(RuntimeError, match="submit: the engine is closed"):
        engine.submit(full_of(1))


def test_calls_beside_submissions() -> None:
    with sum_engine(max_queue=1000) as engine, ThreadPoolExecutor(6) as pool:

        def both(value: int) -> bool:
            future: Future[Any] = engine.submit(full_of(value))
            called = engine(full_of(-value).expand(3, 3, 2, 2))
            return bool(future.result(PATIENCE_S) == 12 * value) and bool((called == -12 * value).all())

        assert all(pool.map(both, range(200)))


def test_with_asyncio() -> None:
    async def ask(engine: InferenceEngine, value: int) -> float:
        result: Tensor = await asyncio.wrap_future(engine.submit(full_of(value)))
        return result.item()

    async def ask_many(engine: InferenceEngine) -> list[float]:
        return await asyncio.wait_for(asyncio.gather(*(ask(engine, value) for value in range(30))), PATIENCE_S)

    with sum_engine() as engine:
        assert asyncio.run(ask_many(engine)) == [12.0 * value for value in range(30)]


def test_an_open_engine_does_not_keep_the_interpreter() -> None:
    """Requests that wait when the script ends are cancelled."""
    script = """
        import torch
        from effkernels import InferenceEngine
        engine = InferenceEngine(torch.nn.Flatten(), batch_sizes=(4,), input_size=2, optimize=False, max_latency_ms=1e6)
        future = engine.submit(torch.ones(3, 2, 2))
        future.add_done_callback(lambda future: print("cancelled:", future.cancelled()))
        print("end of the script")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "end of the script\ncancelled: True\n", "")

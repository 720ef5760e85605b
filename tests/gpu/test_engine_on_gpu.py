"""`InferenceEngine` with real CUDA graphs, streams and uploads. These tests need a GPU; none has run this file yet."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_models import SIZE, Sum, images, small_network
from torch import Tensor, nn

from effkernels import InferenceEngine
from effkernels.engine.preprocess import transform
from effkernels.models.preprocessing import Preprocessing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_network().to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def engine(model: nn.Module) -> InferenceEngine:
    return InferenceEngine(model, batch_sizes=SIZES, input_size=SIZE)


def by_hand(model: nn.Module, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the model's own result for buckets of these sizes, the last one padded with zeros."""
    x = x.to("cuda", torch.bfloat16)
    padded = torch.cat([x, x.new_zeros(sum(sizes) - len(x), *x.shape[1:])])
    parts = [part.contiguous(memory_format=torch.channels_last) for part in padded.split(list(sizes))]
    with torch.inference_mode():
        return torch.cat([model(part) for part in parts])[: len(x)]


def sum_engine(model: nn.Module | None = None, **arguments: Any) -> InferenceEngine:
    options: dict[str, Any] = {"batch_sizes": (1, 4), "input_size": 2, "device": "cuda", "optimize": False, **arguments}
    return InferenceEngine(Sum() if model is None else model, **options)


def test_every_bucket_is_a_graph(engine: InferenceEngine) -> None:
    assert {(bucket.runner, bucket.reason) for bucket in engine.report.buckets} == {("cuda graph", "")}


@pytest.mark.parametrize(("count", "sizes"), [(1, (1,)), (2, (2,)), (3, (4,)), (4, (4,)), (7, (4, 4)), (9, (4, 4, 1))])
def test_replays_give_the_bits_of_the_model(
    engine: InferenceEngine, model: nn.Module, count: int, sizes: tuple[int, ...]
) -> None:
    x = images(count, seed=count)
    wanted = by_hand(model, x, sizes)
    for given in (x, x.bfloat16(), x.cuda(), x.cuda().bfloat16().contiguous(memory_format=torch.channels_last)):
        assert torch.equal(engine(given), wanted)


def test_graphs_in_any_order_share_their_memory(engine: InferenceEngine) -> None:
    inputs = {size: images(size, seed=size).cuda() for size in SIZES}
    wanted = {size: engine(x) for size, x in inputs.items()}
    order = random.Random(0)
    for _ in range(50):
        size = order.choice(SIZES)
        assert torch.equal(engine(inputs[size]), wanted[size])


def test_results_outlive_later_calls() -> None:
    engine = sum_engine()
    results = [engine(torch.full((3, 3, 2, 2), float(value), device="cuda")) for value in range(20)]
    assert [result.tolist() for result in results] == [[[12.0 * value]] * 3 for value in range(20)]


def test_new_weights_reach_the_graphs() -> None:
    model = small_network().to("cuda", torch.bfloat16)
    engine = InferenceEngine(model, batch_sizes=(2,), input_size=SIZE)
    x = images(2)
    before = engine(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    engine.refresh()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.equal(engine(x), by_hand(model, x, (2,)))
    assert not torch.equal(engine(x), before)


def test_a_call_waits_for_the_stream_of_its_caller() -> None:
    engine = sum_engine()
    x = torch.full((4, 3, 2, 2), float("nan"), device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # some ten milliseconds
        x.fill_(2.0)
        result = engine(x) + 1  # on this stream, after the engine's work
        x.fill_(float("nan"))
    side.synchronize()
    assert result.tolist() == [[25.0]] * 4


def test_host_images_may_change_at_once() -> None:
    """The copy that goes to the GPU is made before the call returns, and buffers are not written too early."""
    engine = sum_engine()
    x = torch.empty(4, 3, 2, 2)
    results = []
    torch.cuda._sleep(20_000_000)
    for value in range(20):
        x.fill_(value)
        results.append(engine(x))
    assert [result[0].item() for result in results] == [12.0 * value for value in range(20)]


def test_threads_with_streams_of_their_own(engine: InferenceEngine) -> None:
    inputs = [images(count, seed=count) for count in (1, 3, 4, 6)]
    wanted = [engine(x) for x in inputs]
    torch.cuda.synchronize()

    def call(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            given = inputs[index].cuda() if index % 2 else inputs[index]
            return torch.equal(engine(given), wanted[index])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, list(range(4)) * 10))


def test_submissions_of_many_threads() -> None:
    def ask(value: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            image = torch.full((3, 2, 2), float(value), device="cuda" if value % 2 else "cpu")
            result = engine.submit(image).result(60)
        return result.device.type == "cpu" and result.item() == 12.0 * value

    with sum_engine(batch_sizes=(1, 4, 16)) as engine, ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(400)))


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1, 2, 3)) * (2 if x.sum().item() > 0 else 1)


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    engine = sum_engine(LooksAtValues())
    for bucket in engine.report.buckets:
        assert bucket.runner == "eager"
        assert bucket.reason.startswith("recording failed")
    assert engine(torch.ones(3, 3, 2, 2)).tolist() == [24.0] * 3
    assert sum_engine()(torch.ones(3, 3, 2, 2)).tolist() == [[12.0]] * 3, "a later engine records again"


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_photographs_are_as_on_the_cpu(interpolation: str) -> None:
    how = Preprocessing(224, interpolation=interpolation)
    pixels = torch.randint(0, 256, (2, 300, 451, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    apart = transform(pixels.cuda(), how).cpu() - transform(pixels, how, integers=False)
    assert (apart * torch.tensor(how.std)[:, None, None]).abs().max() * 255 < 1.001


def test_photographs_of_several_sizes_on_the_gpu() -> None:
    engine = sum_engine(input_size=32)
    generator = torch.Generator().manual_seed(0)
    photographs = [
        torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        for height, width in ((40, 50), (64, 33), (40, 50))
    ]
    together = engine.preprocess(photographs)
    assert together.is_cuda
    for row, image in zip(together, photographs, strict=True):
        assert torch.equal(row, engine.preprocess([image.cuda()])[0])


# cuBLAS and cuBLASLt keep a workspace of up to 32 MiB each for every stream that they have run on. PyTorch's allocator
# counts it, and it is no engine's. What the tests below look for is several times as large.
WORKSPACES = 2 * (32 << 20)


def test_memory_stays_within_the_bound(model: nn.Module) -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = InferenceEngine(model, batch_sizes=(1, 64), input_size=224)
    torch.cuda.reset_peak_memory_stats()
    for count in (1, 64, 5, 100):
        engine(images(count, size=224))
    torch.cuda.synchronize()
    handed = 3 * 100 * 3 * 224 * 224 * 4  # images on their way to the GPU, which the bound does not hold
    assert engine.memory_bound_bytes > 2 * WORKSPACES
    assert torch.cuda.max_memory_allocated() - before <= engine.memory_bound_bytes + handed + WORKSPACES


def test_close_gives_the_memory_back(model: nn.Module) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine = InferenceEngine(model, batch_sizes=(1, 64), input_size=224)
    engine(images(3, size=224))
    assert engine.memory_bound_bytes > 2 * WORKSPACES
    engine.close()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= WORKSPACES

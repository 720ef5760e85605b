"""Small models, and a stand-in for `torch.cuda` that records calls as a GPU does, for the tests of the engine."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import effkernels
from effkernels.bench.check import sample_model
from effkernels.engine import InferenceEngine

SIZE = 64


def small_network(classes: int = 1000) -> nn.Module:
    """EfficientNet-B0 with weights that give realistic activations; without classes the pooled features."""
    model = copy.deepcopy(sample_model("efficientnet_b0"))
    if classes != 1000:
        with torch.random.fork_rng(devices=[]):
            model.reset_classifier(classes)
    return model.eval()


def first_stages() -> nn.Module:
    """Return the start of EfficientNet-B0 as a backbone that returns two feature maps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return effkernels.create_model("efficientnet_b0", features_only=True, out_indices=(0, 1)).eval()


def images(count: int, seed: int = 0, channels: int = 3, size: int = SIZE) -> Tensor:
    """Noise, (count, channels, size, size), NCHW."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Sum(nn.Module):
    """An output that identifies its image: weight times the sum of its values, exact for whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        return x.flatten(1).sum(1, keepdim=True) * self.weight


class Returning(nn.Module):
    """A model that is a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def sum_engine(model: nn.Module | None = None, **arguments: Any) -> InferenceEngine:
    """Return an engine of a tiny model for images of 2 x 2 pixels."""
    options: dict[str, Any] = {"batch_sizes": (1, 4), "input_size": 2, "optimize": False, **arguments}
    return InferenceEngine(Sum() if model is None else model, **options)


class RecordedGraph(TorchDispatchMode):
    """Does what a CUDA graph does: the operators of one call, run again on the very same memory, without its Python."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            raise RuntimeError("operation not permitted\nwhen the stream is capturing")
        result = func(*args, **(kwargs or {}))
        # Like a pointer: a tensor that gets other memory later does not change the recording.
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        self._calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for held, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(held, Tensor):
                    held.copy_(new)


class NotedStream:
    """A stream that only writes down what is asked of it."""

    def __init__(self, notes: list[tuple[str, ...]], name: str) -> None:
        self.notes, self.name = notes, name

    def wait_event(self, event: NotedEvent) -> None:
        self.notes.append(("wait", self.name, event.name))

    def wait_stream(self, stream: NotedStream) -> None:
        self.notes.append(("wait", self.name, stream.name))

    def record_event(self) -> NotedEvent:
        event = NotedEvent(self.notes, "moment")
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.notes.append(("host waits for", self.name))


class NotedEvent:
    def __init__(self, notes: list[tuple[str, ...]], name: str) -> None:
        self.notes, self.name = notes, name

    def record(self, stream: NotedStream) -> None:
        self.notes.append(("record", self.name, stream.name))

    def synchronize(self) -> None:
        self.notes.append(("host waits for", self.name))


class NotedCuda:
    """Replaces `torch.cuda` on the CPU: graphs are recorded, streams and events only noted.

    The first stream made is the engine's, the second that of its copies.
    """

    CUDAGraph = RecordedGraph

    def __init__(self) -> None:
        self.notes: list[tuple[str, ...]] = []
        self.reserved = 0
        self.recording_into: list[str] = []  # pools of recordings that are under way as the allocator believes
        self.memory = types.SimpleNamespace(_cuda_endAllocateToPool=self._end_allocations)
        self._caller = NotedStream(self.notes, "caller")
        self._streams, self._events = iter(("engine", "copies")), iter(("slot 0", "slot 1"))

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: torch.device) -> NotedStream:
        return self._caller

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def graph_pool_handle(self) -> str:
        return "pool"

    def Stream(self, device: torch.device) -> NotedStream:
        return NotedStream(self.notes, next(self._streams))

    def Event(self) -> NotedEvent:
        return NotedEvent(self.notes, next(self._events))

    @contextlib.contextmanager
    def stream(self, stream: NotedStream) -> Iterator[None]:
        self.notes.append(("enter", stream.name))
        yield
        self.notes.append(("leave", stream.name))

    @contextlib.contextmanager
    def graph(self, graph: RecordedGraph, **how: Any) -> Iterator[None]:
        assert (how["pool"], how["stream"].name, how["capture_error_mode"]) == ("pool", "engine", "thread_local")
        self.notes.append(("record graph",))
        self.reserved += 1 << 20
        self.recording_into.append(how["pool"])
        with graph:
            yield
        # As in PyTorch: not reached where the recording fails.
        self.recording_into.remove(how["pool"])

    def _end_allocations(self, device: int, pool: str) -> None:
        if pool not in self.recording_into:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording_into.remove(pool)

"""Forwards whose shapes, branches or edits depend on the values of an image: an engine gives what the model gives."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from effkernels import _library, ops
from effkernels.engine import InferenceEngine

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")
BRIGHT = 10.0
BATCH, SIZE = 2, 4


def brightest(x: Tensor) -> Tensor:
    return x.amax((1, 2, 3))


def marked(y: Tensor, mark: Any) -> Tensor:
    """Return the features, or zeros where the mark is set."""
    return y * 0 if mark else y


def assigned_where_nonzero(x: Tensor, y: Tensor) -> Tensor:
    y[(brightest(x) > BRIGHT).nonzero().squeeze(1)] = 0
    return y


def assigned_by_mask(x: Tensor, y: Tensor) -> Tensor:
    y[brightest(x) > BRIGHT] = 0
    return y


def filled_where(x: Tensor, y: Tensor) -> Tensor:
    (rows,) = torch.where(brightest(x) > BRIGHT)
    return y.index_fill(0, rows, 0.0)


def nonzero_into(x: Tensor, y: Tensor) -> Tensor:
    rows = torch.empty(0, dtype=torch.int64)
    torch.nonzero(brightest(x) > BRIGHT, out=rows)
    return y + rows.numel()


def edited_by_numpy(x: Tensor, y: Tensor) -> Tensor:
    y = y.contiguous()
    y.numpy()[...] += (x.numpy().max((1, 2, 3)) > BRIGHT)[:, None]
    return y


def read_through_a_pointer(x: Tensor, y: Tensor) -> Tensor:
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    return marked(y, max((ctypes.c_float * x.numel()).from_address(x.data_ptr())) > BRIGHT)


def asked_in_another_thread(x: Tensor, y: Tensor) -> Tensor:
    answers = []

    def ask() -> None:
        with torch.inference_mode(), contextlib.suppress(RuntimeError):  # it is refused while the forward is recorded
            answers.append(bool((x > BRIGHT).any()))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return marked(y, answers[0])


@torch.jit.script
def scripted_branch(x: Tensor, y: Tensor) -> Tensor:
    if bool((x > 10.0).any()):
        return y * 0
    return y


# Each takes the images and features of them, and does something else to a bright image than to a dark one.
FORWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # The shape of what an operator returns depends on values.
    "nonzero": assigned_where_nonzero,
    "nonzero with out": nonzero_into,
    "mask": assigned_by_mask,
    "where with one argument": filled_where,
    "argwhere": lambda x, y: y + torch.argwhere(brightest(x) > BRIGHT).shape[0],
    "masked_select": lambda x, y: y + torch.masked_select(x, x > BRIGHT).sum(),
    "index by a mask": lambda x, y: y + x[x > BRIGHT].sum(),
    "unique": lambda x, y: y + torch.unique((x > BRIGHT).long()).numel(),
    "unique_consecutive": lambda x, y: y + torch.unique_consecutive((brightest(x) > BRIGHT).long()).numel(),
    "bincount": lambda x, y: y + torch.bincount((brightest(x) > BRIGHT).long()).numel(),
    "repeat_interleave": lambda x, y: (
        y + torch.repeat_interleave(torch.ones(BATCH), (brightest(x) > BRIGHT).long()).sum()
    ),
    "one_hot": lambda x, y: y + nn.functional.one_hot((brightest(x) > BRIGHT).long()).shape[-1],
    "sparse": lambda x, y: y + (x * (x > BRIGHT)).to_sparse().values().numel(),
    # Python reads values.
    "item": lambda x, y: marked(y, x.amax().item() > BRIGHT),
    "bool": lambda x, y: marked(y, (x > BRIGHT).any()),
    "float": lambda x, y: marked(y, float(x.amax()) > BRIGHT),
    "index": lambda x, y: y + torch.ones(4)[(x.amax() > BRIGHT).long() :].sum(),
    "tolist": lambda x, y: marked(y, max(brightest(x).tolist()) > BRIGHT),
    "numpy": lambda x, y: marked(y, x.numpy().max() > BRIGHT),
    "numpy of a view": lambda x, y: marked(y, x[:, 1:].detach().numpy(force=True).max() > BRIGHT),
    "asarray": lambda x, y: marked(y, numpy.asarray(x).max() > BRIGHT),
    "dlpack": lambda x, y: marked(y, numpy.from_dlpack(x).max() > BRIGHT),
    "iteration": lambda x, y: marked(y, any(value > BRIGHT for value in brightest(x))),
    "in": lambda x, y: marked(y, True in (x > BRIGHT)),
    "equal": lambda x, y: marked(y, not torch.equal(x.clamp(max=BRIGHT), x)),
    "allclose": lambda x, y: marked(y, not torch.allclose(x.clamp(max=BRIGHT), x)),
    "format": lambda x, y: marked(y, float(f"{x.amax():.3f}") > BRIGHT),
    "repr": lambda x, y: marked(y, "True" in repr(x > BRIGHT)),
    "deepcopy": lambda x, y: y * copy.deepcopy(brightest(x))[:, None],
    "data_ptr": read_through_a_pointer,
    "another thread": asked_in_another_thread,
    "script": lambda x, y: scripted_branch(x, y),  # a ScriptFunction itself cannot be copied with its model
    # numpy writes values.
    "numpy in place": edited_by_numpy,
}


class Network(nn.Module):
    """A fused convolution, and what is done to its pooled features."""

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 1, 1))
        self.features = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x, ops.pointwise_bn_act(x, self.weight).mean((2, 3)))


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_gives_what_the_model_gives(name: str) -> None:
    model = Network(FORWARDS[name])
    served = InferenceEngine(model, batch_sizes=(BATCH,), input_size=SIZE, optimize=False)
    generator = torch.Generator().manual_seed(1)
    for factors in ((1.0, 1.0), (1e3, 1.0), (1.0, 1e3), (1e3, 1e3), (1.0, 1.0)):
        x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator) * torch.tensor(factors)[:, None, None, None]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted = model(x.clone(memory_format=torch.preserve_format))
        assert torch.equal(served(x), wanted)


@pytest.mark.parametrize("name", ["nonzero", "tolist", "numpy in place"])
def test_the_report_says_why_it_is_not_recorded(name: str) -> None:
    served = InferenceEngine(Network(FORWARDS[name]), batch_sizes=(BATCH,), input_size=SIZE, optimize=False)
    (bucket,) = served.report.buckets
    assert bucket.runner == "eager"
    assert bucket.reason.startswith("recording failed: NotRecordableError: ")
    assert any(word in bucket.reason for word in ("nonzero", "tolist", "numpy"))


@pytest.mark.parametrize(
    "features",
    [
        lambda x, y: y[:, torch.tensor([3, 1, 0])],
        lambda x, y: torch.where(brightest(x)[:, None] > BRIGHT, y * 0, y),
        lambda x, y: y.index_fill(0, torch.tensor([1]), 0.5) + torch.arange(4),
        lambda x, y: y.masked_fill(brightest(x)[:, None] > BRIGHT, 0.0).sort(1).values,
        lambda x, y: y.gather(1, x.argmax(1).flatten(1)[:, :2].clamp(max=2)),
        lambda x, y: y.relu_().mul_(2.0) + y.topk(2).values.sum(),
        lambda x, y: torch.cat(y.split([1, 3], 1)[::-1], 1) + x.mean((1, 2, 3))[:, None],
    ],
    ids=["integers", "where", "index_fill", "masked_fill", "gather", "in place", "split"],
)
def test_what_depends_on_values_as_operators_do_is_recorded(features: Any) -> None:
    """Shapes stay the same whatever the values are, and Python sees none."""
    model = Network(features)
    served = InferenceEngine(model, batch_sizes=(BATCH,), input_size=SIZE, optimize=False)
    assert [bucket.runner for bucket in served.report.buckets] == ["recorded"]
    for factor in (1.0, 1e3):
        x = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) * factor
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted = model(x.clone(memory_format=torch.preserve_format))
        assert torch.equal(served(x), wanted)


class Counting(nn.Module):
    """State of its own: each call adds one to what it gives, or to a buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 1, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.how, self.count = how, 0

    def forward(self, x: Tensor) -> Tensor:
        y = ops.pointwise_bn_act(x, self.weight)
        if self.how == "buffer":
            self.calls.add_(1.0)  # type: ignore[operator]
            return y.mean((2, 3)) + self.calls  # type: ignore[operator]
        if self.how == "random":
            return y.mean((2, 3)) + torch.rand(())
        self.count += 1
        return y.mean((2, 3)) + self.count


@pytest.mark.parametrize("how", ["buffer", "python", "random"])
def test_state_is_not_recorded(how: str) -> None:
    served = InferenceEngine(Counting(how), batch_sizes=(BATCH,), input_size=SIZE, optimize=False)
    assert [bucket.runner for bucket in served.report.buckets] == ["eager"]
    x = torch.zeros(BATCH, 3, SIZE, SIZE)
    first, second = served(x), served(x)
    if how == "random":
        assert not torch.equal(first, second)
    else:
        assert torch.equal(second, first + 1)


def test_shapes_are_compared_at_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an operator without the tag returns another shape, the model runs instead, now and from then on."""
    library = torch.library.Library("effkernels_tests", "FRAGMENT")
    library.define("above(Tensor x, float limit) -> Tensor")  # like masked_select, and nothing says so
    library.impl("above", lambda x, limit: x[x > limit], "CPU")
    model = Network(lambda x, y: y + torch.ops.effkernels_tests.above(x, 5e4).sum())
    served = InferenceEngine(model, batch_sizes=(1, BATCH), input_size=SIZE, optimize=False)
    dark = torch.ones(BATCH, 3, SIZE, SIZE)
    bright = dark.clone()
    bright[1, 2, 3, 3] = 6e4
    assert [bucket.runner for bucket in served.report.buckets] == ["recorded"] * 2
    for x in (dark, bright, dark, bright[1:], bright):
        with torch.inference_mode():
            assert torch.equal(served(x), model(x.contiguous(memory_format=torch.channels_last)))
    reasons = {bucket.reason for bucket in served.report.buckets if bucket.runner == "eager"}
    assert len(reasons) == 1
    assert "replay failed: effkernels_tests.above.default returns shapes that depend on values" in reasons.pop()


def test_an_operator_that_refuses_values_ends_only_that_call() -> None:
    model = Network(lambda x, y: y[:, (brightest(x) > 1e6).long() * 100])  # there are four columns
    served = InferenceEngine(model, batch_sizes=(BATCH,), input_size=SIZE, optimize=False)
    x = torch.ones(BATCH, 3, SIZE, SIZE)
    wanted = served(x)
    with pytest.raises(IndexError, match="index 100 is out of bounds"):
        served(x * 1e7)
    assert torch.equal(served(x), wanted)
    assert [bucket.runner for bucket in served.report.buckets] == ["recorded"]


def test_a_tensor_that_the_model_keeps_is_usable_afterwards() -> None:
    class Keeping(Network):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    served = InferenceEngine(Keeping(lambda x, y: y), batch_sizes=(BATCH,), input_size=SIZE, optimize=False)
    model = served._prepared._model
    assert isinstance(model, Keeping)
    assert (model.last + 0).sum().item() == (model.last.sum() + 0).item()

"""Names and values of a model that would do harm as source; models that several threads make and optimise at once."""

from __future__ import annotations

import copy
import enum
import pickle
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effkernels
from effkernels.models.peers import import_torchvision

TRACE = "effkernels_hostile_trace"
CALL = f"__import__('sys').modules.__setitem__('{TRACE}', 1)"
NAMES = [
    f"zz,{CALL}",
    f"x);{CALL};(",
    "a b",
    "x\ny",
    "'\"",
    "\\",
    "ü",
    "class",
    "self",
    "run",
    "parts",
    "ops",
]


class Block(nn.Module):
    """Convolution, norm and activation under any name."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.add_module(name if kind == "module" else "body", body)
        self.inner = name if kind == "module" else "body"
        if kind == "parameter":
            body[0].register_parameter(name, nn.Parameter(torch.ones(1)))
        if kind == "buffer":
            body[1].register_buffer(name, torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.inner)(x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 8)


@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_data(name: str, kind: str, x: Tensor) -> None:
    if "." in name and kind == "module":
        name = name.replace(".", "·")  # PyTorch takes no dot in a name
    try:
        model = Block(name, kind).eval()
    except KeyError:
        pytest.skip("PyTorch takes no such name")
    wanted = model(x).detach()
    assert effkernels.optimize_(model).fused == 1
    with torch.no_grad():
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(one(x), wanted)
    assert TRACE not in sys.modules


class Text(str):
    def __repr__(self) -> str:
        return CALL


class Number(float):
    def __repr__(self) -> str:
        return CALL


class Grade(enum.IntEnum):
    TWO = 2


class Arguments(nn.Module):
    """A program of one block and what follows it: a product with a value, a call with options."""

    def __init__(self, value: Any, options: dict[Any, Any]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.value, self.options = value, options

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))) * self.value
        return torch.clamp(y, **self.options) if self.options else y


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        float("-inf"),
        float("nan"),
        -0.0,
        Number(2.0),
        Grade.TWO,
        True,
        1 + 2j,
        complex("nan+infj"),
    ],
    ids=["inf", "-inf", "nan", "-0.0", "float", "enum", "bool", "complex", "complex-nan"],
)
def test_a_value_is_data(value: Any, x: Tensor) -> None:
    model = Arguments(value, {}).eval()
    wanted = model(x).detach()
    assert effkernels.optimize_(model).fused == 1
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, equal_nan=True)
    assert TRACE not in sys.modules


@pytest.mark.parametrize("options", [{Text("min"): 0.1}, {"max": Number(0.5)}, {"min": Grade.TWO}])
def test_keys_and_values_of_a_call_are_data(options: dict[Any, Any], x: Tensor) -> None:
    model = Arguments(1.0, options).eval()
    wanted = model(x).detach()
    assert effkernels.optimize_(model).fused == 1
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    assert TRACE not in sys.modules


def test_engines_and_optimisations_at_once_disturb_no_other_model() -> None:
    """Six threads optimise or make engines while two others call models that have nothing to do with it."""
    torchvision = import_torchvision()
    other, sample = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.randn(1, 2)
    image = torch.randn(2, 3, 64, 64)
    wanted, failures, calls, stop = other(sample).detach(), [], [0, 0], threading.Event()

    def call(which: int) -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    assert torch.equal(other(sample), wanted)
                    calls[which] += 1
                except BaseException as error:
                    failures.append(error)

    def make(kind: int) -> None:
        try:
            model = torchvision.models.mobilenet_v3_small(weights=None).eval()
            with torch.no_grad():
                truth = model(image)
                if kind % 2:
                    report = effkernels.optimize_(model, backend="reference" if kind == 1 else "auto")
                    assert report.fused == len(report.blocks)
                    found = model(image)
                else:
                    found = effkernels.InferenceEngine(model, input_size=64, batch_sizes=(2,))(image)
            torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()))
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=call, args=(which,)) for which in range(2)]
    makers = [threading.Thread(target=make, args=(kind,)) for kind in range(6)]
    for thread in callers + makers:
        thread.start()
    for thread in makers:
        thread.join()
    stop.set()
    for thread in callers:
        thread.join()
    assert failures == []
    assert min(calls) > 0
    assert effkernels.ops.backends.selected() == "auto"

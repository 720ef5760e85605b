"""`InferenceEngine.refresh`: new weights, all of them or none."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from engine_models import SIZE, Sum, images, small_network, sum_engine
from torch import Tensor, nn

from effkernels.engine import InferenceEngine

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def features() -> nn.Module:
    """A network without classifier, whose CPU kernels give the same bits at any batch size."""
    return small_network(classes=0)


def test_another_model_of_the_same_structure() -> None:
    served, other = sum_engine(), Sum()
    other.weight.data.fill_(5.0)
    served.refresh(other)
    assert served(torch.ones(1, 3, 2, 2)).item() == 60.0


def test_weights_are_converted() -> None:
    model = Sum()
    served = sum_engine(model, dtype=torch.bfloat16)
    model.weight.data.fill_(3.0)
    served.refresh()
    assert served(torch.ones(1, 3, 2, 2)).item() == 36.0


@pytest.mark.parametrize("change", ["shape", "module", "option", "buffer"])
def test_another_structure_is_refused_as_a_whole(change: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    served = sum_engine(model)
    x = images(2, size=2)
    before = served(x)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    if change == "shape":
        model[0] = nn.Conv2d(3, 5, 1)
    elif change == "module":
        model[2] = nn.SiLU()
    elif change == "option":
        model[1].eps = 0.5
    else:
        model[2].register_buffer("extra", torch.zeros(3), persistent=False)
    with pytest.raises(ValueError, match=r"refresh: the model has .*; only weights may change. Make a new engine"):
        served.refresh()
    assert torch.equal(served(x), before)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (
            lambda tensor: tensor.to("meta"),
            "is a floating, strided, meta tensor, and the engine's is a floating, str",
        ),
        (lambda tensor: tensor.to_sparse(), "is a floating, sparse_coo tensor"),
        (lambda tensor: tensor.to_mkldnn(), "is a floating, _mkldnn tensor"),
        (lambda tensor: tensor.to(torch.complex64), "is a complex, strided tensor"),
        (lambda tensor: tensor.long(), "is a whole-number, strided tensor"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8), "quantized tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_weights_are_taken_over_as_a_whole_or_not_at_all(features: nn.Module, replace: Any, message: str) -> None:
    """Every bucket gives the bits of the old weights after a refresh that was refused, and of new ones after it."""
    model = copy.deepcopy(features)
    served = InferenceEngine(model, batch_sizes=SIZES, input_size=SIZE)
    inputs = [images(count, seed=count) for count in SIZES]
    before = [served(x) for x in inputs]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    broken = copy.deepcopy(model)
    last = [module for module in broken.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    last.running_var = replace(last.running_var)
    with pytest.raises(ValueError, match=message):
        served.refresh(broken)
    assert all(map(torch.equal, map(served, inputs), before))
    served.refresh(model)
    with torch.inference_mode():
        wanted = [model(x) for x in inputs]
    assert all(map(torch.equal, map(served, inputs), wanted))
    assert not any(map(torch.equal, wanted, before))


def test_buffers_that_are_expanded_are_refreshed_too() -> None:
    class Shifted(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.register_buffer("shift", torch.tensor([[shift]]).expand(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x.sum((2, 3)) + self.shift.sum()  # type: ignore[operator, union-attr]

    model = Shifted(1.0)
    served = sum_engine(model)
    assert served(torch.zeros(1, 3, 2, 2)).tolist() == [[6.0] * 3]
    served.refresh(Shifted(2.0))
    assert served(torch.zeros(1, 3, 2, 2)).tolist() == [[12.0] * 3]
    assert model.shift.stride() == (0, 0), "the model stays as it is"  # type: ignore[operator, union-attr]


def test_the_model_is_not_kept_alive() -> None:
    model = Sum()
    served = sum_engine(model)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match=r"no longer exists; give one: refresh\(model\)"):
        served.refresh()

"""The large linear layer after the blocks: few rows of it go through an operator, and the module is not replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from optimize_network import Block, assert_as_before
from peer_models import images, randomise, timm_model
from torch import Tensor, nn

import effkernels


class Classifying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3, 512)
        self.head = nn.Linear(512, 600)
        self.small = nn.Linear(600, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.small(self.head(self.block(x).mean((2, 3))))
        return y


def _operators(model: nn.Module, x: Tensor) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(x)
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_few_rows_of_a_large_classifier_go_through_the_operator(batch: int) -> None:
    model = randomise(Classifying())
    plain = copy.deepcopy(model)
    report = effkernels.optimize_(model)
    assert report.notes == ("head: batches of up to 4 go through pointwise_bn_act on a CPU",)
    assert report.fused == 1
    assert [type(one) for one in (model.head, model.small)] == [nn.Linear, nn.Linear]
    x = images(batch, 9, 9)
    assert _operators(model, x).count("aten::linear") == (1 if batch <= 4 else 2)
    assert_as_before(model, plain, x)
    assert effkernels.restore_(model) == 1


def test_the_classifier_of_timms_head_is_among_them() -> None:
    model = timm_model("efficientnet_b0")
    report = effkernels.optimize_(model)
    assert report.notes == ("classifier: batches of up to 4 go through pointwise_bn_act on a CPU",)
    assert _operators(model, images(1, 64, 64)).count("aten::linear") == 0


def _hook(head: nn.Module) -> None:
    head.register_forward_hook(lambda module, args, output: output * 2)


def _forward(head: nn.Module) -> None:
    head.forward = lambda x: x[:, :600] * 3 if x.shape[1] >= 600 else x.repeat(1, 2)[:, :600]


def _class(head: nn.Module) -> None:
    head.__class__ = type("Doubling", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})


def _no_bias(head: nn.Module) -> None:
    head.bias = None


def _parametrized(head: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(head)
    with torch.no_grad():
        head.parametrizations.weight.original0.mul_(2)


@pytest.mark.parametrize("change", [_hook, _forward, _class, _no_bias, _parametrized])
def test_a_changed_classifier_is_called(change: object) -> None:
    model = randomise(Classifying())
    plain = copy.deepcopy(model)
    effkernels.optimize_(model)
    x = images(1, 9, 9)
    with torch.no_grad():
        model(x)
        for one in (model, plain):
            change(one.head)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_the_filter_leaves_a_classifier_out() -> None:
    model = randomise(Classifying())
    report = effkernels.optimize_(model, filter_fn=lambda module, name: name != "head")
    assert report.notes == ()
    assert _operators(model, images(1, 9, 9)).count("aten::linear") == 2


def test_dynamic_quantisation_finds_it() -> None:
    model = randomise(Classifying())
    effkernels.optimize_(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert isinstance(quantised.head, torch.ao.nn.quantized.dynamic.Linear)
    with torch.no_grad():
        torch.testing.assert_close(quantised(images(1, 9, 9)), model(images(1, 9, 9)), rtol=0.1, atol=0.1)


def test_gradients_reach_its_weights() -> None:
    model = randomise(Classifying())
    plain = copy.deepcopy(model)
    effkernels.optimize_(model)
    x = images(2, 9, 9)
    found, wanted = (torch.autograd.grad(one(x).square().sum(), one.head.weight)[0] for one in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_compiled_classifier_has_one_graph_for_all_batches() -> None:
    model = randomise(Classifying())
    effkernels.optimize_(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for batch in (2, 3, 7):
            x = images(batch, 9, 9)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)

"""What `optimize_` does beside the blocks: the watch over their modules, and the classifier behind them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from optimize_network import Block, Network, assert_as_before
from peer_models import images, randomise
from torch import Tensor, nn

import effkernels
from effkernels.optimize.watching import Watch


@pytest.fixture
def network() -> nn.Module:
    return randomise(Network())


# ------------------------------------------------------------------------------------------- the watch and its limits


def _watch_of(module: nn.Module) -> Watch:
    return module.__dict__["_effkernels_watch_forward"]


def test_a_second_call_looks_at_nothing_that_did_not_change(network: nn.Module) -> None:
    effkernels.optimize_(network)
    block, x = network.blocks[0], images(1, 5, 5, channels=8)
    with torch.no_grad():
        block(x)
        watch = _watch_of(block)
        block(x)
        assert _watch_of(block) is watch
        (program,) = block._effkernels_programs.values()
        found, seen = program.look(block), watch.parts(block)
        assert len(found) == len(seen) == len(program.parts)
        assert all(one is other for one, other in zip(found, seen, strict=True))
        network.head.register_forward_hook(lambda module, args, output: None)  # any hook anywhere counts
        assert watch.parts(block) is None
        block(x)
        assert _watch_of(block).parts(block) is not None


def test_a_watch_stays_behind_when_its_module_is_copied_or_restored(network: nn.Module) -> None:
    effkernels.optimize_(network)
    with torch.no_grad():
        network(images(2, 33, 35))
    block = network.blocks[0]
    for other in (copy.copy(block), copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert _watch_of(other).parts(other) is None
    effkernels.restore_(network)
    assert not any(name.startswith("_effkernels") for one in network.modules() for name in one.__dict__)


def _other_weight(block: nn.Module) -> None:
    block.depthwise.weight = nn.Parameter(block.depthwise.weight.detach() * 2)


def _other_statistics(block: nn.Module) -> None:
    block.bn2.running_var = block.bn2.running_var * 4


def _other_eps(block: nn.Module) -> None:
    block.bn2.eps = 0.5


def _norm_in_training_mode(block: nn.Module) -> None:
    block.bn2.train()


def _padding(block: nn.Module) -> None:
    block.depthwise.padding = (2, 0)


def _class_of_a_part(block: nn.Module) -> None:
    block.act.__class__ = nn.ReLU


def _method_of_a_part(block: nn.Module) -> None:
    block.act.forward = torch.tanh


def _weight_that_is_gone(block: nn.Module) -> None:
    weight = block.depthwise.weight.detach()
    del block.depthwise.weight
    block.depthwise.weight = weight  # a plain attribute now


@pytest.mark.parametrize(
    "change",
    [
        *(_other_weight, _other_statistics, _other_eps, _norm_in_training_mode, _padding, _class_of_a_part),
        *(_method_of_a_part, _weight_that_is_gone, lambda block: block.half().float(), lambda block: block.double()),
    ],
)
def test_a_change_between_two_calls_is_seen(network: nn.Module, change: Callable[[nn.Module], object]) -> None:
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    block, x = network.blocks[1], images(1, 5, 7, channels=8)
    with torch.no_grad():
        before = block(x)  # the look
        assert torch.equal(block(x), before)  # the watch
        change(block)
        change(plain.blocks[1])
        x = x.to(next(block.parameters()).dtype)
        torch.testing.assert_close(block(x), plain.blocks[1](x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ the classifier


class Classifying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3, 512)
        self.head = nn.Linear(512, 600)
        self.small = nn.Linear(600, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.small(self.head(self.block(x).mean((2, 3))))
        return y


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_few_rows_of_a_large_classifier_go_through_the_operator(batch: int) -> None:
    model = randomise(Classifying())
    plain = copy.deepcopy(model)
    report = effkernels.optimize_(model)
    assert report.notes == ("head: batches of up to 4 go through pointwise_bn_act on a CPU",)
    assert report.fused == 1
    assert isinstance(model.head, nn.Linear)
    assert [type(one) for one in (model.head, model.small)] == [type(model.head), nn.Linear]
    x = images(batch, 9, 9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model.head(torch.ones(batch, 512))
    assert any("pointwise_bn_act" in event.name for event in profile.events()) == (batch <= 4)
    assert_as_before(model, plain, x)
    assert effkernels.restore_(model) == 1
    assert type(model.head) is nn.Linear


def test_a_classifier_keeps_to_what_linear_does() -> None:
    model = randomise(Classifying())
    plain = copy.deepcopy(model)
    effkernels.optimize_(model)
    rows = torch.randn(2, 512)
    for x in (rows[0], rows[:, None], rows[:0]):  # other ranks, no rows
        assert torch.equal(model.head(x), plain.head(x))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.head(rows[:, :5])
    with pytest.raises(RuntimeError):
        model.head(rows.double())
    wanted = torch.autograd.grad(plain.head(rows).square().sum(), plain.head.weight)[0]
    found = torch.autograd.grad(model.head(rows).square().sum(), model.head.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    effkernels.optimize_(model, filter_fn=lambda name, module: name != "head")
    assert type(model.head) is nn.Linear


def test_a_compiled_classifier_has_one_graph_for_all_batches() -> None:
    model = randomise(Classifying())
    effkernels.optimize_(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for batch in (2, 3, 7):
            x = images(batch, 9, 9)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)

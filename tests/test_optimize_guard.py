"""A fused program reads at every call everything of its modules that the plain forward would read."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from optimize_network import Block, Network, assert_as_before, is_fused
from parity import assert_parity
from peer_models import images, randomise, torchvision_model
from torch import Tensor, nn

import effkernels
from effkernels.optimize.swapped import BOUND


@pytest.fixture
def network() -> nn.Module:
    return randomise(Network())


# -------------------------------------------------------------------------------------------- changes of every kind


def _weight(block: nn.Module) -> None:
    block.depthwise.weight = nn.Parameter(block.depthwise.weight.detach() * 2)


def _weight_in_place(block: nn.Module) -> None:
    with torch.no_grad():
        block.depthwise.weight.mul_(3)


def _weight_that_is_a_plain_attribute(block: nn.Module) -> None:
    weight = block.depthwise.weight.detach()
    del block.depthwise.weight
    block.depthwise.weight = weight


def _weight_normalised(block: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(block.project)
    with torch.no_grad():
        block.project.parametrizations.weight.original0.mul_(2)


def _weight_normalised_by_a_hook(block: nn.Module) -> None:
    torch.nn.utils.weight_norm(block.project)
    with torch.no_grad():
        block.project.weight_g.mul_(2)


def _statistics(block: nn.Module) -> None:
    block.bn2.running_var = block.bn2.running_var * 4


def _no_statistics(block: nn.Module) -> None:
    block.bn2.running_mean = block.bn2.running_var = None


def _eps(block: nn.Module) -> None:
    block.bn2.eps = 0.5


def _norm_in_training_mode(block: nn.Module) -> None:
    block.bn2.train()


def _stride(block: nn.Module) -> None:
    block.depthwise.stride = (2, 2)
    block.skip = False


def _padding(block: nn.Module) -> None:
    block.depthwise.padding = (2, 0)
    block.skip = False


def _padding_mode(block: nn.Module) -> None:
    block.depthwise.padding_mode = "circular"


def _setting_of_the_block(block: nn.Module) -> None:
    block.skip = False


def _class_of_a_part(block: nn.Module) -> None:
    block.act.__class__ = nn.ReLU


def _another_part(block: nn.Module) -> None:
    block.act = nn.ReLU()


def _another_norm(block: nn.Module) -> None:
    block.bn2 = nn.InstanceNorm2d(24)


def _forward_of_a_part(block: nn.Module) -> None:
    block.act.forward = torch.tanh


def _forward_with_self(block: nn.Module) -> None:
    conv = block.depthwise
    conv.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), conv)


def _method_that_forward_calls(block: nn.Module) -> None:
    conv = block.depthwise
    conv._conv_forward = lambda x, weight, bias: 2 * F.conv2d(x, weight, bias, 1, 1, 1, 24)


def _attribute_over_a_module(block: nn.Module) -> None:
    block.__dict__["act"] = torch.tanh  # found before the module of that name


def _hook(block: nn.Module) -> None:
    block.act.register_forward_hook(lambda module, args, output: 2 * output)


def _hook_before(block: nn.Module) -> None:
    block.se.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _hook_past_registration(block: nn.Module) -> None:
    block.act._forward_hooks[0] = lambda module, args, output: 2 * output


CHANGES = [
    *(_weight, _weight_in_place, _weight_that_is_a_plain_attribute, _weight_normalised, _weight_normalised_by_a_hook),
    *(_statistics, _no_statistics, _eps, _norm_in_training_mode, _stride, _padding, _padding_mode),
    *(_setting_of_the_block, _class_of_a_part, _another_part, _another_norm, _forward_of_a_part, _forward_with_self),
    *(_method_that_forward_calls, _attribute_over_a_module, _hook, _hook_before, _hook_past_registration),
    *(lambda block: block.half().float(), lambda block: block.double()),
]


UNSEEN_BY_COMPILE = (
    *(_hook, _hook_before, _hook_past_registration, _forward_of_a_part, _forward_with_self),
    *(_method_that_forward_calls, _attribute_over_a_module),
)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_is_seen(network: nn.Module, change: Callable, compiled: bool) -> None:
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    block, x = network.blocks[0], images(1, 7, 9, channels=8)
    if compiled and change in UNSEEN_BY_COMPILE:
        pytest.skip("torch.compile does not see this of a plain module either")
    torch._dynamo.reset()
    run = torch.compile(block, backend="eager") if compiled else block
    with torch.no_grad():
        before = run(x)
        assert torch.equal(run(x), before)  # by what was bound at the first call
        for one in (block, plain.blocks[0]):
            change(one)
        x = x.to(next(block.bn1.parameters()).dtype)
        torch.testing.assert_close(run(x), plain.blocks[0](x), rtol=1e-4, atol=1e-5)


class Settings:
    def __init__(self) -> None:
        self.scale = 2.0


class Reading(Block):
    """A block that reads attributes of many kinds."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.factors = [1.0, 2.0]
        self.options = {"shift": 0.5}
        self.settings = Settings()
        self.eps = 3.0  # of no norm
        self.momentum = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * self.factors[1] * self.settings.scale * self.eps * self.momentum
        return y * self.scale + self.options["shift"] + getattr(self, "more", 0.0)


READ: dict[str, Callable[[nn.Module], object]] = {
    "item of a list": lambda m: m.factors.__setitem__(1, 5.0),
    "item of a dict": lambda m: m.options.update(shift=9.0),
    "attribute of an object": lambda m: setattr(m.settings, "scale", 7.0),
    "another object": lambda m: setattr(m, "settings", types.SimpleNamespace(scale=4.0)),
    "attribute named like a norm's": lambda m: setattr(m, "eps", 1.0),
    "another of them": lambda m: setattr(m, "momentum", 2.0),
    "attribute over one of the class": lambda m: setattr(m, "scale", 3.0),
    "attribute that getattr asks for": lambda m: setattr(m, "more", 1.0),
    "class of the block": lambda m: setattr(m, "__class__", type("Other", (type(m),), {"scale": 6.0})),
}


@pytest.mark.parametrize("name", READ)
def test_whatever_a_forward_may_read_is_compared(name: str) -> None:
    block = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), Reading()))[1]
    plain = copy.deepcopy(block)
    assert effkernels.optimize_(block).fused == 1
    x = images(1, 7, 9, channels=8)
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-5)
        for one in (block, plain):
            READ[name](one)
        torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "note", "of the user"),
        lambda block: setattr(block.act, "name", "act"),
        lambda block: setattr(block.act, "inplace", False),
        lambda block: setattr(block.bn1, "momentum", 0.01),
        lambda block: setattr(block.bn1, "eps", 0.3),
        lambda block: setattr(block.depthwise, "layer_index", 3),
        lambda block: block.load_state_dict(block.state_dict()),
        lambda block: block.to(torch.float32, memory_format=torch.channels_last),
    ],
)
def test_what_no_forward_reads_costs_nothing(network: nn.Module, change: Callable) -> None:
    effkernels.optimize_(network)
    block, x = network.blocks[0], images(1, 5, 5, channels=8)
    change(block)
    assert is_fused(block, x)


@pytest.mark.parametrize("depth", range(3))
def test_an_object_in_lists_is_compared_by_its_attributes(network: nn.Module, depth: int) -> None:
    block, x = network.blocks[0], images(1, 5, 5, channels=8)
    block.kept = kept = Settings()
    for _ in range(depth):
        block.kept = [block.kept]
    effkernels.optimize_(network)
    assert is_fused(block, x)
    assert is_fused(copy.deepcopy(block), x)
    kept.scale = 3.0
    assert not is_fused(block, x)


@pytest.mark.parametrize("kept", [[[[Settings()]]], [[[[[1]]]]], torch.ones(2), torch.Generator()])
def test_an_attribute_that_cannot_be_compared_is_the_reason(network: nn.Module, kept: object) -> None:
    network.blocks[0].kept = kept
    block = next(block for block in effkernels.optimize_(network).blocks if block.name == "blocks.0")
    assert block.reason == f"its attribute 'kept' of Block (a {type(kept).__name__}) cannot be compared at every call"


def test_a_method_replaced_in_a_class_is_seen(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    x = images(2, 33, 35)
    with torch.no_grad():
        network(x)
        monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: torch.tanh(x))
        torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- structure


def _swap_children(blocks: nn.Sequential) -> None:
    blocks[0], blocks[2] = blocks[2], blocks[0]


class SameWidth(Network):
    """Blocks that may be in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 8))
        self.head = nn.Linear(8, 5)
        self.extra = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn(self.stem(x))))
        for one in self.extra:
            x = one(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


STRUCTURE: dict[str, Callable[[nn.Module], object]] = {
    "appended": lambda m: m.blocks.append(nn.Hardtanh(1.0, 2.0)),
    "inserted": lambda m: m.blocks.insert(1, nn.Hardtanh(0.0, 0.1)),
    "removed": lambda m: m.blocks.__delitem__(1),
    "in another order": lambda m: _swap_children(m.blocks),
    "replaced": lambda m: m.blocks.__setitem__(1, nn.Tanh()),
    "appended to an empty list": lambda m: m.extra.append(nn.Hardtanh(0.0, 0.1)),
    "the container replaced": lambda m: setattr(m, "blocks", nn.Sequential(nn.Tanh())),
}


@pytest.mark.parametrize(
    ("name", "compiled"),
    [(name, False) for name in STRUCTURE]
    + [pytest.param(name, True, marks=[pytest.mark.thorough] * (name != "inserted")) for name in STRUCTURE],
)
def test_children_of_containers_are_compared(name: str, compiled: bool) -> None:
    network = randomise(SameWidth())
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    x = images(2, 33, 35)
    torch._dynamo.reset()
    run = torch.compile(network, backend="eager") if compiled else network
    with torch.no_grad():
        before = run(x)
        for one in (network, plain):
            STRUCTURE[name](one)
        torch.testing.assert_close(run(x), plain(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(run(x), before, rtol=1e-3)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_layer_appended_to_torchvisions_features_runs(compiled: bool) -> None:
    model = torchvision_model("efficientnet_b0")
    plain = copy.deepcopy(model)
    effkernels.optimize_(model)
    x = images(1, 64, 64)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        run(x)
        for one in (model, plain):
            one.features.append(nn.Hardtanh(1.0, 2.0))
        assert_parity(run(x), plain(x), copy.deepcopy(plain).double()(x.double()))


# ------------------------------------------------------------------------------------------------------ what is bound


def test_a_second_call_compares_what_the_first_has_bound(network: nn.Module) -> None:
    effkernels.optimize_(network)
    block, x = network.blocks[0], images(1, 5, 5, channels=8)
    key = BOUND + "forward"
    with torch.no_grad():
        block(x)
        bound = block.__dict__[key]
        block(x)
        assert block.__dict__[key] is bound
        block.bn1.note = "harmless"  # is looked at once
        block(x)
        assert block.__dict__[key] is not bound


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_compares_its_own_modules(network: nn.Module, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    effkernels.optimize_(network)
    with torch.no_grad():
        network(images(2, 33, 35))
    block, x = network.blocks[0], images(1, 5, 5, channels=8)
    other = duplicate(block)
    assert is_fused(other, x)
    other.skip = False
    with torch.no_grad():
        assert not torch.equal(other(x), block(x))
    assert is_fused(block, x)


def _replica(module: nn.Module) -> nn.Module:
    """Return nn.DataParallel's replica of a module for another device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = _replica(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach().clone())
    for name, buffer in module._buffers.items():
        replica._buffers[name] = None if buffer is None else buffer.clone()
    return replica


def test_replicas_of_data_parallel_run_fused(network: nn.Module) -> None:
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    replica = _replica(network)
    assert is_fused(replica.blocks[0], images(1, 5, 5, channels=8))
    assert_as_before(replica, plain, images(2, 33, 35))


def test_an_object_among_the_attributes_is_copied_with_its_module() -> None:
    block = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), Reading()))[1]
    effkernels.optimize_(block)
    x = images(1, 7, 9, channels=8)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.settings is not block.settings
        assert is_fused(other, x)


def test_restore_removes_everything(network: nn.Module) -> None:
    effkernels.optimize_(network)
    with torch.no_grad():
        network(images(2, 33, 35))
    effkernels.restore_(network)
    assert not any(name.startswith("_effkernels") for one in network.modules() for name in one.__dict__)


def test_a_program_recompiles_and_exports_with_all_guards(network: nn.Module) -> None:
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert_as_before(compiled, plain, images(2, 33, 35))

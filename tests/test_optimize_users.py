"""Users' changes to a model around `optimize_`: modules with state, tools that look inside, failures, other threads."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from optimize_network import Block, Network, assert_as_before, is_fused, programs
from parity import assert_parity
from peer_models import images, randomise, timm_model, torchvision_model
from torch import Tensor, nn

import effkernels
from effkernels.models.peers import import_timm
from effkernels.optimize import optimizer
from effkernels.optimize.swapped import UNVERIFIED


@pytest.fixture
def network() -> nn.Module:
    return randomise(Network())


# ------------------------------------------------------------------------------------------------ modules with state


class Counter:
    def __init__(self) -> None:
        self.calls = 0


class Stateful(nn.Module):
    """Keeps, counts and caches in every way there is, after a convolution that could be fused."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.kind = kind
        self.kept: object = None
        self.seen: list[int] = []
        self.cache: dict[str, object] = {}
        self.counter = Counter()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.conv(x)))
        if self.kind == "attribute":
            self.kept = y
        elif self.kind == "list":
            self.seen.append(x.shape[0])
        elif self.kind == "dict":
            self.cache.setdefault("x", x)
        elif self.kind == "object":
            self.counter.calls += 1
        elif self.kind == "buffer":
            self.count += 1
        elif self.kind == "buffer in place":
            self.count.add_(1)
        elif self.kind == "average":
            self.average.lerp_(y.detach().mean((0, 2, 3)), 0.1)
        return y

    def state(self) -> list[object]:
        found = [self.kept, *self.cache.values(), self.count, self.average]
        return [len(self.seen), self.counter.calls, *(one.clone() for one in found if one is not None)]


@pytest.mark.parametrize("kind", ["attribute", "list", "dict", "object", "buffer", "buffer in place", "average"])
def test_state_is_untouched_by_optimising_and_kept_afterwards(kind: str) -> None:
    model = randomise(nn.Sequential(Stateful(kind), Block(8, 8)))
    plain = copy.deepcopy(model)
    effkernels.optimize_(model)
    torch.testing.assert_close(model[0].state(), plain[0].state(), rtol=0, atol=0)
    x = images(2, 9, 11)
    with torch.no_grad():
        for one in (model, plain):
            one(x)
            one(x)
    torch.testing.assert_close(model[0].state(), plain[0].state(), rtol=1e-4, atol=1e-5)
    pickle.dumps(model)
    effkernels.restore_(model)
    assert_as_before(model, plain, x)


class Recorder(nn.Module):
    """Does nothing but remember."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return x


def test_a_module_that_only_remembers_is_called() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Recorder(), nn.SiLU()))
    model[2].kept = None
    effkernels.optimize_(model)
    assert model[2].kept is None
    model(images(1, 5, 6))
    assert model[2].kept is not None


def test_hooks_see_nothing_of_the_trials(network: nn.Module) -> None:
    seen: list[Tensor] = []
    for module in network.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    effkernels.optimize_(network)
    assert seen == []


@pytest.mark.parametrize("name", ["efficientvit_m0", "levit_128s", "tiny_vit_5m_224"])
def test_models_with_caches_of_their_own_run_and_pickle(name: str) -> None:
    model = import_timm().create_model(name).eval()
    plain = copy.deepcopy(model)
    effkernels.optimize_(model)
    x = images(1, 224, 224)
    with torch.no_grad():
        assert_parity(model(x), plain(x), copy.deepcopy(plain).double()(x.double()))
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


# -------------------------------------------------------------------------------------- activations and what is between


class HalvesAbove(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 if x.shape[-1] > 100 else x


class PoolsAbove(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if x.shape[-1] > 100 else x


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class OwnSwish(nn.Module):
    """An activation as libraries write it to save memory."""

    def forward(self, x: Tensor) -> Tensor:
        return Own.apply(x)


def _chain(between: nn.Module) -> nn.Module:
    return randomise(
        nn.Sequential(
            *(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.SiLU(), between, nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)),
            nn.SiLU(),
        )
    )


@pytest.mark.parametrize("between", [HalvesAbove(), PoolsAbove(), Shuffle(3), Shuffle(4), Recorder(), OwnSwish()])
@pytest.mark.parametrize("size", [(9, 11), (128, 130)])
def test_modules_between_do_at_every_size_what_they_did(between: nn.Module, size: tuple[int, int]) -> None:
    model = _chain(between)
    plain = copy.deepcopy(model)
    assert effkernels.optimize_(model).fused == 2
    assert_as_before(model, plain, images(1, *size))


def test_an_activation_by_an_autograd_function_is_fused() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), OwnSwish()))
    effkernels.optimize_(model)
    (program,) = model._effkernels_programs.values()
    assert "activation='silu'" in program.source


def test_a_clip_of_large_numbers_is_no_relu() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardtanh(0.0, 20.0)))
    effkernels.optimize_(model)
    with torch.no_grad():
        assert model(1000 * images(1, 9, 9)).max() == 20.0


class Unit(nn.Module):
    """ShuffleNet's unit."""

    def __init__(self, groups: int = 3, device: str | None = None) -> None:
        super().__init__()
        channels = 8 * groups
        self.first = nn.Conv2d(channels, channels, 1, groups=groups, bias=False, device=device)
        self.bn1, self.shuffle = nn.BatchNorm2d(channels, device=device), Shuffle(groups)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False, device=device)
        self.bn2 = nn.BatchNorm2d(channels, device=device)
        self.last = nn.Conv2d(channels, channels, 1, groups=groups, bias=False, device=device)
        self.bn3 = nn.BatchNorm2d(channels, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(F.relu(self.bn1(self.first(x))))
        return F.relu(self.bn3(self.last(self.bn2(self.depthwise(y)))) + x)


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_a_grouped_convolution_with_a_shuffle_is_told_apart(groups: int) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8 * groups, 1), Unit(groups)))
    plain = copy.deepcopy(model)
    (_, block) = effkernels.optimize_(model).blocks
    assert f"groups={groups} of {8 * groups} channels is neither dense nor depthwise" in block.reason
    assert "off by" not in block.reason
    assert_as_before(model, plain, images(2, 9, 11))


# ------------------------------------------------------------------------------------- weights that come afterwards


class Lying(nn.Module):
    """Hides from a trace what it does."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1, device=device), nn.BatchNorm2d(8, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return y if isinstance(y, torch.fx.Proxy) else y + 0.25


def _on_meta(cls: type[nn.Module]) -> nn.Module:
    return cls(device="meta").eval()


def _not_a_number(cls: type[nn.Module]) -> nn.Module:
    model = cls().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.constant_(tensor, float("nan"))
    return model


@pytest.mark.parametrize("make", [_on_meta, _not_a_number])
def test_what_could_not_be_verified_is_verified_at_its_first_use(make: object) -> None:
    filled = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), Lying()))[1]
    model = make(Lying)
    report = effkernels.optimize_(model)
    assert any("no weights to compare with" in note for note in report.notes)
    x = images(2, 9, 11)
    if make is _not_a_number:
        assert model(x).isnan().all()  # still nothing to compare with
    model = model.to_empty(device="cpu") if make is _on_meta else model
    model.load_state_dict(filled.state_dict())
    with pytest.warns(RuntimeWarning, match="Lying.forward runs as written: its fused form is off by"):
        assert torch.equal(model(x), filled(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), filled(x))


@pytest.mark.parametrize("make", [_on_meta, _not_a_number])
def test_what_is_right_runs_fused_once_it_has_weights(make: object) -> None:
    filled = randomise(nn.Sequential(nn.Conv2d(3, 24, 1), Unit()))[1]
    model = make(Unit)
    effkernels.optimize_(model)
    model = model.to_empty(device="cpu") if make is _on_meta else model
    model.load_state_dict(filled.state_dict())
    assert UNVERIFIED in model.__dict__
    x = images(2, 9, 11, channels=24)
    assert_as_before(model, filled, x)
    assert UNVERIFIED not in model.__dict__
    assert is_fused(model, x)
    assert is_fused(pickle.loads(pickle.dumps(model)), x)


def test_a_trace_before_the_first_use_is_of_the_original() -> None:
    filled = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), Lying()))[1]
    model = _on_meta(Lying)
    effkernels.optimize_(model)
    model = model.to_empty(device="cpu")
    model.load_state_dict(filled.state_dict())
    x = images(2, 9, 11)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(x), filled(x))


# --------------------------------------------------------------------------------------------- failures leave no trace


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("optimised", [False, True])
def test_a_failure_leaves_the_model_as_it_was(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], optimised: bool
) -> None:
    if optimised:
        effkernels.optimize_(network)
    x = images(2, 33, 35)
    with torch.no_grad():
        wanted = network(x)
    before, running = _classes(network), len(programs(network))
    calls = []

    def fails_at_the_third(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return difference(*args)

    difference = optimizer.difference
    monkeypatch.setattr(optimizer, "difference", fails_at_the_third)
    with pytest.raises(error):
        effkernels.optimize_(network)
    assert _classes(network) == before
    assert len(programs(network)) == running
    with torch.no_grad():
        assert torch.equal(network(x), wanted)


def test_a_failure_of_fold_bn_leaves_the_model_as_it_was(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from effkernels.optimize import norms

    effkernels.optimize_(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    classes = _classes(network)
    calls = []

    def fails_at_the_third(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("full")
        return fold(*args)

    fold = norms._folded
    monkeypatch.setattr(norms, "_folded", fails_at_the_third)
    with pytest.raises(RuntimeError, match="full"):
        effkernels.fold_bn_(network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert _classes(network) == classes


def test_a_forced_backend_does_not_meet_float64() -> None:
    model = timm_model("efficientnet_lite0")
    report = effkernels.optimize_(model, backend="cpu")
    assert report.fused == 18
    assert {block.backend for block in report.blocks} == {"cpu"}


# ------------------------------------------------------------------------------------------------ what others attach


@pytest.mark.parametrize("undo", [effkernels.restore_, effkernels.fold_bn_, effkernels.optimize_])
def test_a_parametrization_made_afterwards_stays(network: nn.Module, undo: object) -> None:
    effkernels.optimize_(network)
    block = network.blocks[1]
    torch.nn.utils.parametrizations.weight_norm(block.project)
    torch.nn.utils.parametrizations.spectral_norm(network.head)
    with torch.no_grad():
        block.project.parametrizations.weight.original0.mul_(2)
    x = images(2, 33, 35)
    with torch.no_grad():
        wanted = network(x)
        undo(network)
        torch.testing.assert_close(network(x), wanted, rtol=1e-4, atol=1e-4)
    assert torch.nn.utils.parametrize.is_parametrized(block.project)


def test_a_class_derived_from_an_optimised_one_stays(network: nn.Module) -> None:
    effkernels.optimize_(network)
    block, x = network.blocks[0], images(1, 7, 9, channels=8)
    cls = type(block)
    block.__class__ = type("Negative", (cls,), {"forward": lambda self, x: -cls.forward(self, x)})
    with torch.no_grad():
        wanted = block(x)
        effkernels.restore_(network)
        torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-5)
    assert type(block).__name__ == "Negative"


class Half(Tensor):
    """A tensor subclass that represents a quantised tensor: no operator of ours knows how to read it."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Half:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if "effkernels" in str(func):
            raise NotImplementedError(str(func))
        args, kwargs = torch.utils._pytree.tree_map(
            lambda one: one.inner if isinstance(one, Half) else one, (args, kwargs or {})
        )
        result = func(*args, **kwargs)
        return Half(result) if func is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("path", ["blocks.0.project", "head"])
def test_weights_that_are_no_plain_tensors_are_left_to_pytorch(network: nn.Module, path: str, first: bool) -> None:
    plain = copy.deepcopy(network)
    if not first:
        effkernels.optimize_(network)
    module = network.get_submodule(path)
    module.weight = nn.Parameter(Half(module.weight.detach()), requires_grad=False)
    if first:
        report = effkernels.optimize_(network)
        assert report.fused >= 3
        if path != "head":
            assert any("Half" in block.reason for block in report.blocks), str(report)
    x = images(2, 33, 35)
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-4)


def _without_parameters(network: nn.Module, keep: object) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            del module._parameters["weight"]
            keep(module, weight)


def _quantise_the_head(network: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, inplace=True)


def _script_a_block(network: nn.Module) -> None:
    network.blocks[1] = torch.jit.script(network.blocks[1])


BEFORE = {
    "weights as attributes": (
        lambda network: _without_parameters(network, lambda module, weight: setattr(module, "weight", weight)),
        (0, "its attribute 'weight' of Conv2d (a Tensor) cannot be compared at every call"),
    ),
    "weights as buffers": (
        lambda network: _without_parameters(network, lambda module, weight: module.register_buffer("weight", weight)),
        (0, "'weight' of Conv2d is no parameter of it"),
    ),
    "a quantised head": (_quantise_the_head, (3, "its forward does not run in float64")),
    "a scripted block": (_script_a_block, (2, "its forward does not run in float64")),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BEFORE)
def test_what_others_did_before_is_kept_and_is_the_reason(network: nn.Module, name: str) -> None:
    change, (fused, reason) = BEFORE[name]
    change(network)
    x = images(2, 33, 35)
    with torch.no_grad():
        wanted = network(x)
        report = effkernels.optimize_(network)
        torch.testing.assert_close(network(x), wanted, rtol=1e-4, atol=1e-4)
    assert report.fused == fused, str(report)
    assert any(reason in block.reason for block in report.blocks), str(report)


# -------------------------------------------------------------------------------------------- tools that look inside


def test_vmap_and_ensembles(network: nn.Module) -> None:
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    x = images(2, 33, 35)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(network)(x[None]), plain(x)[None], rtol=1e-4, atol=1e-4)
    models = [network, copy.deepcopy(network)]
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters: dict, buffers: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(network, (parameters, buffers), (x,))

    with torch.no_grad():
        found = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
        torch.testing.assert_close(found[1], plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Converting a tensor:torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "efficientnet_lite0"])
def test_jit_trace_and_script_see_the_plain_model(name: str) -> None:
    model = timm_model(name)
    plain = copy.deepcopy(model)
    effkernels.optimize_(model)
    x = images(1, 64, 64)
    with torch.no_grad():
        wanted = plain(x)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(model)(x), wanted, rtol=1e-4, atol=1e-5)
    assert programs(model), "scripting takes nothing away"


def test_fx_traces_the_plain_graph() -> None:
    model = torchvision_model("mobilenet_v3_small")
    plain = torch.fx.symbolic_trace(copy.deepcopy(model))
    effkernels.optimize_(model)
    assert str(torch.fx.symbolic_trace(model).graph) == str(plain.graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Converting a tensor:torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_a_users_own_onnx_export_is_plain(network: nn.Module, tmp_path: object, dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    effkernels.optimize_(network)
    file = tmp_path / "network.onnx"
    torch.onnx.export(network, (images(1, 33, 35),), file, dynamo=dynamo, verbose=False)
    operators = {node.op_type for node in onnx.load(file).graph.node}
    assert "Conv" in operators
    assert not any("bn_act" in operator for operator in operators)

"""Other people's models, optimised for training: the same step as before, with a third of the memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from optimize_models import PEERS, Peer, build, is_installed
from parity import assert_parity, joined
from peer_models import assert_gradients_parity, images, randomise, timm_model
from test_training_memory import assert_the_documents_say, saved_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import effkernels
from effkernels.models.peers import import_timm, import_torchvision
from effkernels.nn import set_recompute
from effkernels.optimize import NotFusedError

# Blocks that train fused; stem and head, and whatever else is no block, train as written.
TRAINED = {
    ("timm", "efficientnet_b0"): 16,
    ("timm", "tf_efficientnet_b0"): 16,
    ("timm", "mobilenetv2_050"): 17,
    ("timm", "mobilenetv3_small_050"): 11,
    ("torchvision", "efficientnet_b0"): 16,
    ("torchvision", "mobilenet_v2"): 17,
    ("lukemelas", "b0"): 16,
    ("transformers", "EfficientNet B0"): 16,
    ("NVIDIA layout", "efficientnet-b0 in small"): 4,
}
MODELS = [peer for peer in PEERS if (peer.library, peer.name) in TRAINED]


def made(peer: Peer) -> nn.Module:
    if not is_installed(peer.library):
        pytest.skip(f"{peer.library} is not installed")
    return build(peer)


def without_dropping(model: nn.Module) -> nn.Module:
    """The model with every probability of dropping zero: random numbers of float64 are not those of float32."""
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
        parameters = getattr(module, "_global_params", None)
        if parameters is not None:  # lukemelas'
            module._global_params = parameters._replace(drop_connect_rate=0.0)
    return model


def step(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of a training step, whose gradients are the parameters' `grad`."""
    torch.manual_seed(0)
    model.train().zero_grad()
    logits = model(x)
    logits.square().mean().backward()
    return logits.detach()


def assert_statistics_parity(model: nn.Module, plain: nn.Module, exact: nn.Module) -> None:
    """The tolerance rule for all running statistics, each tensor at its own scale (`assert_gradients_parity`)."""
    values: list[list[Tensor]] = [[], [], []]
    for buffers in zip(model.buffers(), plain.buffers(), exact.buffers(), strict=True):
        if not buffers[0].is_floating_point():
            assert torch.equal(buffers[0], buffers[1])
            continue
        scale = float(buffers[2].norm())
        for some, buffer in zip(values, buffers, strict=True):
            some.append(buffer / scale)
    assert_parity(*map(joined, values), "running statistics")


# Their blocks are those of others here.
REPEATED = {("timm", "tf_efficientnet_b0"), ("timm", "mobilenetv2_050"), ("torchvision", "efficientnet_b0")}


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, id=peer.id, marks=[pytest.mark.thorough] * ((peer.library, peer.name) in REPEATED))
        for peer in MODELS
    ],
)
def test_a_step_is_as_exact_as_before_and_everything_comes_back(peer: Peer) -> None:
    model = without_dropping(made(peer))
    plain, exact, x = copy.deepcopy(model), copy.deepcopy(model).double(), images(4, *peer.size)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    classes = [type(module) for module in model.modules()]
    report = effkernels.optimize_(model, mode="training")
    trained = TRAINED[peer.library, peer.name]
    assert report.fused == trained, str(report)
    assert all(block.fused or "in training mode" in block.reason for block in report.blocks), str(report)
    assert "blocks train fused" in str(report)

    logits, own, truth = step(model, x), step(plain, x), step(exact, x.double())
    assert_parity(logits, [own, step(other, x.contiguous(memory_format=torch.channels_last))], truth, "logits")
    assert_gradients_parity(model, plain, exact)
    assert fused_operators(copy.deepcopy(model)(x)) == trained
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert_statistics_parity(model, plain, exact)
    with torch.no_grad():
        assert_parity(model.eval()(x), plain.eval()(x), exact.eval()(x.double()), "logits in eval mode")

    effkernels.restore_(model)
    assert [type(module) for module in model.modules()] == classes
    for key, value in state.items():
        plain.state_dict()[key].copy_(value)
    assert torch.equal(step(model, x), step(plain, x))


def _timm() -> nn.Module:
    return timm_model("efficientnet_b0", drop_path_rate=0.3, drop_rate=0.2)


@pytest.mark.parametrize(
    "peer",
    [peer for peer in MODELS if peer.name in ("efficientnet_b0", "b0", "EfficientNet B0") and not peer.options],
    ids=lambda peer: peer.id,
)
def test_what_drops_draws_the_same_random_numbers(peer: Peer) -> None:
    model = (_timm() if peer.library == "timm" else made(peer)).double()
    plain, x = copy.deepcopy(model), images(5, 33, 35).double()
    assert effkernels.optimize_(model, mode="training").fused == 16
    assert fused_operators(copy.deepcopy(model).train()(x)) == 16
    found, wanted = step(model, x), step(plain, x)
    torch.testing.assert_close(found, wanted)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for p, q in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    torch.manual_seed(1)
    assert not torch.allclose(model(x), wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_timms_b0_saves_a_part_of_what_it_did(layout: torch.memory_format) -> None:
    model = timm_model("efficientnet_b0").train()
    x = images(2, 224, 224).contiguous(memory_format=layout)
    before = saved_bytes(model, x)
    effkernels.optimize_(model, mode="training")
    saved = saved_bytes(model, x)
    assert saved <= 0.40 * before
    assert_the_documents_say(before, saved)
    set_recompute(model, "expand")
    saved = saved_bytes(copy.deepcopy(model), x)
    assert saved <= 0.25 * before
    assert_the_documents_say(saved, pages=("docs/training.md",))


def test_recomputing_gives_the_same_bits() -> None:
    model = block()
    effkernels.optimize_(model, mode="training")
    other, x = copy.deepcopy(model), images(3, 9, 11, 8)
    set_recompute(other, "expand")
    assert torch.equal(step(model, x), step(other, x))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def block(**options: object) -> nn.Module:
    """An inverted residual block of timm's, in training mode."""
    import_timm()
    from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite

    made = InvertedResidual(8, 8, 3, act_layer=nn.SiLU, se_layer=SqueezeExcite, exp_ratio=4.0, **options)
    return randomise(nn.Sequential(made), channels=8).train()


def fused_operators(result: Tensor) -> int:
    """How many fused training operators the graph of a result has."""
    pending, seen = [result.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [one for one, _ in node.next_functions]
    return sum("effkernels_training" in node.name() for node in seen)


def trains_fused(model: nn.Module) -> bool:
    """Whether a forward runs fused; the model's statistics stay."""
    return fused_operators(copy.deepcopy(model)(images(3, 9, 11, 8))) > 0


def test_the_result_has_the_memory_format_of_the_input() -> None:
    model = block()
    assert effkernels.optimize_(model, mode="training").fused == 1
    x = images(3, 9, 11, 8)
    assert trains_fused(model)
    assert model(x).is_contiguous()
    assert model(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def _hook(model: nn.Module) -> None:
    model[0].conv_dw.register_forward_hook(lambda *arguments: None)


def _group_norm(model: nn.Module) -> None:
    model[0].bn2 = nn.GroupNorm(4, model[0].bn2.num_features)


def _forward(model: nn.Module) -> None:
    model[0].bn1.forward = lambda x: x


def _pad(model: nn.Module) -> None:
    model[0].conv_dw.padding = (0, 0)
    model[0].has_skip = False


@pytest.mark.parametrize("change", [_hook, _group_norm, _forward, _pad])
def test_a_changed_block_runs_as_written(change: Callable[[nn.Module], None]) -> None:
    model = block()
    effkernels.optimize_(model, mode="training")
    assert trains_fused(model)
    change(model)
    assert not trains_fused(model)
    plain = copy.deepcopy(model)
    effkernels.restore_(plain)
    x = images(3, 9, 11, 8)
    assert torch.equal(model(x), plain(x))


def test_train_and_eval_alternate_and_norms_may_be_frozen() -> None:
    model = block()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    effkernels.optimize_(model, mode="training")
    x = images(3, 9, 11, 8)

    def frozen(one: nn.Module) -> None:
        one.train()
        one[0].bn2.eval()

    for change in (nn.Module.train, nn.Module.eval, frozen, nn.Module.train):
        for one in (model, plain, exact):
            change(one)
        found, own, truth = (one(x.to(one[0].conv_pw.weight.dtype)) for one in (model, plain, exact))
        assert_parity(found, own, truth)
        assert trains_fused(model) == model.training
    assert_statistics_parity(model, plain, exact)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_fused(how: Callable[[nn.Module], nn.Module]) -> None:
    model = block()
    effkernels.optimize_(model, mode="training")
    copied = how(model)
    x = images(3, 9, 11, 8)
    assert trains_fused(copied)
    assert torch.equal(copied(x), model(x))


def test_only_on_request() -> None:
    model = block()
    effkernels.optimize_(model)
    assert not trains_fused(model)
    effkernels.optimize_(model, mode="training")
    assert trains_fused(model)
    with effkernels.backend("reference"):
        assert not trains_fused(model)
    effkernels.optimize_(model)
    assert not trains_fused(model)


def test_autocast_and_functional_call() -> None:
    model = block(drop_path_rate=0.0)
    plain = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    effkernels.optimize_(model, mode="training")
    x = images(3, 9, 11, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert trains_fused(model)
        found, own = model(x), plain(x)
    assert found.dtype == own.dtype
    assert_parity(found, own, exact(x.double()))
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    called = torch.func.functional_call(model, doubled, (x,))
    model.load_state_dict(doubled, strict=False)
    assert torch.equal(called, model(x))


def test_a_compiled_step_is_one_graph() -> None:
    model = nn.Sequential(block(), block(drop_path_rate=0.5))
    effkernels.optimize_(model, mode="training")
    other, x = copy.deepcopy(model), images(3, 9, 11, 8)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    results = []
    for one, run in ((model, model), (other, compiled)):
        torch.manual_seed(0)
        y = run(x)
        y.square().sum().backward()
        results.append((y.detach(), [p.grad for p in one.parameters()], list(one.buffers())))
    assert trains_fused(model)
    torch.testing.assert_close(*results)


class Noisy(nn.Module):
    """A block of this file's own, with something that happens in training mode alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.calls = 0
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.project = nn.Conv2d(8, 8, 1, bias=False)
        self.last = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.depthwise(x)))
        if self.kind == "module":
            y = self.drop(y)
        if self.kind == "code" and self.training:
            y = y + 1
        if self.kind == "counter" and self.training:
            self.calls += 1
        y = self.last(self.project(y))
        if self.kind == "function":
            y = F.dropout(y, 0.5, self.training)
        return x + y


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("module", "drop may do something"),
        ("code", "another function"),
        ("counter", "writes to its attributes"),
        ("function", "dropout may do something"),
    ],
)
def test_what_training_mode_changes_is_noticed_and_reported(kind: str, reason: str) -> None:
    model = randomise(nn.Sequential(Noisy(kind)), channels=8)
    plain = copy.deepcopy(model)
    report = effkernels.optimize_(model, mode="training")
    assert report.fused == 0
    assert reason in report.blocks[0].reason
    x = images(3, 9, 11, 8)
    assert torch.equal(step(model, x), step(plain, x))
    assert not trains_fused(model)
    with pytest.raises(NotFusedError, match=reason):
        effkernels.optimize_(model, mode="training", strict=True)


def test_a_plain_block_of_ones_own_trains_fused() -> None:
    model = randomise(nn.Sequential(Noisy("none")), channels=8)
    assert effkernels.optimize_(model, mode="training", strict=True).fused == 1
    assert trains_fused(model.train())


def test_the_backend_reference_trains_as_written() -> None:
    model = block()
    report = effkernels.optimize_(model, mode="training", backend="reference")
    assert report.fused == 0
    assert "plain PyTorch" in report.blocks[0].reason
    assert not trains_fused(model)


def test_torchvisions_drops_are_called() -> None:
    import_torchvision()
    from torchvision.models.efficientnet import MBConv, MBConvConfig

    config = MBConvConfig(4, 3, 1, 8, 8, 1)
    model = randomise(nn.Sequential(MBConv(config, 0.5, nn.BatchNorm2d)), channels=8).train()
    assert effkernels.optimize_(model, mode="training", strict=True).fused == 1
    x = images(64, 9, 11, 8)
    dropped = (model(x) == x).flatten(1).all(1)
    assert 8 < int(dropped.sum()) < 56
    assert trains_fused(model)

"""Training gives timm's gradients and statistics, and whatever changes a weight is in the next forward."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import assert_parity
from peer_models import SMALL, assert_gradients_parity, images, randomise, small, timm_model, twin
from torch import Tensor, nn

import effkernels
from effkernels.models import EfficientNet


def backward(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return the logits of one training step, the gradients and the buffers after it."""
    model.train().zero_grad()
    logits = model(x)
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return logits.detach(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0"])
def test_a_training_step_is_timms(name: str) -> None:
    peer = timm_model(name)
    ours = twin(name, peer)
    exact = copy.deepcopy(peer).double()
    x = images(4, 46, 61)
    (logits, _, buffers), theirs, truth = (backward(m, x.to(m.conv_stem.weight.dtype)) for m in (ours, peer, exact))
    assert_parity(logits, theirs[0], truth[0], "logits")
    assert_gradients_parity(ours, peer, exact)
    for key, value in buffers.items():
        if key.endswith("num_batches_tracked"):
            assert int(value) == int(theirs[2][key])
        else:
            assert_parity(value, theirs[2][key], truth[2][key], key)


def test_dropping_in_training_only() -> None:
    torch.manual_seed(0)
    model = small(drop_rate=0.5, drop_path_rate=0.5)
    rates = [block.drop_path.rate for stage in model.blocks for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    x = images(4, 33, 31)
    assert torch.equal(model(x), model(x))
    model.train()
    first, second = model(x), model(x)
    assert first.shape == (4, 10)
    assert not torch.equal(first, second)
    first.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_path_rates_are_timms() -> None:
    peer = timm_model("efficientnet_b0", drop_path_rate=0.2)
    with torch.device("meta"):
        ours = effkernels.create_model("efficientnet_b0", drop_path_rate=0.2)
    for stage, theirs in zip(ours.blocks, peer.blocks, strict=True):
        for block, other in zip(stage, theirs, strict=True):
            if block.has_skip:
                assert block.drop_path.rate == pytest.approx(getattr(other.drop_path, "drop_prob", 0.0))


def test_checkpointing_gives_the_same_gradients() -> None:
    model, x = small(), images(2, 33, 31)
    wanted = backward(copy.deepcopy(model), x)
    model.set_grad_checkpointing()
    found = backward(model, x)
    assert torch.equal(found[0], wanted[0])
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))


def _load(model: EfficientNet) -> None:
    other = randomise(EfficientNet(SMALL, num_classes=10), seed=1)
    model.load_state_dict(other.state_dict())


def _in_place(model: EfficientNet) -> None:
    with torch.no_grad():
        model.blocks[1][0].conv_dw.weight.mul_(1.5)


def _through_data(model: EfficientNet) -> None:
    model.blocks[1][0].conv_pwl.weight.data = model.blocks[1][0].conv_pwl.weight.data * 1.5


def _statistics(model: EfficientNet) -> None:
    model.blocks[1][0].bn2.running_var.mul_(2)


def _replace_parameter(model: EfficientNet) -> None:
    model.conv_stem.weight = nn.Parameter(model.conv_stem.weight * 1.5)


def _replace_norm(model: EfficientNet) -> None:
    model.blocks[1][0].bn1 = nn.BatchNorm2d(model.blocks[1][0].bn1.num_features).eval()


def _change_eps(model: EfficientNet) -> None:
    model.set_norm(eps=0.1)


def _optimiser_step(model: EfficientNet) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(images(2, 33, 31)).square().sum().backward()
    optimiser.step()
    model.eval()


def _average(model: EfficientNet) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    averaged.update_parameters(randomise(EfficientNet(SMALL, num_classes=10), seed=1))
    for parameter, average in zip(model.parameters(), averaged.module.parameters(), strict=True):
        parameter.data.copy_(average)


def _functional(model: EfficientNet) -> None:
    model.forward = lambda x, _model=model: torch.func.functional_call(
        _Forward(_model), {"model.blocks.1.0.conv_dw.weight": _model.blocks[1][0].conv_dw.weight * 1.5}, (x,)
    )


class _Forward(nn.Module):
    def __init__(self, model: EfficientNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return EfficientNet.forward(self.model, x)


@pytest.mark.parametrize(
    "change",
    [
        _load,
        _in_place,
        _through_data,
        _statistics,
        _replace_parameter,
        _replace_norm,
        _change_eps,
        _optimiser_step,
        _average,
        _functional,
    ],
)
def test_changed_weights_are_in_the_next_forward(change) -> None:
    model, x = small(), images(2, 33, 31)
    before = model(x).detach()
    change(model)
    after = model(x).detach()
    assert not torch.allclose(after, before, rtol=1e-2)
    with effkernels.backend("reference"):
        torch.testing.assert_close(after, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_synchronised_norms_train_as_plain_ones() -> None:
    model, x = small(), images(2, 33, 31)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    if not torch.cuda.is_available():  # SyncBatchNorm's forward takes GPU tensors only where it has to synchronise
        assert torch.equal(converted(x), model(x))
    exact = copy.deepcopy(model).double()
    model.backend = "reference"
    wanted, found = backward(model, x), backward(converted, x)
    truth = backward(exact, x.double())
    assert_parity(found[0], wanted[0], truth[0], "logits")
    assert_gradients_parity(converted, model, exact)

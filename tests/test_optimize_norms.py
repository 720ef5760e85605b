"""Folding of batch norms and their conversion to synchronised ones: neither loses an activation."""

from __future__ import annotations

import copy

import pytest
import torch
from optimize_models import NvidiaLayout
from parity import assert_parity
from peer_models import images, in_both_layouts, in_float64, lukemelas_model, randomise, timm_model, torchvision_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

import effkernels
from effkernels.optimize import SyncBatchNormAct

FOLDED = {
    "timm": (lambda: timm_model("mobilenetv3_small_050"), 34),
    "timm SAME": (lambda: timm_model("tf_mobilenetv3_small_minimal_100"), 34),
    "torchvision": (lambda: torchvision_model("mobilenet_v2"), 52),
    "lukemelas": (lambda: lukemelas_model("b0"), 49),
    "NVIDIA layout": (lambda: randomise(NvidiaLayout()), 13),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_leaves_no_norm_and_the_same_logits(name: str) -> None:
    make, count = FOLDED[name]
    model = make()
    x = images(2, 61, 66)
    with torch.no_grad():
        same_dtype, truth = in_both_layouts(model, x), in_float64(model, x)
        assert effkernels.fold_bn_(model) == count
        assert not any(isinstance(module, BatchNorm) for module in model.modules())
        assert_parity(model(x), same_dtype, truth, "folded")
        report = effkernels.optimize_(model, strict=True)
        assert report.fused == len(report.blocks)
        assert_parity(model(x), same_dtype, truth, "folded and optimised")


def test_folding_takes_an_optimised_model_back_first() -> None:
    model = randomise(NvidiaLayout())
    effkernels.optimize_(model)
    assert effkernels.fold_bn_(model) == 13
    assert effkernels.restore_(model) == 0


def test_shared_convolutions_and_norms_are_not_folded() -> None:
    conv, norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
    model = randomise(nn.Sequential(conv, norm, nn.Conv2d(3, 3, 1, bias=False), norm, nn.Conv2d(3, 4, 1)))
    x = images(1, 5, 5)
    with torch.no_grad():
        before = model(x)
        assert effkernels.fold_bn_(model) == 0
        assert torch.equal(model(x), before)


def test_folding_works_under_inference_mode_and_keeps_trainable_parameters() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    with torch.inference_mode():
        assert effkernels.fold_bn_(model) == 1
    assert model[0].bias.requires_grad
    model(images(1, 5, 5)).sum().backward()
    assert model[0].bias.grad is not None


def test_synchronised_norms_keep_activation_names_and_parameters() -> None:
    model = timm_model("mobilenetv3_small_050")
    plain = copy.deepcopy(model)
    x = images(2, 61, 66)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    effkernels.optimize_(model)
    converted = effkernels.convert_sync_batchnorm(model)
    assert converted is model
    assert {name: id(p) for name, p in converted.named_parameters()} == parameters
    assert converted.state_dict().keys() == plain.state_dict().keys()
    norms = [module for module in converted.modules() if isinstance(module, BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert type(converted.bn1) is SyncBatchNormAct
    with torch.no_grad():
        assert torch.equal(converted(x), plain(x))
    assert effkernels.optimize_(converted, strict=True).fused == 14


def test_pytorchs_own_conversion_drops_the_activation() -> None:
    """Why there is another one; when PyTorch's no longer does, ours can go."""
    model = timm_model("mobilenetv3_small_050")
    plain, x = copy.deepcopy(model), images(1, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(nn.SyncBatchNorm.convert_sync_batchnorm(model)(x), plain(x), rtol=1e-2)


def test_plain_norms_become_plain_synchronised_norms() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Sequential(nn.BatchNorm2d(4, eps=0.1), nn.ReLU()))
    effkernels.convert_sync_batchnorm(model)
    assert type(model[0]) is type(model[1][0]) is nn.SyncBatchNorm
    assert model[1][0].eps == 0.1
    assert model[1][0].training
    single = effkernels.convert_sync_batchnorm(nn.BatchNorm2d(3))
    assert type(single) is nn.SyncBatchNorm


def test_a_norm_of_unknown_meaning_is_not_converted_in_silence() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(nn.BatchNorm2d(3), Odd(3))
    with pytest.raises(ValueError, match=r"1: the forward of .*Odd is not a batch norm with an activation known here"):
        effkernels.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d

"""The head of a network as one operator: where it is used, and that what has to be called is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from called_operators import CalledOperators
from parity import assert_parity
from torch import Tensor, nn

import effkernels
from effkernels.cam.maps import class_activation_map
from effkernels.models import EfficientNet

POOL = "effkernels::pointwise_bn_act_pool"


@pytest.fixture
def model(one_thread: None) -> EfficientNet:
    torch.manual_seed(0)
    model = effkernels.create_model("efficientnet_b0", num_classes=11).eval()
    assert isinstance(model, EfficientNet)
    return model


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def uses_operator(forward: Callable[[Tensor], object]) -> bool:
    """Return whether a call runs the operator, fused or as the reference."""
    with torch.no_grad(), CalledOperators() as called:
        forward(images())
    return called.names[POOL] > 0


@pytest.mark.usefixtures("compiled")
class TestUse:
    def test_in_eval_mode(self, model: EfficientNet) -> None:
        assert uses_operator(model)
        assert not uses_operator(model.forward_features)
        assert not uses_operator(model.train())

    def test_without_a_classifier(self, model: EfficientNet) -> None:
        model.reset_classifier(0)
        assert uses_operator(model)
        assert model(images()).shape == (2, 1280)

    @pytest.mark.parametrize("name", ["conv_head", "bn2", "bn2.act", "global_pool", "global_pool.pool"])
    def test_a_hooked_module_is_called(self, name: str, model: EfficientNet) -> None:
        seen: list[str] = []
        hook = model.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
        assert not uses_operator(model)
        assert seen == [name]
        hook.remove()
        assert uses_operator(model)

    def test_another_pooling_is_called(self, model: EfficientNet) -> None:
        for pool in ("max", ""):
            model.reset_classifier(0, pool)
            assert not uses_operator(model)
        model.reset_classifier(3, "avg")
        model.global_pool.pool = nn.AdaptiveAvgPool2d(2)
        model.classifier = nn.Identity()
        assert not uses_operator(model)
        assert model(images()).shape == (2, 4 * 1280)

    def test_a_replaced_method_is_called(self, model: EfficientNet) -> None:
        class Doubled(EfficientNet):
            def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
                return 2 * super().forward_head(x, pre_logits)

        with torch.no_grad():
            before = model(images())
            model.__class__ = Doubled
            assert not uses_operator(model)
            torch.testing.assert_close(model(images()), 2 * before)
            model.__class__ = EfficientNet
            model.global_pool.forward = lambda x: x.amax((2, 3))
            assert not uses_operator(model)

    def test_class_activation_maps_see_the_features(self, model: EfficientNet) -> None:
        found = class_activation_map(model, images())
        with torch.no_grad():
            features = model.forward_features(images())
        weight = model.classifier.weight[found.classes]
        torch.testing.assert_close(found.maps, (weight[:, :, None, None] * features).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_are_as_exact_as_those_of_the_modules(dtype: torch.dtype, model: EfficientNet) -> None:
    x = images(96).to(dtype)
    network = model.to(dtype)
    with torch.no_grad():
        result = network(x)
        with effkernels.backend("reference"):
            plain = network.forward_head(network.forward_features(x))
            truth = network.double()(x.double())
    assert_parity(result, plain, truth)


def test_dropout_and_gradients_are_those_of_the_modules(model: EfficientNet) -> None:
    """With frozen norms the operator is used in training, too."""
    model.drop_rate = 0.5
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    gradients = []
    for watched in (False, True):
        hook = model.conv_head.register_forward_hook(lambda *_: None) if watched else None
        torch.manual_seed(1)
        model.zero_grad()
        model(images()).square().sum().backward()
        gradients.append([p.grad.clone() for p in (model.conv_head.weight, model.bn2.weight, model.classifier.weight)])  # type: ignore[union-attr]
        if hook is not None:
            hook.remove()
    for fused, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))

"""Building models by name: costs, notices, refusals."""

from __future__ import annotations

import pytest
import torch
from peer_models import variants
from torch.utils.flop_counter import FlopCounterMode

import effkernels
from effkernels.models import BASELINE, ModelConfig, list_models, model_config, register
from effkernels.models.peers import import_timm
from effkernels.models.registry import RegisteredModel

# Table 2 of the paper: million parameters, billion multiply-adds. For B4 the paper prints 4.2, and counting its own
# network gives 4.4.
TABLE_2 = {
    "b0": (5.3, 0.39),
    "b1": (7.8, 0.70),
    "b2": (9.2, 1.0),
    "b3": (12, 1.8),
    "b4": (19, 4.4),
    "b5": (30, 9.9),
    "b6": (43, 19),
    "b7": (66, 37),
}
# The table of tensorflow/tpu, models/official/efficientnet/lite: million parameters.
TABLE_LITE = {"lite0": 4.7, "lite1": 5.4, "lite2": 6.1, "lite3": 8.2, "lite4": 13.0}


@pytest.mark.parametrize("variant", sorted(TABLE_2))
def test_parameters_and_multiply_adds_are_those_of_table_2(variant: str) -> None:
    parameters, multiply_adds = TABLE_2[variant]
    for prefix in ("", "tf_"):
        with torch.device("meta"):
            model = effkernels.create_model(f"{prefix}efficientnet_{variant}").eval()
            with FlopCounterMode(display=False) as counter:
                logits = model(torch.empty(1, *model.config.input_size))
        assert logits.shape == (1, 1000)
        assert logits.is_meta
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.02)
        assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.05)


@pytest.mark.parametrize("variant", sorted(TABLE_LITE))
def test_lite_variants_have_the_published_parameters_and_timms_flops(variant: str) -> None:
    name, flops = f"efficientnet_{variant}", []
    with torch.device("meta"):
        for model in (effkernels.create_model(name).eval(), import_timm().create_model(name).eval()):
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(TABLE_LITE[variant], rel=0.02)
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, *model_config(name).input_size))
            flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


@pytest.mark.parametrize("name", list_models("*_lite?"))
def test_lite_variants_are_fed_and_activated_as_timms(name: str) -> None:
    with torch.device("meta"):
        model, peer = effkernels.create_model(name), import_timm().create_model(name)
    for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "num_classes", "first_conv", "classifier"):
        assert getattr(model.config, key) == peer.default_cfg[key], key
    assert model.architecture.activation == "relu6"
    assert isinstance(peer.bn1.act, torch.nn.ReLU6)
    assert model.pad_type == ("same" if name.startswith("tf_") else "")


@pytest.mark.parametrize("name", variants(list_models()))
def test_state_dicts_have_timms_keys_and_shapes(name: str) -> None:
    timm = import_timm()
    with torch.device("meta"):
        for options in ({}, {"num_classes": 7, "in_chans": 1}, {"features_only": True}):
            ours = effkernels.create_model(name, **options)
            theirs = timm.create_model(name, **options)
            found = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
            assert found == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
            norms = [m for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            assert {(n.eps, n.momentum) for n in norms} == {(theirs.bn1.eps, theirs.bn1.momentum)}


def test_names() -> None:
    assert len(list_models()) == 26
    assert list_models() == sorted(list_models())
    assert list_models("tf_*_b[0-1]") == ["tf_efficientnet_b0", "tf_efficientnet_b1"]
    assert list_models(["*_b7", "efficientnet_b0"]) == ["efficientnet_b0", "efficientnet_b7", "tf_efficientnet_b7"]
    assert list_models("efficientnet_lite*") == [f"efficientnet_lite{i}" for i in range(5)]
    assert list_models("resnet*") == []


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'efficientnet-b0': did you mean .*efficientnet_b0"):
        effkernels.create_model("efficientnet-b0")
    with pytest.raises(ValueError, match="known are efficientnet_b0, "):
        effkernels.create_model("zzzz")


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="'efficientnet_b0' is taken"):
        register(RegisteredModel(model_config("efficientnet_b0"), BASELINE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes=-1 must not be negative"),
        ({"in_chans": 0}, "in_chans=0 must be at least 1"),
        ({"drop_rate": 1.5}, "drop_rate=1.5 is not a probability"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1 is not a probability"),
        ({"pad_type": "valid"}, "pad_type='valid' is not known; allowed: '', 'same', 'same_native'"),
        ({"backend": "gpu"}, "backend='gpu' is not known; allowed: None, auto, cuda"),
        ({"global_pool": "sum"}, "global_pool='sum' is not known"),
        ({"global_pool": ""}, "num_classes=1000 must be 0"),
        ({"out_indices": (0,)}, "out_indices=.* is for features_only=True"),
        ({"feature_cls": "list"}, "feature_cls='list' is for features_only=True"),
        ({"feature_cls": "fx", "features_only": True}, "feature_cls='fx' is not offered; allowed: 'list', 'getter'"),
        ({"features_only": True, "out_indices": (5,)}, "must name at least one of the 5 feature maps, as -5 to 4"),
        ({"features_only": True, "out_indices": ()}, "must name at least one"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        effkernels.create_model("efficientnet_b0", **options)


def test_the_configuration_says_what_to_feed() -> None:
    assert model_config("efficientnet_b4").input_size == (3, 380, 380)
    with torch.device("meta"):
        model = effkernels.create_model("tf_efficientnet_b3", num_classes=12, in_chans=4)
    assert isinstance(model.config, ModelConfig)
    assert model.config.name == "tf_efficientnet_b3"
    assert model.config.input_size == (4, 300, 300)
    assert model.config.num_classes == 12
    assert model.config.crop_pct == pytest.approx(300 / 332, abs=1e-3)
    timm = import_timm()
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == model.config.crop_pct


def test_device_and_dtype() -> None:
    model = effkernels.create_model("efficientnet_b0", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_fresh_weights_keep_the_size_of_the_signal() -> None:
    """Initialisation is good to train from: logits are neither all alike nor huge."""
    torch.manual_seed(0)
    model = effkernels.create_model("efficientnet_b0").train().requires_grad_(False)
    logits = model(torch.randn(4, 3, 64, 64))
    assert 1e-3 < float(logits.std()) < 10
    assert torch.isfinite(logits).all()
    assert float(model.classifier.bias.abs().max()) == 0.0
    assert float(model.classifier.weight.abs().max()) <= 1000**-0.5
    weight = model.blocks[2][0].conv_dw.weight
    assert float(weight.std()) == pytest.approx((2 / 25) ** 0.5, rel=0.1)

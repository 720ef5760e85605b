"""Common changes to a model's modules: cut, hook, replace, rebuild. Own models answer as timm's do."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from called_operators import fused_operators
from peer_models import images, randomise, small, small_timm_b0
from torch import Tensor, fx, nn

import effkernels
from effkernels.models import EfficientNet
from effkernels.models.peers import import_timm, import_torchvision
from effkernels.nn import BatchNormAct2d, MBConv, PaddedConv2d
from effkernels.nn.fusible import fusible_norm

SIZE = (2, 78, 70)


@pytest.fixture(scope="module")
def timm_b0() -> nn.Module:
    return small_timm_b0()


@pytest.fixture(scope="module")
def own_b0(timm_b0: nn.Module) -> EfficientNet:
    model = effkernels.create_model("efficientnet_b0", device="meta").to_empty(device="cpu")
    model.load_state_dict(timm_b0.state_dict())
    return model.eval()


def close(found: Any, wanted: Any, relative: float = 1e-5) -> None:
    """Equal up to rounding, measured by the largest value."""
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=relative * float(wanted.abs().max()))


def test_children_have_timms_names(own_b0: EfficientNet, timm_b0: nn.Module) -> None:
    assert [name for name, _ in own_b0.named_children()] == [name for name, _ in timm_b0.named_children()]
    named = dict(own_b0.named_modules())
    for name, module in timm_b0.named_modules():
        if name.endswith((".act", ".act1", ".gate", ".drop", ".pool", ".flatten")):
            assert name in named
            leaf = type(module)
            assert name.endswith((".gate", ".pool", ".flatten")) or type(named[name]).__name__ == leaf.__name__
    assert list(own_b0.state_dict()) == list(timm_b0.state_dict())


def test_cut_by_children(own_b0: EfficientNet, timm_b0: nn.Module) -> None:
    x = images(*SIZE)
    own, theirs = list(own_b0.children()), list(timm_b0.children())
    with torch.inference_mode():
        for end in range(1, len(own) + 1):
            close(nn.Sequential(*own[:end])(x), nn.Sequential(*theirs[:end])(x))
        close(own_b0.as_sequential()(x), own_b0(x))
        assert len(own_b0.as_sequential()) == len(timm_b0.as_sequential())


@pytest.mark.parametrize(
    "path", ["bn1", "bn1.act", "blocks.1.0.bn2.act", "blocks.2.1.se.gate", "blocks.6.0.bn3", "bn2"]
)
def test_hooks_see_timms_values(path: str, own_b0: EfficientNet, timm_b0: nn.Module) -> None:
    seen: list[Tensor] = []
    x = images(*SIZE)
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        for model in (own_b0, timm_b0)
    ]
    with torch.inference_mode():
        own_b0(x), timm_b0(x)
    for handle in handles:
        handle.remove()
    own, theirs = seen
    close(own, theirs)


def test_maps_and_their_gradients_at_a_norm_are_timms(own_b0: EfficientNet, timm_b0: nn.Module) -> None:
    """Grad-CAM reads at `bn2` what timm gives: the activated map, and the gradient of a logit by it."""
    found = []
    for model in (own_b0, timm_b0):
        maps: list[Tensor] = []
        handle = model.bn2.register_forward_hook(lambda module, args, output, maps=maps: maps.append(output))
        logit = model(images(*SIZE))[:, 7].sum()
        handle.remove()
        found.append((maps[0], torch.autograd.grad(logit, maps[0])[0]))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1]},
        {"indices": [1], "stop_early": True},
        {"indices": 3, "intermediates_only": True},
        {"indices": [0, 3], "extra_blocks": True, "stop_early": True},
    ],
    ids=str,
)
def test_forward_intermediates(options: dict[str, Any], own_b0: EfficientNet, timm_b0: nn.Module) -> None:
    x = images(*SIZE)
    with torch.inference_mode():
        own, theirs = (model.forward_intermediates(x, **options) for model in (own_b0, timm_b0))
    if not options.get("intermediates_only"):
        close(own[0], theirs[0])
        own, theirs = own[1], theirs[1]
    assert len(own) == len(theirs)
    for found, wanted in zip(own, theirs, strict=True):
        close(found, wanted)


def test_intermediates_that_are_not_there(own_b0: EfficientNet) -> None:
    with pytest.raises(ValueError, match=r"indices=\[9\] must name at least one of the 5 maps, as -5 to 4"):
        own_b0.forward_intermediates(images(1, 64, 64), indices=[9])
    with pytest.raises(ValueError, match="output_fmt='NHWC' is not known; allowed: 'NCHW'"):
        own_b0.forward_intermediates(images(1, 64, 64), output_fmt="NHWC")


def test_facts_have_timms_names(own_b0: EfficientNet, timm_b0: nn.Module) -> None:
    for key in ("input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "num_classes", "first_conv"):
        assert own_b0.default_cfg[key] == timm_b0.default_cfg[key], key
    assert own_b0.pretrained_cfg["classifier"] == timm_b0.pretrained_cfg["classifier"]
    assert (own_b0.num_features, own_b0.head_hidden_size) == (timm_b0.num_features, timm_b0.head_hidden_size)
    for own, theirs in zip(own_b0.feature_info, timm_b0.feature_info, strict=True):
        assert {key: own[key] for key in ("num_chs", "reduction", "stage")} == {
            key: theirs[key] for key in ("num_chs", "reduction", "stage")
        }
    assert own_b0.get_classifier() is own_b0.classifier
    assert own_b0.global_pool.pool_type == timm_b0.global_pool.pool_type


@pytest.mark.parametrize("pad_type", ["", "same"])
@pytest.mark.parametrize("training", [False, True])
def test_traced_by_torch_fx(training: bool, pad_type: str) -> None:
    """The graph is that of the plain modules, and tracing changes nothing in them."""
    model, x = small(pad_type=pad_type, drop_path_rate=0.2).train(training), images(3, 65, 46)
    before = copy.deepcopy(model.state_dict())
    graph = fx.symbolic_trace(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("effkernels" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    assert "bn1.act" in {node.target for node in graph.graph.nodes if node.op == "call_module"}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        found = graph(x)
        torch.manual_seed(0)
        close(found, model(x))


@pytest.mark.parametrize(
    ("module", "channels"),
    [
        pytest.param(small, 3, id="network"),
        pytest.param(lambda: effkernels.create_model("efficientnet_b0", features_only=True), 3, id="backbone"),
        pytest.param(lambda: MBConv(8, 8, pad_type="same"), 8, id="MBConv"),
        pytest.param(lambda: BatchNormAct2d(8), 8, id="BatchNormAct2d"),
    ],
)
def test_traced_by_torch_fx_and_then_scripted(module: Callable[[], nn.Module], channels: int) -> None:
    model, x = module().eval(), images(1, 64, 48, channels)
    scripted = torch.jit.script(fx.symbolic_trace(model))
    with torch.no_grad():
        for found, expected in zip(list(scripted(x)), list(model(x)), strict=True):
            close(found, expected)


def test_torchvisions_feature_extractor(own_b0: EfficientNet) -> None:
    import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    x = images(*SIZE)
    with torch.inference_mode():
        extractor = create_feature_extractor(own_b0, {"blocks.2": "middle", "bn2.act": "last", "classifier": "logits"})
        found = extractor(x)
        close(found["last"], own_b0.forward_features(x))
        close(found["logits"], own_b0(x))
        close(found["middle"], own_b0.blocks[:3](own_b0.bn1(own_b0.conv_stem(x))))
    assert "bn1.act" in get_graph_node_names(own_b0)[1]


def test_torchscript_says_what_to_use() -> None:
    for module in (small(), MBConv(8, 8), BatchNormAct2d(3)):
        with pytest.raises(RuntimeError, match=f"{type(module).__name__}: torch.jit.script .* torch.jit.trace"):
            torch.jit.script(module)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, effkernels.convert_sync_batchnorm])
def test_a_synchronised_model_keeps_its_activations(convert: Callable[[nn.Module], nn.Module]) -> None:
    model, x = small(), images(2, 33, 31)
    with torch.no_grad():
        wanted = model(x)
        converted = convert(copy.deepcopy(model))
        assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
        close(converted(x), wanted)
        for module in converted.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.register_forward_hook(lambda *arguments: None)  # as written, not fused
        close(converted(x), wanted)


def test_a_synchronised_model_still_runs_fused() -> None:
    model = effkernels.convert_sync_batchnorm(small())
    (argument, activation) = fusible_norm(model.bn1, "identity") or (None, "")
    assert argument is not None
    assert activation == "silu"


def _activation(block: MBConv) -> None:
    block.bn1.act = nn.ReLU()


def _other_activation(block: MBConv) -> None:
    block.bn2.act = nn.Tanh()


def _clipped(block: MBConv) -> None:
    block.bn1.act = nn.ReLU6()
    block.bn1.act.max_val = 2.0


def _rounded_gelu(block: MBConv) -> None:
    block.bn1.act = nn.GELU(approximate="tanh")


def _activation_behind_the_projection(block: MBConv) -> None:
    block.bn3.act = nn.Hardswish()


def _drop(block: MBConv) -> None:
    block.bn2.drop = nn.Hardtanh(-0.1, 0.1)


def _gate(block: MBConv) -> None:
    block.se.gate = nn.Hardsigmoid()


def _inner_activation(block: MBConv) -> None:
    block.se.act1 = nn.ReLU()


def _hook(block: MBConv) -> None:
    block.bn1.act.register_forward_hook(lambda module, args, output: 2 * output)


def _hook_at_the_gate(block: MBConv) -> None:
    block.se.gate.register_forward_hook(lambda module, args, output: 0.5 * output)


def _replaced_forward(block: MBConv) -> None:
    block.bn2.act.forward = torch.tanh


def _circular(block: MBConv) -> None:
    block.conv_dw.padding_mode = "circular"
    block.conv_dw._reversed_padding_repeated_twice = [1, 1, 1, 1]


def _replaced_convolution(block: MBConv) -> None:
    original = block.conv_pw._conv_forward
    block.conv_pw._conv_forward = lambda x, weight, bias: 0.3 * original(x, weight, bias)


def _replaced_method_of_the_depthwise(block: MBConv) -> None:
    def circular(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        return nn.functional.conv2d(padded, weight, bias, conv.stride, 0, conv.dilation, conv.groups)

    block.conv_dw._conv_forward = types.MethodType(circular, block.conv_dw)


def _padding(block: MBConv) -> None:
    block.conv_dw.padding = (1, 2)


def _integers(block: MBConv) -> None:
    block.conv_dw.padding = 2
    block.conv_dw.stride = 1


def _weight_as_attribute(block: MBConv) -> None:
    weight = block.conv_pwl.weight.detach() * 0.5
    del block.conv_pwl.weight
    block.conv_pwl.weight = weight


def _other_norm(block: MBConv) -> None:
    block.bn2 = nn.GroupNorm(4, block.bn2.num_features)


CHANGES = [
    *(_activation, _other_activation, _clipped, _rounded_gelu, _activation_behind_the_projection, _drop, _gate),
    *(_inner_activation, _hook, _hook_at_the_gate, _replaced_forward, _circular, _replaced_convolution),
    *(_replaced_method_of_the_depthwise, _padding, _integers, _weight_as_attribute, _other_norm),
]
# What an operator can compute as well.
STAYS_FUSED = (_activation, _rounded_gelu, _activation_behind_the_projection, _gate, _inner_activation, _padding)

UNSEEN_BY_COMPILE = (
    *(_hook, _hook_at_the_gate, _replaced_forward, _replaced_convolution, _replaced_method_of_the_depthwise),
)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_changed_block_computes_what_its_modules_say(change: Callable, compiled: bool) -> None:
    """The rule of effkernels.nn.fusible, also where torch.compile has seen the block before the change."""
    if compiled and change in UNSEEN_BY_COMPILE:
        pytest.skip("torch.compile guards neither hooks nor methods that are put on a module after it traced it")
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = randomise(MBConv(8, 8, 3, expansion=4, se_channels=2, skip=False), channels=8)
    x = images(2, 14, 12, 8)
    forward = torch.compile(block, backend="eager") if compiled else block
    with torch.no_grad():
        before = forward(x)
        assert compiled or fused_operators(block, x) > 0
        change(block)
        plain = block._forward_plain(x)
        close(forward(x), plain, 1e-5)
        assert plain.shape != before.shape or (plain - before).abs().max() > 1e-3 * before.abs().max()
        if effkernels.ops.backends.choose("pointwise_bn_act", x) != "reference":
            assert (fused_operators(block, x) > 0) == (change in STAYS_FUSED or change is _weight_as_attribute)


def test_an_attribute_of_ones_own_leaves_a_block_fused(compiled: None) -> None:
    block, x = MBConv(8, 8, se_channels=2).eval(), images(1, 14, 12, 8)
    for name, module in block.named_modules():
        module.my_name = name
    assert fused_operators(block, x) > 0


def test_a_compiled_model_runs_fused(compiled: None) -> None:
    torch._dynamo.reset()
    model, x = small(), images(1, 33, 31)
    targets: list[str] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(x)
    assert sum(target.startswith("effkernels.") for target in targets) == fused_operators(model, x) > 0


@pytest.mark.parametrize("pad_type", ["", "same"])
def test_a_second_convolution_after_the_pattern_of_the_first(pad_type: str) -> None:
    """As PEFT builds LoRA for a convolution: the same class and settings, to a few channels, then 1x1 back."""
    model, rank = small(pad_type=pad_type), 4
    for conv in (model.conv_stem, model.blocks[1][0].conv_dw):
        assert isinstance(conv, PaddedConv2d)
        down = type(conv)(conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, bias=False)
        up = type(conv)(rank, conv.out_channels, (1, 1), (1, 1), bias=False)
        for size in ((33, 31), (64, 46)):
            x = images(2, *size, conv.in_channels)
            assert up(down(x)).shape == conv(x).shape
    conv = PaddedConv2d(4, 6, 3, 2, 1, 1, 2, True, "reflect", "cpu", torch.float64)
    wanted = nn.Conv2d(4, 6, 3, 2, 1, 1, 2, True, "reflect", "cpu", torch.float64)
    wanted.load_state_dict(conv.state_dict())
    x = images(2, 9, 8, 4).double()
    assert torch.equal(conv(x), wanted(x))
    with pytest.raises(ValueError, match=r"pad_type='same' with kernel_size=\(3, 5\); allowed: one number"):
        PaddedConv2d(4, 6, (3, 5), pad_type="same")


def test_timms_helpers_take_an_own_model(own_b0: EfficientNet) -> None:
    timm = import_timm()
    assert timm.data.resolve_data_config(model=own_b0)["input_size"] == (3, 224, 224)

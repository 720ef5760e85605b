"""A block gives the same numbers fused and module by module, and falls back wherever fusing would skip something."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_exact_channels_last, assert_parity
from peer_models import images
from torch import Tensor, nn

import effkernels
from effkernels import ops
from effkernels.nn import ConvBnAct, DepthwiseSeparable, DropPath, MBConv, SqueezeExcite, conv_bn_act

FUSED = (
    "depthwise_bn_act",
    "depthwise_bn_act_gate",
    "pointwise_bn_act",
    "expand_depthwise_squeeze",
    "squeeze_excite_gate",
    "mbconv",
    "conv_bn_act",
)
ON_CPU = ["expand_depthwise_squeeze", "squeeze_excite_gate", "pointwise_bn_act"]
ELSEWHERE = ["pointwise_bn_act", "depthwise_bn_act_gate", "pointwise_bn_act"]

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mbconv": lambda: MBConv(24, 24, 5, se_channels=6),
    "mbconv-stride2-same": lambda: MBConv(24, 40, 3, 2, se_channels=6, pad_type="same"),
    "mobilenet-v2": lambda: MBConv(24, 24, 3, activation="relu6"),
    "mobilenet-v3": lambda: MBConv(
        24, 24, 5, se_channels=8, activation="hard_swish", se_activation="relu", gate_activation="hard_sigmoid"
    ),
    "mbconv-dilated": lambda: MBConv(24, 24, 3, dilation=2, se_channels=6, expansion=1),
    "separable": lambda: DepthwiseSeparable(24, 16, se_channels=6),
    "separable-skip": lambda: DepthwiseSeparable(24, 24, 3, se_channels=6, activation="gelu"),
    "separable-no-skip": lambda: DepthwiseSeparable(24, 24, 3, skip=False),
    "conv-dense": lambda: ConvBnAct(24, 20, 3, 2, pad_type="same"),
    "conv-pointwise": lambda: ConvBnAct(24, 20, 1, activation="identity"),
    "conv-depthwise": lambda: ConvBnAct(24, 24, 7, groups=24),
    "conv-grouped": lambda: ConvBnAct(24, 24, 3, groups=3),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    generator = torch.Generator().manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.2, 1.0, generator=generator)
    return block.eval()


def plain(block: nn.Module, x: Tensor) -> Tensor:
    """Return the block module by module: what it runs when a norm is not what it seems."""
    block = copy.deepcopy(block)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *arguments: None)
    return block(x)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused operators that were called, in order."""
    names: list[str] = []
    for name in FUSED:
        monkeypatch.setattr(ops, name, _counted(name, getattr(ops, name), names))
    return names


def _counted(name: str, operator: Callable, names: list[str]) -> Callable:
    def call(*arguments, **options):
        names.append(name)
        return operator(*arguments, **options)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_fused_equals_plain(backend: Backend, name: str, dtype: torch.dtype) -> None:
    block = build(name).to(backend.device, dtype)
    exact = copy.deepcopy(block).double()
    for height, width in ((13, 14), (7, 9), (1, 1)):
        x = images(2, height, width, 24).to(backend.device, dtype)
        layouts = (x, x.contiguous(memory_format=torch.channels_last))
        with torch.inference_mode():
            # A pixel alone has few values: on a GPU the largest of PyTorch's errors in both layouts is its own.
            own = [plain(block, one) for one in (layouts if backend.device == "cuda" else layouts[:1])]
            for layout in layouts:
                y = block(layout)
                assert_parity(y, own, plain(exact, x.double()), f"{name} {height}x{width}")
                if name != "conv-grouped":
                    assert_exact_channels_last(y)


@pytest.mark.parametrize("name", BLOCKS)
def test_float64_and_gradients_in_eval(name: str) -> None:
    block = build(name).double()
    x = images(2, 6, 5, 24).double()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    fused, wanted = block(inputs[0]), plain(block, inputs[1])
    torch.testing.assert_close(fused, wanted)
    found = torch.autograd.grad(fused.square().sum(), [inputs[0], *block.parameters()])
    block.zero_grad()
    copied = copy.deepcopy(block)
    copied.bn1.register_forward_hook(lambda *arguments: None)
    truth = torch.autograd.grad(copied(inputs[1]).square().sum(), [inputs[1], *copied.parameters()])
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other)


@given(batch=st.integers(0, 3), height=st.integers(1, 12), width=st.integers(1, 12), stride=st.integers(1, 2))
@settings(max_examples=20)
def test_any_size_and_batch(batch: int, height: int, width: int, stride: int) -> None:
    block = MBConv(7, 7, 3, stride, se_channels=2, expansion=3, pad_type="same").eval()
    x = images(batch, height, width, 7)
    with torch.inference_mode():
        y = block(x)
        assert y.shape == (batch, 7, -(-height // stride), -(-width // stride))
        torch.testing.assert_close(y, plain(block, x), rtol=1e-4, atol=1e-5)


def test_eval_runs_fused_and_training_runs_the_modules(calls: list[str]) -> None:
    block, x = build("mbconv"), images(2, 8, 8, 24)
    block(x)
    assert calls == ON_CPU
    calls.clear()
    before = block.bn2.running_mean.clone()
    block.train()(x)
    assert calls == []
    assert not torch.equal(block.bn2.running_mean, before)
    assert int(block.bn3.num_batches_tracked) == 1


def test_off_the_cpu_the_gate_belongs_to_the_depthwise_operator(calls: list[str]) -> None:
    with torch.device("meta"):
        block, x = MBConv(24, 24, 5, se_channels=6).eval(), torch.empty(2, 24, 8, 8)
    with effkernels.backend("cpu"):  # on the meta device the CPU's shape functions represent all
        assert block(x).shape == x.shape
    assert calls == ELSEWHERE
    calls.clear()
    with effkernels.backend("reference"):
        build("mbconv")(images(2, 8, 8, 24))
    assert calls == ELSEWHERE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_off_the_cpu_a_block_of_a_16_bit_type_is_one_operator(calls: list[str], dtype: torch.dtype) -> None:
    with torch.device("meta"):
        x = torch.empty(2, 24, 8, 8, dtype=dtype)
        blocks = [MBConv(24, 24, 5, se_channels=6), MBConv(24, 40, 3, 2, activation="relu6")]
    for block in blocks:
        assert block.to(dtype).eval()(x).shape[1] == block.bn3.num_features
    assert calls == ["mbconv", "mbconv"]
    calls.clear()
    with effkernels.backend("triton"):
        blocks[0](x)
    assert calls == ELSEWHERE


def test_frozen_norms_run_fused_in_a_training_model(calls: list[str]) -> None:
    """Fine-tuning with frozen norms: the block trains, its norms do not."""
    block, x = build("mbconv").train(), images(2, 8, 8, 24)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    block(x)
    assert calls == ON_CPU
    calls.clear()
    block.drop_path.rate = 0.5
    block(x)
    assert calls == []


class _Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _attach(block: nn.Module, how: str) -> None:
    conv = block.conv_pw
    if how == "forward hook":
        conv.register_forward_hook(lambda module, arguments, output: output * 2)
    elif how == "forward pre-hook":
        conv.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))
    elif how == "backward hook":
        conv.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))
    elif how == "hook on squeeze-and-excitation":
        block.se.conv_reduce.register_forward_hook(lambda module, arguments, output: output * 2)
    elif how == "hook on drop path":
        block.drop_path.register_forward_hook(lambda module, arguments, output: output * 2)
    elif how == "replaced forward":
        original = conv.forward
        conv.forward = lambda x: original(x) * 2
    elif how == "subclass":
        doubled = _Doubled(24, 144, 1, bias=False).eval()
        doubled.load_state_dict(conv.state_dict())
        block.conv_pw = doubled
    elif how == "another module":
        block.bn2 = nn.GroupNorm(4, 144)
    elif how == "no statistics":
        block.bn2 = nn.BatchNorm2d(144, track_running_stats=False).eval()
    elif how == "parametrization":
        torch.nn.utils.parametrize.register_parametrization(conv, "weight", nn.Tanh())
    elif how == "spectral norm":
        torch.nn.utils.spectral_norm(conv)
    elif how == "reflected border":
        block.conv_dw.padding_mode = "reflect"
        block.conv_dw._reversed_padding_repeated_twice = [2] * 4
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "forward hook",
        "forward pre-hook",
        "backward hook",
        "hook on squeeze-and-excitation",
        "hook on drop path",
        "replaced forward",
        "subclass",
        "another module",
        "no statistics",
        "parametrization",
        "spectral norm",
        "reflected border",
    ],
)
def test_what_is_attached_to_an_inner_module_is_never_skipped(calls: list[str], how: str) -> None:
    block = build("mbconv")
    x = images(2, 8, 8, 24).requires_grad_()
    untouched = block(x)
    (grad,) = torch.autograd.grad(untouched.square().sum(), x)
    calls.clear()
    _attach(block, how)
    y = block(x)
    assert calls == []
    (changed,) = torch.autograd.grad(y.square().sum(), x)
    if how == "backward hook":
        assert not torch.allclose(changed, grad, rtol=1e-2)
    else:
        assert not torch.allclose(y, untouched, rtol=1e-2)


def test_a_hook_that_is_taken_off_gives_the_fused_way_back(calls: list[str]) -> None:
    block, x = build("mbconv"), images(1, 8, 8, 24)
    handle = block.bn1.register_forward_hook(lambda *arguments: None)
    block(x)
    assert calls == []
    handle.remove()
    block(x)
    assert len(calls) == 3


def test_hooks_on_the_block_itself_run_and_fusing_stays(calls: list[str]) -> None:
    block, x = build("mbconv"), images(1, 8, 8, 24)
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    y = block(x)
    assert seen[0] is y
    assert len(calls) == 3


def test_a_replica_of_data_parallel_runs_fused(calls: list[str]) -> None:
    """DataParallel's replicas hold their parameters as plain attributes."""
    block, x = build("conv-depthwise"), images(1, 8, 8, 24)
    replica = block._replicate_for_data_parallel()
    for name, child in block._modules.items():
        copied = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            setattr(copied, key, None if parameter is None else parameter.detach().clone())
        setattr(replica, name, copied)
    with torch.inference_mode():
        torch.testing.assert_close(replica(x), block(x))
    assert calls == ["depthwise_bn_act"] * 2


def test_synchronised_norms_run_fused_in_eval(calls: list[str]) -> None:
    block, x = build("mbconv"), images(1, 8, 8, 24)
    with torch.inference_mode():
        wanted = block(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(block)
        calls.clear()
        assert torch.equal(converted(x), wanted)
    assert isinstance(converted.bn2, nn.SyncBatchNorm)
    assert len(calls) == 3


def test_conv_bn_act_takes_any_modules() -> None:
    x = images(2, 9, 9, 6)
    conv, norm = nn.Conv2d(6, 8, 3, padding=1, dilation=2), nn.BatchNorm2d(8).eval()
    with torch.inference_mode():
        torch.testing.assert_close(conv_bn_act(x, conv, norm, "relu"), torch.relu(norm(conv(x))))
        torch.testing.assert_close(conv_bn_act(x, conv, nn.Identity(), "relu"), torch.relu(conv(x)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("kernel", [(1, 11), (7, 1), (4, 6), (13, 13)])
def test_depthwise_kernels_of_any_shape_run_fused(calls: list[str], kernel: tuple[int, int]) -> None:
    x = images(2, 15, 17, 6)
    conv, norm = nn.Conv2d(6, 6, kernel, padding="same", groups=6), nn.BatchNorm2d(6).eval()
    with torch.inference_mode():
        torch.testing.assert_close(conv_bn_act(x, conv, norm, "relu"), torch.relu(norm(conv(x))))
    assert calls == ["depthwise_bn_act"]


def test_squeeze_excite_is_its_formula() -> None:
    x = images(2, 5, 7, 12)
    module = SqueezeExcite(12, 3, activation="relu", gate_activation="hard_sigmoid").eval()
    hidden = torch.relu(module.conv_reduce(x.mean((2, 3), keepdim=True)))
    torch.testing.assert_close(module(x), x * nn.functional.hardsigmoid(module.conv_expand(hidden)))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3, 1)
    y = drop(x)
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert torch.equal(y.amax((1, 2, 3)), y.amin((1, 2, 3)))
    assert float(y.mean()) == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MBConv(8, 8, activation="mish"), "MBConv: activation='mish' is not known; allowed: identity, relu"),
        (lambda: DepthwiseSeparable(8, 8, activation="x"), "DepthwiseSeparable: activation='x'"),
        (lambda: ConvBnAct(8, 8, 1, activation="x"), "ConvBnAct: activation='x'"),
        (lambda: MBConv(8, 8, expansion=0), "expansion=0 must be at least 1"),
        (lambda: SqueezeExcite(8, 0), "reduced_channels=0 must be at least 1"),
        (
            lambda: SqueezeExcite(8, 2, gate_activation="tanh"),
            "gate_activation='tanh' is not known; allowed: sigmoid, hard_sigmoid",
        ),
        (lambda: DropPath(1.0), "rate=1.0 is not a probability"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""The matcher takes activations in any spelling, paddings of any class and chains of every form, and refuses others."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity
from peer_models import images, randomise
from torch import Tensor, nn

import effkernels
from effkernels.models.peers import import_lukemelas, import_timm, import_torchvision
from effkernels.nn import PaddedConv2d
from effkernels.ops import backends
from effkernels.optimize.probing import Unknown, activation_of, gate_of, is_mean_over_image, padding_of


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.Identity(), "identity"),
        (nn.Dropout(0.5).eval(), "identity"),
        (nn.ReLU(inplace=True), "relu"),
        (lambda x: x.clamp(min=0), "relu"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.SiLU(), "silu"),
        (Custom.apply, "silu"),
        (lambda x: x * F.relu6(x + 3) / 6, "hard_swish"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.Hardtanh(0.0, 20.0), None),
        (nn.Hardtanh(-1e30, 1e30), None),
        (lambda x: x.clamp(min=-100.0), None),
        (lambda x: torch.where(x > 1e20, x * 0.5, x), None),
        (lambda x: torch.nan_to_num(x), None),
        (lambda x: torch.roll(x, 3, dims=1), None),
        (lambda x: F.channel_shuffle(x, 3), None),
        (lambda x: x.narrow(1, 0, 3), None),
        (lambda x: F.interpolate(x, size=(11, 13)), None),
        (nn.Softplus(), None),
        (nn.LeakyReLU(), None),
        (nn.Softmax(1), None),
        (lambda x: x.flatten(1), None),
        (lambda x: x[0], None),
        (lambda x: x.missing, None),
    ],
)
def test_activations_are_known_by_what_they_compute(function: Callable[[Tensor], Tensor], name: str | None) -> None:
    assert activation_of(function) == name


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.Sigmoid(), "sigmoid"),
        (lambda x: 1 / (1 + (-x).exp()), "sigmoid"),
        (nn.Hardsigmoid(), "hard_sigmoid"),
        (lambda x: F.relu6(x + 3) / 6, "hard_sigmoid"),
        (nn.Tanh(), None),
        (nn.Identity(), None),
    ],
)
def test_gates_are_known_by_what_they_compute(function: Callable[[Tensor], Tensor], name: str | None) -> None:
    assert gate_of(function) == name


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (nn.AdaptiveAvgPool2d(1), True),
        (nn.AdaptiveAvgPool2d((1, 1)), True),
        (lambda x: x.mean((-2, -1)), True),
        (nn.AdaptiveMaxPool2d(1), False),
        (nn.AdaptiveAvgPool2d(2), False),
        (lambda x: x.mean(1), False),
    ],
)
def test_means_over_the_image_are_known(function: Callable[[Tensor], Tensor], wanted: bool) -> None:
    assert is_mean_over_image(function) is wanted


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Plain(nn.Conv2d):
    """A subclass that adds nothing."""


def _convolutions() -> list[tuple[nn.Conv2d, object]]:
    import_timm()
    from timm.layers.conv2d_same import Conv2dSame

    import_lukemelas()
    from efficientnet_pytorch.utils import Conv2dDynamicSamePadding, Conv2dStaticSamePadding

    return [
        (nn.Conv2d(4, 4, 3, 2, (1, 0)), (1, 1, 0, 0)),
        (nn.Conv2d(4, 4, 5, padding="same"), (2, 2, 2, 2)),
        (nn.Conv2d(4, 4, 3, padding="valid"), (0, 0, 0, 0)),
        (Plain(4, 4, 3, 2, 1), (1, 1, 1, 1)),
        (PaddedConv2d(4, 4, 5, 2, pad_type="same"), None),
        (PaddedConv2d(4, 4, 3, 2, pad_type="same_native", native_size=(8, 9)), (0, 1, 1, 1)),
        (Conv2dSame(4, 4, 5, 2), None),
        (Conv2dSame(8, 8, 3, 2, groups=8), None),
        (Conv2dDynamicSamePadding(4, 4, 3, stride=2), None),
        (Conv2dStaticSamePadding(4, 4, 3, stride=2, image_size=8), (0, 1, 0, 1)),
        (Conv2dStaticSamePadding(4, 4, 5, stride=2, image_size=9), (2, 2, 2, 2)),
        (Standardised(4, 4, 3, 1, 1), Unknown),
        (nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect"), (1, 1, 1, 1)),
        (Plain(4, 4, 3, 1, 1, padding_mode="reflect"), Unknown),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, 1, 1)), Unknown),
    ]


@pytest.mark.parametrize("index", range(15))
def test_the_padding_of_any_class_is_known_by_what_it_computes(index: int) -> None:
    conv, wanted = _convolutions()[index]
    if wanted is Unknown:
        with pytest.raises(Unknown):
            padding_of(conv)
        return
    before = copy.deepcopy(conv.state_dict())
    assert padding_of(conv).sides == wanted
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


class Chain(nn.Module):
    """A module whose forward is a function of itself; `parts` become its modules."""

    def __init__(self, function: Callable[[Chain, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _with_stem(chain: nn.Module) -> nn.Module:
    """Return the chain after a convolution that makes its eight channels, randomised together."""
    return randomise(nn.Sequential(nn.Conv2d(3, 8, 1), chain))[1]


def _depthwise(**options: object) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=options.pop("padding", 1), groups=8, bias=False, **options)


def _excite(channels: int = 8) -> dict[str, nn.Module]:
    return {"fc1": nn.Conv2d(channels, 4, 1), "fc2": nn.Conv2d(4, channels, 1)}


def _classic_excite(m: Chain, x: Tensor) -> Tensor:
    b, c, _, _ = x.size()
    y = F.adaptive_avg_pool2d(x, 1).view(b, c)
    y = torch.sigmoid(m.fc2(F.relu(m.fc1(y)))).view(b, c, 1, 1)
    return x * y.expand_as(x)


def _excite_in_place(m: Chain, x: Tensor) -> Tensor:
    x *= m.fc2(F.relu(m.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
    return x


CHAINS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # name: (chain, its operators)
    "conv_norm": (lambda: Chain(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(8, 32, 3), b=nn.BatchNorm2d(32)), "conv_bn_act"),
    "conv_act": (lambda: Chain(lambda m, x: F.silu(m.a(x)), a=nn.Conv2d(8, 6, 1)), "pointwise_bn_act"),
    "strided_1x1": (
        lambda: Chain(lambda m, x: m.b(m.a(x)).relu(), a=nn.Conv2d(8, 6, 1, 2), b=nn.BatchNorm2d(6)),
        "conv_bn_act",
    ),
    "written_out_silu": (
        lambda: Chain(lambda m, x: (lambda y: y * y.sigmoid())(m.b(m.a(x))), a=_depthwise(), b=nn.BatchNorm2d(8)),
        "depthwise_bn_act",
    ),
    "norm_without_affine": (
        lambda: Chain(lambda m, x: F.gelu(m.b(m.a(x))), a=_depthwise(), b=nn.BatchNorm2d(8)),
        "depthwise_bn_act",
    ),
    "padded_by_a_module": (
        lambda: Chain(
            lambda m, x: m.b(m.a(m.p(x))),
            p=nn.ZeroPad2d((0, 1, 2, 1)), a=_depthwise(padding=0, stride=2), b=nn.BatchNorm2d(8),
        ),
        "depthwise_bn_act",
    ),
    "padded_by_a_function": (
        lambda: Chain(
            lambda m, x: m.b(m.a(F.pad(x, (1, 1, 0, 1)))).relu(), a=nn.Conv2d(8, 33, 3, 1, (1, 0)), b=nn.BatchNorm2d(33)
        ),
        "conv_bn_act",
    ),
    "residual_of_another_path": (
        lambda: Chain(
            lambda m, x: F.avg_pool2d(x, 1) + m.d(m.b(m.a(x))), a=nn.Conv2d(8, 8, 1), b=nn.BatchNorm2d(8),
            d=nn.Dropout(0.3),
        ),
        "pointwise_bn_act",
    ),
    "residual_in_place": (
        lambda: Chain(lambda m, x: m.b(m.a(x)).add_(x), a=nn.Conv2d(8, 8, 1), b=nn.BatchNorm2d(8)),
        "pointwise_bn_act",
    ),
    "copied_and_overwritten": (
        lambda: Chain(lambda m, x: x.clone().mul_(2) + m.b(m.a(x)), a=nn.Conv2d(8, 8, 1), b=nn.BatchNorm2d(8)),
        "pointwise_bn_act",
    ),
    "two_branches": (
        lambda: Chain(
            lambda m, x: m.b(m.a(x)) + m.d(m.c(x)), a=nn.Conv2d(8, 8, 1), b=nn.BatchNorm2d(8),
            c=_depthwise(), d=nn.BatchNorm2d(8),
        ),
        "depthwise_bn_act pointwise_bn_act",
    ),
    "excited_depthwise": (
        lambda: Chain(
            lambda m, x: _classic_excite(m, m.b(m.a(x)).relu()), a=_depthwise(), b=nn.BatchNorm2d(8),
            fc1=nn.Linear(8, 4), fc2=nn.Linear(4, 8, bias=False),
        ),
        "depthwise_bn_act_gate",
    ),
    "excited_in_place": (
        lambda: Chain(
            lambda m, x: m.d(m.c(_excite_in_place(m, m.b(m.a(x)).relu()))),
            a=_depthwise(), b=nn.BatchNorm2d(8), **_excite(), c=nn.Conv2d(8, 4, 1), d=nn.BatchNorm2d(4),
        ),
        "mbconv depthwise_bn_act_gate pointwise_bn_act",
    ),
    "excited_in_one": (
        lambda: Chain(
            lambda m, x: (lambda y: m.fc2(m.fc1(y.mean((2, 3), True))).sigmoid() * y)(m.b(m.a(x))),
            a=_depthwise(), b=nn.BatchNorm2d(8), **_excite(),
        ),
        "depthwise_bn_act_se",
    ),
    "excited_dense": (
        lambda: Chain(
            lambda m, x: m.d(m.c((lambda y: y * F.hardsigmoid(m.fc2(m.fc1(y.mean((2, 3), True)).relu())))(
                m.b(m.a(x))
            ))),
            a=nn.Conv2d(8, 32, 3), b=nn.BatchNorm2d(32), **_excite(32), c=nn.Conv2d(32, 4, 1), d=nn.BatchNorm2d(4),
        ),
        "conv_bn_act pointwise_bn_act squeeze_excite_gate",
    ),
    "excite_alone": (lambda: Chain(lambda m, x: _classic_excite(m, x), fc1=nn.Linear(8, 4), fc2=nn.Linear(4, 8)), ""),
    "excite_alone_by_convolutions": (
        lambda: Chain(lambda m, x: x * torch.sigmoid(m.fc2(F.silu(m.fc1(x.mean((2, 3), True))))), **_excite()),
        "squeeze_excite_gate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_every_form(name: str) -> None:
    make, ops = CHAINS[name]
    chain = _with_stem(make())
    if name == "norm_without_affine":
        chain.b.weight = chain.b.bias = None
    plain = copy.deepcopy(chain)
    report = effkernels.optimize_(chain)
    if not ops:  # without a convolution there is nothing to look for
        assert report.blocks == ()
        return
    assert report.fused == 1, str(report)
    (program,) = chain._effkernels_programs.values()
    called = {op for op in backends.OPERATORS if f"{op}(" in program.source}
    assert called == set(ops.split())
    for size in ((9, 11), (12, 7)):
        x = images(2, *size, channels=8)
        with torch.no_grad():
            others = [plain(x), plain(x.contiguous(memory_format=torch.channels_last))]
            assert_parity(chain(x), others, copy.deepcopy(plain).double()(x.double()))


def _overwriting(m: Chain, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    return F.relu(x, inplace=True) + y


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "grouped": (
        lambda: Chain(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(8, 8, 3, groups=2), b=nn.BatchNorm2d(8)),
        "groups=2 of 8 channels is neither dense nor depthwise",
    ),
    "large_kernel": (
        lambda: Chain(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(8, 8, (3, 15), groups=8), b=nn.BatchNorm2d(8)),
        "a depthwise kernel of 3x15; allowed: 1 to 13 for its height and its width",
    ),
    "depth_multiplier": (
        lambda: Chain(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(8, 16, 3, groups=8), b=nn.BatchNorm2d(16)),
        "a depth multiplier of 2 (8 to 16 channels); the depthwise operators take one filter a channel",
    ),
    "large_stride": (
        lambda: Chain(lambda m, x: m.b(m.a(x)), a=_depthwise(stride=3), b=nn.BatchNorm2d(8)),
        "stride=3 of a depthwise convolution; allowed: 1, 2",
    ),
    "oblong_stride": (
        lambda: Chain(lambda m, x: m.b(m.a(x)), a=_depthwise(stride=(1, 2)), b=nn.BatchNorm2d(8)),
        "differs between the axes",
    ),
    "dilated_dense": (
        lambda: Chain(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(8, 8, 3, dilation=2), b=nn.BatchNorm2d(8)),
        "dilation=2 of a dense convolution",
    ),
    "parametrised": (
        lambda: Chain(
            lambda m, x: m.b(m.a(x)), a=nn.utils.parametrizations.weight_norm(_depthwise()), b=nn.BatchNorm2d(8)
        ),
        "Parametrized",
    ),
    "no_statistics": (
        lambda: Chain(lambda m, x: m.b(m.a(x)), a=_depthwise(), b=nn.BatchNorm2d(8, track_running_stats=False)),
        "the norm has no running statistics",
    ),
    "group_norm": (
        lambda: Chain(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(8, 32, 3), b=nn.GroupNorm(2, 32)),
        "what follows it, b, cannot be fused",
    ),
    "nothing_follows_a_dense_convolution": (
        lambda: Chain(lambda m, x: (lambda y: m.b(y) - y)(m.a(x)), a=nn.Conv2d(8, 32, 3), b=nn.BatchNorm2d(32)),
        "there is nothing after it to fuse with",
    ),
    "control_flow": (
        lambda: Chain(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else x, a=_depthwise(), b=nn.BatchNorm2d(8)),
        "its forward cannot be traced",
    ),
    "two_inputs": (
        lambda: _TwoInputs(),
        "its forward takes more than one input (x, y)",
    ),
    "overwritten_view": (
        lambda: Chain(
            lambda m, x: m.d(x).flatten(2).mul_(2).sum() + m.b(m.a(x)),
            a=_depthwise(),
            b=nn.BatchNorm2d(8),
            d=nn.Dropout(),
        ),
        "overwrites a value that is read elsewhere too",
    ),
    "overwritten_input": (
        lambda: Chain(_overwriting, a=_depthwise(), b=nn.BatchNorm2d(8)),
        "overwrites a value that is read elsewhere too",
    ),
}


class _TwoInputs(Chain):
    def __init__(self) -> None:
        super().__init__(lambda m, x: x, a=_depthwise(), b=nn.BatchNorm2d(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(self.a(x)) + y


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fused_stays_and_the_reason_is_told(name: str) -> None:
    make, reason = REFUSED[name]
    chain = make().eval()
    report = effkernels.optimize_(chain)
    assert [block.fused for block in report.blocks] == [False], str(report)
    assert reason in report.blocks[0].reason
    assert "_effkernels_programs" not in chain.__dict__


def test_a_wrong_match_is_found_out_by_trying_it() -> None:
    """A forward that hides from the trace what it does: the comparison with the original notices."""

    class Hiding(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return y if isinstance(y, torch.fx.Proxy) else y + 0.01

    chain = Hiding(lambda m, x: x, a=_depthwise(), b=nn.BatchNorm2d(8)).eval()
    (block,) = effkernels.optimize_(chain).blocks
    assert not block.fused
    assert "its fused form is off by" in block.reason
    assert type(chain) is Hiding


@pytest.mark.parametrize("error", [1.0e-6, 1.0e-5])
def test_an_error_of_the_size_of_rounding_is_found_out_too(error: float) -> None:
    """Some three, or thirty, times what is allowed, whatever the input: more inputs do not excuse it."""

    class Hiding(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return y if isinstance(y, torch.fx.Proxy) else y * (1 + error)

    (block,) = effkernels.optimize_(Hiding(lambda m, x: x, a=_depthwise(), b=nn.BatchNorm2d(8)).eval()).blocks
    assert not block.fused
    assert "its fused form is off by" in block.reason


@pytest.mark.parametrize("seed", [130, 258])
def test_the_worst_rounding_of_few_numbers_refuses_nothing(seed: int) -> None:
    """Of these stems, a single small input gave more than twice PyTorch's largest error: one of a hundred does."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = import_torchvision().models.mobilenet_v3_small(weights=None).eval()
    report = effkernels.optimize_(model)
    assert report.fused == len(report.blocks), str(report)


class SizedLayer(nn.Module):
    """Pads by numbers that depend on the size of the image; `extra` more than SAME does."""

    __module__ = "transformers.models.of_this_test"

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, 2, groups=8), nn.BatchNorm2d(8), nn.ReLU6()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size in reversed(x.shape[2:]):
            total = max(3 - (int(size) % 2 or 2), 0)
            sides += [total // 2, total - total // 2 + self.extra]
        return self.act(self.norm(self.conv(F.pad(x, sides))))


def test_a_layer_that_cannot_be_traced_is_guessed_and_the_guess_is_tried() -> None:
    layer = _with_stem(SizedLayer(0))
    plain = copy.deepcopy(layer)
    assert effkernels.optimize_(layer, strict=True).fused == 1
    for size in ((9, 11), (12, 10), (9, 10)):
        x = images(2, *size, channels=8)
        with torch.no_grad():
            assert_parity(layer(x), plain(x), copy.deepcopy(plain).double()(x.double()))
    (block,) = effkernels.optimize_(SizedLayer(2).eval()).blocks
    assert not block.fused


def test_a_layer_of_unknown_origin_is_not_guessed() -> None:
    layer = type("Own", (SizedLayer,), {"__module__": "somebodys"})(0).eval()
    (block,) = effkernels.optimize_(layer).blocks
    assert not block.fused
    assert "its forward cannot be traced" in block.reason


def test_quantised_convolutions_stay() -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32)).eval()
    quantised = nn.Sequential(torch.ao.nn.quantized.Conv2d(8, 8, 3), nn.ReLU())
    report = effkernels.optimize_(nn.Sequential(model, quantised))
    assert {block.name: block.fused for block in report.blocks} == {"0.0": True, "1.0": False}


def test_a_module_used_twice_is_fused_once() -> None:
    block = Chain(lambda m, x: m.b(m.a(x)).relu(), a=_depthwise(), b=nn.BatchNorm2d(8))
    model = nn.Sequential(block, block)
    randomise(nn.Sequential(nn.Conv2d(3, 8, 1), model))
    plain = copy.deepcopy(model)
    assert effkernels.optimize_(model).fused == 1
    x = images(1, 9, 9, channels=8)
    with torch.no_grad():
        assert_parity(model(x), plain(x), copy.deepcopy(plain).double()(x.double()))


@pytest.mark.parametrize(("device", "fused"), [("cpu", 0), ("meta", 1)])
def test_a_wide_dense_convolution_is_left_to_pytorch_on_the_cpu(device: str, fused: int) -> None:
    model = nn.Sequential(nn.Conv2d(128, 8, 3, device=device), nn.BatchNorm2d(8, device=device), nn.ReLU()).eval()
    report = effkernels.optimize_(model, input_size=(128, 8, 8))
    assert report.fused == fused
    if not fused:
        assert "128 input channels of a 3x3 convolution: PyTorch's is faster there" in report.blocks[0].reason

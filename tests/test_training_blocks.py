"""A block in training mode runs as one operator and gives PyTorch's results, gradients and running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from parity import assert_parity, joined
from peer_models import images, small
from torch import Tensor, nn

import effkernels
from effkernels.nn import DepthwiseSeparable, MBConv, set_recompute, training_problem, training_report
from effkernels.ops import training_steps

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mbconv": lambda: MBConv(24, 24, 5, se_channels=6),
    "stride2-same": lambda: MBConv(24, 40, 3, 2, se_channels=6, pad_type="same"),
    "mobilenet-v2": lambda: MBConv(24, 24, 3, activation="relu6"),
    "mobilenet-v3": lambda: MBConv(
        8, 8, 5, se_channels=6, activation="hard_swish", se_activation="relu", gate_activation="hard_sigmoid"
    ),
    "dilated": lambda: MBConv(24, 24, 3, dilation=2, se_channels=6, expansion=1),
    "separable": lambda: DepthwiseSeparable(24, 16, se_channels=6),
    "separable-skip": lambda: DepthwiseSeparable(24, 24, 3, 1, se_channels=6, activation="gelu"),
    "odd-channels": lambda: MBConv(23, 23, 3, expansion=3, se_channels=5, activation="gelu_tanh"),
    "drop-path": lambda: MBConv(24, 24, 3, se_channels=6, drop_path_rate=0.5),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.3)
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return block.train().to(dtype)


def plainly(block: nn.Module) -> nn.Module:
    """A copy that runs module by module."""
    block = copy.deepcopy(block)
    block.backend = "reference"
    assert training_problem(block)
    return block


def step(block: nn.Module, x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    y = block(x)
    weights = images(*y.shape[:1], *y.shape[2:], y.shape[1], seed=9).to(y.dtype)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in block.named_buffers()}


def assert_step(block: nn.Module, x: Tensor, draws: int = 3, device: str = "cpu") -> None:
    """The fused step keeps to the tolerance rule: against the plain one in the same dtype and in float64.

    Several draws of x are judged together: the gradient of a norm is what sums of both signs leave, and for the few
    numbers of one draw PyTorch's own error is a matter of luck.

    Args:
        device: where the fused step runs; the others run on the CPU.
    """
    assert training_problem(block) is None
    results: dict[str, list[list[Tensor]]] = {}
    for draw in range(draws):
        image = (x.double() + images(*x.shape[:1], *x.shape[2:], x.shape[1], seed=draw).double() * (draw > 0)).to(
            x.dtype
        )
        plain = plainly(block)
        truth = step(copy.deepcopy(plain).double(), image.double())
        # PyTorch has two ways that are equally right; its own error is the larger one.
        layouts = image, image.contiguous(memory_format=torch.channels_last)
        own, other = (step(copy.deepcopy(plain), layout) for layout in layouts)
        found = step(copy.deepcopy(block).to(device), image.to(device))
        found = {name: value.cpu() for name, value in found.items()}
        assert found.keys() == own.keys() == truth.keys()
        for name, wanted in truth.items():
            if name.endswith("num_batches_tracked"):
                assert int(found[name]) == int(own[name])
            else:
                results.setdefault(name, []).append([found[name], own[name], other[name], wanted])
    for name, results_of_draws in results.items():
        result, own, other, wanted = map(joined, zip(*results_of_draws, strict=True))
        assert_parity(result, [own, other], wanted, name)


def image(block: nn.Module, batch: int = 5, height: int = 13, width: int = 11) -> Tensor:
    conv = block.conv_pw if isinstance(block, MBConv) else block.conv_dw
    return images(batch, height, width, conv.in_channels)


@pytest.mark.parametrize("recompute", [None, "expand"])
@pytest.mark.parametrize("name", BLOCKS)
def test_float64_equals_plain(name: str, recompute: str | None) -> None:
    block = build(name, torch.float64)
    plain, x = plainly(block), image(block).double()
    set_recompute(block, recompute)
    found, wanted = step(block, x), step(plain, x)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_keep_to_the_tolerance_rule(name: str, dtype: torch.dtype) -> None:
    block = build(name, dtype)
    assert_step(block, image(block).to(dtype))


# A norm of two or three values divides by their distance, which in some channel is almost nothing: any error is right.
@pytest.mark.parametrize("size", [(9, 1, 1), (1, 7, 9), (3, 30, 33)], ids=str)
@pytest.mark.parametrize("name", ["mbconv", "separable", "odd-channels"])
def test_sizes(name: str, size: tuple[int, int, int]) -> None:
    block = build(name)
    assert_step(block, image(block, *size))


@pytest.mark.parametrize("name", ["mbconv", "stride2-same", "separable-skip"])
def test_gradcheck(name: str) -> None:
    block = build(name, torch.float64)
    names, values = zip(*block.named_parameters(), strict=True)
    x = image(block, 2, 4, 3).double().requires_grad_()

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(copy.deepcopy(block), dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *(v.detach().clone().requires_grad_() for v in values)), fast_mode=True)


def test_memory_formats_give_the_same_bits() -> None:
    block, other = build("mbconv"), build("mbconv")
    x = image(block)
    found, wanted = step(block, x), step(other, x.contiguous(memory_format=torch.channels_last))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert found["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("which", ["bn1", "bn2", "bn3", "all"])
def test_frozen_norms(which: str) -> None:
    block = build("drop-path")
    for name in ("bn1", "bn2", "bn3") if which == "all" else (which,):
        getattr(block, name).eval()
    assert_step(block, image(block))


def _cumulative(norm: nn.BatchNorm2d) -> None:
    norm.momentum = None


def _untracked(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def _without_affine(norm: nn.BatchNorm2d) -> None:
    norm.affine = False
    norm.weight = norm.bias = None


@pytest.mark.parametrize("change", [_cumulative, _untracked, _without_affine])
def test_settings_of_norms(change: Callable[[nn.BatchNorm2d], None]) -> None:
    block = build("mbconv")
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            change(module)
    assert_step(block, image(block))


def test_running_statistics_over_twenty_steps() -> None:
    block = build("mbconv")
    plain = plainly(block)
    exact = copy.deepcopy(plain).double()
    for seed in range(20):
        x = images(4, 9, 9, 24, seed)
        for one in (block, plain, exact):
            one(x.to(one.conv_pw.weight.dtype))
    for (name, found), own, wanted in zip(block.named_buffers(), plain.buffers(), exact.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert int(found) == 20
        else:
            assert_parity(found, own, wanted, name)


def test_one_value_of_a_channel_is_refused_as_by_pytorch() -> None:
    block = build("mbconv")
    x = images(1, 1, 1, 24)
    with pytest.raises(ValueError, match="more than 1 value") as wanted:
        plainly(block)(x)
    with pytest.raises(ValueError, match="more than 1 value") as found:
        block(x)
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_statistics_do_not_cancel(mean: float) -> None:
    """A thousand deviations off zero, and a constant channel."""
    t = (images(4, 33, 31, 20) + mean).permute(0, 2, 3, 1).contiguous()
    t[..., 0] = mean
    found, own = training_steps.statistics(t)[:2], torch.var_mean(t, (0, 1, 2), correction=0)[::-1]
    truth = torch.var_mean(t.double(), (0, 1, 2), correction=0)[::-1]
    for one, plain, wanted in zip(found, own, truth, strict=True):
        assert_parity(one, plain.contiguous(), wanted)
    assert float(found[1][0]) == 0.0


@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_statistics_of_the_depthwise_convolution_do_not_cancel(mean: float) -> None:
    """As above, of a convolution whose result is its input."""
    t = (images(4, 33, 31, 20) + mean).permute(0, 2, 3, 1).contiguous()
    t[..., 0] = mean
    weight = torch.zeros(20, 1, 3, 3)
    weight[:, :, 1, 1] = 1.0
    z, vectors = training_steps.depthwise(t, None, "identity", weight, None, 1, (1, 1, 1, 1), 1)
    found = vectors[:2]
    assert torch.equal(z, t)
    own, truth = (torch.var_mean(one, (0, 1, 2), correction=0)[::-1] for one in (t, t.double()))
    for one, plain, wanted in zip(found, own, truth, strict=True):
        assert_parity(one, plain.contiguous(), wanted)
    assert float(found[1][0]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_have_the_same_bits_also_with_deterministic_algorithms(dtype: torch.dtype) -> None:
    block = build("mbconv", dtype)
    x = image(block).to(dtype)
    wanted = step(copy.deepcopy(block), x)
    torch.use_deterministic_algorithms(True)
    try:
        results = [step(copy.deepcopy(block), x) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for found in results:
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_partial_gradients() -> None:
    names = [name for name, _ in build("mbconv").named_parameters()]
    for trained in (["conv_pwl.weight"], ["conv_dw.weight", "bn2.bias"], ["bn1.weight"], names[:1], names[3:]):
        block = build("mbconv")
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in trained)
        plain, x = plainly(block), image(block)
        exact = copy.deepcopy(plain).double()
        for one in (block, plain, exact):
            one(x.to(one.conv_pw.weight.dtype)).square().sum().backward()
        assert [name for name, p in block.named_parameters() if p.grad is not None] == trained
        found, own, truth = ([p.grad for p in one.parameters() if p.requires_grad] for one in (block, plain, exact))
        assert_parity(joined(found), joined(own), joined(truth))


def test_gradients_accumulate() -> None:
    block, x = build("mbconv"), image(build("mbconv"))
    single = copy.deepcopy(block)
    first = step(single, x)
    second = step(copy.deepcopy(block).train(), 2 * x)
    step(block, x)
    block(image(block)).detach()
    twice = step(block, 2 * x)
    for name in ("conv_pw.weight", "conv_dw.weight", "bn3.weight"):
        torch.testing.assert_close(twice[name], first[name] + second[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    block = build("mbconv")
    plain, x = plainly(block), image(block)
    truth = step(copy.deepcopy(plain).double(), x.double())
    results = []
    for one in (block, plain):
        with torch.autocast("cpu", dtype):
            results.append(step(one, x))
    found, own = results
    for name, value in own.items():
        assert found[name].dtype == value.dtype, name
        if not name.endswith("num_batches_tracked"):
            assert_parity(found[name], value, truth[name], name)


def test_gradient_scaler() -> None:
    block = build("mbconv")
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1)
    before, scales = block.conv_pw.weight.detach().clone(), []
    for _ in range(40):
        with torch.autocast("cpu", torch.float16):
            loss = block(image(block)).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert min(scales) < 2.0**40  # overflows were seen and skipped
    assert torch.isfinite(block.conv_pw.weight).all()
    assert not torch.equal(block.conv_pw.weight, before)


def test_checkpointing_and_functional_call() -> None:
    block, x = build("drop-path"), image(build("drop-path"))
    wanted = step(copy.deepcopy(block), x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    found = step(Checkpointed(), x)
    for name, value in wanted.items():
        if "running" not in name and "tracked" not in name:  # a checkpointed batch counts twice, in PyTorch too
            assert torch.equal(found[name if name in ("x", "y") else f"block.{name}"], value), name
    doubled = {name: 2 * p.detach() for name, p in block.named_parameters()}
    torch.manual_seed(0)
    called = torch.func.functional_call(block, doubled, (x,))
    block.load_state_dict(doubled, strict=False)
    torch.manual_seed(0)
    assert torch.equal(called, block(x))


def test_a_second_derivative_is_refused_and_the_message_helps() -> None:
    block, x = build("mbconv"), image(build("mbconv")).requires_grad_()
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*reference"):
        gradient.sum().backward()
    with effkernels.backend("reference"):
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()
    assert x.grad is not None


def test_training_and_eval_alternate() -> None:
    block = build("mbconv")
    plain, x = plainly(block), image(block)
    exact = copy.deepcopy(plain).double()
    for _ in range(2):
        for training in (True, False):
            found, own, truth = (one.train(training)(x.to(one.conv_pw.weight.dtype)) for one in (block, plain, exact))
            assert_parity(found, own, truth)


def _hook(block: nn.Module) -> None:
    block.conv_dw.register_forward_hook(lambda *arguments: None)


def _group_norm(block: nn.Module) -> None:
    block.bn1 = nn.GroupNorm(4, block.bn1.num_features)


def _excite_otherwise(block: nn.Module) -> None:
    block.se = nn.Sequential(block.se)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "depthwise convolution"),
        (_group_norm, "GroupNorm"),
        (_excite_otherwise, "squeeze-and-excitation"),
    ],
)
def test_the_report_names_what_keeps_a_block_from_training_fused(change: Callable, reason: str) -> None:
    model = small().train()
    assert training_report(model) == {}
    change(model.blocks[1][0])
    (name,) = training_report(model)
    assert name == "blocks.1.0"
    assert reason in training_report(model)[name]
    assert model(images(2, 33, 31)).shape == (2, 10)


def test_set_recompute_refuses_other_values() -> None:
    with pytest.raises(ValueError, match="recompute='all' is not known; allowed: None, 'expand'"):
        set_recompute(small(), "all")

"""`optimize_` on one small block and one small network: what it promises whoever calls it."""

from __future__ import annotations

import copy
import io
import json
import pickle
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from optimize_network import Block, Network, assert_as_before, is_fused, programs
from parity import assert_parity
from peer_models import images, randomise
from torch import Tensor, nn

import effkernels
from effkernels.optimize import NotFusedError

NAMES = ["stem", "blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture
def network() -> nn.Module:
    return randomise(Network())


@pytest.fixture
def x() -> Tensor:
    return images(2, 33, 35)


# ------------------------------------------------------------------------------------------------------- the report


def test_the_report_names_every_block(network: nn.Module) -> None:
    report = effkernels.optimize_(network, input_size=32)
    assert [block.name for block in report.blocks] == NAMES
    assert [block.kind for block in report.blocks] == ["conv_norm_act", "mbconv", "mbconv", "mbconv"]
    assert report.fused == 4
    assert all(block.fused and not block.reason for block in report.blocks)
    listed = json.loads(report.to_json())
    assert listed["fused"] == 4
    assert listed["input_size"] == [3, 32, 32]
    text = str(report)
    assert all(name in text for name in NAMES)
    assert "4 of 4 blocks run fused" in text


def test_a_model_with_nothing_to_fuse_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    report = effkernels.optimize_(model)
    assert report.fused == 0
    assert str(report) == "Sequential: nothing to fuse"
    assert programs(model) == []


def test_our_own_models_need_no_optimising() -> None:
    model = effkernels.create_model("efficientnet_b0", device="meta").eval()
    report = effkernels.optimize_(model)
    assert report.fused == 0
    assert "effkernels' operators already" in str(report)


def test_figures_are_left_out_where_the_model_does_not_take_the_image(network: nn.Module) -> None:
    network.head = nn.Linear(7, 5)
    report = effkernels.optimize_(network)
    assert report.input_size is None
    assert all(block.launches_before is None and block.bytes_after is None for block in report.blocks)
    assert any("not counted" in note for note in report.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode='fast' is not known; allowed: 'inference', 'training'"),
        ({"backend": "tpu"}, "backend='tpu' is not a backend; allowed: auto, cuda, triton, cpu, reference"),
        ({"input_size": 0}, "input_size=0; allowed: PIXELS"),
        ({"input_size": (1, 2, 3, 4)}, "input_size=.*; allowed: PIXELS"),
    ],
)
def test_wrong_arguments_are_refused(network: nn.Module, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effkernels.optimize_(network, **arguments)
    assert programs(network) == []


def test_what_the_filter_refuses_is_left_out(network: nn.Module, x: Tensor) -> None:
    plain = copy.deepcopy(network)
    asked = []

    def allows(module: nn.Module, name: str) -> bool:
        asked.append((name, module))
        return name not in ("stem", "blocks.1")

    report = effkernels.optimize_(network, filter_fn=allows, strict=True)
    assert {block.name: block.reason for block in report.blocks if not block.fused} == {
        "stem": "left out by filter_fn",
        "blocks.1": "left out by filter_fn",
    }
    assert all(network.get_submodule(name) is module for name, module in asked)
    assert type(network.blocks[1]) is Block
    assert_as_before(network, plain, x)


def test_a_filter_that_refuses_everything_is_named_in_the_report(network: nn.Module) -> None:
    """One with its arguments the other way round, say: it compares a name with a module."""
    report = effkernels.optimize_(network, filter_fn=lambda fqn, module: fqn == "blocks.0")
    assert report.fused == 0
    assert any("filter_fn left out all" in note and "filter_fn(module, fqn)" in note for note in report.notes)
    assert "filter_fn(module, fqn)" in str(report)


def test_strict_raises_and_leaves_the_model_as_it_was(network: nn.Module) -> None:
    network.blocks[1].depthwise.stride = (3, 3)
    with pytest.raises(NotFusedError, match=r"blocks\.1 .*depthwise stays as it is: stride=3") as caught:
        effkernels.optimize_(network, strict=True)
    assert isinstance(caught.value, ValueError)
    assert programs(network) == []
    assert type(network) is Network


# ------------------------------------------------------------------------------------------- in place and reversible


def test_nothing_but_the_class_of_a_module_changes(network: nn.Module, x: Tensor) -> None:
    modules, parameters = list(network.modules()), list(network.parameters())
    text, names = repr(network), [name for name, _ in network.named_modules()]
    before = network(x)
    effkernels.optimize_(network)
    assert all(one is other for one, other in zip(network.modules(), modules, strict=True))
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    assert isinstance(network, Network)
    assert isinstance(network.blocks, nn.Sequential)
    assert isinstance(network.blocks[0], Block)
    assert repr(network) == text
    assert [name for name, _ in network.named_modules()] == names
    assert effkernels.restore_(network) == 4
    assert [type(one) for one in (network, network.blocks, network.blocks[0])] == [Network, nn.Sequential, Block]
    assert programs(network) == []
    assert torch.equal(network(x), before)
    assert effkernels.restore_(network) == 0


def test_optimising_again_starts_afresh(network: nn.Module, x: Tensor) -> None:
    first = effkernels.optimize_(network, filter_fn=lambda module, name: name == "blocks.0")
    assert first.fused == 1
    assert effkernels.optimize_(network).fused == 4
    assert effkernels.restore_(network) == 4


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), _through_a_file]
)
def test_copies_are_fused_too(network: nn.Module, x: Tensor, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    effkernels.optimize_(network)
    other = duplicate(network)
    assert type(other) is type(network)
    assert len(programs(other)) == len(programs(network)) == 5  # the network, its Sequential, three blocks
    with torch.no_grad():
        assert torch.equal(other(x), network(x))
    assert effkernels.restore_(copy.deepcopy(other)) == 4


def test_a_slice_of_an_optimised_sequential_runs(network: nn.Module, x: Tensor) -> None:
    effkernels.optimize_(network)
    features = images(1, 9, 9, channels=8)
    with torch.no_grad():
        assert torch.equal(network.blocks[:2](features), network.blocks[1](network.blocks[0](features)))


def test_modes_and_the_random_state_do_not_change(network: nn.Module) -> None:
    network.train()
    network.blocks[1].eval()
    modes = [module.training for module in network.modules()]
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    assert effkernels.optimize_(network).fused == 4
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.rand(2), wanted)


def test_weights_may_change_at_any_time(network: nn.Module, x: Tensor) -> None:
    effkernels.optimize_(network)
    other = randomise(Network(), seed=5)
    network.load_state_dict(other.state_dict())
    network.blocks[0].bn1.eps = other.blocks[0].bn1.eps = 0.3
    assert_as_before(network, other, x)


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, nn.Module.half])
@pytest.mark.parametrize("first", [True, False])
def test_the_dtype_may_change_before_and_after(
    network: nn.Module, x: Tensor, change: Callable[[nn.Module], nn.Module], first: bool
) -> None:
    plain = copy.deepcopy(network)
    for step in (change, effkernels.optimize_) if first else (effkernels.optimize_, change):
        step(network)
    assert is_fused(network.blocks[0], change(Block(8, 8)).expand.weight.new_ones(1, 8, 5, 5))
    dtype = network.head.weight.dtype
    assert_as_before(network, change(plain), x.to(dtype))


def test_it_works_under_inference_mode(network: nn.Module, x: Tensor) -> None:
    plain = copy.deepcopy(network)
    with torch.inference_mode():
        assert effkernels.optimize_(network).fused == 4
        network(x)
    assert not any(tensor.is_inference() for tensor in network.state_dict().values())
    assert_as_before(network, plain, x)
    network(x).sum().backward()


def test_autocast_is_followed(network: nn.Module, x: Tensor) -> None:
    plain, exact = copy.deepcopy(network), copy.deepcopy(network).double()
    effkernels.optimize_(network)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result, wanted = network(x), plain(x)
    assert result.dtype == torch.bfloat16
    with torch.no_grad():
        assert_parity(result, wanted, exact(x.double()))


def test_a_forced_backend_is_used(network: nn.Module, x: Tensor) -> None:
    report = effkernels.optimize_(network, backend="reference")
    assert {block.backend for block in report.blocks} == {"reference"}
    plain = copy.deepcopy(network)
    effkernels.optimize_(plain)
    with torch.no_grad(), effkernels.backend("reference"):
        wanted = plain(x)
    with torch.no_grad():
        assert torch.equal(network(x), wanted)


# ------------------------------------------------------------------------------------------------------ at run time


def test_training_runs_the_original(network: nn.Module, x: Tensor) -> None:
    plain = copy.deepcopy(network).train()
    effkernels.optimize_(network)
    network.train()
    for model in (network, plain):
        model(x).square().sum().backward()
    for (name, ours), (_, theirs) in zip(network.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), (_, theirs) in zip(network.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_frozen_norms_in_training_run_the_original(network: nn.Module, x: Tensor) -> None:
    effkernels.optimize_(network)
    network.eval()
    network.blocks[0].bn2.train()
    assert not is_fused(network.blocks[0], images(1, 5, 5, channels=8))
    assert is_fused(network.blocks[2], images(1, 5, 5, channels=12))


def test_gradients_in_eval_mode_are_those_of_the_original(network: nn.Module, x: Tensor) -> None:
    exact, plain = copy.deepcopy(network).double(), copy.deepcopy(network)
    effkernels.optimize_(network)
    network(x).square().sum().backward()
    plain(x).square().sum().backward()
    exact(x.double()).square().sum().backward()
    pairs = zip(network.named_parameters(), plain.parameters(), exact.parameters(), strict=True)
    for (name, ours), theirs, truth in pairs:
        scale = float(truth.grad.abs().max())
        error, own = (float((p.grad.double() - truth.grad).abs().max()) / scale for p in (ours, theirs))
        assert error <= 4 * own + 4e-6, name  # recomputed by the reference: the same functions in another order


@pytest.mark.parametrize("path", ["blocks.0.act", "blocks.0.se", "blocks.0.se.reduce", "blocks.0.bn2"])
def test_hooks_inside_a_block_are_called(network: nn.Module, x: Tensor, path: str) -> None:
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    seen: list[Tensor] = []
    handle = network.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    assert_as_before(network, plain, x)
    assert seen
    assert not is_fused(network.blocks[0], images(1, 5, 5, channels=8))
    handle.remove()
    assert is_fused(network.blocks[0], images(1, 5, 5, channels=8))


@pytest.mark.parametrize("path", ["", "blocks", "blocks.1", "head"])
def test_hooks_on_blocks_and_around_them_cost_nothing(network: nn.Module, x: Tensor, path: str) -> None:
    effkernels.optimize_(network)
    seen: list[Tensor] = []
    with torch.no_grad():
        wanted = network(x)
        network.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
        assert torch.equal(network(x), wanted)
    assert len(seen) == 1
    assert is_fused(network, x)


def test_a_hook_that_is_there_already_is_the_reason(network: nn.Module) -> None:
    network.blocks[0].depthwise.register_forward_hook(lambda module, args, output: None)
    report = effkernels.optimize_(network)
    (block,) = (block for block in report.blocks if block.name == "blocks.0")
    assert "hook" in block.reason


def _replace_activation(network: nn.Module) -> None:
    network.blocks[0].act = nn.ReLU()


def _replace_norm(network: nn.Module) -> None:
    network.blocks[0].bn2 = nn.InstanceNorm2d(24)


def _change_stride(network: nn.Module) -> None:
    network.blocks[1].depthwise.stride = (1, 1)


def _change_setting(network: nn.Module) -> None:
    network.blocks[0].skip = False


def _replace_forward(network: nn.Module) -> None:
    conv = network.blocks[0].depthwise
    conv.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), conv)


def _forget_statistics(network: nn.Module) -> None:
    norm = network.blocks[0].bn2
    norm.running_mean = norm.running_var = None


@pytest.mark.parametrize(
    "change",
    [_replace_activation, _replace_norm, _change_stride, _change_setting, _replace_forward, _forget_statistics],
)
def test_a_changed_part_is_honoured(network: nn.Module, x: Tensor, change: Callable[[nn.Module], None]) -> None:
    plain = copy.deepcopy(network)
    effkernels.optimize_(network)
    change(network)
    change(plain)
    assert_as_before(network, plain, x)


def test_other_arguments_than_traced_run_the_original() -> None:
    class Doubling(Block):
        def forward(self, x: Tensor, twice: bool = False, rate: float | None = None) -> Tensor:
            y = super().forward(x)
            if rate and self.training:
                y = F.dropout(y, rate)
            return 2 * y if twice else y

    block = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), Doubling(8, 8)))[1]
    plain = copy.deepcopy(block)
    effkernels.optimize_(block)
    x = images(1, 7, 9, channels=8)
    (program,) = block._effkernels_programs.values()
    assert program.ignored == {"rate"}
    assert program.input_of((x,), {"rate": 0.3}) is x
    assert program.input_of((x, True), {}) is None
    with torch.no_grad():
        assert torch.equal(block(x, twice=True), plain(x, twice=True))
        assert torch.equal(block(x, rate=0.3), block(x))
        assert torch.equal(block(x=x), block(x))


def test_what_is_no_image_runs_the_original(network: nn.Module) -> None:
    block = network.blocks[0]
    effkernels.optimize_(block)
    with pytest.raises(RuntimeError):  # as convolutions do: PyTorch's own message
        block(torch.zeros(3, 3))


# ---------------------------------------------------------------------------------------------------- memory format


def test_a_block_gives_back_the_memory_format_it_got(network: nn.Module) -> None:
    effkernels.optimize_(network)
    features = images(2, 9, 11, channels=8)
    with torch.no_grad():
        for part in (network.blocks[0], network.blocks[1], network.blocks):
            plain = part(features)
            assert plain.is_contiguous()
            plain.view(2, -1)
            last = part(features.contiguous(memory_format=torch.channels_last))
            assert last.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(plain, last)


class Viewing(nn.Module):
    """A network that only works with NCHW tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(8, 8), Block(8, 8)
        self.conv, self.bn = nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        n, c, h, w = x.shape
        x = x.view(n, c, h * w).softmax(-1).view(n, c, h, w)
        return F.relu(self.bn(self.conv(x))).view(n, -1)


def test_views_between_blocks_see_the_format_that_the_original_sees() -> None:
    stem = nn.Conv2d(3, 8, 1)
    model = randomise(nn.Sequential(stem, Viewing()))[1]
    plain = copy.deepcopy(model)
    assert effkernels.optimize_(model).fused == 3
    assert_features_as_before(model, plain)


def assert_features_as_before(model: nn.Module, plain: nn.Module) -> None:
    features = images(2, 9, 11, channels=8)
    with torch.no_grad():
        assert_parity(model(features), plain(features), copy.deepcopy(plain).double()(features.double()))


# --------------------------------------------------------------------------------------------- compile and export


def test_it_compiles_to_one_graph_for_all_sizes(network: nn.Module, x: Tensor) -> None:
    effkernels.optimize_(network)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for size in ((2, 33, 35), (3, 41, 52), (5, 64, 40)):
            image = images(*size)
            assert torch.equal(compiled(image), network(image))
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    if effkernels.ops.backends.choose("pointwise_bn_act", x) == "cpu":
        assert sum(target.startswith("effkernels.") for target in targets) == 1 + 3 * 3
    assert not any("batch_norm" in target for target in targets)


def test_it_exports_with_dynamic_sizes(network: nn.Module, x: Tensor) -> None:
    effkernels.optimize_(network)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("h", min=16), 3: torch.export.Dim("w", min=16)}
    program = torch.export.export(network, (x,), dynamic_shapes={"x": sizes})
    image = images(3, 40, 51)
    with torch.no_grad():
        assert torch.equal(program.module()(image), network(image))

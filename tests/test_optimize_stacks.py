"""MBConv blocks that follow each other in other people's models, as one operator: which, and what ends a stack."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulation.control import H200, Emulation, Emulator
from optimize_models import PEERS, build, is_installed
from optimize_network import Block, Network, assert_as_before, programs
from parity import assert_parity
from peer_models import images, in_both_layouts, in_float64, randomise
from test_cuda_kernels import launches
from torch import Tensor, nn

import effkernels
from effkernels import ops
from effkernels.models.peers import import_timm
from effkernels.ops import backends
from effkernels.optimize import program
from effkernels.optimize.twins import Twins
from effkernels.plan.launches import plan_model, plan_network


def network(blocks: nn.Module | None = None) -> Network:
    """Return a network of a stem, four blocks of 8 channels, or other blocks, and a linear layer."""
    made = Network()
    made.blocks = nn.Sequential(*(Block(8, 8) for _ in range(4))) if blocks is None else blocks
    made.head = nn.Linear(8, 5)
    return randomise(made)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are one operator on the CPU too, where the parts are faster."""

    def takes_block(x: Tensor, backend: str = "auto") -> bool:
        return True

    monkeypatch.setattr(backends, "takes_block", takes_block)
    monkeypatch.setitem(program._BASE, "takes_block", takes_block)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None) -> list[int]:
    """The number of blocks of each operator of whole blocks that is called."""
    seen: list[int] = []
    stack, single = ops.mbconv_stack, ops.mbconv

    def of_stack(x: Tensor, blocks: list[dict[str, Any]], **options: Any) -> Tensor:
        seen.append(len(blocks))
        return stack(x, blocks, **options)

    def of_block(x: Tensor, **options: Any) -> Tensor:
        seen.append(1)
        return single(x, **options)

    monkeypatch.setattr(ops, "mbconv_stack", of_stack)
    monkeypatch.setitem(program._BASE, "mbconv", of_block)
    return seen


def run(model: nn.Module, plain: nn.Module, calls: list[int], x: Tensor | None = None) -> list[int]:
    """Return the blocks of each operator that a forward calls; its result is as exact as that of the plain model."""
    calls.clear()
    assert_as_before(model, plain, images(2, 33, 35) if x is None else x)
    return [*calls]


# The launches that blocks share, by the number of images.
SHARED_LAUNCHES = {
    "timm": {1: ["blocks.0.0-3.0", "blocks.3.1-6.0"], 256: ["blocks.0.0-6.0"]},
    "torchvision": {1: ["features.1.0-4.0", "features.4.1-7.0"], 256: ["features.1.0-7.0"]},
    "lukemelas": {1: ["_blocks.0-5", "_blocks.6-15"], 256: ["_blocks.0-15"]},
}


class TestLaunches:
    """Planned on the meta device, where a forward chooses as on a GPU."""

    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("library", ["timm", "torchvision", "lukemelas"])
    def test_b0_launches_what_our_own_does(self, library: str) -> None:
        peer = next(peer for peer in PEERS if peer.library == library and peer.name.endswith("b0"))
        if not is_installed(library):
            pytest.skip(f"{library} is not installed")
        model = build(peer)
        effkernels.optimize_(model)

        def on_meta(tensor: Tensor) -> Tensor:
            dtype = torch.bfloat16 if tensor.is_floating_point() else None
            return torch.empty_like(tensor, device="meta", dtype=dtype)

        optimized = Twins(model, plain=False, convert=on_meta).root
        for batch in (1, 256):
            found = plan_network(optimized, (3, 224, 224), name=peer.name, batch_size=batch)
            own = plan_model("efficientnet_b0", batch_size=batch)
            # The head is one launch in our own network alone.
            assert [(one.kernel, one.bytes) for one in found.launches[:-3]] == [
                (one.kernel, one.bytes) for one in own.launches[:-2]
            ]
            assert [one.kernel for one in found.launches[-3:]] == ["pointwise", "aten::mean", "aten::addmm"]
            assert [one.kernel for one in own.launches[-2:]] == ["pointwise_pool", "aten::addmm"]
            shared = [one.layer for one in found.launches if one.stacked > 1]
            assert shared == SHARED_LAUNCHES[library][batch]

    @pytest.mark.usefixtures("compiled")
    def test_a_shared_launch_counts_at_its_first_block(self) -> None:
        model = build(PEERS[0]).bfloat16()
        report = effkernels.optimize_(model)
        after = {block.name: (block.launches_after, block.bytes_after) for block in report.blocks}
        own = plan_model("efficientnet_b0").by_block()
        others = dict(after)
        for first, last, count in (("blocks.0.0", "blocks.3.0", 6), ("blocks.3.1", "blocks.6.0", 10)):
            stack = own.pop(f"{first}-{last.removeprefix('blocks.')}")
            inside = [name for name in after if first <= name <= last]
            assert [after[name][0] for name in inside] == [1] + [0] * (count - 1)
            assert sum(others.pop(name)[1] for name in inside) == stack.bytes
        assert others.pop("conv_head")[0] == 1  # our own pools in the same launch
        assert others == {name: (own[name].launches, own[name].bytes) for name in others}
        assert "launches now 0: the block is part of a launch" in str(report)


# All blocks, the first ones without expansion too.
STACKS = {
    ("timm", "efficientnet_b0"): [16],
    ("timm", "mobilenetv3_small_050"): [11],
    ("torchvision", "mobilenet_v2"): [17],
    ("torchvision", "mobilenet_v3_small"): [11],
    ("lukemelas", "b0"): [16],
    ("transformers", "EfficientNet B0"): [16],
    ("NVIDIA layout", "efficientnet-b0 in small"): [4],
}


class TestWhichBlocks:
    """On the CPU, where the operators that a forward calls are counted."""

    @pytest.mark.parametrize(("library", "name"), STACKS)
    def test_those_of_other_libraries(self, library: str, name: str, calls: list[int]) -> None:
        if not is_installed(library):
            pytest.skip(f"{library} is not installed")
        peer = next(peer for peer in PEERS if (peer.library, peer.name) == (library, name))
        model, x = build(peer), images(2, *peer.size)
        with torch.no_grad():
            same_dtype, truth = in_both_layouts(model, x), in_float64(model, x)
            report = effkernels.optimize_(model)
            assert report.fused == peer.fused, str(report)
            calls.clear()
            assert_parity(model(x), same_dtype, truth, "logits")
        assert calls == STACKS[library, name]

    def test_all_that_follow_each_other(self, calls: list[int]) -> None:
        model = network()
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        assert run(model, plain, calls) == [4]
        assert run(model, plain, calls, images(1, 64, 50)) == [4]
        assert run(model, plain, calls, images(3, 41, 64).contiguous(memory_format=torch.channels_last)) == [4]
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert run(again, plain, calls) == [4]

    def test_a_cpu_runs_their_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(program._BASE, "in_stacks", None)
        monkeypatch.setitem(program._BASE, "mbconv", None)
        model = network()
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        assert_as_before(model, plain, images(2, 33, 35))

    def test_stages_in_each_other(self, calls: list[int]) -> None:
        stages = nn.Sequential(nn.Sequential(Block(8, 8), Block(8, 8, 2)), nn.Sequential(nn.Sequential(Block(8, 8))))
        model = network(stages)
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        assert run(model, plain, calls) == [3]
        seen: list[object] = []
        model.blocks[1].register_forward_hook(lambda *_: seen.append(_))
        assert run(model, plain, calls) == [2, 1]
        assert seen

    def test_other_modules_end_a_stack(self, calls: list[int]) -> None:
        between = nn.Sequential(nn.ConvTranspose2d(8, 8, 2), nn.Softmax(1))
        model = network(nn.Sequential(Block(8, 8), Block(8, 8), between, Block(8, 8), Block(8, 8), Block(8, 8)))
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        assert run(model, plain, calls) == [2, 3]

    def test_a_value_that_is_used_elsewhere_ends_a_stack(self, calls: list[int]) -> None:
        class Tapped(nn.Module):
            """Returns the result of the second block, and adds that of the fourth to the last one."""

            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList(Block(8, 8) for _ in range(6))

            def forward(self, x: Tensor) -> Tensor:
                found = []
                for block in self.blocks:
                    x = block(x)
                    found.append(x)
                return torch.cat([found[1], x + found[3]], 1)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.body = nn.Conv2d(3, 8, 3, 2), Tapped()

            def forward(self, x: Tensor) -> Tensor:
                return self.body(self.stem(x))

        model = randomise(Outer())
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        assert run(model, plain, calls) == [2, 2, 2]

    def test_arguments_that_a_block_ignores_are_passed_on_where_it_is_called(self, calls: list[int]) -> None:
        """As lukemelas' drop_connect_rate, which a block reads in training mode alone."""

        class Dropping(Block):
            def forward(self, x: Tensor, rate: float | None = None) -> Tensor:
                if self.training:
                    self.rates.append(rate)
                return super().forward(x)

        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList(Dropping(8, 8) for _ in range(4))
                for block in self.blocks:
                    block.rates = []

            def forward(self, x: Tensor) -> Tensor:
                for position, block in enumerate(self.blocks):
                    x = block(x, rate=position / 8)
                return x

        model = network(Body())
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        assert run(model, plain, calls) == [4]
        model.blocks.blocks[3].training = True  # its norms stay in eval mode
        calls.clear()
        with torch.no_grad():
            model(images(2, 33, 35))
        assert calls == [3]
        assert model.blocks.blocks[3].rates == [3 / 8]

    def test_a_block_that_was_optimised_again_for_another_backend_is_called(self, calls: list[int]) -> None:
        model = network()
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        effkernels.optimize_(model.blocks[2], backend="reference")
        assert run(model, plain, calls) == [2, 1, 1]

    def test_forced_backends_have_stacks_of_their_own(self, calls: list[int]) -> None:
        model = network()
        plain = copy.deepcopy(model)
        effkernels.optimize_(model, backend="reference")
        assert run(model, plain, calls) == [4]


def attach_hook(block: Block) -> None:
    block.register_forward_hook(lambda *_: None)


def attach_inner_hook(block: Block) -> None:
    block.depthwise.register_forward_pre_hook(lambda *_: None)


def replace_forward(block: Block) -> None:
    block.forward = lambda x: 2 * x


def drop_statistics(block: Block) -> None:
    """Its norm then has no running mean: PyTorch takes that of the batch."""
    block.bn2.running_mean = block.bn2.running_var = None


def restore(block: Block) -> None:
    effkernels.restore_(block)


def scale(block: Block) -> None:
    with torch.no_grad():
        block.expand.weight *= 1.5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (attach_hook, [2, 1, 1]),
        (attach_inner_hook, [2, 1]),
        (replace_forward, [2, 1]),
        (drop_statistics, [2, 1]),
        (restore, [2, 1]),
        (scale, [4]),
    ],
)
def test_a_block_that_changed_is_called_and_ends_a_stack(
    change: Callable[[Block], None], expected: list[int], calls: list[int]
) -> None:
    model = network()
    effkernels.optimize_(model)
    run(model, copy.deepcopy(model), calls)
    change(model.blocks[2])
    plain = copy.deepcopy(model)
    effkernels.restore_(plain)
    found = run(model, plain, calls)
    assert found == expected


def test_filter_fn_leaves_a_block_out_of_a_stack(calls: list[int]) -> None:
    model = network()
    plain = copy.deepcopy(model)
    effkernels.optimize_(model, filter_fn=lambda module, name: not name.startswith("blocks.1"))
    assert run(model, plain, calls) == [1, 2]


def test_stages_that_are_called_one_by_one_end_stacks(calls: list[int]) -> None:
    model = import_timm().create_model("efficientnet_b0", features_only=True).eval()
    effkernels.optimize_(model)
    calls.clear()
    with torch.no_grad():
        model(images(1, 64, 64))
    assert calls == [1, 2, 2, 3, 3, 4, 1]


class TestVerification:
    """A stack is compared with the blocks before it is used, and so is a block as one operator."""

    @pytest.mark.usefixtures("as_on_a_gpu")
    def test_wrong_blocks_are_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        block = ops.mbconv
        monkeypatch.setitem(program._BASE, "mbconv", lambda x, **options: 1.001 * block(x, **options))
        report = effkernels.optimize_(network())
        assert [one.fused for one in report.blocks] == [True, *[False] * 4]
        assert all("its fused form is off by" in one.reason for one in report.blocks[1:])

    @pytest.mark.parametrize("body", ["container", "forward"])
    @pytest.mark.usefixtures("as_on_a_gpu")
    def test_wrong_stacks_are_not_used(self, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Body(nn.Sequential):
            """Not a plain container: its forward is its own."""

        stack = ops.mbconv_stack
        monkeypatch.setattr(ops, "mbconv_stack", lambda x, *args, **options: 1.001 * stack(x, *args, **options))
        model = network(None if body == "container" else Body(*(Block(8, 8) for _ in range(4))))
        plain = copy.deepcopy(model)
        report = effkernels.optimize_(model)
        assert report.fused == 5
        assert any(note.startswith("blocks.forward: its fused form is off by") for note in report.notes), report.notes
        assert len(programs(model)) == 1 + 4
        assert_as_before(model, plain, images(2, 33, 35))


def test_an_engine_runs_stacks(calls: list[int]) -> None:
    model = network()
    plain = copy.deepcopy(model)
    x = images(2, 33, 35)
    with effkernels.InferenceEngine(model, batch_sizes=(2,), input_size=(3, 33, 35)) as engine, torch.no_grad():
        assert calls[-1] == 4  # after the comparisons of blocks and stacks
        assert_parity(engine(x), [plain(x)], copy.deepcopy(plain).double()(x.double()))


class TestTracing:
    @pytest.mark.usefixtures("as_on_a_gpu")
    def test_one_graph_for_all_sizes(self) -> None:
        model = network(nn.Sequential(Block(8, 8), Block(8, 12, 2), Block(12, 8)))
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        torch._dynamo.reset()
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for size in ((2, 33, 35), (3, 41, 52), (5, 64, 40)):
            assert_as_before(compiled, plain, images(*size))
        (graph,) = graphs
        called = [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("effkernels.")]
        assert called == ["effkernels.conv_bn_act.default", "effkernels.mbconv_stack.default"]

    @pytest.mark.usefixtures("as_on_a_gpu")
    def test_a_hook_is_in_the_graph(self) -> None:
        model = network()
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        for one in (model, plain):
            one.blocks[1].register_forward_hook(lambda module, args, y: 2 * y)
        torch._dynamo.reset()
        assert_as_before(torch.compile(model, fullgraph=True, backend="eager"), plain, images(2, 33, 35))

    @pytest.mark.usefixtures("as_on_a_gpu")
    def test_export_with_dynamic_sizes(self) -> None:
        model = network()
        plain = copy.deepcopy(model)
        effkernels.optimize_(model)
        sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("h", min=16), 3: torch.export.Dim("w", min=16)}
        exported = torch.export.export(model, (images(2, 33, 35),), dynamic_shapes={"x": sizes})
        assert "mbconv_stack" in str(exported.graph)
        assert_as_before(exported.module(), plain, images(3, 40, 51))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_small_network_on_the_emulated_kernels(emulated: Emulator) -> None:
    """Its blocks share a launch, and its logits are as exact as PyTorch's."""
    emulated.configure(Emulation("random", "late", H200, emulated.flavour))
    model = network().bfloat16()
    x = images(2, 17, 19).bfloat16()
    with torch.no_grad():
        same_dtype, truth = in_both_layouts(model, x), in_float64(model, x)
    with emulated.in_place_of_cpu(), effkernels.backend("cpu"), torch.no_grad():
        report = effkernels.optimize_(model)
        assert report.fused == 5, str(report)
        model(x)
        before = launches(emulated)
        assert_parity(model(x), same_dtype, truth, "logits")
        assert launches(emulated) - before == 2  # the stem, and four blocks

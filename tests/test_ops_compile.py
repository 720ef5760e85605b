"""torch.compile and torch.export: one whole graph for every batch, height and width, forward and backward."""

from __future__ import annotations

import op_cases
import pytest
import torch
import torch._dynamo.testing
from op_cases import ALL_OPS, Case
from torch import Tensor, nn

import effkernels
from effkernels import ops
from effkernels._norm import gather_norms
from effkernels.ops import backends

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 8
SHAPES = ((2, CHANNELS, 15, 17), (3, CHANNELS, 14, 16), (5, CHANNELS, 28, 31), (4, CHANNELS, 33, 33))


def same_padding(x: Tensor, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) that keep ceil(size / stride) outputs, as TensorFlow pads."""

    def split(size: int) -> tuple[int, int]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    return (*split(x.shape[2]), *split(x.shape[3]))


class Network(nn.Module):
    """Every operator once, with SAME padding formed from the sizes of its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        c, r = CHANNELS, 4
        self.norm = nn.BatchNorm2d(c).eval()
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)
        self.stem = nn.Parameter(torch.randn(c, c, 3, 3) / 8)
        self.small, self.large = nn.Parameter(torch.randn(c, 1, 3, 3)), nn.Parameter(torch.randn(c, 1, 5, 5) / 3)
        self.project = nn.Parameter(torch.randn(c, c, 1, 1) / 3)
        self.reduce, self.expand = nn.Parameter(torch.randn(r, c, 1, 1)), nn.Parameter(torch.randn(c, r, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        norm = (None, ops.Norm.of(self.norm))
        excite = {"w_reduce": self.reduce, "w_expand": self.expand}
        y = ops.conv_bn_act(x, self.stem, *norm, stride=2, padding=same_padding(x, 3, 2), activation="silu")
        y = ops.depthwise_bn_act(y, self.small, *norm, padding=same_padding(y, 3, 1), activation="relu6")
        kept, gate = ops.depthwise_bn_act_gate(
            y, self.large, *norm, stride=2, padding=same_padding(y, 5, 2), activation="silu", **excite
        )
        y = ops.pointwise_bn_act(kept, self.project, *norm, gate=gate, residual=kept)
        y, pooled = ops.depthwise_bn_act_squeeze(y, self.small, *norm, padding=same_padding(y, 3, 1))
        half, means = ops.expand_depthwise_squeeze(
            y,
            self.project,
            self.small,
            expand_norm=norm[1],
            expand_activation="silu",
            padding=same_padding(y, 3, 1),
        )
        y = ops.mbconv(
            y,
            self.project,
            self.small,
            self.project,
            expand_norm=norm[1],
            norm=norm[1],
            activation="silu",
            padding=same_padding(y, 3, 1),
            **excite,
            project_norm=norm[1],
            residual=y,
        )
        y = y + half * means[:, :, None, None]
        y = y + ops.pointwise_bn_act_pool(y, self.project, *norm, activation="silu")[:, :, None, None]
        y = y * ops.squeeze_excite_gate(pooled, self.reduce, None, self.expand, None)[:, :, None, None]
        return ops.depthwise_bn_act_se(y, self.large, *norm, padding=same_padding(y, 5, 1), **excite)


# What the reference is made of, PyTorch's operators, is PyTorch's to compile: one test of it is enough for each run.
REFERENCE = pytest.param("reference", marks=pytest.mark.thorough)


@pytest.fixture(params=["compiled", "reference"])
def way(request: pytest.FixtureRequest) -> str:
    """The backend to name: the compiled operators, or the reference under the same trace."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    return "auto" if request.param == "compiled" else "reference"


def operators_in(graph: torch.fx.GraphModule) -> set[str]:
    found = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    return {name.split(".")[1] for name in found if name.startswith("effkernels.")}


@pytest.mark.parametrize(
    ("gradients", "layout"),
    [
        pytest.param(False, "contiguous", id="inference-contiguous", marks=pytest.mark.thorough),
        pytest.param(False, "channels_last", id="inference-channels_last"),
        pytest.param(True, "contiguous", id="training-contiguous"),
        pytest.param(True, "channels_last", id="training-channels_last", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("way", ["compiled", REFERENCE], indirect=True)
def test_one_graph_for_all_sizes(gradients: bool, layout: str, way: str) -> None:
    model = Network().requires_grad_(gradients)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with backends.backend(way):
        for shape in SHAPES:
            x = op_cases.laid_out(torch.randn(shape), layout)
            for axis in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, axis)
            y, wanted = compiled(x), model(x)
            torch.testing.assert_close(y, wanted)
            assert y.stride() == wanted.stride()
            if gradients:
                parameters = list(model.parameters())
                found = torch.autograd.grad(y.square().sum(), parameters)
                expected = torch.autograd.grad(wanted.square().sum(), parameters)
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    assert counter.frame_count == 1
    assert operators_in(counter.graphs[0]) == (set(ALL_OPS) if way == "auto" else set())


@pytest.mark.slow
@pytest.mark.thorough  # test_export_graphs.py and test_models_api.py compile the operators that networks use
def test_inductor(compiled: None) -> None:
    model = Network().requires_grad_(False)
    torch._dynamo.reset()
    function = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in SHAPES[:2]:
            x = torch.randn(shape).to(memory_format=torch.channels_last)
            torch.testing.assert_close(function(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_backend_is_guarded() -> None:
    """A trace made for one backend is not used for another."""
    model = Network().requires_grad_(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(SHAPES[0])
    for way in ("auto", "reference", "auto", "reference"):
        with backends.backend(way):
            compiled(x)
    assert counter.frame_count == 2 if backends.choose(ALL_OPS[0], x) != "reference" else counter.frame_count <= 2


def test_autocast_inside_a_compiled_function(way: str) -> None:
    model = Network().requires_grad_(False)
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.randn(SHAPES[0])
    with backends.backend(way):
        y, wanted = compiled(x), function(x)
        assert y.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_export_with_dynamic_sizes(strict: bool, way: str) -> None:
    model = Network().requires_grad_(False)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with backends.backend(way):
        exported = torch.export.export(model, (torch.randn(SHAPES[0]),), dynamic_shapes=(dynamic,), strict=strict)
        if way == "auto":
            assert operators_in(exported.graph_module) == set(ALL_OPS)
        for shape in SHAPES:
            x = torch.randn(shape)
            torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("way", ["compiled", REFERENCE], indirect=True)
@pytest.mark.parametrize("op", ALL_OPS)
def test_each_operator_alone_is_one_graph(op: str, way: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(getattr(ops, op), backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    with backends.backend(way):
        for batch, height, width in ((2, 9, 11), (3, 12, 10), (5, 21, 20)):
            case = Case(op, batch=batch, height=height, width=width, gated=True, residual=True, layout="contiguous")
            arguments = case.draw()
            outputs = function(**gather_norms(arguments))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for y, wanted in zip(outputs, op_cases.run(effkernels.ops, case, arguments), strict=True):
                torch.testing.assert_close(y, wanted)
                assert y.stride() == wanted.stride()
            frames.add(counter.frame_count)  # the first call may trace twice, to make eps a constant
    assert len(frames) == 1

"""Whole networks under torch.compile(fullgraph=True) and torch.export: one graph for every batch, height and width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch._dynamo.testing
from parity import assert_parity, joined
from peer_models import images, in_both_layouts, in_float64, randomise, small, timm_model
from torch import Tensor, nn

import effkernels
from effkernels.ops import backends

pytestmark = pytest.mark.usefixtures("one_thread")

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((2, 64, 96), (3, 97, 70), (1, 45, 64))


def created(name: str) -> nn.Module:
    return randomise(effkernels.create_model(name, device="meta"))


def optimised(name: str) -> nn.Module:
    """timm's MobileNetV3, whose blocks have been put on the fused operators in place. A block that another one repeats
    is left out: to trace one takes a second.
    """
    model = timm_model(name)
    for stage, kept in zip(model.blocks, (1, 2, 2, 1, 1, 1), strict=True):
        del stage[kept:]
    report = effkernels.optimize_(model)
    assert report.fused == len(report.blocks) == 10, str(report)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tf_efficientnet_b0": lambda: created("tf_efficientnet_b0"),
    "optimised-timm": lambda: optimised("mobilenetv3_small_050"),
}


@pytest.fixture(scope="module")
def network(request: pytest.FixtureRequest) -> nn.Module:
    return NETWORKS[request.param]().requires_grad_(False)


def assert_same_logits(run: Callable[[Tensor], Tensor], network: nn.Module, shapes: Sequence[Shape] = SHAPES) -> None:
    """The tolerance rule over all shapes at once."""
    with torch.inference_mode():
        inputs = [images(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        found = joined([run(x) for x in inputs])
        with backends.backend("reference"):
            plain = zip(*(in_both_layouts(network, x) for x in inputs), strict=True)
            truth = joined([in_float64(network, x) for x in inputs])
            assert_parity(found, [joined(way) for way in plain], truth, "logits")


@pytest.mark.parametrize(
    "network", [pytest.param("tf_efficientnet_b0", marks=pytest.mark.thorough), "optimised-timm"], indirect=True
)
def test_compile_makes_one_graph_for_all_sizes(network: nn.Module) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        compiled(images(5, 65, 97))  # a batch of 3 would be taken for the number of channels
    once = counter.frame_count  # the first call may trace twice, to make eps a constant
    assert_same_logits(compiled, network, SHAPES[:-1])  # torch.compile takes a batch of one for a case of its own
    assert counter.frame_count == once


@pytest.mark.parametrize("network", NETWORKS, indirect=True)
def test_export_makes_one_graph_for_all_sizes(network: nn.Module) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    axes = {0: torch.export.Dim("batch", min=1, max=64), 2: dynamic(min=33, max=640), 3: dynamic(min=33, max=640)}
    with torch.no_grad():
        program = torch.export.export(network, (images(2, 64, 96),), dynamic_shapes=(axes,))
    assert_same_logits(program.module(), network)


@pytest.mark.slow
@pytest.mark.parametrize("pad_type", [pytest.param("", marks=pytest.mark.thorough), "same"])
def test_inductor_makes_one_graph_for_all_sizes(pad_type: str) -> None:
    torch._dynamo.reset()
    network = small(pad_type=pad_type).requires_grad_(False)
    assert_same_logits(torch.compile(network, fullgraph=True, dynamic=True), network)

"""mbconv_stack: its definition, and that everything but the launches is that of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import op_cases
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import effkernels
from effkernels import ops
from effkernels._norm import gather_norms
from effkernels.ops import reference
from effkernels.ops.call import OpCall
from effkernels.ops.mbconv_stack import flatten

Blocks = Sequence[dict[str, Any]]
WAYS = ("compiled", "reference")


def entry(seed: int, channels: int, **fields: Any) -> dict[str, Any]:
    call = OpCall.on("mbconv", (2, channels, 9, 8), fields.pop("kernel", 3), **fields)
    given = {name: a for name, a in call.arguments(seed=seed).items() if name not in ("x", "allow_tf32")}
    return {**gather_norms(given), "residual": call.residual}


@pytest.fixture
def blocks() -> Blocks:
    return (
        entry(0, 16, out_channels=24, expanded=40, stride=2, bias=True),
        entry(1, 24, out_channels=24, expanded=48, kernel=5, residual=True, activation="hard_swish"),
        entry(2, 24, out_channels=8, expanded=56, reduced=0, norm="statistics"),
        entry(3, 8, out_channels=8, expanded=0, reduced=2, residual=True),
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 16, 9, 8, generator=torch.Generator().manual_seed(3)).to(memory_format=torch.channels_last)


@pytest.mark.usefixtures("compiled")
class TestValues:
    def test_a_stack_is_its_blocks_one_after_the_other(self, x: Tensor, blocks: Blocks) -> None:
        y = ops.mbconv_stack(x, blocks)
        one_by_one = x
        for block in blocks:
            residual = one_by_one if block["residual"] else None
            one_by_one = ops.mbconv(one_by_one, **{**block, "residual": residual})
        assert torch.equal(y, one_by_one)
        torch.testing.assert_close(y, reference.mbconv_stack(x, blocks), rtol=1e-4, atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ops.mbconv_stack(x.contiguous(), blocks), y)

    def test_gradients_are_those_of_the_reference(self, x: Tensor, blocks: Blocks) -> None:
        found = []
        for function in (ops.mbconv_stack, reference.mbconv_stack):
            leaves = [x.clone().requires_grad_(), blocks[0]["weight"].clone().requires_grad_()]
            function(leaves[0], [{**blocks[0], "weight": leaves[1]}, *blocks[1:]]).square().sum().backward()
            found.append([leaf.grad for leaf in leaves])
        for own, wanted in zip(*found, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-3)

    def test_forward_mode_derivatives(self, x: Tensor, blocks: Blocks) -> None:
        own, wanted = (
            torch.func.jvp(lambda x, function=function: function(x, blocks), (x,), (x,))[1]
            for function in (ops.mbconv_stack, reference.mbconv_stack)
        )
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-3)

    def test_autocast_casts_as_each_block_would(self, x: Tensor, blocks: Blocks) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.mbconv_stack(x, blocks)
            one_by_one = x
            for block in blocks:
                one_by_one = ops.mbconv(one_by_one, **{**block, "residual": one_by_one if block["residual"] else None})
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, one_by_one)

    def test_compiled_and_on_other_backends(self, x: Tensor, blocks: Blocks) -> None:
        y = ops.mbconv_stack(x, blocks)
        compiled = torch.compile(lambda x: ops.mbconv_stack(x, blocks), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), y)
        with effkernels.backend("reference"):
            assert torch.equal(ops.mbconv_stack(x, blocks), reference.mbconv_stack(x, blocks))

    def test_no_images(self, blocks: Blocks) -> None:
        assert ops.mbconv_stack(torch.empty(0, 16, 9, 8), blocks).shape == (0, 8, 5, 4)


@pytest.mark.usefixtures("compiled")
def test_the_registration_is_whole(x: Tensor, blocks: Blocks) -> None:
    arguments = (x, *flatten(blocks), False)
    torch.library.opcheck(torch.ops.effkernels.mbconv_stack.default, arguments)
    counts = []
    for function in (ops.mbconv_stack, reference.mbconv_stack):
        with FlopCounterMode(display=False) as counter:
            function(x, blocks)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_triton_runs_block_by_block(x: Tensor, blocks: Blocks, interpreted: None) -> None:
    y = ops.mbconv_stack(x, blocks, backend="triton")
    torch.testing.assert_close(y, reference.mbconv_stack(x, blocks), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"depth": 3}, TypeError, "block 1 has the argument 'depth'; allowed: activation, "),
        ({"weight": None}, TypeError, "block 1 has no weight"),
        ({"stride": 3}, ValueError, "stride=3; allowed: 1, 2"),
        ({"stride": 2}, ValueError, "residual has shape"),
        ({"expand_weight": torch.zeros(48, 16, 1, 1)}, ValueError, "expand_weight has shape"),
        ({"activation": "tanh"}, ValueError, "activation='tanh' is not known"),
        ({"expand_weight": None}, ValueError, "expand_norm needs expand_weight, which is None; allowed: None"),
        (
            {"expand_weight": None, "expand_norm": None},
            ValueError,
            "expand_activation='silu' needs expand_weight, which is None; allowed: 'identity'",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_block_refuses_is_named(
    way: str, changes: dict[str, Any], error: type[Exception], message: str, x: Tensor, blocks: Blocks
) -> None:
    wrong = [blocks[0], {**blocks[1], **changes}, *blocks[2:]]
    with pytest.raises(error, match=rf"^mbconv(_stack: block 1)?.*{message}"):
        ops.mbconv_stack(x, wrong, backend="auto" if way == "compiled" else way)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expand_bias": torch.zeros(16)}, "expand_bias (and expand_norm )?needs? expand_weight, which is None"),
        ({"expand_norm": ops.Norm(torch.zeros(16), torch.ones(16))}, "expand_norm needs? expand_weight"),
        ({"expand_activation": "relu"}, "expand_activation='relu' needs expand_weight, which is None; allowed: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_belongs_to_an_expansion_needs_one(changes: dict[str, Any], message: str, x: Tensor) -> None:
    call = OpCall("mbconv", channels=16, out_channels=8, height=9, width=8)
    given = {name: a for name, a in call.arguments().items() if name not in ("x", "allow_tf32")}
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=f"^mbconv: {message}"):
            ops.mbconv(x, **{**gather_norms(given), **changes}, backend=backend)
    flat = {"x": x, **given}
    flat["expand_activation"] = "relu"
    with pytest.raises(
        RuntimeError, match="expand_activation='relu' needs expand_weight, which is None; allowed: identity"
    ):
        torch.ops.effkernels.mbconv(*op_cases.positional("mbconv", flat))


@pytest.mark.usefixtures("compiled")
def test_lists_of_the_schema_fit_each_other(x: Tensor, blocks: Blocks) -> None:
    with pytest.raises(ValueError, match="blocks is empty; allowed: at least one"):
        ops.mbconv_stack(x, [])
    tensors, epsilons, sizes, activations = flatten(blocks)
    with pytest.raises(RuntimeError, match="norm_eps has 11 elements; allowed: 3 for each of the blocks"):
        torch.ops.effkernels.mbconv_stack(x, tensors, epsilons[1:], sizes, activations, False)

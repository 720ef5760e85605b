"""Consecutive blocks of a network as one operator: which share one, and that what has to be called is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effkernels
from effkernels import ops
from effkernels.models import EfficientNet
from effkernels.nn import DepthwiseSeparable, MBConv
from effkernels.nn.stack import modules_of, stacks_of


def block(channels: int = 16, out: int = 16, **options: object) -> MBConv:
    return MBConv(channels, out, se_channels=4, device="meta", dtype=torch.bfloat16, **options).eval()  # type: ignore[arg-type]


def lengths(modules: nn.Module) -> list[int]:
    return [len(stack) for stack in stacks_of(modules_of(modules))]


class TestStacks:
    """The pure function."""

    def test_blocks_that_follow_each_other_through_nested_sequences(self) -> None:
        first = DepthwiseSeparable(16, 16, device="meta")
        network = nn.Sequential(nn.Sequential(first), nn.Sequential(block(), block()), nn.Sequential(block()))
        assert lengths(network) == [4]
        assert lengths(nn.Sequential()) == []

    def test_another_module_or_backend_between_them(self) -> None:
        assert lengths(nn.Sequential(block(), nn.Identity(), block(), block())) == [1, 1, 2]
        assert lengths(nn.Sequential(block(), block(), block(backend="cpu"))) == [2, 1]

    def test_what_has_a_hook_stays_whole(self) -> None:
        hooked, stage = block(), nn.Sequential(block(), block())
        hooked.register_forward_hook(lambda *_: None)
        assert lengths(nn.Sequential(block(), block(), hooked, block())) == [2, 1, 1]
        stage.register_forward_pre_hook(lambda *_: None)
        assert [*modules_of(nn.Sequential(stage))] == [stage]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators of blocks that were called, with the number of blocks."""
    seen: list[str] = []
    stack, single = ops.mbconv_stack, ops.mbconv

    def of_stack(x: Tensor, blocks: list[dict[str, object]], **options: object) -> Tensor:
        seen.append(f"stack of {len(blocks)}")
        return stack(x, blocks, **options)  # type: ignore[arg-type]

    def of_block(x: Tensor, **options: object) -> Tensor:
        seen.append("block")
        return single(x, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "mbconv_stack", of_stack)
    monkeypatch.setattr(ops, "mbconv", of_block)
    return seen


@pytest.mark.usefixtures("compiled")
class TestNetworks:
    """On the meta device, where a forward chooses as on a GPU."""

    def network(self, dtype: torch.dtype = torch.bfloat16) -> EfficientNet:
        model = effkernels.create_model("efficientnet_b0", device="meta", dtype=dtype, backend="cpu").eval()
        assert isinstance(model, EfficientNet)
        return model

    def run(self, model: EfficientNet, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        with torch.no_grad():
            y: Tensor = model(torch.empty(1, 3, 64, 65, device="meta", dtype=dtype))
        return y

    def test_all_blocks_are_one_operator(self, calls: list[str]) -> None:
        assert self.run(self.network()).shape == (1, 1000)
        assert calls == ["stack of 16"]

    def test_float32_and_training_mode_run_block_by_block(self, calls: list[str]) -> None:
        self.run(self.network(torch.float32), torch.float32)
        assert calls == []
        model = self.network()
        model.blocks[4].train()
        self.run(model)
        assert calls == ["stack of 8", "stack of 5"]

    def test_hooks_are_called(self, calls: list[str]) -> None:
        model, seen = self.network(), []
        model.blocks[3][1].register_forward_hook(lambda *_: seen.append("block"))
        model.blocks[5].register_forward_hook(lambda *_: seen.append("stage"))
        model.blocks[2][0].conv_dw.register_forward_hook(lambda *_: seen.append("convolution"))
        self.run(model)
        assert seen == ["convolution", "block", "stage"]
        assert calls == ["stack of 3", "stack of 2", "block", "stack of 4", *["block"] * 4, "block"]

    def test_stages_and_features_run_in_stacks_too(self, calls: list[str]) -> None:
        model = self.network()
        with torch.no_grad():
            maps = model.forward_intermediates(
                torch.empty(1, 3, 64, 64, device="meta", dtype=torch.bfloat16), intermediates_only=True
            )
        assert isinstance(maps, list)
        assert calls == ["block", *(f"stack of {count}" for count in (2, 2, 3, 3, 4)), "block"]


def test_a_stack_gives_what_its_blocks_give() -> None:
    """The arguments that the modules hand over, on the CPU, where a forward does not choose a stack by itself."""
    torch.manual_seed(0)
    blocks = [
        DepthwiseSeparable(16, 16, se_channels=4),
        MBConv(16, 24, 3, 2, se_channels=4, pad_type="same"),
        MBConv(24, 24, 5, se_channels=6, activation="hard_swish", gate_activation="hard_sigmoid"),
        MBConv(24, 8, 3),
    ]
    x, height, width, arguments = torch.randn(1, 16, 11, 10), 11, 10, []
    for one in blocks:
        found = one.eval().operator_arguments(height, width)
        assert found is not None
        arguments.append(found)
        height, width = -(-height // found["stride"]), -(-width // found["stride"])
    with torch.no_grad():
        torch.testing.assert_close(ops.mbconv_stack(x, arguments), nn.Sequential(*blocks)(x), rtol=1e-4, atol=1e-4)

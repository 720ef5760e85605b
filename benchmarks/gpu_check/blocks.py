"""Whole blocks of networks, and blocks that follow each other, as cases of the operator benchmark: a module against
itself on the reference backend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import effkernels
from benchmarks.gpu_check import measure
from benchmarks.gpu_check.measure import Contender, Measured, Refused
from effkernels import environment
from effkernels.bench import timing
from effkernels.bench.check import sample_model
from effkernels.models import create_model, model_config
from effkernels.nn.stack import run_in_stacks
from effkernels.ops.backends import BLOCK
from effkernels.ops.call import PreparedCall
from effkernels.plan import launches

_PARITY_IMAGES = 2
ONE_BY_ONE = "-one-by-one"
"""The end of the name of a contender that calls the blocks of a stack one after the other."""


class Stack(nn.Module):
    """Blocks that follow each other, run as a network runs them: as one operator where a block is one."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        return run_in_stacks(self.blocks, x)


@dataclass(frozen=True)
class Block:
    """A block of a network in eval mode, or all of its blocks from a stage on.

    Attributes:
        path: its name in the network.
        shape: of one image that it takes, (C, H, W).
        out: of one that it gives.
        from_stage: the first stage of a stack; None for one block.
    """

    model: str
    path: str
    shape: tuple[int, ...]
    out: tuple[int, ...]
    from_stage: int | None = None

    @property
    def module(self) -> nn.Module:
        """A copy of it with the weights of `sample_model`, float32 on the CPU."""
        return copy.deepcopy(self._of(sample_model(self.model)))

    def _of(self, network: nn.Module) -> nn.Module:
        if self.from_stage is None:
            return network.get_submodule(self.path)
        stages = network.get_submodule("blocks")
        assert isinstance(stages, nn.Sequential)
        return Stack(stages[self.from_stage :])

    def case(self, batch: int) -> str:
        """Return the case as rows name it."""
        words = ["x".join(map(str, shape)) for shape in ((batch, *self.shape), self.out)]
        return f"{self.model} {self.path} {words[0]} to {words[1]}"

    def images(self, count: int) -> Tensor:
        """Random inputs, float32 on the CPU, channels_last."""
        drawn = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(0))
        return drawn.contiguous(memory_format=torch.channels_last)

    def bytes_moved(self, batch: int, dtype: torch.dtype) -> int:
        """Return the least bytes that its operator calls move: every argument read once, every result written once.

        The tensor between two calls is a result of one and an argument of the other.
        """
        with torch.device("meta"):
            module = self._of(create_model(self.model, dtype=dtype, backend="cpu").eval())
            x = torch.empty(batch, *self.shape, dtype=dtype).to(memory_format=torch.channels_last)
        return sum(launches.moved_bytes(call) for call in launches.record_calls(module, x))


@cache
def blocks_of(model: str) -> tuple[Block, ...]:
    """Return the blocks of a network at its own input size that differ in shapes, in the order of the forward."""
    network = create_model(model, device="meta").eval()
    found: dict[tuple[object, ...], Block] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            block = Block(model, path, tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))
            weights = tuple(tuple(weight.shape) for weight in module.parameters())
            found.setdefault((block.shape, block.out, weights), block)

        return hook

    for i, stage in enumerate(network.get_submodule("blocks").children()):
        for j, block in enumerate(stage.children()):
            block.register_forward_hook(note(f"blocks.{i}.{j}"))
    with effkernels.backend("reference"), torch.no_grad():
        network(torch.empty(1, *model_config(model).input_size, device="meta"))
    return tuple(found.values())


def stack_of(model: str, from_stage: int) -> Block:
    """Return the blocks of a network from a stage on."""
    found = blocks_of(model)
    (first,) = (block for block in found if block.path == f"blocks.{from_stage}.0")
    path = f"{first.path}-{found[-1].path.removeprefix('blocks.')}"
    return Block(model, path, first.shape, found[-1].out, from_stage)


def contenders(
    block: Block, images: Tensor, dtype: torch.dtype, device: torch.device, modes: Sequence[str | None]
) -> dict[str, Contender]:
    """Return the contenders of a block, by name.

    Args:
        images: the batch, on the device.
        modes: of torch.compile, None for its default.
    """
    module = _on_device(block.module, dtype, device)
    reference = measure.on_backend(module, "reference")

    def of(function: Callable[[Tensor], Tensor], backend: str = "") -> Contender:
        def prepare() -> PreparedCall:
            x = images.clone(memory_format=torch.channels_last)
            return lambda: (function(x),)

        return Contender(prepare, backend)

    found = {
        f"effkernels-{name}": of(measure.on_backend(module, name), name)
        for name in measure.ours("depthwise_bn_act_gate", dtype, device)
    }
    if isinstance(module, Stack):
        for name in measure.ours(BLOCK, dtype, device):
            found[f"effkernels-{name}{ONE_BY_ONE}"] = of(measure.on_backend(module.blocks, name), name)
    found["eager-channels-last"] = of(reference)
    for mode in modes:
        found[measure.compiled_name(mode)] = of(torch.compile(reference, mode=mode, dynamic=False))
    return found


def _on_device(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    moved: nn.Module = module.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


@torch.inference_mode()
def measure_block(
    block: Block, batch: int, dtype: torch.dtype, device: torch.device, modes: Sequence[str | None] = ()
) -> tuple[int, list[Measured], list[Refused]]:
    """Time every contender of a block.

    Returns:
        The bytes that it cannot avoid to move, the contenders that ran, and those that did not or were wrong.
    """
    torch._dynamo.reset()
    size = block.bytes_moved(batch, dtype)
    few = block.images(min(batch, _PARITY_IMAGES)).to(device, dtype)
    with effkernels.backend("reference"):
        # Of the weights and images as they are rounded.
        truth = _on_device(_on_device(block.module, dtype, device), torch.float64, device)(few.double())
        plain = _on_device(block.module, dtype, device)(few)
    repeated = few.repeat(-(-batch // len(few)), 1, 1, 1)[:batch].contiguous(memory_format=torch.channels_last)
    copies = timing.input_count(size, environment.last_level_cache_bytes(device))
    found = contenders(block, repeated, dtype, device, modes)
    return size, *measure.compare(found, (truth,), (plain,), copies, device)

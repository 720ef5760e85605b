"""Whole blocks of a network, fused against plain PyTorch and torch.compile; parity first, then time in turns."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

import effkernels
from effkernels import environment
from effkernels.bench import timing
from effkernels.bench.check import sample_model
from effkernels.bench.least_work import least_work
from effkernels.bench.measure import WRONG, Options, Refusal, measure
from effkernels.bench.op_cases import dtype_name
from effkernels.bench.samples import sample_foreign
from effkernels.bench.timing import Row
from effkernels.models.sources import find_model, input_size_of_source, unwrapped
from effkernels.ops.parity import errors
from effkernels.optimize.swapped import is_swapped

CONTENDERS = {
    "effkernels": "the block on this package's operators; another library's after optimize_",
    "eager": "the block in plain PyTorch, channels_last",
    "compile": "the same under torch.compile",
}
_PARITY_IMAGES = 2


class Part(Protocol):
    """What is timed: a module and the images that it takes."""

    def case(self, batch: int) -> str:
        """Return the case as rows name it."""

    def least_work(self, batch: int, dtype: torch.dtype) -> tuple[int, int]:
        """Return the bytes and the FLOPs that no version can avoid."""

    def plain(self) -> nn.Module:
        """Return a copy in plain PyTorch, float32 on the CPU."""

    def fused(self) -> nn.Module:
        """Return a copy that calls this package's operators, float32 on the CPU."""

    def images(self, batch: int) -> Tensor:
        """Return random inputs, float32 on the CPU."""


@dataclass(frozen=True)
class Block:
    """A block of a network in eval mode.

    Attributes:
        model: one of the forms of `effkernels.models.sources.find_model`.
        size: (channels, height, width) of the network's images.
        path: of the block in the network.
        shape: (C, H, W) of an image that it takes.
        out: of one that it gives.
    """

    model: str
    size: tuple[int, int, int]
    path: str
    shape: tuple[int, ...]
    out: tuple[int, ...]

    def case(self, batch: int) -> str:
        """Return the case as rows name it."""
        words = ["x".join(map(str, shape)) for shape in ((batch, *self.shape), self.out)]
        return f"{self.model} {self.path} {words[0]} to {words[1]}"

    def least_work(self, batch: int, dtype: torch.dtype) -> tuple[int, int]:
        """Return the bytes and the FLOPs that no version of the block can avoid, see `least_work`."""
        return least_work(self.plain(), (batch, *self.shape), (batch, *self.out), dtype)

    def plain(self) -> nn.Module:
        """Return a copy of the block in plain PyTorch, float32 on the CPU."""
        return copy.deepcopy(_plain(self.model, self.size).get_submodule(self.path))

    def fused(self) -> nn.Module:
        """Return a copy of the block that calls this package's operators, float32 on the CPU."""
        return copy.deepcopy(_fused(self.model, self.size).get_submodule(self.path))

    def images(self, batch: int) -> Tensor:
        """Return random inputs, float32 on the CPU, channels_last."""
        drawn = torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))
        return drawn.contiguous(memory_format=torch.channels_last)


def _plain(model: str, size: tuple[int, int, int]) -> nn.Module:
    if find_model(model).is_own:
        return sample_model(model)
    return unwrapped(sample_foreign(model, size[0], size[1]))


@functools.lru_cache(maxsize=1)
def _fused(model: str, size: tuple[int, int, int]) -> nn.Module:
    network = _plain(model, size)
    if not find_model(model).is_own:
        network = copy.deepcopy(network)
        effkernels.optimize_(network, input_size=size)
    return network


@functools.lru_cache(maxsize=4)
def block_paths(model: str, size: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the paths of all blocks of a network that run fused, in the order of the modules.

    Args:
        size: (channels, height, width) of its images.
    """
    if find_model(model).is_own:
        stages = _plain(model, size).get_submodule("blocks").children()
        return tuple(f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j, _ in enumerate(stage.children()))
    swapped = [path for path, module in _fused(model, size).named_modules() if path and is_swapped(module)]
    # A module around blocks is fused too, to keep the memory format; the blocks are the innermost ones.
    return tuple(path for path in swapped if not any(other.startswith(f"{path}.") for other in swapped))


@functools.lru_cache(maxsize=4)
def blocks_of(model: str, img_size: int | None = None) -> tuple[Block, ...]:
    """Return the blocks of a network that run fused and differ in shapes, in the order of the forward.

    Those of another library's network are the modules that `optimize_` swaps in it.

    Raises:
        ValueError, ImportError, OSError: as of `find_model` and of building the model.
    """
    size = input_size_of_source(find_model(model))
    if img_size is not None:
        size = (size[0], img_size, img_size)
    network = _plain(model, size)
    found: dict[tuple[object, ...], Block] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not isinstance(output, Tensor) or output.ndim != 4:
                return
            block = Block(model, size, path, tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))
            weights = tuple(tuple(weight.shape) for weight in module.parameters())
            found.setdefault((block.shape, block.out, weights), block)

        return hook

    handles = [network.get_submodule(path).register_forward_hook(note(path)) for path in block_paths(model, size)]
    try:
        with torch.inference_mode(), effkernels.backend("reference"):
            network(torch.zeros(1, *size))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found.values())


class _OnReference:
    """A module called with every operator in plain PyTorch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, images: Tensor) -> Tensor:
        with effkernels.backend("reference"):
            return self.module(images)  # type: ignore[no-any-return]


def measure_block(
    block: Part,
    batch: int,
    dtype: torch.dtype,
    contenders: Sequence[str],
    device: torch.device,
    options: Options,
    *,
    threads: int,
    date: str,
    advance: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
    suite: str = "block",
) -> tuple[list[Row], list[Refusal]]:
    """Measure a block or another part; arguments and results as of `op_cases.measure_op`."""
    torch._dynamo.reset()
    case = block.case(batch)
    few = block.images(min(batch, _PARITY_IMAGES))
    with torch.inference_mode():
        rounded = _moved(block.plain(), device, dtype)
        plain = _OnReference(rounded)(few.to(device, dtype))
        truth = _OnReference(copy.deepcopy(rounded).double())(few.to(device, dtype).double())
        usual = errors(plain, truth).l2
        images = few.repeat(-(-batch // len(few)), 1, 1, 1)[:batch].to(device, dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        count = timing.input_count(images.nbytes, environment.last_level_cache_bytes(device))
        inputs = [images, *(images.clone(memory_format=torch.channels_last) for _ in range(count - 1))]
        functions: dict[str, Callable[[Tensor], Tensor]] = {}
        parity: dict[str, float] = {}
        refusals: list[Refusal] = []
        for name in contenders:
            try:
                function = _contender(name, block, device, dtype)
                error = errors(function(_inputs_of(name, images))[: len(few)], truth[:batch]).l2
                reason = None
                if not error <= WRONG * max(usual, torch.finfo(dtype).eps):
                    reason = f"wrong: off by {error:.1e} from float64, plain PyTorch by {usual:.1e}; not timed"
            except Exception as failure:  # a foreign compiler may raise anything
                reason = f"failed: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            if reason is not None:
                refusals.append(Refusal(name, case, reason))
                for _ in range(options.rounds):
                    advance(name)
                continue
            functions[name], parity[name] = function, error
        if not functions:
            return [], refusals
        measured = measure(
            {
                name: _as_run(function, [_inputs_of(name, one) for one in inputs])
                for name, function in functions.items()
            },
            device,
            options,
            dtype=dtype,
            advance=advance,
            report=lambda line: report(f"{case}, {dtype_name(dtype)}: {line}"),
        )
    moved, flops = block.least_work(batch, dtype)
    rows = []
    for name in functions:
        row = timing.make_row(
            timing.summarise(measured.times[name]),
            suite=suite,
            case=case,
            contender=name,
            device=environment.device_name(device, threads),
            dtype=dtype_name(dtype),
            batch=batch,
            date=date,
            rel_error=parity[name],
            bytes=moved,
            flops=flops,
            floor_us=measured.floor_us(moved, flops),
        )
        rows.append(dataclasses.replace(row, name=name, **measured.fields(name)))
    return rows, refusals


def _inputs_of(name: str, images: Tensor) -> Tensor:
    """Return the images in the memory format that a contender is for."""
    return images.contiguous() if name == "eager-nchw" else images


def _contender(name: str, block: Part, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if name == "effkernels":
        return _moved(block.fused(), device, dtype)
    if name == "eager-nchw":
        module = block.plain().to(device, dtype)

        def in_nchw(images: Tensor) -> Tensor:
            with effkernels.backend("reference"):
                return module(images)  # type: ignore[no-any-return]

        return in_nchw
    plain = _OnReference(_moved(block.plain(), device, dtype))
    return plain if name == "eager" else torch.compile(plain, dynamic=False)


def _moved(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    moved: nn.Module = module.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def _as_run(function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> timing.Run:
    return lambda number: function(inputs[number % len(inputs)])

"""Calls of the operators with random tensors, for checking and for timing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effkernels._norm import gather_norms
from effkernels.ops import reference

DEPTHWISE_OPS = ("depthwise_bn_act", "depthwise_bn_act_squeeze", "depthwise_bn_act_gate", "depthwise_bn_act_se")


@dataclass(frozen=True)
class OpCase:
    """One call of an operator.

    Attributes:
        op: its name.
        shape: the shape in words, the batch first.
        batch: images in x.
        tensors: the tensor arguments by their names in the schema, float64 on the CPU.
        options: the other arguments by name.
    """

    op: str
    shape: str
    batch: int
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]

    def _is_wide(self, name: str) -> bool:
        """Return whether an argument stays float32 with 16-bit images: per-channel vectors and pooled channels."""
        return self.tensors[name].ndim == 1 or name == "pooled"

    def prepare(self, module: Any, dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        """Return a function that calls ``module.<op>`` on tensors of its own and returns all results.

        Images (channels_last) and matrices are in ``dtype``, per-channel vectors in float32 (float64 beside float64).
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {}
        for name, tensor in self.tensors.items():
            value = tensor.to(device, wide if self._is_wide(name) else dtype, copy=True)
            tensors[name] = value.to(memory_format=torch.channels_last) if tensor.ndim == 4 else value
        function = getattr(module, self.op)
        leading: tuple[str, ...] = ("x", "weight")
        if "pooled" in tensors:
            leading = ("pooled", "w_reduce", "b_reduce", "w_expand", "b_expand")
        elif "expand_weight" in tensors:
            leading = ("x", "expand_weight", "weight")
        positional = [tensors.pop(name) for name in leading]
        options = gather_norms({**tensors, **self.options})

        def call() -> tuple[Tensor, ...]:
            result = function(*positional, **options)
            return result if isinstance(result, tuple) else (result,)

        return call

    def rounded(self, dtype: torch.dtype) -> OpCase:
        """Return the case with its values rounded to what a call in ``dtype`` sees, so that the truth sees the same."""
        return replace(
            self,
            tensors={
                name: tensor.to(torch.float32 if self._is_wide(name) else dtype).double()
                for name, tensor in self.tensors.items()
            },
        )

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Return the least bytes of a call in ``dtype``: every argument read once, every result written once."""
        read = sum(t.numel() * (4 if self._is_wide(name) else dtype.itemsize) for name, t in self.tensors.items())
        written = sum(result.nbytes for result in self.prepare(reference, dtype, torch.device("meta"))())
        return read + written


class _Random:
    """Normal numbers from a fixed seed."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def norm(self, channels: int, prefix: str = "") -> dict[str, Tensor]:
        return {
            f"{prefix}norm_weight": 1 + 0.2 * self(channels),
            f"{prefix}norm_bias": 0.2 * self(channels),
            f"{prefix}norm_mean": 0.2 * self(channels),
            f"{prefix}norm_var": self(channels).abs() + 0.3,
        }

    def excite(self, channels: int, reduced: int) -> dict[str, Tensor]:
        return {
            "w_reduce": self(reduced, channels) / math.sqrt(channels),
            "b_reduce": 0.1 * self(reduced),
            "w_expand": self(channels, reduced) / math.sqrt(reduced),
            "b_expand": 0.1 * self(channels),
        }


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def depthwise_case(
    op: str,
    shape: tuple[int, int, int, int],
    kernel: int,
    stride: int,
    padding: tuple[int, int, int, int] | None = None,
    reduced: int | None = None,
) -> OpCase:
    """Return a call of one of `DEPTHWISE_OPS` with batch norm and silu.

    Args:
        shape: of x, (N, C, H, W).
        padding: (top, bottom, left, right); by default half the kernel on every side.
        reduced: width of squeeze-and-excitation; by default a quarter of the channels.
    """
    random = _Random()
    channels = shape[1]
    tensors = {"x": random(*shape), "weight": random(channels, 1, kernel, kernel) / kernel, **random.norm(channels)}
    if op in ("depthwise_bn_act_gate", "depthwise_bn_act_se"):
        tensors |= random.excite(channels, reduced or max(1, channels // 4))
    options = {"stride": stride, "padding": padding or (kernel // 2,) * 4, "activation": "silu"}
    return OpCase(op, f"{_words(shape)} {kernel}x{kernel} stride {stride}", shape[0], tensors, options)


def gate_case(batch: int, channels: int, reduced: int | None = None) -> OpCase:
    """Return a call of squeeze_excite_gate."""
    random = _Random()
    tensors = {"pooled": random(batch, channels), **random.excite(channels, reduced or max(1, channels // 4))}
    return OpCase("squeeze_excite_gate", f"{batch}x{channels}", batch, tensors, {})


def pointwise_case(
    shape: tuple[int, int, int, int],
    out: int,
    *,
    activation: str = "identity",
    gate: bool = False,
    residual: bool = False,
) -> OpCase:
    """Return a call of pointwise_bn_act from ``shape`` to ``out`` channels."""
    random = _Random()
    batch, channels, height, width = shape
    tensors = {
        "x": random(*shape),
        "weight": random(out, channels, 1, 1) / math.sqrt(channels),
        **random.norm(out),
    }
    words = f"{_words(shape)} to {out}"
    if gate:
        tensors["gate"] = torch.sigmoid(random(batch, channels))
        words += ", gate"
    if residual:
        tensors["residual"] = random(batch, out, height, width)
        words += ", residual"
    return OpCase("pointwise_bn_act", words, batch, tensors, {"activation": activation})


def expand_case(shape: tuple[int, int, int, int], expanded: int, kernel: int, stride: int) -> OpCase:
    """Return a call of expand_depthwise_squeeze, ``shape`` to ``expanded`` channels, padded by half the kernel."""
    random = _Random()
    channels = shape[1]
    tensors = {
        "x": random(*shape),
        "expand_weight": random(expanded, channels, 1, 1) / math.sqrt(channels),
        **random.norm(expanded, "expand_"),
        "weight": random(expanded, 1, kernel, kernel) / kernel,
        **random.norm(expanded),
    }
    options = {"stride": stride, "padding": (kernel // 2,) * 4, "expand_activation": "silu", "activation": "silu"}
    words = f"{_words(shape)} to {expanded}, {kernel}x{kernel} stride {stride}"
    return OpCase("expand_depthwise_squeeze", words, shape[0], tensors, options)


def conv_case(shape: tuple[int, int, int, int], out: int) -> OpCase:
    """Return a call of conv_bn_act, 3x3 with stride 2, as in the stem."""
    random = _Random()
    batch, channels, _, _ = shape
    tensors = {
        "x": random(*shape),
        "weight": random(out, channels, 3, 3) / math.sqrt(9 * channels),
        **random.norm(out),
    }
    options = {"stride": 2, "padding": (1, 1, 1, 1), "activation": "silu"}
    return OpCase("conv_bn_act", f"{_words(shape)} 3x3 stride 2 to {out}", batch, tensors, options)

"""The calls whose kernels are compiled: operators on tensors without storage, at shapes that networks have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Call:
    """One call of one operator.

    Attributes:
        shape: of x, (N, C, H, W); of pooled, (N, C).
        out: output channels of a product.
        reduced: width of squeeze-and-excitation.
        kernel: height and width of the convolution's kernel, or one number for both.
        weight: type of the convolution's weight; None: that of x.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = BFLOAT16
    out: int = 0
    kernel: int | tuple[int, int] = 3
    stride: int = 1
    dilation: int = 1
    reduced: int = 0
    activation: str = "silu"
    gated: bool = False
    residual: bool = False
    allow_tf32: bool = False
    weight: torch.dtype | None = None

    def __str__(self) -> str:
        words = [self.op, "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        words += [f"to {self.out}"] if self.out else []
        words += (
            ["{}x{} stride {}".format(*self.window, self.stride)] if "conv" in self.op or "depthwise" in self.op else []
        )
        words += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        words += [name for name in ("gated", "residual", "allow_tf32") if getattr(self, name)]
        words += [] if self.weight is None else [f"{str(self.weight).removeprefix('torch.')} weight"]
        return ", ".join([*words, self.activation])

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel

    @property
    def wide(self) -> bool:
        """Return whether every pixel is a whole number of 16-byte vectors."""
        vector = 16 // self.dtype.itemsize
        return self.shape[1] % vector == 0 and self.out % vector == 0

    @property
    def exact(self) -> bool:
        """Return whether products have to be exact float32."""
        return self.dtype == FLOAT32 and not self.allow_tf32

    def arguments(self) -> dict[str, Any]:
        """Return the arguments by their names in the schema, the tensors on the meta device."""
        n, channels = self.shape[:2]
        if self.op == "squeeze_excite_gate":
            return {"pooled": _meta(n, channels), **self._excite(), "activation": self.activation}
        options: dict[str, Any] = {"x": self._image(*self.shape), "activation": self.activation}
        weight = self.weight or self.dtype
        if self.op == "pointwise_bn_act":
            options |= {"weight": _meta(self.out, channels, 1, 1, dtype=weight), **_norm(self.out)}
            options |= {"gate": _meta(n, channels, dtype=self.dtype)} if self.gated else {}
            options |= {"residual": self._image(n, self.out, *self.shape[2:])} if self.residual else {}
            return options | {"allow_tf32": self.allow_tf32}
        padding = tuple(self.dilation * (size // 2) for size in self.window for _ in range(2))
        options |= {"stride": self.stride, "padding": padding}
        if self.op == "expand_depthwise_squeeze":
            expand = {f"expand_{name}": t for name, t in _norm(self.out).items()}
            expand |= {"expand_weight": _meta(self.out, channels, 1, 1, dtype=weight)}
            options |= {**expand, "expand_activation": self.activation}
            options |= {"weight": _meta(self.out, 1, *self.window, dtype=weight), **_norm(self.out)}
            return options | {"dilation": self.dilation, "allow_tf32": self.allow_tf32}
        if self.op == "conv_bn_act":
            options |= {"weight": _meta(self.out, channels, *self.window, dtype=weight), **_norm(self.out)}
            return options | {"allow_tf32": self.allow_tf32}
        options |= {"weight": _meta(channels, 1, *self.window, dtype=weight), **_norm(channels)}
        options |= {"dilation": self.dilation}
        if not self.reduced:
            return options
        return options | self._excite() | {"se_activation": "silu"}

    def _image(self, *shape: int) -> Tensor:
        return _meta(*shape, dtype=self.dtype).to(memory_format=torch.channels_last)

    def _excite(self) -> dict[str, Any]:
        channels, reduced = self.shape[1], self.reduced
        return {
            "w_reduce": _meta(reduced, channels, dtype=self.dtype),
            "b_reduce": _meta(reduced),
            "w_expand": _meta(channels, reduced, dtype=self.dtype),
            "b_expand": _meta(channels),
            "gate_activation": "sigmoid",
        }


def _meta(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(channels: int) -> dict[str, Tensor]:
    return {name: _meta(channels) for name in ("norm_weight", "norm_bias", "norm_mean", "norm_var")}


def _pointwise(images: int, channels: int, size: int, out: int, **others: Any) -> Call:
    return Call("pointwise_bn_act", (images, channels, size, size), out=out, **others)


# The layers are B0's and B4's, where nothing else is said in bfloat16 at batch 256, at their native sizes.
POINTWISE: tuple[Call, ...] = (
    _pointwise(256, 16, 112, 96),
    _pointwise(256, 24, 56, 144),
    _pointwise(256, 96, 56, 24, gated=True, activation="identity"),
    _pointwise(256, 144, 56, 24, gated=True, residual=True, activation="identity", dtype=FLOAT16),
    _pointwise(256, 240, 28, 40, gated=True, residual=True, activation="identity"),
    _pointwise(256, 480, 14, 80, gated=True, residual=True, activation="identity", weight=FLOAT32),
    _pointwise(256, 672, 7, 192, gated=True, activation="identity"),
    _pointwise(1, 1152, 7, 320, gated=True, activation="identity"),
    _pointwise(256, 320, 7, 1280),
    _pointwise(1, 24, 56, 144, dtype=FLOAT16),
    _pointwise(8, 1152, 4, 192, gated=True, residual=True, activation="identity"),  # a tile over several images
    _pointwise(256, 1152, 4, 192, gated=True, residual=True, activation="identity"),
    _pointwise(256, 160, 24, 960, activation="hard_swish"),
    _pointwise(256, 40, 28, 240, dtype=FLOAT32),
    _pointwise(256, 480, 14, 80, gated=True, residual=True, activation="identity", dtype=FLOAT32),
    _pointwise(1, 1152, 7, 192, gated=True, residual=True, activation="identity", dtype=FLOAT32),
    _pointwise(8, 1152, 4, 192, gated=True, activation="identity", dtype=FLOAT32),
    _pointwise(256, 40, 28, 240, dtype=FLOAT32, allow_tf32=True),
    _pointwise(256, 480, 14, 80, gated=True, residual=True, activation="gelu", dtype=FLOAT32, allow_tf32=True),
    _pointwise(2, 7, 13, 100, gated=True, residual=True, activation="gelu_tanh"),
    _pointwise(2, 100, 13, 7, gated=True, residual=True, dtype=FLOAT32),
)


def _depthwise(
    which: str, images: int, channels: int, size: int, kernel: int | tuple[int, int], stride: int, **others: Any
) -> Call:
    reduced = max(1, channels // 24) if which in ("_gate", "_se") else 0
    shape = (images, channels, size, size)
    return Call(f"depthwise_bn_act{which}", shape, kernel=kernel, stride=stride, reduced=reduced, **others)


DEPTHWISE: tuple[Call, ...] = (
    *(
        _depthwise("", 256, 240, 28, kernel, stride, weight=FLOAT32, dtype=dtype)
        for dtype in (BFLOAT16, FLOAT32)
        for kernel in (3, 5)
        for stride in (1, 2)
    ),
    _depthwise("", 256, 96, 14, 7, 1),
    _depthwise("", 256, 96, 14, 9, 2),
    _depthwise("", 256, 96, 56, (1, 11), 1),
    _depthwise("", 256, 96, 56, (11, 1), 1, dtype=FLOAT32),
    _depthwise("", 256, 96, 56, 11, 1),
    _depthwise("", 256, 96, 14, 13, 1, weight=FLOAT32),
    _depthwise("", 256, 96, 14, 13, 2, dtype=FLOAT32),
    _depthwise("", 256, 240, 28, 5, 1, dilation=2, dtype=FLOAT16),
    _depthwise("", 2, 7, 13, 3, 1, activation="gelu_tanh"),
    _depthwise("", 2, 7, 13, 5, 2, dtype=FLOAT32),
    _depthwise("_squeeze", 256, 96, 112, 3, 2, weight=FLOAT32),
    _depthwise("_squeeze", 256, 144, 56, 5, 2, weight=FLOAT32),
    _depthwise("_squeeze", 256, 1152, 7, 3, 1, dtype=FLOAT16),
    _depthwise("_squeeze", 1, 672, 14, 5, 1, dtype=FLOAT32),
    _depthwise("_gate", 256, 672, 14, 5, 1, weight=FLOAT32),
    _depthwise("_gate", 1, 1152, 7, 5, 1, weight=FLOAT32),
    _depthwise("_gate", 8, 40, 28, 3, 1, dtype=FLOAT32),
    _depthwise("_se", 256, 1152, 7, 5, 1, weight=FLOAT32),
    _depthwise("_se", 256, 144, 56, 3, 1, weight=FLOAT32),
    _depthwise("_se", 256, 144, 56, 3, 1, dtype=FLOAT32),
)


def _expand(images: int, channels: int, size: int, out: int, kernel: int, stride: int, **others: Any) -> Call:
    shape = (images, channels, size, size)
    return Call("expand_depthwise_squeeze", shape, out=out, kernel=kernel, stride=stride, **others)


EXPAND: tuple[Call, ...] = (
    _expand(256, 16, 112, 96, 3, 2),
    _expand(256, 24, 56, 144, 5, 2, weight=FLOAT32),
    _expand(256, 40, 28, 240, 5, 1),
    _expand(1, 80, 14, 480, 3, 1, weight=FLOAT32),
    _expand(256, 128, 56, 768, 3, 1, dtype=FLOAT16),
    _expand(2, 7, 13, 100, 3, 1, activation="gelu_tanh"),
    _expand(256, 32, 95, 192, 3, 1, dtype=FLOAT32),
    _expand(256, 64, 28, 384, 5, 1, dtype=FLOAT32, allow_tf32=True),
    _expand(256, 32, 56, 192, 5, 2, dtype=FLOAT32, allow_tf32=True),
    _expand(256, 16, 112, 96, 3, 2, dtype=FLOAT32, allow_tf32=True),
    _expand(256, 64, 28, 384, 5, 2),
    _expand(256, 64, 28, 384, 5, 2, weight=FLOAT32),
    _expand(2, 30, 28, 181, 5, 2),
    _expand(2, 30, 56, 181, 3, 2, activation="gelu_tanh"),
)
GATE: tuple[Call, ...] = (
    Call("squeeze_excite_gate", (256, 1152), reduced=48),
    Call("squeeze_excite_gate", (1, 100), reduced=7, dtype=FLOAT32, activation="relu"),
)
CONV: tuple[Call, ...] = (
    *(Call("conv_bn_act", (256, 3, 224, 224), dtype, out=32, stride=2) for dtype in (BFLOAT16, FLOAT16, FLOAT32)),
    Call("conv_bn_act", (256, 3, 380, 380), FLOAT32, out=48, stride=2, allow_tf32=True),
    Call("conv_bn_act", (1, 5, 31, 33), out=70, kernel=5, activation="gelu"),
    Call("conv_bn_act", (1, 5, 31, 33), FLOAT32, out=70, kernel=5),
    Call("conv_bn_act", (256, 24, 56, 56), out=96, stride=2),
    Call("conv_bn_act", (256, 24, 56, 56), FLOAT32, out=96, stride=1),
)
CALLS: tuple[Call, ...] = (*POINTWISE, *DEPTHWISE, *EXPAND, *GATE, *CONV)

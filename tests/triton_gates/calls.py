"""The calls whose kernels are compiled: operators on tensors without storage, at shapes that networks have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from effkernels.ops.call import OpCall

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class CompiledCall(OpCall):
    """One call of one operator, and the types for which its kernels are compiled.

    Attributes:
        dtype: of images and matrices.
        weight: type of the convolutions' weights; None: that of x.
    """

    dtype: torch.dtype = BFLOAT16
    weight: torch.dtype | None = None

    def __str__(self) -> str:
        words = [self.op, self.size, str(self.dtype).removeprefix("torch.")]
        words += [f"to {self.out_channels}"] if self.out_channels else []
        words += [self.window] if self.window else []
        words += [name for name in ("gated", "residual", "allow_tf32") if getattr(self, name)]
        words += [] if self.weight is None else [f"{str(self.weight).removeprefix('torch.')} weight"]
        return ", ".join([*words, self.activation])

    @property
    def wide(self) -> bool:
        """Return whether every pixel is a whole number of 16-byte vectors."""
        vector = 16 // self.dtype.itemsize
        return self.channels % vector == 0 and self.out_channels % vector == 0

    @property
    def exact(self) -> bool:
        """Return whether products have to be exact float32."""
        return self.dtype == FLOAT32 and not self.allow_tf32

    def on_meta(self) -> dict[str, Any]:
        """Return the arguments by their names in the schema, the tensors on the meta device."""
        weight = self.weight or self.dtype
        return self.arguments(self.dtype, "meta", dtypes={"weight": weight, "expand_weight": weight})


def _pointwise(images: int, channels: int, size: int, out: int, **others: Any) -> CompiledCall:
    return CompiledCall.on("pointwise_bn_act", (images, channels, size, size), out_channels=out, **others)


# The layers are B0's and B4's, where nothing else is said in bfloat16 at batch 256, at their native sizes.
POINTWISE: tuple[CompiledCall, ...] = (
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


def _pool(images: int, channels: int, size: int, out: int, **others: Any) -> CompiledCall:
    return CompiledCall.on("pointwise_bn_act_pool", (images, channels, size, size), out_channels=out, **others)


POINTWISE_POOL: tuple[CompiledCall, ...] = (
    _pool(256, 320, 7, 1280),
    _pool(1, 320, 7, 1280, dtype=FLOAT16),
    _pool(256, 448, 12, 1792, activation="hard_swish"),
    _pool(256, 320, 7, 1280, dtype=FLOAT32),
    _pool(1, 320, 7, 1280, dtype=FLOAT32, allow_tf32=True),
    _pool(2, 7, 13, 100, activation="gelu_tanh"),
)


def _depthwise(
    which: str, images: int, channels: int, size: int, kernel: int | tuple[int, int], stride: int, **others: Any
) -> CompiledCall:
    if which in ("_gate", "_se"):
        others["reduced"] = max(1, channels // 24)
    shape = (images, channels, size, size)
    return CompiledCall.on(f"depthwise_bn_act{which}", shape, kernel, stride=stride, **others)


DEPTHWISE: tuple[CompiledCall, ...] = (
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


def _expand(
    images: int, channels: int, size: int, out: int, kernel: int, stride: int, activation: str = "silu", **others: Any
) -> CompiledCall:
    shape = (images, channels, size, size)
    others |= {"expand_activation": activation, "activation": activation}
    return CompiledCall.on("expand_depthwise_squeeze", shape, kernel, stride=stride, out_channels=out, **others)


EXPAND: tuple[CompiledCall, ...] = (
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
GATE: tuple[CompiledCall, ...] = (
    CompiledCall.on("squeeze_excite_gate", (256, 1152), reduced=48),
    CompiledCall.on("squeeze_excite_gate", (1, 100), reduced=7, dtype=FLOAT32, activation="relu"),
)


def _conv(shape: tuple[int, int, int, int], out: int, kernel: int = 3, **others: Any) -> CompiledCall:
    return CompiledCall.on("conv_bn_act", shape, kernel, out_channels=out, **others)


CONV: tuple[CompiledCall, ...] = (
    *(_conv((256, 3, 224, 224), 32, stride=2, dtype=dtype) for dtype in (BFLOAT16, FLOAT16, FLOAT32)),
    _conv((256, 3, 380, 380), 48, stride=2, dtype=FLOAT32, allow_tf32=True),
    _conv((1, 5, 31, 33), 70, 5, activation="gelu"),
    _conv((1, 5, 31, 33), 70, 5, dtype=FLOAT32),
    _conv((256, 24, 56, 56), 96, stride=2),
    _conv((256, 24, 56, 56), 96, dtype=FLOAT32),
)
CALLS: tuple[CompiledCall, ...] = (*POINTWISE, *POINTWISE_POOL, *DEPTHWISE, *EXPAND, *GATE, *CONV)


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """One step of a training block on an image t, and the types for which its kernels are compiled.

    Attributes:
        op: of `effkernels.triton.TRAINING_STEPS`.
        shape: of t, (N, H, W, C).
        kernel, stride: of a depthwise convolution, padded so that stride 1 keeps the size.
    """

    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = BFLOAT16
    kernel: int = 0
    stride: int = 1
    activation: str = "silu"

    def __str__(self) -> str:
        batch, height, width, channels = self.shape
        words = [self.op, f"{batch}x{channels}x{height}x{width}", str(self.dtype).removeprefix("torch.")]
        words += [f"{self.kernel}x{self.kernel} stride {self.stride}"] if self.kernel else []
        return ", ".join([*words, self.activation])

    @property
    def wide(self) -> bool:
        """Return whether every pixel is a whole number of 16-byte vectors."""
        return self.shape[3] % (16 // self.dtype.itemsize) == 0

    def on_meta(self) -> tuple[Any, ...]:
        """Return the arguments of the step, the tensors on the meta device."""
        batch, height, width, channels = self.shape
        pad, size = self.kernel // 2, (height, width)
        if self.kernel:
            size = tuple((n + 2 * pad - self.kernel) // self.stride + 1 for n in size)

        def image(height: int, width: int) -> torch.Tensor:
            return torch.empty(batch, height, width, channels, dtype=self.dtype, device="meta")

        def vectors(count: int, *size: int) -> list[torch.Tensor]:
            return [torch.empty(*size, channels, device="meta") for _ in range(count)]

        t, z, norm, pads = image(height, width), image(*size), vectors(4), (pad,) * 4
        weight = torch.empty(channels, 1, self.kernel, self.kernel, device="meta")
        (factor,) = vectors(1, batch)
        return {
            "training_statistics": (t, *vectors(2), 1e-5),
            "training_norm_act": (t, *norm, self.activation, factor, t),
            "training_squeeze": (t, *norm, self.activation),
            "training_gradient_sums": (t, t, *norm, self.activation, factor, True),
            "training_norm_backward": (t, t, *norm, self.activation, *vectors(3), factor),
            "training_depthwise": (
                t, *norm, self.activation, weight, None, self.stride, pads, *vectors(2), 1e-5,
            ),
            "training_depthwise_backward": (
                z, z, *norm, self.activation, factor, factor, *vectors(3), t, *norm, self.activation, weight,
                self.stride, pads,
            ),
        }[self.op]  # fmt: skip


# The blocks of B0 at batch 256 in bfloat16, float32 beside it, and channels that no vector divides.
TRAINING: tuple[CompiledStep, ...] = (
    *(
        CompiledStep(op=f"training_{name}", shape=(256, 28, 28, 240), dtype=dtype)
        for dtype, names in (
            (BFLOAT16, ("statistics", "norm_act", "squeeze", "gradient_sums", "norm_backward")),
            (FLOAT32, ("statistics", "gradient_sums")),
        )
        for name in names
    ),
    *(
        CompiledStep(op=op, shape=(256, 28, 28, 240), dtype=dtype, kernel=kernel, stride=stride)
        for op in ("training_depthwise", "training_depthwise_backward")
        for dtype, kernel, stride in (
            (BFLOAT16, 3, 1), (BFLOAT16, 5, 1), (BFLOAT16, 5, 2), (FLOAT32, 5, 1), (BFLOAT16, 9, 1),
        )
    ),
    CompiledStep(op="training_gradient_sums", shape=(2, 13, 13, 7), activation="gelu_tanh"),
    CompiledStep(op="training_depthwise", shape=(2, 13, 13, 7), kernel=3, activation="gelu_tanh"),
    CompiledStep(op="training_depthwise_backward", shape=(2, 13, 13, 7), kernel=3, stride=2, activation="gelu_tanh"),
)  # fmt: skip

# What the usual run compiles: every kernel is among them. A thorough run compiles all of them.
ALL_CALLS: tuple[CompiledCall | CompiledStep, ...] = (*CALLS, *TRAINING)
USUAL_CALLS: tuple[CompiledCall | CompiledStep, ...] = (
    *CALLS[::2],
    *(step for step in TRAINING if step.dtype is BFLOAT16),
)

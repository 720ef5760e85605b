"""Padding of convolutions: symmetric as in PyTorch, and TensorFlow's SAME.

SAME makes an output of ceil(size / stride) and pads as little as that needs, the odd zero at the bottom and the right.
With stride 2 that differs from symmetric padding by a shift of one pixel, which changes the logits of a network by
some 3 %, so weights have to run with the padding they were trained with.
"""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]

PAD_TYPES: tuple[str, ...] = ("", "same", "same_native")
"""`""`: symmetric, as timm spells it; `"same"`: SAME for each input's size; `"same_native"`: SAME for one size."""


def symmetric_padding(kernel_size: int, stride: int = 1, dilation: int = 1) -> int:
    """Return the zeros on each of the four sides that give ceil(size / stride) pixels for an odd kernel and a stride
    of 1 or 2: (dilation * (K - 1) + stride - 1) // 2.
    """
    return (dilation * (kernel_size - 1) + stride - 1) // 2


def same_padding(size: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> tuple[int, int]:
    """Return the zeros before and after one axis of `size` pixels under TensorFlow's SAME rule.

    Together max((ceil(size / stride) - 1) * stride + dilation * (K - 1) + 1 - size, 0), half of it, rounded down,
    before. `size` may be symbolic: no branch is taken on it, so a trace stays one graph for every size, and from the
    sum written this way it works out that the output has ceil(size / stride) pixels (with size % stride in place of
    the division, the sizes of a network's last layers became terms of several pages).
    """
    span = dilation * (kernel_size - 1)
    if stride == 1:
        return span // 2, span - span // 2
    outputs = (size + stride - 1) // stride
    total = (outputs - 1) * stride + span + 1 - size
    if span + 1 < stride:  # only a kernel smaller than its stride can ask for less than nothing
        total = torch.sym_max(total, 0)
    return total // 2, total - total // 2


class PaddedConv2d(nn.Conv2d):
    """`nn.Conv2d` with one more way to pad: TensorFlow's SAME.

    The positional arguments are those of `nn.Conv2d`, so that a library that builds a second convolution after the
    pattern of this one (`type(conv)(in, out, conv.kernel_size, conv.stride, conv.padding)`, as adapters do) gets one
    with the same padding. With `pad_type=""` and no `padding` it is exactly
    `nn.Conv2d(..., padding=symmetric_padding(kernel_size, stride, dilation))`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: as of `nn.Conv2d`.
        padding: as of `nn.Conv2d`; "same" is SAME for every stride, as pad_type="same"; None: what pad_type says.
        bias: False by default.
        padding_mode, device, dtype: as of `nn.Conv2d`; SAME pads zeros only.
        pad_type: one of `PAD_TYPES`. SAME needs a square kernel and one stride and dilation for both axes.
        native_size: (height, width) of the input for which `"same_native"` freezes its padding; None otherwise.

    Raises:
        ValueError: pad_type unknown, native_size missing, or an argument that SAME does not go with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pad_type: str = "",
        native_size: tuple[int, int] | None = None,
    ) -> None:
        same = padding == "same"
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=0 if padding is None or same else padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.pad_type = ""
        self.native_size: tuple[int, int] | None = None
        if padding is None or same or pad_type:
            self.set_padding(pad_type or ("same" if same else ""), native_size)

    def set_padding(self, pad_type: str, native_size: tuple[int, int] | None = None) -> None:
        """Change the padding in place; arguments and errors as of the class."""
        if pad_type not in PAD_TYPES:
            raise ValueError(f"pad_type={pad_type!r} is not known; allowed: {', '.join(map(repr, PAD_TYPES))}")
        if pad_type == "same_native" and native_size is None:
            raise ValueError("pad_type='same_native' needs native_size=(height, width)")
        kernel, stride, dilation = self.kernel_size, self.stride, self.dilation
        if pad_type:
            for name, value in (("kernel_size", kernel), ("stride", stride), ("dilation", dilation)):
                if value[0] != value[1]:
                    raise ValueError(f"pad_type={pad_type!r} with {name}={value}; allowed: one number for both axes")
            if self.padding_mode != "zeros":
                raise ValueError(f"pad_type={pad_type!r} with padding_mode={self.padding_mode!r}; allowed: 'zeros'")
        self.pad_type = pad_type
        self.native_size = native_size if pad_type == "same_native" else None
        pads = (0, 0) if pad_type else tuple(map(symmetric_padding, kernel, stride, dilation))
        # "same" is for those who read it: the forward of this class does not.
        self.padding = "same" if pad_type else pads
        # nn.Conv2d derives this one in its constructor; keep it true for those who read it.
        self._reversed_padding_repeated_twice = [pads[1], pads[1], pads[0], pads[0]]

    def padding_for(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the zeros at (top, bottom, left, right) for an input of that many pixels; both may be symbolic."""
        if self.pad_type == "":
            return _padding_of(self)
        if self.native_size is not None:
            height, width = self.native_size
        kernel, stride, dilation = self.kernel_size[0], self.stride[0], self.dilation[0]
        return (*same_padding(height, kernel, stride, dilation), *same_padding(width, kernel, stride, dilation))

    def forward(self, input: Tensor) -> Tensor:
        if self.pad_type == "":
            return super().forward(input)
        top, bottom, left, right = self.padding_for(input.shape[-2], input.shape[-1])
        pads = (0, 0)
        if self.stride == (1, 1) and top == bottom and left == right:
            # Stride 1: the padding does not depend on the size, and the convolution pads without a copy.
            pads = (top, left)
        else:
            input = F.pad(input, (left, right, top, bottom))
        return F.conv2d(input, self.weight, self.bias, self.stride, pads, self.dilation, self.groups)

    def extra_repr(self) -> str:
        described: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.pad_type:
            described += f", pad_type={self.pad_type!r}"
        return described if self.native_size is None else f"{described}, native_size={self.native_size}"


def explicit_padding(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int, int, int]:
    """Return the zeros that `conv` adds at (top, bottom, left, right) of an input of this size (ints or symbolic)."""
    if isinstance(conv, PaddedConv2d):
        return conv.padding_for(height, width)
    return _padding_of(conv)


def _padding_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the padding that a convolution was built with."""
    if isinstance(conv.padding, str):  # "valid" and PyTorch's "same", which is for stride 1
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        return top, bottom, left, right
    vertical, horizontal = conv.padding
    return vertical, vertical, horizontal, horizontal

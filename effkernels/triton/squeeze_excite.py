"""squeeze_excite_gate, and what the depthwise kernels need of squeeze-and-excitation.

A program works for one image. Its two products are sums over rows of a matrix that every image reads, so that the
matrices come from the L2 cache; the values between the two products pass through a scratch row in memory, which makes
any number of them possible. Sums are in float32 and in an order that only the shapes decide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.triton import _launch
from effkernels.triton._common import activate, apply_gate, load_float

BLOCK_REDUCED = 32
BLOCK_CHANNELS = 64
_FILLED = 128  # programs from which on the second product is not split further: about one per multiprocessor


@triton.jit
def hidden_of(
    hidden,
    means,
    w_reduce,
    b_reduce,
    channels,
    reduced,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden[r] = activation(sum over c of w_reduce[r, c] * means[c] + b_reduce[r]); returns after a barrier."""
    for first_row in range(0, reduced, ROWS):
        r = first_row + tl.arange(0, ROWS)
        products = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for first in range(0, channels, BLOCK):
            c = first + tl.arange(0, BLOCK)
            inside = (r < reduced)[:, None] & (c < channels)[None, :]
            w = load_float(w_reduce + (r[:, None].to(tl.int64) * channels + c[None, :]), inside)
            products += w * load_float(means + c, c < channels)[None, :]
        total = tl.sum(products, axis=1)
        if b_reduce is not None:
            total += load_float(b_reduce + r, r < reduced)
        tl.store(hidden + r, activate(total, ACTIVATION), mask=r < reduced)
    tl.debug_barrier()  # every thread may read what the others wrote


@triton.jit
def gate_of(
    gate, hidden, w_expand, b_expand, first, end, reduced, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """gate[c] = gate(sum over r of w_expand[c, r] * hidden[r] + b_expand[c]) for c from `first` to `end`."""
    for first_channel in range(first, end, BLOCK):
        c = first_channel + tl.arange(0, BLOCK)
        products = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
        for first_row in range(0, reduced, ROWS):
            r = first_row + tl.arange(0, ROWS)
            inside = (c < end)[:, None] & (r < reduced)[None, :]
            w = load_float(w_expand + (c[:, None].to(tl.int64) * reduced + r[None, :]), inside)
            products += w * load_float(hidden + r, r < reduced)[None, :]
        total = tl.sum(products, axis=1)
        if b_expand is not None:
            total += load_float(b_expand + c, c < end)
        tl.store(gate + c, apply_gate(total, GATE).to(gate.dtype.element_ty), mask=c < end)


@triton.jit(do_not_specialize=["channels", "reduced", "splits", "split_channels"])
def squeeze_excite_kernel(
    gate,
    pooled,
    hidden,
    w_reduce,
    b_reduce,
    w_expand,
    b_expand,
    channels,
    reduced,
    splits,
    split_channels,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // splits).to(tl.int64)
    first = program % splits * split_channels
    own = hidden + program.to(tl.int64) * reduced
    hidden_of(own, pooled + image * channels, w_reduce, b_reduce, channels, reduced, ACTIVATION, ROWS, BLOCK)
    end = tl.minimum(first + split_channels, channels)
    gate_of(gate + image * channels, own, w_expand, b_expand, first, end, reduced, GATE, ROWS, BLOCK)


@triton.jit(do_not_specialize=["pixels", "channel_vectors", "groups", "tiles"])
def scale_kernel(
    y,
    gate,
    pixels,
    channel_vectors,
    groups,
    tiles,
    VECTOR: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y *= gate in place, for a dense channels_last y. A program takes PIXELS pixels by BLOCK channels of an image."""
    program = tl.program_id(0)
    channels = channel_vectors * VECTOR
    c = program % groups * BLOCK + tl.arange(0, BLOCK)
    p = program // groups % tiles * PIXELS + tl.arange(0, PIXELS)
    image = (program // groups // tiles).to(tl.int64)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    at = y + image * pixels * channels + (p[:, None].to(tl.int64) * channels + c[None, :])
    value = load_float(at, inside) * load_float(gate + image * channels + c, c < channels)[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=inside)


def scale_(y: Tensor, gate: Tensor) -> None:
    """y *= gate[:, :, None, None] for y (N, C, H, W) with exact channels_last strides, in one launch."""
    batch, channels, height, width = y.shape
    vector = _launch.vector_of(y.dtype) if _launch.vectors_fit(channels, y) else 1
    block = min(64, _launch.next_power_of_2(channels))
    pixels = 1024 // block * max(1, vector // 4)
    groups, tiles = _launch.divide_up(channels, block), _launch.divide_up(height * width, pixels)
    _launch.run(
        scale_kernel,
        (batch * groups * tiles,),
        y,
        gate,
        height * width,
        channels // vector,
        groups,
        tiles,
        VECTOR=vector,
        PIXELS=pixels,
        BLOCK=block,
    )


def squeeze_excite_gate(
    out: Tensor,
    pooled: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor | None,
    w_expand: Tensor,
    b_expand: Tensor | None,
    activation: str,
    gate_activation: str,
) -> None:
    batch, channels = pooled.shape
    reduced = w_reduce.shape[0]
    # Where images are few their channels are shared out; each program then repeats the first product for itself.
    wanted = min(_launch.divide_up(_FILLED, batch), _launch.divide_up(channels, BLOCK_CHANNELS))
    split_channels = _launch.divide_up(_launch.divide_up(channels, wanted), BLOCK_CHANNELS) * BLOCK_CHANNELS
    splits = _launch.divide_up(channels, split_channels)
    _launch.run(
        squeeze_excite_kernel,
        (batch * splits,),
        out,
        pooled.contiguous(),
        torch.empty((batch * splits, reduced), dtype=torch.float32, device=pooled.device),
        w_reduce.contiguous(),
        _launch.dense(b_reduce),
        w_expand.contiguous(),
        _launch.dense(b_expand),
        channels,
        reduced,
        splits,
        split_channels,
        ACTIVATION=activation,
        GATE=gate_activation,
        ROWS=BLOCK_REDUCED,
        BLOCK=BLOCK_CHANNELS,
    )


OPERATORS = {"squeeze_excite_gate": squeeze_excite_gate}

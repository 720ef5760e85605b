"""Activations, gates and the norm in float32, shared by the kernels of every family."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_float(pointer, mask):
    """Return the elements where `mask` holds, as float32, and zero elsewhere."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def clamp_0_6(x):
    # By comparisons, through which a NaN passes as it does in PyTorch; minimum and maximum would drop it.
    return tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return one of effkernels.ops.reference.ACTIVATIONS of a float32 tile."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = clamp_0_6(x)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "silu_by_tanh":
        # x sigmoid(x) = x / 2 (1 + tanh(x / 2)): one special-function instruction in place of two, and no division. Its
        # error of 2^-11 is no larger than the rounding of a 16-bit result (_launch.activation_for).
        half = 0.5 * x
        x = half + half * tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
    elif ACTIVATION == "hard_swish":
        x = x * (clamp_0_6(x + 3.0) * (1.0 / 6.0))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # x / 2 (1 + tanh(u)) = x sigmoid(2 u), which loses nothing near zero and needs no tanh.
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACTIVATION == "identity", "an activation that is not known")
    return x


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """Return the activation of a float32 tile and its derivative, that of PyTorch's backward where it has a corner."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu6":
        y = clamp_0_6(x)
        slope = tl.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        y = x * sigmoid
        slope = sigmoid + y * (1.0 - sigmoid)
    elif ACTIVATION == "hard_swish":
        y = x * (clamp_0_6(x + 3.0) * (1.0 / 6.0))
        slope = tl.where(x < -3.0, 0.0, tl.where(x > 3.0, 1.0, x * (1.0 / 3.0) + 0.5))
    elif ACTIVATION == "gelu":
        distribution = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * distribution
        slope = distribution + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        # x * s with s the sigmoid of u, from the smaller of s and 1 - s, which loses nothing where s is close to 1.
        square = x * x
        u = 1.5957691216057308 * x * (0.044715 * square + 1.0)
        tail = 1.0 / (1.0 + tl.exp(tl.abs(u)))
        s = tl.where(u < 0.0, tail, 1.0 - tail)
        y = x * s
        slope = s + x * (tail * (1.0 - tail)) * (1.5957691216057308 * (0.134145 * square + 1.0))
    else:
        tl.static_assert(ACTIVATION == "identity", "an activation that is not known")
        y = x
        slope = tl.full(x.shape, 1.0, dtype=tl.float32)
    return y, slope


@triton.jit
def apply_gate(x, GATE: tl.constexpr):
    """Return one of effkernels.ops.reference.GATES of a float32 tile."""
    if GATE == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(GATE == "hard_sigmoid", "a gate that is not known")
        x = clamp_0_6(x + 3.0) * (1.0 / 6.0)
    return x


@triton.jit
def scale_shift(c, mask, bias, norm_mean, norm_var, norm_weight, norm_bias, eps):
    """Convolution bias and norm of channels `c` as one multiply-add: norm(z + bias) = z * scale + shift.

    Each parameter is a pointer or None, as the module has it.
    """
    shift = tl.zeros(c.shape, dtype=tl.float32)
    if bias is not None:
        shift += load_float(bias + c, mask)
    scale = tl.full(c.shape, 1.0, dtype=tl.float32)
    if norm_var is not None:
        scale = tl.rsqrt(load_float(norm_var + c, mask) + eps)
        if norm_weight is not None:
            scale *= load_float(norm_weight + c, mask)
        shift = (shift - load_float(norm_mean + c, mask)) * scale
        if norm_bias is not None:
            shift += load_float(norm_bias + c, mask)
    return scale, shift

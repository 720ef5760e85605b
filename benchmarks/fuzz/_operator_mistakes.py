"""Malformed calls of the operators: one argument of a small right call replaced by what it must not be."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import effkernels
from benchmarks.fuzz._operator_calls import RandomCall, available_isas, draw_call
from effkernels.ops.call import run

_ALLOWED = (ValueError, TypeError)
_ABSURD = (0, -1, -(2**31), 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, -(2**63), 10**30)
_NO_NUMBERS: tuple[Any, ...] = (None, "3", [1], math.nan, math.inf, 1.5, 1j, b"1", object())
_NO_WORDS: tuple[Any, ...] = (None, 1, "", "swish ", "SILU", "\udcff", "a\0b", "x" * 100_000, b"silu", ["silu"])

# What a message may name beside arguments.
_OTHER_NAMES = (
    "the input",
    "the result",
    "the output",
    "the expanded tensor",
    "the hidden layer",
    "height",
    "width",
    "memory",
)
_AFTER_NAMES = ("=", "'", " has", " is", ":", " are", " would", " of shape", " needs", ";", " with", " belong", " for")

# What a tensor argument is replaced by. Types and layouts that no operator takes, and shapes that do not fit.
_NO_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda t: t.tolist(),
    "an array": lambda t: np.zeros(tuple(t.shape), np.float32),
    "a string": lambda t: "x",
    "a number": lambda t: 1.0,
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex64": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "uint8": lambda t: t.to(torch.uint8),
    "meta": lambda t: t.to("meta"),
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: (t if t.dim() == 2 else t.reshape(t.shape[0], -1)).to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "one dimension more": lambda t: t.unsqueeze(0).repeat(2, *[1] * t.dim()),
    "no dimension": lambda t: t.new_zeros(()),
    "longer": lambda t: torch.cat([t, t[:1] if len(t) else t.new_zeros((1, *t.shape[1:]))]),
    "empty": lambda t: t.new_zeros((*t.shape[:1], *[0] * (t.dim() - 1)) if t.dim() > 1 else (0,)),
    "expanded to 2^31": lambda t: t.new_zeros(()).expand(*[2**31 - 1] * t.dim()) if t.dim() < 3 else _huge(t),
    "a subclass without a device": lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"),
}
# Of these replacements the call may have a right result: other parameters allow it, or the value converts.
_MAY_PASS = ("longer", "expanded to 2^31", "a number")


def _huge(t: Tensor) -> Tensor:
    return t.new_zeros(()).expand(*t.shape[:2], 2**31 - 1, 2**31 - 1)


def check_mistake(seed: int) -> str | None:
    """Check that a malformed call raises a ValueError or TypeError that names the argument; None, or what is wrong."""
    rng = random.Random(seed)
    call = _small_call(rng)
    arguments = call.draw(seed)
    torch.ops.effkernels.cpu_isa(call.isa)
    name = rng.choice([n for n, value in arguments.items() if value is not None])
    value = arguments[name]
    may_pass = False
    if isinstance(value, Tensor):
        what = rng.choice(tuple(_NO_TENSORS))
        try:
            arguments[name] = _NO_TENSORS[what](value)
        except (RuntimeError, NotImplementedError):
            return None  # PyTorch does not make such a tensor
        may_pass = what in _MAY_PASS or (what == "empty" and name in ("x", "pooled") and value.dim() < 3)
        if name in ("x", "residual", "pooled") and what == "longer":
            may_pass = True  # a larger batch
    else:
        arguments[name], may_pass = _replaced(rng, call, name, value)
        what = repr(arguments[name])[:60]
    return _judge(call, arguments, name, what, may_pass)


def _small_call(rng: random.Random) -> RandomCall:
    isas = available_isas()
    while True:
        call = draw_call(rng.getrandbits(48), isas)
        elements = sum(math.prod(shape) for shape in call.shapes().values())
        if elements < 1 << 14 and call.batch > 0:
            return call


def _replaced(rng: random.Random, call: RandomCall, name: str, value: Any) -> tuple[Any, bool]:
    """Another value for a number, a word or the padding, and whether it may be right after all."""
    if isinstance(value, str):
        other = rng.choice(_NO_WORDS)
        return other, other == b"silu" and "activation" in name  # PyTorch takes bytes for a string
    if name.endswith("eps"):
        other = rng.choice((math.nan, math.inf, -math.inf, -1e-5, -1, None, "1e-5", 1j, [1e-5], 10**400, True, 1e300))
        return other, other is True or other == 1e300
    if name == "padding":
        kind = rng.randrange(5)
        if kind == 0:
            return tuple(value[: rng.randrange(4)]) if rng.random() < 0.5 else (*value, 0), False
        if kind == 1:
            return rng.choice((None, 1, "1111", math.nan, {}, (None,) * 4, ((1, 1), (1, 1)))), False
        changed = list(value)
        changed[rng.randrange(4)] = rng.choice(_ABSURD if kind > 2 else _NO_NUMBERS)
        return (tuple(changed) if rng.random() < 0.7 else changed), True
    return rng.choice(_ABSURD if rng.random() < 0.6 else _NO_NUMBERS), True


def _judge(call: RandomCall, arguments: dict[str, Any], name: str, what: str, may_pass: bool) -> str | None:
    told = f"{call}: {name} replaced by {what}"
    try:
        outputs = run(effkernels.ops, call.op, arguments)
    except MemoryError:
        return None  # a result that is right, but larger than the memory
    except _ALLOWED as error:
        message = str(error)
        # Where two arguments do not fit together, the message may name the other one.
        names = "|".join((*arguments, *_OTHER_NAMES))
        if re.search(rf"\b(se_)?({names})({'|'.join(_AFTER_NAMES)})", message):
            return None
        return f"{told}: the message names no argument: {type(error).__name__}: {message[:300]}"
    except Exception as error:
        return f"{told}: {type(error).__name__}: {str(error)[:300]}"
    if may_pass or what in ("meta", "a subclass without a device"):
        return None if all(isinstance(y, Tensor) for y in outputs) else f"{told}: the result is no tensor"
    return f"{told}: the call returned"

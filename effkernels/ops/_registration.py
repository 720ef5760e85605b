"""Add to the operators of both namespaces what needs Python: shape functions, gradients, autocast, FLOP formulas.

A family file describes each of its operators by one `Operator` and hands it to `register`. The compiled library defines
the operators of `torch.ops.effkernels`, and `register` adds what needs Python; where the library is not loaded there is
nothing to add to. Those of `torch.ops.effkernels_triton` are defined here, with the same schemas, so that they live
without the library; their kernels are those of effkernels.triton.

Arguments are in one of two orders (`effkernels.ops._signature`): flat, as the dispatcher has them, or with every norm
as one value, as all functions of an `Operator` and the Triton kernels take them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from effkernels import _library, triton
from effkernels.ops import _checks
from effkernels.ops._signature import Signature
from effkernels.ops.backends import DTYPES

COMPILED = "effkernels"  # the namespace of the library's operators
TRITON = "effkernels_triton"  # and of the Triton kernels

COMPILED_LIBRARY: Any = torch.library.Library(COMPILED, "FRAGMENT") if _library.is_loaded() else None
TRITON_LIBRARY: Any = torch.library.Library(TRITON, "DEF")
# The keys under which Triton kernels are found. On the CPU there are some where Triton interprets them.
TRITON_DEVICES = ("CUDA", "CPU") if triton.INTERPRETED else ("CUDA",)
AUTOCAST_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}

Result = TypeVar("Result")  # of an operator: a tensor or a pair of them


@dataclass(frozen=True)
class Operator(Generic[Result]):
    """One operator as the registrations need it.

    Attributes:
        name: in `torch.ops.effkernels` and `torch.ops.effkernels_triton`; its schema is in schemas.inc.
        reference: the same function in plain PyTorch.
        check: takes the name and all arguments, checks them and returns the shape of the (first) result.
        allocate: takes that shape and all arguments, and returns results yet to be computed.
        flops: FLOP formula; takes the shapes of the arguments by their names, and those of the results.
        cast: names of the arguments that autocast casts whatever they are, the images and matrices. All other tensors
            stay float32 if they are, and else take the dtype of the cast ones.
    """

    name: str
    reference: Callable[..., Result]
    check: Callable[..., tuple[int, ...]]
    allocate: Callable[..., Result]
    flops: Callable[[Mapping[str, Any], Any], int]
    cast: tuple[str, ...]
    signature: Signature = field(init=False)
    cast_at: tuple[int, ...] = field(init=False)
    follow_at: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        signature = Signature(self.name)
        tensors = {i: one.name for i, one in enumerate(signature.flat) if "Tensor" in str(one.type)}
        object.__setattr__(self, "signature", signature)
        object.__setattr__(self, "cast_at", tuple(i for i, name in tensors.items() if name in self.cast))
        object.__setattr__(self, "follow_at", tuple(i for i, name in tensors.items() if name not in self.cast))

    def run_reference(self, flat: Sequence[Any]) -> Result:
        """Call the reference with flat arguments."""
        return self.reference(**dict(zip(self.signature.names, self.signature.group(flat), strict=True)))

    def results(self, *args: Any) -> Result:
        """Check the arguments, in the order of `signature.names`, and return uninitialised results."""
        return self.allocate(self.check(self.name, *args), *args)

    def fake(self, *flat: Any) -> Result:
        """Return `results` for flat arguments; this is the shape function."""
        return self.results(*self.signature.group(flat))


@dataclass(frozen=True)
class Overloads(Generic[Result]):
    """One operator in each namespace."""

    op: Operator[Result]
    compiled: Callable[..., Result]
    triton: Callable[..., Result]


def register(op: Operator[Result]) -> Overloads[Result]:
    """Register `op` in both namespaces; returns the overloads to hand to `run`."""
    compiled = not_loaded if COMPILED_LIBRARY is None else _extend(op, COMPILED, COMPILED_LIBRARY)
    if op.name not in triton.FAMILIES:
        return Overloads(op, compiled, _no_triton_kernel)
    TRITON_LIBRARY.define(op.signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in TRITON_DEVICES:
        TRITON_LIBRARY.impl(op.name, _triton_kernel(op), key)
    return Overloads(op, compiled, _extend(op, TRITON, TRITON_LIBRARY))


def run(overloads: Overloads[Result], backend: str, args: tuple[Any, ...]) -> Result:
    """Run an operator by the backend that `backends.choose` chose.

    The Autograd kernel is Python and costs more than a small operator itself, so it is stepped over where no gradient
    can be asked for (inference mode steps over it by itself). Tracing and forward-mode differentiation always go
    through the dispatcher.

    Args:
        args: in the order of the schema.
    """
    if backend == "reference":
        return _run_reference(overloads.op, args)
    overload = overloads.triton if backend == "triton" else overloads.compiled
    if torch.compiler.is_compiling():
        return overload(*args)
    try:
        if (
            torch.is_inference_mode_enabled()
            or forward_ad._current_level >= 0
            or (torch.is_grad_enabled() and any_requires_grad(args))
        ):
            return overload(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)
    except (RuntimeError, TypeError, ValueError) as error:
        if problem := None if isinstance(error, torch.OutOfMemoryError) else _problem(overloads.op, args):
            raise problem from None
        raise


def _problem(op: Operator[Any], args: Sequence[Any]) -> ValueError | TypeError | None:
    """Return the error in the arguments of a call that failed, as a Python exception without the name of a C++ file.

    PyTorch names the dispatch key of a sparse, quantized, nested or MKL-DNN tensor, not the argument.
    """
    try:
        _checks.types(op.name, op.signature.flat, args)
        for name, t in zip(op.signature.flat_names, args, strict=True):
            if isinstance(t, Tensor):
                _checks.dense(op.name, name, t)
        device = args[0].device.type
        if device in AUTOCAST_DEVICES.values() and torch.is_autocast_enabled(device):
            args = cast_arguments(op, args, torch.get_autocast_dtype(device))
        with torch.no_grad():
            op.fake(*args)
    except (ValueError, TypeError) as problem:
        return problem
    return None


def _run_reference(op: Operator[Result], flat: tuple[Any, ...]) -> Result:
    """Check the arguments and run the reference, under the same autocast rule as the operator."""
    args = op.signature.group(flat)
    op.check(op.name, *args)
    device = args[0].device.type
    if device in AUTOCAST_DEVICES.values() and torch.is_autocast_enabled(device):
        flat = cast_arguments(op, flat, torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return op.run_reference(flat)
    return op.run_reference(flat)


def empty_image(shape: Sequence[int], x: Tensor, *others: Any) -> Tensor:
    """Return an uninitialised (N, C, H, W) tensor of x's dtype and device with exact channels_last strides."""
    _, channels, height, width = shape
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided(tuple(shape), strides, dtype=x.dtype, device=x.device)


def _extend(op: Operator[Result], namespace: str, library: Any) -> Callable[..., Result]:
    """Add to an operator that is defined what it needs from Python; returns its overload."""
    packet = getattr(getattr(torch.ops, namespace), op.name)
    overload: Callable[..., Result] = packet.default
    torch.library.register_fake(f"{namespace}::{op.name}", op.fake, lib=library)
    library.impl(op.name, _autograd_kernel(op, overload), "Autograd", with_keyset=True)
    for key, device in AUTOCAST_DEVICES.items():
        library.impl(op.name, _autocast_kernel(op, overload, device), key)
    register_flop_formula(packet)(_flop_formula(op))
    return overload


def _flop_formula(op: Operator[Any]) -> Callable[..., int]:
    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return op.flops(dict(zip(op.signature.flat_names, args, strict=False)) | kwargs, out_shape)

    return formula


def _triton_kernel(op: Operator[Result]) -> Callable[..., Result]:
    """Return `op` by Triton.

    The shape function checks the arguments and allocates what the kernels fill, so that a trace and a call cannot
    differ in shapes, strides or what they refuse.
    """

    def kernel(*flat: Any) -> Result:
        args = op.signature.group(flat)
        results = op.results(*args)
        for t in (args[0], *(results if isinstance(results, tuple) else (results,))):
            if t.dtype not in DTYPES:
                allowed = ", ".join(map(str, DTYPES))
                raise TypeError(f"{op.name}: dtype={t.dtype} is not supported; allowed: {allowed}")
        if args[0].shape[0] > 0:
            triton.implementation(op.name)(results, *args)
        return results

    return kernel


def _no_triton_kernel(*args: Any) -> Any:
    raise RuntimeError("there is no Triton implementation of this operator")


def not_loaded(*args: Any) -> Any:
    raise RuntimeError(f"the compiled operators are not there: {_library.load_error()}")


def any_requires_grad(args: Sequence[Any]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _autograd_kernel(op: Operator[Any], overload: Any) -> Callable[..., Any]:
    """Forward by the compiled operator; backward by recomputing the reference and differentiating it.

    Nothing but the inputs is saved. The recomputed graph hangs on aliases of the saved tensors, not on detached copies,
    so that a second differentiation (create_graph=True) runs on through it and is right.
    """

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.constants = [None if isinstance(a, Tensor) else a for a in args]
            ctx.tensor_at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
            ctx.save_for_backward(*(args[i] for i in ctx.tensor_at))
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        @staticmethod
        def backward(ctx: Any, *output_grads: Tensor | None) -> Any:
            create_graph = torch.is_grad_enabled()
            args = list(ctx.constants)
            wanted = []
            with torch.enable_grad(), torch._C._DisableAutocast():
                for i, saved in zip(ctx.tensor_at, ctx.saved_tensors, strict=True):
                    if ctx.needs_input_grad[i + 1]:
                        args[i] = saved.view_as(saved)
                        wanted.append(i)
                    else:
                        args[i] = saved.detach()
                outputs = op.run_reference(args)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                pairs = [(out, grad) for out, grad in zip(outputs, output_grads, strict=True) if grad is not None]
                found = torch.autograd.grad(
                    [out for out, _ in pairs],
                    [args[i] for i in wanted],
                    [grad for _, grad in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            input_grads: list[Tensor | None] = [None] * (len(args) + 1)
            for i, grad in zip(wanted, found, strict=True):
                input_grads[i + 1] = grad
            return tuple(input_grads)

    differentiable: Callable[..., Any] = Recompute.apply

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            # torch.func and forward mode differentiate plain operators by rules of their own: hand them some.
            return op.run_reference(args)
        if torch.is_grad_enabled() and any_requires_grad(args):
            return differentiable(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def _autocast_kernel(op: Operator[Any], overload: Any, device: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        args = cast_arguments(op, args, torch.get_autocast_dtype(device))
        with torch._C._DisableAutocast():
            return overload(*args)

    return kernel


def cast_arguments(op: Operator[Any], args: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """Autocast: inputs and matrices go to `dtype`; vectors, depthwise weights and pooled values stay as they are.

    Only a few kilobytes each, those cost nothing in float32, and the kernels take them beside a 16-bit x. A float64
    input is left alone, as PyTorch's own autocast leaves it.
    """
    if args[0].dtype == torch.float64:
        return tuple(args)
    result = list(args)
    for i in op.cast_at:
        if result[i] is not None:
            result[i] = result[i].to(dtype)
    for i in op.follow_at:
        if result[i] is not None and result[i].dtype != torch.float32:
            result[i] = result[i].to(dtype)
    return tuple(result)

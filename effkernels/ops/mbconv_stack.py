"""Several MBConv blocks as one operator: what passes from block to block need not wait for a launch.

The blocks are lists in the schema, because an operator has a fixed number of arguments: of each block 22 tensors, 3
epsilons, 7 sizes and 4 activations. Everything else is that of `mbconv`, block by block: shapes, gradients, the rule of
autocast, FLOPs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from effkernels.ops import _checks, _registration, _tf32
from effkernels.ops._registration import COMPILED, TRITON
from effkernels.ops._signature import Signature, parts
from effkernels.ops.backends import BLOCK, choose
from effkernels.ops.mbconv import OPERATOR, mbconv

NAME = "mbconv_stack"
TENSORS, NORMS, SIZES, ACTIVATIONS = 22, 3, 7, 4
"""How many of each a block has in the schema's lists."""
DEPTHWISE_WEIGHT = 6
"""The position of the depthwise convolution's weight among the tensors of a block."""

_SIGNATURE = Signature(NAME)
_ALLOWED = frozenset(inspect.signature(mbconv).parameters) - {"x", "allow_tf32", "backend"}


def mbconv_stack(
    x: Tensor, blocks: Sequence[Mapping[str, Any]], *, allow_tf32: bool | None = None, backend: str = "auto"
) -> Tensor:
    """Compute MBConv blocks that follow each other.

    Equivalent PyTorch:

        for block in blocks:
            x = mbconv(x, **{**block, "residual": x if block.get("residual") else None})
        return x

    On a GPU, in float16 and bfloat16, up to 20 neighbours that `mbconv` would each compute in a launch are one launch:
    in clusters of thread blocks that keep their images from block to block (compute capability 9.0), where the plan
    estimates that this is faster, for few images; else as items of one queue.

    Args:
        x: as of `mbconv`; of the first block.
        blocks: at least one; the arguments of `mbconv` of each by name, without x, allow_tf32 and backend. `residual`
            is whether the block adds its input to its result. Without expand_weight a block has no expansion.
        allow_tf32: as of `mbconv`.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C_out, H', W') of the last block in x's dtype, with exact channels_last strides.

    Raises:
        ValueError, TypeError: no blocks, an unknown argument, or one that `mbconv` refuses.
        RuntimeError: as `mbconv`.
    """
    if not blocks:
        raise ValueError(f"{NAME}: blocks is empty; allowed: at least one block")
    for position, block in enumerate(blocks):
        if unknown := set(block) - _ALLOWED:
            allowed = ", ".join(sorted(_ALLOWED))
            raise TypeError(f"{NAME}: block {position} has the argument {sorted(unknown)[0]!r}; allowed: {allowed}")
        if missing := [name for name in ("weight", "project_weight") if block.get(name) is None]:
            raise TypeError(f"{NAME}: block {position} has no {missing[0]}; allowed: a tensor")
    first = blocks[0]
    chosen = choose(BLOCK, x, first["weight"], first.get("stride", 1), first.get("activation", "identity"), backend)
    if chosen == "reference":
        return _one_by_one(x, blocks, allow_tf32, chosen)
    arguments = (x, *flatten(blocks), _tf32.resolve(allow_tf32, x))
    overload = _triton if chosen == "triton" else _compiled
    if torch.compiler.is_compiling():
        return overload(*arguments)
    try:
        if (
            torch.is_inference_mode_enabled()
            or forward_ad._current_level >= 0
            or (torch.is_grad_enabled() and _requires_grad(x, arguments[1]))
        ):
            return overload(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # as `effkernels.ops._registration.run`
            return overload(*arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        if problem := None if isinstance(error, torch.OutOfMemoryError) else _problem(arguments):
            raise problem from None
        raise


def _one_by_one(x: Tensor, blocks: Sequence[Mapping[str, Any]], allow_tf32: bool | None, backend: str) -> Tensor:
    for block in blocks:
        residual = x if block.get("residual") else None
        x = mbconv(x, **{"expand_weight": None, **block, "residual": residual}, allow_tf32=allow_tf32, backend=backend)
    return x


def flatten(blocks: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor | None], list[float], list[int], list[str]]:
    """Return the blocks as the lists of the schema: tensors, norm_eps, sizes, activations."""
    tensors: list[Tensor | None] = []
    epsilons: list[float] = []
    sizes: list[int] = []
    activations: list[str] = []
    for block in blocks:
        for prefix in ("expand_", "", "project_"):
            of_norm: list[Any] = [*parts(block.get(f"{prefix}norm"), NAME, f"{prefix}norm")]
            epsilons.append(of_norm.pop())
            if prefix == "project_":
                tensors += [block.get(name) for name in ("w_reduce", "b_reduce", "w_expand", "b_expand")]
            tensors += [block.get(f"{prefix}weight"), block.get(f"{prefix}bias"), *of_norm]
        sizes += [block.get("stride", 1), *block.get("padding", (0, 0, 0, 0)), block.get("dilation", 1)]
        sizes.append(int(bool(block.get("residual"))))
        activations += [
            block.get("expand_activation", "identity"),
            block.get("activation", "identity"),
            block.get("se_activation", "silu"),
            block.get("gate_activation", "sigmoid"),
        ]
    return tensors, epsilons, sizes, activations


def block_by_block(
    run: Callable[[int, tuple[Any, ...]], Tensor],
    x: Tensor,
    tensors: Sequence[Tensor | None],
    norm_eps: Sequence[float],
    sizes: Sequence[int],
    activations: Sequence[str],
    allow_tf32: bool,
) -> Tensor:
    """Run a stack block by block.

    Args:
        run: takes the position of a block and the arguments of `mbconv` in the order of its schema, and returns its
            result, the input of the next one.
        x, tensors, norm_eps, sizes, activations, allow_tf32: as in the schema.

    Raises:
        ValueError: lists whose lengths do not fit each other.
    """
    count = len(tensors) // TENSORS
    for name, given, of_block in (
        ("tensors", tensors, TENSORS),
        ("norm_eps", norm_eps, NORMS),
        ("sizes", sizes, SIZES),
        ("activations", activations, ACTIVATIONS),
    ):
        if count == 0 or len(given) != count * of_block:
            raise ValueError(
                f"{NAME}: {name} has {len(given)} elements; allowed: {of_block} for each of the blocks, of which there "
                "is at least one"
            )
    for i in range(count):
        t = tensors[i * TENSORS : (i + 1) * TENSORS]
        eps = norm_eps[i * NORMS : (i + 1) * NORMS]
        stride, *padding, dilation, residual = sizes[i * SIZES : (i + 1) * SIZES]
        expand, activation, se, gate = activations[i * ACTIVATIONS : (i + 1) * ACTIVATIONS]
        x = run(
            i,
            (
                *(x, *t[:6], eps[0], expand),
                *(*t[6:12], eps[1], stride, padding, dilation, activation),
                *(*t[12:16], se, gate),
                *(*t[16:], eps[2], x if residual else None, allow_tf32),
            ),
        )
    return x


def _of_block(position: int) -> str:
    return f"{NAME}: block {position}"


def _fake(*arguments: Any) -> Tensor:
    def run(position: int, flat: tuple[Any, ...]) -> Tensor:
        grouped = OPERATOR.signature.group(flat)
        result: Tensor = OPERATOR.allocate(OPERATOR.check(_of_block(position), *grouped), *grouped)
        return result

    return block_by_block(run, *arguments)


def _problem(arguments: Sequence[Any]) -> ValueError | TypeError | None:
    """Return the error in the arguments of a call that failed, as of `effkernels.ops._registration.run`."""

    def run(position: int, flat: tuple[Any, ...]) -> Tensor:
        name, signature = _of_block(position), OPERATOR.signature
        _checks.types(name, signature.flat, flat)
        for argument, t in zip(signature.flat_names, flat, strict=True):
            if isinstance(t, Tensor):
                _checks.dense(name, argument, t)
        device = flat[0].device.type
        if device in _registration.AUTOCAST_DEVICES.values() and torch.is_autocast_enabled(device):
            flat = _registration.cast_arguments(OPERATOR, flat, torch.get_autocast_dtype(device))
        shape = OPERATOR.check(name, *signature.group(flat))
        like: Tensor = flat[0]
        return like.new_empty(()).expand(shape)  # of one element

    try:
        with torch.no_grad():
            block_by_block(run, *arguments)
    except (ValueError, TypeError) as problem:
        return problem
    return None


def _flop_formula(*arguments: Any, out_shape: Any = None, **options: Any) -> int:
    """Sum the FLOPs of the blocks; the arguments are shapes."""
    total = 0
    given = dict(zip(_SIGNATURE.flat_names, arguments, strict=False)) | options

    def run(position: int, flat: tuple[Any, ...]) -> Any:
        nonlocal total
        shapes = dict(zip(OPERATOR.signature.flat_names, flat, strict=True))
        batch, _, *sides = shapes["x"]
        stride, padding, dilation = shapes["stride"], shapes["padding"], shapes["dilation"]
        result = [batch, shapes["project_weight"][0]]
        for size, before, after, taps in zip(sides, padding[::2], padding[1::2], shapes["weight"][2:], strict=True):
            result.append((size + before + after - dilation * (taps - 1) - 1) // stride + 1)
        total += OPERATOR.flops(shapes, result)
        return result

    block_by_block(run, *(given[name] for name in _SIGNATURE.flat_names))
    return total


def _requires_grad(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    return x.requires_grad or any(t is not None and t.requires_grad for t in tensors)


def _autograd_kernel(namespace: str, overload: Any) -> Callable[..., Tensor]:
    """Differentiate block by block: each by the rule of `mbconv`, so that only the blocks' inputs are saved."""

    def kernel(keyset: Any, *arguments: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return block_by_block(lambda _, flat: OPERATOR.run_reference(flat), *arguments)
        if torch.is_grad_enabled() and _requires_grad(*arguments[:2]):
            block = getattr(getattr(torch.ops, namespace), BLOCK).default
            return block_by_block(lambda _, flat: block(*flat), *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
            return result

    return kernel


def _autocast_kernel(overload: Any, device: str) -> Callable[..., Tensor]:
    def kernel(x: Tensor, tensors: Sequence[Tensor | None], *others: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        cast: list[Tensor | None] = []

        def run(position: int, flat: tuple[Any, ...]) -> Tensor:
            of_block = _registration.cast_arguments(OPERATOR, flat, dtype)
            cast.extend(t for t, is_listed in zip(of_block, _LISTED, strict=True) if is_listed)
            return x

        if x.dtype != torch.float64:
            block_by_block(run, x, tensors, *others)
            x, tensors = x.to(dtype), cast
        with torch._C._DisableAutocast():
            result: Tensor = overload(x, tensors, *others)
            return result

    return kernel


# Of the arguments of mbconv in the order of its schema: whether each is in the list of tensors.
_LISTED = tuple(
    "Tensor" in str(argument.type) and argument.name not in ("x", "residual") for argument in OPERATOR.signature.flat
)


def _by_triton(*arguments: Any) -> Tensor:
    """Run the blocks one by one: three launches of Triton's kernels each."""
    block = getattr(torch.ops, TRITON).mbconv.default
    return block_by_block(lambda _, flat: block(*flat), *arguments)


def _extend(namespace: str, library: Any) -> Callable[..., Tensor]:
    packet = getattr(getattr(torch.ops, namespace), NAME)
    overload: Callable[..., Tensor] = packet.default
    torch.library.register_fake(f"{namespace}::{NAME}", _fake, lib=library)
    library.impl(NAME, _autograd_kernel(namespace, overload), "Autograd", with_keyset=True)
    for key, device in _registration.AUTOCAST_DEVICES.items():
        library.impl(NAME, _autocast_kernel(overload, device), key)
    register_flop_formula(packet)(_flop_formula)
    return overload


def _register() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    compiled, triton_library = _registration.COMPILED_LIBRARY, _registration.TRITON_LIBRARY
    triton_library.define(_SIGNATURE.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in _registration.TRITON_DEVICES:
        triton_library.impl(NAME, _by_triton, key)
    by_triton = _extend(TRITON, triton_library)
    return (_registration.not_loaded if compiled is None else _extend(COMPILED, compiled)), by_triton


_compiled, _triton = _register()

"""Sets up the process of `EFFKERNELS_TEST_FLAVOUR=triton`: Triton interprets its kernels, and bfloat16 is right.

TRITON_INTERPRET has to be set before effkernels is imported, hence a process, and a test run, of its own.

Triton's interpreter keeps a bfloat16 as its 16 bits. It converts by truncation instead of rounding, and computes with
the bits as if they were numbers. The conversions are replaced here, and arithmetic in bfloat16 is refused: the kernels
compute in float32 and cast explicitly. That of Triton 3.6 also takes int() of arrays of one element, which NumPy from
2.4 on refuses.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import os
from typing import Any

# Whether Triton interprets in this process.
ACTIVE = os.environ.get("EFFKERNELS_TEST_FLAVOUR") == "triton" and importlib.util.find_spec("triton") is not None


def _hasten() -> None:
    """Leave out what takes most of the time of an interpreted kernel and changes no result."""
    from triton.runtime import interpreter

    # Every addition of integers is also computed in 64 bits, for an assertion that is then not made (debug=False).
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _patch_once_a_launch(interpreter)
    _remember_types(interpreter)
    _share_block_types(interpreter)


def _patch_once_a_launch(interpreter: Any) -> None:
    """A kernel that calls another @triton.jit function patches the whole of triton.language again, though its own start
    did so. What is patched at first is remembered here, and nested calls go straight on.
    """
    patch = interpreter._patch_lang
    seen: set[int] = set()
    execute = interpreter.GridExecutor.__call__

    @functools.cache
    def langs_of(function: Any) -> frozenset[int]:
        return frozenset(id(value) for value in function.__globals__.values() if inspect.ismodule(value))

    def patch_once(function: Any) -> Any:
        langs = langs_of(function)
        if langs <= seen:
            return interpreter._LangPatchScope() if hasattr(interpreter, "_LangPatchScope") else None
        seen.update(langs)
        return patch(function)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        return execute(self, *args, **kwargs)

    # CPython keeps frames in chunks of 16 KiB, and asks the kernel for a new one at every call across the end of a
    # chunk: where that is between two functions of the interpreter, a launch takes 1.6 times as long. A frame as large
    # as this one gets a larger chunk, with room for all calls inside it.
    run.__code__ = run.__code__.replace(co_stacksize=4096)
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run


def _remember_types(interpreter: Any) -> None:
    """NumPy's type of a Triton type comes from a dictionary that is otherwise made anew for each look into it."""
    import triton.language as tl

    find = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def np_dtype(triton_type: Any) -> Any:
        scalar = triton_type.scalar
        if isinstance(scalar, tl.pointer_type):
            return find(scalar)
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = np_dtype


def _share_block_types(interpreter: Any) -> None:
    """Make one block type for each element type and shape, and describe the shape of its tensors once.

    Every operation of a kernel makes several. That took 38 % of the time of a launch.
    """
    import triton.language as tl

    semantic, block_type, tensor = interpreter.TritonSemantic, tl.core.block_type, tl.core.tensor
    make_type, make_tensor, broadcast_any = block_type.__init__, tensor.__init__, semantic.broadcast_impl_value
    types: dict[Any, Any] = {}

    def shared(cls: Any, element_type: Any, shape: Any) -> Any:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        key = element_type.name, getattr(element_type, "address_space", None), sizes
        if key not in types:
            found = object.__new__(cls)
            make_type(found, element_type, shape)
            types[key] = found
        return types[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("of_tensors")
        if known is None:
            make_tensor(self, handle, type)
            type.of_tensors = {name: value for name, value in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(known, handle=handle)

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        return (left, right) if left.type is right.type else broadcast_any(self, left, right)

    block_type.__new__ = shared
    block_type.__init__ = lambda self, element_type, shape: None
    block_type.to_ir = lambda self, builder: self  # the interpreter's builder has no types of its own
    tensor.__init__ = init_tensor
    semantic.broadcast_impl_value = broadcast


def _repair() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, binary = builder.create_dot, builder.cast_impl, builder.binary_op

    def is_bfloat16(value: Any) -> bool:
        return bool(value.dtype.scalar.name == "bf16")

    def widened(value: Any) -> Any:
        if not is_bfloat16(value):
            return value
        return handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(data: Any) -> Any:
        """Return the bits of the nearest bfloat16, ties to even."""
        data = np.ascontiguousarray(data, dtype=np.float32)
        bits = data.view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest.astype(np.uint16))

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return source if is_bfloat16(source) else handle(rounded(source.data), tl.bfloat16)
        if is_bfloat16(source):
            source = widened(source)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        return cast(self, source, target)

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if is_bfloat16(left) or is_bfloat16(right):
            raise TypeError("arithmetic in bfloat16; allowed: float32, as the interpreter gets bfloat16 wrong")
        return binary(self, left, right, operation)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_index
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.cast_impl = cast_impl
    builder.binary_op = binary_op
    for name in (
        "create_si_to_fp",
        "create_ui_to_fp",
        "create_fp_to_si",
        "create_fp_to_ui",
        "create_fp_ext",
        "create_fp_trunc",
    ):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))


if ACTIVE:
    os.environ["TRITON_INTERPRET"] = "1"
    _repair()
    _hasten()

"""What torch.compile is told of a function, without the import of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_a_trace(function: Function) -> Function:
    """Let a trace call the function once, and keep what it returned as a constant.

    Equivalent PyTorch: torch.compiler.assume_constant_result, which imports torch._dynamo to set this attribute: as
    long as the rest of `import effkernels` takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

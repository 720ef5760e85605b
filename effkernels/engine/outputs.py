"""The output of a model: a tensor, or tuples, lists and dicts of tensors, each with the batch as first dimension.

None is allowed; it means an output that a model leaves out. The model runs in inference mode; what is made
here are plain tensors, which may be changed and used in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def check_output(output: Any, batch: int) -> None:
    """Refuse what cannot be cut into the results of single images.

    Raises:
        TypeError: a leaf is neither a tensor nor None.
        ValueError: no tensor at all, or one without `batch` rows.
    """
    leaves = pytree.tree_leaves(output)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise TypeError(
                f"the model's output holds {type(leaf).__name__}; allowed: tensors, and tuples, lists and dicts of them"
            )
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != batch):
            raise ValueError(
                f"the model's output for a batch of {batch} holds a tensor of shape {tuple(leaf.shape)}; "
                "allowed: tensors with the batch as their first dimension"
            )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError("the model's output holds no tensor; at least one is needed")


def map_tensors(output: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the same structure with `function` applied to every tensor."""
    return pytree.tree_map(lambda leaf: leaf if leaf is None else function(leaf), output)


def same_values(output: Any, other: Any) -> bool:
    """Return whether two outputs have the same structure and the same values, NaN in the same places."""
    leaves, structure = pytree.tree_flatten(output)
    others, other_structure = pytree.tree_flatten(other)
    return structure == other_structure and all(
        a is b or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in zip(leaves, others, strict=True)
    )


def nbytes(output: Any) -> int:
    """Return the bytes of all elements."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(output) if leaf is not None)


def first_rows(output: Any, count: int) -> Any:
    """Return the first `count` rows, in memory of their own."""
    with torch._C._InferenceMode(False), torch.no_grad():
        return map_tensors(output, lambda tensor: tensor[:count].clone())


def concatenated(parts: Sequence[Any]) -> Any:
    """Several outputs of the same structure as one, along the batch."""
    if len(parts) == 1:
        return parts[0]
    leaves, structures = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    with torch._C._InferenceMode(False), torch.no_grad():
        joined = [None if column[0] is None else torch.cat(column) for column in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, structures[0])


def rows_on_host(output: Any) -> list[Any]:
    """Return the output of each image alone, without the batch dimension, on the CPU in memory of its own."""
    leaves, structure = pytree.tree_flatten(output)
    columns: list[list[Tensor] | None] = []
    with torch._C._InferenceMode(False), torch.no_grad():
        for leaf in leaves:
            columns.append(None if leaf is None else [row.clone() for row in leaf.cpu()])
    count = len(next(column for column in columns if column is not None))
    return [
        pytree.tree_unflatten([None if column is None else column[row] for column in columns], structure)
        for row in range(count)
    ]

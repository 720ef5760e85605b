"""The linear layers behind the blocks, where a few rows at a time go through them on a CPU.

A classifier's weights are read once per batch, 5 MB for B0: with one image in the batch that is all it does, and BLAS
does it on one thread, in a tenth of the time of the whole optimised network. `pointwise_bn_act` shares the rows of the
weights among the threads. From a handful of images on it is a matrix product like any other, and BLAS keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from effkernels.optimize.accounting import Forward
from effkernels.optimize.program import MOST_ROWS, Program
from effkernels.optimize.swapping import swap
from effkernels.optimize.watching import Part

_LEAST_WEIGHTS = 2**18  # 1 MB in float32: what is smaller stays in the cache and costs a few microseconds either way
_PARTS = (Part("", "parameter", "weight"), Part("", "parameter", "bias"))
_SOURCE = """\
def look(self):
    if not has_parameters(self):
        return None
    return parameters_of(self)["weight"], parameters_of(self)["bias"]
def run(self, x, parts):
    weight, bias = parts
    return multiply_rows(x, weight, bias) if is_few_rows(x, weight) else None
"""


def swap_classifiers(
    model: nn.Module,
    forward: Forward | None,
    taken: Iterable[str],
    allows: Callable[[str, nn.Module], bool],
    backend: str,
) -> list[str]:
    """Let the large linear layers of a model run few rows by our operator.

    Args:
        model: changed in place.
        forward: of the model as it was; without it nothing is known about what its linear layers are given.
        taken: modules that run fused, by path; what is inside is left alone.
        allows: whether a module may be changed, by name and module.
        backend: that the model's operators are forced to, or "auto".

    Returns:
        A line for the report for each of them.
    """
    if forward is None or backend not in ("auto", "cpu"):
        return []
    inside = tuple(taken)
    notes = []
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or module.weight.numel() < _LEAST_WEIGHTS or not module.weight.is_cpu:
            continue
        if len(forward.shapes.get(path, ())) != 2 or not allows(path, module):
            continue
        if any(path == one or path.startswith(f"{one}.") for one in inside):
            continue
        swap(module, {"forward": Program(_SOURCE, {}, "input", {}, frozenset(), backend, 0, (), _PARTS)})
        notes.append(f"{path}: batches of up to {MOST_ROWS} go through pointwise_bn_act on a CPU")
    return notes

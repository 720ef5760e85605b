"""FLOP formulas of the training operators for `torch.utils.flop_counter`: two for each multiply-add.

Convolutions and matrix products count, as in PyTorch's own formulas; the work per value around them does not. Gradients
that nobody asked for do not count either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from effkernels import _library
from effkernels.ops.training import BLOCK_PARAMETERS

Shape = Sequence[int]

_block: Any = torch.ops.effkernels_training.block
_block_backward: Any = torch.ops.effkernels_training.block_backward


@register_flop_formula(_block)
def block(x: Shape, *arguments: Any, out_shape: Any, **_: Any) -> int:
    """Return the FLOPs of a block's forward."""
    shapes = dict(zip(BLOCK_PARAMETERS, arguments, strict=False))
    convolved = out_shape[2]
    return sum(_products(x, convolved, shapes).values())


@register_flop_formula(_block_backward)
def block_backward(dy: Shape, x: Shape, expanded: Shape, convolved: Shape, *arguments: Any, **_: Any) -> int:
    """Return the FLOPs of a block's backward: each product once for its input and once for its weight, if asked for."""
    shapes = dict(zip(BLOCK_PARAMETERS, arguments[5:], strict=False))
    keeps_expanded, _, wanted = arguments[-3:]
    wants = dict(zip(("x", *BLOCK_PARAMETERS), wanted, strict=True))
    products = _products(x, convolved, shapes)
    flops = products["project_weight"] * (1 + wants["project_weight"])
    flops += 2 * products["gate"]
    before = ("x", "weight", *BLOCK_PARAMETERS[:4])
    if any(wants[name] for name in before):
        flops += 2 * products["weight"]
        if not keeps_expanded:
            flops += products["expand_weight"]
    return int(flops + products["expand_weight"] * (wants["x"] + wants["expand_weight"]))


def _products(x: Shape, convolved: Shape, shapes: dict[str, Any]) -> dict[str, int]:
    """Return the FLOPs of each product of the forward; `convolved` is (N, H', W', C)."""
    in_pixels, out_pixels = x[0] * x[2] * x[3], math.prod(convolved[:3])
    reduce, expand = shapes["w_reduce"], shapes["expand_weight"]
    return {
        "expand_weight": 0 if expand is None else 2 * in_pixels * math.prod(expand),
        "weight": 2 * out_pixels * math.prod(shapes["weight"]),
        "gate": 0 if reduce is None else 4 * x[0] * math.prod(reduce),
        "project_weight": 2 * out_pixels * math.prod(shapes["project_weight"]),
    }


def _product(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x[:3]) * math.prod(weight))


def _product_weights(weight: Shape, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(weight) * weight[1])


def _depthwise(*shapes: Any, out_shape: Any, **_: Any) -> int:
    return int(2 * math.prod(out_shape[0][:3]) * math.prod(shapes[6]))


def _depthwise_backward(g: Shape, *shapes: Any, **_: Any) -> int:
    return int(2 * 2 * math.prod(g[:3]) * math.prod(shapes[17]))


if _library.is_loaded():
    register_flop_formula(torch.ops.effkernels.training_product)(_product)
    register_flop_formula(torch.ops.effkernels.training_product_weights)(_product_weights)
    register_flop_formula(torch.ops.effkernels.training_product_gradient)(_product_weights)
    register_flop_formula(torch.ops.effkernels.training_depthwise)(_depthwise)
    register_flop_formula(torch.ops.effkernels.training_depthwise_backward)(_depthwise_backward)

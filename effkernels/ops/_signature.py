"""The arguments of the operators: their schemas, and how a norm gets through the dispatcher.

The dispatcher takes tensors, numbers and strings one by one. Everything else in Python takes a norm as one value
(`effkernels.ops.Norm`): `parts` takes it apart where the dispatcher is called, and `Signature.group` puts it together
where the dispatcher calls back.

The schemas are in `schemas.inc`, a list of strings in Python as in C++: csrc/ops/ops.cpp includes the same file.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effkernels._norm import Norm
from effkernels.ops.reference import canonical_name

_FIELDS = len(Norm._fields)


def _read_schemas() -> dict[str, str]:
    text = Path(__file__).with_name("schemas.inc").read_text(encoding="utf-8")
    return {schema.partition("(")[0]: schema for schema in ast.literal_eval(f"[{text}]")}


SCHEMAS: dict[str, str] = _read_schemas()
"""The schema of every operator by its name: `name(arguments) -> results`."""


def parts(norm: Norm | None, op: str, name: str = "norm") -> tuple[Tensor | float | None, ...]:
    """Return the fields of a norm one by one, also of None. Raise TypeError if it is neither."""
    if type(norm) is Norm:
        return norm
    if norm is None:
        # Written out: torch.compile would make the float of a global tuple an input of its graph.
        return (None, None, None, None, 1e-5)
    raise norm_type_error(op, name, norm)


def norm_type_error(op: str, name: str, norm: object) -> TypeError:
    return TypeError(f"{op}: {name} is {type(norm).__name__}; allowed: effkernels.ops.Norm or None")


class Signature:
    """The arguments of one operator.

    Attributes:
        schema: as it is registered.
        flat: the arguments of the schema, as PyTorch parses them.
        flat_names: their names.
        names: the same names, with one `norm` in place of `norm_mean`, `norm_var`, `norm_weight`, `norm_bias` and
            `norm_eps`, and likewise for every other norm.
    """

    def __init__(self, op: str) -> None:
        self.schema = SCHEMAS[op]
        self.flat: tuple[Any, ...] = tuple(torch._C.parse_schema(self.schema).arguments)
        self.flat_names: tuple[str, ...] = tuple(argument.name for argument in self.flat)
        others = tuple(f"norm_{field}" for field in Norm._fields[1:])
        names = [name.removesuffix("_mean") for name in self.flat_names if not name.endswith(others)]
        self.names: tuple[str, ...] = tuple(names)
        self._norms = tuple(i for i, name in enumerate(names) if name.endswith("norm"))
        strings = {argument.name for argument in self.flat if str(argument.type) == "str"}
        self._strings = tuple(i for i, name in enumerate(names) if name in strings)

    def group(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """Bring arguments from the order of the schema to that of `names`; activations get their canonical names."""
        args = list(flat)
        for i in self._norms:
            norm = Norm(*args[i : i + _FIELDS])
            args[i : i + _FIELDS] = [None if all(part is None for part in norm[:-1]) else norm]
        for i in self._strings:
            args[i] = canonical_name(args[i])
        return tuple(args)

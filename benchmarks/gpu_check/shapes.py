"""The operator calls of a network, read off a run on the meta device, and which of them to measure first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import effkernels
from effkernels.model_benchmark import model_size
from effkernels.op_case import OpCase, conv_case, depthwise_case, gate_case, pointwise_case


@dataclass(frozen=True)
class Call:
    """One operator call of a network, without its batch.

    Attributes:
        op: the operator as the network calls it.
        channels, plane: channels, height and width of x; the plane of squeeze_excite_gate is (1, 1).
        out: output channels of a pointwise or dense convolution.
        reduced: width of squeeze-and-excitation, 0 without.
    """

    op: str
    channels: int
    plane: tuple[int, int]
    kernel: int = 1
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    out: int = 0
    reduced: int = 0
    activation: str = "identity"
    gate: bool = False
    residual: bool = False

    def case(self, op: str, batch: int) -> OpCase:
        """The call with random tensors; ``op`` may be another operator of the same family."""
        shape = (batch, self.channels, *self.plane)
        if op == "squeeze_excite_gate":
            return gate_case(batch, self.channels, self.reduced)
        if op == "pointwise_bn_act":
            options: dict[str, Any] = {"activation": self.activation, "gate": self.gate, "residual": self.residual}
            return pointwise_case(shape, self.out, **options)
        if op == "conv_bn_act":
            return conv_case(shape, self.out)
        return depthwise_case(op, shape, self.kernel, self.stride, self.padding, self.reduced or None)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "effkernels":
            names = [argument.name for argument in func._schema.arguments]
            arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self.calls.append((func._schema.name.partition("::")[2], arguments))
        return func(*args, **(kwargs or {}))


def _call(op: str, arguments: dict[str, Any]) -> Call:
    x: Tensor = arguments["x"]
    weight: Tensor = arguments["weight"]
    described: dict[str, Any] = {"activation": arguments["activation"]}
    if op == "pointwise_bn_act":
        described |= {"gate": arguments["gate"] is not None, "residual": arguments["residual"] is not None}
        described["out"] = weight.shape[0]
    else:
        described |= {"kernel": weight.shape[2], "stride": arguments["stride"], "padding": tuple(arguments["padding"])}
        described["out"] = weight.shape[0] if op == "conv_bn_act" else 0
        if "w_reduce" in arguments:
            described["reduced"] = arguments["w_reduce"].shape[0]
    return Call(op, x.shape[1], (x.shape[2], x.shape[3]), **described)


@cache
def calls_of(model: str) -> tuple[Call, ...]:
    """The distinct operator calls of a network at its own input size, in the order of the forward.

    Each depthwise call with squeeze-and-excitation also stands for the squeeze_excite_gate of its width.
    """
    size = model_size(model)
    network = effkernels.create_model(model, device="meta").eval()
    with effkernels.backend("cpu"), torch.no_grad(), _Recorder() as recorder:
        network(torch.empty(1, 3, size, size, device="meta"))
    found = [_call(op, arguments) for op, arguments in recorder.calls]
    widths = [Call("squeeze_excite_gate", c.channels, (1, 1), reduced=c.reduced) for c in found if c.reduced]
    return tuple(dict.fromkeys([*found, *widths]))


@dataclass(frozen=True)
class Measurement:
    """One case to measure, and whether torch.compile is worth its seconds there."""

    model: str
    call: Call
    op: str
    batch: int
    compiled: bool

    @property
    def title(self) -> str:
        """The measurement in words."""
        return f"{self.op} of {self.model}, {self.call.channels}x{self.call.plane[0]}x{self.call.plane[1]}"


def measurements(models: Sequence[str], batches: Sequence[int]) -> Iterator[Measurement]:
    """Everything there is to measure, the most important first.

    Large batches come before small ones and the first model before the second. With the fused squeeze, the operator
    that the targets are written for, and the matrix products torch.compile is a contender; the other forms of the
    depthwise operator stand beside it for what squeeze-and-excitation adds.
    """
    forms = ("depthwise_bn_act_squeeze", "pointwise_bn_act", "depthwise_bn_act", "depthwise_bn_act_se",
             "depthwise_bn_act_gate", "squeeze_excite_gate", "conv_bn_act")  # fmt: skip
    for batch in sorted(batches, reverse=True):
        for model in models:
            for form in forms:
                for call in calls_of(model):
                    if call.op == form or (form.startswith("depthwise") and call.op.startswith("depthwise")):
                        yield Measurement(model, call, form, batch, form in forms[:2])

"""The operator calls of a network, read off a run on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import effkernels
from effkernels import triton
from effkernels.bench.op_case import OpCase, conv_case, depthwise_case, expand_case, gate_case, pointwise_case
from effkernels.models import model_config


@dataclass(frozen=True)
class Call:
    """One operator call of a network, without its batch.

    Attributes:
        op: the operator as the network calls it.
        channels, plane: channels, height and width of x; the plane of squeeze_excite_gate is (1, 1).
        out: output channels of a pointwise or dense convolution, channels in the middle of expand_depthwise_squeeze.
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
        """Return the call with random tensors; ``op`` may be another operator of the same family."""
        made = self._case(op, batch)
        return replace(made, options={**made.options, "activation": self.activation})

    def _case(self, op: str, batch: int) -> OpCase:
        shape = (batch, self.channels, *self.plane)
        if op == "squeeze_excite_gate":
            return gate_case(batch, self.channels, self.reduced)
        if op == "pointwise_bn_act":
            return pointwise_case(shape, self.out, gate=self.gate, residual=self.residual)
        if op == "expand_depthwise_squeeze":
            return expand_case(shape, self.out, self.kernel, self.stride)
        if op == "conv_bn_act":
            return conv_case(shape, self.out)
        return depthwise_case(op, shape, self.kernel, self.stride, self.padding, self.reduced or None)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("effkernels", "effkernels_triton"):
            names = [argument.name for argument in func._schema.arguments]
            arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self.calls.append((func._schema.name.partition("::")[2], arguments))
        return func(*args, **(kwargs or {}))


def _call(op: str, arguments: dict[str, Any]) -> Call:
    if op == "squeeze_excite_gate":
        reduced, channels = arguments["w_reduce"].shape
        return Call(op, channels, (1, 1), reduced=reduced, activation=arguments["activation"])
    x: Tensor = arguments["x"]
    weight: Tensor = arguments["weight"]
    described: dict[str, Any] = {"activation": arguments["activation"]}
    if op == "pointwise_bn_act":
        described |= {"gate": arguments["gate"] is not None, "residual": arguments["residual"] is not None}
        described["out"] = weight.shape[0]
    else:
        described |= {"kernel": weight.shape[2], "stride": arguments["stride"], "padding": tuple(arguments["padding"])}
        described["out"] = weight.shape[0] if op in ("conv_bn_act", "expand_depthwise_squeeze") else 0
        if "w_reduce" in arguments:
            described["reduced"] = arguments["w_reduce"].shape[0]
    return Call(op, x.shape[1], (x.shape[2], x.shape[3]), **described)


@cache
def calls_of(model: str, img_size: int | None = None) -> tuple[Call, ...]:
    """Return the distinct operator calls of a network in eval mode, in the order of the forward.

    Args:
        model: one of `effkernels.list_models()`.
        img_size: height and width of its images in pixels; by default what it was designed for.

    Raises:
        ValueError: the model is not known.
        RuntimeError: neither Triton nor the compiled library, whose shape functions are needed, is available.
    """
    size = img_size or model_config(model).input_size[-1]
    network = effkernels.create_model(model, device="meta").eval()
    # On the meta device only the shape functions run, which all devices share.
    with effkernels.backend("triton" if triton.INSTALLED else "cpu"), torch.no_grad(), _Recorder() as recorder:
        network(torch.empty(1, 3, size, size, device="meta"))
    return tuple(dict.fromkeys(_call(op, arguments) for op, arguments in recorder.calls))

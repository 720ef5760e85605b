"""The operator calls of networks, and which of them to measure first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from effkernels import op_calls
from effkernels.op_calls import Call


def calls_of(model: str) -> tuple[Call, ...]:
    """The distinct operator calls of a network at its own input size, in the order of the forward.

    Behind them come calls that stand for others: the squeeze_excite_gate of each width, and the expansions with the
    depthwise convolution that follows.
    """
    found = op_calls.calls_of(model)
    gates = [
        Call("squeeze_excite_gate", call.channels, (1, 1), reduced=call.reduced, activation=call.activation)
        for call in found
        if call.reduced
    ]
    return tuple(dict.fromkeys([*found, *gates, *_expansions(found)]))


def _expansions(calls: Sequence[Call]) -> Iterator[Call]:
    """The expand_depthwise_squeeze of every 1x1 convolution and depthwise convolution that fit each other."""
    for expand in calls:
        for depthwise in calls:
            follows = (expand.out, expand.plane) == (depthwise.channels, depthwise.plane)
            if expand.op == "pointwise_bn_act" and depthwise.op.startswith("depthwise") and follows:
                yield Call(
                    "expand_depthwise_squeeze", expand.channels, expand.plane, depthwise.kernel, depthwise.stride,
                    depthwise.padding, expand.out, activation=depthwise.activation,
                )  # fmt: skip


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
    forms = ("depthwise_bn_act_squeeze", "pointwise_bn_act", "depthwise_bn_act", "expand_depthwise_squeeze",
             "depthwise_bn_act_se", "depthwise_bn_act_gate", "squeeze_excite_gate", "conv_bn_act")  # fmt: skip
    for batch in sorted(batches, reverse=True):
        for model in models:
            for form in forms:
                for call in calls_of(model):
                    if call.op == form or (form.startswith("depthwise") and call.op.startswith("depthwise")):
                        yield Measurement(model, call, form, batch, form in forms[:2])

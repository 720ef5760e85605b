"""The operator calls of networks, and which of them to measure first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from effkernels.bench import op_calls
from effkernels.bench.op_calls import Call


def calls_of(model: str) -> tuple[Call, ...]:
    """Return the distinct operator calls of a network at its own input size, in the order of the forward.

    After them come calls that represent others: the squeeze_excite_gate of each width, and the expansions with the
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
    """Return the expand_depthwise_squeeze of every 1x1 convolution and depthwise convolution that fit each other."""
    for expand in calls:
        for depthwise in calls:
            follows = (expand.out, expand.plane) == (depthwise.channels, depthwise.plane)
            if expand.op == "pointwise_bn_act" and depthwise.op.startswith("depthwise") and follows:
                yield Call(
                    "expand_depthwise_squeeze", expand.channels, expand.plane, depthwise.kernel, depthwise.stride,
                    depthwise.padding, expand.out, activation=depthwise.activation,
                )  # fmt: skip


# The operators in the order of their worth: those that the targets are written for, then the other forms of the
# depthwise operator, for what squeeze-and-excitation adds to it.
FAMILIES = ("depthwise_bn_act_squeeze", "depthwise_bn_act_gate", "pointwise_bn_act", "conv_bn_act")
OTHERS = ("squeeze_excite_gate", "expand_depthwise_squeeze", "depthwise_bn_act", "depthwise_bn_act_se")
_COMPILED = ("depthwise_bn_act_squeeze", "pointwise_bn_act")


Item = TypeVar("Item")


@dataclass(frozen=True)
class Measurement:
    """One operator call to measure, and whether torch.compile is worth its seconds there."""

    model: str
    call: Call
    op: str
    batch: int
    compiled: bool

    @property
    def title(self) -> str:
        """The measurement in words."""
        call, size = self.call, f"{self.call.channels}x{self.call.plane[0]}x{self.call.plane[1]}"
        words = f" {call.kernel}x{call.kernel} stride {call.stride}" if call.kernel > 1 else ""
        to = f" to {call.out}" if call.out else ""
        extras = ", gate" * call.gate + ", residual" * call.residual + f", {call.reduced} reduced" * bool(call.reduced)
        return f"{self.op} of {self.model}, {size}{to}{words}{extras}, {call.activation}, batch {self.batch}"


def _values(call: Call) -> int:
    """Values that a call reads and writes for an image, about."""
    return math.prod(call.plane) * (call.channels + (call.out or call.channels) // call.stride**2)


def of_family(model: str, op: str, batch: int) -> list[Measurement]:
    """Return the calls of a network by one operator, those that move most first."""
    found = [
        Measurement(model, call, op, batch, op in _COMPILED)
        for call in calls_of(model)
        if call.op == op or (op.startswith("depthwise") and call.op.startswith("depthwise"))
    ]
    return sorted(found, key=lambda one: -_values(one.call))


def in_turn(lists: Sequence[Sequence[Item]]) -> Iterator[Item]:
    """Return the first of each list, then the second of each, to the end of the longest."""
    for position in range(max(map(len, lists), default=0)):
        for one in lists:
            yield from one[position : position + 1]

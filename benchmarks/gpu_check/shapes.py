"""The operator calls of networks, and which of them to measure first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from effkernels.bench import op_calls
from effkernels.ops.call import DEPTHWISE_OPS, OpCall


def calls_of(model: str) -> tuple[OpCall, ...]:
    """Return the distinct operator calls of a network at its own input size, in the order of the forward.

    After them come calls that represent others: the squeeze_excite_gate of each width, and the expansions with the
    depthwise convolution that follows.
    """
    found = op_calls.calls_of(model)
    gates = [
        OpCall(
            "squeeze_excite_gate", channels=call.channels, reduced=call.reduced, activation=call.se_activation,
            gate_activation=call.gate_activation,
        )
        for call in found
        if call.reduced
    ]  # fmt: skip
    return tuple(dict.fromkeys([*found, *gates, *_expansions(found)]))


def _expansions(calls: Sequence[OpCall]) -> Iterator[OpCall]:
    """Return the expand_depthwise_squeeze of every 1x1 convolution and depthwise convolution that fit each other."""
    for expand in calls:
        for depthwise in calls:
            expanded = (expand.out_channels, expand.height, expand.width)
            follows = expanded == (depthwise.channels, depthwise.height, depthwise.width)
            if expand.op == "pointwise_bn_act" and depthwise.op in DEPTHWISE_OPS and follows:
                yield expand.with_(
                    op="expand_depthwise_squeeze", kernel=depthwise.kernel, stride=depthwise.stride,
                    padding=depthwise.padding, expand_activation=expand.activation, activation=depthwise.activation,
                    gated=False, residual=False,
                )  # fmt: skip


# The operators in the order of their worth: those that the targets are written for, then the other forms of the
# depthwise operator, for what squeeze-and-excitation adds to it.
FAMILIES = ("depthwise_bn_act_squeeze", "depthwise_bn_act_gate", "pointwise_bn_act", "conv_bn_act")
OTHERS = (
    "squeeze_excite_gate",
    "pointwise_bn_act_pool",
    "expand_depthwise_squeeze",
    "depthwise_bn_act",
    "depthwise_bn_act_se",
)
_COMPILED = ("depthwise_bn_act_squeeze", "pointwise_bn_act")


Item = TypeVar("Item")


@dataclass(frozen=True)
class Measurement:
    """One operator call to measure, and whether torch.compile is worth its seconds there."""

    model: str
    call: OpCall
    compiled: bool

    @property
    def op(self) -> str:
        """The operator."""
        return self.call.op

    @property
    def batch(self) -> int:
        """Images of a call."""
        return self.call.batch

    @property
    def title(self) -> str:
        """The measurement in words."""
        call = self.call
        size = f"{call.channels}x{call.height}x{call.width}"
        to = f" to {call.out_channels}" if call.out_channels else ""
        words = f" {call.window}" if call.window else ""
        extras = ", gate" * call.gated + ", residual" * call.residual + f", {call.reduced} reduced" * bool(call.reduced)
        return f"{call.op} of {self.model}, {size}{to}{words}{extras}, {call.activation}, batch {call.batch}"


def _values(call: OpCall) -> int:
    """Values that a call reads and writes for an image, about."""
    return call.height * call.width * (call.channels + (call.out_channels or call.channels) // call.stride**2)


def of_family(model: str, op: str, batch: int) -> list[Measurement]:
    """Return the calls of a network by one operator, those that move most first."""
    found = [call for call in calls_of(model) if call.op == op or {call.op, op} <= set(DEPTHWISE_OPS)]
    found.sort(key=lambda call: -_values(call))
    if op in ("depthwise_bn_act_gate", "depthwise_bn_act_se"):  # of a network without squeeze-and-excitation, too
        found = [call.with_(reduced=call.reduced or max(1, call.channels // 4)) for call in found]
    return [Measurement(model, call.with_(op=op, batch=batch), op in _COMPILED) for call in found]


def in_turn(lists: Sequence[Sequence[Item]]) -> Iterator[Item]:
    """Return the first of each list, then the second of each, to the end of the longest."""
    for position in range(max(map(len, lists), default=0)):
        for one in lists:
            yield from one[position : position + 1]

"""The instructions that a warp issues for each unit of its work, and the most that a kernel may take.

A unit is a value of the result, a block, a tile of a product or a step of it along k. The limits are of the code for
sm_90 and of 16-bit types, whose swish is one instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.kernel_economy.counts import parts_of, strip, strip_elements
from benchmarks.kernel_economy.pointwise import epilogue_of, tile_of
from benchmarks.kernel_economy.reading import Kernel
from effkernels.plan.kernel_counts import LOADS_AHEAD, Counters

# kConvWarpRows and kConvTileWidth of conv.h by kConvChannels, for the 32 lanes of a warp.
LANE_VALUES = 2 * 16 * 32 // 32
# kPointwiseStages - 1 of pointwise.h: what a block loads before its first step.
_STAGES_AHEAD = 3
# kExpandedChannels of expand_depthwise.h by a fragment of 16 pixels, for the 32 lanes of a warp.
EXPANDED_VALUES = 48 * 16 // 32
# Of a column of the windows of mbconv.h: 16 rows and 8 channels, likewise.
WINDOW_VALUES = 16 * 8 // 32
# Weights of the stem that a thread copies at once: the 3x3 window of an input channel.
_STEM_WINDOW = 9

# By size and stride; of a strip of 2 by size.
_STRIP = {(3, 1): 24, (3, 2): 31, (5, 1): 48, (5, 2): 60}
_SHORT_STRIP = {3: 48, 5: 109}
# Of expand_depthwise: a value of a strip by size and stride, and its product.
_EXPAND_STRIP = {(3, 1): 20, (3, 2): 25, (5, 1): 42, (5, 2): 51}
_EXPAND_SHORT_STRIP = {(3, 1): 28, (3, 2): 30, (5, 1): 59, (5, 2): 62}
_EXPANDED_VALUE, _EXPAND_CHUNK = 6, 4
_EXPAND_SLICE, _EXPAND_PAIR_SLICE = 40, 55
_STEM_VALUE, _STEM_BLOCK = 13, 480
_POINTWISE_BLOCK = 795
# By epilogue, rows and columns of a tile: of a tile, of a step.
_POINTWISE = {
    ("identity", 64, 64): (366, 106),
    ("identity", 128, 16): (328, 101),
    ("identity", 128, 24): (395, 107),
    ("identity", 128, 32): (370, 112),
    ("identity", 128, 40): (452, 115),
    ("identity", 128, 64): (477, 131),
    ("identity", 128, 96): (600, 152),
    ("identity", 128, 128): (475, 125),
    ("identity", 192, 24): (453, 126),
    ("identity", 256, 16): (393, 140),
    ("silu", 64, 64): (286, 68),
    ("silu", 64, 144): (553, 103),
    ("silu", 128, 64): (472, 96),
    ("silu", 128, 96): (636, 116),
    ("silu", 128, 128): (457, 89),
}


@dataclass(frozen=True)
class Issued:
    """The instructions of one unit of work.

    Attributes:
        unit: in words, as "value, at a border".
        counters: what a warp issues for it.
        most: the limit; None without one.
    """

    unit: str
    counters: Counters
    most: float | None = None

    @property
    def broken(self) -> str | None:
        """What is wrong, in one line; None if nothing is."""
        if self.most is None or self.counters.issued <= self.most:
            return None
        return f"{self.counters.issued:.1f} instructions for each {self.unit}; the claim is at most {self.most}"


def issued_by(kernel: Kernel) -> list[Issued]:
    """Return the instructions of each unit of a kernel's work; none for a kernel without limits.

    Raises:
        PartMissing: the code does not have a part that is counted.
    """
    if kernel.arch != 90 or kernel.element_bytes != 2 or kernel.family not in _FAMILIES:
        return []
    parts = parts_of(kernel)
    return _FAMILIES[kernel.family](kernel, parts) if parts else []


def _depthwise(kernel: Kernel, parts: Mapping[str, Counters]) -> list[Issued]:
    size, stride = int(kernel.arguments[1]), int(kernel.arguments[2])
    each = 1 / strip_elements(kernel)
    if strip(kernel) == 2:  # the same code inside of the image and at its border
        return [Issued("value", parts["strip"] * each, _SHORT_STRIP[size])]
    return [
        Issued("value", (parts["strip"] + parts["row"] * size) * each, _STRIP.get((size, stride))),
        Issued("value, at a border", (parts["strip"] + parts["row.border"] * size) * each),
    ]


def _stem(_: Kernel, parts: Mapping[str, Counters]) -> list[Issued]:
    block = parts["prologue"] + parts["norm"] + parts["weights"] * _STEM_WINDOW
    return [
        Issued("value, x channels_last", parts["tile"] * (1 / LANE_VALUES), _STEM_VALUE),
        Issued("value, x contiguous", parts["tile.planes"] * (1 / LANE_VALUES), _STEM_VALUE),
        Issued("block", block, _STEM_BLOCK),
    ]


def _pointwise(kernel: Kernel, parts: Mapping[str, Counters]) -> list[Issued]:
    """Return those of a product that stores its sums from the registers; with gates where the kernel takes them."""
    tile, epilogue = tile_of(kernel), epilogue_of(kernel)
    if epilogue == "any":
        return []
    gated = epilogue != "silu"
    of_tile, of_step = _POINTWISE[epilogue, tile.rows, tile.columns]
    stage, step = parts["weights"] + parts["fill"], parts["step.gated" if gated else "step"]
    return [
        Issued("block", parts["prologue"] + stage * _STAGES_AHEAD, _POINTWISE_BLOCK),
        Issued("tile", parts["tile"] + parts["tile.gate"] if gated else parts["tile"], of_tile),
        Issued("step", step, of_step),
    ]


def _expand_depthwise(kernel: Kernel, parts: Mapping[str, Counters]) -> list[Issued]:
    size, stride = int(kernel.arguments[1]), int(kernel.arguments[2])
    value = (parts["strip"] + parts["row"] * (size - 1)) * (1 / strip_elements(kernel))  # the first row is in the strip
    return [
        Issued("value", value, (_EXPAND_SHORT_STRIP if strip(kernel) == 2 else _EXPAND_STRIP).get((size, stride))),
        Issued("expanded value, but for products", parts["pair"] * (1 / 2 / EXPANDED_VALUES), _EXPANDED_VALUE),
        Issued("16 pixels by 32 input channels", parts["fragment.slice"], _EXPAND_SLICE),
        Issued("32 pixels by 32 input channels", parts["pair.slice"], _EXPAND_PAIR_SLICE),
        Issued("16 bytes of a pixel of x", parts["load.pixels"] * (1 / LOADS_AHEAD), _EXPAND_CHUNK),
        Issued("group of rows", parts["group"]),
    ]


_FAMILIES = {
    "depthwise_strips": _depthwise,
    "expand_depthwise": _expand_depthwise,
    "conv_stem": _stem,
    "pointwise": _pointwise,
}

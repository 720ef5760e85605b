"""The work of a product: csrc/cuda/pointwise.cuh."""

from __future__ import annotations

from effkernels.plan.cut import WARP, Clocks, Cut, Work, ceil_divide, chain_of, with_activation
from effkernels.plan.kernel_counts import Counters, total
from effkernels.plan.record import RecordedCall

_ANY_EPILOGUE = 2  # of a product, whose sums go through shared memory: PointwiseEpilogue::kAny


def product_fill(cut: Cut, *, gated: bool) -> tuple[int, Counters]:
    """Return the vectors of gates that a thread copies after the first, and what asks for the first stages of x."""
    part, slices = cut.counts.part, min(3, cut["steps"])
    gates = ceil_divide(cut["gate_images"] * 4, cut.threads) - 1 if gated else 0
    return gates, part("fill") * slices + part("gate") * (slices * gates)


def pointwise_work(cut: Cut, call: RecordedCall) -> Work:
    part = cut.counts.part
    x, weight, size = call.arguments["x"], call.arguments["weight"], call.dtype.itemsize
    pixels, inner, outer = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1], weight.shape[0]
    rows, columns, steps, vector = cut["rows"], cut["columns"], cut["steps"], 16 // size
    gated, residual = (call.arguments.get(name) is not None for name in ("gate", "residual"))
    pools = cut.kernel == "pointwise_pool"
    keeps_weight, shares = cut["keeps_weight"] == 1, cut["parts"] > 1 and not pools
    step = part("step.gated" if gated else "step")
    if not keeps_weight:
        step = step + part("step.weights")
    # Values of a tile go through shared memory, four or more to a thread, or leave from the registers with the tile.
    values = rows * columns
    of_value = part("value.part") if shares else with_activation(cut, "value", call.arguments["activation"])
    of_thread = values / min(cut.threads, values / 4)
    tile = total(((part("tile"), 1), (part("tile.gate"), gated), (part("tile.residual"), residual)))
    gates, fill = product_fill(cut, gated=gated)
    residuals = rows * columns / vector / cut.threads if residual else 0.0
    load = total(((part("prologue"), 1), (part("weights"), min(3, steps)), (fill, 1)))
    one = total(((step, steps), (part("gate"), steps * gates), (tile, 1), (part("residual"), residuals)))
    tiles = cut["row_tiles"] * cut["column_tiles"] * cut["parts"]
    issued = load * (cut.grid * cut.warps) + (one * cut.warps + of_value * (values / WARP)) * tiles
    prologue = chain_of(load, parameters=part("prologue").trips)
    # Later slices are asked for three steps before they are needed.
    body = chain_of((one + of_value * of_thread) * cut["tiles"], inputs=1)
    last = Clocks()
    y_bytes = call.results[0].numel() * size
    l2_bytes = size * pixels * inner * cut["column_tiles"] + y_bytes * (2 if residual else 1)
    readers = cut.grid / cut["column_tiles"] if keeps_weight else cut["row_tiles"] * cut["parts"]
    l2_bytes += size * outer * inner / (1 if pools else cut["parts"]) * readers
    if pools:
        per_warp, of_block = _pooling(cut, x.shape[2] * x.shape[3], size)
        issued = issued + (per_warp * tiles + of_block * cut.grid) * cut.warps
        body = body + chain_of(per_warp * cut["tiles"] + of_block)
    if cut["parts"] > 1:
        if pools:
            last = Clocks(0, 0, ceil_divide(cut["parts"], 4), 1)
        else:
            sums = with_activation(cut, "value", call.arguments["activation"]) + part("value.other") * cut["parts"]
            issued = issued + sums * (values / WARP * tiles / cut["parts"])
            last = chain_of(sums * of_thread, parameters=ceil_divide(cut["parts"], 2)) + Clocks(arrivals=1)
        l2_bytes += 2 * 4 * cut["parts"] * call.results[0].numel()
    return Work(issued, cut.counts.registers, l2_bytes, prologue, body, last)


def _pooling(cut: Cut, pixels: int, size: int) -> tuple[Counters, Counters]:
    """Return what pooling adds to a warp in a tile, and to it in a block.

    A warp adds up all its rows of an image at once, or 8 of them where the sums go through shared memory.
    """
    part = cut.counts.part
    means = part("mean") * ceil_divide(cut["images"] * cut["columns"], cut.threads)
    if cut["epilogue"] != _ANY_EPILOGUE:
        return part("image") * (1 + (cut["warp_rows"] - 1) / pixels), means
    width = 8 if size == 2 and cut["columns"] > 16 else 4
    vectors = cut["rows"] * cut["columns"] / width / cut.threads
    return part("image") * (1 + 7 / pixels) * vectors, means

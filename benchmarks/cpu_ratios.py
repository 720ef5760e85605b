"""Measures what `optimize_` swaps on a CPU, PyTorch's time by the operator's: ``python -m benchmarks.cpu_ratios``.

Each case is a convolution with its norm and activation, by modules' functions and by the operator, in turns in one
process, the shortest time of each. Both get channels_last, but for images of a stem, which come as a camera's do: for
PyTorch's convolution they are converted, as they are in a network whose next blocks run fused. The rows go to
cpu_ratios.csv beside this file, which holds `effkernels.optimize.speed` to its rules (tests/test_optimize_speed.py).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels import ops
from effkernels.ops import Norm

TABLE = Path(__file__).with_suffix(".csv")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: F.relu(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
}
_SECONDS = 0.06
_MOST_PRODUCTS = 2e9
# (in_channels, out_channels, kernel, stride) by operator, and the sides of their images.
_STEMS = [(3, 32, 3, 2), (3, 64, 7, 2), (3, 24, 3, 2)]
_DENSE = [
    *((8, 8, 3, 1), (16, 16, 3, 1), (24, 24, 3, 1), (32, 32, 3, 1), (64, 64, 3, 1), (128, 128, 3, 1), (32, 32, 5, 1)),
    *((16, 64, 3, 1), (24, 96, 3, 1), (32, 128, 3, 2), (48, 192, 3, 1), (64, 256, 3, 1), (96, 384, 3, 1)),
]
_DEPTHWISE = [(32, 32, 3, 1), (128, 128, 3, 1), (144, 144, 5, 2), (960, 960, 3, 1), (960, 960, 5, 1), (8, 8, 3, 1)]
_POINTWISE = [(8, 8, 1, 1), (32, 16, 1, 1), (16, 96, 1, 1), (144, 24, 1, 1), (256, 256, 1, 1), (960, 160, 1, 1)]
SHAPES = {
    "conv_bn_act": [*((shape, (112, 224)) for shape in _STEMS), *((shape, (14, 28, 56)) for shape in _DENSE)],
    "depthwise_bn_act": [(shape, (7, 14, 56)) for shape in _DEPTHWISE],
    "pointwise_bn_act": [(shape, (7, 14, 56)) for shape in _POINTWISE],
}


class Ratio(NamedTuple):
    """A row of the table.

    Attributes:
        op: the operator.
        in_channels, out_channels, kernel, stride: of the convolution.
        side, batch: of the image.
        activation: after the norm.
        dtype: of images and weights.
        threads: of PyTorch.
        ratio: PyTorch's time divided by the operator's: above 1 the operator is faster.
    """

    op: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    side: int
    batch: int
    activation: str
    dtype: str
    threads: int
    ratio: float


def read_rows(file: Path, row: Any) -> list[Any]:
    """Return the rows of a table as instances of a NamedTuple with its columns."""
    kinds = get_type_hints(row)
    with file.open(encoding="utf-8", newline="") as table:
        return [row(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(table)]


def write_rows(file: Path, row: Any, rows: Sequence[Any]) -> None:
    """Write instances of a NamedTuple as a table."""
    with file.open("w", encoding="utf-8", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(row._fields)
        writer.writerows(rows)


def read_table() -> list[Ratio]:
    """Return the rows of the table in the repository."""
    return read_rows(TABLE, Ratio)


def _cases(threads: int) -> Iterator[Ratio]:
    for op, shapes in SHAPES.items():
        for shape, sides in shapes:
            for side, batch, activation, dtype in itertools.product(
                sides, (1, 8), ACTIVATIONS, ("float32", "bfloat16")
            ):
                products = shape[1] * shape[2] ** 2 * (1 if op == "depthwise_bn_act" else shape[0])
                if batch * (side / shape[3]) ** 2 * products <= _MOST_PRODUCTS:
                    yield Ratio(op, *shape, side, batch, activation, dtype, threads, 0.0)


def ratio_of(first: Callable[[], Any], second: Callable[[], Any], seconds: float) -> float:
    """Return the shortest time of the first call divided by that of the second, in turns, for at least six turns."""
    shortest = [float("inf"), float("inf")]
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        for index, call in enumerate((first, second)):
            start = time.perf_counter()
            call()
            shortest[index] = min(shortest[index], time.perf_counter() - start)
        if turn >= 5 and time.perf_counter() > end:
            break
    return shortest[0] / shortest[1]


def measured(case: Ratio) -> Ratio:
    """Return a case with its ratio."""
    dtype, last = getattr(torch, case.dtype), torch.channels_last
    groups = case.in_channels if case.op == "depthwise_bn_act" else 1
    x = torch.randn(case.batch, case.in_channels, case.side, case.side).to(dtype)
    is_stem = case.in_channels == 3
    x = x if is_stem else x.contiguous(memory_format=last)
    weight = torch.randn(case.out_channels, case.in_channels // groups, case.kernel, case.kernel).to(dtype) * 0.1
    weight = weight.contiguous(memory_format=last)
    given = weight if case.kernel == 1 else weight.contiguous()
    mean, variance = torch.zeros(case.out_channels, dtype=dtype), torch.ones(case.out_channels, dtype=dtype)
    norm = Norm(mean, variance, variance, mean)
    pad = case.kernel // 2
    activate = ACTIVATIONS[case.activation]
    options = {} if case.op == "pointwise_bn_act" else {"stride": case.stride, "padding": (pad,) * 4}
    operator = getattr(ops, case.op)

    def theirs() -> Tensor:
        image = x.contiguous(memory_format=last) if is_stem else x
        y = F.conv2d(image, weight, None, case.stride, pad, 1, groups)
        return activate(F.batch_norm(y, mean, variance, variance, mean))

    def ours() -> Tensor:
        result: Tensor = operator(x, given, norm=norm, activation=case.activation, **options)
        return result

    with torch.inference_mode():
        return case._replace(ratio=round(ratio_of(theirs, ours, _SECONDS), 2))


def main() -> None:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    arguments = parser.parse_args()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for case in _cases(threads):
            rows.append(measured(case))
            print(*rows[-1], flush=True)
    write_rows(TABLE, Ratio, rows)


if __name__ == "__main__":
    main()

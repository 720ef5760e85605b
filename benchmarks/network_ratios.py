"""Measures what `optimize_` makes of whole networks on a CPU: ``python -m benchmarks.network_ratios``.

Each model of the tests (tests/optimize_models.py), as it comes and under `optimize_`, in turns in one process, of one
float32 image, in both memory formats; the ratio of the shortest times. What is below 1 is measured again, once. The
rows go to network_ratios.csv beside this file; tests/test_optimize_speed.py holds every one to at least 0.97.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import effkernels
from benchmarks.cpu_ratios import ratio_of, read_rows, write_rows

TABLE = Path(__file__).with_suffix(".csv")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_TESTS = Path(__file__).resolve().parents[1] / "tests"
_SECONDS = 1.0


class NetworkRatio(NamedTuple):
    """A row of the table.

    Attributes:
        library, name: of the model.
        side: of the image.
        layout: of the image and of the weights.
        threads: of PyTorch.
        ratio: the time of the model as it comes, divided by that under `optimize_`.
    """

    library: str
    name: str
    side: int
    layout: str
    threads: int
    ratio: float


def read_table() -> list[NetworkRatio]:
    """Return the rows of the table in the repository."""
    return read_rows(TABLE, NetworkRatio)


def measured(peer: Any, threads: int) -> Iterator[NetworkRatio]:
    """Measure a model of the tests in both layouts."""
    models = importlib.import_module("optimize_models")
    if not models.is_installed(peer.library):
        return
    side = peer.options.get("img_size", 224)
    torch.manual_seed(0)
    plain: nn.Module = models.structure(peer).eval()
    for layout, memory_format in LAYOUTS.items():
        model: nn.Module = plain.to(memory_format=memory_format)  # type: ignore[call-overload]
        optimised = copy.deepcopy(model)
        effkernels.optimize_(optimised)
        x = torch.randn(1, 3, side, side).contiguous(memory_format=memory_format)
        with torch.inference_mode():
            ratio = ratio_of(_call(model, x), _call(optimised, x), _SECONDS)
            if ratio < 1:
                ratio = max(ratio, ratio_of(_call(model, x), _call(optimised, x), _SECONDS))
        name = "-".join((peer.name, *map(str, peer.options.values())))
        yield NetworkRatio(peer.library, name, side, layout, threads, round(ratio, 2))


def _call(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: model(x)


def main() -> None:
    """Measure all models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--filter", default="", help="models whose name holds this; then nothing is written")
    arguments = parser.parse_args()
    sys.path.insert(0, str(_TESTS))
    torch.set_num_threads(arguments.threads)
    rows = []
    for peer in importlib.import_module("optimize_models").PEERS:
        if arguments.filter in peer.name:
            for row in measured(peer, arguments.threads):
                rows.append(row)
                print(*row, flush=True)
    if arguments.filter:
        return
    write_rows(TABLE, NetworkRatio, rows)


if __name__ == "__main__":
    main()

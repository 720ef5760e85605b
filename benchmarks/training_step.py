"""Time a training step of a network against timm's in both memory formats, in turns in one process.

    python -m benchmarks.training_step --batch 16 --threads 2 --rounds 7

A step is forward, mean of squares as the loss, and backward; the optimiser, the same for all, is left out. Printed are
the median of each contender, and the median over the rounds of the ratio to the faster of timm's two formats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import effkernels
from effkernels.models.peers import import_timm


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    return step


def contenders(name: str, batch: int, size: int, recompute: str | None) -> dict[str, Callable[[], None]]:
    timm = import_timm()
    x = torch.randn(batch, 3, size, size)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    ours = effkernels.create_model(name).train()
    effkernels.nn.set_recompute(ours, recompute)
    peers = [timm.create_model(name).train() for _ in range(2)]
    peers[1].to(memory_format=torch.channels_last)
    return {
        "effkernels": step_of(ours, x),
        "timm": step_of(peers[0], x),
        "timm channels_last": step_of(peers[1], channels_last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recompute", choices=["expand"], default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    steps = contenders(options.model, options.batch, options.size, options.recompute)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn > 0:  # the first one allocates
                times[name].append(time.perf_counter() - start)
    for name, found in times.items():
        print(f"{name:20} {1e3 * statistics.median(found):8.0f} ms")
    ratios = [min(a, b) / ours for ours, a, b in zip(*times.values(), strict=True)]
    print(f"{statistics.median(ratios):.2f} times as fast as the faster of timm's two formats in its round")


if __name__ == "__main__":
    main()

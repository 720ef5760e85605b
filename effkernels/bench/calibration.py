"""How fast the machine itself is right now: a matrix product and a copy, whose speed a benchmark must not change."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from effkernels import environment
from effkernels.bench import timing

# A case during which a rate of the machine changed by more than this was not measured on one machine, but on two.
LARGEST_DRIFT = 0.10
_ROUNDS = 2
_PRODUCT_SIZE = {"cpu": 768, "cuda": 4096}
_LEAST_COPY, _MOST_COPY = 32 << 20, 256 << 20


@dataclass(frozen=True)
class Calibration:
    """Rates of the machine at one moment.

    Attributes:
        product_gflops: of a square matrix product, in 1e9 FLOPs a second: in the dtype asked for on a CPU, in bfloat16
            on a GPU.
        copy_gb_s: of a copy of memory larger than the caches, bytes read and written, in 1e9 a second.
    """

    product_gflops: float
    copy_gb_s: float

    def drift(self, later: Calibration) -> float:
        """Return by which share of it the rate that changed more changed: 0.1 for ten per cent."""
        return max(
            abs(later.product_gflops / self.product_gflops - 1),
            abs(later.copy_gb_s / self.copy_gb_s - 1),
        )


@functools.lru_cache(maxsize=1)
def _tensors(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = _PRODUCT_SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(size, size, generator=generator).to(device, dtype)
    wanted = 2 * environment.last_level_cache_bytes(device)
    copied = torch.zeros(min(max(wanted, _LEAST_COPY), _MOST_COPY) // 4, device=device)
    return factor, torch.empty_like(factor), copied, torch.zeros_like(copied)


def calibrate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Calibration:
    """Measure the rates of a device, with the threads that PyTorch has now; takes a few tenths of a second.

    Args:
        dtype: of the product on a CPU.
    """
    device = torch.device(device)
    factor, product, source, target = _tensors(device, dtype if device.type == "cpu" else torch.bfloat16)
    with torch.inference_mode():
        times = timing.time_in_turns(
            {
                "product": lambda number: torch.mm(factor, factor, out=product),
                "copy": lambda number: target.copy_(source),
            },
            device=device,
            warmup=1,
            rounds=_ROUNDS,
        )
    product_us, copy_us = (timing.summarise(times[name]).median_us for name in ("product", "copy"))
    return Calibration(
        product_gflops=2 * factor.shape[0] ** 3 / product_us / 1e3,
        copy_gb_s=2 * source.nbytes / copy_us / 1e3,
    )

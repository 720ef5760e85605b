"""Seeds that are a function of what they are for.

Each step and each image gets a seed of its own, so a training that goes on after a stop draws the same numbers without
storing the state of any generator, with any number of workers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_for(*parts: object) -> int:
    """Return a seed of 32 bits, which is what PyTorch's generator for the CPU uses."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


@contextmanager
def cpu_generator(seed: int) -> Iterator[None]:
    """Seed the CPU's default generator, which torchvision's transforms draw from, and put it back after the block.

    `torch.manual_seed` would also seed the GPU's, from which the network draws meanwhile.
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)

"""The sizes that an exported network takes, and the sizes at which it is traced and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.export import Dim

# At up to 32 pixels the last map of a network that halves five times is a single pixel, which a trace takes for a case
# of its own: what it then holds for are images above that.
SMALLEST_DYNAMIC_IMAGE = 33
DYNAMIC_IMAGE = (64, 1024)
"""Pixels of a side where it is left open without a range: what classifiers of this kind are run at."""


@dataclass(frozen=True)
class Range:
    """The sizes one axis may have, both ends included; `low == high` for a fixed one."""

    low: int
    high: int

    @classmethod
    def of(cls, name: str, value: int | tuple[int, int]) -> Range:
        """Return a size, or (smallest, largest).

        Raises:
            ValueError: below 1, or a range that is empty; the message begins with `name`.
        """
        low, high = (value, value) if isinstance(value, int) else value
        if low < 1:
            raise ValueError(f"{name}={value}; allowed: at least 1")
        if low > high:
            raise ValueError(f"{name}={value}; allowed: a range from a smaller number to a larger one")
        return cls(low, high)

    @property
    def fixed(self) -> bool:
        return self.low == self.high

    def clamp(self, size: int) -> int:
        """Return the allowed size nearest to `size`."""
        return min(max(size, self.low), self.high)

    def __str__(self) -> str:
        return str(self.low) if self.fixed else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class Sizes:
    """The inputs that an exported network takes: (batch, channels, height, width).

    Attributes:
        batch: images in a call.
        image: pixels of height and of width, each on its own where it is a range.
        channels: of an image.
    """

    batch: Range
    image: Range
    channels: int

    @classmethod
    def of(cls, batch_size: int | tuple[int, int], image_size: int | tuple[int, int], channels: int) -> Sizes:
        """Read sizes or ranges as a caller writes them.

        Raises:
            ValueError: one of them is out of its range; the message names it.
        """
        batch, image = Range.of("batch_size", batch_size), Range.of("image_size", image_size)
        if not image.fixed and image.low < SMALLEST_DYNAMIC_IMAGE:
            raise ValueError(f"image_size={image_size}; allowed: a range from at least {SMALLEST_DYNAMIC_IMAGE}")
        return cls(batch, image, channels)

    def example(self) -> tuple[int, int, int, int]:
        """Return the input to trace with. Open sizes are not 1 and not equal: the trace would make that a rule."""
        return self.batch.clamp(2), self.channels, self.image.clamp(224), self.image.clamp(256)

    def dynamic_axes(self) -> dict[int, Any] | None:
        """Return the input's dynamic axes for `torch.export.export`; None if every size is fixed."""
        axes: dict[int, Any] = {}
        if not self.batch.fixed:
            axes[0] = Dim("batch", min=self.batch.low, max=self.batch.high)
        if not self.image.fixed:
            # Not named ones: SAME padding leaves conditions that are always true and that the solver cannot prove.
            for axis in (2, 3):
                axes[axis] = Dim.DYNAMIC(min=self.image.low, max=self.image.high)
        return axes or None

    def probes(self) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
        """((height, width), batch sizes) to check the result at: the ends that are cheap, and odd sizes between."""
        batches = tuple(sorted({self.batch.low, self.batch.clamp(self.batch.low + 1), self.batch.clamp(5)}))
        low = self.image.low
        if self.image.fixed:
            return [((low, low), batches)]
        odd = (self.image.clamp(low + 33), self.image.clamp(low + 66))
        return [((low, low), batches), (odd, batches), ((odd[1], low), batches[:1])]

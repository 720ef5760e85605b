"""What is run, a `NetworkCase`, and by whom: a `Contender`, which prepares a `ReadyContender` or says why it cannot."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effkernels.bench.precision import Precision
from effkernels.models.sources import ModelSource, find_model


@dataclass(frozen=True)
class NetworkCase:
    """The model, input and settings of a run.

    Attributes:
        model: one of the forms of `effkernels.models.sources.find_model`.
        img_size: height and width of an image, in pixels.
        channels_last: for contenders that do not decide it.
        channels: of an image.
    """

    model: str
    img_size: int
    batch: int
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 1
    channels_last: bool = False
    seed: int = 0
    channels: int = 3

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def numbers(self) -> Precision:
        """The precision as dtypes."""
        return Precision.of(self.precision, self.torch_device.type)

    @property
    def source(self) -> ModelSource:
        """The model as what builds it."""
        return find_model(self.model)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return self.channels, self.img_size, self.img_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def images(self, number: int) -> Tensor:
        """Input number ``number``: float32 noise, (batch, channels, img_size, img_size), on the CPU.

        The tensor is shared: do not change it.
        """
        return _noise(self.batch, self.channels, self.img_size, number)


@functools.lru_cache(maxsize=2)  # every contender asks for the same ones, and a large batch takes a second to draw
def _noise(batch: int, channels: int, size: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(batch, channels, size, size, generator=generator)


@dataclass(frozen=True)
class ReadyContender:
    """A contender ready to run a case.

    Attributes:
        label: the name for tables and rows; says which implementation ran where there are several.
        convert: brings a float32 NCHW batch on the CPU into the contender's own input type, device, dtype and layout.
        run: one call; everything in it is timed.
        packages: distributions whose version decides the speed, besides torch and triton.
        compiles: preparing and the first calls compile; the compiler's own memory is not what inference needs.
        module: that ``run`` calls, part by part; None: there are no parts to see.
    """

    label: str
    convert: Callable[[Tensor], Any]
    run: Callable[[Any], Any]
    packages: tuple[str, ...] = ()
    compiles: bool = False
    module: nn.Module | None = None


@dataclass(frozen=True)
class Contender:
    """A name on the command line, a line of description, the devices it is for, and how to get it.

    ``missing`` returns why the contender cannot run a case, None if it can; ``prepare`` is called only then.
    ``needs`` are the packages besides torch without which it cannot run; ``lossy`` whether it computes in fewer bits
    than the case asks for, so that its error is not judged by the case's precision.
    """

    name: str
    description: str
    devices: tuple[str, ...]
    missing: Callable[[NetworkCase], str | None]
    prepare: Callable[[NetworkCase], ReadyContender]
    needs: tuple[str, ...] = ()
    lossy: bool = False

    def not_installed(self) -> tuple[str, ...]:
        """Return the packages of ``needs`` that are not installed."""
        return tuple(package for package in self.needs if importlib.util.find_spec(package) is None)

    def unavailable(self, case: NetworkCase) -> str | None:
        """Return why this contender cannot run the case, in one line, or None."""
        if case.torch_device.type not in self.devices:
            return f"only for {' and '.join(self.devices)}, not {case.torch_device.type}"
        return self.missing(case)

"""Times a network's kernels on the CPU, layer by layer: ``python -m benchmarks.cpu_layers``, with ``--write`` to docs.

The kernels of a recorded forward run in their order, so that caches are as in a forward, and each has the shortest of
its times. Beside it is the floor of the layer: what its multiply-adds take at the rate of oneDNN's 1x1 convolution of
512 channels, or its images and weights at that of a copy in the caches, whichever is longer. Activations count nothing.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import effkernels
from benchmarks.sections import Section
from effkernels import environment
from effkernels.engine.cpu_recording import Recording

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
SECTION = Section(
    "docs/benchmarks.md", "<!-- cpu layers: written by benchmarks/cpu_layers.py -->", "<!-- end of cpu layers -->"
)
PRECISIONS = ("float32", "bfloat16", "float16")
_COPIED = 2 << 20  # bytes: more than a first-level cache, less than a second- and third-level one
_CALLS = 200


@dataclass(frozen=True)
class Layer:
    """A kernel of a recorded forward: its name and its sizes, from a line of `Recording.layers`."""

    kernel: str
    sizes: dict[str, int]
    dtype: str

    @classmethod
    def of(cls, line: str) -> Layer:
        """Return the layer of a line such as "pointwise dtype=float32 batch=1 pixels=49 ..."."""
        kernel, *pairs = line.split()
        values = dict(pair.split("=") for pair in pairs)
        dtype = values.pop("dtype")
        return cls(kernel, {name: int(value) for name, value in values.items()}, dtype)

    def _product(self, *names: str) -> int:
        result = 1
        for name in names:
            result *= self.sizes[name]
        return result

    def multiply_adds(self) -> tuple[int, int]:
        """Return the multiply-adds of products, which may run in bfloat16, and of depthwise windows, in float32."""
        window = ("batch", "out_height", "out_width", "channels", "kernel_h", "kernel_w")
        if self.kernel in ("pointwise", "pointwise_pool"):
            return self._product("batch", "pixels", "in_channels", "out_channels"), 0
        if self.kernel == "conv":
            return self._product(*window[:3], "in_channels", "out_channels", *window[4:]), 0
        if self.kernel == "depthwise":
            return 0, self._product(*window)
        if self.kernel == "expand_depthwise":
            return self._product("batch", "height", "width", "in_channels", "channels"), self._product(*window)
        return (2 * self._product("batch", "channels", "reduced"), 0) if self.kernel == "squeeze_excite" else (0, 0)

    def values(self) -> int:
        """Return how many values it has to read and write at least: images, results, weights."""
        s = self.sizes
        if self.kernel == "pointwise_pool":
            weights = self._product("in_channels", "out_channels")
            return self._product("batch", "pixels", "in_channels") + self._product("batch", "out_channels") + weights
        if self.kernel == "pointwise":
            images = s["in_channels"] + s["out_channels"] * (1 + s["residual"])
            return self._product("batch", "pixels") * images + self._product("in_channels", "out_channels")
        if self.kernel == "squeeze_excite":
            return 2 * self._product("channels", "reduced") + 2 * self._product("batch", "channels")
        if self.kernel == "scale":
            return 2 * self._product("batch", "pixels", "channels")
        pixels, results = self._product("batch", "height", "width"), self._product("batch", "out_height", "out_width")
        if self.kernel == "conv":
            window = self._product("kernel_h", "kernel_w")
            return (
                pixels * s["in_channels"] + results * s["out_channels"] + window * s["in_channels"] * s["out_channels"]
            )
        taps = self._product("channels", "kernel_h", "kernel_w")
        if self.kernel == "depthwise":
            return (pixels + results) * s["channels"] + taps
        return pixels * s["in_channels"] + results * s["channels"] + taps + self._product("in_channels", "channels")

    def title(self) -> str:
        """Return what it computes, for a table."""
        s = self.sizes
        if self.kernel in ("pointwise", "pointwise_pool"):
            means = ", means" if self.kernel == "pointwise_pool" else ""
            return f"1x1 {s['in_channels']} -> {s['out_channels']}, {s['pixels']} pixels{means}"
        if self.kernel in ("squeeze_excite", "scale"):
            return f"{self.kernel.replace('_', ' ')} {s['channels']}"
        window = f"{s['kernel_h']}x{s['kernel_w']}"
        sides = f"{s['height']}x{s['width']} -> {s['out_height']}x{s['out_width']}"
        if self.kernel == "conv":
            return f"{window} {s['in_channels']} -> {s['out_channels']}, {sides}"
        expand = f"1x1 {s['in_channels']} -> {s['channels']}, " if self.kernel == "expand_depthwise" else ""
        return f"{expand}depthwise {window} {s['channels']}, {sides}"


@dataclass(frozen=True)
class Rates:
    """Of the machine: multiply-adds a second in the network's dtype and in float32, bytes copied in caches a second."""

    products: float
    float32: float
    copied: float

    def floor(self, layer: Layer) -> float:
        """Return the least time of a layer in seconds."""
        products, windows = layer.multiply_adds()
        size = 4 if layer.dtype == "float32" else 2
        return max(products / self.products + windows / self.float32, layer.values() * size / self.copied)


def _shortest(call: Callable[[], object]) -> float:
    """Return the shortest time of a call in seconds."""
    shortest = float("inf")
    for _ in range(_CALLS):
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _products(dtype: torch.dtype) -> float:
    """Return the multiply-adds a second of a product that suits oneDNN: a 1x1 convolution of many channels."""
    channels, side = 512, 28
    image = torch.randn(1, channels, side, side).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 1, 1).to(dtype, memory_format=torch.channels_last)
    return channels**2 * side**2 / _shortest(lambda: F.conv2d(image, weight))


def measured_rates(dtype: torch.dtype) -> Rates:
    """Return the rates of this machine now, with PyTorch's threads; bytes read and written count."""
    source = torch.zeros(_COPIED // 4)
    target = torch.zeros_like(source)
    with torch.inference_mode():
        copied = 2 * _COPIED / _shortest(lambda: target.copy_(source))
        return Rates(_products(dtype), _products(torch.float32), copied)


def table(layers: Sequence[tuple[Layer, float]], rates: Rates) -> list[str]:
    """Return the rows of a Markdown table: equal layers in one row, the longest in all first."""
    together: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for layer, seconds in layers:
        together.setdefault((layer.title(), layer.dtype), []).append((seconds, rates.floor(layer)))
    whole = sum(seconds for _, seconds in layers)
    rows = sorted(together.items(), key=lambda row: -sum(seconds for seconds, _ in row[1]))
    lines = ["| layer | times | us each | floor, us | floor / time | of the time |", "|---|--:|--:|--:|--:|--:|"]
    for (title, _), times in rows:
        seconds, floor = (sum(column) / len(times) for column in zip(*times, strict=True))
        share = seconds * len(times) / whole
        each = f"{seconds * 1e6:.1f} | {floor * 1e6:.1f} | {floor / seconds:.0%}"
        lines.append(f"| {title} | {len(times)} | {each} | {share:.1%} |")
    floors = sum(floor for times in together.values() for _, floor in times)
    lines.append(f"| all | {len(layers)} | {whole * 1e6:.0f} | {floors * 1e6:.0f} | {floors / whole:.0%} | 100% |")
    return lines


def timed(model: str, dtype: torch.dtype, batch: int, rounds: int) -> list[tuple[Layer, float]]:
    """Return the kernels of a network of effkernels and their times in seconds."""
    network = effkernels.create_model(model).eval().to(dtype)
    channels, height, width = effkernels.models.model_input.input_size_of(network, None, owner="cpu_layers")
    images = torch.randn(batch, channels, height, width).to(dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        recording = Recording(network, images)
        return [(Layer.of(line), seconds) for line, seconds in recording.layers(rounds)]


def main() -> None:
    """Measure and print; with --write into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--precision", default="bfloat16", choices=PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.precision)
    layers = timed(arguments.model, dtype, arguments.batch_size, arguments.rounds)
    rates = measured_rates(dtype)
    machine = environment.device_name(torch.device("cpu"), arguments.threads)
    text = "\n".join(
        [
            f"{arguments.model}, {arguments.precision}, batch {arguments.batch_size}, {machine}, kernels of "
            f"{torch.ops.effkernels.cpu_isa('')}; {datetime.date.today()}. The machine's rates:",
            f"{rates.products / 1e9:.0f} products a nanosecond in {arguments.precision}, {rates.float32 / 1e9:.0f} in "
            f"float32, {rates.copied / 1e9:.0f} bytes copied.",
            "",
            *table(layers, rates),
        ]
    )
    print(text)
    if arguments.write:
        PAGE.write_text(SECTION.replaced(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()

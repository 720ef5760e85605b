"""The reports of an engine: how it was prepared, and what it has done since."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class BucketReport:
    """One batch size.

    Attributes:
        batch: images.
        runner: "cuda graph" or, on a CPU, "recorded"; "eager", "not prepared" or, where the memory limit leaves no room
            for it, "refused".
        reason: why it is not recorded; "" where it is.
        memory_bytes: the engine's memory bound with this batch size as the largest.
    """

    batch: int
    runner: str
    reason: str
    memory_bytes: int


@dataclass(frozen=True)
class EngineReport:
    """The preparation of an engine.

    Attributes:
        model: class of the model.
        device, dtype, memory_format: of the engine's copy, as text.
        input_size: (channels, height, width) of an image.
        optimized: what `effkernels.optimize_` did to the copy, or why it was not called.
        norms_folded: how many batch norms were folded into the weights of their convolutions; None: not asked for.
        preprocessing: where mean, std and resizing of `InferenceEngine.preprocess` come from.
        buckets: every batch size asked for, in rising order.
        weight_bytes: parameters and buffers.
        activation_bytes: the most bytes of tensors alive at once in a forward of the largest bucket.
        buffer_bytes: inputs and results that the engine holds itself.
        threads, cores: of the engine's own; None: not asked for.
    """

    model: str
    device: str
    dtype: str
    memory_format: str
    input_size: tuple[int, int, int]
    optimized: str
    norms_folded: int | None
    preprocessing: str
    buckets: tuple[BucketReport, ...]
    weight_bytes: int
    activation_bytes: int
    buffer_bytes: int
    threads: int | None = None
    cores: tuple[int, ...] | None = None

    def to_json(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        channels, height, width = self.input_size
        folded = "" if self.norms_folded is None else f", {self.norms_folded} norms folded"
        lines = [
            f"{self.model} on {self.device}, {self.dtype}, {self.memory_format}, input {channels}x{height}x{width}",
            f"  optimized: {self.optimized}{folded}",
            f"  preprocessing: {self.preprocessing}",
            f"  memory: weights {_mb(self.weight_bytes)}, activations {_mb(self.activation_bytes)}, "
            f"buffers {_mb(self.buffer_bytes)}",
        ]
        if self.threads is not None:
            where = "" if self.cores is None else f" on cores {', '.join(map(str, self.cores))}"
            lines.append(f"  threads of its own: {self.threads}{where}")
        for bucket in self.buckets:
            reason = f" ({bucket.reason})" if bucket.reason else ""
            lines.append(f"  batch {bucket.batch}: {bucket.runner}{reason}, up to {_mb(bucket.memory_bytes)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class EngineStats:
    """The work of an engine so far.

    Attributes:
        batches, images: buckets that were run and the images in them, by calls and by `submit` alike.
        mean_fill: images over the rows computed for them, the padding included, in (0, 1]; None before the first batch.
        requests: taken by `submit`; they end up completed, failed or cancelled, or are still pending.
        rejected: refused by `submit` because the queue was full.
        latency_p50_ms, latency_p95_ms, latency_p99_ms: from `submit` to the answer, in milliseconds, of the latest
            requests that were answered (4096 at most); None before the first.
    """

    batches: int
    images: int
    mean_fill: float | None
    requests: int
    completed: int
    failed: int
    cancelled: int
    pending: int
    rejected: int
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    latency_p99_ms: float | None


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"

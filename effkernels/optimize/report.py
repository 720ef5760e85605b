"""The report of `optimize_`, block by block."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class BlockReport:
    """One block, or one convolution with what follows it outside of any block.

    Attributes:
        name: path of the module, or of the convolution.
        kind: "mbconv", "depthwise_separable", "fused_mbconv", "conv_norm_act", "conv" (nothing follows: the operator's
            for channels_last tensors, on a CPU in float32; else PyTorch's), "squeeze_excite" or "block".
        fused: whether it runs fused; after `mode="training"`, whether it does in training mode too.
        reason: why it does not; where it does, which convolutions inside stay as they are, and why ("" where none).
        backend: what runs it: "cuda", "triton", "cpu", "reference" or several joined by "+"; "" where it is not fused.
        launches_before, launches_after: kernels that one forward starts on a GPU, as written and as planned now; None
            where the input size is unknown. A launch that several blocks share counts at the first of them.
        bytes_before, bytes_after: bytes that they move, each argument, parameter and result once; batch 1.
    """

    name: str
    kind: str
    fused: bool
    reason: str = ""
    backend: str = ""
    launches_before: int | None = None
    launches_after: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclass(frozen=True)
class Report:
    """The parts of a model that run fused, those that do not, and why.

    Attributes:
        model: name of the model's class.
        blocks: in the order of the model's modules.
        input_size: (C, H, W) of the image that launches and bytes are counted for, batch 1; None if it is unknown.
        notes: what else there is to say: a model with nothing to fuse, parts that could not be traced.
        mode: as of `optimize_`.
    """

    model: str
    blocks: tuple[BlockReport, ...]
    input_size: tuple[int, int, int] | None = None
    notes: tuple[str, ...] = ()
    mode: str = "inference"

    @property
    def fused(self) -> int:
        """Return how many blocks run fused."""
        return sum(block.fused for block in self.blocks)

    def to_json(self) -> str:
        """Return the report as strict JSON."""
        return json.dumps({"fused": self.fused, **asdict(self)}, indent=2, allow_nan=False)

    def __str__(self) -> str:
        """Return a table for people: a line per block, the sums, the notes."""
        if not self.blocks:
            return "\n".join((f"{self.model}: nothing to fuse", *self.notes))
        header = ("block", "kind", "backend", "launches", "MB", "reason")
        lines = [header, *(_line(block) for block in self.blocks), self._totals()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        verb = "train" if self.mode == "training" else "run"
        title = f"{self.model}: {self.fused} of {len(self.blocks)} blocks {verb} fused"
        if self.input_size is not None:
            where = " in eval mode" if self.mode == "training" else ""
            size = "x".join(map(str, self.input_size))
            title += f"; launches and bytes of one image{where}, {size}, before -> now"
        shared = any(block.fused and block.launches_after == 0 for block in self.blocks)
        notes = ("launches now 0: the block is part of a launch that starts with a block above it",) * shared
        rule = "  ".join("-" * width for width in widths)
        return "\n".join((title, table[0], rule, *table[1:], *notes, *self.notes))

    def _sum(self, figure: str) -> int | None:
        values = [getattr(block, figure) for block in self.blocks]
        return None if None in values else sum(values)

    def _totals(self) -> tuple[str, ...]:
        return (
            *("total", "", ""),
            _change(self._sum("launches_before"), self._sum("launches_after")),
            _change(self._sum("bytes_before"), self._sum("bytes_after"), 1e6),
            "",
        )


class NotFusedError(ValueError):
    """`optimize_(strict=True)` found something that cannot run fused; the model is as it was.

    Attributes:
        report: what would have been fused, and what not.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        missing = [block for block in report.blocks if block.reason]
        listed = "\n".join(f"  {block.name} ({block.kind}): {block.reason}" for block in missing)
        super().__init__(
            f"strict=True, and of {report.model} this does not run fused:\n{listed or '  anything at all'}"
        )


def _line(block: BlockReport) -> tuple[str, ...]:
    return (
        *(block.name, block.kind, block.backend or "not fused"),
        _change(block.launches_before, block.launches_after),
        _change(block.bytes_before, block.bytes_after, 1e6),
        block.reason,
    )


def _change(before: int | None, after: int | None, unit: float = 1) -> str:
    if before is None or after is None:
        return ""
    return f"{before} -> {after}" if unit == 1 else f"{before / unit:.2f} -> {after / unit:.2f}"

"""`optimize_` and `restore_`: other people's models run on the fused operators, in place and reversibly."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from effkernels import backends
from effkernels.optimize.accounting import Cost, Forward, costs_of, input_size_of, try_forward
from effkernels.optimize.classifier import swap_classifiers
from effkernels.optimize.report import BlockReport, NotFusedError, Report
from effkernels.optimize.survey import FILTERED, Entry, Method, Survey, Unit
from effkernels.optimize.swapping import is_swapped, swap, unswap
from effkernels.optimize.tracing import GuessedTrace, is_plain_container
from effkernels.optimize.verifying import GUESS_SIZES, SMALL_SIZES, difference
from effkernels.optimize.writing import write


def optimize_(
    model: nn.Module,
    mode: str = "inference",
    *,
    backend: str = "auto",
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    input_size: int | tuple[int, ...] | None = None,
) -> Report:
    """Let a model of any library run its MBConv-like blocks on the fused operators, in place.

    What is fused is found by structure, not by name: 1x1, depthwise and dense convolutions with the batch norm,
    activation, squeeze-and-excitation and residual around them. Each block is compared with its original forward on
    random numbers before it is used. Modules, parameters, buffers and their names stay the same objects, so state
    dicts, optimizers and references into the model stay valid, and weights may change at any time.

    At run time every block looks at its modules again. In training mode, with a hook inside, or with a part replaced
    it runs its original forward. The result of a block has the memory format of its input. Models can be copied,
    pickled, moved, cast, compiled and exported as before. Optimising again starts afresh.

    Args:
        model: changed in place.
        mode: "inference".
        backend: "auto", or one of `effkernels.backends.BACKENDS` for every fused operator of this model.
        filter_fn: called with the name and the module of each block or convolution; False leaves it out.
        strict: raise where anything that convolves stays as it is (what `filter_fn` leaves out aside).
        input_size: pixels of the image for which launches and bytes are counted: one number, (H, W) or (C, H, W); None:
            what the model says it was made for, else 224.

    Returns:
        What runs fused, what does not and why; `print` shows it as a table.

    Raises:
        ValueError: mode, backend or input_size unknown.
        NotFusedError: strict=True and something stays as it is; the model is then as it was before the call.
    """
    if mode != "inference":
        why = "the kernels for training are not there yet" if mode == "training" else "it is not known"
        raise ValueError(f"mode={mode!r}: {why}; allowed: 'inference'")
    allowed = ("auto", *backends.BACKENDS)
    if backend not in allowed:
        raise ValueError(f"backend={backend!r} is not a backend; allowed: {', '.join(allowed)}")
    size = input_size_of(model, input_size)
    restore_(model)
    with undisturbed(model):
        return _optimize(model, backend, filter_fn, strict, size)


def restore_(model: nn.Module) -> int:
    """Take `optimize_` back; returns how many blocks ran fused."""
    return sum(unswap(module) for module in model.modules() if is_swapped(module))


def _optimize(
    model: nn.Module,
    backend: str,
    filter_fn: Callable[[str, nn.Module], bool] | None,
    strict: bool,
    input_size: tuple[int, int, int],
) -> Report:
    before, problem = try_forward(model, input_size)
    fitter = _Fitter(backend, before)
    survey = Survey(model, filter_fn or (lambda name, module: True), fitter.accept)
    survey.run()
    fused = {path for entry in survey.entries if entry.fused for path in entry.paths}
    if fused:
        fitter.notes += swap_classifiers(model, before, fused, survey.allows, backend)
    order = {path: position for position, (path, _) in enumerate(model.named_modules())}
    entries = sorted(survey.entries, key=lambda entry: min(order[path] for path in entry.paths))
    after = None
    if before is not None and entries:
        after, problem = try_forward(model, input_size)
    groups = [entry.paths for entry in entries]
    costs = zip(costs_of(before, groups), costs_of(after, groups), strict=True)
    report = Report(
        model=type(model).__name__,
        blocks=tuple(_line(entry, *pair) for entry, pair in zip(entries, costs, strict=True)),
        input_size=None if after is None else input_size,
        notes=(*survey.notes, *fitter.notes, *([problem] if problem and entries else [])),
    )
    if strict and any(block.reason not in ("", FILTERED) for block in report.blocks):
        restore_(model)
        raise NotFusedError(report)
    return report


def _line(entry: Entry, before: Cost | None, after: Cost | None) -> BlockReport:
    backend = entry.backend if entry.fused else ""
    line = BlockReport(entry.name, entry.kind, entry.fused, entry.reason, backend)
    if before is None or after is None:
        return line
    return dataclasses.replace(
        line,
        launches_before=before.launches,
        launches_after=after.launches,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
    )


class _Fitter:
    """Writes, checks and puts in place the programs of units as they are found."""

    def __init__(self, backend: str, forward: Forward | None) -> None:
        self._backend = backend
        self._forward = forward
        self.notes: list[str] = []

    def accept(self, unit: Unit) -> bool:
        """Swap a unit if its programs hold; else its lines of the report say why not."""
        programs = {}
        for method in unit.methods:
            problem = self._problem(unit, method)
            if isinstance(problem, str):
                for entry in method.entries:
                    entry.fused, entry.reason = False, problem
                if not method.entries:
                    self.notes.append(f"{unit.path}.{method.trace.method}: {problem}".lstrip("."))
            else:
                programs[method.trace.method] = problem
        if programs:
            swap(unit.module, programs)
        return bool(programs)

    def _problem(self, unit: Unit, method: Method) -> Any:
        """The program of a method, or why it cannot be used."""
        name = method.trace.method
        try:
            for entry in method.entries:
                entry.backend = "+".join(dict.fromkeys(self._backends(unit.module, entry.ops)))
        except RuntimeError as refusal:
            return str(refusal)
        program = write(method.trace, method.match, method.roles, self._backend, len(method.entries))
        if not method.entries and is_plain_container(unit.module):
            return program  # it only hands tensors on
        original, shapes = getattr(type(unit.module), name), self._shapes(unit, method)
        with _forced(self._backend):
            problem = difference(unit.module, original, program, shapes)
            if isinstance(method.trace, GuessedTrace):
                for size in GUESS_SIZES:
                    problem = problem or difference(unit.module, original, program, [(1, shapes[0][1], *size)])
        return problem or program

    def _backends(self, module: nn.Module, ops: Sequence[str]) -> Iterator[str]:
        """The backend of each operator, where the module is now."""
        example = next((p for p in module.parameters() if p.is_floating_point()), None)
        if example is None:
            return
        x = torch.empty((1, 1, 1, 1), dtype=example.dtype, device=example.device)
        with _forced(self._backend):
            for op in ops:
                yield backends.choose(op, x)

    def _shapes(self, unit: Unit, method: Method) -> list[tuple[int, ...]]:
        """Shapes of inputs to try a method on."""
        recorded = None if self._forward is None else self._forward.shapes.get(unit.path)
        takes_the_same = method.trace.method != "forward_head"
        channels = recorded[1] if recorded is not None and takes_the_same and len(recorded) == 4 else None
        small = SMALL_SIZES[0] if unit.path or not takes_the_same else SMALL_SIZES[1]
        shapes: list[tuple[int, ...]] = [(2, channels or _first_channels(method), *small)]
        return [*shapes, recorded] if recorded is not None and takes_the_same else shapes


def _first_channels(method: Method) -> int:
    """Channels of the input, as the first convolution has them."""
    for node in method.trace.graph.nodes:
        if node.op == "call_module":
            modules = method.trace.root.get_submodule(str(node.target)).modules()
            conv = next((module for module in modules if isinstance(module, nn.Conv2d)), None)
            if conv is not None:
                return conv.in_channels
    return 3


def _forced(backend: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend == "auto" else backends.backend(backend)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and gradients, autocast, inference mode and the random state out of the way."""
    modes = [(module, module.training) for module in model.modules()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        used = {p.get_device() for p in model.parameters() if p.is_cuda}
        stack.enter_context(torch.random.fork_rng(devices=sorted(used)))
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training

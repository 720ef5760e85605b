"""`optimize_` and `restore_`: other people's models run on the fused operators, in place and reversibly."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from effkernels.models.model_input import input_size_of
from effkernels.ops import backends
from effkernels.optimize.accounting import Cost, Forward, costs_of, try_forward
from effkernels.optimize.program import MOST_ROWS, Program
from effkernels.optimize.report import BlockReport, NotFusedError, Report
from effkernels.optimize.survey import FILTERED, Entry, Method, Survey, Unit
from effkernels.optimize.swapped import OWN_PREFIX, is_swapped
from effkernels.optimize.swapping import swap, unswap
from effkernels.optimize.tracing import GuessedTrace, is_plain_container
from effkernels.optimize.training import KINDS, TrainingProgram
from effkernels.optimize.unknown import Unknown
from effkernels.optimize.verifying import GUESS_SIZES, SMALL_SIZES, difference, undisturbed
from effkernels.optimize.verifying_training import checked_program
from effkernels.optimize.writing import write

MODES = ("inference", "training")


def optimize_(
    model: nn.Module,
    mode: str = "inference",
    *,
    backend: str = "auto",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    input_size: int | tuple[int, ...] | None = None,
) -> Report:
    """Let a model of any library run its MBConv-like blocks on the fused operators, in place.

    What is fused is found by structure, not by name: 1x1, depthwise and dense convolutions with the batch norm,
    activation, squeeze-and-excitation and residual around them. Each block is compared with its original forward on
    random numbers before it is used. Modules, parameters, buffers and their names stay the same objects, so state
    dicts, optimizers and references into the model stay valid, and weights may change at any time.

    At run time every block looks at its modules again. With a hook inside, with a part replaced, or in training mode
    (unless that was asked for) it runs its original forward; so does, on a CPU, a block of 1x1 convolutions alone that
    is given an NCHW image: two changes of format cost more than it gains. The result of a block has the memory format
    of its input. On a GPU, in 16-bit types, MBConv blocks that follow each other are one operator. Models can be
    copied, pickled, moved, cast, compiled and exported as before. Optimising again starts afresh.

    Args:
        model: changed in place.
        mode: "inference", or "training": blocks of a depthwise and one or two 1x1 convolutions run fused in training
            mode too, forward and backward, and save a third of the memory (`effkernels.nn.training`). Everything else
            trains as written, and the report says why. In eval mode both are the same.
        backend: "auto", or one of `effkernels.ops.backends.BACKENDS` for every fused operator of this model.
        filter_fn: called as filter_fn(module, fqn), as torchao does, with each block or convolution and its full name;
            a false result leaves it out.
        strict: raise where anything that convolves stays as it is (what `filter_fn` leaves out aside).
        input_size: pixels of the image for which launches and bytes are counted: one number, (H, W) or (C, H, W); None:
            what the model says it was made for, else 224.

    Returns:
        What runs fused, what does not and why; `print` shows it as a table.

    Raises:
        ValueError: mode, backend or input_size unknown.
        NotFusedError: strict=True and something stays as it is; the model is then as it was before the call.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; allowed: {', '.join(map(repr, MODES))}")
    allowed = ("auto", *backends.BACKENDS)
    if backend not in allowed:
        raise ValueError(f"backend={backend!r} is not a backend; allowed: {', '.join(allowed)}")
    size = input_size_of(model, input_size, owner="optimize_", default=224)
    with as_it_was_on_failure(model):
        restore_(model)
        with undisturbed(model):
            return _optimize(model, mode, backend, filter_fn, strict, size)


def restore_(model: nn.Module) -> int:
    """Take `optimize_` back; returns how many blocks ran fused."""
    return sum(unswap(module) for module in model.modules() if is_swapped(module))


@contextlib.contextmanager
def as_it_was_on_failure(model: nn.Module) -> Iterator[None]:
    """Put back the classes of a model's modules and what `optimize_` gave them, should the block fail."""
    before = [
        (module, type(module), {name: value for name, value in module.__dict__.items() if name.startswith(OWN_PREFIX)})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, own in before:
            if type(module) is not cls:
                module.__class__ = cls
            for name in [name for name in module.__dict__ if name.startswith(OWN_PREFIX)]:
                del module.__dict__[name]
            module.__dict__.update(own)
        raise


def _optimize(
    model: nn.Module,
    mode: str,
    backend: str,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    strict: bool,
    input_size: tuple[int, int, int],
) -> Report:
    before, problem = try_forward(model, input_size)
    fitter = _Fitter(mode, backend, before)
    survey = Survey(model, filter_fn or (lambda module, fqn: True), fitter.accept)
    survey.run()
    if fitter.unverified:
        fitter.notes.append(
            f"{fitter.unverified} modules have no weights to compare with: each runs as written until its first call "
            "with weights has compared the fused form with it"
        )
    if survey.entries and all(entry.reason == FILTERED for entry in survey.entries):
        fitter.notes.append(
            f"filter_fn left out all {len(survey.entries)} blocks: nothing is fused. It is called as "
            "filter_fn(module, fqn), and a true result fuses the block"
        )
    if mode == "training":
        for entry in survey.entries:
            if entry.fused and entry.untrained:
                entry.fused, entry.reason = False, f"runs as written in training mode: {entry.untrained}"
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
        mode=mode,
    )
    if strict and any(block.reason not in ("", FILTERED) for block in report.blocks):
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

    def __init__(self, mode: str, backend: str, forward: Forward | None) -> None:
        self._trains = mode == "training"
        self._backend = backend
        self._forward = forward
        self.notes: list[str] = []
        self.unverified = 0  # modules whose programs are compared with the original at their first use

    def accept(self, unit: Unit) -> bool:
        """Swap a unit if its programs hold; else its lines of the report say why not."""
        programs: dict[str, Program] = {}
        unverified: dict[str, tuple[tuple[int, ...], ...]] = {}
        for method in unit.methods:
            name = method.trace.method
            try:
                programs[name], unknown = self._program(unit, method)
            except Unknown as reason:
                for entry in method.entries:
                    entry.fused, entry.reason = False, str(reason)
                if not method.entries:
                    self.notes.append(f"{unit.path}.{name}: {reason}".lstrip("."))
                continue
            if unknown:
                unverified[name] = tuple(self._shapes(unit, method))
            for node in method.match.linears:
                path = f"{unit.path}.{node.target}".lstrip(".")
                self.notes.append(f"{path}: batches of up to {MOST_ROWS} go through pointwise_bn_act on a CPU")
        if programs:
            swap(unit.module, programs, unverified, self._training(unit, programs))
        if unverified:
            self.unverified += 1
        return bool(programs)

    def _training(self, unit: Unit, programs: Mapping[str, Program]) -> dict[str, TrainingProgram]:
        """Return the programs of a block in training mode; where there is none, its line of the report says why."""
        found: dict[str, TrainingProgram] = {}
        if not self._trains or not unit.is_block:
            return found
        for method in unit.methods:
            name = method.trace.method
            (entry,) = method.entries
            if entry.kind not in KINDS or name not in programs:
                continue
            try:
                if self._backend == "reference":
                    raise Unknown("backend 'reference' is plain PyTorch")
                found[name] = checked_program(method, programs[name])
                entry.untrained = ""
            except Unknown as reason:
                entry.untrained = str(reason)
        return found

    def _program(self, unit: Unit, method: Method) -> tuple[Program, bool]:
        """Return the program of a method, and whether it is still to be compared with the method.

        Raises:
            Unknown: it cannot be used; the message says why.
        """
        try:
            for entry in method.entries:
                entry.backend = "+".join(dict.fromkeys(self._backends(unit.module, entry.ops)))
        except RuntimeError as refusal:
            raise Unknown(str(refusal)) from refusal
        program = write(method.trace, method.match, method.roles, self._backend, len(method.entries))
        if not method.entries and is_plain_container(unit.module) and not self._takes_stack(unit.module, program):
            return program, False  # it only hands tensors on
        shapes = self._shapes(unit, method)
        tries = [shapes]
        if isinstance(method.trace, GuessedTrace):
            tries += [[(1, shapes[0][1], *size)] for size in GUESS_SIZES]
        problems = [difference(unit.module, method.trace.method, program, each) for each in tries]
        problem = next((problem for problem in problems if problem), "")
        if problem:
            raise Unknown(problem)
        return program, None in problems

    def _backends(self, module: nn.Module, ops: Sequence[str]) -> Iterator[str]:
        """Return the backend of each operator, where the module is now."""
        x = _image_for(module)
        if x is not None:
            for op in ops:
                yield backends.choose(op, x, backend=self._backend)

    def _takes_stack(self, module: nn.Module, program: Program) -> bool:
        """Return whether a program runs blocks as one operator, where the module is now."""
        x = _image_for(module)
        return program.has_stacks and x is not None and backends.takes_block(x, self._backend)

    def _shapes(self, unit: Unit, method: Method) -> list[tuple[int, ...]]:
        """Return shapes of inputs to try a method on."""
        recorded = None if self._forward is None else self._forward.shapes.get(unit.path)
        takes_the_same = method.trace.method != "forward_head"
        channels = recorded[1] if recorded is not None and takes_the_same and len(recorded) == 4 else None
        small = SMALL_SIZES[0] if unit.path or not takes_the_same else SMALL_SIZES[1]
        shapes: list[tuple[int, ...]] = [(2, channels or _first_channels(method), *small)]
        return [*shapes, recorded] if recorded is not None and takes_the_same else shapes


def _image_for(module: nn.Module) -> Tensor | None:
    """Return an image of one number, of the dtype and on the device of a module; None where it has no parameters."""
    example = next((p for p in module.parameters() if p.is_floating_point()), None)
    return None if example is None else torch.empty((1, 1, 1, 1), dtype=example.dtype, device=example.device)


def _first_channels(method: Method) -> int:
    """Return the number of input channels, as the first convolution or linear layer has them."""
    for node in method.trace.graph.nodes:
        if node.op == "call_module":
            modules = method.trace.root.get_submodule(str(node.target)).modules()
            for module in modules:
                if isinstance(module, nn.Conv2d):
                    return module.in_channels
                if isinstance(module, nn.Linear):
                    return module.in_features
    return 3

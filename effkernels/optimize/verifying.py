"""Comparison of a program with the forward that it replaces, on random numbers, before it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effkernels.ops.parity import errors, limits
from effkernels.optimize.program import Program
from effkernels.optimize.swapped import is_swapped
from effkernels.optimize.twins import Twins, double

# Odd on purpose: what a padding or a stride gets wrong shows at the border of an odd image.
SMALL_SIZES = ((9, 11), (65, 67))
GUESS_SIZES = ((12, 10), (10, 13), (33, 34))
# Large numbers show what differs there alone, a clip at 20: an error of order one. It is enough to separate that from
# rounding, which a softmax on the way makes large, and a whole network as large as the numbers themselves. A power of
# two rounds nothing.
_LARGE = 64.0
# A small module gives few numbers, and the worst rounding of few is chance: of a stem on SMALL_SIZES[0], ours was more
# than twice PyTorch's for one random model in a hundred. What is off by less than this many times what is allowed is
# judged again, on this many inputs together.
_CHANCE = 8
_LARGE_DIFFERENCE = {torch.float16: 2**-2, torch.bfloat16: 2**-2}  # 2**-7 in other dtypes; of the norm of the result


def difference(module: nn.Module, method: str, program: Program, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Return why `program` may not replace a method of `module`; "" if it may, None if it is not known yet.

    The program's error against the original run in float64 may be at most twice that of the original run as it is
    (in the worse of the two memory formats), plus one rounding: what the tests of the operators ask for. A module
    without others that run fused is tried on large numbers, too. Everything is run on twins of the module. Weights that
    nobody has filled yet, those on the meta device or that give no finite number, say nothing.

    Args:
        module: as it is, with its programs or without.
        method: its name.
        program: to be judged.
        shapes: of inputs, (N, C, H, W); the first that the original takes is used.
    """
    example = next((p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()), None)
    if example is None:
        return ""
    if any(one.is_meta for one in (*module.parameters(), *module.buffers())):
        return None
    complaint = "there is no input to try it on"
    trial = _Trial(module, method, program)
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(shape, generator=generator, device="cpu")
        try:
            problem = trial.problem(noise.to(example))
            if trial.may_be_chance:
                draws = [torch.randn(shape, generator=generator, device="cpu").to(example) for _ in range(_CHANCE - 1)]
                problem = trial.problem(noise.to(example), *draws)
            if problem == "" and not any(is_swapped(one) for one in module.modules() if one is not module):
                return trial.problem_of_large((noise * _LARGE).to(example))
            return problem
        except _NotTaken as error:  # the size may not suit the module: the next one is tried
            complaint = f"its forward does not take a random input of shape {tuple(shape)}: {error}"
    return complaint


class _NotTaken(Exception):
    """The original does not take an input."""


class _Trial:
    """Twins of a module that run its method as it is, with the program, and in float64.

    Attributes:
        may_be_chance: the last problem was an error of the size of rounding.
    """

    def __init__(self, module: nn.Module, method: str, program: Program) -> None:
        self._program = program
        self._method = method
        self._plain = Twins(module, watched=True)
        self._fused = Twins(module, plain=False)
        self._exact = Twins(module, convert=double)
        self.may_be_chance = False
        modules = dict(self._plain.root.named_modules(remove_duplicate=False))
        records = program.guard.records
        self._stood_in_for = [modules[one.path] for one in records if one.attributes is not None]

    def problem(self, *draws: Tensor) -> str | None:
        """Return what is wrong with the program's results; "" if nothing is, None if the numbers say nothing.

        Args:
            draws: inputs of one shape; the results of all are judged together.
        """
        self.may_be_chance = False
        calls: list[
            tuple[list[Tensor], ...]
        ] = []  # of each: the program's results, PyTorch's in two layouts, float64's
        for x in draws:
            kept = x.clone()
            plain = [self._run_plain(one) for one in (x, x.contiguous(memory_format=torch.channels_last))]
            if not torch.equal(x, kept):
                return "its forward overwrites its input"
            written = self._plain.written(self._stood_in_for)
            if written:
                return f"its forward writes to the attribute {written}"
            ours = self._run_fused(x)
            if isinstance(ours, str):
                return ours
            if [t.shape for t in ours] != [t.shape for t in plain[0]]:
                return "its fused form gave results of other shapes"
            try:
                exact = self._run(self._exact, x.double())
            except Exception as error:  # scripted and quantised modules keep their dtype
                line = str(error).strip().rpartition("\n")[2]
                return f"its forward does not run in float64, with which a fused form is compared: {line}"
            calls.append((ours, *plain, exact))
        return self._judge(
            *([torch.stack(one) for one in zip(*column, strict=True)] for column in zip(*calls, strict=True))
        )

    def problem_of_large(self, x: Tensor) -> str:
        """Return what is wrong with the program's result for an input of large numbers; "" if nothing is."""
        plain, ours = self._run_plain(x), self._run_fused(x)
        if isinstance(ours, str):
            return ours
        for result, wanted in zip(ours, plain, strict=True):
            distance = errors(result, wanted).l2
            if torch.isfinite(wanted).all() and not distance <= _LARGE_DIFFERENCE.get(wanted.dtype, 2**-7):
                return f"its fused form is off by {distance:.2g} on large numbers"
        return ""

    def _judge(
        self, ours: list[Tensor], plain: list[Tensor], channels_last: list[Tensor], truth: list[Tensor]
    ) -> str | None:
        judged = None
        for result, first, second, exact in zip(ours, plain, channels_last, truth, strict=True):
            if not torch.isfinite(exact).all() or not torch.isfinite(first).all():
                continue  # weights that nobody has filled yet say nothing
            judged = ""
            found, limit = errors(result, exact), limits((first, second), exact)
            for distance, most in ((found.l2, limit.l2), (found.largest, limit.largest)):
                if not distance <= most:
                    self.may_be_chance = distance <= _CHANCE * most
                    return f"its fused form is off by {distance:.2g}, where {most:.2g} is allowed"
        return judged

    def _run_plain(self, x: Tensor) -> list[Tensor]:
        try:
            return self._run(self._plain, x)
        except Exception as error:
            raise _NotTaken(str(error).strip().partition("\n")[0]) from error

    def _run_fused(self, x: Tensor) -> list[Tensor] | str:
        try:
            found = self._program.run(self._fused.root, x)
            if found is None:  # some decline NCHW
                found = self._program.run(self._fused.root, x.contiguous(memory_format=torch.channels_last))
        except (RuntimeError, TypeError, ValueError) as error:
            return f"the fused operators refuse it: {error}"
        if found is None:
            return self._program.guard.complaint(self._fused.root) or "its parameters are no plain tensors"
        return list(_tensors(found))

    def _run(self, twins: Twins, x: Tensor) -> list[Tensor]:
        return list(_tensors(getattr(type(twins.root), self._method)(twins.root, x)))


def _tensors(result: Any) -> Iterator[Tensor]:
    """Return the floating tensors in a result."""
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, dict) else result)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and gradients, autocast, inference mode and the random state out of the way."""
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

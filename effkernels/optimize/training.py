"""Train other people's blocks fused: what of a block the fused training operator computes, and the program that does.

The matcher has found which modules a block is made of, on its forward in eval mode. In training mode two things may
be different: the statistics of the norms, which the operator takes from the batch, and stochastic depth, which a block
applies to its branch before it adds its input. Modules between the last norm and the sum are therefore called as they
are. A forward that drops by an argument (lukemelas' `drop_connect_rate`) is known by what it computes.

The chain is `effkernels.nn.training.Chain`; the modules come out of the guard of the program at every call, as in eval
mode, and a block of which anything else has changed runs its original forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from effkernels.nn.fusible import conv_arguments
from effkernels.nn.padding import same_padding
from effkernels.nn.training import Chain, chain_dtype, train_chain
from effkernels.ops import backends
from effkernels.optimize.guarding import Guard, Part, Record
from effkernels.optimize.matching import Gate, Match, Step
from effkernels.optimize.probing import Sides
from effkernels.optimize.program import Program
from effkernels.optimize.roles import Roles
from effkernels.optimize.survey import Method
from effkernels.optimize.swapped import BOUND
from effkernels.optimize.unknown import Unknown

KINDS = ("mbconv", "depthwise_separable")
"""The kinds of the report that can train fused."""


@dataclass(frozen=True)
class Recipe:
    """A block in names of its modules.

    Attributes:
        expand, norm1, depthwise, norm2, project, norm3: paths; the first two are None without an expansion.
        activation, activation2: after norm 1 and norm 2.
        reduce, excite: paths of the two products of squeeze-and-excitation, or None.
        se_activation, gate_activation: inside it and at its end.
        sides: zeros around the depthwise convolution's input; None: TensorFlow's SAME.
        residual: whether the input is added.
        drops: paths of modules that are called on the branch before the input is added.
        drop_argument: name of an argument of the forward, the probability of dropping a sample's branch; "": none.
        free_arguments: names of arguments that the forward does not read in training mode either.
    """

    expand: str | None
    norm1: str | None
    depthwise: str
    norm2: str
    project: str
    norm3: str
    activation: str
    activation2: str
    reduce: str | None
    excite: str | None
    se_activation: str
    gate_activation: str
    sides: Sides | None
    residual: bool
    drops: tuple[str, ...]
    drop_argument: str = ""
    free_arguments: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of all the modules that are needed, in the order in which `TrainingProgram` takes them."""
        chain = (self.expand, self.norm1, self.depthwise, self.norm2, self.project, self.norm3)
        return tuple(path for path in (*chain, self.reduce, self.excite, *self.drops) if path is not None)


class TrainingProgram:
    """The fused form of a block's forward in training mode.

    Attributes:
        recipe: what it is made of.
        plain: the program for eval mode, whose arguments it shares.
        guard: which has the modules, and declines where they are not what they were.
        recompute: as of `effkernels.nn.set_recompute`, which sets it.
    """

    def __init__(self, recipe: Recipe, plain: Program, guard: Guard, recompute: str | None = None) -> None:
        self.recipe = recipe
        self.plain = plain
        self.guard = guard
        self.recompute = recompute

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the result of a call; None where the original forward has to run."""
        x, rate = args[0] if len(args) == 1 and not kwargs else None, 0.0
        if x is None:
            recipe, plain = self.recipe, self.plain
            given = dict(zip((plain.argument, *plain.defaults), args, strict=False)) | kwargs
            x = given.pop(plain.argument, None)
            rate = given.pop(recipe.drop_argument, None) or 0.0
            if any(
                value is not plain.defaults.get(name, ...) and name not in recipe.free_arguments
                for name, value in given.items()
            ):
                return None
        if not isinstance(x, Tensor) or x.dim() != 4:
            return None
        parts = self.guard.take(module, BOUND + "training")
        return None if parts is None else self._compute(x, parts, rate)

    def _compute(self, x: Tensor, parts: tuple[Any, ...], rate: float) -> Tensor | None:
        chain, drops = _chain(self.recipe, parts)
        padding = _padding(self.recipe, chain.depthwise, x)
        dtype = chain_dtype(chain, x, padding)
        if dtype is None or backends.selected() == "reference":
            return None
        residual = self.recipe.residual
        active = [drop for drop in drops if drop.training and type(drop) is not nn.Identity]
        joins = residual and dtype == x.dtype and not active and not rate
        y = _like(train_chain(chain, x, padding, dtype, joins, None, self.recompute), x)
        for drop in active:
            y = drop(y)
        if rate and residual:
            y = _drop_samples(y, rate)
        return x + y if residual and not joins else y

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingProgram, (self.recipe, self.plain, self.guard, self.recompute)


def training_program(method: Method, plain: Program) -> TrainingProgram:
    """Return the program of a block in training mode, not compared with the original yet.

    Args:
        method: of the block.
        plain: its program for eval mode.

    Raises:
        Unknown: the block is not one that the training operator computes; the message says why.
    """
    recipe = _Reader(method.match, method.roles, method.trace.graph, method.trace.root).recipe()
    parts = tuple(Part(path, "module") for path in recipe.modules)
    return TrainingProgram(recipe, plain, Guard(tuple(map(_in_any_mode, plain.guard.records)), parts))


def with_arguments(program: TrainingProgram, drop: str, free: tuple[str, ...]) -> TrainingProgram:
    """Return the program where arguments of the forward have a meaning.

    Args:
        program: without.
        drop, free: `drop_argument` and `free_arguments` of `Recipe`.
    """
    recipe = dataclasses.replace(program.recipe, drop_argument=drop, free_arguments=free)
    return TrainingProgram(recipe, program.plain, program.guard)


def _in_any_mode(record: Record) -> Record:
    """Return a record that holds in training mode and in eval mode: norms may be frozen one by one."""
    if record.attributes is None:
        return record
    kept = tuple((name, value) for name, value in record.attributes if name != "training")
    return dataclasses.replace(record, attributes=kept, free=record.free | {"training"})


class _Reader:
    """Reads a recipe out of a match."""

    def __init__(self, match: Match, roles: Roles, graph: fx.Graph, root: nn.Module) -> None:
        self._match = match
        self._roles = roles
        self._graph = graph
        self._root = root

    def recipe(self) -> Recipe:
        expand, depthwise, project = self._steps()
        gate = depthwise.gate
        for step in self._match.steps:
            if step.norm is None:
                raise Unknown(f"{step.conv.path} has no norm after it")
            if step.conv.padding_mode != "zeros":
                raise Unknown(f"{step.conv.path} pads by {step.conv.padding_mode!r}")
        if project.activation != "identity":
            raise Unknown(f"{project.conv.path} is followed by {project.activation}")
        if depthwise.applies_gate or project.gate is not gate or any(one is not gate for one in self._match.gates):
            raise Unknown("its squeeze-and-excitation is not between the depthwise and the last convolution")
        (x,) = (node for node in self._graph.nodes if node.op == "placeholder")
        if (expand or depthwise).source is not x or project.source is not self._result_of(depthwise, gate):
            raise Unknown("its convolutions do not follow each other")
        if project.residual not in (None, x):
            raise Unknown("what is added to its result is not its input")
        norms = [None if step is None else step.norm for step in (expand, depthwise, project)]
        assert norms[1] is not None
        assert norms[2] is not None
        return Recipe(
            expand=None if expand is None else expand.conv.path,
            norm1=norms[0],
            depthwise=depthwise.conv.path,
            norm2=norms[1],
            project=project.conv.path,
            norm3=norms[2],
            activation="identity" if expand is None else expand.activation,
            activation2=depthwise.activation,
            reduce=None if gate is None else gate.reduce,
            excite=None if gate is None else gate.expand,
            se_activation="identity" if gate is None else gate.activation,
            gate_activation="sigmoid" if gate is None else gate.gate_activation,
            sides=depthwise.padding.sides,
            residual=project.residual is not None,
            drops=self._drops(project),
        )

    def _steps(self) -> tuple[Step | None, Step, Step]:
        steps = self._match.steps
        ops = [step.conv.op for step in steps]
        if self._match.left or ops[-2:] != ["depthwise_bn_act", "pointwise_bn_act"] or ops[:-2] not in (
            [],
            ["pointwise_bn_act"],
        ):  # fmt: skip
            raise Unknown("only an optional 1x1, a depthwise and a 1x1 convolution in a row train fused")
        if len(steps) == 3 and steps[1].source is not steps[0].result:
            raise Unknown("its convolutions do not follow each other")
        return (steps[0] if len(steps) == 3 else None), steps[-2], steps[-1]

    def _result_of(self, depthwise: Step, gate: Gate | None) -> fx.Node:
        return depthwise.result if gate is None else gate.source

    def _drops(self, project: Step) -> tuple[str, ...]:
        """Return the modules between the last norm and the sum; anything else that eval mode passes over is refused."""
        drops: list[str] = []
        inside = self._match.nodes
        after_norm = False
        for node in self._graph.nodes:
            if node.op == "call_module" and str(node.target) == project.norm:
                after_norm = True
            role = self._roles.of(node)
            if role.kind == "identity":
                module = self._root.get_submodule(str(node.target)) if node.op == "call_module" else None
                if type(module) is nn.Identity:
                    continue
                if module is None or not after_norm or project.residual is None or node not in inside:
                    raise Unknown(f"{_named(node)} may do something in training mode")
                drops.append(str(node.target))
            elif node not in inside and node.op not in ("placeholder", "output") and role.kind != "question":
                raise Unknown(f"{_named(node)} is not a part of what trains fused")
        return tuple(drops)


def _chain(recipe: Recipe, parts: tuple[Any, ...]) -> tuple[Chain, list[Any]]:
    """Return the chain of a block's modules, in the order of `Recipe.modules`, and what drops its branch."""
    taken: Iterator[Any] = iter(parts)
    expand, norm1 = (None, None) if recipe.expand is None else (next(taken), next(taken))
    depthwise, norm2, project, norm3 = (next(taken) for _ in range(4))
    excitation: dict[str, Any] = {}
    if recipe.reduce is not None:
        for name in ("reduce", "expand"):
            excitation[f"w_{name}"], excitation[f"b_{name}"] = conv_arguments(next(taken))
        excitation |= {"se_activation": recipe.se_activation, "gate_activation": recipe.gate_activation}
    chain = Chain(expand, norm1, depthwise, norm2, project, norm3, recipe.activation, recipe.activation2, excitation)
    return chain, list(taken)


def _padding(recipe: Recipe, depthwise: Any, x: Tensor) -> Sides:
    if recipe.sides is not None:
        return recipe.sides
    kernel, stride, dilation = depthwise.kernel_size, depthwise.stride[0], depthwise.dilation[0]
    return (
        *same_padding(x.shape[2], kernel[0], stride, dilation),
        *same_padding(x.shape[3], kernel[1], stride, dilation),
    )


def _like(y: Tensor, x: Tensor) -> Tensor:
    """Return y, channels_last, in the memory format of x."""
    return y if x.stride(1) == 1 else y.contiguous()


def _drop_samples(y: Tensor, rate: float) -> Tensor:
    """Return y with samples set to zero at a rate, the others enlarged, by the random numbers of lukemelas' block."""
    keep = 1.0 - rate
    kept = torch.rand([y.shape[0], 1, 1, 1], dtype=y.dtype, device=y.device).add_(keep).floor_()
    return y / keep * kept


def _named(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name

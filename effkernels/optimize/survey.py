"""Find the parts of a model that can run fused: blocks, and the modules around them.

A block is the smallest module whose forward holds a whole chain (an inverted bottleneck, or a single convolution with
its norm and activation); everything inside it becomes one program. A module around blocks gets a program where its own
forward has something to fuse (the stem and the head of many networks), or where it hands tensors from one block to the
next, so that the memory format changes at its ends and not between, and blocks that follow each other are one operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from effkernels.optimize.matching import Match, Step, match
from effkernels.optimize.roles import Roles
from effkernels.optimize.tracing import GuessedTrace, Trace, common_path, is_plain_container, owner_of
from effkernels.optimize.unknown import Unknown

FILTERED = "left out by filter_fn"
# In some libraries these do the work and are called on their own too; `forward` then calls them.
_METHODS = ("forward_features", "forward_head", "extract_features")
# Weights of a block's larger convolutions that stay PyTorch's on a CPU, relative to those of its 1x1 convolutions, from
# which the block stays as written: the guard and the changes of memory format cost what the 1x1 convolutions gain.
# 14 blocks of RepVGG-A0, of which each adds a 3x3 and a 1x1 convolution (9 to 1) of 192 channels at 8x8, float32, one
# thread of an AMD EPYC with AVX-512: 11.7 ms as written, 12.3 fused. In a bottleneck of ResNet it is about 1 to 1.
_MOST_LEFT = 4
_MOST_SPATIAL = 8  # convolutions larger than 1x1 in what may be a block; mixed convolutions have five


@dataclass
class Entry:
    """A line of the report in the making.

    Attributes:
        name, kind: as of `BlockReport`.
        ops: operators that it calls.
        paths: modules that it replaces, from the model.
        reason: why it is not fused, or what of it is not.
        fused: whether it is.
        backend: what runs its operators, where that is known.
        untrained: why it does not run fused in training mode; "" where it does.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    paths: frozenset[str]
    reason: str = ""
    fused: bool = True
    backend: str = ""
    untrained: str = "only blocks around a depthwise convolution train fused"


@dataclass
class Method:
    """One method of a unit: its trace and what of it matched."""

    trace: Trace
    roles: Roles
    match: Match
    entries: list[Entry]


@dataclass
class Unit:
    """A module that gets a program.

    Attributes:
        path: from the model.
        module: itself.
        methods: what is replaced.
        is_block: whether it is a block and not a module around blocks.
    """

    path: str
    module: nn.Module
    methods: list[Method]
    is_block: bool

    @property
    def entries(self) -> list[Entry]:
        """Return the lines of the report about it."""
        return [entry for method in self.methods for entry in method.entries]


@dataclass
class Survey:
    """Finds the units of a model, inner ones first.

    Attributes:
        model: the model; nothing in it is changed here.
        allows: whether a block or a convolution may be fused, by module and full name.
        accept: called with each unit as it is found; False where it cannot be used after all.
        entries: lines of the report, in any order.
        notes: what else there is to say.
    """

    model: nn.Module
    allows: Callable[[nn.Module, str], bool]
    accept: Callable[[Unit], bool]
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _units: set[int] = field(default_factory=set)  # modules that run a program
    _handing_on: set[int] = field(default_factory=set)  # containers among them that do nothing else
    _closed: set[int] = field(default_factory=set)  # modules that a trace around them must not look into
    _seen: set[int] = field(default_factory=set)
    _covered: set[str] = field(default_factory=set)  # convolutions that are in the report
    _reasons: dict[str, str] = field(default_factory=dict)  # why a convolution or a module stays as it is

    def run(self) -> None:
        """Visit the whole model."""
        self._visit("", self.model)
        self._report_left()

    # ----------------------------------------------------------------------------------------------------- walking

    def _visit(self, path: str, module: nn.Module) -> None:
        if id(module) in self._seen or not any(_is_convolution(one) for one in module.modules()):
            return
        self._seen.add(id(module))
        if type(module).__module__.startswith("effkernels."):
            self.notes.append(f"{path or type(module).__name__}: runs on effkernels' operators already")
            self._close(path, module)
            return
        if isinstance(module, torch.jit.ScriptModule):
            self._reasons[path] = "a scripted module has no Python forward"
            self._closed.add(id(module))
            return
        if self._take_block(path, module):
            return
        for name, child in module.named_children():
            self._visit(_join(path, name), child)
        self._take_surroundings(path, module)

    def _close(self, path: str, module: nn.Module) -> None:
        """No trace looks into a module, and its convolutions are accounted for."""
        self._closed.add(id(module))
        self._covered |= {_join(path, name) for name, one in module.named_modules() if _is_convolution(one)}

    def _take_block(self, path: str, module: nn.Module) -> bool:
        """Return whether a module is a block; if so, handle it."""
        convolutions = [one for one in module.modules() if _is_convolution(one)]
        spatial = [one for one in convolutions if getattr(one, "kernel_size", (1, 1)) != (1, 1)]
        if is_plain_container(module) or _is_convolution(module) or len(spatial) > _MOST_SPATIAL:
            return False
        method = self._examine(path, module, "forward", {}) or self._guess(module)
        if method is None or not _is_block(method):
            return False
        found = method.match
        steps = found.steps
        name = path or (steps[0].conv.path if len(steps) == 1 else type(module).__name__)
        entry = Entry(name, _kind(found), _ops(found), frozenset({path}))
        method.entries = [entry]
        self.entries.append(entry)
        self._close(path, module)
        left = [f"{conv} stays as it is: {reason}" for conv, reason in found.left.items()]
        if not self.allows(module, path):
            entry.fused, entry.reason = False, FILTERED
        elif found.hazard:
            entry.fused, entry.reason = False, found.hazard
        elif _is_outweighed(method):
            entry.fused = False
            entry.reason = "; ".join(["what could be fused is too little to gain anything", *left])
        elif self.accept(Unit(path, module, [method], is_block=True)):
            entry.reason = "; ".join(left)
            self._units.add(id(module))
        return True

    def _take_surroundings(self, path: str, module: nn.Module) -> None:
        """Give a module around blocks a program where that gains something."""
        if _is_convolution(module):
            return
        own = [name for name in _METHODS if callable(getattr(type(module), name, None))]
        methods = [found for name in own if (found := self._fusible_method(path, module, name)) is not None]
        if not methods:
            forward = self._fusible_method(path, module, "forward")
            methods = [] if forward is None else [forward]
        if any(id(one) in self._units or id(one) in self._closed for one in module.modules()):
            self._closed.add(id(module))
        if not methods:
            return
        unit = Unit(path, module, methods, is_block=False)
        self.entries += unit.entries
        self._covered |= {name for entry in unit.entries for name in entry.paths}
        hands_on = is_plain_container(module) and not unit.entries and not any(one.match.linears for one in methods)
        if self.accept(unit):
            self._units.add(id(module))
            if hands_on:
                self._handing_on.add(id(module))

    def _fusible_method(self, path: str, module: nn.Module, name: str) -> Method | None:
        """Return a method of a module around blocks, where a program of it gains something."""
        method = self._examine(path, module, name, {})
        if method is None:
            return None
        refused = {
            step.conv.path: FILTERED
            for step in method.match.steps
            if not self.allows(module.get_submodule(step.conv.path), _join(path, step.conv.path))
        }
        if refused:
            method = self._examine(path, module, name, refused)
            assert method is not None
        found = method.match
        for conv, reason in found.left.items():
            self._reasons.setdefault(_join(path, conv), reason)
        if found.hazard:
            for step in found.steps:
                self._reasons.setdefault(_join(path, step.conv.path), found.hazard)
            return None
        units = sum(method.roles.of(node).kind == "unit" for node in method.trace.graph.nodes)
        alone = [gate for gate in found.gates if not gate.with_depthwise and not _is_read(gate, found)]
        found.linears = [
            node
            for node in found.linears
            if self.allows(module.get_submodule(str(node.target)), _join(path, str(node.target)))
        ]
        gains = found.steps or alone or (found.linears and self._units)
        if not gains and units < (1 if is_plain_container(module) else 2):
            return None
        method.entries = [self._entry_of_step(path, step) for step in found.steps]
        method.entries += [
            Entry(
                _join(path, gate.reduce), "squeeze_excite", ("squeeze_excite_gate",),
                frozenset(_join(path, one) for one in (gate.reduce, gate.expand)),
            )
            for gate in alone
        ]  # fmt: skip
        return method

    def _entry_of_step(self, path: str, step: Step) -> Entry:
        modules = {_join(path, str(node.target)) for node in step.nodes if node.op == "call_module"}
        if step.gate is not None:
            modules |= {_join(path, str(node.target)) for node in step.gate.nodes if node.op == "call_module"}
        kind = "conv" if step.is_bare else "conv_norm_act"
        return Entry(_join(path, step.conv.path), kind, (step.op,), frozenset(modules))

    def _examine(self, path: str, module: nn.Module, name: str, refused: dict[str, str]) -> Method | None:
        """Trace and match a method; None if it cannot be traced, with the reason kept."""
        try:
            trace = Trace(module, name, self._is_leaf if is_plain_container(module) else self._is_closed)
        except Unknown as reason:
            self._reasons.setdefault(path, str(reason))
            return None
        roles = Roles(module, frozenset(self._units), refused)
        return Method(trace, roles, match(module, trace.graph, roles), [])

    def _is_closed(self, module: nn.Module) -> bool:
        """Return whether a trace must not enter a module."""
        return id(module) in self._units or id(module) in self._closed

    def _is_leaf(self, module: nn.Module) -> bool:
        """Return the same for a trace of a container. It enters containers that only pass tensors on: its program then
        goes from block to block, through all stages of a network. No other module's does: its own convolutions would
        not run fused where a stage has a hook.
        """
        return self._is_closed(module) and id(module) not in self._handing_on

    def _guess(self, module: nn.Module) -> Method | None:
        """Return a layer that cannot be traced, as it probably is; None if nothing can be said."""
        try:
            trace = GuessedTrace(module)
        except Unknown:
            return None
        roles = Roles(module, frozenset(), {}, trace.padded)
        return Method(trace, roles, match(module, trace.graph, roles), [])

    # ---------------------------------------------------------------------------------------------------- the rest

    def _report_left(self) -> None:
        """Return a line for every module with convolutions that stay as they are."""
        groups: dict[str, list[str]] = {}
        for path, module in self.model.named_modules():
            if _is_convolution(module) and path not in self._covered:
                groups.setdefault(self._owner(path), []).append(path)
        for owner, paths in groups.items():
            reasons = dict.fromkeys(self._reason(path) for path in paths)
            kind = "conv_norm_act" if len(paths) == 1 else "block"
            self.entries.append(Entry(owner, kind, (), frozenset(paths), "; ".join(reasons), fused=False))

    def _owner(self, path: str) -> str:
        """Return the nearest module around a convolution that is not a container; the convolution itself at the top."""
        owner = path.rpartition(".")[0]
        while owner and is_plain_container(self.model.get_submodule(owner)):
            owner = owner.rpartition(".")[0]
        return owner or path

    def _reason(self, path: str) -> str:
        while path and path not in self._reasons:
            path = path.rpartition(".")[0]
        return self._reasons.get(path, "it is not part of a chain that was found")


def _is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a two-dimensional convolution, quantised ones of PyTorch's included."""
    if isinstance(module, nn.Conv2d):
        return True
    return type(module).__module__.startswith("torch.ao.nn.") and "Conv" in type(module).__name__


def _is_block(method: Method) -> bool:
    """Return whether all that matched in a module belongs together, and to no smaller module."""
    found, root = method.match, method.trace.root
    if not found.steps and not found.gates:
        return False
    if sum(step.conv.is_spatial for step in found.steps) > 1:
        return False
    nodes = found.nodes
    smallest = common_path([owner_of(node) for node in nodes])
    if smallest == "":
        return True
    outside = [node for node in method.trace.graph.nodes if not _is_inside(node, smallest)]
    return is_plain_container(root.get_submodule(smallest)) and all(_is_idle(node, method) for node in outside)


def _is_outweighed(method: Method) -> bool:
    """Return whether 1x1 convolutions are all that would be fused, and a small part of the work."""
    found, root = method.match, method.trace.root
    if not found.steps or found.gates or any(step.op != "pointwise_bn_act" for step in found.steps):
        return False
    fused = [root.get_submodule(step.conv.path) for step in found.steps]
    left = [root.get_submodule(path) for path in found.left]
    weights = [
        sum(one.weight.numel() for one in some if isinstance(one, nn.Conv2d) and one.weight.is_cpu)
        for some in (fused, [one for one in left if getattr(one, "kernel_size", (1, 1)) != (1, 1)])
    ]
    return weights[1] >= _MOST_LEFT * weights[0] > 0


def _is_inside(node: fx.Node, path: str) -> bool:
    owner = owner_of(node)
    return owner == path or owner.startswith(path + ".")


def _is_idle(node: fx.Node, method: Method) -> bool:
    return node.op in ("placeholder", "output") or method.roles.of(node).kind == "identity"


def _is_read(gate: object, found: Match) -> bool:
    return any(step.gate is gate for step in found.steps)


def _ops(found: Match) -> tuple[str, ...]:
    alone = ["squeeze_excite_gate" for gate in found.gates if not gate.with_depthwise]
    return tuple(dict.fromkeys([*(step.op for step in found.steps), *alone]))


def _kind(found: Match) -> str:
    ops = [step.conv.op for step in found.steps]
    if not ops:
        return "squeeze_excite"
    if len(ops) == 1:
        return "conv" if found.steps[0].is_bare else "conv_norm_act"
    if "depthwise_bn_act" in ops:
        return "depthwise_separable" if ops[0] == "depthwise_bn_act" else "mbconv"
    return "fused_mbconv" if ops[0] == "conv_bn_act" and ops[1:] == ["pointwise_bn_act"] else "block"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name

"""Writes the source of a program from a match (see `effkernels.optimize.program`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.optimize.matching import Gate, Match, Step
from effkernels.optimize.program import Program
from effkernels.optimize.roles import Roles, is_format_free
from effkernels.optimize.tracing import Trace, owner_of
from effkernels.optimize.watching import Part, Watched

_INDENT = "    "
_SCALARS = (bool, int, float, str, type(None))
_CONV_SETTINGS = ("stride", "padding", "dilation", "groups")
_NORM_NAMES = ("norm_weight", "norm_bias", "norm_mean", "norm_var", "eps")
# What may change without changing a fused result, or is read at every call.
_UNREAD = frozenset({"training", "inplace", "eps", "momentum", "track_running_stats"})


def write(trace: Trace, match: Match, roles: Roles, backend: str, fused: int) -> Program:
    """The program of a match.

    Args:
        trace: whose graph was matched.
        match: the chains that run fused.
        roles: of the graph's nodes.
        backend: "auto", or the one to force.
        fused: how many blocks of the report this is.
    """
    writer = _Writer(trace, match, roles)
    source = writer.write()
    watched = tuple(Watched(path, settings) for path, settings in writer.watched.items())
    parts = tuple(writer.parts)
    return Program(source, writer.names, trace.argument, trace.defaults, trace.ignored, backend, fused, watched, parts)


class _Writer:
    def __init__(self, trace: Trace, match: Match, roles: Roles) -> None:
        self.names: dict[str, Any] = {}
        self.watched: dict[str, tuple[str, ...]] = {}  # names of settings by path of the module
        self.parts: dict[Part, str] = {}  # with the variable that holds it
        self._root = trace.root
        self._method = trace.method
        self._graph = trace.graph
        self._match = match
        self._roles = roles
        self._walked: dict[str, str] = {"": "self"}  # path of a module: variable that holds it in `look`
        self._look: list[str] = []
        self._lines: list[str] = []
        self._values: dict[fx.Node, str] = {}
        self._steps = {step.result: step for step in match.steps}
        self._inside = match.nodes
        self._gates_alone = {gate.result: gate for gate in match.gates if not gate.with_depthwise}
        self._products = {gate.product: gate for gate in match.gates}
        self._gate_names = {gate: f"gate{index}" for index, gate in enumerate(match.gates)}
        self._expansions = _expansions(match)

    def write(self) -> str:
        order = self._needed()
        self._is_bound = any(self._is_plain(node) and not self._is_free(node) for node in order)
        self._guard_all()
        last_uses = self._last_uses(order)
        for node in order:
            self._write_node(node)
            gone = [self._values[value] for value, reader in last_uses.items() if reader is node]
            gone += [name for name, reader in self._last_uses_of_gates(order).items() if reader is node]
            if gone and node.op != "output":
                self._lines.append(f"del {', '.join(gone)}")
        taken = [self._take(part) for part in self.parts]
        self._look.append(f"return {_tuple_of(taken)}")
        start = ["if not isinstance(x, Tensor) or x.dim() != 4:", _INDENT + "return None"]
        if self.parts:
            start.append(f"{_tuple_of(list(self.parts.values()))} = parts")
            missing = [f"{name} is None" for part, name in self.parts.items() if part.kind == "buffer"]
            if missing:  # statistics may be dropped at any time
                start += [f"if {' or '.join(missing)}:", _INDENT + "return None"]
        start.append("nchw = x.stride(1) != 1")
        return _function("look(self)", self._look) + _function("run(self, x, parts)", start + self._lines)

    # ------------------------------------------------------------------------------------------------ what is run

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """The values that the code of a node needs."""
        step = self._steps.get(node)
        if step is not None:
            return self._expansions.get(step, step).reads
        if node in self._gates_alone:
            return [self._gates_alone[node].source]
        if node in self._products:
            return [self._products[node].source]
        return list(node.all_input_nodes)

    def _gate_of(self, node: fx.Node) -> Gate | None:
        """The gate that the code of a node needs."""
        step = self._steps.get(node)
        if step is not None:
            return step.gate if step.conv.op == "pointwise_bn_act" else None
        return self._products.get(node)

    def _needed(self) -> list[fx.Node]:
        """The nodes that are run or stand for a step, in order; dead ones and the insides of steps left out."""
        (output,) = [node for node in self._graph.nodes if node.op == "output"]
        needed: set[fx.Node] = set()
        pending = [output, *(node for node in self._graph.nodes if self._has_effect(node))]
        makers = {step.gate: step.result for step in self._match.steps if step.op == "depthwise_bn_act_gate"}
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            needed.add(node)
            pending += self._reads(node)
            gate = self._gate_of(node)
            if gate is not None:
                pending.append(makers.get(gate) or gate.result)
        return [node for node in self._graph.nodes if node in needed or node.op == "placeholder"]

    def _has_effect(self, node: fx.Node) -> bool:
        """Whether a node whose value nobody reads has to run all the same."""
        if node in self._inside or node in self._products or node.op in ("placeholder", "output", "get_attr"):
            return False
        return not node.users and self._roles.of(node).kind not in ("question", "reshape", "identity")

    def _is_plain(self, node: fx.Node) -> bool:
        if node in self._steps or node in self._gates_alone or node in self._products:
            return False
        return node.op not in ("placeholder", "output", "get_attr") and self._roles.of(node).kind != "identity"

    def _is_free(self, node: fx.Node) -> bool:
        return is_format_free(self._root, node, self._roles.of(node))

    def _last_uses(self, order: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Behind which node a value is needed no more. The operators' inputs are large: none may outlive its reader."""
        last: dict[fx.Node, fx.Node] = {}
        for node in order:
            for value in self._reads(node):
                last[value] = node
        return last

    def _last_uses_of_gates(self, order: list[fx.Node]) -> dict[str, fx.Node]:
        last = {}
        for node in order:
            gate = self._gate_of(node)
            if gate is not None:
                last[self._gate_names[gate]] = node
        return last

    # ---------------------------------------------------------------------------------------------------- guards

    def _guard_all(self) -> None:
        """Decline where a module that the function goes past or stands in for is not what it was."""
        self._guard_scalars("", self._root, self._method)
        for node in self._graph.nodes:
            self._guard_parents(owner_of(node))
        for node in self._graph.nodes:
            if node.op == "call_module" and (node in self._inside or self._roles.of(node).kind == "identity"):
                path = str(node.target)
                for below, _ in self._root.get_submodule(path).named_modules(prefix=path):
                    self._guard(below)

    def _guard_parents(self, path: str) -> None:
        parts = path.split(".") if path else []
        for end in range(1, len(parts) + 1):
            self._guard(".".join(parts[:end]))

    def _guard(self, path: str) -> None:
        if path in self.watched:
            return
        module = self._root.get_submodule(path)
        settings: list[str] = []
        name = self._walk(path)
        conditions = [f"type({name}) is not {self._name(type(module))}", f"not is_untouched({name})"]
        if _may_read_training(module):
            conditions.append(f"{name}.training")
            settings.append("training")
        if isinstance(module, nn.Conv2d):
            values = ", ".join(repr(getattr(module, setting)) for setting in _CONV_SETTINGS)
            conditions.append(f"({', '.join(f'{name}.{setting}' for setting in _CONV_SETTINGS)}) != ({values})")
            # The rest follows: groups from the shape of the weights, and a single tap has no dilation.
            settings += ["stride", "padding"] if module.kernel_size == (1, 1) else ["stride", "padding", "dilation"]
        if isinstance(module, nn.Conv2d | nn.Linear | BatchNorm):
            conditions.append(f"not has_parameters({name})")
        self._decline_if(conditions)
        self._guard_scalars(path, module, "forward", settings)

    def _guard_scalars(self, path: str, module: nn.Module, method: str, settings: Sequence[str] = ()) -> None:
        """Settings that the forward reads, and on which its graph may therefore depend."""
        code = getattr(getattr(type(module), method, None), "__code__", None)
        read = [] if code is None else [name for name in code.co_names if name not in _UNREAD]
        found = {name: module.__dict__[name] for name in read if _is_setting(module.__dict__.get(name, ...))}
        if found:
            owner = self._walked[path]
            self._decline_if([f"{owner}.{name} != {value!r}" for name, value in found.items()])
        self.watched[path] = tuple(dict.fromkeys((*settings, *found)))

    def _decline_if(self, conditions: list[str]) -> None:
        self._look += [f"if {' or '.join(conditions)}:", _INDENT + "return None"]

    def _walk(self, path: str) -> str:
        """The variable of `look` that holds a module."""
        if path not in self._walked:
            parent, _, leaf = path.rpartition(".")
            owner = self._walk(parent)
            self._walked[path] = f"m{len(self._walked)}"
            self._look.append(f"{self._walked[path]} = {owner}._modules.get({leaf!r})")
        return self._walked[path]

    def _part(self, path: str, kind: str, name: str = "") -> str:
        """The variable of `run` that holds something of a module."""
        if not path and kind == "module":
            return "self"
        part = Part(path, kind, name)
        return self.parts.setdefault(part, f"{self._walk(path)}{'_' if name else ''}{name}")

    def _take(self, part: Part) -> str:
        """The expression of `look` for a part."""
        owner = self._walk(part.path)
        if part.kind == "parameter":
            return f"parameters_of({owner})[{part.name!r}]"
        if part.kind == "buffer":
            return f"{owner}._buffers[{part.name!r}]"
        return f"{owner}.{part.name}" if part.kind == "setting" else owner

    def _conv(self, path: str) -> list[str]:
        """Weight and bias of a convolution or a linear layer."""
        return [self._part(path, "parameter", name) for name in ("weight", "bias")]

    def _norm(self, path: str | None) -> list[str]:
        """Weight, bias, mean, variance and eps of a norm, as the operators take them."""
        if path is None:
            return ["None", "None", "None", "None", "0.0"]
        parts = [("parameter", "weight"), ("parameter", "bias"), ("buffer", "running_mean"), ("buffer", "running_var")]
        return [self._part(path, *part) for part in (*parts, ("setting", "eps"))]

    # ----------------------------------------------------------------------------------------------------- nodes

    def _write_node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._values[node] = "x"
            readers = sum(node in step.reads for step in self._match.steps)
            if readers > 1:  # once here instead of once in each of them
                self._lines.append("x = inward(x, nchw)")
            return
        if node.op == "output":
            self._lines.append(f"return {self._argument(node.args[0], restore=True)}")
            return
        value = self._values[node] = f"v{len(self._values)}"
        if node in self._steps:
            self._write_step(self._steps[node], value)
        elif node in self._gates_alone:
            gate = self._gates_alone[node]
            excite = ", ".join(self._excite(gate))
            names = f"activation={gate.activation!r}, gate={gate.gate!r}"
            line = f"squeeze_excite_gate(squeeze({self._values[gate.source]}), {excite}, {names})"
            self._lines.append(f"{self._gate_names[gate]} = {line}")
            self._values.pop(node)
        elif node in self._products:
            gate = self._products[node]
            scaled = f"{self._values[gate.source]} * {self._gate_names[gate]}[:, :, None, None]"
            self._lines.append(f"{value} = {scaled}")
        else:
            self._lines.append(f"{value} = {self._plain(node)}")

    def _write_step(self, step: Step, value: str) -> None:
        expansion = self._expansions.get(step)
        source = self._values[(expansion or step).source]
        if expansion is None:
            self._lines.append(self._call(step, source, value))
        else:
            self._write_expanded(expansion, step, source, value)
        if self._is_bound:
            self._lines.append(f"{value} = like({value}, {source}, nchw)")

    def _write_expanded(self, expansion: Step, step: Step, source: str, value: str) -> None:
        """A 1x1 and a depthwise convolution: one operator where that is faster, else two."""
        expand, conv = self._conv(expansion.conv.path), self._conv(step.conv.path)
        arguments = [source, expand[0], conv[0], f"expand_bias={expand[1]}", f"bias={conv[1]}"]
        for prefix, norm in (("expand_", self._norm(expansion.norm)), ("", self._norm(step.norm))):
            arguments += [f"{prefix}{name}={part}" for name, part in zip(_NORM_NAMES, norm, strict=True)]
        arguments += [f"expand_activation={expansion.activation!r}", f"activation={step.activation!r}"]
        arguments += [f"stride={step.conv.stride}", f"padding={self._padding(step, source)}"]
        arguments.append(f"dilation={step.conv.dilation}")
        together = [f"{value}, means = expand_depthwise_squeeze({', '.join(arguments)})"]
        if step.gate is not None:
            names = f"activation={step.gate.activation!r}, gate={step.gate.gate!r}"
            excite = f"squeeze_excite_gate(means, {', '.join(self._excite(step.gate))}, {names})"
            together.append(f"{self._gate_names[step.gate]} = {excite}")
        apart = [self._call(expansion, source, "e"), self._call(step, "e", value), "del e"]
        self._lines += [f"if keeps_expanded({source}):", *(_INDENT + line for line in together)]
        self._lines += ["else:", *(_INDENT + line for line in apart)]

    def _call(self, step: Step, source: str, value: str) -> str:
        """The line that calls the operator of a step."""
        arguments = [source, *self._conv(step.conv.path)]
        if step.norm is not None:
            arguments += self._norm(step.norm)
        if step.conv.op != "pointwise_bn_act":
            arguments += [f"stride={step.conv.stride}", f"padding={self._padding(step, source)}"]
        if step.conv.op == "depthwise_bn_act":
            arguments.append(f"dilation={step.conv.dilation}")
        if step.activation != "identity":
            arguments.append(f"activation={step.activation!r}")
        results = value
        if step.gate is not None and step.conv.op == "pointwise_bn_act":
            arguments.append(f"gate={self._gate_names[step.gate]}")
        elif step.gate is not None:
            names = ("w_reduce", "b_reduce", "w_expand", "b_expand")
            arguments += [f"{name}={part}" for name, part in zip(names, self._excite(step.gate), strict=True)]
            arguments += [f"se_activation={step.gate.activation!r}", f"gate={step.gate.gate!r}"]
            if not step.applies_gate:
                results = f"{value}, {self._gate_names[step.gate]}"
        if step.residual is not None:
            arguments.append(f"residual={self._values[step.residual]}")
        return f"{results} = {step.op}({', '.join(arguments)})"

    def _padding(self, step: Step, source: str) -> str:
        if step.padding.sides is not None:
            return repr(step.padding.sides)
        conv = step.conv
        return f"same({source}, {conv.kernel_size}, {conv.stride}, {conv.dilation})"

    def _excite(self, gate: Gate) -> list[str]:
        """Expressions for w_reduce, b_reduce, w_expand, b_expand."""
        return [*self._conv(gate.reduce), *self._conv(gate.expand)]

    def _plain(self, node: fx.Node) -> str:
        role = self._roles.of(node)
        if role.kind == "identity":
            return self._argument(node.args[0])
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            return f"{self._part(owner, 'module')}.{leaf}"
        restore = not self._is_free(node)
        args = [self._argument(argument, restore) for argument in node.args]
        if role.kind == "unit":
            args = [f"inward({argument}, nchw)" for argument in args]
        args += [f"{name}={self._argument(argument, restore)}" for name, argument in node.kwargs.items()]
        if node.op == "call_module":
            return f"{self._part(str(node.target), 'module')}({', '.join(args)})"
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:])})"
        return f"{self._name(node.target)}({', '.join(args)})"

    def _argument(self, value: Any, restore: bool = False) -> str:
        """An argument as source."""
        if isinstance(value, fx.Node):
            name = self._values[value]
            return f"outward({name}, nchw)" if restore else name
        if isinstance(value, tuple | list):
            inner = ", ".join(self._argument(one, restore) for one in value)
            if isinstance(value, list):
                return f"[{inner}]"
            if hasattr(value, "_fields"):
                return f"{self._name(type(value))}({inner})"
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._argument(one, restore)}" for key, one in value.items()) + "}"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._argument(part, restore) for part in parts)})"
        if isinstance(value, _SCALARS) and not (isinstance(value, float) and not math.isfinite(value)):
            return repr(value)
        return self._name(value)

    def _name(self, value: Any) -> str:
        """A name for an object that has no source of its own."""
        for name, known in self.names.items():
            if known is value:
                return name
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name


def _expansions(match: Match) -> dict[Step, Step]:
    """The 1x1 convolution in front of each depthwise one, where nothing else reads its result."""
    found = {}
    by_result = {step.result: step for step in match.steps}
    for step in match.steps:
        before = by_result.get(step.source)
        if before is None or step.conv.op != "depthwise_bn_act" or step.applies_gate:
            continue
        simple = before.conv.op == "pointwise_bn_act" and before.gate is None and before.residual is None
        if simple and set(before.result.users) <= step.nodes:
            found[step] = before
    return found


def _is_setting(value: Any) -> bool:
    """Whether a value can stand in the source: exactly a plain type, not a subclass with a constructor of its own."""
    return type(value) in _SCALARS or (type(value) is tuple and all(type(one) in _SCALARS for one in value))


def _may_read_training(module: nn.Module) -> bool:
    """Whether a forward may depend on the mode: known to be otherwise only of PyTorch's own modules."""
    forward = type(module).forward
    return not forward.__module__.startswith("torch.nn.modules.") or "training" in forward.__code__.co_names


def _function(signature: str, lines: list[str]) -> str:
    return f"def {signature}:\n" + "".join(f"{_INDENT}{line}\n" for line in lines)


def _tuple_of(names: list[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"

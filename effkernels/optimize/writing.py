"""Writes the source of a program from a match (see `effkernels.optimize.program`)."""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx, nn

from effkernels.optimize.guarding import Guard, Part, Record, ancestors, record, record_called, record_container
from effkernels.optimize.matching import Gate, Match, Step
from effkernels.optimize.program import Program
from effkernels.optimize.roles import Roles, is_format_free
from effkernels.optimize.stacking import block_program
from effkernels.optimize.swapped import PROGRAMS
from effkernels.optimize.tracing import Trace, is_plain_container, owner_of
from effkernels.optimize.unknown import Unknown

RUNS_NCHW_AS_WRITTEN = "if nchw and x.is_cpu:"
"""The line of a program that declines NCHW images on a CPU."""
_INDENT = "    "
_SCALARS = (bool, int, float, str, type(None))


def write(trace: Trace, match: Match, roles: Roles, backend: str, fused: int) -> Program:
    """Return the program of a match.

    Args:
        trace: whose graph was matched.
        match: the chains that run fused.
        roles: of the graph's nodes.
        backend: "auto", or the one to force.
        fused: how many blocks of the report this is.

    Raises:
        Unknown: the graph holds a name that is none.
    """
    writer = _Writer(trace, match, roles, backend)
    source = writer.write()
    guard = Guard(writer.records(), tuple(writer.parts))
    return Program(source, writer.names, trace.argument, trace.defaults, trace.ignored, fused, guard)


class _Writer:
    """Nothing of a model gets into the source but through `repr`, and names that are checked to be names."""

    def __init__(self, trace: Trace, match: Match, roles: Roles, backend: str) -> None:
        self.names: dict[str, Any] = {}
        self.parts: dict[Part, str] = {}  # with the variable that holds it
        self._trace = trace
        self._root = trace.root
        self._backend = backend
        self._graph = trace.graph
        self._match = match
        self._roles = roles
        self._lines: list[str] = []
        self._values: dict[fx.Node, str] = {}
        self._steps = {step.result: step for step in match.steps}
        self._inside = match.nodes
        self._gates_alone = {gate.result: gate for gate in match.gates if not gate.with_depthwise}
        self._products = {gate.product: gate for gate in match.gates}
        self._gate_names = {gate: f"gate{index}" for index, gate in enumerate(match.gates)}
        self._expansions = _expansions(match)
        self._blocks = self._mbconv_blocks()
        self._stacks = self._stacks_of_blocks()
        self._block_arguments: list[str] = []  # of the function `block`

    def write(self) -> str:
        order = self._needed()
        self._is_block = self._is_one_block(order)
        self._is_bound = any(self._is_plain(node) and not self._is_free(node) for node in order)
        last_uses = self._last_uses(order)
        for node in order:
            gone = [value for value, reader in last_uses.items() if reader is node]
            if node in self._stacks:
                self._write_stack(self._stacks[node], gone)
                continue
            self._write_node(node)
            gates = [name for name, reader in self._last_uses_of_gates(order).items() if reader is node]
            if node.op != "output":
                self._delete(gone, gates)
        start = ["if x.dim() != 4:", _INDENT + "return None"]
        unpacking = [f"{_tuple_of(list(self.parts.values()))} = parts"] if self.parts else []
        # Statistics may be dropped at any time.
        missing = [f"{name} is None" for part, name in self.parts.items() if part.kind == "buffer"]
        start += unpacking
        if missing:
            start += [f"if {' or '.join(missing)}:", _INDENT + "return None"]
        start.append("nchw = x.stride(1) != 1")
        if self._loses_in_nchw(order):
            start += [RUNS_NCHW_AS_WRITTEN, _INDENT + "return None"]
        run = _definition("run(self, x, parts)", [*start, *self._lines])
        if not self._block_arguments:
            return run
        declines = " or ".join([f"backend != {self._backend!r}", *missing])
        lines = [*unpacking, f"if {declines}:", _INDENT + "return None"]
        lines.append(f"return dict({', '.join(self._block_arguments)})")
        return f"{_definition('block(size, residual, parts, backend)', lines)}\n\n{run}"

    def _delete(self, values: Iterable[fx.Node], names: Iterable[str] = ()) -> None:
        gone = [*(self._values[value] for value in values), *names]
        if gone:
            self._lines.append(f"del {', '.join(gone)}")

    def _mbconv_blocks(self) -> dict[Step, Step]:
        """Return the depthwise convolution in front of each 1x1 one, where they are an MBConv block, with expansion or
        without."""
        found = {}
        by_result = {step.result: step for step in self._match.steps if _begins_block(step)}
        for step in self._match.steps:
            depthwise = by_result.get(step.source)
            if depthwise is None or step.conv.op != "pointwise_bn_act" or step.gate is not depthwise.gate:
                continue
            if depthwise.is_bare and step.is_bare:
                continue
            inside = step.nodes if step.gate is None else {*step.nodes, *step.gate.nodes}
            if step.activation == "identity" and self._readers(depthwise.result) <= inside:
                found[step] = depthwise
        return found

    def _is_one_block(self, order: list[fx.Node]) -> bool:
        """Return whether the program is an MBConv block and nothing else."""
        if len(self._blocks) != 1:
            return False
        ((step, depthwise),) = self._blocks.items()
        image, *others, output = order
        return (
            others == [step.result]
            and self._expansions.get(depthwise, depthwise).source is image
            and step.residual in (None, image)
            and output.args[0] is step.result
        )

    def _stacks_of_blocks(self) -> dict[fx.Node, list[fx.Node]]:
        """Return the calls of MBConv blocks that follow each other, by the last: nothing else reads what is between."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self._graph.nodes:
            if self._calls_block(node):
                source = node.args[0]
                before = found.pop(source, []) if list(source.users) == [node] else []
                found[node] = [*before, node]
        return {last: calls for last, calls in found.items() if len(calls) > 1}

    def _calls_block(self, node: fx.Node) -> bool:
        """Return whether a node calls a module that is an MBConv block as a whole, for all that it is given."""
        if node.op != "call_module" or self._roles.of(node).kind != "unit":
            return False
        module = self._root.get_submodule(str(node.target))
        program = block_program(module)
        if program is None or type(module).__call__ is not nn.Module.__call__ or len(node.all_input_nodes) != 1:
            return False
        (source,) = node.all_input_nodes
        return node.args == (source,) and program.input_of((source,), dict(node.kwargs)) is source

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes that read a value, through modules that do nothing too."""
        found: set[fx.Node] = set()
        for user in node.users:
            found |= self._readers(user) if self._roles.of(user).kind == "identity" else {user}
        return found

    def records(self) -> tuple[Record, ...]:
        """Return what the program expects of every module on the way, and how it uses each."""
        called: set[str] = set()
        stood_in_for: dict[str, None] = {}
        looked_into = dict.fromkeys(self._trace.looked_into)
        for node in self._graph.nodes:
            if node.op == "get_attr":
                looked_into[str(node.target).rpartition(".")[0]] = None
            looked_into[owner_of(node)] = None
            if node.op != "call_module":
                continue
            path = str(node.target)
            if node in self._inside or self._roles.of(node).kind == "identity":
                stood_in_for[path] = None
            else:
                called.add(path)
        found: dict[str, Record] = {}
        reached: set[str] = set()  # containers that nothing was found in yet
        for path in (*called, *looked_into, *stood_in_for):  # what is both counts as the stricter
            module = self._root.get_submodule(path)
            if path in called and path not in looked_into and path not in stood_in_for:
                found[path] = record_called(path, module)
                continue
            found[path] = record(path, module, path in stood_in_for)
            if path in stood_in_for:
                for below, one in module.named_modules(prefix=path):
                    found[below] = record(below, one, True)
                continue
            for container, one in _containers_below(path, module):
                if container not in found:
                    found[container] = record_container(container, one)
                    reached.add(container)
        for path in ancestors(path for path in found if path not in reached):
            if path not in found or path in reached:
                found[path] = record(path, self._root.get_submodule(path), False)
        order = {path: index for index, path in enumerate(ancestors(found))}
        return tuple(sorted(found.values(), key=lambda one: order[one.path]))

    # ------------------------------------------------------------------------------------------------ what is run

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that the code of a node needs."""
        if node in self._stacks:
            return list(self._stacks[node][0].all_input_nodes)
        step = self._steps.get(node)
        if step in self._blocks:
            depthwise = self._blocks[step]
            return [*self._expansions.get(depthwise, depthwise).reads, *step.reads[1:]]
        if step is not None:
            return self._expansions.get(step, step).reads
        if node in self._gates_alone:
            return [self._gates_alone[node].source]
        if node in self._products:
            return [self._products[node].source]
        return list(node.all_input_nodes)

    def _gate_of(self, node: fx.Node) -> Gate | None:
        """Return the gate that the code of a node needs."""
        step = self._steps.get(node)
        if step is not None:
            return step.gate if step.conv.op == "pointwise_bn_act" and step not in self._blocks else None
        return self._products.get(node)

    def _needed(self) -> list[fx.Node]:
        """Return the nodes that are run or represent a step, in order; dead ones and the insides of steps left out."""
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
        """Return whether a node whose value nobody reads has to run all the same."""
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
        """Return the node after which a value is unused. Operators' inputs are large: none may outlive its reader."""
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

    def _loses_in_nchw(self, order: list[fx.Node]) -> bool:
        """Return whether only 1x1 convolutions run fused, which do not pay for a change of the memory format.

        They gain a pass or two over their result, and the change at both ends is as many: 1x1 with norm and relu on an
        NCHW image, PyTorch's / fused with both conversions, in milliseconds (float32, one thread of an AMD EPYC with
        AVX-512): 32 -> 32 channels at 32x32 0.05 / 0.13, 64 -> 64 at 56x56 0.36 / 0.55, 576 -> 224 at 32x32 3.1 / 4.7,
        288 -> 288 at 16x16 0.47 / 0.53, 1024 -> 512 at 14x14 2.5 / 2.5; batch 8 of the second 4.0 / 7.1. A fused
        neighbour that hands them channels_last makes them as fast or faster: 0.05, 0.30, 2.8, 0.43, 2.2; 3.2.
        """
        if self._backend != "auto" or self._match.gates or self._match.linears:
            return False
        if any(step.op != "pointwise_bn_act" for step in self._match.steps):
            return False
        units = [node for node in order if self._roles.of(node).kind == "unit"]
        inside = [self._root.get_submodule(str(node.target)).__dict__.get(PROGRAMS, {}) for node in units]
        return all(RUNS_NCHW_AS_WRITTEN in one.source for programs in inside for one in programs.values())

    # ----------------------------------------------------------------------------------------------------- parts

    def _part(self, path: str, kind: str, name: str = "") -> str:
        """Return the variable of `run` that holds something of a module."""
        if not path and kind == "module":
            return "self"
        return self.parts.setdefault(Part(path, kind, name), f"p{len(self.parts)}")

    def _conv(self, path: str) -> list[str]:
        """Weight and bias of a convolution or a linear layer."""
        return [self._part(path, "parameter", name) for name in ("weight", "bias")]

    def _norm(self, path: str | None) -> str:
        """Write a norm as the operators take it."""
        if path is None:
            return "None"
        parts = [("buffer", "running_mean"), ("buffer", "running_var"), ("parameter", "weight"), ("parameter", "bias")]
        return f"Norm({', '.join(self._part(path, *part) for part in (*parts, ('attribute', 'eps')))})"

    # ----------------------------------------------------------------------------------------------------- nodes

    def _write_node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._values[node] = "x"
            readers = sum(node in step.reads for step in self._match.steps if not step.is_optional)
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
            self._lines.append(self._excite_alone(gate, f"squeeze({self._values[gate.source]})"))
            self._values.pop(node)
        elif node in self._products:
            gate = self._products[node]
            scaled = f"{self._values[gate.source]} * {self._gate_names[gate]}[:, :, None, None]"
            self._lines.append(f"{value} = {scaled}")
        else:
            self._lines.append(f"{value} = {self._plain(node)}")

    def _write_step(self, step: Step, value: str) -> None:
        block = self._blocks.get(step)
        expansion = self._expansions.get(block or step)
        source = self._values[(expansion or block or step).source]
        if block is not None:
            self._write_block(expansion, block, step, source, value)
        elif expansion is None and step.is_optional:
            self._lines += [f"if takes_bare({source}):", _INDENT + self._call(step, source, value)]
            self._lines += ["else:", f"{_INDENT}{value} = {self._part(step.conv.path, 'module')}({source})"]
        elif expansion is None:
            self._lines.append(self._call(step, source, value))
        else:
            self._lines += self._expanded(expansion, step, source, value)
        if self._is_bound:
            self._lines.append(f"{value} = like({value}, {source}, nchw)")

    def _write_block(self, expansion: Step | None, depthwise: Step, step: Step, source: str, value: str) -> None:
        """Write a whole block: one operator where that may be one launch, else its parts."""
        weights = ("expand_weight", "weight", "project_weight")
        parts = [["None"] * 2 if one is None else self._conv(one.conv.path) for one in (expansion, depthwise, step)]
        size = "size" if self._is_block else f"{source}.shape"
        arguments = [f"{name}={weight}" for name, (weight, _) in zip(weights, parts, strict=True)]
        arguments += [] if expansion is None else self._of_expansion(expansion)
        arguments += self._of_depthwise(depthwise, size)
        if depthwise.gate is not None:
            arguments += self._of_gate(depthwise.gate)
        arguments += [f"project_bias={parts[-1][1]}", f"project_norm={self._norm(step.norm)}"]
        if step.residual is not None:
            arguments.append(f"residual={'residual' if self._is_block else self._values[step.residual]}")
        if self._is_block:
            self._block_arguments = arguments
            arguments = [f"**block({source}.shape, {source}, parts, {self._backend!r})"]
        self._lines += [f"if takes_block({source}, {self._backend!r}):"]
        self._lines += [f"{_INDENT}{value} = mbconv({', '.join((source, *arguments, *self._forced()))})", "else:"]
        apart = [self._call(depthwise, source, "d")]
        if expansion is not None:
            apart = self._expanded(expansion, depthwise, source, "d")
        apart += [self._call(step, "d", value), "del d"]
        if depthwise.gate is not None:
            apart.append(f"del {self._gate_names[depthwise.gate]}")
        self._lines += [_INDENT + line for line in apart]

    def _write_stack(self, calls: list[fx.Node], gone: list[fx.Node]) -> None:
        """Write blocks that follow each other: one operator where a block would be one, else call after call.

        Args:
            calls: of the blocks.
            gone: what nothing reads after the first of them.
        """
        (source,) = calls[0].all_input_nodes
        value = self._values[calls[-1]] = f"v{len(self._values)}"
        blocks = [self._part(str(node.target), "module") for node in calls]
        options = [{name: self._argument(given) for name, given in node.kwargs.items()} for node in calls]
        self._lines.append(f"{value} = inward({self._values[source]}, nchw)")
        self._delete(gone)
        stack = [value, repr(self._backend), _tuple_of(blocks)]
        if any(options):
            named = (", ".join(f"{name!r}: {given}" for name, given in one.items()) for one in options)
            stack.append(_tuple_of([f"{{{one}}}" for one in named]))
        self._lines += [f"if takes_block({value}, {self._backend!r}):"]
        # The operator hands on channels_last, and a block the format that it is given.
        together = f"{value} = outward(in_stacks({', '.join(stack)}), {value}.stride(1) != 1)"
        self._lines += [_INDENT + together, "else:"]
        for position, (block, others) in enumerate(zip(blocks, options, strict=True)):
            given = value if position == 0 else f"inward({value}, nchw)"
            arguments = [given, *(f"{_checked(name)}={one}" for name, one in others.items())]
            self._lines.append(f"{_INDENT}{value} = {block}({', '.join(arguments)})")

    def _of_expansion(self, step: Step) -> list[str]:
        """Return what the operators that begin with an expansion take of it beside images and weights."""
        bias, norm = self._conv(step.conv.path)[1], self._norm(step.norm)
        return [f"expand_bias={bias}", f"expand_norm={norm}", f"expand_activation={step.activation!r}"]

    def _of_depthwise(self, step: Step, size: str) -> list[str]:
        """Return the same of a depthwise convolution."""
        bias, norm, padding = self._conv(step.conv.path)[1], self._norm(step.norm), self._padding(step, size)
        arguments = [f"bias={bias}", f"norm={norm}", f"activation={step.activation!r}"]
        return [*arguments, f"stride={step.conv.stride}", f"padding={padding}", f"dilation={step.conv.dilation}"]

    def _of_gate(self, gate: Gate) -> list[str]:
        """Return squeeze-and-excitation as arguments of the operators that compute it."""
        names = ("w_reduce", "b_reduce", "w_expand", "b_expand")
        arguments = [f"{name}={part}" for name, part in zip(names, self._excite(gate), strict=True)]
        return [*arguments, f"se_activation={gate.activation!r}", f"gate_activation={gate.gate_activation!r}"]

    def _expanded(self, expansion: Step, step: Step, source: str, value: str) -> list[str]:
        """Return the lines of a 1x1 and a depthwise convolution: one operator where that is faster, else two."""
        arguments = [source, self._conv(expansion.conv.path)[0], self._conv(step.conv.path)[0]]
        arguments += [*self._of_expansion(expansion), *self._of_depthwise(step, f"{source}.shape"), *self._forced()]
        together = [f"{value}, means = expand_depthwise_squeeze({', '.join(arguments)})"]
        if step.gate is not None:
            together.append(self._excite_alone(step.gate, "means"))
        apart = [self._call(expansion, source, "e"), self._call(step, "e", value), "del e"]
        lines = [f"if keeps_expanded({source}, {self._backend!r}):", *(_INDENT + line for line in together)]
        return [*lines, "else:", *(_INDENT + line for line in apart)]

    def _call(self, step: Step, source: str, value: str) -> str:
        """Return the line that calls the operator of a step."""
        sides = step.padding.sides
        mode = step.conv.padding_mode
        if mode != "zeros" and sides is not None and any(sides):
            top, bottom, left, right = sides
            source = f"pad({source}, {(left, right, top, bottom)}, {mode!r})"
        arguments = [source, *self._conv(step.conv.path)]
        if step.norm is not None:
            arguments.append(self._norm(step.norm))
        if step.conv.op != "pointwise_bn_act":
            arguments += [f"stride={step.conv.stride}", f"padding={self._padding(step, f'{source}.shape')}"]
        if step.conv.op == "depthwise_bn_act":
            arguments.append(f"dilation={step.conv.dilation}")
        if step.activation != "identity":
            arguments.append(f"activation={step.activation!r}")
        results = value
        if step.gate is not None and step.conv.op == "pointwise_bn_act":
            arguments.append(f"gate={self._gate_names[step.gate]}")
        elif step.gate is not None:
            arguments += self._of_gate(step.gate)
            if not step.applies_gate:
                results = f"{value}, {self._gate_names[step.gate]}"
        if step.residual is not None:
            arguments.append(f"residual={self._values[step.residual]}")
        return f"{results} = {step.op}({', '.join((*arguments, *self._forced()))})"

    def _forced(self) -> list[str]:
        """Return the argument that chooses the backend, where one is forced."""
        return [] if self._backend == "auto" else [f"backend={self._backend!r}"]

    def _excite_alone(self, gate: Gate, means: str) -> str:
        """Return the line that computes a gate of means."""
        arguments = [means, *self._excite(gate), f"activation={gate.activation!r}"]
        arguments.append(f"gate_activation={gate.gate_activation!r}")
        return f"{self._gate_names[gate]} = squeeze_excite_gate({', '.join((*arguments, *self._forced()))})"

    def _padding(self, step: Step, size: str) -> str:
        if step.conv.padding_mode != "zeros":
            return "(0, 0, 0, 0)"  # the source is padded already
        if step.padding.sides is not None:
            return repr(step.padding.sides)
        conv = step.conv
        return f"same({size}, {conv.kernel_size}, {conv.stride}, {conv.dilation})"

    def _excite(self, gate: Gate) -> list[str]:
        """Return expressions for w_reduce, b_reduce, w_expand, b_expand."""
        return [*self._conv(gate.reduce), *self._conv(gate.expand)]

    def _plain(self, node: fx.Node) -> str:
        role = self._roles.of(node)
        if role.kind == "identity":
            return self._argument(node.args[0])
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            return self._part(owner, _kind_of_attribute(self._root.get_submodule(owner), leaf), leaf)
        restore = not self._is_free(node)
        args = [self._argument(argument, restore) for argument in node.args]
        if role.kind == "unit":
            args = [f"inward({argument}, nchw)" for argument in args]
        args += [f"{_checked(name)}={self._argument(argument, restore)}" for name, argument in node.kwargs.items()]
        if node.op == "call_module":
            module = self._part(str(node.target), "module")
            if node in self._match.linears:
                return f"linear({module}, {args[0]}, {self._backend!r})"
            called = self._root.get_submodule(str(node.target))
            if len(args) == 1 and role.kind != "unit" and self._backend == "auto":
                if isinstance(called, nn.Conv2d):
                    return f"convolve({module}, {args[0]}, nchw)"
                if restore and any(_is_dense(one) for one in called.modules()):
                    return f"as_written({module}, {self._argument(node.args[0])}, nchw)"
            return f"{module}({', '.join(args)})"
        if node.op == "call_method":
            return f"{args[0]}.{_checked(str(node.target))}({', '.join(args[1:])})"
        return f"{self._name(node.target)}({', '.join(args)})"

    def _argument(self, value: Any, restore: bool = False) -> str:
        """Return an argument as source."""
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
            return (
                "{"
                + ", ".join(f"{self._argument(key)}: {self._argument(one, restore)}" for key, one in value.items())
                + "}"
            )
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._argument(part, restore) for part in parts)})"
        # Not of a subclass, whose repr may be anything.
        if type(value) in _SCALARS and not (isinstance(value, float) and not math.isfinite(value)):
            return repr(value)
        return self._name(value)

    def _name(self, value: Any) -> str:
        """Return a name for an object that has no source of its own."""
        for name, known in self.names.items():
            if known is value:
                return name
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name


def _expansions(match: Match) -> dict[Step, Step]:
    """Return the 1x1 convolution in front of each depthwise one, where nothing else reads its result."""
    found = {}
    by_result = {step.result: step for step in match.steps}
    for step in match.steps:
        before = by_result.get(step.source)
        if before is None or step.conv.op != "depthwise_bn_act" or step.applies_gate:
            continue
        simple = before.conv.op == "pointwise_bn_act" and before.gate is None and before.residual is None
        simple = simple and step.conv.padding_mode == "zeros" and not (before.is_bare and step.is_bare)
        if simple and set(before.result.users) <= step.nodes:
            found[step] = before
    return found


def _begins_block(step: Step) -> bool:
    return step.conv.op == "depthwise_bn_act" and not step.applies_gate and step.conv.padding_mode == "zeros"


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.kernel_size != (1, 1)


def _checked(name: str) -> str:
    """Return a name that may be used in the source."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise Unknown(f"{name!r} is no name of a method or an argument")
    return name


def _kind_of_attribute(module: nn.Module, name: str) -> str:
    if name in module._parameters:
        return "parameter"
    return "buffer" if name in module._buffers else "attribute"


def _containers_below(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the plain containers that a forward can reach without calling another module."""
    for name, child in module._modules.items():
        if child is not None and is_plain_container(child):
            below = f"{path}.{name}" if path else name
            yield below, child
            yield from _containers_below(below, child)


def _definition(signature: str, lines: Iterable[str]) -> str:
    return f"def {signature}:\n" + "".join(f"{_INDENT}{line}\n" for line in lines)


def _tuple_of(names: list[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"

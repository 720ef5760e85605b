"""Chains of a traced graph that a fused operator computes.

    [pad ->] convolution [-> norm] [-> activation] [-> + residual]
    mean -> 1x1 -> activation -> 1x1 -> gate -> product with what the mean was taken of

Where the second follows the depthwise convolution of the first, both are one operator, and where its product is read
by a single 1x1 convolution, that one multiplies as it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from effkernels.optimize.probing import Padding
from effkernels.optimize.roles import Convolution, Roles, mutates

# Weights of a linear layer from which few rows go through an operator: 1 MB in float32. What is smaller stays in the
# cache and costs a few microseconds either way.
_LEAST_WEIGHTS = 2**18


@dataclass(eq=False)
class Gate:
    """Squeeze-and-excitation as a graph has it.

    Attributes:
        source: what the mean is taken of.
        product: the node that multiplies.
        nodes: all but the product.
        reduce, expand: paths of the two products.
        activation, gate_activation: names.
        with_depthwise: whether the depthwise operator in front computes it.
    """

    source: fx.Node
    product: fx.Node
    nodes: frozenset[fx.Node]
    reduce: str
    expand: str
    activation: str
    gate_activation: str
    with_depthwise: bool = False

    @property
    def result(self) -> fx.Node:
        """The last node before the product, at whose place the gate is computed if it is fused alone."""
        return next(node for node in self.product.all_input_nodes if node in self.nodes)


@dataclass(eq=False)
class Step:
    """One call of a fused operator around a convolution.

    Attributes:
        conv: the convolution.
        padding: zeros around the input, those of a pad in front included.
        source: what it reads.
        result: the node whose value it computes, in whose place it runs.
        nodes: all nodes that it replaces.
        norm: path of the norm.
        activation: name.
        residual: what is added to the result.
        gate: which multiplies the input (1x1), or which is computed too (depthwise).
        applies_gate: the result is already multiplied by the gate.
        is_bare: nothing follows the convolution.
    """

    conv: Convolution
    padding: Padding
    source: fx.Node
    result: fx.Node
    nodes: set[fx.Node]
    norm: str | None = None
    activation: str = "identity"
    residual: fx.Node | None = None
    gate: Gate | None = None
    applies_gate: bool = False
    is_bare: bool = False

    @property
    def op(self) -> str:
        """The operator's name in `effkernels.ops`."""
        if self.conv.op == "depthwise_bn_act" and self.gate is not None:
            return "depthwise_bn_act_se" if self.applies_gate else "depthwise_bn_act_gate"
        return self.conv.op

    @property
    def is_optional(self) -> bool:
        """Return whether the module itself is called if that is faster: for NCHW, two conversions cost more than the
        operator gains.
        """
        return self.is_bare and len(self.nodes) == 1

    @property
    def reads(self) -> list[fx.Node]:
        """The values it needs, the gate aside."""
        return [self.source] if self.residual is None else [self.source, self.residual]


@dataclass
class Match:
    """The parts of a graph that run fused.

    Attributes:
        steps: around convolutions, in the order of the graph.
        gates: every squeeze-and-excitation, also those fused alone.
        left: path of every convolution that stays as it is, and why.
        linears: large linear layers on a CPU, of which few rows at a time go through an operator.
        hazard: why nothing of the graph may be moved; "" where it may.
    """

    steps: list[Step] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    linears: list[fx.Node] = field(default_factory=list)
    hazard: str = ""

    @property
    def nodes(self) -> set[fx.Node]:
        """Every node that a fused operator replaces."""
        of_gates = {node for gate in self.gates for node in gate.nodes}
        return of_gates.union(*(step.nodes for step in self.steps))


def match(root: nn.Module, graph: fx.Graph, roles: Roles) -> Match:
    """Find what of a graph can run fused; `graph` and `root` stay as they are."""
    return _Matcher(root, graph, roles).match()


class _Matcher:
    def __init__(self, root: nn.Module, graph: fx.Graph, roles: Roles) -> None:
        self._root = root
        self._graph = graph
        self._roles = roles
        self._found = Match()
        self._taken: set[fx.Node] = set()

    def match(self) -> Match:
        for node in self._graph.nodes:
            if self._roles.of(node).kind == "mul":
                gate = self._gate_at(node)
                if gate is not None and not gate.nodes & self._taken:
                    self._found.gates.append(gate)
                    self._taken |= gate.nodes
        for node in self._graph.nodes:
            role = self._roles.of(node)
            if node not in self._taken and node.op == "call_module":
                if role.kind == "conv":
                    self._take(node, role.value)
                elif role.kind == "opaque" and isinstance(self._root.get_submodule(str(node.target)), nn.Conv2d):
                    self._found.left[str(node.target)] = role.value
                elif role.kind == "linear":
                    weight = self._root.get_submodule(str(node.target))._parameters.get("weight")
                    if weight is not None and weight.is_cpu and weight.numel() >= _LEAST_WEIGHTS:
                        self._found.linears.append(node)
        self._found.hazard = self._hazard()
        return self._found

    def _take(self, node: fx.Node, conv: Convolution) -> None:
        step = self._step_at(node, conv)
        plain = step.norm is None and step.activation == "identity" and step.residual is None and step.gate is None
        if plain and not self._continues(step):
            step.is_bare = True
        if step.is_bare and (conv.op == "conv_bn_act" or conv.few_channels):
            reason = "there is nothing after it to fuse with"
            if conv.few_channels:
                reason += ", and PyTorch's is faster for that few channels"
            user = self._only_user(node)
            if user is not None and self._roles.of(user).kind == "opaque":
                reason = f"what follows it, {_named(user)}, cannot be fused: {self._roles.of(user).value}"
            self._found.left[conv.path] = reason
            return
        self._found.steps.append(step)
        self._taken |= step.nodes

    def _continues(self, step: Step) -> bool:
        """Return whether a 1x1 convolution with nothing after it reads what is fused: the end of a block, its norms
        folded.
        """
        return step.conv.op == "pointwise_bn_act" and any(step.source is other.result for other in self._found.steps)

    def _step_at(self, node: fx.Node, conv: Convolution) -> Step:
        source, before = self._without_identities(node.args[0])
        padding = conv.padding
        step = Step(conv, padding, source, node, {node, *before})
        pad = self._roles.of(source)
        if pad.kind == "pad" and self._only_user(source) is not None and conv.padding_mode == "zeros":
            wider = padding.around(pad.value)
            if wider is not None and conv.op != "pointwise_bn_act":
                step.padding = wider
                step.nodes.add(source)
                step.source, before = self._without_identities(source.args[0])
                step.nodes |= before
        self._add_gate_of_input(step)
        self._follow(step)
        self._add_gate_of_result(step)
        return step

    def _add_gate_of_input(self, step: Step) -> None:
        """Let a 1x1 convolution apply the gate of its input, if it alone reads the product."""
        if step.conv.op != "pointwise_bn_act":
            return
        for gate in self._found.gates:
            if step.source is gate.product and self._only_user(gate.product) is not None:
                step.gate = gate
                step.source = gate.source
                step.nodes.add(gate.product)

    def _follow(self, step: Step) -> None:
        """Include what follows the convolution, as long as nothing else reads the values between."""
        node = step.result
        passed: set[fx.Node] = set()
        stage = 0  # 1: after the norm, 2: after the activation
        while (user := self._only_user(node)) is not None and user not in self._taken:
            role = self._roles.of(user)
            if role.kind == "identity":
                passed.add(user)
                node = user
                continue
            if role.kind == "norm" and stage == 0:
                step.norm, stage = str(user.target), 1
                if role.value != "identity":
                    step.activation, stage = role.value, 2
            elif role.kind == "act" and stage < 2:
                step.activation, stage = role.value, 2
            elif role.kind == "add" and step.conv.op == "pointwise_bn_act" and step.residual is None:
                first, second = user.args
                if first is second or (self._mutates(user) and first is not node):
                    break
                other = second if first is node else first
                assert isinstance(other, fx.Node)
                step.residual, stage = other, 3
            else:
                break
            step.nodes |= {user, *passed}
            step.result = node = user
            passed = set()
        if stage < 2:
            self._take_written_out_activation(step)

    def _take_written_out_activation(self, step: Step) -> None:
        """Recognise `x * sigmoid(x)` and `x * hard_sigmoid(x)`, which some libraries write out: silu and hard_swish."""
        users = list(step.result.users)
        if len(users) != 2:
            return
        for sigmoid, product in (users, users[::-1]):
            role = self._roles.of(sigmoid)
            if role.kind == "gate" and self._roles.of(product).kind == "mul" and list(sigmoid.users) == [product]:
                if set(product.args) != {sigmoid, step.result}:
                    continue
                step.activation = {"sigmoid": "silu", "hard_sigmoid": "hard_swish"}[role.value]
                step.nodes |= {sigmoid, product}
                step.result = product

    def _add_gate_of_result(self, step: Step) -> None:
        """Let a depthwise convolution compute the gate of its result."""
        if step.conv.op != "depthwise_bn_act":
            return
        for gate in self._found.gates:
            if self._without_identities(gate.source)[0] is step.result and not gate.with_depthwise:
                gate.with_depthwise = True
                step.gate = gate
                reader = self._only_user(gate.product)
                role = None if reader is None else self._roles.of(self._past_identities(reader))
                is_read_by_pointwise = role is not None and role.kind == "conv" and role.value.op == "pointwise_bn_act"
                if not is_read_by_pointwise and set(step.result.users) <= {gate.product, *gate.nodes}:
                    step.applies_gate = True
                    step.nodes |= {gate.product, *gate.nodes}
                    step.result = gate.product
                return

    def _gate_at(self, product: fx.Node) -> Gate | None:
        for factor, source in (product.args, product.args[::-1]):
            assert isinstance(factor, fx.Node)
            assert isinstance(source, fx.Node)
            gate = self._gate_between(factor, source, product)
            if gate is not None:
                return gate
        return None

    def _gate_between(self, factor: fx.Node, source: fx.Node, product: fx.Node) -> Gate | None:
        """Return the squeeze-and-excitation that ends in `factor`, taken of `source`."""
        nodes: set[fx.Node] = set()
        taken: dict[str, fx.Node] = {}
        node: fx.Node | None = factor
        for wanted in ("gate", "expand", "activation", "reduce", "pool"):
            node = self._past_reshapes(node, nodes, product)
            if node is None:
                return None
            role = self._roles.of(node)
            if wanted == "activation" and (role.kind == "linear" or role.kind == "conv"):
                continue  # none between the two products
            if not _fits(wanted, role.kind) or (role.kind == "conv" and role.value.op != "pointwise_bn_act"):
                return None
            if not self._is_read_inside(node, nodes, product):
                return None
            nodes.add(node)
            taken[wanted] = node
            argument = node.args[0]
            node = argument if isinstance(argument, fx.Node) else None
        if node is None or self._without_identities(node)[0] is not self._without_identities(source)[0]:
            return None
        if self._mutates(product) and not (product.args[0] is source and self._is_read_inside(source, nodes, product)):
            return None  # the product is written over something that others read
        activation = self._roles.of(taken["activation"]).value if "activation" in taken else "identity"
        return Gate(
            source=self._without_identities(source)[0],
            product=product,
            nodes=frozenset(nodes),
            reduce=str(taken["reduce"].target),
            expand=str(taken["expand"].target),
            activation=activation,
            gate_activation=self._roles.of(taken["gate"]).value,
        )

    def _past_reshapes(self, node: fx.Node | None, nodes: set[fx.Node], product: fx.Node) -> fx.Node | None:
        """Step from a node towards the input over what only reshapes, and take it in."""
        while node is not None and self._roles.of(node).kind in ("reshape", "identity"):
            if not self._is_read_inside(node, nodes, product):
                return None
            nodes.add(node)
            argument = node.args[0]
            node = argument if isinstance(argument, fx.Node) else None
        return node

    def _is_read_inside(self, node: fx.Node, nodes: set[fx.Node], product: fx.Node) -> bool:
        readers = [user for user in node.users if self._roles.of(user).kind != "question"]
        return all(user is product or user in nodes for user in readers)

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].op != "output" else None

    def _without_identities(self, node: object) -> tuple[fx.Node, set[fx.Node]]:
        """Return the node before modules that do nothing in eval mode, and those of them that nothing else reads."""
        assert isinstance(node, fx.Node)
        passed: set[fx.Node] = set()
        while self._roles.of(node).kind == "identity":
            passed.add(node)
            node = node.args[0]
            assert isinstance(node, fx.Node)
        return node, passed

    def _past_identities(self, node: fx.Node) -> fx.Node:
        """Return the first reader that is not an identity; the last identity where several read it."""
        while self._roles.of(node).kind == "identity" and (user := self._only_user(node)) is not None:
            node = user
        return node

    def _mutates(self, node: fx.Node) -> bool:
        return mutates(self._root, node, self._roles.of(node))

    def _hazard(self) -> str:
        """Return a node that overwrites a value which others read, too: the order of calls must not change then."""
        nodes = self._found.nodes
        for node in self._graph.nodes:
            if node in nodes or not node.all_input_nodes or not self._mutates(node):
                continue
            target = node.args[0] if node.args else None
            while isinstance(target, fx.Node):
                if len(target.users) > 1:
                    return f"{_named(node)} overwrites a value that is read elsewhere too"
                aliases = self._roles.of(target).kind in ("identity", "reshape") and target.args
                target = target.args[0] if aliases else None
        return ""


def _fits(wanted: str, kind: str) -> bool:
    return {
        "gate": kind == "gate",
        "expand": kind in ("conv", "linear"),
        "activation": kind == "act",
        "reduce": kind in ("conv", "linear"),
        "pool": kind == "pool",
    }[wanted]


def _named(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name

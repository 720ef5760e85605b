"""A module's forward as a graph: torch.fx with leaves that suit the matching.

What the matcher reads the parameters of (convolutions and norms of any subclass, linear layers), what can be told
apart by a probe (modules without parameters) and what is fused already stay single nodes; every other module is looked
into.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.optimize.probing import Unknown

_PLAIN_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Values with which an optional argument is tried: where the graph stays the same, the forward does not read it in eval.
_TRIAL_VALUES: tuple[Any, ...] = (0.5,)
_GUESS_SIZE = (1, 1, 33, 34)
PADS: frozenset[Any] = frozenset({F.pad, torch._C._nn.pad})


def is_plain_container(module: nn.Module) -> bool:
    """Whether it is exactly one of PyTorch's containers, which have no meaning of their own."""
    return type(module) in _PLAIN_CONTAINERS


_FX_CONTAINERS = (immutable_list, immutable_dict)


class Trace:
    """The graph of one method of a module.

    Attributes:
        root: the module.
        method: name of the method.
        graph: with one placeholder; targets are paths from `root`.
        argument: name of the method's first argument, the placeholder.
        defaults: every other argument with the value that the graph holds for.
        ignored: those of them that the graph does not depend on.
    """

    def __init__(self, root: nn.Module, method: str, is_unit: Callable[[nn.Module], bool]) -> None:
        """Trace `root.method`.

        Raises:
            Unknown: it cannot be traced; the message says why.
        """
        function = getattr(type(root), method)
        self.root = root
        self.method = method
        self.argument, self.defaults = _arguments_of(function)
        self.graph = _trace(root, function, self.defaults, is_unit)
        self.ignored = frozenset(
            name for name, value in self.defaults.items() if self._is_ignored(function, name, value, is_unit)
        )

    def _is_ignored(self, function: Any, name: str, value: Any, is_unit: Callable[[nn.Module], bool]) -> bool:
        if value is not None and not isinstance(value, float):
            return False
        try:
            other = _trace(self.root, function, {**self.defaults, name: _TRIAL_VALUES[0]}, is_unit)
        except Unknown:
            return False
        return str(other) == str(self.graph)


class GuessedTrace(Trace):
    """What a layer that cannot be traced probably computes: its modules one after the other, padded SAME in front.

    Hugging Face's MobileNets pad by numbers that they compute from the size of the image, which stops a trace. With a
    size given the trace goes through, and shows that nothing else happens; whether the numbers are those of SAME for
    other sizes too is for the comparison with the original to say.
    """

    def __init__(self, root: nn.Module) -> None:
        """Guess `root.forward`.

        Raises:
            Unknown: its modules are not a convolution, a norm and what has no parameters.
        """
        function = type(root).forward
        self.root = root
        self.method = "forward"
        self.argument, self.defaults = _arguments_of(function)
        self.ignored = frozenset()
        sized = _trace(root, function, self.defaults, lambda module: False, size=_GUESS_SIZE)
        children = [str(node.target) for node in sized.nodes if node.op == "call_module"]
        convolutions = [name for name in children if isinstance(root.get_submodule(name), nn.Conv2d)]
        between = [node for node in sized.nodes if node.op in ("call_function", "call_method", "get_attr")]
        if children[:1] != convolutions or any(node.target not in PADS for node in between):
            raise Unknown("it is not a padded convolution with what follows it")
        self.graph = fx.Graph()
        node = self.graph.placeholder("x")
        for name in children:
            node = self.graph.call_module(name, (node,))
        self.graph.output(node)
        self.padded = frozenset(convolutions)


class _Tracer(fx.Tracer):
    def __init__(
        self, is_unit: Callable[[nn.Module], bool], constants: Mapping[str, Any], size: tuple[int, ...] | None
    ) -> None:
        super().__init__()
        self._is_unit = is_unit
        self._constants = constants
        self._size = size

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Stands for a node's value; the input's has a size where one is given."""
        if self._size is not None and node.op == "placeholder":
            return _SizedProxy(node, self, self._size)
        return super().proxy(node)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._is_unit(m) or isinstance(m, nn.Conv2d | BatchNorm):
            return True
        if is_plain_container(m):
            return False
        if m.__module__.startswith(("torch.nn.", "torch.ao.nn.", "effkernels.")):
            return not isinstance(m, nn.Sequential)
        return next(m.parameters(), None) is None and next(m.buffers(), None) is None

    def create_arg(self, a: Any) -> Any:
        """Hugging Face's results are dataclasses and dicts at once, which torch.fx would take for plain dicts."""
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            given = {field.name: getattr(a, field.name) for field in dataclasses.fields(a)}
            known = {name: self.create_arg(value) for name, value in given.items() if value is not None}
            return self.create_node("call_function", type(a), (), known)
        if isinstance(a, list | dict) and type(a) not in (list, dict, *_FX_CONTAINERS):
            raise TypeError(f"a {type(a).__name__} cannot be written down")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder; the other arguments are the constants."""
        constants = dict(self._constants)

        def call(root: nn.Module, x: fx.Proxy) -> Any:
            return root_fn(root, x, **constants)

        return call, [self.root, self.create_proxy("placeholder", "x", (), {})]


class _SizedProxy(fx.Proxy):
    def __init__(self, node: fx.Node, tracer: fx.Tracer, size: tuple[int, ...]) -> None:
        super().__init__(node, tracer)
        self.shape = torch.Size(size)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]


def _trace(
    root: nn.Module,
    function: Any,
    constants: Mapping[str, Any],
    is_unit: Callable[[nn.Module], bool],
    size: tuple[int, ...] | None = None,
) -> fx.Graph:
    tracer = _Tracer(is_unit, constants, size)
    tracer.traced_func_name = function.__name__
    try:
        graph: fx.Graph = tracer.trace(root)
    except Exception as error:  # whatever a forward does with a proxy that it cannot do
        line = str(error).strip().partition("\n")[0]
        raise Unknown(f"its forward cannot be traced ({type(error).__name__}: {line})") from error
    return graph


def _arguments_of(function: Any) -> tuple[str, dict[str, Any]]:
    """The name of the input, and the defaults of the other arguments."""
    _, *parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named:
        raise Unknown("its forward takes no argument")
    missing = [p.name for p in named[1:] if p.default is p.empty]
    if missing:
        raise Unknown(f"its forward takes more than one input ({', '.join([named[0].name, *missing])})")
    return named[0].name, {p.name: p.default for p in named[1:]}


def owner_of(node: fx.Node) -> str:
    """Path of the module in whose forward a node was recorded; "" for the root."""
    if node.op == "call_module":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def common_path(paths: list[str]) -> str:
    """The longest path that all paths start with, in whole names."""
    common = paths[0].split(".") if paths[0] else []
    for path in paths[1:]:
        parts = path.split(".") if path else []
        length = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
        common = common[: min(len(common), len(parts)) if length is None else length]
    return ".".join(common)


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a path from `root`; "" is `root`."""
    return root.get_submodule(path)

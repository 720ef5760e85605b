"""A module's forward as a graph of torch.fx, with leaves that suit the matching.

What the matcher reads the parameters of (convolutions and norms of any subclass, linear layers), what a probe can
distinguish (modules without parameters), what has a hook and what is fused already stay single nodes; every other
module is looked into. The forward runs on a twin, and a forward that writes to its modules has no graph.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Scope
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.nn.fusible import is_untouched
from effkernels.optimize.guarding import replaced_method
from effkernels.optimize.swapped import OWN_PREFIX, original_class
from effkernels.optimize.twins import Twins
from effkernels.optimize.unknown import Unknown

_PLAIN_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Values with which an optional argument is tried: where the graph stays the same, the forward does not read it in eval.
_TRIAL_VALUES: tuple[Any, ...] = (0.5,)
_GUESS_SIZE = (1, 1, 33, 34)
_TRACER = OWN_PREFIX + "tracer"  # attribute of the modules of a twin
_OWNER = "effkernels_owner"  # what a node's meta has the path of its module under
_GUESSED_LIBRARIES = ("transformers.",)
PADS: frozenset[Any] = frozenset({F.pad, torch._C._nn.pad})


def is_plain_container(module: nn.Module) -> bool:
    """Return whether it is exactly one of PyTorch's containers, which have no meaning of their own."""
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
        looked_into: paths of the modules whose forward is in the graph, "" first.
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
        self.graph, self.looked_into = _trace(root, function, self.defaults, is_unit)
        self.ignored = frozenset(
            name for name, value in self.defaults.items() if self._is_ignored(function, name, value, is_unit)
        )

    def _is_ignored(self, function: Any, name: str, value: Any, is_unit: Callable[[nn.Module], bool]) -> bool:
        if value is not None and not isinstance(value, float):
            return False
        try:
            other, _ = _trace(self.root, function, {**self.defaults, name: _TRIAL_VALUES[0]}, is_unit)
        except Unknown:
            return False
        return str(other) == str(self.graph)


class GuessedTrace(Trace):
    """The probable computation of a layer that cannot be traced: its modules one after the other, padded SAME in front.

    Hugging Face's MobileNets pad by numbers that they compute from the size of the image, which stops a trace. With a
    size given the trace goes through, and shows that nothing else happens. Whether the numbers are those of SAME for
    other sizes too is known of Hugging Face's layers alone, and tried; another library's might do something else from
    some size on.
    """

    def __init__(self, root: nn.Module) -> None:
        """Guess `root.forward`.

        Raises:
            Unknown: its modules are not a convolution, a norm and what has no parameters, or it is not Hugging Face's.
        """
        if not type(root).__module__.startswith(_GUESSED_LIBRARIES):
            raise Unknown("what it does with other sizes is not known")
        function = type(root).forward
        self.root = root
        self.method = "forward"
        self.argument, self.defaults = _arguments_of(function)
        self.ignored = frozenset()
        sized, self.looked_into = _trace(root, function, self.defaults, lambda module: False, size=_GUESS_SIZE)
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


class _Tracer(fx.proxy.TracerBase):
    """Records what a twin of a module does with a proxy.

    torch.fx's own Tracer replaces nn.Module.__call__ and __getattr__ for the whole process while it traces, which other
    threads see. Here the modules of the twin have classes of their own that report to the tracer.
    """

    def __init__(
        self,
        root: nn.Module,
        is_unit: Callable[[nn.Module], bool],
        size: tuple[int, ...] | None = None,
        into_activations: bool = False,
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.module_stack = collections.OrderedDict()
        self.scope = Scope("", None)
        self.node_name_to_scope: dict[str, Any] = {}
        self.looked_into: dict[str, None] = {}  # paths of the modules whose forward was run, in that order
        self._is_unit = is_unit
        self._size = size
        self._into_activations = into_activations  # look into modules without parameters, too
        recording: Callable[[Any], type[nn.Module]] = _recording
        self._twins = Twins(root, cls=recording, watched=True)
        twin = self._twins.root
        self._paths: dict[int, str] = {}
        self._tensors: dict[int, str] = {}
        self._attributes: dict[str, fx.Proxy] = {}
        self._owner = ""
        for path, module in twin.named_modules():
            if id(module) not in self._twins.originals:
                continue  # a scripted module is shared
            self._paths[id(module)] = path
            module.__dict__[_TRACER] = self
            for name, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
                if isinstance(value, Tensor):
                    self._tensors.setdefault(id(value), f"{path}.{name}" if path else name)

    def trace(self, function: Any, constants: Mapping[str, Any]) -> fx.Graph:
        """Return the graph of `function(root, x, **constants)`.

        Raises:
            Unknown: it cannot be traced, or it writes to its modules.
        """
        x = self.create_proxy("placeholder", "x", (), {})
        self.looked_into[""] = None
        try:
            result = function(self._twins.root, x, **constants)
            self.create_node("output", "output", (self.create_arg(result),), {})
        except Exception as error:  # whatever a forward does with a proxy that it cannot do
            line = str(error).strip().partition("\n")[0]
            raise Unknown(f"its forward cannot be traced ({type(error).__name__}: {line})") from error
        written = self._twins.written()
        if written:
            raise Unknown(f"its forward writes to the attribute {written}")
        return self.graph

    def call(self, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace a call of a module: one node, or what its forward does."""
        path = self._paths.get(id(twin))
        if path is None:
            raise Unknown("its forward calls a module that is not below it")
        module = self._twins.originals[id(twin)]
        if self._is_leaf(module):
            return self.create_proxy("call_module", path, args, kwargs)
        self.looked_into[path] = None
        outside, self._owner = self._owner, path
        try:
            return original_class(type(module)).forward(twin, *args, **kwargs)
        finally:
            self._owner = outside

    def attribute(self, twin: nn.Module, name: str, tensor: Tensor) -> fx.Proxy:
        """Return a parameter or a buffer that a forward reads."""
        path = self._tensors[id(tensor)]
        if path not in self._attributes:
            self._attributes[path] = self.create_proxy("get_attr", path, (), {})
        return self._attributes[path]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node as torch.fx does, and note the module in whose forward it is."""
        node = super().create_node(*args, **kwargs)
        node.meta[_OWNER] = self._owner
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Represent a node's value; the input's has a size where one is given."""
        if self._size is not None and node.op == "placeholder":
            return _SizedProxy(node, self, self._size)
        return super().proxy(node)

    def _is_leaf(self, module: nn.Module) -> bool:
        if self._is_unit(module) or isinstance(module, nn.Conv2d | BatchNorm | torch.jit.ScriptModule):
            return True
        if not is_untouched(module) or replaced_method(module) or type(module).__call__ is not nn.Module.__call__:
            return True
        if is_plain_container(module):
            return False
        if type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.", "effkernels.")):
            return not isinstance(module, nn.Sequential)
        return (
            not self._into_activations
            and next(module.parameters(), None) is None
            and next(module.buffers(), None) is None
        )

    def create_arg(self, a: Any) -> Any:
        """Hugging Face's results are dataclasses and dicts at once, which torch.fx would take for plain dicts."""
        if isinstance(a, Tensor):
            path = self._tensors.get(id(a))
            if path is None:
                raise TypeError("a tensor that it makes itself cannot be written down")
            return self.create_node("get_attr", path, (), {})
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            given = {field.name: getattr(a, field.name) for field in dataclasses.fields(a)}
            known = {name: self.create_arg(value) for name, value in given.items() if value is not None}
            return self.create_node("call_function", type(a), (), known)
        if isinstance(a, list | dict) and type(a) not in (list, dict, *_FX_CONTAINERS):
            raise TypeError(f"a {type(a).__name__} cannot be written down")
        return super().create_arg(a)


class _SizedProxy(fx.Proxy):
    def __init__(self, node: fx.Node, tracer: Any, size: tuple[int, ...]) -> None:
        super().__init__(node, tracer)
        self.shape = torch.Size(size)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]


@functools.cache
def _recording(cls: Any) -> type[nn.Module]:
    """Return a class derived from `cls` whose instances report to their tracer what is called and read."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_TRACER].call(self, args, kwargs)

    def attribute(self: nn.Module, name: str) -> Any:
        value = cls.__getattr__(self, name)
        return self.__dict__[_TRACER].attribute(self, name, value) if isinstance(value, Tensor) else value

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    made: type[nn.Module] = type(cls.__name__, (cls,), {**names, "__call__": call, "__getattr__": attribute})
    return made


def _trace(
    root: nn.Module,
    function: Any,
    constants: Mapping[str, Any],
    is_unit: Callable[[nn.Module], bool],
    size: tuple[int, ...] | None = None,
) -> tuple[fx.Graph, tuple[str, ...]]:
    """Return the graph, and the paths of the modules whose forward it holds."""
    tracer = _Tracer(root, is_unit, size)
    return tracer.trace(function, constants), tuple(tracer.looked_into)


def trace_activation(module: nn.Module) -> fx.Graph:
    """Return the graph of a module without parameters, in terms of PyTorch's own modules and functions.

    Raises:
        Unknown: it cannot be traced: it asks for values or sizes, calls an autograd function or writes to itself.
    """
    function = type(module).forward
    _, defaults = _arguments_of(function)
    return _Tracer(module, lambda one: False, into_activations=True).trace(function, defaults)


def _arguments_of(function: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of the input, and the defaults of the other arguments."""
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
    return str(node.meta.get(_OWNER, ""))


def common_path(paths: list[str]) -> str:
    """Return the longest path that all paths start with, in whole names."""
    common = paths[0].split(".") if paths[0] else []
    for path in paths[1:]:
        parts = path.split(".") if path else []
        length = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
        common = common[: min(len(common), len(parts)) if length is None else length]
    return ".".join(common)


def submodule(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path from `root`; "" is `root`."""
    return root.get_submodule(path)

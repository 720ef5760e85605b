"""Check that a module and those below it are still what a program was written for.

A fused program does not call the modules that it replaces, so whatever their plain forwards would read is compared
at every call. The guard is data, a `Record` for each module on the way:

- its class, and that the class has the forward that it had;
- every attribute in its `__dict__` (of PyTorch's own classes: what their forward names), lists, dicts and objects by
  their content; a new attribute only counts where the class has one of that name or its code speaks of it;
- its children: those on the way by identity, in a container all of them and their order;
- that nothing is attached to it: hooks, methods replaced on the instance; that it is in eval mode;
- of the parameters and buffers, that they are plain tensors. Their values are free: they are read at every call.

Modules that the program calls are only asked for their class. What is not compared: hooks registered for all modules at
once (observers use them; they see the outer module), attributes of classes but for the methods in `_METHODS`, and
PyTorch's functions themselves. A new kind of thing that a forward may read belongs into `Record`, `_Bound` and
`Guard.take_traced`, and into the table of changes in tests/test_optimize_guard.py.

`Guard.take` resolves the records to objects once (`_Bound`) and from then on compares those in a few loops that run in
C. For the twenty modules of a block of B0 that takes 6 microseconds, and 45 where the objects have left the processor's
cache (one core of an AMD EPYC): most of it is waiting for memory, so what is touched counts, not what is compared.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.nn.fusible import is_untouched, parameters_of
from effkernels.optimize.frozen import Same, freeze, mutable_parts
from effkernels.optimize.swapped import OWN_PREFIX, original_class

_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = ("forward", "_conv_forward")
_ITERATES = frozenset({"children", "modules", "named_children", "named_modules", "_modules", "__iter__"})
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLAIN_TYPES = frozenset({Tensor, nn.Parameter, nn.Buffer, type(None), float, int, bool})
# Read at every call, or without a meaning in eval mode.
_FREE_OF_NORMS = frozenset({"eps", "momentum"})
_FREE_OF_ACTIVATIONS = frozenset({"inplace"})


class Part(NamedTuple):
    """Something that a program takes out of its modules at every call.

    Attributes:
        path: of the module, from the root.
        kind: "parameter", "buffer", "attribute" (of its `__dict__`) or "module" (itself).
        name: of the parameter, buffer or attribute.
    """

    path: str
    kind: str
    name: str = ""


@dataclass(frozen=True)
class Record:
    """The state that a program expects of one module.

    Attributes:
        path: from the root of the program.
        cls: its class, before `optimize_`.
        attributes: frozen values by name; None if the program calls the module and it reads them itself.
        children: names of all its children in order, where its forward may depend on them; else None.
        has_parameters: whether `weight` and `bias` are looked for, be they None.
        free: attributes that may have any value.
    """

    path: str
    cls: type[nn.Module]
    attributes: tuple[tuple[str, Any], ...] | None
    children: tuple[str, ...] | None
    has_parameters: bool
    free: frozenset[str]


def record_called(path: str, module: nn.Module) -> Record:
    """Return the record of a module that a program calls."""
    return Record(path, original_class(type(module)), None, None, False, frozenset())


def record_container(path: str, module: nn.Module) -> Record:
    """Return the record of a container of which nothing was on the way yet."""
    return Record(path, original_class(type(module)), (), tuple(module._modules), False, frozenset())


def record(path: str, module: nn.Module, stood_in_for: bool) -> Record:
    """Return the record of a module whose forward a program replaces.

    Args:
        path: from the root of the program.
        module: as it is now; taken as right.
        stood_in_for: whether what it computes is known and its attributes are settings, not code's whims.
    """
    free: frozenset[str] = frozenset()
    if isinstance(module, BatchNorm):
        free = _FREE_OF_NORMS
    elif stood_in_for and not module._parameters and not module._buffers:
        free = _FREE_OF_ACTIVATIONS
    attributes = tuple((name, freeze(value)) for name, value in _attributes(module) if name not in free)
    children = tuple(module._modules) if _depends_on_children(module) else None
    has_parameters = isinstance(module, nn.Conv2d | nn.Linear | BatchNorm)
    return Record(path, original_class(type(module)), attributes, children, has_parameters, free)


def replaced_method(module: nn.Module) -> str:
    """Return the name of a method that was replaced on the instance; "" where none was."""
    for name, value in module.__dict__.items():
        if callable(value) and name not in _BOOKKEEPING and callable(getattr(type(module), name, None)):
            return name
    return ""


class Guard:
    """The records of a program, and what it takes out of its modules.

    Args:
        records: outer modules before inner ones; the first is the root's.
        parts: what `take` returns.
    """

    def __init__(self, records: tuple[Record, ...], parts: tuple[Part, ...]) -> None:
        self.records = records
        self.parts = parts
        classes = dict.fromkeys(record.cls for record in records)
        self.methods = tuple(
            (cls, name, getattr(cls, name)) for cls in classes for name in _METHODS if hasattr(cls, name)
        )

    def take(self, module: nn.Module, key: str) -> tuple[Any, ...] | None:
        """Return the parts as they are now; None if anything is not as it was recorded.

        Args:
            module: the root.
            key: attribute of the root under which the objects are kept that the records name.
        """
        if torch.compiler.is_dynamo_compiling():
            return self.take_traced(module)
        bound: _Bound | None = module.__dict__.get(key)
        if bound is not None:
            parts = bound.take(module)
            if parts is not None:
                return parts
        if not self._holds(module):
            return None
        module.__dict__[key] = None  # before the attributes are counted
        try:
            module.__dict__[key] = bound = _Bound(module, self)
        except KeyError:  # a part is gone
            return None
        return bound.take(module)

    def _holds(self, root: nn.Module) -> bool:
        """Return whether every module is as recorded."""
        if any(getattr(cls, name, None) is not function for cls, name, function in self.methods):
            return False
        found: dict[str, nn.Module] = {"": root}
        for record in self.records:
            module = _reach(found, record.path)
            if module is None or not _is_as(record, module):
                return False
        return True

    def complaint(self, twin: nn.Module) -> str:
        """Return what on a twin of the root is not as recorded; "" if nothing is.

        Twins have copies of all attributes, so these are objects of which only the identity could be compared: whoever
        changes one of them in place would not be noticed.
        """
        found: dict[str, nn.Module] = {"": twin}
        for record in self.records:
            module = _reach(found, record.path)
            if module is None:
                continue
            name = record.cls.__name__
            for attribute, value in record.attributes or ():
                if attribute in module.__dict__ and freeze(module.__dict__[attribute]) != value:
                    kind = type(module.__dict__[attribute]).__name__
                    return f"its attribute {attribute!r} of {name} (a {kind}) cannot be compared at every call"
            if record.has_parameters:
                for parameter in ("weight", "bias"):
                    if parameter not in parameters_of(module):
                        return f"{parameter!r} of {name} is no parameter of it"
        return ""

    def take_traced(self, root: nn.Module) -> tuple[Any, ...] | None:
        """Do `take` as torch.compile traces it: every comparison becomes a guard of the graph."""
        modules: dict[str, Any] = {"": root}
        for record in self.records:
            if record.path:
                parent, _, leaf = record.path.rpartition(".")
                module = modules[parent]._modules.get(leaf)
                if module is None or original_class(type(module)) is not record.cls:
                    return None
                modules[record.path] = module
            if not _is_as_traced(record, modules[record.path]):
                return None
        parts = []
        for part in self.parts:
            module = modules[part.path]
            if part.kind == "parameter":
                parts.append(parameters_of(module)[part.name])
            elif part.kind == "buffer":
                parts.append(module._buffers[part.name])
            else:
                parts.append(module if part.kind == "module" else getattr(module, part.name))
        return tuple(parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        # What is compared by identity must be that of the copied modules.
        records = tuple(
            Record(one.path, one.cls, copy.deepcopy(one.attributes, memo), one.children, one.has_parameters, one.free)
            for one in self.records
        )
        return Guard(records, self.parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Guard, (self.records, self.parts)


class _Bound:
    """The objects that the records of a guard name, as they were when all of them held.

    It belongs to one module: copied or pickled with it, it is nothing.
    """

    __slots__ = (
        *("_root", "_classes", "_method_names", "_methods", "_modules", "_types", "_dicts", "_sizes"),
        *("_getters", "_gotten", "_values", "_hooks", "_contents", "_copies", "_children", "_named"),
        *("_holders", "_leaves", "_linked", "_part_in", "_part_at", "_part_types"),
    )

    def __init__(self, root: nn.Module, guard: Guard) -> None:
        found: dict[str, nn.Module] = {"": root}
        self._root = root
        self._classes = [cls for cls, _, _ in guard.methods]
        self._method_names = [name for _, name, _ in guard.methods]
        self._methods = [function for _, _, function in guard.methods]
        self._modules: list[nn.Module] = []
        self._dicts: list[dict[str, Any]] = []
        self._getters: list[Callable[[dict[str, Any]], Any]] = []
        self._gotten: list[dict[str, Any]] = []
        self._hooks: list[Any] = []
        self._contents: list[Any] = []
        self._children: list[dict[str, Any]] = []
        self._holders: list[dict[str, Any]] = []
        self._leaves: list[str] = []
        for record in guard.records:
            module = _reach(found, record.path)
            assert module is not None
            self._modules.append(module)
            if record.path:
                parent, _, leaf = record.path.rpartition(".")
                self._holders.append(found[parent]._modules)
                self._leaves.append(leaf)
            if record.children is not None:
                self._children.append(module._modules)
            if record.attributes is None:
                continue
            self._dicts.append(module.__dict__)
            names = [name for name, _ in record.attributes]
            names += [name for name in ("_modules", "_parameters", "_buffers") if module.__dict__[name]]
            if names:
                self._getters.append(operator.itemgetter(*names))
                self._gotten.append(module.__dict__)
            if record.path:
                self._hooks += [module.__dict__[name] for name in _HOOKS]
            self._contents += [part for name, _ in record.attributes for part in mutable_parts(module.__dict__[name])]
        self._types = list(map(type, self._modules))
        self._sizes = list(map(len, self._dicts))
        self._values = [get(attributes) for get, attributes in zip(self._getters, self._gotten, strict=True)]
        self._copies = [copy.copy(part) for part in self._contents]
        self._named = [list(children.items()) for children in self._children]
        self._linked = list(map(operator.getitem, self._holders, self._leaves))
        taken = [_place_of(found, part) for part in guard.parts]
        self._part_in = [holder for holder, _ in taken]
        self._part_at = [name for _, name in taken]
        modules = (holder[name] for holder, name in taken if isinstance(holder[name], nn.Module))
        self._part_types = _PLAIN_TYPES.union(map(type, modules))

    def take(self, root: nn.Module) -> tuple[Any, ...] | None:
        """Return the parts as they are now; None if anything may have changed."""
        if self._root is not root or any(self._hooks):
            return None
        try:
            if (
                list(map(type, self._modules)) != self._types
                or list(map(len, self._dicts)) != self._sizes
                or [get(attributes) for get, attributes in zip(self._getters, self._gotten)] != self._values  # noqa: B905
                or list(map(operator.getitem, self._holders, self._leaves)) != self._linked
                or [list(children.items()) for children in self._children] != self._named
                or self._contents != self._copies
                or list(map(getattr, self._classes, self._method_names)) != self._methods
            ):
                return None
            parts = tuple(map(operator.getitem, self._part_in, self._part_at))
        except Exception:  # a part is gone, or a comparison says neither yes nor no
            return None
        if not self._part_types.issuperset(map(type, parts)) and not all(map(is_plain_tensor, parts)):
            return None
        return parts

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def is_plain_tensor(value: Any) -> bool:
    """Return whether it is no tensor, or one that the operators can read: not a subclass with another meaning."""
    if not isinstance(value, Tensor) or type(value) in _PLAIN_TYPES or isinstance(value, FakeTensor | FunctionalTensor):
        return True
    return type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ and not nn.parameter.is_lazy(value)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a forward may read of its module's `__dict__`: for PyTorch's classes, what forward's code names."""
    cls: Any = original_class(type(module))
    read = _names_read(cls) if cls.__module__.startswith("torch.nn.modules.") else None
    for name, value in module.__dict__.items():
        if name not in _BOOKKEEPING and not name.startswith(OWN_PREFIX) and (read is None or name in read):
            yield name, value


def _is_as(record: Record, module: nn.Module) -> bool:
    """Return whether a module is as recorded; the root's hooks are run by whoever calls it."""
    if original_class(type(module)) is not record.cls:
        return False
    if record.children is not None and tuple(module._modules) != record.children:
        return False
    if record.attributes is None:
        return True
    if record.path and not is_untouched(module):
        return False
    names = record.free.union(name for name, _ in record.attributes)
    if record.has_parameters and not module._parameters:  # a replica of nn.DataParallel has them as attributes
        names |= {"weight", "bias"}
    for name, value in record.attributes:
        if name not in module.__dict__ or freeze(module.__dict__[name]) != value:
            return False
    if any(_may_be_read(module, name) for name, _ in _attributes(module) if name not in names):
        return False
    if not record.has_parameters:
        return True
    parameters = parameters_of(module)
    return "weight" in parameters and "bias" in parameters


def _is_as_traced(record: Record, module: Any) -> bool:
    """Do `_is_as` in terms that torch.compile can trace and guard."""
    if record.children is not None and tuple(module._modules.keys()) != record.children:
        return False
    if record.attributes is None:
        return True
    if record.path and not is_untouched(module):
        return False
    for name in _METHODS:
        if record.path and name in module.__dict__:
            return False
    for name, value in record.attributes:
        if isinstance(value, Same):
            continue
        if not _equals(value, getattr(module, name)):
            return False
    if not record.has_parameters:
        return True
    parameters = parameters_of(module)
    return "weight" in parameters and "bias" in parameters


def _equals(frozen: tuple[type, Any], value: Any) -> bool:
    """Return whether a value equals a frozen one, for what torch.compile can compare: numbers, strings and tuples."""
    kind, content = frozen
    if kind is float:
        return repr(value) == content if content in ("nan", "inf", "-inf") else bool(value == float(content))
    if kind in (bool, int, str, type(None)):
        return bool(value == content)
    if kind is tuple or kind is list:
        if len(value) != len(content):
            return False
        for one, other in zip(value, content, strict=True):
            if not isinstance(other, Same) and not _equals(other, one):
                return False
    return True


def _may_be_read(module: nn.Module, name: str) -> bool:
    """Return whether a forward could notice an attribute that was added."""
    cls: Any = type(module)
    if hasattr(cls, name) or name in module._modules or name in module._parameters or name in module._buffers:
        return True
    return name in _names_in(cls)


def _depends_on_children(module: nn.Module) -> bool:
    cls: Any = original_class(type(module))
    return isinstance(module, _CONTAINERS) or not _ITERATES.isdisjoint(_names_in(cls))


@functools.cache
def _names_in(cls: Any) -> frozenset[str]:
    """Return names and strings in the code of a class, nn.Module's own aside."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base not in nn.Module.__mro__:
            for member in vars(base).values():
                found |= _names_of_code(getattr(getattr(member, "fget", member), "__code__", None))
    return frozenset(found)


@functools.cache
def _names_read(cls: Any) -> frozenset[str]:
    """Return names and strings in the code that the forward of a class reaches by methods of the class."""
    found: set[str] = {"forward"}
    pending = ["forward"]
    while pending:
        name = pending.pop()
        for base in cls.__mro__:
            if base not in nn.Module.__mro__ and name in vars(base):
                member = vars(base)[name]
                new = _names_of_code(getattr(getattr(member, "fget", member), "__code__", None)) - found
                found |= new
                pending += new
    return frozenset(found)


def _names_of_code(code: Any) -> set[str]:
    if code is None:
        return set()
    names = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= _names_of_code(constant)
    return names


def _reach(found: dict[str, nn.Module], path: str) -> nn.Module | None:
    """Return the module at a path; those on the way to it have been found before."""
    if path not in found:
        parent, _, leaf = path.rpartition(".")
        owner = _reach(found, parent)
        module = None if owner is None else owner._modules.get(leaf)
        if module is None:
            return None
        found[path] = module
    return found[path]


def _place_of(found: dict[str, nn.Module], part: Part) -> tuple[dict[str, Any], str]:
    """Return the dict and the name in it at which a part is found."""
    if part.kind == "module":
        parent, _, leaf = part.path.rpartition(".")
        owner = _reach(found, parent)
        assert owner is not None
        return owner._modules, leaf
    module = _reach(found, part.path)
    assert module is not None
    if part.kind == "parameter":
        return parameters_of(module), part.name
    return (module._buffers if part.kind == "buffer" else module.__dict__), part.name


def ancestors(paths: Iterable[str]) -> list[str]:
    """Return every path on the way to these, from the root on, outer ones first."""
    found: dict[str, None] = {"": None}
    for path in paths:
        parts = path.split(".") if path else []
        for end in range(1, len(parts) + 1):
            found[".".join(parts[:end])] = None
    return sorted(found, key=lambda path: path.count(".") + bool(path))

"""Whether the modules that a program rests on are still as they were seen, asked at every call and therefore cheap.

A block of a third-party network has some twenty modules, and looking each of them over in Python takes 7 microseconds
where all of it is in the processor's cache. In a network it is not: between two forwards its weights have gone through
the cache, and then the same look takes 36, half a millisecond over B0's blocks. So a program looks in full once
(`Program.look`) and from then on asks a `Watch`, which touches as little memory as it can and does it in the loops of
`map`: 4 microseconds, and 23. What it cannot compare by identity it takes as changed; then the full look decides again.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from effkernels.nn.fusible import parameters_of

_FORWARD = itertools.repeat("forward")


class Watched(NamedTuple):
    """What is looked at of one module: `path` from the root, and names in its `__dict__`."""

    path: str
    settings: tuple[str, ...]


class Part(NamedTuple):
    """Something that a program takes out of its modules at every call.

    Attributes:
        path: of the module, from the root.
        kind: "parameter", "buffer", "setting" (of its `__dict__`) or "module" (itself).
        name: of the parameter, buffer or setting.
    """

    path: str
    kind: str
    name: str = ""


class Watch:
    """The modules below `root` as a full look has just found them.

    Any hook registered anywhere counts as a change, by the number that PyTorch gives each of them: so the dictionaries
    of hooks, eighty in a block, need not be asked. Copied or pickled with its module a watch is empty: it holds for
    the one module that it was made for.

    Args:
        root: the module that runs the program.
        watched: what must stay as it is.
        parts: what `parts` returns.
        hooks: `hooks_registered()` before the full look.

    Raises:
        KeyError: something of it does not lie where it is expected; then there is nothing to watch.
    """

    __slots__ = (
        *("_owner", "_hooks", "_modules", "_types", "_dicts"),
        *("_holders", "_names", "_seen", "_part_in", "_part_at"),
    )

    def __init__(
        self,
        root: nn.Module | None = None,
        watched: tuple[Watched, ...] = (),
        parts: tuple[Part, ...] = (),
        hooks: int = -1,
    ) -> None:
        self._owner = root
        self._hooks = hooks
        if root is None:
            return
        self._modules = [root.get_submodule(one.path) for one in watched if one.path]
        self._types = [type(module) for module in self._modules]
        self._dicts = [module.__dict__ for module in self._modules]
        places = [place for one in watched for place in _places(root, one)]
        self._holders = [holder for holder, _ in places]
        self._names = [name for _, name in places]
        self._seen = [holder[name] for holder, name in places]
        taken = [_place_of(root, part) for part in parts]
        self._part_in = [holder for holder, _ in taken]
        self._part_at = [name for _, name in taken]

    def parts(self, module: nn.Module) -> tuple[Any, ...] | None:
        """The parts as they are now; None where anything else than their values may have changed."""
        if self._owner is not module or RemovableHandle.next_id != self._hooks:
            return None
        same = operator.is_
        try:
            if (
                all(map(same, map(type, self._modules), self._types))
                and not any(map(operator.contains, self._dicts, _FORWARD))
                and all(map(same, map(operator.getitem, self._holders, self._names), self._seen))
            ):
                return tuple(map(operator.getitem, self._part_in, self._part_at))
        except KeyError:  # a part is gone
            pass
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return Watch()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, ()


def hooks_registered() -> int:
    """A number that any registration of a hook changes."""
    number: int = RemovableHandle.next_id
    return number


def _places(root: nn.Module, one: Watched) -> Iterator[tuple[dict[str, Any], str]]:
    """The dictionaries and the names in them at which `one` is found."""
    if one.path:
        yield _place_of(root, Part(one.path, "module"))
    for name in one.settings:
        yield _place_of(root, Part(one.path, "setting", name))


def _place_of(root: nn.Module, part: Part) -> tuple[dict[str, Any], str]:
    if part.kind == "module":
        parent, _, leaf = part.path.rpartition(".")
        return root.get_submodule(parent)._modules, leaf
    module = root.get_submodule(part.path)
    if part.kind == "parameter":
        return parameters_of(module), part.name
    return (module._buffers if part.kind == "buffer" else module.__dict__), part.name

"""A swapped module's attributes, and the class that it had."""

from __future__ import annotations

from torch import nn

OWN_PREFIX = "_effkernels_"
"""The prefix of the attributes that `optimize_` adds to modules."""
PROGRAMS = OWN_PREFIX + "programs"
"""The attribute of a swapped module with its programs by method name."""
UNVERIFIED = OWN_PREFIX + "unverified"
"""The attribute with shapes to try a method on, by its name, where it has not been compared with the original yet."""
TRAINING = OWN_PREFIX + "training"
"""The attribute of a swapped module with its programs for training mode by method name."""
BOUND = OWN_PREFIX + "bound_"
"""With the name of a method: the attribute with the objects that its program's guard compares."""


def is_swapped(module: nn.Module) -> bool:
    """Return whether a module runs programs."""
    return PROGRAMS in module.__dict__


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a swapped module had; any other class, also one derived from a swapped one, as it is."""
    found: type[nn.Module] = cls.__dict__.get("_effkernels_original", cls)
    return found

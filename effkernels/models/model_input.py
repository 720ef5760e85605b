"""Read what a model states about its input: a model of timm, Hugging Face, EfficientNet-PyTorch or this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def pretrained_config(model: nn.Module) -> Mapping[str, Any]:
    """Return the configuration that timm and this package keep as `pretrained_cfg`, older timm as `default_cfg`."""
    for name in ("pretrained_cfg", "default_cfg"):
        found = getattr(model, name, None)
        if isinstance(found, Mapping) and found:
            return found
    return {}


def stated_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return the (channels, height, width) of the input that a model's configuration states, or None.

    A configuration states a square by one number (Hugging Face's `image_size`, EfficientNet-PyTorch's), or height and
    width. The channels are the configuration's if a convolution of the model takes as many, else those of the first
    one: timm's configuration is that of the weights, also for a network with another number of channels.
    """
    config = getattr(model, "config", None)
    for stated in (
        getattr(config, "input_size", None),
        pretrained_config(model).get("input_size"),
        getattr(config, "image_size", None),
        getattr(getattr(model, "_global_params", None), "image_size", None),
    ):
        sizes = _sizes(stated)
        if sizes is not None:
            channels, height, width = sizes
            return _channels(model, channels or getattr(config, "num_channels", None)), height, width
    return None


def input_size_of(
    model: nn.Module, given: int | Sequence[int] | None, *, owner: str, default: int | None = None
) -> tuple[int, int, int]:
    """Return the (channels, height, width) of a model's input.

    Args:
        given: the caller's choice: pixels of a square, (height, width) or (channels, height, width); None: what the
            model's configuration states.
        owner: the function that was called, for the message.
        default: pixels of a square for a model that states nothing.

    Raises:
        ValueError: ``given`` is none of the three forms; or it is None, the model states nothing, there is no default.
    """
    stated = stated_input_size(model)
    if given is None:
        if stated is not None:
            return stated
        if default is None:
            raise ValueError(
                f"{owner}: {type(model).__name__} does not say what input it takes; give input_size=PIXELS, "
                "(height, width) or (channels, height, width)"
            )
        given = default
    sizes = _sizes(given)
    if sizes is None:
        raise ValueError(
            f"{owner}: input_size={given!r}; allowed: PIXELS, (height, width), (channels, height, width), "
            "each at least 1"
        )
    channels, height, width = sizes
    return channels or (_channels(model, None) if stated is None else stated[0]), height, width


def _sizes(value: Any) -> tuple[int | None, int, int] | None:
    """Return (channels, height, width) from one of the three forms, None for channels that it does not name.

    For anything else return None.
    """
    sizes = (value, value) if type(value) is int else value
    if not isinstance(sizes, Sequence) or len(sizes) not in (2, 3):
        return None
    if not all(type(size) is int and size >= 1 for size in sizes):
        return None
    return sizes[0] if len(sizes) == 3 else None, sizes[-2], sizes[-1]


def _channels(model: nn.Module, stated: int | None) -> int:
    taken = [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not taken:
        return 3 if stated is None else stated
    return stated if stated in taken else taken[0]

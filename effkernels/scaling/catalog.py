"""Networks by what a user types: a baseline's name, a file, another library's model, or an object of their own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from effkernels.scaling.families import BASELINES
from effkernels.scaling.files import load_network
from effkernels.scaling.network import StagedNetwork
from effkernels.scaling.sources import BuiltNetwork, from_timm, from_torchvision
from effkernels.scaling.tables import variant

FORMS = (
    f"{', '.join(BASELINES)}; efficientnet_b1 to b7; timm:MODEL; torchvision:MODEL; FILE.json of a saved network; "
    "MODULE:ATTRIBUTE of your own Python, which is imported"
)


def find_network(text: str) -> StagedNetwork | BuiltNetwork:
    """Return the network that a text names.

    Args:
        text: a name in `BASELINES`, "timm:mobilenetv2_100", "torchvision:resnet50", the path of a JSON file that
            `effkernels.scaling.files` wrote, or "my_module:my_network" (a network, or a function without arguments
            that returns one; the current directory is searched too).

    Raises:
        ValueError: nothing of that name; the message says what is allowed.
    """
    if text in BASELINES:
        return BASELINES[text]
    if text.startswith("efficientnet_b"):
        return variant(text)
    if text.endswith(".json"):
        return load_network(Path(text))
    source, colon, name = text.partition(":")
    if colon and source == "timm":
        return from_timm(name)
    if colon and source == "torchvision":
        return from_torchvision(name)
    if colon and source and name:
        return _from_module(source, name)
    raise ValueError(f"network {text!r} is not known; allowed: {FORMS}")


def _from_module(module: str, attribute: str) -> StagedNetwork | BuiltNetwork:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"network {module}:{attribute}: {error}; searched: {folder} and sys.path") from error
    finally:
        sys.path.remove(folder)
    for word in attribute.split("."):
        if not hasattr(value, word):
            raise ValueError(f"network {module}:{attribute}: {module} has no {attribute}")
        value = getattr(value, word)
    if callable(value) and not isinstance(value, StagedNetwork | BuiltNetwork):
        value = value()
    if not isinstance(value, StagedNetwork | BuiltNetwork):
        raise ValueError(
            f"network {module}:{attribute} is a {type(value).__name__}; needed: a StagedNetwork, or what from_builder, "
            "from_timm or from_torchvision returns"
        )
    return value

"""A staged network as a JSON file, so that what a search found can be scaled, compared and trained elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effkernels.files import parse_json, printable, read_text, write_text
from effkernels.scaling.families import BUILDERS
from effkernels.scaling.network import MOST_LAYERS, Stage, StagedNetwork

FORMAT = "effkernels staged network 1"


def network_to_dict(network: StagedNetwork) -> dict[str, Any]:
    """Return a network in plain numbers and words, for JSON.

    Raises:
        ValueError: its builder is a function of its own, which a file cannot hold.
    """
    builder = next((word for word, function in BUILDERS.items() if function is network.builder), None)
    if builder is None:
        raise ValueError(f"{network.name}: its builder is not one of {', '.join(BUILDERS)}; a file cannot hold it")
    stages = [
        {
            "operator": stage.operator,
            "layers": stage.layers,
            "channels": stage.channels,
            "stride": stage.stride,
            "kernel_size": stage.kernel_size,
            "options": dict(stage.options),
            "deepens": stage.deepens,
            "widens": stage.widens,
        }
        for stage in network.stages
    ]
    return {
        "format": FORMAT,
        "name": network.name,
        "resolution": network.resolution,
        "builder": builder,
        "stages": stages,
    }


def network_from_dict(values: dict[str, Any]) -> StagedNetwork:
    """Return the network that `network_to_dict` wrote down.

    Raises:
        ValueError: another format, an unknown builder, a field that is missing or not known, a number that is no
            whole one or out of its range, or stages that cannot be built.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"not a saved network: format={found!r}; allowed: {FORMAT!r}")
    if values.get("builder") not in BUILDERS:
        raise ValueError(f"builder={values.get('builder')!r}; allowed: {', '.join(BUILDERS)}")
    try:
        _check_integer("resolution", values["resolution"], _LARGEST["resolution"])
        for stage in values["stages"]:
            for name in ("layers", "channels", "stride", "kernel_size"):
                _check_integer(f"stages: {name}", stage.get(name, 1), _LARGEST[name])
            for name in ("deepens", "widens"):
                if not isinstance(stage.get(name, True), bool):
                    raise ValueError(f"stages: {name}={stage[name]!r}; allowed: true, false")
            for name, value in dict(stage.get("options", {})).items():
                if not isinstance(value, str | bool) and not (
                    isinstance(value, int | float) and 0 <= value <= _LARGEST_OPTION
                ):
                    raise ValueError(
                        f"stages: options: {name}={str(value)[:80]}; allowed: 0 to {_LARGEST_OPTION}, words"
                    )
        stages = tuple(Stage(**stage) for stage in values["stages"])
        network = StagedNetwork(str(values["name"]), values["resolution"], stages, BUILDERS[values["builder"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a saved network lacks a field or has one that is not known: {error}") from error
    try:
        network.build(device="meta")  # allocates nothing
    except Exception as error:
        raise ValueError(f"a network of these stages cannot be built: {error}") from error
    return network


# Far beyond every network there is; what is larger would take all memory before anything could be said about it.
_LARGEST = {"resolution": 2**16, "layers": MOST_LAYERS, "channels": 2**16, "stride": 2**10, "kernel_size": 2**10}
_LARGEST_OPTION = 2**10


def _check_integer(name: str, value: object, largest: int) -> None:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name}={str(value)[:80]}; allowed: whole numbers from 1 to {largest}")


def save_network(network: StagedNetwork, path: str | Path) -> None:
    """Write a network as JSON; a file that was there stays as it was if that fails.

    Raises:
        ValueError: its builder is a function of its own.
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(network_to_dict(network), indent=1) + "\n")


def load_network(path: str | Path) -> StagedNetwork:
    """Read what `save_network` wrote.

    Raises:
        ValueError: no such file, no JSON, or no saved network; the message names the file.
    """
    try:
        return network_from_dict(parse_json(read_text(path)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(path)}: {getattr(error, 'strerror', None) or error}") from error

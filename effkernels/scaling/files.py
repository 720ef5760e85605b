"""A staged network as a JSON file, so that what a search found can be scaled, compared and trained elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effkernels.scaling.families import BUILDERS
from effkernels.scaling.network import Stage, StagedNetwork

FORMAT = "effkernels staged network 1"


def network_to_dict(network: StagedNetwork) -> dict[str, Any]:
    """A network in plain numbers and words, for JSON.

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
    """The network that `network_to_dict` wrote down.

    Raises:
        ValueError: another format, an unknown builder, or a field that is missing or not known.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"not a saved network: format={found!r}; allowed: {FORMAT!r}")
    if values.get("builder") not in BUILDERS:
        raise ValueError(f"builder={values.get('builder')!r}; allowed: {', '.join(BUILDERS)}")
    try:
        stages = tuple(Stage(**stage) for stage in values["stages"])
        return StagedNetwork(str(values["name"]), int(values["resolution"]), stages, BUILDERS[values["builder"]])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a saved network lacks a field or has one that is not known: {error}") from error


def save_network(network: StagedNetwork, path: str | Path) -> None:
    """Write a network as JSON; ValueError where its builder is a function of its own."""
    Path(path).write_text(json.dumps(network_to_dict(network), indent=1) + "\n")


def load_network(path: str | Path) -> StagedNetwork:
    """Read what `save_network` wrote.

    Raises:
        ValueError: no such file, no JSON, or no saved network; the message names the file.
    """
    try:
        return network_from_dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error

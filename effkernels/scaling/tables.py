"""The paper's tables with what is counted here beside what it prints, for its networks and for any other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from effkernels.models.compound import EFFICIENTNET, PUBLISHED, CompoundScaling
from effkernels.scaling import paper
from effkernels.scaling.counting import Cost
from effkernels.scaling.families import BASELINES, EFFICIENTNET_B0
from effkernels.scaling.network import Network, Rounding, Stage, StagedNetwork, StageRow, scale
from effkernels.scaling.table import Column, Table, Value

TOLERANCE = 0.05  # a count farther than this from the paper's is explained
_GFLOPS = Column("gflops", "GFLOPs", "#.3g")
_PARAMETERS = Column("parameters_m", "Mparams", ".2f")
_MEMORY = Column("activation_mb", "MB kept for backward", ".1f")
_FLOPS_NOTE = "GFLOPs: billions of multiply-adds of one image, counted, not computed by a formula."
_MEMORY_NOTE = "MB kept for backward: what training one image keeps in float32 (10^6 bytes)."


def variant(name: str) -> StagedNetwork:
    """EfficientNet-B0 scaled by the published coefficients (step 2): the registry's network of that name.

    Args:
        name: "b0" to "b7", or "efficientnet_b0" to "efficientnet_b7".

    Raises:
        ValueError: another name.
    """
    key = name.removeprefix("efficientnet_")
    if key not in PUBLISHED:
        raise ValueError(f"variant {name!r}; allowed: {', '.join(PUBLISHED)}")
    own = PUBLISHED[key]
    factor = own.resolution / EFFICIENTNET_B0.resolution
    return scale(
        EFFICIENTNET_B0, depth=own.depth, width=own.width, resolution=factor, name=f"EfficientNet-{key.upper()}"
    )


def operator_title(stage: Stage) -> str:
    """Return a stage's operator as papers print it: "MBConv6, k5x5"."""
    size = f"k{stage.kernel_size}x{stage.kernel_size}"
    if stage.operator == "inverted_residual":
        kind = "MBConv" if stage.options.get("se_ratio") else "inverted residual "
        return f"{kind}{stage.options['expansion']}, {size}"
    words = {"depthwise_separable": "depthwise + 1x1", "max_pool": "max pool"}
    return f"{words.get(stage.operator, stage.operator)}, {size}"


def stages(network: Network) -> Table:
    """Equation 1 as a table: operator, layers, channels and the size that enters, stage by stage (the paper's table 1).

    A class of the other library names the operator if the network is not made of our own stages.
    """
    rows: list[dict[str, Value]] = [
        {
            "stage": number,
            "operator": title,
            "height": row.height,
            "width": row.width,
            "channels": row.channels,
            "layers": row.layers,
        }
        for number, (title, row) in enumerate(_titled(network), 1)
    ]
    columns = (
        Column("stage", "stage i"),
        Column("operator", "operator F"),
        Column("height", "H"),
        Column("width", "W"),
        Column("channels", "channels C"),
        Column("layers", "layers L"),
    )
    notes = (f"{_sentence(network.cost())} H and W enter the stage; pooling and the classifier follow the last.",)
    return Table("stages", f"{network.name} at {network.resolution}: its stages", columns, tuple(rows), notes)


def _titled(network: Network) -> list[tuple[str, StageRow]]:
    """Return the rows of equation 1 with their operators as a table prints them."""
    rows = network.rows()
    if isinstance(network, StagedNetwork):
        return [(operator_title(stage), row) for stage, row in zip(network.stages, rows, strict=True)]
    return [(row.operator, row) for row in rows]


def scaled(baseline: Network, network: Network) -> Table | None:
    """Return the stages of a scaled network beside the baseline's.

    Returns:
        None if the two do not have the same stages, which only another library's can happen to: there, layers in a
        row that look alike count as a stage.
    """
    before, after = _titled(baseline), _titled(network)
    if [title for title, _ in before] != [title for title, _ in after]:
        return None
    rows: list[dict[str, Value]] = [
        {
            "stage": number,
            "operator": title,
            "height": old.height,
            "scaled_height": new.height,
            "channels": old.channels,
            "scaled_channels": new.channels,
            "layers": old.layers,
            "scaled_layers": new.layers,
        }
        for number, ((title, old), (_, new)) in enumerate(zip(before, after, strict=True), 1)
    ]
    columns = (
        Column("stage", "stage i"),
        Column("operator", "operator F"),
        Column("height", "H"),
        Column("scaled_height", "scaled"),
        Column("channels", "channels C"),
        Column("scaled_channels", "scaled"),
        Column("layers", "layers L"),
        Column("scaled_layers", "scaled"),
    )
    title = f"{network.name} at {network.resolution}, beside its baseline at {baseline.resolution}"
    return Table("scaled", title, columns, tuple(rows))


def _sentence(cost: Cost) -> str:
    return (
        f"{cost.multiply_adds / 1e9:.3g} billion multiply-adds, {cost.parameters / 1e6:.2f} million parameters, "
        f"{cost.activation_bytes / 1e6:.1f} MB kept for the backward of one image."
    )


def _costs(cost: Cost) -> dict[str, Value]:
    return {
        "gflops": cost.multiply_adds / 1e9,
        "parameters_m": cost.parameters / 1e6,
        "activation_mb": cost.activation_bytes / 1e6,
    }


def variants(names: Sequence[str] = tuple(PUBLISHED)) -> Table:
    """Return the paper's table 2: parameters and FLOPs of B0 to B7, counted, beside what it prints."""
    rows: list[dict[str, Value]] = []
    for name in names:
        network = variant(name)
        key = name.removeprefix("efficientnet_")
        cost, own = network.cost(), PUBLISHED[key]
        parameters, gflops = paper.VARIANTS[key]
        rows.append(
            {
                "variant": key.upper(),
                "width": own.width,
                "depth": own.depth,
                "resolution": own.resolution,
                **_costs(cost),
                "paper_parameters_m": parameters,
                "parameters_difference": cost.parameters / 1e6 / float(parameters) - 1,
                "paper_gflops": gflops,
                "gflops_difference": cost.multiply_adds / 1e9 / float(gflops) - 1,
            }
        )
    columns = (
        Column("variant", "variant"),
        Column("width", "width"),
        Column("depth", "depth"),
        Column("resolution", "pixels"),
        _PARAMETERS,
        Column("paper_parameters_m", "paper"),
        Column("parameters_difference", "difference", "+.1%"),
        _GFLOPS,
        Column("paper_gflops", "paper"),
        Column("gflops_difference", "difference", "+.1%"),
        _MEMORY,
    )
    title = "EfficientNet B0 to B7, counted, beside the paper's table 2"
    return Table("variants", title, columns, tuple(rows), (_FLOPS_NOTE, _MEMORY_NOTE))


def equation_3(scaling: CompoundScaling = EFFICIENTNET) -> Table:
    """Step 2 by the formula: depth, width and resolution at a whole phi, beside the published ones, rounded by hand.

    The last three columns solve equation 3 for phi: had the authors kept to it, the three would agree in every line.
    """
    rows: list[dict[str, Value]] = []
    for phi, (name, own) in enumerate(PUBLISHED.items()):
        factor = own.resolution / EFFICIENTNET_B0.resolution
        pixels = Rounding().pixels(EFFICIENTNET_B0.resolution * scaling.resolution(phi))
        rows.append(
            {
                "variant": name.upper(),
                "phi": phi,
                "depth": scaling.depth(phi),
                "published_depth": own.depth,
                "width": scaling.width(phi),
                "published_width": own.width,
                "resolution": pixels,
                "published_resolution": own.resolution,
                "phi_of_depth": _solve(own.depth, scaling.alpha),
                "phi_of_width": _solve(own.width, scaling.beta),
                "phi_of_resolution": _solve(factor, scaling.gamma),
            }
        )
    columns = (
        Column("variant", "variant"),
        Column("phi", "phi"),
        Column("depth", f"{scaling.alpha:g}^phi", ".2f"),
        Column("published_depth", "depth"),
        Column("width", f"{scaling.beta:g}^phi", ".2f"),
        Column("published_width", "width"),
        Column("resolution", f"224 x {scaling.gamma:g}^phi"),
        Column("published_resolution", "pixels"),
        Column("phi_of_depth", "phi of depth", ".2f"),
        Column("phi_of_width", "phi of width", ".2f"),
        Column("phi_of_resolution", "phi of pixels", ".2f"),
    )
    notes = (
        "Published factors are rounded by hand and follow no single phi: the last columns are the phi that each would "
        "need. `effkernels.models` has the published ones.",
    )
    title = "Equation 3 at whole phi beside the published coefficients"
    return Table("equation3", title, columns, tuple(rows), notes)


def _solve(factor: float, base: float) -> float | None:
    """Return the phi of factor = base ** phi; None if the base is 1."""
    return math.log(factor) / math.log(base) if base > 1 else None


def families(lines: Sequence[paper.ScaledFamily] = paper.FAMILIES) -> Table:
    """Return the paper's tables 3 and 7: counted FLOPs of other scaled baselines, beside those the paper prints."""
    rows: list[dict[str, Value]] = []
    for line in lines:
        network = _scaled(line)
        cost = network.cost()
        difference = cost.multiply_adds / 1e9 / float(line.gflops) - 1
        rows.append(
            {
                "network": BASELINES[line.network].name,
                "table": line.table,
                "way": line.way,
                "depth": line.depth,
                "width": line.width,
                "resolution": line.resolution,
                **_costs(cost),
                "paper_gflops": line.gflops,
                "difference": difference,
                "coefficients": line.coefficients,
                "note": _explanation(line, cost) if abs(difference) > TOLERANCE else "",
            }
        )
    columns = (
        Column("network", "network"),
        Column("table", "paper's table"),
        Column("way", "scaled"),
        Column("depth", "d", "g"),
        Column("width", "w", "g"),
        Column("resolution", "r", "g"),
        _GFLOPS,
        Column("paper_gflops", "paper"),
        Column("difference", "difference", "+.1%"),
        Column("coefficients", "factors"),
        _PARAMETERS,
        _MEMORY,
        Column("note", "why it differs"),
    )
    notes = (
        _FLOPS_NOTE,
        "factors: `paper` prints them; it does not print those called `ours`, which were chosen to meet its FLOPs.",
        _MEMORY_NOTE,
    )
    title = "Other baselines scaled, counted, beside the paper's tables 3 and 7"
    return Table("families", title, columns, tuple(rows), notes)


def _scaled(line: paper.ScaledFamily, rounding: Rounding | None = None) -> StagedNetwork:
    baseline = BASELINES[line.network]
    return scale(baseline, depth=line.depth, width=line.width, resolution=line.resolution, rounding=rounding)


def _explanation(line: paper.ScaledFamily, cost: Cost) -> str:
    """Return why a count is farther from the paper's than `TOLERANCE`."""
    counted = cost.multiply_adds / 1e9
    digits = len(line.gflops.partition(".")[2])
    if f"{counted:.{digits}f}" == line.gflops:
        return f"{counted:.3g} is {line.gflops} in the digits that the paper prints"
    if line.network == "resnet50" and line.way in ("depth", "width"):
        other = {"depth": "width", "width": "depth"}[line.way]
        twin = next(t for t in paper.FAMILIES if t.network == line.network and t.way == other)
        return (
            f"the paper's d=4 and w=2 look exchanged: the difference to its {twin.gflops} of the other is "
            f"{_difference(counted, twin.gflops)}"
        )
    if line.network == "mobilenet_v1" and line.way == "compound":
        nearest = _scaled(line, Rounding(depth="nearest"))
        other_count = nearest.cost().multiply_adds / 1e9
        return (
            f"rounding: {_depth(BASELINES[line.network])} layers become {_depth(_scaled(line))}, every stage rounded "
            f"up; to the nearest, {_depth(nearest)} layers and {other_count:.3g} "
            f"({_difference(other_count, line.gflops)})"
        )
    if line.network == "efficientnet_b0" and line.way != "compound":
        base = BASELINES[line.network].cost().multiply_adds / 1e9
        rule = line.depth * line.width**2 * line.resolution**2
        return (
            f"not by the factor it prints: d w^2 r^2 = {rule:g} times B0's {base:.2f} is {rule * base:.2f}, "
            f"the paper's {line.gflops} is {float(line.gflops) / base:.1f} times B0"
        )
    return "not explained"


def _depth(network: StagedNetwork) -> int:
    return sum(stage.layers for stage in network.stages if stage.deepens)


def _difference(counted: float, printed: str) -> str:
    return f"{counted / float(printed) - 1:+.1%}"


WAYS: tuple[str, ...] = ("depth", "width", "resolution", "compound")


def growth(
    network: Network,
    scaling: CompoundScaling = EFFICIENTNET,
    phis: Sequence[float] = (1, 2, 3),
    rounding: Rounding | None = None,
) -> Table:
    """FLOPs as one dimension or all of them grow, predicted by equation 3 and counted (the axis of figures 3 and 8).

    Args:
        network: the baseline.
        scaling: alpha, beta, gamma of the compound way.
        phis: the compound coefficients; each single dimension grows so that the same growth is predicted for it.
        rounding: how layers, channels and pixels become whole numbers.
    """
    base = network.cost()
    rows: list[dict[str, Value]] = [_growth_row("baseline", 0.0, (1.0, 1.0, 1.0), 1.0, network.name, base, base)]
    for way in WAYS:
        for phi in phis:
            predicted = scaling.flops(phi)
            root = math.sqrt(predicted)
            factors = {
                "depth": (predicted, 1.0, 1.0),
                "width": (1.0, root, 1.0),
                "resolution": (1.0, 1.0, root),
                "compound": (scaling.depth(phi), scaling.width(phi), scaling.resolution(phi)),
            }[way]
            depth, width, resolution = factors
            grown = scale(network, depth=depth, width=width, resolution=resolution, rounding=rounding)
            name = f"{way} phi={phi:g}"
            rows.append(_growth_row(way, phi, factors, predicted, name, grown.cost(), base))
    columns = (
        Column("name", "name"),
        Column("way", "scaled"),
        Column("phi", "phi", "g"),
        Column("depth", "d", ".2f"),
        Column("width", "w", ".2f"),
        Column("resolution", "r", ".2f"),
        Column("predicted_growth", "FLOPs predicted", ".2f"),
        Column("counted_growth", "counted", ".2f"),
        Column("counted_over_predicted", "counted / predicted", ".2f"),
        _GFLOPS,
        _PARAMETERS,
        _MEMORY,
    )
    notes = (
        "FLOPs predicted: d w^2 r^2 times the baseline's, as equation 3 has it. Counted: with rounding, and with what "
        "grows otherwise (depthwise convolutions grow with w, not w^2; a stem is not repeated).",
        _MEMORY_NOTE,
    )
    coefficients = f"alpha {scaling.alpha:g}, beta {scaling.beta:g}, gamma {scaling.gamma:g}"
    title = f"{network.name}: FLOPs as one dimension grows, or all of them ({coefficients})"
    return Table("growth", title, columns, tuple(rows), notes)


def _growth_row(
    way: str, phi: float, factors: tuple[float, float, float], predicted: float, name: str, cost: Cost, base: Cost
) -> dict[str, Value]:
    counted = cost.multiply_adds / base.multiply_adds
    return {
        "name": name,
        "way": way,
        "phi": phi,
        "depth": factors[0],
        "width": factors[1],
        "resolution": factors[2],
        "predicted_growth": predicted,
        "counted_growth": counted,
        "counted_over_predicted": counted / predicted,
        **_costs(cost),
    }


def comparison(networks: Sequence[Network]) -> Table:
    """Networks side by side; growth is against the first.

    Raises:
        ValueError: no network.
    """
    if not networks:
        raise ValueError("comparison: networks is empty; allowed: one or more")
    base = networks[0].cost()
    rows: list[dict[str, Value]] = [
        {
            "network": network.name,
            "resolution": network.resolution,
            "layers": sum(row.layers for row in network.rows()),
            **_costs(network.cost()),
            "growth": network.cost().multiply_adds / base.multiply_adds,
        }
        for network in networks
    ]
    columns = (
        Column("network", "network"),
        Column("resolution", "pixels"),
        Column("layers", "layers"),
        _GFLOPS,
        Column("growth", "growth", ".2f"),
        _PARAMETERS,
        _MEMORY,
    )
    return Table("comparison", "Cost of one image", columns, tuple(rows), (_FLOPS_NOTE, _MEMORY_NOTE))

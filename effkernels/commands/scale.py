"""``effkernels scale``: scale a network, and print the tables and figures of the compound scaling paper."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from effkernels import console
from effkernels.commands.common import UsageError, add_json, check_output
from effkernels.files import write_text
from effkernels.models.compound import EFFICIENTNET, CompoundScaling
from effkernels.scaling import tables
from effkernels.scaling.accuracies import read_accuracies
from effkernels.scaling.budget import ALONG, Budget, fit
from effkernels.scaling.catalog import FORMS, find_network
from effkernels.scaling.figures import has_figure, save_figure
from effkernels.scaling.files import save_network
from effkernels.scaling.network import DEPTH_ROUNDINGS, Network, Rounding, StagedNetwork, scale
from effkernels.scaling.table import FORMATS, Table

TEXT = "Scale a network in depth, width and resolution and count its costs, or print the paper's tables."
TABLES = ("stages", "variants", "families", "equation3", "growth")
_BUDGETS = ("budget_multiply_adds", "budget_activation_bytes", "budget_parameters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--network",
        "--model",
        default="efficientnet_b0",
        metavar="NETWORK",
        help=f"{FORMS}; default: %(default)s",
    )
    what = parser.add_argument_group("scale by (one of phi, factors, budgets)")
    what.add_argument("--phi", type=float, help="the compound coefficient")
    what.add_argument("--depth", type=float, default=1.0, metavar="D", help="factor on layers")
    what.add_argument("--width", type=float, default=1.0, metavar="W", help="factor on channels")
    what.add_argument(
        "--resolution", type=float, default=1.0, metavar="R", help="factor on the image's height and width"
    )
    what.add_argument("--budget-multiply-adds", type=float, metavar="N", help="as large as this allows, such as 1e9")
    what.add_argument("--budget-activation-bytes", type=float, metavar="N", help="kept for the backward of one image")
    what.add_argument("--budget-parameters", type=float, metavar="N")
    what.add_argument("--along", choices=ALONG, default="compound", help="what a budget scales; default: %(default)s")

    how = parser.add_argument_group("coefficients and rounding")
    for letter in ("alpha", "beta", "gamma"):
        how.add_argument(f"--{letter}", type=float, default=getattr(EFFICIENTNET, letter), help="default: %(default)s")
    how.add_argument("--divisor", type=int, default=8, help="channels are multiples of it; default: %(default)s")
    how.add_argument("--round-depth", choices=DEPTH_ROUNDINGS, default="up", help="default: %(default)s")
    how.add_argument("--round-resolution", type=int, default=1, metavar="PIXELS", help="default: %(default)s")

    parser.add_argument(
        "--table",
        choices=TABLES,
        help="stages: of the network (the paper's table 1); variants: B0 to B7 (table 2); families: other baselines "
        "(tables 3 and 7); equation3: beside the published coefficients; growth: of the FLOPs (figures 3 and 8)",
    )
    parser.add_argument(
        "--growth-phi", type=float, nargs="+", default=[1, 2, 3], metavar="PHI", help="of --table growth"
    )
    parser.add_argument(
        "--accuracy",
        type=Path,
        metavar="FILE",
        help="your own runs, drawn over the figure of --table growth: CSV or JSON lines with name, accuracy, and for "
        "other names than the table's gflops and way",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="on standard output; default: %(default)s")
    add_json(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the tables there as .md, .csv and .json too")
    parser.add_argument("--png", action="store_true", help="with --output: draw them too")
    parser.add_argument(
        "--save", type=Path, metavar="FILE.json", help="write the scaled network, to be read by --network"
    )
    parser.add_argument("--force", action="store_true", help="overwrite --save")


def run(arguments: argparse.Namespace) -> int:
    """Print a table, or scale a network."""
    if arguments.png and arguments.output is None:
        raise UsageError("--png needs --output DIR")
    if arguments.accuracy is not None and not (arguments.table == "growth" and arguments.png):
        raise UsageError("--accuracy needs --table growth --png")
    if arguments.save is not None and arguments.table is not None:
        raise UsageError("--save needs a scaled network and is not allowed with --table")
    if arguments.save is not None:
        check_output("--save", arguments.save, force=arguments.force, suffixes=(".json",))
    network: Network | None
    try:
        scaling = CompoundScaling(arguments.alpha, arguments.beta, arguments.gamma)
        rounding = Rounding(arguments.divisor, arguments.round_depth, arguments.round_resolution)
        if arguments.table is not None:
            made, network = [_table(arguments, scaling, rounding)], None
        else:
            made, network = _scaled(arguments, scaling, rounding)
        runs = read_accuracies(arguments.accuracy, made[0]) if arguments.accuracy is not None else []
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UsageError(str(error)) from error
    _print(made, "json" if arguments.json else arguments.format)
    try:
        if arguments.save is not None:
            assert isinstance(network, StagedNetwork)
            save_network(network, arguments.save)
            console.note(f"wrote {arguments.save}")
        if arguments.output is not None:
            for file in _write(made, arguments.output):
                console.note(f"wrote {file}")
            for table in made:
                if arguments.png and has_figure(table):
                    save_figure(table, arguments.output / f"{table.name}.png", runs)
                    console.note(f"wrote {arguments.output / table.name}.png")
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}" if error.strerror else str(error)) from error
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    return 0


def _table(arguments: argparse.Namespace, scaling: CompoundScaling, rounding: Rounding) -> Table:
    name = arguments.table
    if name == "variants":
        return tables.variants()
    if name == "families":
        return tables.families()
    if name == "equation3":
        return tables.equation_3(scaling)
    network = find_network(arguments.network)
    if name == "growth":
        return tables.growth(network, scaling, arguments.growth_phi, rounding)
    return tables.stages(_scale(network, arguments, scaling, rounding))


def _scaled(arguments: argparse.Namespace, scaling: CompoundScaling, rounding: Rounding) -> tuple[list[Table], Network]:
    """Return the scaled network beside its baseline: stages, and cost; and the network itself."""
    baseline = find_network(arguments.network)
    network = _scale(baseline, arguments, scaling, rounding)
    if arguments.save is not None and not isinstance(network, StagedNetwork):
        raise ValueError(f"--save: {network.name} is built by another library; a file holds our own stages only")
    if network is baseline:
        return [tables.stages(baseline), tables.comparison([baseline])], network
    beside = tables.scaled(baseline, network)
    return [beside or tables.stages(network), tables.comparison([baseline, network])], network


def _scale(baseline: Network, arguments: argparse.Namespace, scaling: CompoundScaling, rounding: Rounding) -> Network:
    """Return the network that the flags ask for; the baseline itself where they ask for none."""
    factors = (arguments.depth, arguments.width, arguments.resolution)
    limits = [getattr(arguments, name) for name in _BUDGETS]
    if any(limit is not None for limit in limits):
        if arguments.phi is not None or factors != (1.0, 1.0, 1.0):
            raise ValueError("a budget is not allowed with --phi, --depth, --width and --resolution: it decides them")
        budget = Budget(multiply_adds=limits[0], activation_bytes=limits[1], parameters=limits[2])
        found = fit(baseline, budget, along=arguments.along, scaling=scaling, rounding=rounding)
        by = f"phi={found.phi:.3f}: " if found.phi is not None else ""
        console.note(
            f"{by}depth {found.depth:.3f}, width {found.width:.3f}, resolution {found.resolution:.3f}; the next larger "
            f"network exceeds {', '.join(found.limited_by)}"
        )
        return found.network
    if arguments.phi is None and factors == (1.0, 1.0, 1.0):
        return baseline
    depth, width, resolution = factors
    return scale(
        baseline, arguments.phi, scaling=scaling, depth=depth, width=width, resolution=resolution, rounding=rounding
    )


def _write(made: Sequence[Table], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for table in made:
        for suffix, text in (("md", table.markdown()), ("csv", table.csv()), ("json", table.json())):
            file = folder / f"{table.name}.{suffix}"
            write_text(file, text)
            files.append(file)
    return files


def _print(made: Sequence[Table], form: str) -> None:
    if form == "json" and len(made) > 1:
        print(json.dumps([table.to_dict() for table in made], indent=1))
        return
    for number, table in enumerate(made):
        if number:
            print()
        table.show(form)

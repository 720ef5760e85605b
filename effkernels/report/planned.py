"""Tables and pictures of a launch plan: estimates for a GPU, computed and never measured."""

from __future__ import annotations

from collections.abc import Sequence

from effkernels.plan.gpus import Gpu
from effkernels.plan.launches import Plan, PlannedLaunch
from effkernels.plan.time_estimate import MODES
from effkernels.report import charts
from effkernels.report.charts import Ceiling, Point
from effkernels.report.page import Page
from effkernels.report.parts import Origin, Picture, Table

# What a kernel of PyTorch's own is called in a legend; the operator is in the tip.
_FOREIGN = "PyTorch's own"


def roofline(plan: Plan, gpu: Gpu) -> Picture:
    """Return the planned launches below the published rates of a GPU."""
    launches = [launch for launch in plan.launches if launch.flops and launch.bytes]
    rate, unit = _rate(plan, gpu)
    points = [
        Point(
            launch.kernel if launch.is_own else _FOREIGN,
            launch.limited_by,
            launch.flops / launch.bytes,
            launch.flops / launch.time.us / 1e3,
            f"{launch.layer} {launch.kernel}",
        )
        for launch in launches
    ]
    title = "Estimated: the launches below the roof of the GPU"
    subtitle = f"{_case(plan, gpu)}; shapes: what the floor is limited by; nothing here was measured"
    ceiling = Ceiling(rate / 1e9, gpu.bandwidth / 1e9, f"{unit}, published", "memory, published")
    return Picture("plan-roofline", title, charts.roofline(title, subtitle, points, ceiling), Origin.ESTIMATED)


def _rate(plan: Plan, gpu: Gpu) -> tuple[float, str]:
    """Return the highest published rate that a launch of the plan could have, and whose it is."""
    units = {launch.unit for launch in plan.launches}
    rates = {"tensor": gpu.tensor, "tf32": gpu.tf32, "float32": gpu.float32}
    names = {"tensor": "tensor cores", "tf32": "tensor cores in TF32", "float32": "float32"}
    best = max(units, key=lambda unit: rates[unit])
    return rates[best], names[best]


def by_part(plan: Plan, gpu: Gpu) -> Picture:
    """Return the estimated time of every part of the network beside its floor."""
    bars = []
    for part in plan.by_block():
        own = _launches_of(plan, part)
        bars.append(
            (part, {"estimate": sum(one.time.us for one in own), "floor": sum(one.floor_us for one in own)})
        )  # fmt: skip
    title = "Estimated: the time of each part of the network"
    subtitle = f"{_case(plan, gpu)}; without the gaps between launches; nothing here was measured"
    return Picture("plan-parts", title, charts.bars(title, subtitle, bars, "us"), Origin.ESTIMATED)


def by_term(plan: Plan, gpu: Gpu) -> Picture:
    """Return which resource the launches wait for: the estimated time by the term that counts most."""
    stacks: dict[str, dict[str, float]] = {}
    for launch in plan.launches:
        stack = stacks.setdefault(launch.kernel if launch.is_own else _FOREIGN, {})
        stack[launch.time.longest] = stack.get(launch.time.longest, 0.0) + launch.time.us
    order = sorted({term for stack in stacks.values() for term in stack})
    stacks = {name: {term: stack.get(term, 0.0) for term in order} for name, stack in stacks.items()}
    title = "Estimated: the time of each kernel, by what limits its launches"
    subtitle = f"{_case(plan, gpu)}; without the gaps between launches; nothing here was measured"
    return Picture("plan-terms", title, charts.stacked(title, subtitle, stacks, "us"), Origin.ESTIMATED)


def _launches_of(plan: Plan, part: str) -> Sequence[PlannedLaunch]:
    return [launch for launch in plan.launches if launch.block_of_network == part]


def _case(plan: Plan, gpu: Gpu) -> str:
    return f"{plan.model}@{plan.img_size}, {plan.precision}, batch {plan.batch_size}, {gpu.title}"


def part_table(plan: Plan) -> Table:
    """Return bytes, FLOPs, floor and estimate of each part of the network."""
    cells = []
    for part, sums in plan.by_block().items():
        estimate = sum(launch.time.us for launch in _launches_of(plan, part))
        cells.append(_line(part, sums.launches, sums.bytes, sums.flops, sums.floor_us, estimate))
    totals, whole = plan.totals, sum(launch.time.us for launch in plan.launches)
    cells.append(_line("sum", totals.launches, totals.bytes, totals.flops, totals.floor_us, whole))
    columns = ["part", "launches", "MB", "MFLOP", "floor us", "estimate us"]
    return Table("Parts of the network", columns, cells, Origin.ESTIMATED)


def _line(name: str, launches: int, moved: int, flops: int, floor_us: float, us: float) -> list[str]:
    amounts = f"{moved / 1e6:,.2f}", f"{flops / 1e6:,.1f}", f"{floor_us:,.1f}", f"{us:,.1f}"
    return [name, str(launches), *amounts]


def mode_table(plan: Plan) -> Table:
    """Return the estimate of a whole forward in each way of launching."""
    cells = [[mode, f"{plan.estimated_us(mode):,.1f}"] for mode in MODES]
    return Table("One forward, gaps between launches included", ["way of launching", "estimate us"], cells,
                 Origin.ESTIMATED)  # fmt: skip


def page(plan: Plan, gpu: Gpu) -> Page:
    """Return the page of a launch plan."""
    lead = [
        f"{_case(plan, gpu)}. Computed from the launch plan, from instructions counted in the machine code and from "
        "published rates of the GPU. Nothing on this page was measured.",
        "floor: the longest of what bytes, FLOPs and special functions take at the published rates.",
    ]
    found = Page(f"{plan.model} on {gpu.title}: estimates", Origin.ESTIMATED, lead)
    found.add("Whole network", [mode_table(plan)])
    found.add("Roofline", [roofline(plan, gpu)])
    found.add("Parts", [by_part(plan, gpu), part_table(plan)])
    found.add("Kernels", [by_term(plan, gpu)])
    return found

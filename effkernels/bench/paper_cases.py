"""Table 4 of the EfficientNet paper on this machine: B1 and B7 beside networks of about their accuracy, on one core.

The paper (arXiv 1905.11946, table 4) gives the seconds of one image on a CPU: ResNet-152 0.554 and B1 0.098, GPipe
19.0 and B7 3.1. GPipe's network, AmoebaNet-B with 557 million parameters, is in no library of today; timm's
resnext101_32x32d, which has 469 million, is in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from effkernels import environment
from effkernels.bench import timing
from effkernels.bench.contenders import CONTENDERS as NETWORKS
from effkernels.bench.measure import Options, Refusal, measure
from effkernels.bench.network_case import NetworkCase, ReadyContender
from effkernels.bench.networks import as_run, case_name, network_case, prepare
from effkernels.bench.timing import Row

THREADS = 1  # as in the paper
CONTENDERS = ("effkernels", "engine", "eager", "eager-channels-last", "compile", "onnxruntime", "openvino")
DEFAULT = ("effkernels", "eager", "eager-channels-last", "compile")
# This package's network has no counterpart for the rival, whose best time it is compared with.
_OWN = ("effkernels", "engine")


@dataclass(frozen=True)
class Pair:
    """Two networks of the table.

    Attributes:
        small, rival: forms of `effkernels.models.sources.find_model`.
        paper_small_s, paper_rival_s: seconds of the paper.
        paper_rival: what the paper compared with.
    """

    small: str
    rival: str
    paper_small_s: float
    paper_rival_s: float
    paper_rival: str

    @property
    def case(self) -> str:
        """The case as rows name it."""
        return f"Table 4: {self.small} and {self.rival}"

    @property
    def paper_ratio(self) -> float:
        """How many times longer the rival took in the paper."""
        return self.paper_rival_s / self.paper_small_s


PAIRS = (
    Pair("efficientnet_b1", "timm:resnet152", 0.098, 0.554, "ResNet-152"),
    Pair("efficientnet_b7", "timm:resnext101_32x32d", 3.1, 19.0, "GPipe"),
)


@dataclass(frozen=True)
class Ratio:
    """How many times longer the rival takes than the small network.

    Attributes:
        small, rival: names of contenders.
        here: measured on this machine.
    """

    pair: Pair
    small: str
    rival: str
    here: float

    @property
    def line(self) -> str:
        """The ratio beside the paper's, in words."""
        pair = self.pair
        what = self.small if self.small == self.rival else f"{self.rival} and {self.small}"
        return (
            f"{pair.rival} takes {self.here:.1f} times as long as {pair.small} ({what}); in the paper "
            f"{pair.paper_rival} takes {pair.paper_ratio:.1f} times as long"
        )


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Return the ratios of the rows of one case: of each program that ran both networks, and of the best of each."""
    found = []
    for pair in PAIRS:
        own = [row for row in rows if row.case == pair.case]
        small, rival = (
            {str(row.name).partition(" ")[2]: row.median_us for row in own if str(row.name).startswith(f"{model} ")}
            for model in (pair.small, pair.rival)
        )
        if not small or not rival:
            continue
        found += [Ratio(pair, name, name, rival[name] / small[name]) for name in small if name in rival]
        best = min(rival, key=lambda name: rival[name])
        found += [Ratio(pair, name, best, rival[best] / small[name]) for name in _OWN if name in small]
    return found


def networks_of(pair: Pair, names: Sequence[str], img_size: int | None = None) -> list[tuple[NetworkCase, str]]:
    """Return what runs in turns: each network with each contender that is for it.

    Args:
        img_size: of both, in pixels; None: each network's own.
    """
    found = []
    for model in (pair.small, pair.rival):
        case = network_case(model, 1, img_size=img_size, threads=THREADS)
        found += [(case, name) for name in names if model == pair.small or name not in _OWN]
    return found


def unavailable(pair: Pair, name: str) -> str | None:
    """Return why a contender cannot run, in one line, or None."""
    return NETWORKS[name].unavailable(network_case(pair.small, 1, threads=THREADS))


def measure_pair(
    pair: Pair,
    contenders: Sequence[str],
    options: Options,
    *,
    threads: int,
    date: str,
    advance: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
    img_size: int | None = None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure both networks of a pair in turns, one image a call; arguments and results as of `networks.run_case`.

    A row's name is the network and the contender.
    """
    torch._dynamo.reset()
    all_ready: dict[str, tuple[NetworkCase, ReadyContender, float]] = {}
    refusals: list[Refusal] = []
    for case, name in networks_of(pair, contenders, img_size):
        prepared = prepare(name, case)
        if isinstance(prepared, str):
            refusals.append(Refusal(name, case_name(case), prepared))
            for _ in range(options.rounds):
                advance(name)
        else:
            all_ready[f"{case.model} {name}"] = (case, *prepared)
            report(f"{pair.case}: {case_name(case)}: {prepared[0].label} is ready")
    if not all_ready:
        return [], refusals
    with torch.inference_mode():
        measured = measure(
            {name: as_run(ready, case, 2) for name, (case, ready, _) in all_ready.items()},
            torch.device("cpu"),
            options,
            advance=advance,
            report=lambda line: report(f"{pair.case}: {line}"),
        )
    rows = []
    for name, (case, ready, error) in all_ready.items():
        row = timing.make_row(
            timing.summarise(measured.times[name]),
            suite="paper",
            case=pair.case,
            contender=f"{case_name(case)}, {ready.label}",
            device=environment.device_name(case.torch_device, threads),
            dtype=case.numbers.name,
            batch=1,
            date=date,
            packages=ready.packages,
            rel_error=error,
        )
        rows.append(dataclasses.replace(row, name=name, **measured.fields(name)))
    return rows, refusals

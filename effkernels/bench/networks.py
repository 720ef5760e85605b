"""Networks against each other: parity first, then time in turns, then memory in processes of their own."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import effkernels
from effkernels import environment
from effkernels.bench import timing
from effkernels.bench.check import sample_model
from effkernels.bench.contenders import CONTENDERS, NetworkCase, ReadyContender, plain_network, to_tensor
from effkernels.bench.measure import WRONG, Options, Refusal, measure
from effkernels.bench.peak_memory import peak_memory
from effkernels.bench.timing import Row
from effkernels.models.sources import find_model, input_size_of_source
from effkernels.ops.parity import errors

__all__ = [
    "Interrupted", "Options", "Refusal", "as_run", "case_name", "model_size", "network_case", "prepare", "run_case",
    "steps",
]  # fmt: skip

# Images whose logits are compared; the float64 reference is slow, and a batch repeats the same work.
_PARITY_IMAGES = 4
# An int8 network that is off by more than this has lost its function; no rounding of PyTorch's says what is usual.
_LOSSY = 0.5


class Interrupted(KeyboardInterrupt):
    """An interrupt after the times of a case were known.

    Attributes:
        rows: of the case, without the memory that was still to be measured.
        refusals: contenders that did not run.
    """

    def __init__(self, rows: list[Row], refusals: list[Refusal]) -> None:
        super().__init__()
        self.rows = rows
        self.refusals = refusals


def model_size(model: str) -> int:
    """Height and width of the images that a model was designed for, in pixels; 224 if it does not say so."""
    return input_size_of_source(find_model(model))[-1]


def network_case(
    model: str,
    batch: int,
    precision: str = "float32",
    *,
    img_size: int | None = None,
    device: torch.device | str = "cpu",
    threads: int = 1,
    channels_last: bool = False,
) -> NetworkCase:
    """Return the case of a model, at its own image size unless another one is given.

    Raises:
        ValueError, ImportError, OSError: as of `find_model`, and of building a model of a file.
    """
    channels, _, width = input_size_of_source(find_model(model))
    return NetworkCase(
        model, img_size or width, batch, precision, str(device), threads, channels_last, channels=channels
    )


def case_name(case: NetworkCase) -> str:
    """Return the case as rows name it: 'efficientnet_b0@224'."""
    return f"{case.model}@{case.img_size}"


def steps(contenders: Sequence[str], options: Options) -> int:
    """Return how often `run_case` calls ``advance``: preparing, turns and memory of each contender."""
    return len(contenders) * (1 + options.rounds + int(options.memory))


@functools.lru_cache(maxsize=1)
def _truth(case: NetworkCase) -> Tensor:
    """Float64 logits of the first images of a case in plain PyTorch, (min(batch, 4), classes).

    On the case's device: a GPU takes milliseconds for what takes a CPU many seconds.
    """
    images = case.images(0)[:_PARITY_IMAGES].to(case.torch_device, torch.float64)
    if case.source.is_own:
        network: torch.nn.Module = copy.deepcopy(sample_model(case.model, case.seed))
    else:
        network, _, _ = plain_network(case)
    network = network.to(case.torch_device, torch.float64)
    with effkernels.backend("reference"), torch.inference_mode():
        return to_tensor(network(images)).cpu()


def _error(ready: ReadyContender, case: NetworkCase) -> float:
    """Relative L2 error of a contender's logits against the float64 reference."""
    with torch.inference_mode():
        logits = to_tensor(ready.run(ready.convert(case.images(0))))[:_PARITY_IMAGES].clone()
    return errors(logits, _truth(case)).l2


@functools.lru_cache(maxsize=1)
def _plain_error(case: NetworkCase) -> float:
    """Return the error of plain PyTorch in the precision of a case."""
    return _error(CONTENDERS["eager"].prepare(case), case)


def prepare(name: str, case: NetworkCase) -> tuple[ReadyContender, float] | str:
    """Return the contender ready to run, and its error against float64; or why it does not run."""
    reason = CONTENDERS[name].unavailable(case)
    if reason:
        return reason
    try:
        ready = CONTENDERS[name].prepare(case)
        error = _error(ready, case)
    except Exception as failure:  # a foreign compiler may raise anything, and the other contenders are still wanted
        return f"failed: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    if CONTENDERS[name].lossy:
        if not error <= _LOSSY:
            return f"wrong: off by {error:.1e} from float64; not timed"
        return ready, error
    usual = _plain_error(case)
    if not error <= WRONG * usual:
        return f"wrong: off by {error:.1e} from float64, plain PyTorch by {usual:.1e}; not timed"
    return ready, error


def as_run(ready: ReadyContender, case: NetworkCase, inputs: int) -> timing.Run:
    """Return a run over the first ``inputs`` batches of a case, converted beforehand."""
    batches = [ready.convert(case.images(number)) for number in range(inputs)]
    return lambda number: ready.run(batches[number % inputs])


def run_case(
    case: NetworkCase,
    contenders: Sequence[str],
    options: Options,
    *,
    date: str,
    advance: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
    suite: str = "model",
) -> tuple[list[Row], list[Refusal]]:
    """Measure a case with every contender that can run it.

    Args:
        contenders: names of ``contenders.CONTENDERS``.
        suite: of the rows.
        date: the stamp of the run, see ``benchmark.run_date``.
        advance: called after each step, `steps` times in all.
        report: called with one line for each contender when it is prepared, which has the time of a first turn, and
            with one when the times are known; its memory is measured after that.

    Returns:
        Rows in the order of ``contenders``, and the contenders that did not run.

    Raises:
        Interrupted: (a KeyboardInterrupt) while memory was measured; it has the rows.
    """
    # Compiled functions of earlier cases count against the limit of recompilations of the same code.
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        images = case.images(0)
        cache = environment.last_level_cache_bytes(case.torch_device)
        inputs = timing.input_count(images.nbytes, cache)
        all_ready: dict[str, ReadyContender] = {}
        parity: dict[str, float] = {}
        refusals = []
        title = f"{case_name(case)}, batch {case.batch}"
        if case.numbers.name != "float32":
            title += f", {case.numbers.name}"

        def line(name: str, times: Sequence[float], what: str) -> str:
            median = timing.summarise(times).median_us / 1e3
            return f"{title}: {all_ready[name].label}: {what} {median:.2f} ms"

        for name in contenders:
            prepared = prepare(name, case)
            if isinstance(prepared, str):
                refusals.append(Refusal(name, case_name(case), prepared))
                for _ in range(steps([name], options) - 1):
                    advance(name)
            else:
                all_ready[name], parity[name] = prepared
                # Compiling may take minutes: whoever waits sees what is known so far.
                alone = {name: as_run(all_ready[name], case, inputs)}
                with torch.inference_mode():
                    first = timing.time_in_turns(alone, device=case.torch_device, warmup=1, rounds=1)
                report(line(name, first[name], "preliminary, one turn alone:"))
            advance(f"{name} prepared")
        if not all_ready:
            return [], refusals

        with torch.inference_mode():
            measured = measure(
                {name: as_run(ready, case, inputs) for name, ready in all_ready.items()},
                case.torch_device,
                options,
                dtype=case.numbers.computes_in,
                advance=advance,
                report=lambda text: report(f"{title}: {text}"),
            )
        rows = []
        for name, ready in all_ready.items():
            report(line(name, measured.times[name], "median"))
            row = timing.make_row(
                timing.summarise(measured.times[name]),
                suite=suite,
                case=case_name(case),
                contender=ready.label,
                device=environment.device_name(case.torch_device, case.threads),
                dtype=case.numbers.name,
                batch=case.batch,
                date=date,
                packages=ready.packages,
                rel_error=parity[name],
            )
            rows.append(dataclasses.replace(row, name=name, **measured.fields(name)))
        if options.memory:
            try:
                for index, name in enumerate(all_ready):
                    peak = peak_memory(name, case)
                    if isinstance(peak, str):
                        refusals.append(Refusal(name, case_name(case), peak))
                    else:
                        rows[index] = dataclasses.replace(rows[index], peak_bytes=peak)
                    advance(f"{name} memory")
            except KeyboardInterrupt as interrupt:
                raise Interrupted(rows, refusals) from interrupt
        return rows, refusals
    finally:
        torch.set_num_threads(threads)

"""Training steps of a network, fused against plain PyTorch and torch.compile; gradients first, then time in turns.

A step is forward, cross-entropy, and backward. The optimizer, which is the same for all, is left out.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effkernels
from effkernels import environment
from effkernels.bench import timing
from effkernels.bench.check import sample_model
from effkernels.bench.contenders import plain_network, to_tensor
from effkernels.bench.measure import WRONG, Options, Refusal, measure
from effkernels.bench.network_case import NetworkCase
from effkernels.bench.peak_memory import peak_memory, peak_of
from effkernels.bench.timing import Row
from effkernels.models.sources import unwrapped
from effkernels.nn import DropPath
from effkernels.ops.parity import errors

CONTENDERS = {
    "effkernels": "this package's own network",
    "optimized": "the plain network after optimize_(mode='training')",
    "eager": "the plain network",
    "eager-channels-last": "the plain network, channels_last",
    "compile": "the same under torch.compile",
}
_PARITY_IMAGES = 2


def unavailable(case: NetworkCase, name: str) -> str | None:
    """Return why a contender cannot train a case, in one line, or None."""
    if name == "effkernels" and not case.source.is_own:
        return f"runs this package's own networks; optimized trains {case.model}"
    return None


def measure_training(
    case: NetworkCase,
    contenders: Sequence[str],
    options: Options,
    *,
    threads: int,
    date: str,
    advance: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure the training steps of a case.

    Arguments and results are those of `networks.run_case`. A row's error is that of all gradients together on two
    images, against plain PyTorch in float64; its memory the peak of a few steps in a process of its own.
    """
    torch._dynamo.reset()
    name_of_case = f"{case.model}@{case.img_size}"
    few = _few(case)
    truth = _gradients(_plain(case).double(), few.double(), None)
    usual = errors(_step_gradients("eager", case, few), truth).l2
    models: dict[str, nn.Module] = {}
    parity: dict[str, float] = {}
    refusals: list[Refusal] = []
    for name in contenders:
        reason = unavailable(case, name)
        if reason is None:
            try:
                error = errors(_step_gradients(name, case, few), truth).l2
                if error <= WRONG * usual:
                    models[name], parity[name] = _prepared(name, case), error
                else:
                    reason = (
                        f"wrong: gradients off by {error:.1e} from float64, plain PyTorch by {usual:.1e}; not timed"
                    )
            except Exception as failure:  # a foreign compiler may raise anything
                reason = f"failed: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        if reason is not None:
            refusals.append(Refusal(name, name_of_case, reason))
            for _ in range(options.rounds):
                advance(name)
    if not models:
        return [], refusals
    images = case.images(0).to(case.torch_device, case.numbers.dtype)
    runs = {name: _as_run(model, images, case, name) for name, model in models.items()}
    title = f"{name_of_case}, batch {case.batch}, training"
    measured = measure(
        runs,
        case.torch_device,
        options,
        dtype=case.numbers.computes_in,
        advance=advance,
        report=lambda line: report(f"{title}: {line}"),
    )
    rows = []
    for name in models:
        row = timing.make_row(
            timing.summarise(measured.times[name]),
            suite="train",
            case=name_of_case,
            contender=name,
            device=environment.device_name(case.torch_device, threads),
            dtype=case.numbers.name,
            batch=case.batch,
            date=date,
            packages=() if name == "effkernels" else plain_network(case)[2],
            rel_error=parity[name],
        )
        row = dataclasses.replace(row, name=name, **measured.fields(name))
        if options.memory:
            peak = peak_memory(name, case, training=True)
            if isinstance(peak, str):
                refusals.append(Refusal(name, name_of_case, peak))
            else:
                row = dataclasses.replace(row, peak_bytes=peak)
        rows.append(row)
        report(f"{title}: {name}: median {row.median_us / 1e3:.2f} ms, {row.images_per_s:.1f} images/s")
    return rows, refusals


def _few(case: NetworkCase) -> Tensor:
    return dataclasses.replace(case, batch=_PARITY_IMAGES).images(0)


def _plain(case: NetworkCase) -> nn.Module:
    return _without_chance(unwrapped(plain_network(case)[0]))


def _without_chance(model: nn.Module) -> nn.Module:
    """Return the model in training mode, without dropout and stochastic depth, which differ from step to step."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.rate = 0.0
    return model.train()


def _prepared(name: str, case: NetworkCase) -> nn.Module:
    """Return a contender's model on the case's device, in its dtype."""
    if name == "effkernels":
        model = _without_chance(copy.deepcopy(sample_model(case.model, case.seed)))
    else:
        model = _plain(case)
    model = model.to(case.torch_device, case.numbers.dtype)
    if name == "optimized":
        effkernels.optimize_(model, mode="training", input_size=case.input_size)
        model.train()
    if name in ("eager-channels-last", "compile") or (case.channels_last and name != "eager"):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _call(name: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    forward: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if name == "compile" else model
    if name in ("effkernels", "optimized"):
        return forward

    def plain(images: Tensor) -> Tensor:
        with effkernels.backend("reference"):  # our own network, where no library has it
            return forward(images)

    return plain


def _loss(logits: Tensor) -> Tensor:
    classes = torch.arange(logits.shape[0], device=logits.device) % logits.shape[1]
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, classes)


def _step_gradients(name: str, case: NetworkCase, few: Tensor) -> Tensor:
    model = _prepared(name, case)
    return _gradients(model, few.to(case.torch_device, case.numbers.dtype), case, name)


def _gradients(model: nn.Module, images: Tensor, case: NetworkCase | None, name: str = "eager") -> Tensor:
    """Return all gradients of a step as one vector, in float64 on the CPU."""
    if case is None:
        _loss(to_tensor(_call(name, model)(images))).backward()
    else:
        _step(_call(name, model), images, case)
    found = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


def _step(call: Callable[[Tensor], Tensor], images: Tensor, case: NetworkCase) -> None:
    autocast = case.numbers.autocast
    with torch.autocast(case.torch_device.type, dtype=autocast, enabled=autocast is not None):
        logits = to_tensor(call(images))
    _loss(logits).backward()


def _as_run(model: nn.Module, images: Tensor, case: NetworkCase, name: str) -> timing.Run:
    call = _call(name, model)
    if name in ("eager-channels-last", "compile", "effkernels") or case.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def run(number: int) -> None:
        model.zero_grad(set_to_none=True)
        _step(call, images, case)

    return run


def measure_memory_here(contender: str, case: NetworkCase) -> int:
    """Peak memory of a contender's steps in this process, in bytes; use `peak_memory` for a number that counts."""
    torch.set_num_threads(case.threads)
    images = case.images(0).to(case.torch_device, case.numbers.dtype)
    run = _as_run(_prepared(contender, case), images, case, contender)
    return peak_of(lambda: run(0), case.torch_device, compiles=contender == "compile")

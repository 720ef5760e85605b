"""Part `training`: training steps of EfficientNet-B0 and B4, and fine-tuning B0 with frozen norms.

A step of a network whose norms learn is forward and backward in bfloat16 by autocast, against eager PyTorch in
channels_last memory and torch.compile, in turns: time, peak memory, and all gradients against float64 first. With
frozen norms the network runs other operators, those of inference: their gradients against float64, and their time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import effkernels
from benchmarks.gpu_check import measure
from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.results import Results
from effkernels.bench import timing
from effkernels.bench.check import sample_model
from effkernels.bench.contenders import NetworkCase
from effkernels.bench.networks import Options as Measuring
from effkernels.bench.networks import Refusal, model_size
from effkernels.bench.timing import Row
from effkernels.bench.train_cases import measure_training
from effkernels.ops.parity import judge

MODEL = "efficientnet_b0"
BATCHES = (32, 128)
LEARNING = {"efficientnet_b0": 128, "efficientnet_b4": 32}
"""Networks whose norms learn, with the images of a batch."""
ROUNDS = {"ready at once": ("effkernels", "eager-channels-last"), "compile": ("compile",)}
"""What is added to the contenders, in the order of what is most worth knowing."""
_PARITY_IMAGES = 2
_ROUNDS = 5


def network(dtype: torch.dtype, device: torch.device, layout: torch.memory_format = torch.channels_last) -> nn.Module:
    """Return the network in eval mode, so that its norms are frozen."""
    made: nn.Module = copy.deepcopy(sample_model(MODEL)).to(torch.bfloat16).to(device, dtype)
    return made.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


def noise(batch: int, size: int, device: torch.device) -> Tensor:
    """Return a batch in bfloat16, channels_last."""
    drawn = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return drawn.to(device, torch.bfloat16, memory_format=torch.channels_last)


def step_of(model: nn.Module, images: Tensor, backend: str) -> Callable[[], None]:
    """Return a forward and a backward on one backend."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with effkernels.backend(backend):
            model(images).float().square().mean().backward()

    return step


def gradients(model: nn.Module, images: Tensor, backend: str) -> dict[str, Tensor]:
    """Return the gradients of all parameters after one step."""
    step_of(model, images.to(next(model.parameters()).dtype), backend)()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error_of(backend: str, device: torch.device, size: int) -> tuple[bool, float, float]:
    """Return whether the gradients of a backend in bfloat16 keep to the rule of parity, their error and its limit.

    All parameters count as one long vector with each at its own scale: a norm of eight channels has too few numbers to
    be judged alone. PyTorch's own error is that of the worse of its two layouts, because a deep network multiplies
    rounding errors by chance.
    """
    images = noise(_PARITY_IMAGES, size, device)
    truth = gradients(network(torch.float64, device), images, "reference")
    scale = {name: gradient.norm() for name, gradient in truth.items() if float(gradient.norm()) > 0}

    def joined(found: dict[str, Tensor]) -> Tensor:
        # In float32: a quotient that is rounded to bfloat16 again would have another error.
        return torch.cat([(found[name].double() / scale[name]).flatten() for name in scale]).float()

    wanted = torch.cat([(truth[name] / scale[name]).flatten() for name in scale])
    mine = joined(gradients(network(torch.bfloat16, device), images, backend))
    verdicts = []
    for layout in (torch.channels_last, torch.contiguous_format):
        plain = joined(gradients(network(torch.bfloat16, device, layout), images, "reference"))
        verdicts.append(judge((mine,), (plain,), (wanted,)))
    return max(verdicts, key=lambda verdict: verdict[2])


@dataclass(frozen=True)
class Learning:
    """A network whose norms learn, and the contenders that take turns."""

    model: str
    batch: int
    contenders: tuple[str, ...]


Step = Learning | str | int  # a backend whose gradients are compared, and a batch with frozen norms


def plan(backends: Sequence[str], smoke: bool) -> dict[str, Step]:
    """Return every step by name, in the order of what is most worth knowing."""
    found: dict[str, Step] = {}
    networks = {MODEL: 2} if smoke else LEARNING
    contenders: tuple[str, ...] = ()
    for title, added in list(ROUNDS.items())[: 1 if smoke else None]:  # a compiler takes minutes on a CPU
        contenders += added
        for model, batch in networks.items():
            found[f"{model}, batch {batch}: {title}"] = Learning(model, batch, contenders)
        if title == next(iter(ROUNDS)):
            found |= {f"gradients with frozen norms by {name}": name for name in backends}
    found |= {f"frozen norms, batch {batch}": batch for batch in ((2,) if smoke else BATCHES)}
    return found


def training(options: Options) -> str:
    """Time training steps, and compare their gradients."""
    options.needs_gpu()
    work = options.work("training")
    device = torch.device(options.device)
    backends = measure.ours("depthwise_bn_act_gate", torch.bfloat16, device)
    results = Results(options)
    for name, step in work.steps(plan(backends, options.smoke), lambda step: 0.0 if options.smoke else 15.0):
        results.restart()
        if isinstance(step, str):
            ok, error, limit = error_of(step, device, 32 if options.smoke else model_size(MODEL))
            print(f"{name}: error {error:.1e}, limit {limit:.1e}", flush=True)
            if not ok:
                work.wrong(name, f"{name}: error {error:.1e}, limit {limit:.1e}")
            continue
        if isinstance(step, Learning):
            rows, refusals = _learn(step, options, results.date)
            for refusal in refusals:
                print(f"  {refusal.contender}: {refusal.reason}", flush=True)
                if refusal.contender == "effkernels":
                    work.wrong(name, f"{name}: {refusal.reason}")
        else:
            rows = _with_frozen_norms(step, backends, options, results)
        results.add(rows)
        print(f"{name}: " + " | ".join(map(_line, rows)), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return work.end(f"gradients of {', '.join(backends)}; rows in {results.file.name}")


def _learn(step: Learning, options: Options, date: str) -> tuple[list[Row], list[Refusal]]:
    size = 32 if options.smoke else model_size(step.model)
    case = NetworkCase(step.model, size, step.batch, "amp_bfloat16", options.device, torch.get_num_threads())
    measuring = Measuring(warmup=1, rounds=2 if options.smoke else _ROUNDS, memory=False)
    return measure_training(case, step.contenders, measuring, threads=torch.get_num_threads(), date=date)


def _with_frozen_norms(batch: int, backends: Sequence[str], options: Options, results: Results) -> list[Row]:
    device = torch.device(options.device)
    size = 32 if options.smoke else model_size(MODEL)
    images = noise(batch, size, device)
    contenders = {f"effkernels-{backend}": backend for backend in backends} | {"eager-channels-last": "reference"}
    runs = {}
    for contender, backend in contenders.items():
        step = step_of(network(torch.bfloat16, device), images, backend)
        runs[contender] = lambda number, step=step: step()
    found = timing.time_in_turns(runs, device=device, warmup=2, rounds=_ROUNDS)
    return [
        timing.make_row(
            timing.summarise(samples), suite="training", case=f"{MODEL}@{size} with frozen norms",
            contender=contender, device=results.device_name, dtype="bfloat16", batch=batch, date=results.date,
        )
        for contender, samples in found.items()
    ]  # fmt: skip


def _line(row: Row) -> str:
    memory = "" if row.peak_bytes is None else f", {row.peak_bytes / 1e6:.0f} MB"
    return f"{row.contender} {row.median_us:.0f} us{memory}"


if __name__ == "__main__":
    sys.exit(run_part(training))

"""Part `training`: fine-tuning EfficientNet-B0 with frozen norms: gradients against float64, and the time of a step.

With its norms in eval mode the network runs the fused operators in training, too; with norms that learn it runs
PyTorch's modules, and there is nothing of this package to measure.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import effkernels
from benchmarks.gpu_check import measure
from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.results import Results
from effkernels.bench import timing
from effkernels.bench.check import sample_model
from effkernels.bench.networks import model_size
from effkernels.ops.parity import judge

MODEL = "efficientnet_b0"
BATCHES = (32, 128)
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


def training(options: Options) -> str:
    """Gradients of a step, and its time."""
    options.needs_gpu()
    work = options.work("training")
    device = torch.device(options.device)
    size = 32 if options.smoke else model_size(MODEL)
    backends = measure.ours("depthwise_bn_act_gate", torch.bfloat16, device)
    results = Results(options)
    steps: dict[str, str | int] = {f"gradients by {name}": name for name in backends}
    steps |= {f"time of a step at batch {batch}": batch for batch in ((2,) if options.smoke else BATCHES)}
    for name, what in work.steps(steps, lambda step: 0.0 if options.smoke else 12.0):
        if isinstance(what, str):
            ok, error, limit = error_of(what, device, size)
            print(f"{name}: error {error:.1e}, limit {limit:.1e}", flush=True)
            if not ok:
                work.wrong(name, f"{name}: error {error:.1e}, limit {limit:.1e}")
            continue
        images = noise(what, size, device)
        contenders = {f"effkernels-{backend}": backend for backend in backends} | {"eager-channels-last": "reference"}
        runs = {}
        for contender, backend in contenders.items():
            step = step_of(network(torch.bfloat16, device), images, backend)
            runs[contender] = lambda number, step=step: step()
        results.restart()
        found = timing.time_in_turns(runs, device=device, warmup=2, rounds=_ROUNDS)
        rows = [
            timing.make_row(
                timing.summarise(samples), suite="training", case=f"{MODEL}@{size} with frozen norms",
                contender=contender, device=results.device_name, dtype="bfloat16", batch=what, date=results.date,
            )
            for contender, samples in found.items()
        ]  # fmt: skip
        results.add(rows)
        print(f"{name}: " + " | ".join(f"{row.contender} {row.median_us:.0f} us" for row in rows), flush=True)
    return work.end(f"gradients of {', '.join(backends)}; rows in {results.file.name}")


if __name__ == "__main__":
    sys.exit(run_part(training))

"""Part `train_steps`: the depthwise steps of a training block by the CUDA kernels and by PyTorch with cuDNN.

Forward is norm, activation and convolution, with the statistics of the result; backward is the gradient of the input,
of its norm's input and of the weight, from the gradient of what follows the norm of the result. The shapes are those of
EfficientNet-B0. Results are held against float64 by the rule of parity before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import effkernels
from benchmarks.gpu_check import measure
from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.results import Results
from effkernels.bench import op_calls, timing
from effkernels.ops import training_steps as steps
from effkernels.ops.call import OpCall
from effkernels.ops.parity import full_float32, judge
from effkernels.ops.reference import activate

MODEL, ACTIVATION = "efficientnet_b0", "silu"
BATCH = 128
_PARITY_IMAGES = 2
_ROUNDS = 5

Outputs = tuple[Tensor, ...]


@dataclass
class Step:
    """The tensors of a depthwise convolution between two norms; images are (N, H, W, C)."""

    t: Tensor
    z: Tensor
    g: Tensor
    weight: Tensor
    norm: steps.FoldedNorm
    z_norm: steps.FoldedNorm
    coefficients: steps.Coefficients
    stride: int
    padding: Sequence[int]

    @classmethod
    def of(cls, call: OpCall, batch: int, dtype: torch.dtype, device: torch.device) -> Step:
        """Return a step of this call with drawn tensors, rounded to the dtype."""
        generator = torch.Generator().manual_seed(0)
        c, height, width, kernel = call.channels, call.height, call.width, call.kernel[0]

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype).to(device)

        def vector() -> Tensor:
            return torch.randn(c, generator=generator).to(device)

        def norm() -> steps.FoldedNorm:
            return steps.make_norm(vector(), vector().abs() + 0.5, vector() * 0.3 + 1, vector(), 1e-3)

        pads = (sum(call.padding[:2]), sum(call.padding[2:]))
        plane = [
            (s + p - k) // call.stride + 1 for s, p, k in zip((height, width), pads, (kernel, kernel), strict=True)
        ]
        z, g = (draw(1, *plane, c).expand(batch, -1, -1, -1).contiguous() for _ in range(2))
        t = draw(1, height, width, c).expand(batch, -1, -1, -1).contiguous()
        coefficients = steps.Coefficients(vector(), vector() * 0.1, vector() * 0.1)
        return cls(
            t, z, g, draw(c, 1, kernel, kernel), norm(), norm(), coefficients, call.stride, tuple(call.padding)
        )  # fmt: skip

    def double(self) -> Step:
        """Return the same in float64."""
        images = (v.double() for v in (self.t, self.z, self.g, self.weight))
        norms = (type(n)(*(v.double() for v in n)) for n in (self.norm, self.z_norm, self.coefficients))
        return Step(*images, *norms, self.stride, self.padding)  # type: ignore[arg-type]

    def forward(self) -> Outputs:
        """Return the result and its statistics, by the kernels there are."""
        z, vectors = steps.depthwise(self.t, self.norm, ACTIVATION, self.weight, None, self.stride, self.padding, 1)
        return z, vectors[0], vectors[1]

    def backward(self) -> Outputs:
        """Return the gradients of the norm's result and of the weight, by the kernels there are."""
        found = steps.depthwise_backward(
            self.g, self.z, self.z_norm, ACTIVATION, None, None, self.coefficients, self.t, self.norm, ACTIVATION,
            self.weight, self.stride, self.padding, 1,
        )  # fmt: skip
        return found[:2]

    def _normed(self) -> Tensor:
        return ((self.t.float() - self.norm.mean) * self.norm.scale + self.norm.bias).to(self.t.dtype)

    def plain_forward(self) -> Outputs:
        """Return the same by PyTorch's operators in the dtype of the images."""
        y = steps._padded(activate(self._normed(), ACTIVATION), self.padding)
        z = F.conv2d(y, self.weight, None, self.stride, 0, 1, y.shape[1])
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        return steps.nhwc(z), mean.float(), var.float()

    def plain_backward(self) -> Outputs:
        """Return the same by PyTorch's operators in the dtype of the images."""
        dtype, normed = self.t.dtype, self._normed()
        z = ((self.z.float() - self.z_norm.mean) * self.z_norm.scale + self.z_norm.bias).to(dtype)
        dy = steps._activation_backward(self.g, z, ACTIVATION).float()
        alpha, beta, delta = self.coefficients
        dz = (alpha * dy + beta * (self.z.float() - self.z_norm.mean) + delta).to(dtype)
        y = steps._padded(activate(normed, ACTIVATION), self.padding)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            steps.nchw(dz), y, self.weight, None, [self.stride] * 2, [0, 0], [1, 1], False, [0, 0], y.shape[1],
            [True, True, False],
        )  # fmt: skip
        top, _, left, _ = self.padding
        dx = steps.nhwc(dx[:, :, top : top + self.t.shape[1], left : left + self.t.shape[2]])
        return steps._activation_backward(dx, normed, ACTIVATION), dweight.float()


DIRECTIONS: dict[str, tuple[Callable[[Step], Outputs], Callable[[Step], Outputs]]] = {
    "backward": (Step.backward, Step.plain_backward),
    "forward": (Step.forward, Step.plain_forward),
}


def bytes_of(direction: str, step: Step) -> int:
    """Bytes that a direction cannot avoid to move: each image once."""
    images = (step.t, step.z) if direction == "forward" else (step.t, step.t, step.z, step.g)
    return sum(image.nbytes for image in images)


def calls() -> list[OpCall]:
    """Return the depthwise convolutions of the network, those that move the most first."""
    found = [call for call in op_calls.calls_of(MODEL) if call.op.startswith("depthwise")]
    shapes = {(c.channels, c.height, c.width, c.kernel, c.stride): c for c in found}
    return sorted(shapes.values(), key=lambda call: -call.channels * call.height * call.width)


def error_of(direction: str, call: OpCall, dtype: torch.dtype, device: torch.device) -> tuple[bool, float, float]:
    """Return whether the kernels keep to the rule of parity, their error and its limit."""
    ours, plain = DIRECTIONS[direction]
    step = Step.of(call, _PARITY_IMAGES, dtype, device)
    with effkernels.backend("reference"):
        truth = ours(step.double())
    return judge(ours(step), plain(step), truth)


def train_steps(options: Options) -> str:
    """Parity and time of each direction at each shape."""
    options.needs_gpu()
    work = options.work("train_steps")
    torch.backends.cudnn.benchmark = True
    full_float32()
    device = torch.device(options.device)
    results = Results(options)
    bandwidth = measure.copy_bandwidth(device, 64 if options.smoke else 4096)
    chosen = calls()[-1:] if options.smoke else calls()
    batch = 2 if options.smoke else BATCH
    cases = {
        f"{direction} {call.channels}x{call.height}x{call.width} k{call.kernel[0]} s{call.stride}": (direction, call)
        for call in chosen
        for direction in DIRECTIONS
    }
    for name, (direction, call) in work.steps(cases, lambda case: 0.0 if options.smoke else 3.0):
        ok, error, limit = error_of(direction, call, torch.bfloat16, device)
        if not ok:
            work.wrong(name, f"{name}: error {error:.1e}, limit {limit:.1e}")
        ours, plain = DIRECTIONS[direction]
        step = Step.of(call, batch, torch.bfloat16, device)
        results.restart()
        found = timing.time_in_turns(
            {
                f"effkernels-{options.device}": lambda number, run=ours, step=step: run(step),
                "eager-channels-last": lambda number, run=plain, step=step: run(step),
            },
            device=device, warmup=2, rounds=_ROUNDS,
        )  # fmt: skip
        size = bytes_of(direction, step)
        rows = [
            timing.make_row(
                timing.summarise(samples), suite="train", case=f"depthwise {name}", contender=contender,
                device=results.device_name, dtype="bfloat16", batch=batch, date=results.date,
                rel_error=error if contender.startswith("effkernels") else None,
                floor_us=round(size / bandwidth, 3), bytes=size,
            )
            for contender, samples in found.items()
        ]  # fmt: skip
        results.add(rows)
        mine, theirs = (row.median_us for row in rows)
        print(
            f"{name}: {mine:.0f} us, {size / bandwidth / mine:.0%} of a copy, eager {theirs / mine:.2f}x; "
            f"error {error:.1e}, limit {limit:.1e}",
            flush=True,
        )
    return work.end(f"{len(cases)} steps; rows in {results.file.name}")


if __name__ == "__main__":
    sys.exit(run_part(train_steps))

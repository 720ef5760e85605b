"""Parity of the installed package on the machine it runs on: every operator and EfficientNet-B0 against float64.

The rule has no tuned constant. A result passes where its error against the float64 reference is at most twice the
error of PyTorch's own computation in the same dtype, plus one rounding of the output type. The error is measured in
two ways, as relative L2 norm and as largest deviation over largest value, and each must hold.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import effkernels
from effkernels import _library, ops
from effkernels.bench.samples import draw_weights_
from effkernels.models import EfficientNet
from effkernels.ops import backends, reference
from effkernels.ops.call import DEPTHWISE_OPS, OpCall, in_float64, run
from effkernels.ops.parity import judge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Finding:
    """One line of the check. ``ok`` is None if the backend cannot run it; then ``reason`` says why."""

    subject: str
    backend: str
    dtype: str
    ok: bool | None
    error: float | None = None
    limit: float | None = None
    reason: str = ""

    def line(self) -> str:
        """Return the finding as one line of text."""
        verdict = {True: "ok  ", False: "FAIL", None: "--  "}[self.ok]
        head = f"{verdict}  {self.backend:<9}  {self.dtype:<8}  {self.subject:<52}"
        if self.error is None:
            return f"{head}  {self.reason}".rstrip()
        return f"{head}  error {self.error:.1e}, limit {self.limit:.1e}"


def op_calls() -> Iterator[OpCall]:
    """Return a few shapes of every operator: a usual one, and odd channel counts, planes and paddings."""
    for shape, kernel, stride, padding in (
        ((2, 32, 28, 28), 3, 1, (1, 1, 1, 1)),
        ((1, 40, 13, 14), 5, 2, (1, 2, 2, 1)),
        ((3, 7, 7, 9), 3, 2, (0, 1, 0, 1)),
    ):
        for op in DEPTHWISE_OPS:
            yield OpCall.on(op, shape, kernel, stride=stride, padding=padding)
        yield OpCall.on("squeeze_excite_gate", shape[:2])
    for shape, out in (((2, 96, 14, 14), 24), ((1, 40, 7, 9), 7)):
        yield OpCall.on("pointwise_bn_act", shape, out_channels=out)
        yield OpCall.on("pointwise_bn_act", shape, out_channels=out, activation="identity", gated=True, residual=True)
        yield OpCall.on("pointwise_bn_act_pool", shape, out_channels=out)
    yield OpCall.on("expand_depthwise_squeeze", (2, 16, 28, 28), out_channels=96)
    yield OpCall.on("expand_depthwise_squeeze", (1, 24, 13, 14), 5, out_channels=40, stride=2)
    yield OpCall.on("mbconv", (2, 40, 14, 14), 5, out_channels=40, residual=True)
    yield OpCall.on("mbconv", (1, 24, 13, 14), out_channels=20, stride=2)
    yield OpCall.on("conv_bn_act", (1, 3, 65, 65), out_channels=32, stride=2)
    yield OpCall.on("conv_bn_act", (2, 8, 14, 14), out_channels=12, stride=2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_op(call: OpCall, backend: str, dtype: torch.dtype, device: torch.device) -> Finding:
    """Hold one operator on one backend against the rule."""
    arguments = call.arguments(dtype, device)
    try:
        with effkernels.backend(backend):
            result = run(ops, call.op, arguments)
    except Exception as error:  # whatever a kernel raises is a finding, and the other lines are still wanted
        return Finding(str(call), backend, _name(dtype), False, reason=f"raised {type(error).__name__}: {error}")
    plain = run(reference, call.op, arguments)
    truth = run(reference, call.op, in_float64(call.arguments(dtype)))
    ok, error_size, limit = judge(result, plain, truth)
    return Finding(str(call), backend, _name(dtype), ok, error_size, limit)


@functools.lru_cache(maxsize=2)
def sample_model(name: str, seed: int = 0) -> EfficientNet:
    """Return a float32 model on the CPU, in eval mode, with the random weights of `samples.draw_weights_`.

    The result is shared: do not change it.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = effkernels.create_model(name).eval()
        assert isinstance(model, EfficientNet)
        with effkernels.backend("reference"):
            draw_weights_(model, 3, 192)
    return model


def check_model(name: str, backend: str, dtype: torch.dtype, device: torch.device, img_size: int = 224) -> Finding:
    """Hold the logits of a whole model on one backend against the rule."""
    subject = f"{name} at {img_size}"
    model = copy.deepcopy(sample_model(name)).to(dtype)
    images = torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        try:
            with effkernels.backend(backend):
                result = model.to(device)(images.to(device))
        except Exception as error:  # as in check_op
            return Finding(subject, backend, _name(dtype), False, reason=f"raised {type(error).__name__}: {error}")
        with effkernels.backend("reference"):
            plain = model(images.to(device))
            # A deep network multiplies rounding errors by chance, so PyTorch's own error is that of its worse layout.
            twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            other = twin(images.to(device).contiguous(memory_format=torch.channels_last))
            truth = copy.deepcopy(model).cpu().double()(images.double())
    ok, error_size, limit = max((judge([result], [own], [truth]) for own in (plain, other)), key=lambda found: found[2])
    return Finding(subject, backend, _name(dtype), ok, error_size, limit)


def run_checks(device: torch.device) -> Iterator[Finding]:
    """Check every operator and EfficientNet-B0, in every dtype, on every backend with a kernel for the device."""
    if _library.load_error() is not None and _library.build_info():
        # Built but not loadable is a broken installation, and must not pass as "nothing to check".
        yield Finding("the compiled library", "-", "-", False, reason=_library.load_error() or "")
    can_run = {"cuda": backends.can_run_cuda, "triton": backends.can_run_triton, "cpu": backends.can_run_cpu}
    for backend, decide in can_run.items():
        decisions = {op: decide(op, device=device, dtype=torch.float32) for op in backends.OPERATORS}
        if not any(decision.ok for decision in decisions.values()):
            yield Finding("every operator", backend, "-", None, reason=next(iter(decisions.values())).reason)
            continue
        refused = {op: decision.reason for op, decision in decisions.items() if not decision.ok}
        for op, reason in refused.items():
            yield Finding(op, backend, "-", None, reason=reason)
        for call in op_calls():
            if call.op not in refused:
                for dtype in DTYPES:
                    yield check_op(call, backend, dtype, device)
        for dtype in DTYPES:
            # With operators missing, the model takes what the automatic choice gives it.
            yield check_model("efficientnet_b0", "auto" if refused else backend, dtype, device)

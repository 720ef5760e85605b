"""A KeyboardInterrupt leaves no lock held, no mode set, no recording open and no mixture of weights in an engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import THOROUGH
from engine_models import SIZE, images, small_network
from torch import Tensor, nn

from effkernels import _library, ops
from effkernels.engine import InferenceEngine
from effkernels.engine.cpu_recording import Recording

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60  # against hangs alone

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")


def modes() -> tuple[bool, bool, bool, int]:
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._len_torch_dispatch_stack(),
    )


class Interrupted(nn.Module):
    """Ends in an interrupt at a call whose number is set."""

    at = 0
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = ops.pointwise_bn_act(x, self.weight)
        Interrupted.calls += 1
        if Interrupted.calls == Interrupted.at:
            with torch.no_grad():
                raise KeyboardInterrupt
        return ops.pointwise_bn_act(y, self.weight).mean((2, 3))


@pytest.fixture(autouse=True)
def uninterrupted() -> None:
    Interrupted.at = Interrupted.calls = 0


def channels_last(count: int) -> Tensor:
    return torch.ones(count, 16, 24, 24).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("at", [1, 2])  # in the call before, and in the one that is recorded
def test_a_recording_ends_with_its_forward(at: int) -> None:
    model, x = Interrupted().eval(), channels_last(1)
    before = modes()
    Interrupted.at = at
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        Recording(model, x)
    assert modes() == before
    with torch.inference_mode():
        recorded = torch.ops.effkernels.cpu_recording()
        model(x)
        assert torch.ops.effkernels.cpu_recording_cut(recorded) == 0
        Recording(model, x).replay()


@pytest.mark.parametrize("at", range(1, 12))
def test_a_bucket_whose_making_is_interrupted_is_recorded_at_the_next_call(at: int) -> None:
    model, x = Interrupted().eval(), channels_last(3)
    served = InferenceEngine(model, batch_sizes=(1, 4), input_size=(16, 24, 24), optimize=False, warm_up=False)
    with torch.inference_mode():
        wanted = model(x)
    Interrupted.calls, Interrupted.at = 0, at
    before = modes()
    with torch.autocast("cpu", torch.bfloat16):
        inside = modes()
        try:
            served(x)
        except KeyboardInterrupt:
            pass
        else:
            assert Interrupted.calls < at, "it went on through the interrupt"
        assert modes() == inside
    assert modes() == before
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(served, x).result(PATIENCE_S), wanted)
    assert {bucket.runner for bucket in served.report.buckets} <= {"recorded", "not prepared"}


@pytest.mark.parametrize("step", ["new_weights", "torch._foreach_copy_"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_refresh_leaves_old_or_new_weights(
    step: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_network(classes=0)
    served = InferenceEngine(model, batch_sizes=(1, 2, 4), input_size=SIZE)
    inputs = [images(count, seed=count) for count in (1, 2, 4)]
    old = [served(x) for x in inputs]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    with torch.inference_mode():
        new = [model(x) for x in inputs]
    name = f"effkernels.engine.prepared.{step}"
    real: Callable[..., Any] = (
        torch._foreach_copy_ if "copy" in step else sys.modules["effkernels.engine.prepared"].new_weights
    )

    def interrupted(*arguments: Any) -> Any:
        if when == "after":
            real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            served.refresh()
    wanted = new if (step, when) == ("torch._foreach_copy_", "after") else old
    assert all(map(torch.equal, map(served, inputs), wanted))
    served.refresh()
    assert all(map(torch.equal, map(served, inputs), new))


def test_a_short_soak() -> None:
    """Load, malformed requests, refreshes and random interrupts; `make soak` runs longer."""
    command = [sys.executable, "-m", "benchmarks.soak", "--seconds", "6" if THOROUGH else "4", "--seed", "0", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    report = json.loads(done.stdout)
    assert {kind: counted for kind, counted in report.items() if counted["failures"]} == {}
    assert done.returncode == 0
    for kind in ("call of a batch", "submitted image", "malformed request", "refresh", "interrupt"):
        assert report[kind]["attempts"] >= 1, kind

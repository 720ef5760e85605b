"""`make soak`: an engine under load for a bounded time, every answer held against the plain model.

    python -m benchmarks.soak --seconds 60 --seed 0

Two parts, each half of the time:

* traffic: many threads call, submit, cancel and ask for reports, a part of the requests is malformed, and weights are
  taken over meanwhile, some of them from models that cannot be taken over;
* interrupts: a child process makes engines, calls them, submits and refreshes while KeyboardInterrupt hits its main
  thread at random moments; at its end nothing may be locked, recorded or left in another mode, and nothing leaked.

Every class of attempts is counted with its failures, and the seed gives the same requests again (not the same order of
threads). The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import effkernels
from effkernels import ops
from effkernels.engine import InferenceEngine, QueueFull

SIZE = 32
IMAGES = 24
CALLERS = 12
PATIENCE_S = 60.0  # for one answer; against hangs alone
LEAST_SECONDS = 2.0


class Tally:
    """Attempts and failures by class, from many threads."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._lock = threading.Lock()

    def note(self, kind: str, failure: str = "") -> None:
        """One attempt, and what was wrong with it."""
        with self._lock:
            self.attempts[kind] += 1
            if failure:
                self.failures[kind] += 1
                self.examples.setdefault(kind, failure)

    @contextlib.contextmanager
    def attempt(self, kind: str) -> Iterator[None]:
        """One attempt, failed where the block raises."""
        try:
            yield
        except Exception as error:
            self.note(kind, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            self.note(kind)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """By class: attempts, failures and the first failure in words."""
        return {
            kind: {
                "attempts": count,
                "failures": self.failures[kind],
                **({"first": self.examples[kind]} if kind in self.examples else {}),
            }
            for kind, count in sorted(self.attempts.items())
        }


def network(seed: int) -> nn.Module:
    """EfficientNet-B0 without classifier, whose CPU kernels give the same bits at any batch size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return effkernels.create_model("efficientnet_b0", num_classes=0).eval()


def changed(model: nn.Module) -> nn.Module:
    """Return the same network with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    return other


def broken_sources(model: nn.Module) -> list[nn.Module]:
    """Networks that an engine of `model` must not take over."""
    sources = []
    for replace in (
        lambda weight: weight.to("meta"),
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to(torch.complex64),
        lambda weight: torch.zeros(3),
    ):
        source = copy.deepcopy(model)
        norms = [module for module in source.modules() if isinstance(module, nn.BatchNorm2d)]
        norms[-1].running_mean = replace(norms[-1].running_mean)  # the last: what comes before would be written
        sources.append(source)
    return sources


def bad_requests() -> list[Any]:
    """Return what `submit` must refuse, each on its own."""
    import PIL.Image

    encoded = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 50.0).convert("RGB").save(encoded, "JPEG")
    image = torch.zeros(3, SIZE, SIZE)
    return [
        image.to_sparse(),
        image.to_mkldnn(),
        image.to("meta"),
        image[:2],
        image[None],
        image.long(),
        image.to(torch.complex64),
        torch.quantize_per_tensor(image, 1.0, 0, torch.quint8),
        torch.zeros(1, 1, 3, dtype=torch.uint8).expand(1 << 18, 1 << 18, 3),
        torch.zeros(0, 4, 3, dtype=torch.uint8),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        PIL.Image.open(io.BytesIO(encoded.getvalue()[: len(encoded.getvalue()) // 2])),
        "image.png",
        None,
        object(),
    ]


# ------------------------------------------------------------------------------------------------------------- traffic


class Traffic:
    """An engine, its callers, and who changes its weights."""

    def __init__(self, seed: int, tally: Tally) -> None:
        self.tally = tally
        self.seed = seed
        self.models = [network(seed)]
        self.models.append(changed(self.models[0]))
        self.broken = broken_sources(self.models[0])
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
        with torch.inference_mode():
            self.wanted = [model(self.images) for model in self.models]
        self.bad = bad_requests()
        self.engine = InferenceEngine(
            self.models[0], batch_sizes=(1, 4, 8), input_size=SIZE, max_latency_ms=1.0, max_queue=64
        )

    def run(self, seconds: float) -> None:
        """Have all threads at work for that long, then look at what is left."""
        until = time.monotonic() + seconds
        jobs: list[Callable[[random.Random], None]] = [self.call, self.submit, self.submit_bad, self.cancel, self.look]
        weights = [3, 8, 3, 1, 1]

        def caller(number: int) -> None:
            chance = random.Random(self.seed * 1000 + number)
            while time.monotonic() < until:
                chance.choices(jobs, weights)[0](chance)

        def refresher() -> None:
            chance = random.Random(self.seed)
            while time.monotonic() < until:
                self.refresh(chance)
                time.sleep(0.1)

        threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(CALLERS)]
        threads.append(threading.Thread(target=refresher, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()) + 2 * PATIENCE_S)
            self.tally.note("thread ends", "it hangs" if thread.is_alive() else "")
        self.engine.close()
        stats = self.engine.stats()
        answered = stats.completed + stats.failed + stats.cancelled
        self.tally.note(
            "every request is answered", "" if stats.pending == 0 == stats.requests - answered else str(stats)
        )

    def call(self, chance: random.Random) -> None:
        """A batch, whose rows all have to come from the same weights."""
        rows = [chance.randrange(IMAGES) for _ in range(chance.randint(1, 11))]
        with self.tally.attempt("call of a batch"):
            found = self.engine(self.images[rows])
            if not any(torch.equal(found, wanted[rows]) for wanted in self.wanted):
                raise AssertionError("another result than the plain model's")

    def submit(self, chance: random.Random) -> None:
        """One image."""
        row = chance.randrange(IMAGES)
        with self.tally.attempt("submitted image"):
            found = self._submitted(self.images[row]).result(PATIENCE_S)
            if not any(torch.equal(found, wanted[row]) for wanted in self.wanted):
                raise AssertionError("another result than the plain model's")

    def submit_bad(self, chance: random.Random) -> None:
        """Submit what is no image: it fails, with its own exception."""
        futures = [self._submitted(chance.choice(self.bad)) for _ in range(2)]
        with self.tally.attempt("malformed request"):
            errors = [future.exception(PATIENCE_S) for future in futures]
            if None in errors or errors[0] is errors[1]:
                raise AssertionError(f"{errors}")
            if not all(isinstance(error, (TypeError, ValueError, OSError)) for error in errors):
                raise AssertionError(f"{errors}")

    def cancel(self, chance: random.Random) -> None:
        """An image that is not wanted any more: no answer, or the right one."""
        row = chance.randrange(IMAGES)
        future = self._submitted(self.images[row])
        future.cancel()
        with self.tally.attempt("cancelled image"), contextlib.suppress(CancelledError):
            found = future.result(PATIENCE_S)
            if not any(torch.equal(found, wanted[row]) for wanted in self.wanted):
                raise AssertionError("another result than the plain model's")

    def look(self, chance: random.Random) -> None:
        """The report, the memory and the statistics while buckets come and go."""
        with self.tally.attempt("report"):
            self.engine.report.to_json()
            self.engine.stats()
            if self.engine.memory_bound_bytes <= 0:
                raise AssertionError(f"{self.engine.memory_bound_bytes}")

    def refresh(self, chance: random.Random) -> None:
        """New weights, some of which are refused as a whole."""
        if chance.random() < 0.5:
            with self.tally.attempt("refresh"):
                self.engine.refresh(chance.choice(self.models))
            return
        with self.tally.attempt("broken refresh is refused"):
            try:
                self.engine.refresh(chance.choice(self.broken))
            except ValueError:
                return
            raise AssertionError("it was taken over")

    def _submitted(self, image: Any) -> Future[Any]:
        while True:
            try:
                return self.engine.submit(image, block=True)
            except QueueFull:
                continue


# ---------------------------------------------------------------------------------------------------------- interrupts


class Small(nn.Module):
    """Two fused convolutions and an operator of PyTorch between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.eye(16).view(16, 16, 1, 1))
        self.second = nn.Parameter(torch.eye(16).view(16, 16, 1, 1) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """See `torch.nn.Module.forward`."""
        y = ops.pointwise_bn_act(x, self.first).relu()
        return ops.pointwise_bn_act(y, self.second).mean((2, 3))


def interrupted(seconds: float, seed: int, tally: Tally) -> None:
    """Run the child process: work under interrupts, then check the state that is left."""
    chance = random.Random(seed)
    model = Small().eval()
    x = torch.randn(5, 16, 24, 24, generator=torch.Generator().manual_seed(seed))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        wanted = model(x)

    def made() -> InferenceEngine:
        return InferenceEngine(model, batch_sizes=(1, 4), input_size=(16, 24, 24), optimize=False, max_queue=8)

    def plain() -> Tensor:
        with torch.inference_mode():
            return model(x)

    engine = made()
    jobs: list[Callable[[], Any]] = [
        lambda: engine(x),
        lambda: torch.stack([future.result() for future in [engine.submit(image, block=True) for image in x]]),
        lambda: engine.refresh(),
        lambda: made()(x),
        plain,
        lambda: engine.report,
    ]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupts = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            job = chance.choice(jobs)
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 0.02))
            with tally.attempt("work under interrupts"):
                found = job()
                if isinstance(found, Tensor) and not torch.equal(found, wanted):
                    raise AssertionError("another result")
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupts += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    tally.attempts["interrupt"] += interrupts

    faulthandler.dump_traceback_later(PATIENCE_S, exit=True)  # a hang ends the child, which its parent counts
    with tally.attempt("queue answers after the interrupts"):
        for image, answer in zip(x, wanted, strict=True):
            if not torch.equal(engine.submit(image, block=True).result(PATIENCE_S), answer):
                raise AssertionError("another result")
    with tally.attempt("engine is free for other threads"):
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(engine(x)), daemon=True)
        thread.start()
        thread.join(PATIENCE_S / 2)
        if not results or not torch.equal(results[0], wanted):
            raise AssertionError("it hangs" if thread.is_alive() else "another result")
    with tally.attempt("modes of the main thread are as they were"):
        modes = (
            torch.is_inference_mode_enabled(),
            not torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch._C._len_torch_dispatch_stack(),
        )
        if any(modes):
            raise AssertionError(f"(inference, no_grad, autocast, dispatch modes) are {modes}")
    with tally.attempt("new engine is recorded"):
        kinds = {bucket.runner for bucket in made().report.buckets}
        if kinds != {"recorded"}:
            raise AssertionError(f"{kinds}")
    with tally.attempt("plain forward leaks nothing"):
        plain()
        before = _resident_bytes()
        for _ in range(300):
            plain()
        if _resident_bytes() - before > 8 << 20:
            raise AssertionError(f"{(_resident_bytes() - before) / 1e6:.0f} MB in 300 forwards")
    with tally.attempt("engine closes"):
        engine.close()
    faulthandler.cancel_dump_traceback_later()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def interrupts_in_children(seconds: float, seed: int, tally: Tally) -> None:
    """Run `interrupted` in processes of some ten seconds each."""
    children = max(1, round(seconds / 10))
    for number in range(children):
        command = [sys.executable, str(Path(__file__).resolve()), "--child", "--json"]
        command += ["--seconds", str(seconds / children), "--seed", str(seed + number)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 3 * PATIENCE_S, check=False)
        lines = done.stdout.splitlines()
        tally.note("child process ends", "" if lines else f"status {done.returncode}: {done.stderr[-300:]}")
        for kind, counted in (json.loads(lines[-1]) if lines else {}).items():
            tally.attempts[kind] += counted["attempts"]
            tally.failures[kind] += counted["failures"]
            if "first" in counted:
                tally.examples.setdefault(kind, counted["first"])


# ------------------------------------------------------------------------------------------------------------- command


def soak(seconds: float, seed: int) -> Tally:
    """Both parts, within about that time."""
    tally = Tally()
    Traffic(seed, tally).run(seconds / 2)
    interrupts_in_children(seconds / 2, seed, tally)
    return tally


def main(arguments: list[str] | None = None) -> int:
    """Run it and print the table of attempts and failures."""
    parser = argparse.ArgumentParser(description="Load an engine for a while and compare every answer.")
    parser.add_argument("--seconds", type=float, default=60.0, help=f"how long, at least {LEAST_SECONDS:.0f}")
    parser.add_argument("--seed", type=int, default=0, help="of images, requests and moments of interrupts")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if not LEAST_SECONDS <= parsed.seconds < 1e6:
        parser.error(f"--seconds {parsed.seconds}: allowed: {LEAST_SECONDS:.0f} to a million")
    if parsed.child:
        tally = Tally()
        interrupted(parsed.seconds, parsed.seed, tally)
    else:
        tally = soak(parsed.seconds, parsed.seed)
    report = tally.to_dict()
    if parsed.json:
        print(json.dumps(report))
    else:
        for kind, counted in report.items():
            first = f"  {counted['first']}" if "first" in counted else ""
            print(f"{kind:45} {counted['attempts']:9} attempts {counted['failures']:7} failures{first}")
    return 1 if any(tally.failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""The tuned plan of a device: what `effkernels tune` measured there, and how calls look it up.

One JSON file for each kind of device, release of this package and release of Triton, in `folder()`, says two things:

* how Triton kernels cut their work, by operator, dtype and shape, where another of a family's candidates was faster
  than what its pure function chooses;
* which of the backends was faster, by what `effkernels.ops.backends.choose` may depend on.

Without a file the pure functions decide, and nothing is measured at anybody's first call. A file is read once in a
process, by the first call that could use it. One that is broken, of something else or older is left alone, with one
warning that names it. An entry that is no candidate of its family is left alone too, so that a file can slow a call
down, but never make it wrong.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from effkernels import environment, triton
from effkernels._version import __version__
from effkernels.files import parse_json, read_text, write_text

SCHEMA = 2  # of the file; higher with every change that an older reader would misunderstand
VARIABLE = "EFFKERNELS_CACHE"
EVEN = "even"  # neither of two backends is faster by more than the noise

_INTERPRETER = "triton interpreter"  # the device of a process where Triton interprets its kernels

Choice = TypeVar("Choice", bound=tuple[int, ...])


class ConfigurationKey(NamedTuple):
    """The key of a Triton configuration; `shape` has the sizes that its family passes, in its order."""

    op: str
    dtype: str
    shape: tuple[int, ...]


class BackendKey(NamedTuple):
    """The key of a choice of backend: all that `effkernels.ops.backends.choose` may depend on, never batch or plane."""

    op: str
    dtype: str
    channels: int | None
    kernel_size: tuple[int, int] | None
    stride: int
    activation: str


@dataclass(frozen=True)
class Configuration:
    """The fastest candidate of one shape; `choice` is None where the default was not beaten. Times of a launch."""

    choice: tuple[int, ...] | None
    default_us: float
    chosen_us: float


@dataclass(frozen=True)
class Comparison:
    """The backends on one call.

    Attributes:
        faster: the backend that was faster by more than the noise, or `EVEN`.
        times_us: of a call, by backend.
    """

    faster: str
    times_us: Mapping[str, float]


@dataclass
class TunedPlan:
    """The tuned plans of one device.

    Attributes:
        device: its name.
        configurations: of Triton kernels.
        comparisons: of backends; for each key by the call in words, as one key stands for calls of many sizes.
    """

    device: str
    configurations: dict[ConfigurationKey, Configuration] = field(default_factory=dict)
    comparisons: dict[BackendKey, dict[str, Comparison]] = field(default_factory=dict)

    def faster_backends(self) -> dict[BackendKey, str]:
        """Return the backend that was faster on some call of a key and slower on none, where there is one."""
        found = {}
        for key, calls in self.comparisons.items():
            winners = {comparison.faster for comparison in calls.values()} - {EVEN}
            if len(winners) == 1:
                (found[key],) = winners
        return found

    def add(self, newer: TunedPlan) -> None:
        """Take over everything in `newer`, over what is known so far."""
        self.configurations |= newer.configurations
        for key, calls in newer.comparisons.items():
            self.comparisons[key] = {**self.comparisons.get(key, {}), **calls}

    def to_json(self) -> str:
        """Write the plan as text: one entry a line, in a fixed order."""
        configurations = [
            {**key._asdict(), "choice": found.choice, "default_us": found.default_us, "chosen_us": found.chosen_us}
            for key, found in sorted(self.configurations.items())
        ]
        comparisons = [
            {**key._asdict(), "call": call, "faster": found.faster, "times_us": dict(found.times_us)}
            for key, calls in sorted(self.comparisons.items(), key=lambda item: repr(item[0]))
            for call, found in sorted(calls.items())
        ]
        lists = ",\n".join(
            f' "{name}": [' + ",".join(f"\n  {json.dumps(entry, allow_nan=False)}" for entry in entries) + "\n ]"
            for name, entries in (("configurations", configurations), ("comparisons", comparisons))
        )
        of = {**_versions(), "device": self.device}
        head = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in of.items())
        return f"{{\n{head},\n{lists}\n}}\n"

    @classmethod
    def from_json(cls, text: str, device: str) -> TunedPlan:
        """Read the plan that `to_json` wrote.

        Raises:
            ValueError: it is no such plan, or that of another device, release or schema.
        """
        report = parse_json(text)
        if not isinstance(report, dict):
            raise ValueError("not a tuned plan")
        for name, wanted in {**_versions(), "device": device}.items():
            if report.get(name) != wanted:
                raise ValueError(f"its {name} is {report.get(name)!r} and not {wanted!r}")
        plan = cls(device)
        try:
            for entry in report["configurations"]:
                key = ConfigurationKey(str(entry["op"]), str(entry["dtype"]), _integers(entry["shape"]))
                choice = None if entry["choice"] is None else _integers(entry["choice"])
                plan.configurations[key] = Configuration(choice, float(entry["default_us"]), float(entry["chosen_us"]))
            for entry in report["comparisons"]:
                backend_key = BackendKey(*(entry[name] for name in BackendKey._fields))
                if backend_key.kernel_size is not None:
                    height, width = _integers(entry["kernel_size"])
                    backend_key = backend_key._replace(kernel_size=(height, width))
                times = {str(name): float(us) for name, us in entry["times_us"].items()}
                calls = plan.comparisons.setdefault(backend_key, {})
                calls[str(entry["call"])] = Comparison(str(entry["faster"]), times)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"an entry is not as it should be: {error!r}") from error
        return plan


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError(f"{values!r} is no list of whole numbers")
    return tuple(values)


@cache
def _versions() -> dict[str, Any]:
    return {"schema": SCHEMA, "effkernels": __version__, "triton": environment.installed_version("triton")}


# ------------------------------------------------------------------------------------------------------------ the files


def folder() -> Path:
    """Return the folder of the tuned plans: $EFFKERNELS_CACHE, or effkernels in the user's cache folder."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effkernels"


def device_name(device: torch.device) -> str | None:
    """Return the name that plans of a device go by; None where Triton runs nothing."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return _INTERPRETER if device.type == "cpu" and triton.INTERPRETED else None


def file_of(device: str) -> Path:
    """Return the file of a device's plan, whether it is there or not."""
    versions = "-".join(f"{name}-{version}" for name, version in _versions().items())
    return folder() / f"{environment.file_stem(device)}-{re.sub(r'[^A-Za-z0-9.-]', '-', versions)}.json"


def outdated_files(device: str) -> list[Path]:
    """Return the plans of a device that other releases of this package or of Triton wrote."""
    found = folder().glob(f"{environment.file_stem(device)}-schema-*-effkernels-*-triton-*.json")
    return sorted(file for file in found if file != file_of(device))


def read(device: str) -> TunedPlan:
    """Read the plan of a device; an empty one, with a warning where there is a file, if none can be used."""
    file = file_of(device)
    try:
        return TunedPlan.from_json(read_text(file), device)
    except FileNotFoundError:
        for other in outdated_files(device)[:1]:
            _warn(f"{other} is not of this release; `effkernels tune` makes another", other)
    except (OSError, ValueError) as error:
        _warn(f"{file} is ignored: {' '.join(str(error).split())}; `effkernels tune --clear` removes it", file)
    return TunedPlan(device)


def record(plan: TunedPlan) -> Path:
    """Add a plan to its file, which others may be adding to, and which is never seen half written."""
    file = file_of(plan.device)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        merged = TunedPlan(plan.device)
        if file.exists():
            merged = read(plan.device)
        merged.add(plan)
        _replace(file, merged.to_json())
    return file


def _replace(file: Path, text: str) -> None:
    """Write a file anew, with the lock of `_locked` held, and remove what writers left that were killed."""
    for leftover in file.parent.glob(f".{glob.escape(file.stem[:40])}-*.part{glob.escape(file.suffix)}"):
        leftover.unlink(missing_ok=True)
    write_text(file, text, follow_links=False)


def clear(device: str) -> list[Path]:
    """Remove the plan of a device and those of other releases; returns the files that were there."""
    found = [file for file in (file_of(device), *outdated_files(device)) if file.exists()]
    for file in found:
        with _locked(file):
            file.unlink(missing_ok=True)
    return found


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Nobody else who asks for the lock of this file gets on before the block ends.

    Raises:
        OSError: the lock's file cannot be made, or is a symbolic link, which is not followed.
    """
    lock = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


_warned: set[Path] = set()


def _warn(message: str, file: Path) -> None:
    if file not in _warned:
        _warned.add(file)
        warnings.warn(f"effkernels: {message}", RuntimeWarning, stacklevel=3)


# --------------------------------------------------------------------------------------------------------- the look-ups


class Lookup(NamedTuple):
    """A Triton kernel's question: how is the work of this shape to be cut? The first candidate is the default."""

    key: ConfigurationKey
    candidates: tuple[tuple[int, ...], ...]


Answer = Callable[[Lookup], "tuple[int, ...] | None"]


@dataclass
class _Known:
    """The configurations of one device: as read, and those that have been found to be candidates."""

    device: str = ""
    read: Mapping[ConfigurationKey, Configuration] = field(default_factory=dict)
    checked: dict[ConfigurationKey, Any] = field(default_factory=dict)


_known: dict[torch.device, _Known] = {}
_answer: Answer | None = None


def configuration(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    candidates: Callable[[], Sequence[Choice]],
) -> Choice | None:
    """Return the candidate that was fastest for a shape; None where nothing is known, which means the default.

    Args:
        candidates: gives all that the family allows for the shape, the default first; called at most once for each.
    """
    if _answer is not None:
        given = tuple(candidates())
        answer = _answer(Lookup(ConfigurationKey(op, _name(dtype), shape), given))
        return next((one for one in given if one == answer), None)
    known = _known.get(device)
    if known is None:
        known = _known[device] = _read_known(device)
    if not known.read:
        return None
    key = ConfigurationKey(op, _name(dtype), shape)
    if key not in known.checked:
        known.checked[key] = _check(known, key, candidates())
    found: Choice | None = known.checked[key]
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_known(device: torch.device) -> _Known:
    name = device_name(device)
    return _Known() if name is None else _Known(name, read(name).configurations)


def _check(known: _Known, key: ConfigurationKey, candidates: Sequence[Choice]) -> Choice | None:
    stored = known.read.get(key)
    if stored is None or stored.choice is None:
        return None
    found = next((one for one in candidates if tuple(one) == stored.choice), None)
    if found is None:
        file = file_of(known.device)
        _warn(f"{file}: {stored.choice} is no candidate of {key.op} {key.shape}; `effkernels tune --force`", file)
    return found


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Let `answer` decide every look-up inside the block, in place of the file; None means the default."""
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


def forget() -> None:
    """Read the files anew, and warn anew, from the next call on."""
    _known.clear()
    _warned.clear()

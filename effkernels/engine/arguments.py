"""The arguments of `InferenceEngine`, checked before anything is done with them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEMORY_FORMATS = (torch.channels_last, torch.contiguous_format)
LONGEST_LATENCY_MS = 86_400_000.0  # a day
_MOST_ELEMENTS = 1 << 46  # of a bucket's input: more than any machine's memory; sizes beyond overflow in PyTorch


def check_dtype(dtype: Any) -> torch.dtype:
    """Return the dtype of weights and inputs.

    Raises:
        TypeError: no dtype.
        ValueError: another one than `DTYPES`.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"InferenceEngine: dtype={dtype!r}; allowed: torch.dtype")
    if dtype not in DTYPES:
        allowed = ", ".join(map(str, DTYPES))
        raise ValueError(f"InferenceEngine: dtype={dtype}; allowed: {allowed}")
    return dtype


def check_memory_format(memory_format: Any) -> torch.memory_format:
    """Return the memory format of weights and inputs.

    Raises:
        ValueError: another one than `MEMORY_FORMATS`.
    """
    if not isinstance(memory_format, torch.memory_format) or memory_format not in MEMORY_FORMATS:
        allowed = ", ".join(map(str, MEMORY_FORMATS))
        raise ValueError(f"InferenceEngine: memory_format={memory_format}; allowed: {allowed}")
    return memory_format


def check_device(device: Any) -> torch.device:
    """Return a device from its name.

    Raises:
        TypeError: no device and no text.
        ValueError: PyTorch knows no such device.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"InferenceEngine: device={device!r}; allowed: torch.device, or text such as 'cpu'")
    try:
        return torch.device(device)
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"InferenceEngine: device={device!r}: {first}") from error


def check_flags(**flags: Any) -> None:
    """Refuse what is neither True nor False: "false" would be true.

    Raises:
        TypeError: names the argument.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"InferenceEngine: {name}={value!r}; allowed: True, False")


def check_latency(max_latency_ms: Any) -> float:
    """Return `max_latency_ms` as a number.

    Raises:
        TypeError: no number.
        ValueError: negative, infinite, NaN or longer than a day.
    """
    if isinstance(max_latency_ms, bool) or not isinstance(max_latency_ms, (int, float)):
        raise TypeError(f"InferenceEngine: max_latency_ms={max_latency_ms!r}; allowed: a number of milliseconds")
    if not 0 <= max_latency_ms <= LONGEST_LATENCY_MS:  # NaN is not, either
        raise ValueError(
            f"InferenceEngine: max_latency_ms={max_latency_ms}; allowed: 0 to {LONGEST_LATENCY_MS:.0f} (a day)"
        )
    return float(max_latency_ms)


def check_count(name: str, value: Any) -> int:
    """Return a whole number from 1.

    Raises:
        TypeError: no int.
        ValueError: below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"InferenceEngine: {name}={value!r}; allowed: int")
    if value < 1:
        raise ValueError(f"InferenceEngine: {name}={value}; allowed: at least 1")
    return value


def check_threads(threads: Any, device: torch.device) -> tuple[int, tuple[int, ...] | None] | None:
    """Return (number of threads, the cores that they run on or None); None if nothing is asked for.

    Raises:
        TypeError: neither int nor several of int.
        ValueError: below 1, cores that this process may not use or are named twice, cores where the system pins no
            threads, or a device that is not the CPU.
    """
    if threads is None:
        return None
    given = f"InferenceEngine: threads={threads!r}"
    cores = None
    if isinstance(threads, Iterable) and not isinstance(threads, (str, bytes)):
        cores = tuple(threads)
    numbers = (threads,) if cores is None else cores
    if any(isinstance(one, bool) or not isinstance(one, int) for one in numbers):
        raise TypeError(f"{given}; allowed: None, int, or the numbers of cores, such as (0, 1)")
    if device.type != "cpu":
        raise ValueError(f"{given} on device={device}; allowed there: None")
    if cores is None:
        if threads < 1:
            raise ValueError(f"{given}; allowed: at least 1, or the numbers of cores")
        return threads, None
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError(f"{given}; this system pins no threads; allowed: a number of threads")
    usable = os.sched_getaffinity(0)
    if not cores or len(set(cores)) != len(cores) or not usable.issuperset(cores):
        allowed = ", ".join(map(str, sorted(usable)))
        raise ValueError(f"{given}; allowed: one or more cores of this process, each once: {allowed}")
    return len(cores), cores


def check_iterable(batch_sizes: Any) -> Iterable[Any]:
    """Return `batch_sizes` as a sequence.

    Raises:
        TypeError: a number or another single object, or text.
    """
    if isinstance(batch_sizes, (str, bytes)) or not isinstance(batch_sizes, Iterable):
        raise TypeError(f"InferenceEngine: batch_sizes={batch_sizes!r}; allowed: several of int, such as (1, 4, 16)")
    return batch_sizes


def check_elements(sizes: tuple[int, ...], input_size: tuple[int, int, int]) -> None:
    """Refuse a bucket whose input no memory holds.

    Raises:
        ValueError: names both arguments.
    """
    if sizes[-1] * math.prod(input_size) > _MOST_ELEMENTS:
        raise ValueError(
            f"InferenceEngine: batch_sizes={sizes} of input_size={input_size}: the largest has more than "
            f"{_MOST_ELEMENTS} numbers; allowed: what fits into memory"
        )

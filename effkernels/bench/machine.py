"""What else the machine did during a measurement: load and clock of a CPU, clocks and throttling of a GPU.

Everything is optional: what the system does not report is absent from the result. A GPU is asked through NVML if the
module `pynvml` is installed (package nvidia-ml-py).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Bits of NVML's reasons for a clock below the highest one. Being idle and a clock that somebody set are none.
_THROTTLING = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def cpu_mhz(root: Path = Path("/")) -> float | None:
    """Return the mean clock of the processors in MHz: of /sys (cpufreq), else of /proc/cpuinfo; None: not reported."""
    clocks = []
    for file in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"):
        with contextlib.suppress(OSError, ValueError):
            clocks.append(int(file.read_text(encoding="ascii")) / 1e3)
    if not clocks:
        with contextlib.suppress(OSError):
            text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([0-9.]+)", text, re.MULTILINE)]
    return sum(clocks) / len(clocks) if clocks else None


def cpu_state(root: Path = Path("/")) -> dict[str, float]:
    """Return `load`, the processes that ran or waited in the last minute, and `cpu_mhz`; each if it is reported."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError, AttributeError):
        found["load"] = round(os.getloadavg()[0], 2)
    clock = cpu_mhz(root)
    if clock is not None:
        found["cpu_mhz"] = round(clock)
    return found


def gpu_state(device: torch.device, nvml: Any) -> tuple[dict[str, float], set[str]]:
    """Return clocks, temperature and power of a GPU, and why its clock is held back; what NVML refuses is absent."""
    found: dict[str, float] = {}
    reasons: set[str] = set()
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        read: dict[str, Callable[[], float]] = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        }
        for name, value in read.items():
            with contextlib.suppress(nvml.NVMLError, AttributeError):
                found[name] = round(value())
        # NVML calls them event reasons since its version 12, and throttle reasons before.
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        ask = ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            bits = ask(handle)
            reasons = {reason for bit, reason in _THROTTLING.items() if bits & bit}
    return found, reasons


def load_nvml() -> Any:
    """Return the module `pynvml`, ready to be asked; None if it is not installed or finds no driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


class Watch:
    """The state of a machine at several moments of a measurement."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml = load_nvml() if device.type == "cuda" else None
        self._values: dict[str, list[float]] = {}
        self._reasons: set[str] = set()
        self._reports_reasons = False

    def sample(self) -> None:
        """Note the state now. Between turns of a GPU this may be called often: it takes a millisecond."""
        if self._device.type == "cpu":
            state = cpu_state()
        elif self._nvml is not None:
            state, reasons = gpu_state(self._device, self._nvml)
            self._reasons |= reasons
            self._reports_reasons = True
        else:
            return
        for name, value in state.items():
            self._values.setdefault(name, []).append(value)

    def summary(self) -> dict[str, Any] | None:
        """Return [lowest, highest] of each value, and the reasons of throttling; None if nothing was reported."""
        found: dict[str, Any] = {name: [min(values), max(values)] for name, values in self._values.items()}
        if self._reports_reasons:
            found["throttled"] = sorted(self._reasons)
        return found or None

"""The table of times by layer: its floors count what the network computes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effkernels
from benchmarks.cpu_layers import Rates, table, timed


def test_the_layers_count_the_multiply_adds_of_the_network(compiled: None) -> None:
    layers = timed("efficientnet_b0", torch.float32, batch=1, rounds=1)
    assert all(seconds > 0 for _, seconds in layers)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        effkernels.create_model("efficientnet_b0").eval()(torch.randn(1, 3, 224, 224))
    classifier = 1280 * 1000  # PyTorch's, which is not among the recorded kernels
    counted = sum(sum(layer.multiply_adds()) for layer, _ in layers) + classifier
    assert counted == counter.get_total_flops() // 2
    rows = table(layers, Rates(1e11, 1e11, 1e11))
    assert rows[-1].startswith(f"| all | {len(layers)} |")


def test_times_need_a_round(compiled: None) -> None:
    with pytest.raises(RuntimeError, match="rounds=0 of cpu_recording_times; allowed: 1 or more"):
        timed("efficientnet_b0", torch.float32, batch=1, rounds=0)

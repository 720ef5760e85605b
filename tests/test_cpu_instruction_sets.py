"""The instruction set of the CPU kernels: the widest that the processor has, and sums in bfloat16 of any length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import may_use_tiles
from parity import assert_parity

import effkernels
from effkernels import _library

CPU_FLAGS = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPU_FLAGS.exists(), reason="the processor's features are read from /proc/cpuinfo")
def test_the_widest_instruction_set_is_chosen(compiled: None) -> None:
    flags = set(CPU_FLAGS.read_text(encoding="utf-8").split())
    chosen = torch.ops.effkernels.cpu_isa("auto")
    if not may_use_tiles():
        flags.discard("amx_bf16")
    wanted = {"amx_bf16": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512bw", "avx2": "avx2"}
    built = _library.build_info()["cpu_isas"]
    assert chosen == next((name for name in built if name == "plain" or wanted[name] in flags), "plain")


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 33, 3001])
def test_long_and_odd_sums_in_bfloat16(channels: int, weight_dtype: torch.dtype, isa: str) -> None:
    """Values of one sign, which do not cancel; images of one pixel are another kernel's."""
    generator = torch.Generator().manual_seed(channels)
    weight = torch.rand(50, channels, generator=generator).to(weight_dtype)
    for side in (1, 5):
        x = torch.rand(2, channels, side, side, generator=generator).bfloat16()
        gate = torch.rand(2, channels, generator=generator).bfloat16()
        result = effkernels.ops.pointwise_bn_act(x, weight[:, :, None, None], gate=gate)
        gated = x * gate[:, :, None, None]
        plain = torch.nn.functional.conv2d(gated, weight.bfloat16()[:, :, None, None])
        truth = torch.einsum("bchw,oc,bc->bohw", x.double(), weight.double(), gate.double())
        assert_parity(result, plain, truth)

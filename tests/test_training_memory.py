"""What a training step of B0 keeps for its backward, counted in bytes, and what a whole step needs at its peak."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peer_models import images, timm_model
from torch import Tensor, nn

import effkernels
from effkernels.nn import set_recompute

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/training.md")  # which name the bytes that are counted here


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors saved for the backward, each storage once; parameters and buffers are there anyway."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(found.values())


@pytest.mark.parametrize(("recompute", "most"), [(None, 0.40), ("expand", 0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_b0_saves_a_part_of_what_timms_does(recompute: str | None, most: float, dtype: torch.dtype) -> None:
    x = images(2, 224, 224).to(dtype)
    eager = saved_bytes(timm_model("efficientnet_b0").train().to(dtype), x)
    model = effkernels.create_model("efficientnet_b0", dtype=dtype).train()
    set_recompute(model, recompute)
    saved = saved_bytes(model, x)
    assert saved <= most * eager
    if dtype is torch.float32:
        assert_the_documents_say(eager, saved, pages=("docs/training.md",) if recompute else PAGES)


def assert_the_documents_say(*saved: int, pages: Sequence[str] = PAGES) -> None:
    """Assert that each of these bytes, of two images, is named in every page as megabytes of one."""
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for megabytes in (f"{count / 2e6:.1f}" for count in saved):
            assert re.search(rf"(?<![\d.]){re.escape(megabytes)}(?![\d.]*\d)", text), f"{page}: no {megabytes} MB"


_STEP = """
import json, resource, sys, torch
from effkernels.models.peers import import_timm
import effkernels
which, batch = sys.argv[1], int(sys.argv[2])
model = import_timm().create_model("efficientnet_b0") if which == "timm" else effkernels.create_model("efficientnet_b0")
model.train()
x = torch.randn(batch, 3, 224, 224)
model(x[:2]).sum().backward()  # gradients and code are there
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(x).square().mean().backward()
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""


def test_the_peak_of_a_whole_step_is_smaller() -> None:
    def peak(which: str) -> int:
        run = subprocess.run([sys.executable, "-c", _STEP, which, "8"], capture_output=True, text=True, check=True)
        return int(json.loads(run.stdout.splitlines()[-1]))

    assert peak("ours") <= 0.6 * peak("timm")

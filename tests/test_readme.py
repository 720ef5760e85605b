"""The Python of the README runs as it stands there, block after block in one session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.slow
def test_every_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage", reason="the photograph is scikit-image's")
    blocks = re.findall(r"(?<=```python\n).*?(?=```)", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    session: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)
    printed = capsys.readouterr().out
    assert "18 of 18 blocks run fused" in printed
    assert "torch.return_types.topk" in printed
    logits = session["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (5, 1000)

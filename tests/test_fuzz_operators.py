"""The fuzzer of the operators in short: it finds nothing, and it finds faults that are put in."""

from __future__ import annotations

import pytest
import torch
from conftest import THOROUGH

from benchmarks.fuzz import operators
from effkernels import _library, ops
from effkernels.ops.backends import OPERATORS

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")


def test_some_seconds_find_nothing() -> None:
    assert operators.run(10.0 if THOROUGH else 4.0, 0) == []


def test_a_wrong_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_little(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return right(*args, **kwargs) * (1 + 1e-4)

    right = ops.pointwise_bn_act
    seed = next(s for s in range(1000) if _is_plain(s))
    assert operators.check("values", seed) is None
    monkeypatch.setattr(ops, "pointwise_bn_act", off_by_a_little)
    assert "error" in (operators.check("values", seed) or "")


def _is_plain(seed: int) -> bool:
    call = operators.draw_call(seed, ["plain"])
    return call.op == "pointwise_bn_act" and call.dtype == torch.float32 and call.batch > 0


def test_a_call_that_should_have_raised_and_an_unclear_error_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepts(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.zeros(1)

    def refuses(*args: object, **kwargs: object) -> torch.Tensor:
        raise ValueError("no")

    def breaks(*args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("x")

    for function, wanted in (
        (accepts, "the call returned"),
        (refuses, "names no argument"),
        (breaks, "AssertionError"),
    ):
        for name in OPERATORS:
            monkeypatch.setattr(ops, name, function)
        found = [operators.check("mistakes", seed) for seed in range(12)]
        assert any(wanted in (problem or "") for problem in found)


def test_a_crash_is_found() -> None:
    """The death of the process that checks is a failure of its case; the next case has another process."""
    child = operators._Child()
    try:
        assert child.check("values", 1) is None
        assert child._process is not None
        child._process.kill()
        child._process.wait()
        assert "the process died with status -9" in (child.check("values", 2) or "")
        assert child.check("values", 3) is None
    finally:
        child.close()

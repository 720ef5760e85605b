"""The CPU kernels give the same bits for any number of threads, and for an image in any batch."""

from __future__ import annotations

import op_cases
import pytest
import torch
from op_cases import Case

from effkernels import _library, ops

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")

FULL = Case("pointwise_bn_act", bias=True, gated=True, residual=True, parameters="mixed")
# What each is for:
CASES = {
    "a classifier": FULL.with_(batch=3, height=1, width=1, channels=384, out_channels=100),
    "more images than a task prepares": FULL.with_(batch=37, height=1, width=1, channels=100, out_channels=24),
    "one tile by an odd number of vectors": FULL.with_(batch=1, height=3, width=4, channels=130, out_channels=112),
    "many tiles by a few vectors": FULL.with_(batch=3, height=13, width=14, channels=70, out_channels=40),
    "packed weights in groups": FULL.with_(batch=1, height=3, width=5, channels=384, out_channels=660),
    "means of three images": Case(op_cases.POOL_OP, batch=3, height=7, width=7, channels=70, out_channels=200),
    "means of one image": Case(op_cases.POOL_OP, batch=1, height=9, width=7, channels=384, out_channels=660),
    "a stem": Case("conv_bn_act", channels=3, out_channels=40, height=61, width=75, stride=2),
    "dense windows": Case("conv_bn_act", batch=2, channels=24, out_channels=40, height=13, width=15),
    "a gate": Case("squeeze_excite_gate", batch=3, channels=1000, reduced=250),
    "rows of one image": Case("depthwise_bn_act_squeeze", batch=1, channels=24, height=75, width=60),
    "a depthwise convolution": Case("depthwise_bn_act_squeeze", channels=100, height=61, width=30),
    "an odd number of vectors expanded": Case(
        op_cases.EXPAND_OP, batch=1, channels=24, out_channels=144, kernel=(5, 5)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_change_the_result(name: str, dtype: torch.dtype, isa: str) -> None:
    case = CASES[name].with_(dtype=dtype)
    given = case.draw()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7, 16, 64):
            torch.set_num_threads(count)
            results.append(op_cases.run(ops, case, given))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("side", [1, 2, 5])
def test_the_batch_does_not_change_an_image(side: int, isa: str) -> None:
    """Also of one pixel, where the product is another kernel's."""
    case = FULL.with_(batch=21, height=side, width=side, channels=200, out_channels=50)
    given = case.draw()
    (whole,) = op_cases.run(ops, case, given)
    for batch in (1, 2, 3, 4, 5, 16, 17):
        few = given | {name: given[name][:batch] for name in ("x", "gate", "residual")}
        assert torch.equal(op_cases.run(ops, case, few)[0], whole[:batch])


@pytest.mark.parametrize("side", [1, 2, 7])
def test_the_batch_does_not_change_the_means_of_an_image(side: int, isa: str) -> None:
    case = Case(op_cases.POOL_OP, batch=21, height=side, width=side, channels=200, out_channels=50)
    given = case.draw()
    (whole,) = op_cases.run(ops, case, given)
    for batch in (1, 2, 3, 16):
        assert torch.equal(op_cases.run(ops, case, given | {"x": given["x"][:batch]})[0], whole[:batch])

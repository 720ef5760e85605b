"""float32 products in TF32, which the other tests turn off: as exact as PyTorch's own TF32, within a factor of two.

The yardstick is the larger error of cuDNN's and cuBLAS's TF32 against float64. Whether a library takes TF32 depends on
the number of channels, so the shapes here are those at which both do.
"""

from __future__ import annotations

from collections.abc import Iterator

import op_cases
import pytest
import torch
from conftest import Backend, need
from op_cases import EXPAND_OP, Case, flat
from parity import FACTOR, assert_within, errors

import effkernels
from effkernels.ops.parity import full_float32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Half a unit in the last place of TF32's 10 bits of mantissa.
ROUNDING = 2.0**-11

CASES = [
    Case("pointwise_bn_act", channels=96, out_channels=64, height=28, width=28, activation="identity", norm="none"),
    Case("pointwise_bn_act", channels=240, out_channels=40, height=28, width=28, gated=True, residual=True),
    Case("pointwise_bn_act", channels=1152, out_channels=192, height=7, width=7, batch=4),
    Case("conv_bn_act", channels=32, out_channels=64, height=28, width=28, stride=2),
    Case(EXPAND_OP, channels=96, out_channels=64, height=28, width=28),
]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Convolutions and products may run in TF32."""
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    full_float32()


def product_error(case: Case) -> float:
    """cuBLAS's own error in a product of float32 matrices of the case's sizes, relative L2."""
    generator = torch.Generator().manual_seed(1)
    inner = case.channels * (9 if case.op == "conv_bn_act" else 1)
    a = torch.randn(case.batch * case.height * case.width, inner, generator=generator)
    b = torch.randn(inner, case.out_channels, generator=generator)
    return errors(a.cuda() @ b.cuda(), a.double() @ b.double()).l2


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_pytorchs(case: Case, backend: str) -> None:
    need(Backend(backend, "cuda"), case.op, torch.float32)
    arguments = case.draw(0, "cuda")
    truth = op_cases.truth(case, arguments)
    with torch.inference_mode():
        theirs = op_cases.run(effkernels.ops.reference, case, arguments)
        with effkernels.backend(backend):
            ours = op_cases.run(effkernels.ops, case, arguments)
    product = product_error(case)
    assert product > ROUNDING / 16, f"a product of cuBLAS errs by {product:.1e}: it did not run in TF32"
    for i, (y, own, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        found, allowed = errors(y, exact).l2, FACTOR * max(errors(own, exact).l2, product)
        assert found <= allowed, f"{case}, output {i}: error {found:.3g}, allowed {allowed:.3g}"


@pytest.mark.usefixtures("tf32")
def test_can_be_ruled_out_for_one_call() -> None:
    """allow_tf32=False computes in float32 whatever PyTorch is set to."""
    case = CASES[0]
    arguments = case.draw(0, "cuda")
    with torch.inference_mode(), effkernels.backend("cuda"):
        exact = flat(effkernels.ops).pointwise_bn_act(**arguments, allow_tf32=False)
    (truth,) = op_cases.truth(case, arguments)
    cpu = op_cases.run(effkernels.ops.reference, case, op_cases.on_cpu(arguments))[0]
    assert_within(exact, [errors(cpu, truth)], truth, str(case))

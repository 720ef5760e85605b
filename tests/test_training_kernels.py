"""The CPU's training kernels: right by PyTorch, on every instruction set, the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import AMX_MODEL, CPU_INSTRUCTION_SETS
from parity import assert_parity
from torch import Tensor

import effkernels
from effkernels import _library
from effkernels.ops import training_steps as steps

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled operators are not there")


@pytest.fixture(params=[name for name in CPU_INSTRUCTION_SETS if name != AMX_MODEL])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        torch.ops.effkernels.cpu_isa(request.param)
    except RuntimeError:
        pytest.skip(f"{request.param} is not built or not on this machine")
    yield request.param
    torch.ops.effkernels.cpu_isa("auto")


def results(
    dtype: torch.dtype, kernel: int, stride: int, activation: str, channels: int = 37, exact: bool = False
) -> dict[str, Tensor]:
    """Return what every step gives for images of `dtype`; exact: in float64, on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    rounded = dtype
    if exact:
        dtype = torch.float64

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(steps.wide(dtype))

    def norm() -> steps.FoldedNorm:
        return steps.make_norm(draw(channels), draw(channels).abs() + 0.5, draw(channels) + 1, draw(channels), 1e-3)

    t, weight = draw(3, 31, 14, channels).to(rounded).to(dtype), draw(channels, 1, kernel, kernel)
    first, second = norm(), norm()
    padding = (kernel // 2, kernel // 2 - 1, kernel // 2, kernel // 2)
    found: dict[str, Tensor] = {}
    found["z"], vectors = steps.depthwise(t, first, activation, weight, draw(channels), stride, padding, 1)
    found["mean"], found["var"] = vectors[:2]
    z, g = (draw(*found["z"].shape).to(rounded).to(dtype) for _ in range(2))
    factor, offset = draw(3, channels), draw(3, channels)
    coefficients = steps.Coefficients(draw(channels), draw(channels), draw(channels))
    sums, found["y"] = steps.gradient_sums(g, z, second, activation, factor, True)
    sums = steps.GradientSums(*sums)._asdict()
    found |= sums | {"y_sum": sums["y"], "y": found["y"]}
    found["squeeze"] = steps.squeeze(z, second, activation)
    found["norm_act"] = steps.norm_act(z, second, activation, factor, g)
    found["norm_backward"] = steps.norm_backward(g, z, second, coefficients, factor, activation)
    for name, of in (("with norm", first), ("without norm", None)):
        found |= zip(
            (f"dx {name}", f"dweight {name}", f"sums {name}"),
            steps.depthwise_backward(
                g, z, second, activation, factor, offset, coefficients, t, of, activation, weight, stride, padding, 1
            ),
            strict=True,
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "relu", "hard_swish", "gelu", "gelu_tanh", "identity"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)])
def test_kernels_keep_to_the_tolerance_rule(
    isa: str, kernel: int, stride: int, activation: str, dtype: torch.dtype
) -> None:
    found = results(dtype, kernel, stride, activation)
    with effkernels.backend("reference"):
        own = results(dtype, kernel, stride, activation)
        truth = results(dtype, kernel, stride, activation, exact=True)
    for name, wanted in truth.items():
        if wanted.numel() == 0:  # sums that only a norm has
            assert found[name].numel() == 0
            continue
        # Sums of rounded numbers, in float64: what is added is of float32.
        result, plain = (r[name].float() if r[name].dtype == torch.float64 else r[name] for r in (found, own))
        assert_parity(result, plain, wanted, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_by_the_statistics_of_a_batch(isa: str, dtype: torch.dtype) -> None:
    """What follows from mean and variance, with parameters in any dtype."""
    image, (weight, bias) = torch.randn(3, 5, 6, 37), torch.randn(2, 37).to(dtype)
    for own in (steps.NormParameters(weight, bias, 1e-3), steps.NormParameters(None, None, 1e-5)):
        assert_norm_follows(steps.statistics(image, own), own, 90)


def assert_norm_follows(vectors: Tensor, own: steps.NormParameters, pixels: int) -> None:
    """Assert that the rows (6, C) are the norm of mean and variance, the first two."""
    mean, variance = vectors[:2]
    share = pixels / (pixels - 1)
    plain = steps.fold(mean, variance, variance * share, own)
    exact = steps.NormParameters(*(None if t is None else t.double() for t in own[:2]), own.eps)
    truth = steps.fold(mean.double(), variance.double(), variance.double() * share, exact)
    for name, found, of_pytorch, wanted in zip(steps.NormVectors._fields, vectors, plain, truth, strict=True):
        assert_parity(found, of_pytorch, wanted, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        every = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            every.append(results(dtype, 5, 1, "silu", 100))
    finally:
        torch.set_num_threads(before)
    for other in every[1:]:
        assert all(torch.equal(other[name], value) for name, value in every[0].items())

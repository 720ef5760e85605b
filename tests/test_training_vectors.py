"""The training kernels without pixels: vectors of norms, squeeze-and-excitation, the expansion's small matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from parity import assert_parity
from test_training_kernels import assert_norm_follows
from test_training_steps import kernels  # noqa: F401  a fixture
from torch import Tensor

import effkernels
from effkernels import _library
from effkernels.ops import backends, reference
from effkernels.ops import training_steps as steps
from effkernels.ops.training_steps import Excitation, FoldedNorm, NormParameters

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled operators are not there")

Results = dict[str, Tensor]
Draw = Callable[..., Tensor]


def assert_as_exact_as_pytorch(
    on: Backend, run: Callable[[Draw], Results], parameters: torch.dtype = torch.float32
) -> None:
    """`run` draws its numbers from the function it is given: parameters of a module, if told so, in their dtype."""

    def results(wide: torch.dtype, device: str, narrow: torch.dtype) -> Results:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, parameter: bool = False, dtype: torch.dtype | None = None) -> Tensor:
            values = torch.randn(*size, generator=generator)
            values = values.to(parameters).to(narrow) if parameter else values.to(dtype or wide)
            return values.to(device)

        return {name: value.cpu() for name, value in run(draw).items()}

    found = results(torch.float32, on.device, parameters)
    with effkernels.backend("reference"):
        own = results(torch.float32, "cpu", parameters)
        truth = results(torch.float64, "cpu", torch.float64)
    for name, value in found.items():
        assert value.dtype == own[name].dtype, name
        assert_parity(value, own[name], truth[name], name)


def norm_of(draw: Draw, channels: int) -> FoldedNorm:
    weight, bias = draw(channels, parameter=True), draw(channels, parameter=True)
    return steps.make_norm(draw(channels), draw(channels).abs() + 0.5, weight, bias, 1e-3)


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("channels", [37, 40, 100])
def test_a_norm_by_the_statistics_of_a_batch(kernels: Backend, channels: int, dtype: torch.dtype) -> None:  # noqa: F811
    """What follows from mean and variance; those are tested in tests/test_training_steps.py."""
    image, (weight, bias) = torch.randn(3, 5, 6, channels), torch.randn(2, channels).to(dtype)
    for own in (NormParameters(weight, bias, 1e-3), NormParameters(None, None, 1e-5)):
        moved = NormParameters(*(None if t is None else t.to(kernels.device) for t in own[:2]), own.eps)
        assert_norm_follows(steps.statistics(image.to(kernels.device), moved).cpu(), own, 90)


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("batch_statistics", [True, False])
@pytest.mark.parametrize(("images", "channels"), [(3, 40), (21, 7)])
def test_the_gradients_of_a_norm(
    kernels: Backend,  # noqa: F811
    images: int,
    channels: int,
    batch_statistics: bool,
    dtype: torch.dtype,
) -> None:
    def run(draw: Draw) -> Results:
        norm = norm_of(draw, channels)
        own = NormParameters(draw(channels, parameter=True), draw(channels, parameter=True))
        per_image, whole = draw(6, images, channels, dtype=torch.float64), draw(2, channels, dtype=torch.float64)
        factor, offset = draw(images, channels), draw(images, channels)
        found = {}
        for name, sums, factors in (
            ("plain", per_image, (None, None)),
            ("factor", per_image, (factor, None)),
            ("both", per_image, (factor, offset)),
            ("whole", whole, (None, None)),
        ):
            gradient = steps.norm_gradient(sums, norm, 50, batch_statistics, own, *factors)
            found |= {f"weight {name}": gradient.weight, f"bias {name}": gradient.bias}
            found |= {f"{of} {name}": value for of, value in gradient.coefficients._asdict().items()}
        return found

    assert_as_exact_as_pytorch(kernels, run, dtype)


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize(("images", "channels", "reduced"), [(3, 40, 10), (2, 9, 3), (17, 96, 4)])
def test_squeeze_and_excitation(
    kernels: Backend,  # noqa: F811
    images: int,
    channels: int,
    reduced: int,
    gate: str,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    parameters = [
        (draw(*size) * 0.25).to(dtype)
        for size in ((reduced, channels, 1, 1), (reduced,), (channels, reduced, 1, 1), (channels,))
    ]
    sums, pixels = draw(6, images, channels).double(), 20
    means = sums[0] / pixels

    def plain(wide: torch.dtype) -> list[Tensor]:
        """Gate, gradient of the sum of what is averaged and gradients of the parameters, by autograd."""
        pooled, *leaves = (t.detach().to(wide).requires_grad_() for t in (means, *parameters))
        hidden = F.silu(F.linear(pooled, leaves[0].flatten(1), leaves[1]))
        opened = reference.apply_gate(F.linear(hidden, leaves[2].flatten(1), leaves[3]), gate)
        pooled_gradient, *gradients = torch.autograd.grad(opened, [pooled, *leaves], sums[1].to(wide))
        return [opened.detach(), pooled_gradient / pixels, *gradients]

    moved = [t.to(kernels.device) for t in parameters]
    excitation = Excitation(*moved[:4], activation="silu", gate=gate)  # type: ignore[misc]
    offset, of_parameters = steps.excite_backward(sums.to(kernels.device), pixels, excitation)
    found = [steps.excite(means.to(kernels.device), excitation), offset, *of_parameters]
    names = ("gate", "offset", "w_reduce", "b_reduce", "w_expand", "b_expand")
    for name, value, own, truth in zip(names, found, plain(torch.float32), plain(torch.float64), strict=True):
        wanted = torch.float32 if name in names[:2] else dtype
        assert value.dtype == wanted
        assert_parity(value.cpu().reshape(truth.shape), own.to(wanted), truth, name)


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 96), (7, 20), (40, 300)])
def test_the_matrices_of_an_expansions_backward(
    kernels: Backend,  # noqa: F811
    inputs: int,
    outputs: int,
    centred: bool,
    dtype: torch.dtype,
) -> None:
    def run(draw: Draw) -> Results:
        weight, bias = draw(outputs, inputs, 1, 1, parameter=True), draw(outputs, parameter=True)
        norm = norm_of(draw, outputs)
        coefficients = steps.Coefficients(norm.scale, draw(outputs) * 0.1, draw(outputs) * 0.1)
        rows, pixels = draw(50, inputs), 50
        mean = rows.mean(0)
        squares = (rows - mean).t() @ (rows - mean) if centred else rows.t() @ rows
        moments = mean, squares, centred
        products = draw(outputs, inputs)
        scaled, middle, shift = steps.product_weights(weight, bias, norm, coefficients, weight.dtype)
        gradients = [
            steps.product_gradient(products, of, pixels, weight, bias, norm, coefficients) for of in (moments, None)
        ]
        found = {"scaled": scaled, "middle": middle, "batch": gradients[0], "running": gradients[1]}
        matrices = {name: value.reshape(value.shape[:2]).to(weight.dtype) for name, value in found.items()}
        return matrices | {"shift": shift}

    assert_as_exact_as_pytorch(kernels, run, dtype)


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
def test_running_statistics(kernels: Backend, dtype: torch.dtype) -> None:  # noqa: F811
    """As `nn.BatchNorm2d` updates them, those of several norms by one operator."""
    sizes, momenta = (37, 300, 40), [0.1, 0.01, 1.0]
    running = [torch.randn(c).to(dtype) for c in sizes for _ in range(2)]
    vectors = [torch.randn(6, c) for c in sizes]
    counts = [torch.tensor(3), torch.tensor(4)]
    found, counted = ([t.clone().to(kernels.device) for t in of] for of in (running, counts))
    steps.update_running(found, [t.to(kernels.device) for t in vectors], counted, momenta)
    assert [int(count) for count in counted] == [4, 5]
    for i, (before, after) in enumerate(zip(running, found, strict=True)):
        momentum, new = momenta[i // 2], vectors[i // 2][2 * (i % 2)]
        own = (before.float() * (1 - momentum) + new * momentum).to(dtype)
        assert_parity(after.cpu(), own, before.double() * (1 - momentum) + new.double() * momentum)

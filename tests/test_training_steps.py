"""The training kernels of CUDA: as exact as PyTorch, one launch each, the same bits in every order of threads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import FLAVOUR, Backend
from emulation.control import A100, H200, ORDERS, Emulation, Emulator
from parity import assert_within, errors, joined
from test_training_blocks import assert_step, build, image
from torch import Tensor

import effkernels
from effkernels import _library
from effkernels.ops import backends
from effkernels.ops import training_steps as steps
from effkernels.ops.reference import activate

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled operators are not there")

DTYPES = backends.DTYPES
ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hard_swish", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Shape:
    """Images (batch, height, width, channels) and a depthwise convolution of them."""

    batch: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)

    def __str__(self) -> str:
        size = "x".join(map(str, (self.batch, self.channels, self.height, self.width)))
        return f"{size}-k{self.kernel[0]}x{self.kernel[1]}s{self.stride}"


SHAPES = (
    Shape(2, 13, 14, 40),
    Shape(1, 7, 9, 24, (5, 5), 1, (2, 2, 2, 2)),
    Shape(3, 14, 13, 100, (3, 3), 2, (0, 1, 0, 1)),
    Shape(2, 15, 15, 16, (5, 5), 2, (1, 2, 2, 2)),
    Shape(2, 1, 1, 7),
    Shape(1, 31, 150, 8, (5, 5), 1, (2, 2, 2, 2)),  # tiles beside each other and bands below each other
    Shape(1, 64, 41, 8, (3, 3), 2, (1, 1, 1, 1)),
    Shape(2, 12, 11, 9, (7, 7), 1, (3, 3, 3, 3)),
    Shape(2, 12, 11, 16, (7, 7), 2, (2, 3, 3, 3)),
    Shape(2, 20, 19, 48, (3, 5), 1, (1, 1, 2, 2)),
    Shape(1, 17, 16, 24, (13, 13), 1, (6, 6, 6, 6)),
    Shape(3, 6, 5, 32, (1, 1), 2, (0, 0, 0, 0)),
    Shape(5, 7, 7, 144, (5, 5), 1, (2, 2, 2, 2)),
)


class Inputs:
    """One draw of everything that the steps take, rounded to the dtype that is tested."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype = shape, dtype
        n, h, w, c = shape.batch, shape.height, shape.width, shape.channels

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype).float()

        def norm() -> steps.FoldedNorm:
            return steps.make_norm(draw(c), draw(c).abs() + 0.5, draw(c) * 0.3 + 1, draw(c) * 0.5, 1e-3)

        # A mean far from zero, as that of a channel is: close to zero it is what sums of both signs leave.
        self.t, self.bias = (draw(n, h, w, c) + 1).to(dtype).float(), draw(c)
        self.weight = (draw(c, 1, *shape.kernel) * 0.5).to(dtype).float()
        pads = (sum(shape.padding[:2]), sum(shape.padding[2:]))
        oh, ow = ((s + p - k) // shape.stride + 1 for s, p, k in zip((h, w), pads, shape.kernel, strict=True))
        self.z, self.g, self.residual = draw(n, oh, ow, c), draw(n, oh, ow, c), draw(n, oh, ow, c)
        outputs = c // 2 + 8 if c % 8 else (c // 2 + 8) // 8 * 8
        self.matrix, self.matrix_bias = draw(outputs, c, 1, 1) * 0.25, draw(outputs)
        self.norm, self.z_norm = norm(), norm()
        self.factor, self.offset = draw(n, c), draw(n, c)
        self.coefficients = steps.Coefficients(draw(c), draw(c) * 0.1, draw(c) * 0.1)

    def to(self, image: torch.dtype, vectors: torch.dtype, device: str = "cpu") -> Inputs:
        """The same numbers with images and with what is known per channel in other dtypes."""
        other = object.__new__(Inputs)
        other.shape, other.dtype = self.shape, image
        for name in ("t", "z", "g", "residual", "matrix"):
            setattr(other, name, getattr(self, name).to(device, image))
        for name in ("weight", "bias", "factor", "offset", "matrix_bias"):
            setattr(other, name, getattr(self, name).to(device, vectors))
        for name in ("norm", "z_norm", "coefficients"):
            value = getattr(self, name)
            setattr(other, name, type(value)(*(v.to(device, vectors) for v in value)))
        return other


Results = dict[str, Tensor]


def moments_of_batch_norm(t: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance as PyTorch's batch norm finds them, in each memory format of (N, H, W, C) images."""
    found, (c, eps) = [], (t.shape[3], 1e-5)
    for layout in (torch.channels_last, torch.contiguous_format):
        x = steps.nchw(t).contiguous(memory_format=layout)
        mean, inverse = torch.native_batch_norm(x, torch.ones(c), torch.zeros(c), None, None, True, 0.0, eps)[1:]
        found.append((mean, (1 / inverse.double() ** 2 - eps).float()))
    return found


def by_steps(i: Inputs, activation: str) -> Results:
    """Results of every function of training_steps."""
    shape = i.shape
    found: Results = {}
    found["mean of t"], found["variance of t"] = steps.statistics(i.t)[:2]
    found["z"], vectors = steps.depthwise(i.t, i.norm, activation, i.weight, i.bias, shape.stride, shape.padding, 1)
    found["mean of z"], found["variance of z"] = vectors[:2]
    found["z without norm"] = steps.depthwise(i.t, None, "identity", i.weight, None, shape.stride, shape.padding, 1)[0]
    sums, found["y times factor"] = steps.gradient_sums(i.g, i.z, i.z_norm, activation, i.factor, True)
    found |= {f"sum {name}": value for name, value in steps.GradientSums(*sums)._asdict().items()}
    found["product"], vectors = steps.product(i.z, i.matrix, i.matrix_bias, i.z_norm, activation, i.factor)
    found["mean of product"], found["variance of product"] = vectors[:2]
    found["product alone"] = steps.product(i.z, i.matrix, None)[0]
    found["squeeze"] = steps.squeeze(i.z, i.z_norm, activation)
    found["norm_act"] = steps.norm_act(i.z, i.z_norm, activation, i.factor, i.residual)
    found["norm_act alone"] = steps.norm_act(i.z, i.z_norm, activation)
    found["norm_backward"] = steps.norm_backward(i.g, i.z, i.z_norm, i.coefficients, i.factor, activation)
    for name, norm in (("with norm", i.norm), ("without norm", None)):
        *outputs, sums = steps.depthwise_backward(
            i.g, i.z, i.z_norm, activation, i.factor, i.offset, i.coefficients, i.t, norm, activation, i.weight,
            shape.stride, shape.padding, 1,
        )  # fmt: skip
        names = ("dt", "dweight", "sum of dt", "sum of dt h") if norm is not None else ("dt", "dweight")
        found |= {f"{of} {name}": value for of, value in zip(names, [*outputs, *sums], strict=True)}
    return found


def by_pytorch(i: Inputs, activation: str) -> dict[str, Tensor | list[Tensor]]:
    """The same as PyTorch's own operators give it in the dtype of the images: each rounds its result to it.

    Sums are exact here, where those of PyTorch are not: the limit is the stricter. A list has what PyTorch gives in
    each of its ways.
    """
    dtype, shape = i.dtype, i.shape

    def normalised(t: Tensor, norm: steps.FoldedNorm) -> Tensor:
        return ((t.float() - norm.mean) * norm.scale + norm.bias).to(dtype)

    def per_image(vector: Tensor) -> Tensor:
        return vector[:, None, None, :].to(dtype)

    def convolved(y: Tensor, bias: Tensor | None) -> Tensor:
        padded = steps._padded(y, shape.padding)
        bias = None if bias is None else bias.to(dtype)
        return steps.nhwc(F.conv2d(padded, i.weight.to(dtype), bias, shape.stride, 0, 1, shape.channels))

    found: dict[str, Tensor | list[Tensor]] = {}
    found |= zip(("mean of t", "variance of t"), map(list, zip(*moments_of_batch_norm(i.t), strict=True)), strict=True)
    normed = normalised(i.t, i.norm)
    y = activate(normed, activation)
    found["z"] = convolved(y, i.bias)
    found["z without norm"] = convolved(i.t, None)
    z = normalised(i.z, i.z_norm)
    a, slope = activate(z, activation), steps._activation_backward(torch.ones_like(z), z, activation)
    h = ((i.z.float() - i.z_norm.mean) * i.z_norm.inverse_deviation).to(dtype)
    found["y times factor"] = a * per_image(i.factor)
    ga = steps._activation_backward(i.g, z, activation)
    a64, g64, ga64, slope64, h64 = (v.double() for v in (a, i.g, ga, slope, h))
    products = {"y": a64, "gy": g64 * a64, "ga": ga64, "a": slope64, "gah": ga64 * h64, "ah": slope64 * h64}
    found |= {f"sum {name}": value.sum((1, 2)) for name, value in products.items()}
    found["squeeze"] = a64.mean((1, 2))
    matrix = i.matrix[:, :, 0, 0].to(dtype)
    found["product"] = F.linear(a * per_image(i.factor), matrix, i.matrix_bias.to(dtype))
    found["product alone"] = F.linear(i.z, matrix)
    found["norm_act"] = a * per_image(i.factor) + i.residual
    found["norm_act alone"] = a
    alpha, beta, delta = i.coefficients
    factor = i.factor[:, None, None, :]
    centred = i.z.float() - i.z_norm.mean
    found["norm_backward"] = (alpha * factor * ga.float() + beta * centred + delta).to(dtype)
    dy = i.g * per_image(i.factor) + per_image(i.offset)
    dy = steps._activation_backward(dy, z, activation)
    dz = (alpha * dy.float() + beta * centred + delta).to(dtype)
    for name, source in (("with norm", y), ("without norm", i.t)):
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            steps.nchw(dz), steps._padded(source, shape.padding), i.weight.to(dtype), None, [shape.stride] * 2,
            [0, 0], [1, 1], False, [0, 0], shape.channels, [True, True, False],
        )  # fmt: skip
        top, _, left, _ = shape.padding
        dx = steps.nhwc(dx[:, :, top : top + shape.height, left : left + shape.width])
        found[f"dweight {name}"] = dweight.float()
        if name == "with norm":
            dx = steps._activation_backward(dx, normed, activation)
            of_t = (i.t.float() - i.norm.mean) * i.norm.inverse_deviation
            found["sum of dt with norm"] = dx.double().sum((0, 1, 2))
            found["sum of dt h with norm"] = (dx.double() * of_t.to(dtype).double()).sum((0, 1, 2))
        found[f"dt {name}"] = dx
    return found


@pytest.fixture
def kernels(backend: Backend) -> Backend:
    """A backend that has the training kernels of CUDA, emulated or on a GPU."""
    if backend.name != "cuda":
        pytest.skip(
            "CUDA's training kernels are tested here; tests/test_training_kernels.py and _triton.py: the others"
        )
    if backend.emulated is None and not _has_cuda():
        pytest.skip(f"the library has no training kernels for {backend}")
    return backend


def _has_cuda() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("effkernels::training_statistics", "CUDA")


def assert_as_exact_as_pytorch(
    kernels: Backend, shape: Shape, dtype: torch.dtype, activation: str, draws: int | None = None
) -> None:
    """Several draws are judged together: of the few numbers of one, PyTorch's own error is a matter of luck.

    The flavours that check accesses do not judge values: one draw has the accesses of all.
    """
    if FLAVOUR in ("race", "asan"):
        found = by_steps(Inputs(shape, dtype).to(dtype, torch.float32), activation)
        assert all(torch.isfinite(value).all() for value in found.values())
        return
    results: dict[str, tuple[list[Tensor], list[Tensor], list[list[Tensor]]]] = {}
    for seed in range(draws or max(3, -(-96 // shape.channels))):
        drawn = Inputs(shape, dtype, seed)
        found = by_steps(drawn.to(dtype, torch.float32, kernels.device), activation)
        with effkernels.backend("reference"):
            truth = by_steps(drawn.to(torch.float64, torch.float64), activation)
        plain = by_pytorch(drawn.to(dtype, torch.float32), activation)
        for name in ("z", "product"):  # the statistics of a convolution are those of the result that it stored
            names, z = (f"mean of {name}", f"variance of {name}"), found[name].cpu()
            truth |= zip(names, reversed(torch.var_mean(z.double(), (0, 1, 2), correction=0)), strict=True)
            plain |= zip(names, map(list, zip(*moments_of_batch_norm(z), strict=True)), strict=True)
        assert found.keys() == truth.keys() == plain.keys()
        for name, value in found.items():
            ways = plain[name] if isinstance(plain[name], list) else [plain[name]]
            ours, wanted, own = results.setdefault(name, ([], [], []))
            ours.append(value.cpu()), wanted.append(truth[name]), own.append(ways)
    for name, (ours, wanted, own) in results.items():
        result = joined(ours)
        result = result.float() if result.dtype == torch.float64 else result  # sums, as exact as float32 has them
        ways = [joined(way).to(result.dtype) for way in zip(*own, strict=True)]
        assert_within(result, [errors(way, joined(wanted)) for way in ways], joined(wanted), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_pytorch(kernels: Backend, shape: Shape, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(kernels, shape, dtype, "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_gates(kernels: Backend, activation: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(kernels, Shape(2, 9, 10, 16), dtype, activation)


@pytest.mark.parametrize("channels", [9, 64])
def test_statistics_do_not_cancel(kernels: Backend, channels: int) -> None:
    """Mean 1e3 and variance 1, a channel with one value, and one whose first value is far from all others."""
    t = torch.randn(3, 40, 30, channels, generator=torch.Generator().manual_seed(0)) + 1e3
    t[..., 1] = 1000.1
    t[0, 0, 0, 2] = -1e4
    t[..., 3] *= 1e-6
    mean, var = steps.statistics(t.to(kernels.device))[:2].cpu()
    own_means, own_vars = zip(*moments_of_batch_norm(t), strict=True)
    true_var, true_mean = torch.var_mean(t.double(), (0, 1, 2), correction=0)
    for channel in range(channels):  # each by itself: they differ by orders of magnitude
        for found, own, truth in ((mean, own_means, true_mean), (var, own_vars, true_var)):
            if channel != 1 or found is mean:
                one = slice(channel, channel + 1)
                assert_within(
                    found[one], [errors(way[one], truth[one]) for way in own], truth[one], f"channel {channel}"
                )
    assert float(var[1]) <= float(1000.1 * torch.finfo(torch.float32).eps) ** 2


def test_statistics_of_a_convolution_do_not_cancel(kernels: Backend) -> None:
    """Its bias moves the mean to 1e3; the variance stays that of the products."""
    i = Inputs(Shape(3, 40, 30, 16), torch.float32).to(torch.float32, torch.float32, kernels.device)
    for z, vectors in (
        steps.depthwise(i.t, None, "identity", i.weight, i.bias + 1e3, 1, i.shape.padding, 1),
        steps.product(i.t, i.matrix, i.matrix_bias + 1e3),
    ):
        z, (mean, var) = z.cpu(), vectors[:2].cpu()
        own_means, own_vars = zip(*moments_of_batch_norm(z), strict=True)
        true_var, true_mean = torch.var_mean(z.double(), (0, 1, 2), correction=0)
        assert_within(mean, [errors(own, true_mean) for own in own_means], true_mean, "mean")
        assert_within(var, [errors(own, true_var) for own in own_vars], true_var, "variance")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_order_of_threads(dtype: torch.dtype, emulated: Emulator) -> None:
    """And on both kinds of device, as long as they cut the work alike."""
    shape = Shape(6, 19, 23, 40, (5, 5), 1, (2, 2, 2, 2))
    i = Inputs(shape, dtype).to(dtype, torch.float32)
    every = []
    with emulated.in_place_of_cpu(), effkernels.backend("cpu"):
        for order in ORDERS:
            emulated.configure(Emulation(order, "late", A100, FLAVOUR))
            every.append(by_steps(i, "silu"))
    for other in every[1:]:
        assert all(torch.equal(other[name], value) for name, value in every[0].items())


def test_a_step_is_one_launch(emulated: Emulator) -> None:
    """Partial sums are joined by the blocks that come last, whose counters need no filling."""
    i = Inputs(Shape(2, 60, 50, 96), torch.bfloat16).to(torch.bfloat16, torch.float32)
    emulated.configure(Emulation(limits=H200, flavour=FLAVOUR))
    with emulated.in_place_of_cpu(), effkernels.backend("cpu"):
        by_steps(i, "silu")  # the first launches on a device may take memory for counters
        emulated.module.clear_launches()
        by_steps(i, "silu")
    assert len(emulated.launches()) == 12


def test_every_byte_moves_once(emulated: Emulator) -> None:
    """Images are read and written once, by accesses of 16 bytes; what is beside them is per channel and block."""
    if emulated.flavour != "race":
        pytest.skip("the race flavour counts bytes: make test-race")
    shape = Shape(2, 28, 28, 96)
    i = Inputs(shape, torch.float16).to(torch.float16, torch.float32)
    size = 2 * 28 * 28 * 96 * 2
    moved = {
        "statistics": (1, 0, lambda: steps.statistics(i.t)),
        "norm_act": (2, 1, lambda: steps.norm_act(i.z, i.z_norm, "silu", i.factor, i.residual)),
        "squeeze": (1, 0, lambda: steps.squeeze(i.z, i.z_norm, "silu")),
        "gradient_sums": (2, 1, lambda: steps.gradient_sums(i.g, i.z, i.z_norm, "silu", i.factor, True)),
        "norm_backward": (2, 1, lambda: steps.norm_backward(i.g, i.z, i.z_norm, i.coefficients, i.factor, "silu")),
        "depthwise": (
            *(1, 1),
            lambda: steps.depthwise(i.t, i.norm, "silu", i.weight, i.bias, 1, shape.padding, 1),
        ),
        "depthwise_backward": (
            *(3, 1),
            lambda: steps.depthwise_backward(
                i.g, i.z, i.z_norm, "silu", i.factor, i.offset, i.coefficients, i.t, i.norm, "silu", i.weight, 1,
                shape.padding, 1,
            ),
        ),
    }  # fmt: skip
    with emulated.in_place_of_cpu(), effkernels.backend("cpu"):
        for name, (reads, writes, run) in moved.items():
            emulated.configure(Emulation(limits=A100, flavour="race"))
            run()
            (launch,) = emulated.launches()
            beside = launch["unique_bytes_read"] - reads * size, launch["unique_bytes_written"] - writes * size
            assert min(beside) >= 0, name
            assert max(beside) <= 0.25 * size, f"{name}: {beside}"
            assert launch["bytes_read_by_16"] >= reads * size, name
            assert launch["bytes_written_by_16"] >= writes * size, name


def test_a_product_moves_its_images_once(emulated: Emulator) -> None:
    """It takes its result back for the statistics, from the L2 cache, reads x once, and stores no activated x."""
    if emulated.flavour != "race":
        pytest.skip("the race flavour counts bytes: make test-race")
    i = Inputs(Shape(2, 28, 28, 96), torch.float16).to(torch.float16, torch.float32)
    matrix, size = torch.randn(96, 96, 1, 1).half(), 2 * 28 * 28 * 96 * 2
    with emulated.in_place_of_cpu(), effkernels.backend("cpu"):
        emulated.configure(Emulation(limits=A100, flavour="race"))
        steps.product(i.z, matrix, None, i.z_norm, "silu", i.factor)
    (launch,) = emulated.launches()
    blocks = launch["grid"][0]
    statistics = 16 * 96 * (blocks + 2 * math.isqrt(blocks) + 2)  # of the blocks, and of those that join them
    parameters = matrix.numel() * 2 + 6 * 96 * 4 + i.factor.numel() * 4
    assert size <= launch["unique_bytes_written"] <= size + statistics + parameters
    assert launch["unique_bytes_read"] <= 2 * size + statistics + parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mbconv", "stride2-same", "mobilenet-v3", "odd-channels"])
def test_a_block_trains_as_pytorch_does(kernels: Backend, name: str, dtype: torch.dtype) -> None:
    """Result, gradients and running statistics of a whole block."""
    block = build(name, dtype)
    assert_step(block, image(block, 2, 9, 10).to(dtype), device=kernels.device)

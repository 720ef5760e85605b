"""The steps of training in Triton, interpreted or on a GPU: as exact as PyTorch, the same bits, whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import test_training_steps as of_steps
import torch
from conftest import Backend, available_backends
from parity import assert_parity
from test_training_blocks import assert_step, build, image
from test_training_steps import ACTIVATIONS, Inputs, Shape, assert_as_exact_as_pytorch, by_steps
from torch import Tensor

import effkernels
from effkernels import _library, triton
from effkernels.ops import backends
from effkernels.ops import training_steps as steps

HALF, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
TRITON = [pytest.param(found, id=str(found)) for found in available_backends() if found.name == "triton"]
NONE = pytest.param(None, marks=pytest.mark.skip(reason="no GPU, and Triton interprets in `make test-triton` alone"))


@pytest.fixture(params=TRITON or [NONE])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Triton, of the backends of this machine."""
    chosen: Backend = request.param
    with chosen.active():
        yield chosen


# A hundred channels or so, so that one draw is enough to judge by.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(2, 9, 10, 104), BFLOAT16),
        (Shape(3, 10, 9, 100, (3, 3), 2, (0, 1, 0, 1)), HALF),  # no vector divides the channels
        (Shape(2, 11, 11, 96, (5, 5), 2, (1, 2, 2, 2)), FLOAT32),
        (Shape(1, 17, 12, 101, (5, 5), 1, (2, 2, 2, 2)), BFLOAT16),  # bands below each other
        (Shape(3, 6, 5, 96, (1, 1), 2, (0, 0, 0, 0)), FLOAT32),
        (Shape(2, 8, 7, 97, (7, 7), 2, (2, 3, 3, 3)), FLOAT32),  # the taps in several programs
        (Shape(2, 1, 1, 97, (3, 5), 1, (0, 2, 2, 3)), FLOAT32),
    ],
    ids=str,
)
def test_as_exact_as_pytorch(shape: Shape, dtype: torch.dtype, backend: Backend) -> None:
    assert_as_exact_as_pytorch(backend, shape, dtype, "silu", 1)


def test_many_programs(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where an image has several programs and their results are joined in several steps."""
    from effkernels.triton import training, training_depthwise

    for module in (training, training_depthwise):
        monkeypatch.setattr(module, "_THREADS", 32)
    monkeypatch.setattr(training, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(training, "_MOST_JOINED", 3)
    assert_as_exact_as_pytorch(backend, Shape(1, 11, 10, 72, (3, 3), 2, (1, 0, 0, 1)), FLOAT32, "silu", 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_slopes(activation: str, backend: Backend) -> None:
    i = Inputs(Shape(3, 9, 10, 96), FLOAT32)

    def results(i: Inputs) -> list[Tensor]:
        return [
            steps.norm_act(i.z, i.z_norm, activation, i.factor, i.residual),
            steps.norm_backward(i.g, i.z, i.z_norm, i.coefficients, i.factor, activation),
            steps.gradient_sums(i.g, i.z, i.z_norm, activation)[0].float(),
        ]

    found = [value.cpu() for value in results(i.to(FLOAT32, FLOAT32, backend.device))]
    with effkernels.backend("reference"):
        own, truth = (results(i.to(dtype, dtype)) for dtype in (FLOAT32, torch.float64))
    for value, plain, wanted in zip(found, own, truth, strict=True):
        assert_parity(value, plain, wanted.double(), activation)


@pytest.mark.parametrize(
    "check",
    [
        lambda backend: of_steps.test_statistics_do_not_cancel(backend, 9),
        of_steps.test_statistics_of_a_convolution_do_not_cancel,
    ],
    ids=["of an image", "of a convolution"],
)
def test_statistics_do_not_cancel(check: Callable[[Backend], None], backend: Backend) -> None:
    check(backend)


def test_the_same_bits_whatever_was_in_memory(backend: Backend) -> None:
    """PyTorch's deterministic mode fills new memory with NaN; tests/test_triton_gates.py excludes atomics."""
    i = Inputs(Shape(2, 9, 10, 40), BFLOAT16).to(BFLOAT16, FLOAT32, backend.device)
    wanted = by_steps(i, "silu")
    torch.use_deterministic_algorithms(True)
    try:
        found = by_steps(i, "silu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mbconv", FLOAT32),
        ("stride2-same", BFLOAT16),
        ("odd-channels", HALF),
        pytest.param("mobilenet-v3", FLOAT32, marks=pytest.mark.thorough),
        pytest.param("separable-skip", BFLOAT16, marks=pytest.mark.thorough),
        pytest.param("drop-path", HALF, marks=pytest.mark.thorough),
    ],
)
def test_a_block_trains_as_pytorch_does(
    name: str, dtype: torch.dtype, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result, gradients and running statistics of a whole block, all of whose steps over images are kernels."""
    called = set()
    find = triton.training_step

    def counted(name: str) -> Callable:
        called.add(name)
        return find(name)

    monkeypatch.setattr(triton, "training_step", counted)
    block = build(name, dtype)
    assert_step(block, image(block, 4, 6, 7).to(dtype), draws=2, device=backend.device)
    if name == "mbconv":
        assert called == set(triton.TRAINING_STEPS)


@pytest.mark.parametrize("name", triton.TRAINING_STEPS)
def test_reasons(name: str) -> None:
    def reason(device: str, dtype: torch.dtype = FLOAT32) -> str:
        return backends.can_run_triton(name, device=device, dtype=dtype).reason

    if not triton.INSTALLED:
        assert reason("cuda") == "triton is not installed"
        return
    assert reason("cuda") == reason("meta") == ""
    assert "device=xpu is not supported" in reason("xpu")
    assert "dtype=torch.float64 is not supported" in reason("cuda", torch.float64)


@pytest.mark.skipif(triton.INTERPRETED, reason="Triton's kernels run here")
def test_triton_is_refused_where_it_cannot_run() -> None:
    block = build("mbconv")
    with (
        effkernels.backend("triton"),
        pytest.raises(RuntimeError, match=r"backend='triton' was asked for and cannot run: (device=cpu|triton is not)"),
    ):
        block(image(block))


def test_a_gpu_without_compiled_kernels_trains_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton.INSTALLED:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(steps, "_HAS_CUDA_KERNELS", False)

    class OnGpu(Tensor):
        is_cuda, is_cpu, device = True, False, torch.device("cuda:0")

    t = torch.zeros(2, 3, 4, 5).as_subclass(OnGpu)
    assert steps._kernel("training_statistics", t) is triton.training_step("training_statistics")
    with effkernels.backend("reference"):
        assert steps._kernel("training_statistics", t) is None


def test_compiled_kernels_come_first() -> None:
    if not _library.is_loaded():
        pytest.skip("the compiled operators are not there")
    compiled = steps._kernel("training_statistics", torch.zeros(2, 3, 4, 5))
    assert compiled is torch.ops.effkernels.training_statistics

"""How the CPU kernels divide their work among 1 to 64 threads: by arithmetic, no thread is started for it."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from effkernels import _library, create_model
from effkernels.models import model_config
from effkernels.plan.launches import _shape, blocks_of_stack, record_calls

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")

THREADS = range(1, 65)
DTYPES = ("float32", "bfloat16")
LARGEST = 1.15  # of the work of one thread to the mean
FEWEST_UNITS = 8  # for each thread, where the largest share is promised
Layer = tuple[str, tuple[int, ...]]


@lru_cache
def layers(model: str) -> tuple[Layer, ...]:
    """Return the operators that a network calls, each with its sizes for one image; none twice."""
    size = model_config(model).input_size[-1]
    network = create_model(model, device="meta", dtype=torch.bfloat16, backend="cpu").eval()
    images = torch.empty((1, 3, size, size), dtype=torch.bfloat16, device="meta").contiguous(
        memory_format=torch.channels_last
    )
    found: dict[Layer, None] = {}
    for call in record_calls(network, images):
        name = call.op.removeprefix("effkernels::")
        if name == call.op:
            continue  # PyTorch's own
        for one in blocks_of_stack(call) if name == "mbconv_stack" else [call]:
            op = one.op.removeprefix("effkernels::")
            found[op, tuple(_shape(op, one.arguments, False))] = None
    return tuple(found)


def divisions(layer: Layer, dtype: str, batch: int, threads: int) -> list[tuple[str, int, list[int]]]:
    """Return the kernels of a layer: name, units, and the work of each thread that has any."""
    op, shape = layer
    text = torch.ops.effkernels.cpu_plan(op, dtype, [batch, *shape[1:]], threads)
    found = []
    for line in text.splitlines():
        kernel, units, shares = line.split(" ")
        found.append(
            (kernel, int(units.removeprefix("units=")), [int(s) for s in shares.removeprefix("shares=").split(",")])
        )
    return found


# EfficientNetV2's FusedMBConv: 3x3 convolutions of channels_last images, (in, out, size, stride).
DENSE: tuple[Layer, ...] = tuple(
    ("conv_bn_act", (1, inner, outer, size, size, 3, 3, stride, 1, 1, 1, 1))
    for inner, outer, size, stride in ((24, 24, 112, 1), (24, 96, 112, 2), (48, 192, 56, 1), (64, 256, 28, 1))
)


def ratio(shares: list[int], threads: int) -> float:
    """Return the largest share to the mean, threads without work included."""
    return max(shares) * threads / sum(shares)


def check_all(all_layers: tuple[Layer, ...]) -> None:
    """Check that no thread has much more than the mean, wherever there are eight units for each thread.

    A unit is the smallest piece that is worth doing by itself. Of 16 images that is every layer, squeeze-and-excitation
    apart, which is too small for many threads.
    """
    for layer in all_layers:
        for dtype in DTYPES:
            for batch in (1, 2, 16):
                for threads in THREADS:
                    for kernel, units, shares in divisions(layer, dtype, batch, threads):
                        what = (kernel, layer, dtype, batch, threads, shares)
                        assert len(shares) <= threads, what
                        if units >= FEWEST_UNITS * threads and len(shares) == threads:
                            assert ratio(shares, threads) <= LARGEST, what
                        if batch == 16:
                            assert ratio(shares, len(shares)) <= LARGEST, what
                            assert len(shares) > threads // 2 or kernel == "squeeze_excite", what


def test_no_thread_has_much_more_than_the_mean(isa: str) -> None:
    check_all(layers("efficientnet_b0"))


@pytest.mark.parametrize("model", ["efficientnet_b4", "efficientnet_b7", "efficientnet_lite0"])
def test_no_thread_has_much_more_in_other_networks(model: str) -> None:
    check_all(layers(model))


def test_no_thread_has_much_more_in_dense_convolutions() -> None:
    check_all(DENSE)


def test_few_threads_are_used_for_little_work(isa: str) -> None:
    """At least 16,384 multiply-adds each: 32 channels of 7x7 pixels by 96 are work for nine threads."""
    ((_, _, shares),) = divisions(("pointwise_bn_act", (1, 7, 7, 32, 96)), "float32", 1, 64)
    assert len(shares) == 7 * 7 * 32 * 96 // 16384


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("conv", "float32", [1, 3, 8, 8], 2), "op='conv'; allowed: conv_bn_act"),
        (("pointwise_bn_act", "float64", [1, 7, 7, 32, 96], 2), "dtype='float64'"),
        (("pointwise_bn_act", "float32", [1, 7, 7, 32], 2), "4 numbers; allowed: 5"),
        (("pointwise_bn_act", "float32", [1, 7, 7, 32, 96], 0), "threads=0"),
        (("pointwise_bn_act", "float32", [1, 7, 0, 32, 96], 2), "allowed: 1 or more"),
        (("pointwise_bn_act", "float32", [99999, 99999, 99999, 32, 96], 2), "too many elements"),
        (("squeeze_excite_gate", "float32", [0, 96, 4], 2), "batch 0"),
    ],
)
def test_arguments_are_checked(arguments: tuple[str, str, list[int], int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.effkernels.cpu_plan(*arguments)

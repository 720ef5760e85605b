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
MODELS = ("efficientnet_b0", "efficientnet_b4", "efficientnet_b7", "efficientnet_lite0")
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


@pytest.mark.parametrize("model", [*MODELS, "dense"])
def test_no_thread_has_much_more_than_the_mean(model: str, isa: str) -> None:
    """Wherever there are eight units for each thread; a unit is the smallest piece that is worth doing by itself."""
    promised = 0
    for layer in DENSE if model == "dense" else layers(model):
        for dtype in DTYPES:
            for batch in (1, 2, 16):
                for threads in THREADS:
                    for kernel, units, shares in divisions(layer, dtype, batch, threads):
                        assert len(shares) <= threads
                        if units < FEWEST_UNITS * len(shares) or len(shares) < threads:
                            continue
                        promised += 1
                        assert ratio(shares, threads) <= LARGEST, (kernel, layer, dtype, batch, threads, shares)
    assert promised > 1000


@pytest.mark.parametrize("model", MODELS)
def test_threads_have_work_up_to_64(model: str, isa: str) -> None:
    """Of 16 images no layer has a thread with more than 1.15 times the mean, however many threads it is given."""
    for layer in layers(model):
        for dtype in DTYPES:
            for threads in THREADS:
                for kernel, _, shares in divisions(layer, dtype, 16, threads):
                    assert ratio(shares, len(shares)) <= LARGEST, (kernel, layer, dtype, threads, shares)
                    if kernel != "squeeze_excite":  # too small for many threads
                        assert len(shares) > threads // 2

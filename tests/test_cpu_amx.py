"""The level amx_bf16 of the CPU kernels: which products go by tiles, the model of the instructions, the machine code.

The parity tests and those of the CPU kernels (test_cpu_*.py) run at the level, too: over the model everywhere, and on
the instructions where the processor has them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import op_cases
import pytest
import torch
from amx import model
from conftest import AMX_MODEL, Backend, may_use_tiles, need_amx_model, offers
from op_cases import Case, flat
from parity import assert_parity
from torch import Tensor

from effkernels import _library, ops
from effkernels.engine.cpu_recording import Recording
from effkernels.ops import reference

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")

MODEL = Backend("cpu", "cpu", AMX_MODEL)
PRODUCT, CONVOLUTION, EXPANSION, BLOCK = (
    Case(op, dtype=torch.bfloat16, parameters="same")
    for op in ("pointwise_bn_act", "conv_bn_act", op_cases.EXPAND_OP, "mbconv")
)


@pytest.fixture(params=["amx_bf16", AMX_MODEL, "instructions"])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """The library's level, where the processor has it; its kernels over the model; and in trapped instructions."""
    if request.param == "instructions":
        request.getfixturevalue("instructions")
        with model.in_place_of_cpu("amx_bf16_instructions"):
            yield
        return
    if not offers(request.param):
        pytest.skip(f"this processor does not run the kernels of {request.param}")
    if request.param == AMX_MODEL:
        need_amx_model()
    with Backend("cpu", "cpu", request.param).active():
        yield


@pytest.fixture
def instructions(amx: None) -> None:
    """Skips a test of machine code that the compiler cannot make."""
    if not hasattr(model.build(), "amx_product_of_instructions"):
        pytest.skip("the compiler does not know the instructions of AMX")


@pytest.fixture
def amx() -> None:
    """Skips a test of the model where it cannot be built, or the processor lacks what its kernels are compiled for."""
    if not offers(AMX_MODEL):
        pytest.skip("the kernels around the model need a processor with avx512_bf16")
    need_amx_model()


def tiles_of(call: Callable[[], Any]) -> model.Counts:
    """Return what the model did in a call."""
    before = model.counts()
    with MODEL.active():
        call()
    return model.counts() - before


@pytest.mark.parametrize("sizes", [(16, 16, 16), (1, 1, 1), (3, 7, 11), (16, 5, 16)], ids=str)
def test_the_model_computes_what_the_manual_says(sizes: tuple[int, int, int], amx: None) -> None:
    """In float64, where a product is exact and a sum of two float32 numbers is rounded once more to float32."""
    sums, a, b = draw_tiles(*sizes)
    wanted = torch.zeros(2, *sums.shape)
    for k in range(a.shape[1]):
        wanted[k % 2] = (wanted[k % 2].double() + a[:, k, None].double() * b[k].double()).float()
    assert torch.equal(model.product("model", sums, a, b), sums + (wanted[0] + wanted[1]))


def test_denormals_are_zero_in_the_model(amx: None) -> None:
    tiny, one = torch.full((1, 2), 1e-39).bfloat16(), torch.ones(2, 1).bfloat16()
    assert model.product("model", torch.zeros(1, 1), tiny, one * 2.0**20).item() == 0  # operands
    assert model.product("model", torch.full((1, 1), 1e-39), tiny * 0, one).item() == 0  # sums
    small = torch.full((1, 2), 2.0**-100).bfloat16()
    assert model.product("model", torch.zeros(1, 1), small, one * 2.0**-30).item() == 0  # results


@pytest.mark.parametrize("sizes", [(16, 16, 16), (1, 1, 1), (3, 7, 11), (16, 5, 16)], ids=str)
def test_the_instruction_gives_the_bits_of_the_model(sizes: tuple[int, int, int], instructions: None) -> None:
    """The processor's where Linux has granted tiles; elsewhere it shows that the trap reads the machine code right."""
    given = draw_tiles(*sizes)
    before = model.counts()
    by_instructions = model.product("instructions", *given)
    assert (model.counts() - before).products == (0 if may_use_tiles() else 1)
    assert torch.equal(by_instructions, model.product("model", *given))


def draw_tiles(rows: int, columns: int, words: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b = torch.randn(rows, 2 * words), torch.randn(2 * words, columns)
    return torch.randn(rows, columns), a.bfloat16(), b.bfloat16()


def test_products_go_by_tiles_where_that_takes_fewer_cycles(amx: None) -> None:
    assert model.pays(49, 320, 1152)  # the last stage of B0, one image
    assert model.pays(12544, 96, 16)  # the first expansion
    assert not model.pays(1, 1000, 1280)  # a classifier's weights are read as they are stored
    assert not model.pays(4, 100, 100)  # a quarter of a tile of rows
    assert not model.pays(12544, 32, 15)  # less than half a tile of channels
    for channels in (16, 40, 1152):
        for out_channels in (8, 40, 320):
            choices = [model.pays(pixels, out_channels, channels) for pixels in range(1, 400)]
            assert choices == sorted(choices), "more pixels never make vectors the better choice"


CASES = {
    "a product": (PRODUCT.with_(height=7, width=7, channels=100, out_channels=70), True),
    "a gated one": (PRODUCT.with_(height=7, width=7, channels=64, out_channels=70, gated=True, residual=True), True),
    "rows read in place": (PRODUCT.with_(height=9, width=15, channels=64, out_channels=40), True),
    "an expansion": (EXPANSION.with_(channels=24, out_channels=72), True),
    "windows": (CONVOLUTION.with_(channels=24, out_channels=40, height=13, width=15), True),
    "a stem": (CONVOLUTION.with_(channels=3, out_channels=40, height=61, width=75), False),
    "few pixels of many images": (PRODUCT.with_(batch=64, height=2, width=2, channels=200, out_channels=50), False),
    "few pixels": (PRODUCT.with_(height=1, width=2, channels=100, out_channels=70), False),
    "few channels": (PRODUCT.with_(height=7, width=7, channels=15, out_channels=70), False),
    "float32": (PRODUCT.with_(dtype=torch.float32, height=7, width=7, channels=100), False),
    "float16": (PRODUCT.with_(dtype=torch.float16, height=7, width=7, channels=100), False),
    "weights in float32": (PRODUCT.with_(parameters="float32", height=7, width=7, channels=100), False),
}


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_used_and_given_back(name: str, amx: None) -> None:
    """A thread loads one configuration for its share, and releases it."""
    case, by_tiles = CASES[name]
    given = case.draw()
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            done = tiles_of(lambda: op_cases.run(ops, case, given))
            assert (done.products > 0) == by_tiles
            assert done.releases == done.configurations
            assert (done.configurations > 0) == by_tiles
            assert done.configurations <= count
    finally:
        torch.set_num_threads(threads)


# What each is for; the operators' usual shapes are those of test_ops_parity.py.
ODD = {
    "half a tile of channels": PRODUCT.with_(channels=16, out_channels=15),
    "one channel more": PRODUCT.with_(channels=17, out_channels=17),
    "a tile of channels": PRODUCT.with_(channels=32, out_channels=32),
    "an odd number of channels, gated": PRODUCT.with_(channels=33, out_channels=33, gated=True, residual=True),
    "sums in blocks": PRODUCT.with_(channels=1152, out_channels=49, height=7, width=7),
    "sums in blocks, the last one short": PRODUCT.with_(channels=517, out_channels=70, height=5, width=5, gated=True),
    "dense rows of several images": PRODUCT.with_(channels=64, out_channels=31, batch=5, height=3, width=7),
    "one output": PRODUCT.with_(channels=40, out_channels=1),
    "a sliced image": PRODUCT.with_(channels=64, out_channels=40, layout="sliced"),
    "an expanded image": PRODUCT.with_(channels=64, out_channels=40, layout="expanded"),
    "windows of an odd length": CONVOLUTION.with_(channels=5, out_channels=33, height=9, width=17),
    "strided windows": CONVOLUTION.with_(channels=24, out_channels=40, stride=2),
    "windows of one pixel": CONVOLUTION.with_(channels=48, out_channels=24, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "an expansion in several bands": EXPANSION.with_(channels=16, out_channels=40, height=61, width=30),
    "an expansion of long sums": EXPANSION.with_(channels=300, out_channels=70, height=6, width=14),
    "a strided expansion": EXPANSION.with_(channels=33, out_channels=47, kernel=(5, 5), stride=2),
    "a block": BLOCK.with_(channels=40, expanded=240, out_channels=40, residual=True, height=11, width=9),
}


@pytest.mark.parametrize("name", ODD)
def test_parity_at_odd_sizes_and_the_same_bits_for_any_threads(name: str, level: None) -> None:
    case = ODD[name]
    given = case.draw()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(op_cases.run(ops, case, given))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    with op_cases.one_thread():
        plain = op_cases.run(reference, case, given)
    for y, same_dtype, truth in zip(results[0], plain, op_cases.truth(case, given), strict=True):
        assert_parity(y, same_dtype, truth)


@pytest.mark.parametrize("side", [2, 3, 7])  # by vectors, by tiles
def test_the_batch_does_not_change_an_image(side: int, level: None) -> None:
    case = PRODUCT.with_(batch=21, height=side, width=side, channels=200, out_channels=50, gated=True, residual=True)
    given = case.draw()
    (whole,) = op_cases.run(ops, case, given)
    for batch in (1, 2, 5, 16):
        few = given | {name: given[name][:batch] for name in ("x", "gate", "residual")}
        assert torch.equal(op_cases.run(ops, case, few)[0], whole[:batch])


@pytest.mark.parametrize("batch", [1, 2])
def test_full_tiles_are_read_in_place_to_the_same_bits(batch: int, amx: None) -> None:
    """Of dense rows of whole tiles; rows that are slices of longer ones are copied first."""
    longer = torch.randn(batch, 100, 9, 15).bfloat16().contiguous(memory_format=torch.channels_last)
    x = longer[:, 2:98]
    weight = torch.randn(40, 96, 1, 1).bfloat16()
    with MODEL.active():
        sliced = flat(ops).pointwise_bn_act(x, weight=weight)
        dense = flat(ops).pointwise_bn_act(x.contiguous(memory_format=torch.channels_last), weight=weight)
    assert torch.equal(sliced, dense)


@pytest.mark.parametrize("case", ["a product", "a gated one", "few pixels", "few channels"])
def test_recordings_keep_the_weights_as_the_product_reads_them(case: str, amx: None) -> None:
    given = CASES[case][0].with_(batch=1).draw()
    with MODEL.active(), torch.inference_mode():
        recording = Recording(lambda x: flat(ops).pointwise_bn_act(**given | {"x": x}), given["x"])
        recording.replay()
        assert isinstance(recording.output, Tensor)
        assert torch.equal(recording.output, flat(ops).pointwise_bn_act(**given))


def test_infinite_weights_stay_in_their_channel(amx: None) -> None:
    """The words after the last channel, and the columns after the last one, are zero and not a neighbour's."""
    x = torch.randn(1, 40, 7, 7).bfloat16()
    weight = torch.randn(33, 40, 1, 1).bfloat16()
    weight[16] = float("inf")
    with MODEL.active():
        y = flat(ops).pointwise_bn_act(x, weight=weight)
    finite = torch.isfinite(y).all(dim=(0, 2, 3))
    assert finite.sum() == 32
    assert not finite[16]


def test_the_level_is_refused_on_other_processors() -> None:
    if may_use_tiles():
        pytest.skip("this processor has the level")
    with pytest.raises(RuntimeError, match=r"cpu_isa: name='amx_bf16' is not built or not on this machine; allowed: "):
        torch.ops.effkernels.cpu_isa("amx_bf16")


def test_the_library_has_the_instructions() -> None:
    if "amx_bf16" not in _library.build_info()["cpu_isas"]:
        pytest.skip("the compiler of this build does not know AMX")
    if shutil.which("objdump") is None:
        pytest.skip("objdump was not found")
    done = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", str(_library.LIBRARY_FILE)],
        capture_output=True,
        text=True,
        check=True,
    )
    for instruction in ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert f"\t{instruction}" in done.stdout

"""expand_depthwise_squeeze in Triton: which calls stay on the chip, how they are cut, and that every cut is right."""

from __future__ import annotations

import itertools
from typing import Any

import op_cases
import pytest
import torch
from conftest import Backend
from op_cases import DTYPES, EXPAND_OP, Case
from test_ops_parity import check
from torch import Tensor

from effkernels import ops

H200 = 132  # multiprocessors
CAPABILITIES = (0, 8, 9, 12)  # the first numbers of those that the cut distinguishes, and 0 of AMD's GPUs

# (input channels, height, width, kernel, stride) of layers.
EARLY = ((16, 112, 112, 3, 2), (24, 56, 56, 3, 1), (24, 56, 56, 5, 2), (40, 28, 28, 3, 2), (80, 14, 14, 3, 1))
LATE = ((192, 7, 7, 5, 1), (192, 7, 7, 3, 1), (112, 14, 14, 5, 2))


def on_chip(layer: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, dilation: int = 1, **how: Any) -> bool:
    from effkernels.triton.expand_depthwise import one_pass

    channels, height, width, kernel, stride = layer
    sizes = (height, width, height // stride, width // stride, kernel, stride, dilation, dtype)
    return one_pass(channels, *sizes, **({"exact": False, "aligned": True, "capability": 9} | how))


@pytest.fixture
def on_chip_always(monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    """Programs as a GPU has them, for shapes that would take two launches as well."""
    from effkernels.triton import expand_depthwise

    monkeypatch.setattr(expand_depthwise, "one_pass", lambda *call: True)
    monkeypatch.setattr(expand_depthwise, "_INTERPRETED_LANES", 8)


def launched(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the kernels of one call, each with its number of programs."""
    from effkernels.triton import _launch

    found: list[tuple[str, int]] = []
    run = _launch.run

    def counted(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append((kernel.fn.__name__, grid[0]))
        run(kernel, grid, *args, **options)

    monkeypatch.setattr(_launch, "run", counted)
    op_cases.run(ops, case, case.draw())
    return found


class TestTheChoice:
    @pytest.fixture(autouse=True)
    def triton(self) -> None:
        pytest.importorskip("triton")

    @pytest.mark.parametrize("layer", EARLY, ids=str)
    def test_early_layers_stay_on_the_chip(self, layer: tuple[int, ...]) -> None:
        assert on_chip(layer)

    @pytest.mark.parametrize("layer", LATE, ids=str)
    def test_small_planes_of_many_channels_do_not(self, layer: tuple[int, ...]) -> None:
        assert not on_chip(layer)

    def test_what_a_lane_cannot_share_does_not(self) -> None:
        assert not on_chip((24, 56, 56, 3, 1), dilation=2)
        assert not on_chip((24, 56, 56, 7, 1))
        assert not on_chip((256, 56, 56, 3, 1))

    def test_exact_products_only_of_few_channels(self) -> None:
        assert on_chip((32, 56, 56, 3, 1), torch.float32, exact=True)
        assert not on_chip((40, 56, 56, 3, 1), torch.float32, exact=True)
        assert not on_chip((16, 112, 112, 3, 2), torch.float32, exact=True)
        assert on_chip((16, 112, 112, 3, 2), torch.float32)

    def test_of_pixels_that_are_no_whole_vectors_only_a_3x3_of_stride_1_does(self) -> None:
        assert on_chip((24, 56, 56, 3, 1), aligned=False)
        for layer, dtype in itertools.product(((16, 112, 112, 3, 2), (24, 56, 56, 5, 1), (24, 56, 56, 5, 2)), DTYPES):
            assert not on_chip(layer, dtype, aligned=False)

    def test_makes_one_launch_or_two(self, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
        case = Case(EXPAND_OP, batch=1, channels=8, out_channels=8, height=14, width=14)
        assert [name for name, _ in launched(case, monkeypatch)] == ["expand_depthwise_kernel"]
        two = case.with_(dilation=2, padding=(2, 2, 2, 2))
        assert [name for name, _ in launched(two, monkeypatch)] == ["pointwise_kernel", "depthwise_kernel"]


class TestTheCut:
    @pytest.fixture(autouse=True)
    def triton(self) -> None:
        pytest.importorskip("triton")

    def test_is_of_what_the_kernel_takes(self) -> None:
        from effkernels.triton.expand_depthwise import cut_of

        for capability, kernel, stride, dtype in itertools.product(CAPABILITIES, (3, 5), (1, 2), DTYPES):
            for exact, aligned in itertools.product({False, dtype is torch.float32}, (False, True)):
                cut = cut_of(kernel, stride, dtype, exact, aligned, capability)
                assert cut.strip in (1, 2, 4), "what columns_together takes"
                assert cut.columns in (1, 2, 4), "what columns_apart takes"
                assert cut.step >= 16, "what tl.dot takes"
                assert cut.block % 64 == 0, "an m16 of mma.sync for each of four warps, an m64 of wgmma for all"
                assert capability == 9 or cut.columns * cut.lanes <= 32, "a tile that no two warps share in width"

    @pytest.mark.parametrize("slots", [1, 2 * H200])
    @pytest.mark.parametrize("programs", [1, 48, 4096])
    def test_sweeps_cover_the_plane_once(self, programs: int, slots: int) -> None:
        from effkernels.triton.expand_depthwise import cut_of, sweep_of

        cut = cut_of(3, 1, torch.bfloat16, False, True, 9)
        for height, width, kernel, stride in itertools.product((1, 7, 56), (1, 14, 57), (3, 5), (1, 2)):
            sweep = sweep_of(cut, programs, height, width, kernel, stride, slots)
            chunks = -(-height // sweep.tall)
            assert (sweep.strips - 1) * cut.strip < width <= sweep.strips * cut.strip
            assert (chunks - 1) * sweep.tall < height
            assert (sweep.tiles - 1) * cut.lanes < sweep.strips * chunks <= sweep.tiles * cut.lanes

    def test_few_images_take_shorter_lanes(self) -> None:
        from effkernels.triton.expand_depthwise import cut_of, sweep_of

        cut = cut_of(3, 1, torch.bfloat16, False, True, 9)
        one, many = (sweep_of(cut, programs, 56, 56, 3, 1, 2 * H200) for programs in (3, 3 * 256))
        assert one.tall < many.tall
        assert one.tiles > many.tiles


# Shapes of several programs along the plane and the channels, of idle lanes, of lanes that end outside the plane.
SHAPES = {
    "tiles and groups": {"height": 19, "width": 33, "channels": 24, "out_channels": 72},
    "one pixel": {"height": 1, "width": 1, "channels": 7, "out_channels": 130, "batch": 4},
    "wide padding": {"height": 5, "width": 6, "channels": 8, "out_channels": 24, "padding": (4, 0, 2, 5)},
}


@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(("tiles and groups", dtype) for dtype in DTYPES), *((shape, torch.float16) for shape in list(SHAPES)[1:])],
    ids=str,
)
def test_every_cut_is_right(
    shape: str,
    kernel: int,
    capability: int,
    dtype: torch.dtype,
    on_chip_always: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from effkernels.triton import expand_depthwise

    monkeypatch.setattr(expand_depthwise, "capability_of", lambda device: capability)
    options: dict[str, Any] = {"batch": 1, "padding": (2, 3, 2, 3)} | SHAPES[shape]
    stride = 2 if (kernel == 5) == (capability == 9) else 1
    case = Case(EXPAND_OP, dtype, kernel=(kernel, kernel), stride=stride, layout="sliced", **options)
    check(case, Backend("triton", "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_launch_and_two_give_the_same(
    dtype: torch.dtype, on_chip_always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the order of the sums: the expanded tensor is rounded to x's type on the chip, too."""
    from effkernels.triton import expand_depthwise

    case = Case(EXPAND_OP, dtype, batch=1, channels=16, out_channels=24, bias=True, activation="identity")
    arguments = case.draw()
    y, pooled = op_cases.run(ops, case, arguments)
    monkeypatch.setattr(expand_depthwise, "one_pass", lambda *call: False)
    two_y, two_pooled = op_cases.run(ops, case, arguments)
    torch.testing.assert_close(y, two_y)
    torch.testing.assert_close(pooled, two_pooled)


def test_offsets_of_64_bits_change_nothing(on_chip_always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from effkernels.triton import _launch

    case = Case(EXPAND_OP, batch=2, channels=8, out_channels=24, height=9, width=10, layout="sliced")
    arguments = case.draw()
    narrow = op_cases.run(ops, case, arguments)
    monkeypatch.setattr(_launch, "is_wide", lambda *images: True)
    assert all(torch.equal(a, b) for a, b in zip(op_cases.run(ops, case, arguments), narrow, strict=True))


def test_counters_are_left_at_zero(on_chip_always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next launch of the stream can use them, without a fill in between."""
    from effkernels.triton import _launch

    kept = torch.zeros(64, dtype=torch.int32)
    used: list[int] = []

    def counters(device: torch.device, count: int) -> Tensor:
        used.append(count)
        return kept

    monkeypatch.setattr(_launch, "counters", counters)
    case = Case(EXPAND_OP, batch=1, channels=8, out_channels=72, height=17, width=40)
    arguments = case.draw()
    first = op_cases.run(ops, case, arguments)
    assert used == [2], "two groups of channels of one image"
    assert kept.count_nonzero() == 0
    assert all(torch.equal(a, b) for a, b in zip(op_cases.run(ops, case, arguments), first, strict=True))

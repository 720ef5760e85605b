"""The tiles of the Triton product, as for a GPU with many multiprocessors, here interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from op_cases import DTYPES, Case
from test_ops_parity import check

H200 = 132  # multiprocessors

# Shapes that meet the ways of the kernel which tests of few pixels and few channels pass by.
SHAPES = {
    "tiles over several images": {"batch": 40, "height": 3, "width": 5, "channels": 40, "out_channels": 33},
    "an image ends inside its last tile": {"batch": 3, "height": 7, "width": 11, "channels": 24, "out_channels": 40},
    "many input channels, in runs": {"batch": 2, "height": 7, "width": 7, "channels": 300, "out_channels": 70},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_tiles(
    shape: str, layout: str, dtype: torch.dtype, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU has many multiprocessors, and its tiles are small; interpreted ones are large unless it is asked for."""
    from effkernels.triton import pointwise

    monkeypatch.setattr(pointwise, "multiprocessors", lambda device: H200)
    case = Case("pointwise_bn_act", dtype, layout=layout, gated=True, residual=True, **SHAPES[shape])
    check(case, Backend("triton", "cpu"))


def tiles(images: int, pixels: int, in_channels: int, out_channels: int, multiprocessors: int, **how: bool) -> int:
    """Programs of one launch, and what has to hold of every tile."""
    from effkernels.triton import pointwise

    spans = images > 1 and pixels < pointwise.FEWEST_PIXELS_OF_OWN_TILE
    choice = {"exact": False, "gated": False, **how}
    found = 0
    for dtype in (torch.bfloat16, torch.float32):
        if choice["exact"] and dtype is not torch.float32:
            continue
        tile = pointwise.tile_of(
            images, pixels, in_channels, out_channels, dtype, spans=spans, multiprocessors=multiprocessors, **choice
        )
        assert all(size & (size - 1) == 0 and size >= 16 for size in tile[:3]), "what tl.dot takes"
        assert tile.rows * tile.columns <= 128 * 128
        rows = -(-images * pixels // tile.rows) if spans else images * -(-pixels // tile.rows)
        found = rows * -(-out_channels // tile.columns)
        smallest = tile.rows <= 32 and tile.columns <= 32
        assert found >= multiprocessors or smallest, "idle multiprocessors beside tiles that could be smaller"
    return found


class TestTiles:
    @pytest.mark.parametrize("exact", [False, True])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("out_channels", [1, 16, 24, 80, 192, 1280])
    @pytest.mark.parametrize("in_channels", [1, 16, 24, 144, 1152])
    def test_every_multiprocessor_has_one(self, in_channels: int, out_channels: int, gated: bool, exact: bool) -> None:
        pytest.importorskip("triton")
        for images in (1, 8, 256):
            for size in (1, 4, 7, 14, 56, 112):
                for multiprocessors in (1, 108, H200):
                    tiles(images, size * size, in_channels, out_channels, multiprocessors, gated=gated, exact=exact)

    def test_more_work_takes_no_fewer_programs(self) -> None:
        pytest.importorskip("triton")
        counts = [tiles(images, 196, 480, 80, H200, gated=True) for images in (1, 2, 8, 64, 256)]
        assert counts == sorted(counts)

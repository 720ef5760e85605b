"""Padding is PyTorch's, TensorFlow's SAME, or SAME frozen at one size, on both ways through the modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effkernels.models.peers import import_timm
from effkernels.nn import PaddedConv2d, explicit_padding, same_padding, symmetric_padding

sizes = st.integers(1, 70)
kernels = st.sampled_from([1, 2, 3, 5, 7, 9])
strides = st.integers(1, 3)
dilations = st.integers(1, 2)


@given(size=sizes, kernel=kernels, stride=strides, dilation=dilations)
def test_same_padding_is_the_rule_of_tensorflow(size: int, kernel: int, stride: int, dilation: int) -> None:
    before, after = same_padding(size, kernel, stride, dilation)
    span = dilation * (kernel - 1) + 1
    outputs = -(-size // stride)
    assert before + after == max((outputs - 1) * stride + span - size, 0)
    assert after - before in (0, 1)
    assert (size + before + after - span) // stride + 1 == outputs


@given(size=sizes, kernel=st.sampled_from([1, 3, 5, 7, 9]), stride=st.integers(1, 2), dilation=dilations)
def test_symmetric_padding_gives_as_many_pixels_as_same(size: int, kernel: int, stride: int, dilation: int) -> None:
    pad = symmetric_padding(kernel, stride, dilation)
    span = dilation * (kernel - 1) + 1
    assert (size + 2 * pad - span) // stride + 1 == -(-size // stride)


@given(height=st.integers(5, 20), width=st.integers(5, 20), kernel=st.sampled_from([3, 5]), stride=st.integers(1, 2))
def test_convolution_equals_timms(height: int, width: int, kernel: int, stride: int) -> None:
    timm = import_timm()
    x = torch.randn(1, 4, height, width)
    for pad_type in ("", "same"):
        theirs = timm.layers.create_conv2d(4, 4, kernel, stride=stride, padding=pad_type, depthwise=True)
        ours = PaddedConv2d(4, 4, kernel, stride, groups=4, pad_type=pad_type)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours(x), theirs(x))


@given(height=st.integers(5, 20), width=st.integers(5, 20), native=st.integers(5, 20))
def test_explicit_padding_is_what_the_convolution_pads(height: int, width: int, native: int) -> None:
    x = torch.randn(1, 3, height, width)
    for pad_type in ("", "same", "same_native"):
        conv = PaddedConv2d(3, 2, 5, 2, pad_type=pad_type, native_size=(native, native))
        top, bottom, left, right = explicit_padding(conv, height, width)
        wanted = F.conv2d(F.pad(x, (left, right, top, bottom)), conv.weight, stride=2)
        assert torch.allclose(conv(x), wanted, atol=1e-6)
    assert explicit_padding(conv, height, width) == (*same_padding(native, 5, 2), *same_padding(native, 5, 2))


def test_explicit_padding_of_pytorchs_own_convolutions() -> None:
    assert explicit_padding(nn.Conv2d(1, 1, (3, 5), padding=(1, 2)), 9, 9) == (1, 1, 2, 2)
    assert explicit_padding(nn.Conv2d(1, 1, (2, 5), padding="same"), 9, 9) == (0, 1, 2, 2)
    assert explicit_padding(nn.Conv2d(1, 1, 3, padding="valid"), 9, 9) == (0, 0, 0, 0)


def test_padding_changes_in_place() -> None:
    conv = PaddedConv2d(3, 8, 3, 2)
    weight = conv.weight
    assert conv.padding == (1, 1)
    conv.set_padding("same")
    assert conv.weight is weight
    assert conv(torch.randn(1, 3, 8, 9)).shape == (1, 8, 4, 5)
    assert "pad_type='same'" in repr(conv)
    conv.set_padding("same_native", (8, 9))
    assert "native_size=(8, 9)" in repr(conv)
    conv.set_padding("")
    assert conv.padding == (1, 1)
    assert "pad_type" not in repr(conv)


def test_bad_padding_is_named() -> None:
    with pytest.raises(ValueError, match="pad_type='reflect' is not known; allowed: '', 'same', 'same_native'"):
        PaddedConv2d(3, 8, 3, pad_type="reflect")
    with pytest.raises(ValueError, match="needs native_size"):
        PaddedConv2d(3, 8, 3, pad_type="same_native")

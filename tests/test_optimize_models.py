"""Other people's models, optimised: as exact as before, as many blocks fused as they have, and reversible."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from optimize_models import PAGE, PEERS, Peer, build, is_installed, with_table
from parity import assert_parity
from peer_models import images, in_both_layouts, in_float64
from torch import nn

import effkernels
from effkernels.optimize import Report


def parameters(peers: Iterable[Peer]) -> list[Any]:
    return [pytest.param(peer, id=peer.id, marks=[pytest.mark.thorough] * peer.thorough) for peer in peers]


RUNNING = parameters(peer for peer in PEERS if peer.size is not None)
META = parameters(peer for peer in PEERS if peer.size is None)


def made(peer: Peer) -> nn.Module:
    if not is_installed(peer.library):
        pytest.skip(f"{peer.library} is not installed")
    return build(peer)


def assert_counts(report: Report, peer: Peer) -> None:
    left = [f"{block.name}: {block.reason}" for block in report.blocks if not block.fused]
    assert (report.fused, len(left)) == (peer.fused, peer.left), left


@pytest.mark.parametrize("peer", RUNNING)
def test_logits_are_as_exact_as_before_and_everything_comes_back(peer: Peer) -> None:
    model = made(peer)
    x = images(2, *peer.size)
    classes = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(x)
        same_dtype, truth = in_both_layouts(model, x), in_float64(model, x)
        report = effkernels.optimize_(model)
        assert_counts(report, peer)
        assert_parity(model(x), same_dtype, truth, "NCHW logits")
        assert_parity(model(x.contiguous(memory_format=torch.channels_last)), same_dtype, truth, "channels_last logits")
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert effkernels.restore_(model) == peer.fused
    assert [type(module) for module in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("peer", META)
def test_the_structure_of_large_models_is_found_on_the_meta_device(peer: Peer) -> None:
    assert_counts(effkernels.optimize_(made(peer), input_size=64), peer)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "tf_efficientnetv2_b0"])
def test_bfloat16_logits_are_as_exact_as_before(name: str) -> None:
    peer = next(peer for peer in PEERS if (peer.library, peer.name) == ("timm", name))
    model = made(peer).bfloat16()
    x = images(8, 64, 64).bfloat16()
    with torch.no_grad():
        same_dtype, truth = in_both_layouts(model, x), in_float64(model, x)
        assert_counts(effkernels.optimize_(model), peer)
        assert_parity(model(x), same_dtype, truth)


def test_all_that_an_optimised_network_launches_is_counted() -> None:
    report = effkernels.optimize_(made(PEERS[0]))
    assert report.input_size == (3, 224, 224)
    for block in report.blocks:
        if block.launches_before is None:
            pytest.skip("the compiled library, which holds the plans, is not there")
        assert block.launches_after == {"conv_norm_act": 1, "depthwise_separable": 2, "mbconv": 3}[block.kind]
        assert block.launches_before > 2 * block.launches_after
        assert block.bytes_before > block.bytes_after


def test_the_bytes_after_are_those_of_our_own_model() -> None:
    from effkernels.plan.launches import plan_model

    report = effkernels.optimize_(made(PEERS[0]))
    if report.blocks[0].bytes_after is None:
        pytest.skip("the compiled library, which holds the plans, is not there")
    planned = plan_model("efficientnet_b0", gpu="h200", batch_size=1, precision="float32").by_block()
    found = {block.name: (block.launches_after, block.bytes_after) for block in report.blocks}
    assert found.pop("conv_head")[0] == planned.pop("conv_head").launches == 1  # our own pools in this launch
    assert found == {name: (planned[name].launches, planned[name].bytes) for name in planned if name in _names(report)}


def _names(report: Report) -> set[str]:
    return {block.name for block in report.blocks}


def test_timm_features_come_out_as_before() -> None:
    from effkernels.models.peers import import_timm

    model = import_timm().create_model("efficientnet_b0", features_only=True).eval()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = effkernels.optimize_(model)
    assert report.fused == 17, str(report)  # no head
    x = images(1, 64, 64)
    with torch.no_grad():
        channels_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        others = channels_last(x.contiguous(memory_format=torch.channels_last))
        for found, wanted, other, truth in zip(model(x), plain(x), others, exact(x.double()), strict=True):
            assert found.stride() == wanted.stride()
            assert_parity(found, [wanted, other], truth)


def test_the_page_on_drop_in_use_lists_these_models() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "python tests/optimize_models.py"

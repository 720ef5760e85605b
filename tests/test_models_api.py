"""A model behaves as a PyTorch module: formats, dtypes, copies, traces, heads."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peer_models import SMALL, images, randomise, small
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import effkernels
from effkernels.models import EfficientNet, EfficientNetFeatures, FeatureInfo


@pytest.fixture(scope="module")
def model() -> EfficientNet:
    """Shared by tests that do not change it."""
    return small()


def close(a: Tensor, b: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 10)


def test_memory_format_in_is_memory_format_out(model: EfficientNet) -> None:
    x = images(2, 33, 31)
    last = x.contiguous(memory_format=torch.channels_last)
    sliced = torch.cat([x, x], 3)[..., :31]
    backbone = randomise(EfficientNetFeatures(SMALL))
    with torch.inference_mode():
        wanted = model.forward_features(x)
        assert wanted.is_contiguous()
        for y in (model.forward_features(sliced), *backbone(x), *backbone(sliced)):
            assert y.is_contiguous()
        for y in (model.forward_features(last), *backbone(last)):
            assert y.is_contiguous(memory_format=torch.channels_last)
        close(model.forward_features(last), wanted)
        close(model.forward_features(sliced), wanted)
        model.train()
        assert copy.deepcopy(model).forward_features(last).is_contiguous(memory_format=torch.channels_last)
        model.eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model, x = small(), images(2, 33, 31)
    with torch.inference_mode():
        wanted = model(x)
        logits = model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    error = float((logits.float() - wanted).abs().max() / wanted.abs().max())
    assert error < 30 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def test_autocast(model: EfficientNet) -> None:
    x = images(2, 33, 31)
    with torch.inference_mode():
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert float((logits.float() - wanted).abs().max() / wanted.abs().max()) < 0.1


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(model: EfficientNet, batch: int) -> None:
    with torch.inference_mode():
        assert model(images(batch, 33, 31)).shape == (batch, 10)


def test_copies_and_pickles(model: EfficientNet) -> None:
    x = images(2, 33, 31)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.inference_mode():
        wanted = model(x)
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(x), wanted)
    assert loaded.feature_info.channels() == model.feature_info.channels()


@pytest.mark.parametrize(
    ("x", "shape"), [(torch.zeros(3, 8, 8), r"\(3, 8, 8\)"), (torch.zeros(1, 4, 8, 8), r"\(1, 4, 8, 8\)")]
)
def test_what_is_no_image_is_refused(model: EfficientNet, x: Tensor, shape: str) -> None:
    with pytest.raises(ValueError, match=rf"EfficientNet: x has shape {shape}; needed are images \(N, 3, H, W\)"):
        model(x)


def test_nan_goes_through(model: EfficientNet) -> None:
    x = images(2, 33, 31)
    x[1, 0, 5, 5] = torch.nan
    with torch.inference_mode():
        logits = model(x)
    assert torch.isfinite(logits[0]).all()
    assert torch.isnan(logits[1]).all()


def test_heads() -> None:
    model, x = small(), images(2, 33, 31)
    assert model.get_classifier() is model.classifier
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert pooled.shape == (2, model.num_features)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        assert (model.num_classes, model.classifier.out_features) == (7, 7)
        model.reset_classifier(0)
        assert isinstance(model.classifier, nn.Identity)
        close(model(x), pooled)
        model.reset_classifier(0, "max")
        close(model(x), model.forward_features(x).amax((2, 3)))
        model.reset_classifier(0, "")
        assert torch.equal(model(x), model.forward_features(x))
        with pytest.raises(ValueError, match="num_classes=3 needs global_pool"):
            model.reset_classifier(3)
        model.reset_classifier(3, "avg")
        assert model(x).shape == (2, 3)
    model.half().reset_classifier(5)
    assert model.classifier.weight.dtype == torch.float16


def test_feature_info() -> None:
    info = FeatureInfo.of(SMALL)
    assert info.reduction() == [2, 4, 8]
    assert info.channels() == [8, 16, 24]
    assert [feature["index"] for feature in info] == [0, 1, 2]
    assert info[-1]["module"] == "blocks.2"
    assert info.select((-1, 0)).reduction() == [2, 8]
    assert len(info[:2]) == 2


def test_unasked_stages_are_not_run() -> None:
    backbone = randomise(EfficientNetFeatures(SMALL, out_indices=(0, 1)))
    backbone.blocks[2].register_forward_hook(lambda *arguments: pytest.fail("the last stage ran"))
    with torch.inference_mode():
        assert [t.shape[1] for t in backbone(images(1, 33, 31))] == [8, 16]


def test_the_model_runs_on_the_backend_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    conv = effkernels.ops.conv_bn_act
    monkeypatch.setattr(
        effkernels.ops, "conv_bn_act", lambda *a, **k: (seen.append(effkernels.backends.selected()), conv(*a, **k))[1]
    )
    x = images(1, 33, 31)
    model = small(backend="reference")
    model(x)
    model.forward_features(x)
    model.backend = None
    model(x)
    assert seen[:2] == ["reference", "reference"]
    assert seen[2] != "reference" or effkernels.backends.selected() == "reference"


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("pad_type", ["", "same"])
def test_one_graph_for_every_batch_height_and_width(pad_type: str, backend: str | None) -> None:
    torch._dynamo.reset()
    model = small(pad_type=pad_type, backend=backend)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.inference_mode():
        for batch, height, width in ((2, 65, 97), (3, 64, 46), (5, 33, 70)):
            x = images(batch, height, width)
            close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_backbones_trace_to_one_graph_too() -> None:
    torch._dynamo.reset()
    backbone = randomise(EfficientNetFeatures(SMALL, pad_type="same"))
    counter = CompileCounter()
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend=counter)
    with torch.inference_mode():
        for height, width in ((65, 97), (64, 46)):
            x = images(2, height, width)
            for found, wanted in zip(compiled(x), backbone(x), strict=True):
                close(found, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("pad_type", ["", "same"])
def test_export_with_dynamic_sizes(pad_type: str) -> None:
    model = small(pad_type=pad_type)
    # From 9 pixels on: below, the last maps have one, and torch traces sizes of one as constants.
    batch = torch.export.Dim("batch", max=64)
    height, width = torch.export.Dim("height", min=9, max=640), torch.export.Dim("width", min=9, max=640)
    program = torch.export.export(model, (images(2, 65, 97),), dynamic_shapes=({0: batch, 2: height, 3: width},))
    with torch.inference_mode():
        for size in ((1, 64, 46), (3, 33, 70)):
            x = images(*size)
            close(program.module()(x), model(x))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    model, x = small(pad_type="same"), images(2, 33, 46)
    with torch.inference_mode():
        close(torch.compile(model, fullgraph=True, dynamic=True)(x), model(x), rtol=1e-3)


def test_groups_of_parameters_by_depth(model: EfficientNet) -> None:
    import re

    groups = model.group_matcher()
    patterns = [groups["stem"], *(pattern for pattern, _ in groups["blocks"])]
    names = [name for name, _ in model.named_parameters() if not name.startswith("classifier")]
    assert all(sum(bool(re.match(pattern, name)) for pattern in patterns) == 1 for name in names)

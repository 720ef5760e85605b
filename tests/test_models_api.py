"""A model behaves as a PyTorch module: formats, dtypes, copies, traces, heads."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from called_operators import fused_operators
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


@pytest.mark.parametrize("feature_cls", [None, "list", "getter"])
def test_every_class_of_timms_that_is_offered_gives_the_same_maps(feature_cls: str | None) -> None:
    backbone = effkernels.create_model("efficientnet_b0", features_only=True, feature_cls=feature_cls).eval()
    with torch.inference_mode():
        shapes = [tuple(t.shape[1:]) for t in backbone(images(1, 64, 64))]
    assert shapes == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]


def test_unasked_stages_are_not_run() -> None:
    backbone = randomise(EfficientNetFeatures(SMALL, out_indices=(0, 1)))
    backbone.blocks[2].register_forward_hook(lambda *arguments: pytest.fail("the last stage ran"))
    with torch.inference_mode():
        assert [t.shape[1] for t in backbone(images(1, 33, 31))] == [8, 16]


def test_the_model_runs_on_the_backend_it_was_given() -> None:
    x = images(1, 33, 31)
    model = small(backend="reference")
    for forward in (model, model.forward_features, randomise(EfficientNetFeatures(SMALL, backend="reference"))):
        assert fused_operators(forward, x) == 0
    model.backend = None
    assert (fused_operators(model, x) > 0) == (effkernels.ops.backends.choose("conv_bn_act", x) != "reference")
    with effkernels.backend("reference"):
        assert fused_operators(model, x) == 0
    with pytest.raises(ValueError, match="backend='gpu' is not known; allowed: None, auto, cuda"):
        model.backend = "gpu"


def test_threads_with_backends_of_their_own_leave_the_process_as_it_was(compiled: None) -> None:
    x = images(1, 33, 31)
    model, forced = small(), small(backend="reference")
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(turn: int) -> None:
        start.wait()
        try:
            for _ in range(10):
                if turn % 2:
                    assert fused_operators(forced, x) == 0
                else:
                    with effkernels.backend(("cpu", "reference")[turn // 2]):
                        model(x)
        except BaseException as failure:
            failures.append(failure)

    before = effkernels.ops.backends.selected()
    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert effkernels.ops.backends.selected() == before
    assert fused_operators(model, x) > 0


@pytest.mark.parametrize(
    ("pad_type", "backend"),
    [
        ("same", None),
        ("", "reference"),
        pytest.param("", None, marks=pytest.mark.thorough),
        pytest.param("same", "reference", marks=pytest.mark.thorough),
    ],
)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pad_type", ["", "same"])
def test_traced_by_torch_jit(pad_type: str) -> None:
    """The trace is plain PyTorch and is valid for other sizes too."""
    model = small(pad_type=pad_type)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2, 65, 97))
        assert "effkernels::" not in str(traced.inlined_graph)
        for x in (images(2, 65, 97), images(3, 64, 46)):
            close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("pad_type", ["", "same"])
def test_exported_by_torch_onnx(pad_type: str, dynamo: bool) -> None:
    """By the user's own torch.onnx.export, without effkernels.export."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = small(pad_type=pad_type), images(2, 65, 97)
    with torch.no_grad():
        if dynamo:
            program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
            content = program.model_proto.SerializeToString()
        else:
            file = io.BytesIO()
            torch.onnx.export(model, (x,), file, dynamo=False)
            content = file.getvalue()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(found), model(x))


def test_vmap_over_images_and_over_models() -> None:
    """torch.vmap of a model, an ensemble by stack_module_state, and both under torch.compile."""
    torch._dynamo.reset()
    models = [small(), randomise(small(), seed=1)]
    x = torch.stack([images(2, 33, 31), images(2, 33, 31).flip(0)])
    parameters, buffers = torch.func.stack_module_state(models)
    counter = CompileCounter()

    def over_images(x: Tensor) -> Tensor:
        return torch.vmap(lambda x: models[0](x))(x)

    def ensemble(x: Tensor) -> Tensor:
        return torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(parameters, buffers)

    with torch.no_grad():
        wanted = torch.stack([models[0](image) for image in x])
        close(over_images(x), wanted)
        close(ensemble(x[0]), torch.stack([model(x[0]) for model in models]))
        close(torch.compile(over_images, fullgraph=True, backend=counter)(x), wanted)
        compiled = torch.compile(models[0], fullgraph=True, backend=counter)
        close(compiled(x[0]), wanted[0])
        assert counter.frame_count == 2


def test_torch_func_differentiates_a_model() -> None:
    """grad and jvp through a model in eval mode agree with those of plain PyTorch."""
    model, x = small(), images(1, 33, 31)
    plain = small(backend="reference")
    forward, wanted = (lambda x, m=m: m(x).square().sum() for m in (model, plain))
    close(torch.func.grad(forward)(x), torch.func.grad(wanted)(x))
    tangent = torch.ones_like(x)
    for found, truth in zip(
        torch.func.jvp(forward, (x,), (tangent,)), torch.func.jvp(wanted, (x,), (tangent,)), strict=True
    ):
        close(found, truth)


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

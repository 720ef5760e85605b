"""Weights go from library to library bit by bit, and what is said about their meaning there is what happens there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_parity
from peer_models import (
    images,
    in_both_layouts,
    in_float64,
    lukemelas_model,
    randomise,
    small_timm_b0,
    torchvision_model,
)
from torch import Tensor, nn

import effkernels
from effkernels.models import CheckpointError, Semantics, load_checkpoint
from effkernels.models.compound import PUBLISHED
from effkernels.models.conversion import LIBRARIES
from effkernels.models.layouts import HUGGING_FACE, TIMM, tensor_shapes
from effkernels.models.peers import import_torchvision
from effkernels.models.recipes import recipe, same_logits

State = dict[str, Tensor]
NATIVE, OTHER = 224, 169  # at 169 symmetric, SAME and frozen SAME padding all differ


def hugging_face() -> Any:
    import_torchvision()  # which transformers imports, and which does not work unaided beside a CPU-only torch
    return pytest.importorskip("transformers", reason="transformers is not installed")


def built(semantics: Semantics) -> nn.Module:
    """Return the model of the semantics, by running their code, on the meta device."""
    if "transformers" in semantics.build:
        hugging_face()
    namespace: dict[str, Any] = {}
    with torch.device("meta"):
        exec(semantics.build, namespace)
    return namespace["model"]


def loaded(state: State, semantics: Semantics) -> nn.Module:
    model = built(semantics)
    model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return model.eval()


class Logits(nn.Module):
    """A model of transformers, which wraps its results, with the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


@functools.cache
def peer(name: str) -> nn.Module:
    """Models with random weights and statistics, shared by tests that do not change them."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "efficientnet_b0": small_timm_b0,
        "tf_efficientnet_b0": lambda: small_timm_b0("tf_"),
        "torchvision": lambda: torchvision_model("efficientnet_b0"),
        "lukemelas": lambda: lukemelas_model("b0"),
        "lukemelas-dynamic": lambda: lukemelas_model("b0", image_size=None),
    }
    return makers[name]()


@pytest.fixture(scope="module")
def state() -> State:
    """timm's B0; shared, so take copies to change it."""
    return small_timm_b0().state_dict()


@functools.cache
def meta_state(variant: str, in_chans: int = 3, num_classes: int = 1000) -> State:
    """Return timm's names, with tensors without memory."""
    model = effkernels.create_model(
        f"efficientnet_{variant}", device="meta", in_chans=in_chans, num_classes=num_classes
    )
    return model.state_dict()


def assert_equal(found: State, wanted: State) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)


def assert_norms(model: nn.Module, semantics: Semantics) -> None:
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {semantics.bn_eps}
    # lukemelas takes one minus the momentum, so that its last bits are lost.
    assert all(norm.momentum == pytest.approx(semantics.bn_momentum) for norm in norms)


class TestRoundTrip:
    @pytest.mark.parametrize("src", LIBRARIES)
    @pytest.mark.parametrize("dst", LIBRARIES)
    def test_every_pair_is_exact(self, state: State, src: str, dst: str) -> None:
        first, _ = effkernels.convert_state_dict(state, "timm", src)
        there, _ = effkernels.convert_state_dict(first, src, dst)
        back, _ = effkernels.convert_state_dict(there, None, src)
        assert len(there) == len(state)
        assert_equal(back, first)

    @pytest.mark.parametrize("variant", PUBLISHED)
    def test_every_variant_is_recognised(self, variant: str) -> None:
        state = meta_state(variant)
        for dst in LIBRARIES:
            there, semantics = effkernels.convert_state_dict(state, None, dst)
            assert (semantics.variant, semantics.native_size) == (variant, PUBLISHED[variant].resolution)
            back, _ = effkernels.convert_state_dict(there, dst, "timm", variant=variant)
            assert {key: value.shape for key, value in back.items()} == {k: v.shape for k, v in state.items()}

    @pytest.mark.parametrize(("in_chans", "num_classes"), [(1, 7), (3, 0)])
    def test_other_ends(self, in_chans: int, num_classes: int) -> None:
        state = meta_state("b3", in_chans, num_classes)
        for dst in LIBRARIES:
            there, _ = effkernels.convert_state_dict(state, "timm", dst)
            back, _ = effkernels.convert_state_dict(there, None, "timm")
            assert list(back) == list(state)
            assert all(back[key].shape == state[key].shape for key in state)

    def test_no_copies_are_made(self, state: State) -> None:
        there, _ = effkernels.convert_state_dict(state, "timm", "torchvision")
        assert there["features.0.0.weight"] is state["conv_stem.weight"]
        linear, _ = effkernels.convert_state_dict(state, "timm", "nvidia")
        gate = linear["layers.0.block0.se.squeeze.weight"]
        assert gate.shape == (8, 32)
        assert gate.data_ptr() == state["blocks.0.0.se.conv_reduce.weight"].data_ptr()
        assert state["blocks.0.0.se.conv_reduce.weight"].shape == (8, 32, 1, 1), "the given dict changed"

    def test_counts_of_batches_may_be_missing(self, state: State) -> None:
        old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        there, _ = effkernels.convert_state_dict(old, "timm", "lukemelas")
        assert not any(key.endswith("num_batches_tracked") for key in there)
        assert_equal(effkernels.convert_state_dict(there, "lukemelas", "timm")[0], old)

    def test_dtypes_stay(self, state: State) -> None:
        half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        there, _ = effkernels.convert_state_dict(half, "timm", "nvidia")
        assert_equal(effkernels.convert_state_dict(there, "nvidia", "timm")[0], half)


class TestSpellings:
    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_prefixes_are_taken_off(self, state: State, prefix: str) -> None:
        wrapped = {prefix + key: value for key, value in state.items()}
        assert_equal(effkernels.convert_state_dict(wrapped, None, "timm")[0], state)

    def test_files_of_ngc(self, state: State) -> None:
        usual, _ = effkernels.convert_state_dict(state, "timm", "nvidia")
        assert "layers.6.block0.proj.bn.bias" in usual
        older = {}
        for key, value in usual.items():
            words = key.split(".")
            if words[0] == "layers":
                words[:2] = [f"layer{int(words[1]) + 1}"]
            older["module." + ".".join(words)] = value
        assert "module.layer7.block0.proj.bn.bias" in older
        for src in (None, "nvidia"):
            assert_equal(effkernels.convert_state_dict(older, src, "timm")[0], state)

    def test_nvidia_with_convolutions_as_gates(self, state: State) -> None:
        usual, _ = effkernels.convert_state_dict(state, "timm", "nvidia")
        trt = {
            key: value[:, :, None, None] if ".se." in key and key.endswith("weight") else value
            for key, value in usual.items()
        }
        assert trt["layers.0.block0.se.expand.weight"].ndim == 4
        assert_equal(effkernels.convert_state_dict(trt, None, "timm")[0], state)
        assert_equal(effkernels.convert_state_dict(trt, None, "nvidia")[0], usual)

    def test_hugging_face_without_classifier(self) -> None:
        headless, _ = effkernels.convert_state_dict(meta_state("b0", 3, 0), "timm", "huggingface")
        assert next(iter(headless)) == "embeddings.convolution.weight"
        assert not any(key.startswith("efficientnet.") for key in headless)
        prefixed = {f"efficientnet.{key}": value for key, value in headless.items()}
        for spelling in (headless, prefixed):
            assert list(effkernels.convert_state_dict(spelling, None, "timm")[0]) == list(meta_state("b0", 3, 0))

    def test_a_file_of_hugging_face_without_classifier_loads(self, state: State, tmp_path: Path) -> None:
        bare = {key: value for key, value in state.items() if not key.startswith("classifier")}
        torch.save(effkernels.convert_state_dict(bare, "timm", "huggingface")[0], tmp_path / "base.pth")
        model = load_checkpoint("efficientnet_b0", tmp_path / "base.pth")
        assert (model.num_classes, model.pad_type) == (0, "same_native")
        assert_equal(model.state_dict(), bare)


class TestTheLibrarysOwnModel:
    """The model of the shown code takes the weights strictly, in order, and has the norms that they need."""

    @pytest.mark.parametrize("dst", ["timm", "torchvision", "lukemelas", "huggingface"])
    @pytest.mark.parametrize(("variant", "in_chans", "num_classes"), [("b0", 3, 1000), ("b1", 1, 7), ("b5", 4, 0)])
    def test_names_order_shapes_and_norms(self, dst: str, variant: str, in_chans: int, num_classes: int) -> None:
        for name in (f"efficientnet_{variant}", f"tf_efficientnet_{variant}"):
            state, semantics = effkernels.convert_state_dict(
                meta_state(variant, in_chans, num_classes), "timm", dst, variant=name
            )
            model = built(semantics)
            own = model.state_dict()
            assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in own.items()}
            if dst != "huggingface":  # whose classes do not declare their parts in the order of the forward
                assert list(state) == list(own)
            assert_norms(model, semantics)

    @pytest.mark.parametrize("dst", ["timm", "torchvision", "lukemelas", "huggingface"])
    @pytest.mark.parametrize("src", ["torchvision", "lukemelas", "huggingface", "nvidia"])
    def test_norms_of_other_sources(self, src: str, dst: str) -> None:
        for variant in ("b0", "b5"):
            first, _ = effkernels.convert_state_dict(meta_state(variant), "timm", src)
            _, semantics = effkernels.convert_state_dict(first, src, dst)
            assert_norms(built(semantics), semantics)

    def test_shapes_are_those_of_the_models(self) -> None:
        for variant in PUBLISHED:
            model = effkernels.create_model(f"efficientnet_{variant}", device="meta", in_chans=4, num_classes=5)
            names = TIMM.module_names(model.architecture)
            shapes = tensor_shapes(model.architecture, in_chans=4, num_classes=5)
            wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            assert {f"{names[part]}.{leaf}": shape for (part, leaf), shape in shapes.items()} == wanted


class TestLogits:
    @pytest.mark.parametrize(
        ("source", "name", "dst", "agreeing", "differing"),
        [
            ("efficientnet_b0", "efficientnet_b0", "timm", (OTHER,), ()),
            ("efficientnet_b0", "efficientnet_b0", "torchvision", (NATIVE, OTHER), ()),
            ("torchvision", None, "timm", (NATIVE, OTHER), ()),
            ("tf_efficientnet_b0", "tf_efficientnet_b0", "lukemelas", (NATIVE, OTHER), ()),
            # SAME padding is symmetric at 32 k + 1.
            ("tf_efficientnet_b0", "tf_efficientnet_b0", "torchvision", (193,), (NATIVE, OTHER)),
            ("efficientnet_b0", "efficientnet_b0", "lukemelas", (), (NATIVE, OTHER)),
            ("lukemelas", None, "lukemelas", (OTHER,), ()),
            ("lukemelas", None, "timm", (NATIVE, 160), (OTHER,)),
            ("tf_efficientnet_b0", "tf_efficientnet_b0", "huggingface", (NATIVE, 160), (OTHER,)),
            ("lukemelas", None, "huggingface", (NATIVE, OTHER), ()),
        ],
    )
    def test_agree_where_said_and_differ_where_warned(
        self, source: str, name: str | None, dst: str, agreeing: tuple[int, ...], differing: tuple[int, ...]
    ) -> None:
        model = peer(source)
        src = source if source in LIBRARIES else "timm"
        state, semantics = effkernels.convert_state_dict(model.state_dict(), src, dst, variant=name)
        target = loaded(state, semantics)
        if dst == "huggingface":
            target = Logits(target)
        warned = any("the logits" in warning for warning in semantics.warnings)
        assert warned == bool(differing)
        with torch.inference_mode():
            for size in agreeing:
                x = images(1, size, size)
                assert_parity(target(x), in_both_layouts(model, x), in_float64(model, x), f"{size}")
            for size in differing:
                x = images(1, size, size)
                with pytest.raises(AssertionError, match="error"):
                    assert_parity(target(x), in_both_layouts(model, x), in_float64(model, x), f"{size}")

    def test_lukemelas_with_padding_for_any_size(self) -> None:
        """Built with image_size=None it pads as timm's tf_ models do, which is where its weights go."""
        model = peer("lukemelas-dynamic")
        state, semantics = effkernels.convert_state_dict(model.state_dict(), None, "timm")
        assert "'tf_efficientnet_b0'" in semantics.build
        target = loaded(state, semantics)
        with torch.inference_mode():
            x = images(1, OTHER, OTHER)
            assert_parity(target(x), in_both_layouts(model, x), in_float64(model, x))

    def test_from_hugging_face(self) -> None:
        hugging_face()
        meaning = Semantics("same_native", 1e-3, 0.01, variant="b0")
        semantics = Semantics(build=recipe(HUGGING_FACE, meaning, num_classes=5).code)
        model = Logits(built(semantics))
        randomise(model)
        state, semantics = effkernels.convert_state_dict(model.model.state_dict(), None, "lukemelas")
        assert semantics.warnings == ()
        target = loaded(state, semantics)
        with torch.inference_mode():
            for size in (NATIVE, OTHER):
                x = images(1, size, size)
                assert_parity(target(x), in_both_layouts(model, x), in_float64(model, x), f"{size}")

    @pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0"])
    def test_nvidia_comes_back_with_its_meaning(self, name: str, tmp_path: Path) -> None:
        """NVIDIA's code is in no package: our model with its names, linear gates and padding replaces it."""
        model = peer(name)
        state, semantics = effkernels.convert_state_dict(model.state_dict(), "timm", "nvidia", variant=name)
        torch.save(state, tmp_path / "nvidia.pth")
        ours = load_checkpoint("efficientnet_b0", tmp_path / "nvidia.pth", bn_eps=semantics.bn_eps).eval()
        with torch.inference_mode():
            for size in (OTHER, 193):
                x = images(1, size, size)
                same = same_logits("b0", semantics.pad_type, "", size)
                assert same == (name == "efficientnet_b0" or size == 193)
                if same:
                    assert_parity(ours(x), in_both_layouts(model, x), in_float64(model, x), f"{size}")


class TestSemantics:
    @pytest.mark.parametrize(
        ("src", "variant", "wanted"),
        [
            ("timm", "efficientnet_b0", ("", 1e-5, 0.1, 224)),
            ("timm", "tf_efficientnet_b3", ("same", 1e-3, 0.1, 300)),
            ("torchvision", "b4", ("", 1e-5, 0.1, 380)),
            ("torchvision", "b5", ("", 1e-3, 0.01, 456)),
            ("lukemelas", "efficientnet-b1", ("same_native", 1e-3, 0.01, 240)),
            ("huggingface", "b2", ("same_native", 1e-3, 0.01, 260)),
            ("nvidia", "efficientnet_b0", ("", 1e-3, 0.01, 224)),
        ],
    )
    def test_meaning_of_the_weights(self, src: str, variant: str, wanted: tuple[Any, ...]) -> None:
        first, _ = effkernels.convert_state_dict(meta_state(variant[-2:]), "timm", src)
        for dst in LIBRARIES:
            _, found = effkernels.convert_state_dict(first, src, dst, variant=variant)
            assert (found.pad_type, found.bn_eps, found.bn_momentum, found.native_size) == wanted

    @pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0"])
    def test_timm_means_what_our_models_of_its_names_mean(self, name: str) -> None:
        model = effkernels.create_model(name, device="meta")
        _, found = effkernels.convert_state_dict(model.state_dict(), "timm", "timm", variant=name)
        wanted = model.pad_type, model.bn1.eps, model.bn1.momentum
        assert (found.pad_type, found.bn_eps, found.bn_momentum) == wanted

    @pytest.mark.parametrize("variant", [None, "b0"])
    def test_the_keys_of_timm_do_not_show_the_padding(self, variant: str | None) -> None:
        _, found = effkernels.convert_state_dict(meta_state("b0"), "timm", "torchvision", variant=variant)
        assert (found.pad_type, found.bn_eps, found.bn_momentum, found.build) == (None, None, None, None)
        assert len(found.warnings) == 1
        assert (
            "do not distinguish efficientnet_b0 (symmetric padding, eps 1e-05) from tf_efficientnet_b0"
            in found.warnings[0]
        )

    @pytest.mark.parametrize(
        ("name", "dst", "wanted"),
        [
            ("tf_efficientnet_b0", "timm", "load the weights into timm's tf_efficientnet_b0, not efficientnet_b0"),
            ("tf_efficientnet_b0", "torchvision", "efficientnet_b0 has norms with eps 1e-05, the weights need 0.001"),
            ("tf_efficientnet_b0", "torchvision", "differ except at sizes of 32 k + 1, such as 225x225. The weights"),
            ("tf_efficientnet_b0", "lukemelas", "image_size=None"),
            ("tf_efficientnet_b0", "huggingface", "the same for images of 224x224 pixels and of sizes that differ"),
            ("tf_efficientnet_b0", "nvidia", "with trt=True need those weights as 1x1 convolutions"),
            ("efficientnet_b0", "lukemelas", "the logits differ at every size"),
        ],
    )
    def test_warnings(self, name: str, dst: str, wanted: str) -> None:
        _, found = effkernels.convert_state_dict(meta_state("b0"), "timm", dst, variant=name)
        assert wanted in "\n".join(found.warnings)

    def test_nothing_is_warned_of_where_nothing_has_to_be_set(self) -> None:
        _, found = effkernels.convert_state_dict(meta_state("b0"), "timm", "torchvision", variant="efficientnet_b0")
        assert found.warnings == ()
        assert found.build == "from torchvision import models\n\nmodel = models.efficientnet_b0()"

    def test_blocks_of_odd_planes_are_those_that_the_published_configs_list(self) -> None:
        """`depthwise_padding` of google/efficientnet-b0 to b7."""
        published = [[], [16], [5, 8, 16], [5, 18], [6], [13, 27], [31], [18]]
        for variant, blocks in zip(PUBLISHED, published, strict=True):
            _, found = effkernels.convert_state_dict(
                meta_state(variant), "timm", "huggingface", variant=f"tf_efficientnet_{variant}"
            )
            assert f"depthwise_padding={blocks}" in found.build

    def test_recipes_need_to_know(self) -> None:
        with pytest.raises(ValueError, match="is not known in full"):
            recipe(TIMM, Semantics(variant="b0"))


def _without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


def _with_nan(state: State) -> State:
    bad = state["blocks.3.1.bn2.running_var"].clone()
    bad[3] = torch.nan
    return {**state, "blocks.3.1.bn2.running_var": bad}


def _wide(state: State) -> State:
    """Gates as wide as a quarter of the expanded channels, as in NVIDIA's widese models."""
    wide = dict(state)
    for key, value in state.items():
        if key.endswith("conv_reduce.weight"):
            hidden = value.shape[1]
            name = key.removesuffix("conv_reduce.weight")
            wide[key] = torch.zeros(hidden // 4 + 1, hidden, 1, 1)
            wide[f"{name}conv_reduce.bias"] = torch.zeros(hidden // 4 + 1)
            wide[f"{name}conv_expand.weight"] = torch.zeros(hidden, hidden // 4 + 1, 1, 1)
    return wide


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "src", "dst", "variant", "message"),
        [
            (
                dict,
                "keras",
                "timm",
                None,
                r"src='keras' is not a known library; allowed: 'timm', 'torchvision', .*None",
            ),
            (dict, "timm", "tf_timm", None, r"dst='tf_timm' is not a known library; allowed: 'timm', .*'nvidia'$"),
            (dict, None, "timm", "b8", "variant='b8' is not known; allowed: b0 to b7 and lite0 to lite4"),
            (dict, None, "timm", "b3", "variant is b3, but the tensors are those of b0"),
            (dict, "torchvision", "timm", None, "src='torchvision', but the keys are those of timm"),
            (lambda s: _without(s, "conv_head.weight"), None, "timm", None, r"missing \(1\): conv_head\.weight"),
            (lambda s: _without(s, "conv_stem.weight"), "timm", "timm", None, r"missing \(1\): conv_stem\.weight"),
            (lambda s: _without(s, "classifier.bias"), None, "timm", None, r"missing \(1\): classifier\.bias"),
            (lambda s: {**s, "extra": torch.ones(1)}, None, "timm", None, r"unexpected \(1\): extra"),
            (
                lambda s: {k: v for k, v in s.items() if ".se." not in k or int(k.split(".")[1]) > 2},
                None,
                "timm",
                None,
                r"missing \(20\): (\S+, ){7}\S+ and 12 more",
            ),
            (
                lambda s: {k: v for k, v in s.items() if ".se." not in k},
                None,
                "timm",
                "b0",
                r"variant is b0, but the tensors are those of lite0 \(timm keys\)",
            ),
            (
                lambda s: {k: v for k, v in s.items() if ".se." not in k},
                None,
                "torchvision",
                None,
                "dst='torchvision' has no EfficientNet-Lite, and the tensors are those of lite0; timm and lukemelas",
            ),
            (
                lambda s: {**s, "conv_head.weight": torch.ones(1280, 319, 1, 1)},
                None,
                "timm",
                None,
                r"of another shape \(1\): conv_head\.weight is \(1280, 319, 1, 1\), not \(1280, 320, 1, 1\)",
            ),
            (_with_nan, None, "timm", None, r"blocks\.3\.1\.bn2\.running_var has 1 of \d+ values that are NaN"),
            (_wide, None, "timm", None, "another width, as in NVIDIA's widese models"),
            (
                lambda s: {key: value for key, value in s.items() if not key.startswith("blocks.")},
                None,
                "timm",
                None,
                r"of EfficientNet B0 to B7 and Lite0 to Lite4: the nearest is \w+, with names .* 14 of the 14 tensors",
            ),
            (lambda s: {"weights": torch.ones(2)}, None, "timm", None, "keys such as weights are of no known"),
            (lambda s: {}, None, "timm", None, "state_dict is empty"),
        ],
    )
    def test_what_is_wrong_is_said(
        self, state: State, change: Callable, src: str | None, dst: str, variant: str | None, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            effkernels.convert_state_dict(change(state), src, dst, variant=variant)

    def test_a_tf_name_for_weights_that_are_not_of_timm(self) -> None:
        first, _ = effkernels.convert_state_dict(meta_state("b0"), "timm", "torchvision")
        with pytest.raises(ValueError, match=r"variant='tf_efficientnet_b0' says how timm's weights .* torchvision's"):
            effkernels.convert_state_dict(first, None, "timm", variant="tf_efficientnet_b0")

    def test_two_spellings_of_one_part(self) -> None:
        nvidia, _ = effkernels.convert_state_dict(meta_state("b0"), "timm", "nvidia")
        twice = {**nvidia, "layer1.block0.depsep.bn.bias": nvidia["layers.0.block0.depsep.bn.bias"]}
        with pytest.raises(CheckpointError, match=r"one part: layers\.0\.block0\.depsep\.bn\.bias, layer1\.block0"):
            effkernels.convert_state_dict(twice, None, "timm")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([1], "state_dict is a list; a dict of tensors is needed"),
            ({"epoch": 3}, r"state_dict\['epoch'\] is a int; tensors are needed.*read_checkpoint"),
            ({3: torch.ones(1)}, "the key 3 is a int; a string is needed"),
        ],
    )
    def test_wrong_types(self, given: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            effkernels.convert_state_dict(given, None, "timm")

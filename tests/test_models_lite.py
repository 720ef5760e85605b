"""The lite variants: their weights go between timm and lukemelas' fork, and nobody takes them for B0 to B7."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_parity
from peer_models import images, in_both_layouts, in_float64, lukemelas_lite_model, timm_model
from torch import Tensor, nn

import effkernels
from effkernels.models import (
    CheckpointError,
    Semantics,
    conversion_check,
    load_checkpoint,
    model_config,
    read_checkpoint,
)
from effkernels.models.compound import PUBLISHED_LITE
from effkernels.models.conversion import convert
from effkernels.models.layouts import LAYOUTS, LUKEMELAS
from effkernels.models.recipes import recipe

State = dict[str, Tensor]


@functools.cache
def fork(variant: str, image_size: int | None) -> nn.Module:
    """Return a model under lukemelas' names, shared by tests that do not change it."""
    return lukemelas_lite_model(variant, image_size)


@functools.cache
def peer(name: str) -> nn.Module:
    return timm_model(name)


def meta_state(variant: str) -> State:
    return effkernels.create_model(f"efficientnet_{variant}", device="meta").state_dict()


def save(state: object, folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def assert_same_logits(ours: nn.Module, other: nn.Module, *sizes: int) -> None:
    with torch.inference_mode():
        for size in sizes:
            x = images(1, size, size)
            assert_parity(ours.eval()(x), in_both_layouts(other, x), in_float64(other, x), f"{size}")


class TestLukemelas:
    def test_names_have_no_squeeze_and_excitation(self) -> None:
        keys = fork("lite0", 224).state_dict().keys()
        assert not any("_se_" in key for key in keys)
        assert len(keys) == 296

    @pytest.mark.parametrize("variant", ["lite0", "lite3"])
    def test_a_file_gives_the_logits_of_its_library(self, tmp_path: Path, variant: str) -> None:
        """The padding is frozen at the size that the variant was designed for, which for lite3 is not timm's."""
        native = PUBLISHED_LITE[variant].resolution
        file = save(fork(variant, native).state_dict(), tmp_path)
        assert read_checkpoint(file).layout is LUKEMELAS
        for name in (f"efficientnet_{variant}", f"tf_efficientnet_{variant}"):
            model = load_checkpoint(name, file)
            assert (model.pad_type, model.bn1.eps, model.bn1.momentum) == ("same_native", 1e-3, pytest.approx(0.01))
            assert model.config.input_size == (3, native, native)
            assert model.config.crop_pct == pytest.approx(native / (native + 32), abs=1e-3)
            assert (model.config.mean, model.config.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert_same_logits(model, fork(variant, native), native, 169)

    def test_with_padding_for_any_size(self, tmp_path: Path) -> None:
        file = save(fork("lite1", None).state_dict(), tmp_path)
        model = effkernels.create_model("tf_efficientnet_lite1", checkpoint_path=file, pad_type="same")
        assert model.config.input_size == (3, 240, 240)
        assert_same_logits(model, fork("lite1", None), 169)

    def test_frozen_padding_survives_an_export(self, tmp_path: Path) -> None:
        """The file notes the size at which it is frozen, which the name of the model does not say."""
        model = load_checkpoint("efficientnet_lite3", save(fork("lite3", 280).state_dict(), tmp_path))
        effkernels.export_model(model, tmp_path / "lite3.safetensors", "safetensors", batch_size=1, image_size=97)
        again = load_checkpoint("efficientnet_lite3", tmp_path / "lite3.safetensors")
        assert (again.pad_type, again.config.input_size) == ("same_native", (3, 280, 280))
        assert_same_logits(again, fork("lite3", 280), 169)


class TestConversion:
    @pytest.mark.parametrize("variant", PUBLISHED_LITE)
    def test_there_and_back(self, variant: str) -> None:
        state = meta_state(variant)
        there, semantics = effkernels.convert_state_dict(state, None, "lukemelas")
        assert (semantics.variant, semantics.native_size) == (variant, PUBLISHED_LITE[variant].resolution)
        own = fork(variant, None).state_dict()
        assert {key: value.shape for key, value in there.items()} == {key: value.shape for key, value in own.items()}
        back, found = effkernels.convert_state_dict(there, None, "timm", variant=f"efficientnet_{variant}")
        assert list(back) == list(state)
        assert (found.pad_type, found.bn_eps, found.bn_momentum) == ("same_native", 1e-3, 0.01)

    @pytest.mark.parametrize("dst", [layout.name for layout in LAYOUTS if not layout.lite])
    def test_libraries_without_them(self, dst: str) -> None:
        with pytest.raises(
            ValueError, match=f"dst='{dst}' has no EfficientNet-Lite, .* those of lite2; timm and lukemelas"
        ):
            effkernels.convert_state_dict(meta_state("lite2"), "timm", dst)

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [("tf_efficientnet_lite0", ("same", 1e-3, 0.1)), ("efficientnet_lite0", ("", 1e-5, 0.1))],
    )
    def test_timm_means_what_our_models_of_its_names_mean(self, name: str, wanted: tuple[Any, ...]) -> None:
        model = effkernels.create_model(name, device="meta")
        _, found = effkernels.convert_state_dict(model.state_dict(), "timm", "timm", variant=name)
        assert (found.pad_type, found.bn_eps, found.bn_momentum) == wanted
        assert (model.pad_type, model.bn1.eps, model.bn1.momentum) == wanted
        assert f"timm.create_model('{name}')" in found.build

    def test_from_lukemelas_to_timms_own_model(self) -> None:
        """SAME for every size is SAME as it is at the native size there, and at sizes that differ by 32."""
        source = fork("lite0", 224)
        state, semantics = effkernels.convert_state_dict(source.state_dict(), None, "timm")
        namespace: dict[str, Any] = {}
        exec(semantics.build, namespace)
        model = namespace["model"]
        model.load_state_dict(state)
        assert_same_logits(model, source, 224, 160)

    @pytest.mark.parametrize(("in_chans", "num_classes"), [(3, 1000), (4, 7), (1, 0)])
    @pytest.mark.parametrize("pad_type", ["same", "same_native"])
    def test_the_model_of_the_fork(self, pad_type: str, in_chans: int, num_classes: int) -> None:
        pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite_pytorch is not installed")
        for variant in PUBLISHED_LITE:
            meaning = Semantics(pad_type, 1e-3, 0.01, variant=variant)
            made = recipe(LUKEMELAS, meaning, in_chans=in_chans, num_classes=num_classes)
            assert made.pad_type == pad_type
            namespace: dict[str, Any] = {}
            with torch.device("meta"):
                exec(made.code, namespace)
            own = effkernels.create_model(
                f"efficientnet_{variant}", device="meta", in_chans=in_chans, num_classes=num_classes
            )
            wanted, _ = effkernels.convert_state_dict(own.state_dict(), "timm", "lukemelas")
            found = namespace["model"].state_dict()
            assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in wanted.items()}

    @pytest.mark.parametrize(("variant", "dst"), [("lite0", "timm"), ("lite3", "lukemelas")])
    def test_verified(self, variant: str, dst: str) -> None:
        state = fork(variant, PUBLISHED_LITE[variant].resolution).state_dict()
        found = conversion_check.verify(state, convert(state, None, dst), (97,) if dst == "lukemelas" else ())
        assert found.passed
        assert [one.same for one in found.comparisons] == ([True] if dst == "lukemelas" else [True, False])


class TestMistakes:
    @pytest.mark.parametrize(
        ("held", "model", "said", "wanted"),
        [
            ("efficientnet_lite0", "efficientnet_b0", "no squeeze", "efficientnet_lite0"),
            ("efficientnet_lite0", "tf_efficientnet_b0", "no squeeze", "tf_efficientnet_lite0"),
            ("efficientnet_lite2", "efficientnet_b0", "no squeeze", "efficientnet_lite2"),
            ("efficientnet_b0", "efficientnet_lite0", "squeeze", "efficientnet_b0"),
        ],
    )
    @pytest.mark.parametrize("dst", ["timm", "lukemelas"])
    def test_the_other_family_is_said_in_one_sentence(
        self, tmp_path: Path, held: str, model: str, said: str, wanted: str, dst: str
    ) -> None:
        state = effkernels.create_model(held).state_dict()
        file = save(effkernels.convert_state_dict(state, "timm", dst)[0], tmp_path)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(model, file)
        assert str(error.value) == (
            f"{file} ({dst} keys) holds the weights of {wanted}, which has {said}-and-excitation, and the model is "
            f"{model}: create_model('{wanted}') takes them"
        )

    def test_torchvisions_b0_for_a_lite_model(self, tmp_path: Path) -> None:
        state = effkernels.create_model("efficientnet_b0").state_dict()
        file = save(effkernels.convert_state_dict(state, "timm", "torchvision")[0], tmp_path)
        with pytest.raises(
            CheckpointError, match=r"holds the weights of efficientnet_b0, .* create_model\('efficientnet_b0'"
        ):
            load_checkpoint("efficientnet_lite0", file)

    def test_another_size_of_the_family(self, tmp_path: Path) -> None:
        file = save(effkernels.create_model("efficientnet_lite0").state_dict(), tmp_path)
        with pytest.raises(
            CheckpointError, match=r"nearest to efficientnet_lite0, and the model is efficientnet_lite1"
        ):
            load_checkpoint("efficientnet_lite1", file)

    def test_a_gap_is_still_listed(self, tmp_path: Path) -> None:
        state = effkernels.create_model("efficientnet_lite0").state_dict()
        del state["blocks.6.0.bn3.bias"]
        with pytest.raises(CheckpointError, match=r"missing \(1\): blocks\.6\.0\.bn3\.bias$"):
            load_checkpoint("efficientnet_lite0", save(state, tmp_path))

    def test_scaling_offers_what_it_has(self) -> None:
        from effkernels.scaling import find_network

        with pytest.raises(ValueError, match=r"'efficientnet_lite0' is not known; allowed: .*timm:MODEL"):
            find_network("efficientnet_lite0")


def test_the_config_is_what_to_feed() -> None:
    assert model_config("tf_efficientnet_lite4").mean == (0.5, 0.5, 0.5)
    assert model_config("efficientnet_lite4").mean == model_config("efficientnet_b4").mean
    with torch.device("meta"):
        model = effkernels.create_model("tf_efficientnet_lite4")
    assert model.pretrained_cfg["interpolation"] == "bilinear"

"""Other libraries' checkpoints give their logits; whatever is wrong with a file is said, and nothing in it is run."""

from __future__ import annotations

import pickle
from pathlib import Path

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
    timm_model,
    torchvision_model,
    twin,
)
from torch import Tensor, nn

import effkernels
from effkernels.models import CheckpointError, EfficientNet, load_checkpoint, read_checkpoint
from effkernels.models.layouts import HUGGING_FACE, LAYOUTS, LUKEMELAS, NVIDIA, TIMM, TORCHVISION, translation


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """timm's B0 state_dict; shared, so take copies to change it."""
    return small_timm_b0().state_dict()


def save(state: object, folder: Path, name: str = "weights.pth") -> Path:
    file = folder / name
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def assert_same_logits(ours: nn.Module, peer: nn.Module, *sizes: tuple[int, int]) -> None:
    ours.eval()
    with torch.inference_mode():
        for height, width in sizes:
            x = images(1, height, width)
            assert_parity(ours(x), in_both_layouts(peer, x), in_float64(peer, x), f"{height}x{width}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm(state: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    file = save(state, tmp_path, f"timm{suffix}")
    model = effkernels.create_model("efficientnet_b0", checkpoint_path=file)
    assert_same_logits(model, small_timm_b0(), (46, 61))
    assert (model.pad_type, model.bn1.eps) == ("", 1e-5)
    tf_model = load_checkpoint("tf_efficientnet_b0", file)
    assert (tf_model.pad_type, tf_model.bn1.eps) == ("same", 1e-3)


@pytest.mark.parametrize(("variant", "eps", "momentum"), [("b0", 1e-5, 0.1), ("b5", 1e-3, 0.01)])
def test_torchvision(tmp_path: Path, variant: str, eps: float, momentum: float) -> None:
    peer = torchvision_model(f"efficientnet_{variant}")
    file = save(peer.state_dict(), tmp_path, "torchvision.safetensors")
    assert read_checkpoint(file).layout is TORCHVISION
    # Into a model that pads and normalises otherwise: the file's library decides.
    model = load_checkpoint(effkernels.create_model(f"tf_efficientnet_{variant}"), file)
    assert (model.pad_type, model.bn2.eps, model.blocks[1][0].bn3.momentum) == ("", eps, momentum)
    assert_same_logits(model, peer, (46, 61))


@pytest.mark.parametrize("variant", ["b0", "b1"])
def test_lukemelas(tmp_path: Path, variant: str) -> None:
    """Its padding is frozen at the native size, so that other sizes distinguish it from SAME padding."""
    peer = lukemelas_model(variant)
    file = save(peer.state_dict(), tmp_path)
    model = load_checkpoint(f"efficientnet_{variant}", file)
    assert (model.pad_type, model.bn1.eps, model.bn1.momentum) == ("same_native", 1e-3, pytest.approx(0.01))
    native = model.config.input_size[1]
    assert_same_logits(model, peer, (native, native), (61, 46))


def test_lukemelas_with_padding_for_any_size(tmp_path: Path) -> None:
    peer = lukemelas_model("b0", image_size=None)
    file = save(peer.state_dict(), tmp_path)
    model = effkernels.create_model("efficientnet_b0", checkpoint_path=file, pad_type="same")
    assert model.pad_type == "same"
    assert_same_logits(model, peer, (61, 46))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_names_every_part_once(state: dict[str, Tensor], tmp_path: Path, layout) -> None:
    """Renamed to a library's keys and back, nothing is lost, and the keys are recognised as that library's."""
    with torch.device("meta"):
        architecture = effkernels.create_model("efficientnet_b0").architecture
    names = translation(TIMM, layout, architecture)
    assert len(set(names.values())) == len(names)
    renamed = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        renamed[f"{names[module]}.{leaf}"] = value
    assert len(renamed) == len(state)
    checkpoint = read_checkpoint(save(renamed, tmp_path))
    assert checkpoint.layout is layout
    model = load_checkpoint("efficientnet_b0", checkpoint.path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    semantics = layout.semantics("b0")
    assert model.pad_type == (semantics.pad_type or "")
    assert model.bn1.eps == (semantics.bn_eps or 1e-5)


@pytest.mark.parametrize(
    ("layout", "key", "wanted"),
    [
        (TORCHVISION, "blocks.1.0.conv_pwl", "features.2.0.block.3.0"),
        (TORCHVISION, "blocks.0.0.se.conv_expand", "features.1.0.block.1.fc2"),
        (LUKEMELAS, "blocks.2.1.bn2", "_blocks.4._bn1"),
        (HUGGING_FACE, "blocks.0.0.conv_pw", "efficientnet.encoder.blocks.0.projection.project_conv"),
        (NVIDIA, "blocks.6.0.conv_dw", "layers.6.block0.depsep.conv"),
    ],
)
def test_names_of_parts(layout, key: str, wanted: str) -> None:
    with torch.device("meta"):
        architecture = effkernels.create_model("efficientnet_b0").architecture
    assert translation(TIMM, layout, architecture)[key] == wanted
    assert translation(layout, TIMM, architecture)[wanted] == key


def test_older_files_of_nvidia(state: dict[str, Tensor], tmp_path: Path) -> None:
    with torch.device("meta"):
        architecture = effkernels.create_model("efficientnet_b0").architecture
    names = translation(TIMM, NVIDIA, architecture)
    old = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        name = names[module]
        if name.startswith("layers."):
            _, stage, rest = name.split(".", 2)
            name = f"layer{int(stage) + 1}.{rest}"
        if ".se." in name and leaf == "weight":
            value = value.flatten(1)
        old[f"module.{name}.{leaf}"] = value
    model = load_checkpoint("efficientnet_b0", save({"state_dict": old}, tmp_path))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (model.pad_type, model.bn1.eps) == ("", 1e-3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "arch": "efficientnet_b0"},
        lambda s: {"model": {f"module.{key}": value for key, value in s.items()}},
        lambda s: {"state_dict": {f"module._orig_mod.{key}": value for key, value in s.items()}},
        lambda s: {"state_dict": {key: value * 0 for key, value in s.items()}, "state_dict_ema": s},
        lambda s: {key: value for key, value in s.items() if not key.endswith("num_batches_tracked")},
        lambda s: {key: value.double() for key, value in s.items()},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(state: dict[str, Tensor], tmp_path: Path, wrap) -> None:
    model = load_checkpoint("efficientnet_b0", save(wrap(state), tmp_path))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if "tracked" not in key)


def test_averaged_weights_only_where_wanted(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = save({"state_dict": {key: value * 0 for key, value in state.items()}, "state_dict_ema": state}, tmp_path)
    model = load_checkpoint("efficientnet_b0", file, use_ema=False)
    assert float(model.conv_stem.weight.detach().abs().max()) == 0.0


def test_a_name_takes_classes_and_channels_from_the_file(tmp_path: Path) -> None:
    peer = timm_model("efficientnet_b0", num_classes=7, channels=1)
    model = load_checkpoint("efficientnet_b0", save(peer.state_dict(), tmp_path))
    assert (model.num_classes, model.in_chans) == (7, 1)


def test_backbones_and_headless_models_leave_out_what_they_have_no_place_for(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    file = save(state, tmp_path)
    for options in ({"features_only": True}, {"features_only": True, "out_indices": (1,)}, {"num_classes": 0}):
        model = effkernels.create_model("efficientnet_b0", checkpoint_path=file, **options)
        assert torch.equal(model.blocks[6][0].conv_dw.weight, state["blocks.6.0.conv_dw.weight"])


def test_what_was_asked_for_wins_over_the_library(tmp_path: Path, state: dict[str, Tensor]) -> None:
    names = translation(TIMM, TORCHVISION, twin("efficientnet_b0", small_timm_b0()).architecture)
    renamed = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in state.items()}
    model = effkernels.create_model(
        "efficientnet_b0", checkpoint_path=save(renamed, tmp_path), pad_type="same", bn_eps=0.5, bn_momentum=0.3
    )
    assert (model.pad_type, model.bn2.eps, model.bn2.momentum) == ("same", 0.5, 0.3)


def _without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in keys}


def _with_nan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = state["blocks.3.1.bn2.running_var"].clone()
    bad[3] = torch.nan
    return {**state, "blocks.3.1.bn2.running_var": bad}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, "conv_head.weight"), r"missing \(1\): conv_head\.weight"),
        (lambda s: {**s, "extra.weight": torch.ones(1)}, r"unexpected \(1\): extra\.weight"),
        (
            lambda s: {**s, "conv_stem.weight": torch.ones(32, 1, 3, 3)},
            r"conv_stem\.weight is \(32, 1, 3, 3\) in the file and \(32, 3, 3, 3\) in the model",
        ),
        (
            lambda s: {**s, "classifier.weight": torch.ones(7, 1280), "classifier.bias": torch.ones(7)},
            "create the model with num_classes=7",
        ),
        (_with_nan, r"blocks\.3\.1\.bn2\.running_var has 1 of \d+ values that are NaN or infinite"),
        (lambda s: {"weights": torch.ones(2), "w2": torch.ones(1)}, "keys such as w2, weights are of no known"),
        (lambda s: {"epoch": 3}, "holds no tensors"),
        (lambda s: [1, 2], "holds a list; a dict of tensors is needed"),
        (lambda s: torch.ones(3), "holds a Tensor; a dict of tensors is needed"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_differs(
    state: dict[str, Tensor], tmp_path: Path, change, message: str
) -> None:
    model = twin("efficientnet_b0", small_timm_b0())
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, save(change(state), tmp_path))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "the model changed"


def test_another_variant_is_noticed(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)missing \(\d+\): .* more.*of another shape") as error:
        load_checkpoint("efficientnet_b2", save(state, tmp_path))
    assert len(str(error.value)) < 4000


class _Mischief:
    def __reduce__(self):
        return (Path("mischief-was-run").touch, ())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pth", b"", "is empty"),
        ("empty.safetensors", b"", "is empty"),
        ("image.pth", b"\x89PNG\r\n\x1a\n" + bytes(200), "is not"),
        ("text.safetensors", b'{"model": "b0"}', "is not a safetensors file"),
        ("text.pth", b"hello world, this is a text", "is not"),
        ("code.pth", pickle.dumps({"conv_stem.weight": _Mischief()}), "never run"),
    ],
)
def test_files_that_are_no_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(file)
    assert name in str(error.value)
    assert not (tmp_path / "mischief-was-run").exists()


def test_a_pickled_model_is_not_opened(tmp_path: Path) -> None:
    file = save(small_timm_b0(), tmp_path)
    with pytest.raises(CheckpointError, match=r"Save model\.state_dict\(\) instead of the model"):
        read_checkpoint(file)


def test_a_file_that_is_cut_off(state: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        file = save(state, tmp_path, name)
        file.write_bytes(file.read_bytes()[:100_000])
        with pytest.raises(CheckpointError, match="cut off"):
            read_checkpoint(file)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_checkpoint("efficientnet_b0", tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)


def test_a_model_without_memory_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="meta device"):
        effkernels.create_model("efficientnet_b0", device="meta", checkpoint_path=save(state, tmp_path))


def test_frozen_padding_needs_a_native_size() -> None:
    with torch.device("meta"):
        model = EfficientNet(effkernels.models.BASELINE)
    with pytest.raises(ValueError, match="needs a model with a config"):
        model.set_padding("same_native")
    randomise(model)

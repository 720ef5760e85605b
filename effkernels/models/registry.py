"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from effkernels.models.architecture import Architecture
from effkernels.models.checkpoints import build_for, load_read, read_checkpoint
from effkernels.models.config import ModelConfig
from effkernels.models.efficientnet import EfficientNet, EfficientNetFeatures
from effkernels.models.pretrained import load_pretrained
from effkernels.models.timm_weights import timm_weights
from effkernels.models.variants import VARIANTS


@dataclass(frozen=True)
class RegisteredModel:
    """A registered name and what `create_model` builds for it.

    Attributes:
        config: the input the model expects; its `name` is the name.
        architecture: the scaled network.
        pad_type, bn_eps, bn_momentum: what the variant was trained with.
        weights: configs of the weights that are published for it, each with its `tag` and `hf_hub_id`; the first is
            the default.
    """

    config: ModelConfig
    architecture: Architecture
    pad_type: str = ""
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    weights: tuple[ModelConfig, ...] = ()


_MODELS: dict[str, RegisteredModel] = {}


def register(model: RegisteredModel) -> None:
    """Make `create_model` know `model` under `model.config.name`.

    Raises:
        ValueError: the name is taken.
    """
    name = model.config.name
    if name in _MODELS:
        raise ValueError(f"the name {name!r} is taken by another model")
    _MODELS[name] = model


def list_models(
    filter: str | Sequence[str] = "", *, pretrained: bool = False, exclude_filters: str | Sequence[str] = ""
) -> list[str]:
    """Return the names that `create_model` knows, sorted.

    Args:
        filter: one shell pattern or several ("tf_*", "*_b[0-3]"), each for the name or for the name with its tag;
            "": all.
        pretrained: return the published weights, as "name.tag".
        exclude_filters: patterns of names to leave out.
    """
    names = set(_MODELS)
    if pretrained:
        names = {config.full_name for model in _MODELS.values() for config in model.weights}

    def matches(name: str, patterns: str | Sequence[str]) -> bool:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        return any(fnmatch.fnmatch(text, pattern) for text in (name, name.partition(".")[0]) for pattern in patterns)

    return sorted(name for name in names if matches(name, filter or "*") and not matches(name, exclude_filters))


def model_config(name: str) -> ModelConfig:
    """Return the input that the model of that name, or of a "name.tag", expects, without building it.

    Raises:
        ValueError: an unknown name or tag.
    """
    return _find(name)[1]


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: str = "avg",
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    feature_cls: str | None = None,
    pad_type: str | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
    checkpoint_path: str | Path | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> EfficientNet | EfficientNetFeatures:
    """Build a model by name, with weights drawn at random, published by timm, or read from a checkpoint file.

    Args:
        name: one of `list_models()`, or of `list_models(pretrained=True)`: the same model with a tag, whose config is
            that of these weights. `efficientnet_*` pad symmetrically with eps 1e-5; `tf_efficientnet_*` pad SAME
            with eps 1e-3, as the weights that were trained in TensorFlow need it. `*_lite0` to `*_lite4` have ReLU6
            and no squeeze-and-excitation.
        pretrained: load timm's weights from the Hugging Face hub, or from the cache of its client library: those of the
            tag, or the default ones (the first of docs/models.md). The model's config is that of the weights. Needs
            the extra `models`.
        num_classes: of the classifier; 0: none; None: the published weights', 1000 for a name without tag. A classifier
            of another number than the published weights' is initialised, the rest loaded.
        in_chans: channels of an image. Published weights are summed over the channels for 1, else repeated and scaled,
            as in timm.
        drop_rate, drop_path_rate: dropout before the classifier and stochastic depth, in training. Both 0 by default,
            as in timm; the paper trains with `model_config(name).dropout` and 0.2.
        global_pool: "avg", "max" or "".
        features_only: return a backbone whose forward gives the list of feature maps.
        out_indices: of a backbone: which maps; None: all.
        feature_cls: of a backbone, for code written for timm: "list" or "getter", which give the same list of maps;
            None: "list".
        pad_type, bn_eps, bn_momentum: override what the name, or the checkpoint's library, implies.
        checkpoint_path: a .pth or .safetensors file of timm, torchvision, lukemelas, Hugging Face or NVIDIA; see
            `effkernels.models.load_checkpoint`.
        backend: that runs the operators, one of `effkernels.ops.backends.BACKENDS`; None and "auto": as
            `effkernels.backend` asks where the model is called.
        device, dtype: of the parameters. On "meta" nothing is allocated and a forward counts FLOPs.

    Returns:
        The model, in training mode as PyTorch modules come.

    Raises:
        ValueError: unknown name (the message offers the nearest) or tag, an argument out of its range, pretrained=True
            for a name without published weights, on the meta device or together with checkpoint_path.
        HubError: (an OSError) published weights are not in the cache and could not be fetched.
        ImportError: pretrained=True without huggingface_hub or safetensors.
        CheckpointError: the file is not a checkpoint of this model; the message says what differs.
    """
    registered, config = _find(name)
    if pretrained:
        config = _published(registered, config)
        if checkpoint_path is not None:
            raise ValueError(
                f"create_model({name!r}): pretrained=True and checkpoint_path={str(checkpoint_path)!r}; allowed: one "
                "of them"
            )
    weights = config
    num_classes = config.num_classes if num_classes is None else num_classes
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices={tuple(out_indices)} is for features_only=True")
    if feature_cls is not None and not features_only:
        raise ValueError(f"feature_cls={feature_cls!r} is for features_only=True")
    if feature_cls not in (None, "list", "getter"):
        raise ValueError(f"feature_cls={feature_cls!r} is not offered; allowed: 'list', 'getter'")
    test_size = config.test_input_size
    config = replace(
        config,
        input_size=(in_chans, *config.input_size[1:]),
        test_input_size=None if test_size is None else (in_chans, *test_size[1:]),
        num_classes=0 if features_only else num_classes,
    )
    options: dict[str, Any] = {
        "in_chans": in_chans,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        "pad_type": registered.pad_type if pad_type is None else pad_type,
        "bn_eps": registered.bn_eps if bn_eps is None else bn_eps,
        "bn_momentum": registered.bn_momentum if bn_momentum is None else bn_momentum,
        "backend": backend,
        "config": config,
        "device": device,
        "dtype": dtype,
    }
    model: EfficientNet | EfficientNetFeatures
    if features_only:
        model = EfficientNetFeatures(registered.architecture, out_indices=out_indices, **options)
    else:
        model = EfficientNet(registered.architecture, num_classes=num_classes, global_pool=global_pool, **options)
    if pretrained:
        load_pretrained(model, weights, pad_type=pad_type, bn_eps=bn_eps, bn_momentum=bn_momentum)
    elif checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path, pad_type=pad_type, bn_eps=bn_eps, bn_momentum=bn_momentum)
    return model


def load_checkpoint(
    model: EfficientNet | EfficientNetFeatures | str,
    file: str | Path,
    *,
    use_ema: bool = True,
    pad_type: str | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
) -> EfficientNet | EfficientNetFeatures:
    """Load a checkpoint of timm, torchvision, lukemelas, Hugging Face or NVIDIA into a model.

    Padding, eps and momentum of the model are set to what the file's library uses, so that the logits are that
    library's: torchvision and NVIDIA pad symmetrically; lukemelas and Hugging Face pad SAME as it is at the native
    size, whatever the size of the image (pad_type="same" for lukemelas models built with image_size=None). timm's
    keys do not distinguish `tf_efficientnet_*` from `efficientnet_*`: there the model's name decides. Weights of
    lukemelas' fork for the lite variants are TensorFlow's: the model's config then has their mean, std and size. A
    safetensors file of `effkernels export` or `effkernels convert` notes what its weights mean, which is then set.

    Args:
        model: a model, changed in place, or a name for `create_model`, then built with the file's number of classes
            and of image channels.
        file: path of a .pth or .safetensors file.
        use_ema: prefer averaged weights where the file has both.
        pad_type, bn_eps, bn_momentum: override the library's.

    Returns:
        The model. What it has no place for (the classifier of a model without classes, the head of a backbone) is
        left out.

    Raises:
        FileNotFoundError: (an OSError) no such file.
        ValueError: pad_type, bn_eps or bn_momentum out of its range.
        CheckpointError: (a ValueError) the file cannot be read, or its keys, shapes, dtypes or values do not fit; the
            model is unchanged. See `read_checkpoint`.
    """
    if isinstance(model, str):
        model_config(model)  # an unknown name is said before the file is read
    checkpoint = read_checkpoint(file, use_ema=use_ema)
    if isinstance(model, str):
        model = build_for(checkpoint, functools.partial(create_model, model))
    return load_read(model, checkpoint, pad_type=pad_type, bn_eps=bn_eps, bn_momentum=bn_momentum)


def _find(name: str) -> tuple[RegisteredModel, ModelConfig]:
    """Return a registered model and the config of its name, or of its tag."""
    if name in _MODELS:
        return _MODELS[name], _MODELS[name].config
    base, _, tag = name.partition(".")
    if base in _MODELS:
        tagged = {config.tag: config for config in _MODELS[base].weights}
        if tag in tagged:
            return _MODELS[base], tagged[tag]
        known = f"known are {', '.join(tagged)}" if tagged else "it has none"
        raise ValueError(f"unknown tag {tag!r} of {base}: {known}")
    near = difflib.get_close_matches(base, _MODELS, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(list_models())}"
    raise ValueError(f"unknown model {name!r}: {hint}")


def _published(model: RegisteredModel, config: ModelConfig) -> ModelConfig:
    """Return the config of the weights that are loaded for a config: its own, or the model's default ones."""
    if config.hf_hub_id is not None:
        return config
    if not model.weights:
        others = list_models(f"*_{config.name.rpartition('_')[2]}", pretrained=True)
        raise ValueError(
            f"create_model({config.name!r}, pretrained=True): timm has published no weights for it"
            + (f"; for the same network there are {', '.join(others)}" if others else "")
            + "; checkpoint_path=FILE loads yours"
        )
    return model.weights[0]


# Height and width of an image, and the share of the resized image that the central crop keeps, as timm has them. It
# tests the two largest lite variants at the sizes of B3 and B4, larger than they were designed for.
_INPUTS = {
    "b0": (224, 0.875),
    "b1": (240, 0.882),
    "b2": (260, 0.890),
    "b3": (300, 0.904),
    "b4": (380, 0.922),
    "b5": (456, 0.934),
    "b6": (528, 0.942),
    "b7": (600, 0.949),
    "lite0": (224, 0.875),
    "lite1": (240, 0.882),
    "lite2": (260, 0.890),
    "lite3": (300, 0.904),
    "lite4": (380, 0.922),
}
# What the weights of TensorFlow's lite models need otherwise, again as timm has it.
_TF_LITE_INPUTS: dict[str, dict[str, Any]] = {
    "lite3": {"interpolation": "bilinear"},
    "lite4": {"interpolation": "bilinear", "crop_pct": 0.920},
}

for _variant in VARIANTS.values():
    _size, _crop_pct = _INPUTS[_variant.name]
    _config = ModelConfig(
        name=f"efficientnet_{_variant.name}",
        input_size=(3, _size, _size),
        dropout=_variant.coefficients.dropout,
        crop_pct=_crop_pct,
    )
    register(RegisteredModel(_config, _variant.architecture, weights=tuple(timm_weights(_config))))
    _config = replace(_config, name=f"tf_{_config.name}")
    if _variant.is_lite:
        _half = (0.5, 0.5, 0.5)
        _config = replace(_config, mean=_half, std=_half, **_TF_LITE_INPUTS.get(_variant.name, {}))
    register(
        RegisteredModel(
            _config, _variant.architecture, pad_type="same", bn_eps=1e-3, weights=tuple(timm_weights(_config))
        )
    )

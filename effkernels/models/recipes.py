"""Recipes: the Python code with which each library builds a model for given weights, and what it cannot express.

The libraries differ in what is an argument and what is fixed: timm takes padding, eps and momentum; torchvision and
NVIDIA pad symmetrically whatever one asks for, lukemelas and Hugging Face as TensorFlow does. A recipe comes as near as
its library allows and says where that is not near enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from effkernels.models.architecture import Architecture
from effkernels.models.layouts import HUGGING_FACE, LUKEMELAS, NVIDIA, TIMM, TORCHVISION, Layout, Semantics
from effkernels.models.variants import VARIANTS, is_lite
from effkernels.nn.padding import same_padding, symmetric_padding

PAD_TITLES = {
    "": "symmetric",
    "same": "SAME for the size of each image",
    "same_native": "SAME frozen at the native size",
}
"""The padding types of `effkernels.nn.PAD_TYPES` in words."""


@dataclass(frozen=True)
class Recipe:
    """A library's model for some weights.

    Attributes:
        code: Python that builds it as `model`.
        pad_type: how it pads, one of `effkernels.nn.PAD_TYPES`.
        warnings: how it differs from the library's usual model, and from what the weights need.
    """

    code: str
    pad_type: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Need:
    """The meaning of the weights that a model is built for, with nothing in it unknown."""

    variant: str
    pad_type: str
    eps: float
    momentum: float
    in_chans: int
    num_classes: int

    @property
    def architecture(self) -> Architecture:
        return VARIANTS[self.variant].architecture

    @property
    def native_size(self) -> int:
        return VARIANTS[self.variant].coefficients.resolution


def recipe(layout: Layout, meaning: Semantics, *, in_chans: int = 3, num_classes: int = 1000) -> Recipe:
    """Return the recipe of a library for weights of a meaning.

    Args:
        layout: the library.
        meaning: with variant, padding, eps and momentum all known.
        in_chans: channels of an image.
        num_classes: of the classifier; 0: none.

    Raises:
        ValueError: something of the meaning is None.
    """
    variant, pad_type, eps, momentum = meaning.variant, meaning.pad_type, meaning.bn_eps, meaning.bn_momentum
    if variant is None or pad_type is None or eps is None or momentum is None:
        raise ValueError(
            f"meaning={meaning} is not known in full; variant, pad_type, bn_eps and bn_momentum are needed"
        )
    need = _Need(variant, pad_type, eps, momentum, in_chans, num_classes)
    made = _MAKERS[layout.name](need)
    return Recipe(made.code, made.pad_type, (*made.warnings, *_padding_warnings(layout, need, made.pad_type)))


def same_logits(variant: str, needed: str, built: str, size: int) -> bool:
    """Return whether two models of a variant that differ in their padding alone have the same logits for square images.

    Args:
        variant: "b0" to "b7", "lite0" to "lite4".
        needed, built: of `effkernels.nn.PAD_TYPES`.
        size: height and width of the images, in pixels.
    """
    return _strided_paddings(variant, needed, size) == _strided_paddings(variant, built, size)


def _strided_paddings(variant: str, pad_type: str, size: int) -> list[tuple[int, int]]:
    """Return the zeros (before, after) of a convolution with stride 2; with stride 1 all types pad symmetrically."""
    native = VARIANTS[variant].coefficients.resolution
    kernels = [3] + [row.kernel_size for row in VARIANTS[variant].architecture.stages if row.stride == 2]
    found = []
    for kernel_size in kernels:
        if pad_type == "":
            before = after = symmetric_padding(kernel_size, 2)
        else:
            before, after = same_padding(native if pad_type == "same_native" else size, kernel_size, 2)
        found.append((before, after))
        native = math.ceil(native / 2)
        size = (size + before + after - kernel_size) // 2 + 1
    return found


def _padding_warnings(layout: Layout, need: _Need, built: str) -> tuple[str, ...]:
    if built == need.pad_type:
        return ()
    native = need.native_size
    difference = f"the weights need padding that is {PAD_TITLES[need.pad_type]}, {layout.name} pads {PAD_TITLES[built]}"
    if same_logits(need.variant, need.pad_type, built, native):
        # SAME looks at the parity of five planes, each half of the one before: at the size modulo 32.
        return (
            f"{difference}: the logits are the same for images of {native}x{native} pixels and of sizes that differ "
            f"from {native} by a multiple of 32, and are not for others: resize and crop to {native}x{native}",
        )
    sizes = range(native, native + 32)
    elsewhere = next((size for size in sizes if same_logits(need.variant, need.pad_type, built, size)), None)
    where = "at every size" if elsewhere is None else f"except at sizes of 32 k + 1, such as {elsewhere}x{elsewhere}"
    prefix = "tf_" if need.pad_type else ""
    return (
        f"{difference}, and has no argument for it: the logits differ {where}. The weights keep "
        f"their meaning in a model that pads alike, such as timm's or effkernels' {prefix}efficientnet_{need.variant}; "
        f"in {layout.name} they are a start for fine-tuning",
    )


def _call(function: str, *positional: object, **keywords: object) -> str:
    arguments = [repr(value) for value in positional] + [f"{name}={value!r}" for name, value in keywords.items()]
    return f"{function}({', '.join(arguments)})"


def _norm_warnings(need: _Need, name: str, eps: float, momentum: float) -> tuple[str, ...]:
    """Of a library whose own model `name` has other norms than the weights need."""
    warnings = []
    if need.eps != eps:
        warnings.append(f"{name} has norms with eps {eps:g}, the weights need {need.eps:g}: build the model as shown")
    if need.momentum != momentum:
        warnings.append(
            f"{name} has norms with momentum {momentum:g}, the weights were trained with {need.momentum:g}; this "
            "matters in further training only"
        )
    return tuple(warnings)


def _set_norms(need: _Need) -> list[str]:
    return [
        "for norm in model.modules():",
        "    if isinstance(norm, nn.BatchNorm2d):",
        f"        norm.eps, norm.momentum = {need.eps!r}, {need.momentum!r}",
    ]


def _stem_convolution(need: _Need) -> str:
    return _call(
        "nn.Conv2d",
        need.in_chans,
        need.architecture.stem_channels,
        3,
        stride=2,
        padding=symmetric_padding(3, 2),
        bias=False,
    )


def _timm(need: _Need) -> Recipe:
    same = need.pad_type != ""
    name = f"{'tf_' if same else ''}efficientnet_{need.variant}"
    eps, momentum = 1e-3 if same else 1e-5, 0.1
    keywords: dict[str, object] = {}
    if need.in_chans != 3:
        keywords["in_chans"] = need.in_chans
    if need.num_classes != 1000:
        keywords["num_classes"] = need.num_classes
    if need.eps != eps:
        keywords["bn_eps"] = need.eps
    if need.momentum != momentum:
        keywords["bn_momentum"] = need.momentum
    other = f"{'' if same else 'tf_'}efficientnet_{need.variant}"
    warnings = (
        f"load the weights into timm's {name}, not {other}: both have the same keys, and {other} pads otherwise",
        *_norm_warnings(need, f"timm's {name}", eps, momentum),
    )
    code = f"import timm\n\nmodel = {_call('timm.create_model', name, **keywords)}"
    return Recipe(code, "same" if same else "", warnings)


def _torchvision(need: _Need) -> Recipe:
    name = f"efficientnet_{need.variant}"
    own = TORCHVISION.semantics(need.variant)
    assert own.bn_eps is not None
    assert own.bn_momentum is not None
    keywords = {"num_classes": need.num_classes} if need.num_classes not in (0, 1000) else {}
    lines = [f"model = {_call(f'models.{name}', **keywords)}"]
    warnings = list(_norm_warnings(need, f"torchvision's {name}", own.bn_eps, own.bn_momentum))
    if (need.eps, need.momentum) != (own.bn_eps, own.bn_momentum):
        lines += _set_norms(need)
    if need.in_chans != 3:
        lines.append(f"model.features[0][0] = {_stem_convolution(need)}")
        warnings.append(f"torchvision has no argument for {need.in_chans} image channels: build the model as shown")
    if need.num_classes == 0:
        lines.append("model.classifier[1] = nn.Identity()")
        warnings.append("torchvision has no argument for a model without classifier: build the model as shown")
    imports = ["from torch import nn"] if len(lines) > 1 else []
    return Recipe("\n".join([*imports, "from torchvision import models", "", *lines]), "", tuple(warnings))


def _lukemelas(need: _Need) -> Recipe:
    name = f"efficientnet-{need.variant}"
    lite = is_lite(need.variant)
    keywords: dict[str, object] = {}
    if need.in_chans != 3 and not lite:
        keywords["in_channels"] = need.in_chans
    if need.pad_type == "same":
        keywords["image_size"] = None
    if need.num_classes == 0 and not lite:
        keywords["include_top"] = False
    elif need.num_classes not in (0, 1000):
        keywords["num_classes"] = need.num_classes
    if need.eps != 1e-3:
        keywords["batch_norm_epsilon"] = need.eps
    if need.momentum != 0.01:
        # It takes TensorFlow's momentum, the share of the old value; PyTorch's is that of the new one.
        keywords["batch_norm_momentum"] = round(1.0 - need.momentum, 12)
    warnings = list(_norm_warnings(need, f"lukemelas' {name}", 1e-3, 0.01))
    if need.pad_type == "same":
        warnings.append(f"lukemelas' {name} freezes its padding unless it is built with image_size=None, as shown")
    package = "efficientnet_lite_pytorch" if lite else "efficientnet_pytorch"
    imports = [f"from {package} import EfficientNet"]
    lines = [f"model = {_call('EfficientNet.from_name', name, **keywords)}"]
    if lite:
        warnings.append(f"the lite variants are in the package {package}, a fork, and not in lukemelas' own")
        if need.in_chans != 3:
            # Its own argument scales the stem, which in its lite models is not scaled.
            size = None if need.pad_type == "same" else need.native_size
            imports.append(f"from {package}.utils import get_same_padding_conv2d")
            stem = _call("", need.in_chans, need.architecture.stem_channels, kernel_size=3, stride=2, bias=False)
            lines.append(f"model._conv_stem = {_call('get_same_padding_conv2d', image_size=size)}{stem}")
            warnings.append(
                f"{package} builds no right stem for {need.in_chans} image channels: build the model as shown"
            )
        if need.num_classes == 0:
            imports.append("from torch import nn")
            lines.append("model._fc = nn.Identity()")
            warnings.append(f"{package} has no argument for a model without classifier: build the model as shown")
    pad_type = "same" if need.pad_type == "same" else "same_native"
    return Recipe("\n".join([*imports, "", *lines]), pad_type, tuple(warnings))


def _hugging_face(need: _Need) -> Recipe:
    coefficients = VARIANTS[need.variant].coefficients
    keywords: dict[str, object] = {
        "width_coefficient": coefficients.width,
        "depth_coefficient": coefficients.depth,
        "image_size": coefficients.resolution,
        "hidden_dim": need.architecture.head_channels,
        "dropout_rate": coefficients.dropout,
        "depthwise_padding": _blocks_of_odd_planes(need),
        "batch_norm_eps": need.eps,
        "batch_norm_momentum": need.momentum,
        # Its own default is two labels.
        "num_labels": need.num_classes,
    }
    if need.in_chans != 3:
        keywords["num_channels"] = need.in_chans
    model = "EfficientNetForImageClassification" if need.num_classes else "EfficientNetModel"
    if not need.num_classes:
        del keywords["num_labels"]
    lines = [f"config = {_call('EfficientNetConfig', **keywords)}", f"model = {model}(config)"]
    imports = [f"from transformers import EfficientNetConfig, {model}", ""]
    warnings = [
        "the config of transformers has to hold the values shown here: its defaults are those of B7, and "
        "depthwise_padding lists the blocks whose planes are odd at the native size"
    ]
    if need.momentum != 0.1:
        imports.insert(0, "from torch import nn")
        lines += _set_norms(need)  # the config's momentum does not reach the norms after the expand convolutions
    return Recipe("\n".join([*imports, *lines]), "same_native", tuple(warnings))


def _blocks_of_odd_planes(need: _Need) -> list[int]:
    """Return the blocks with stride 2 whose input has an odd height at the native size: SAME is symmetric there."""
    size = math.ceil(need.native_size / 2)  # after the stem
    found, number = [], 0
    for stage in need.architecture.stages:
        if stage.stride == 2 and size % 2 == 1:
            found.append(number)
        size = math.ceil(size / stage.stride)
        number += stage.layers
    return found


def _nvidia(need: _Need) -> Recipe:
    arch = f"effnet_{need.variant}_layers"
    classes = "" if need.num_classes in (0, 1000) else f", num_classes={need.num_classes!r}"
    norms = ""
    if need.eps != 1e-3:
        norms += f", bn_epsilon={need.eps!r}"
    if need.momentum != 0.01:
        norms += f", bn_momentum={need.momentum!r}"
    dropout = VARIANTS[need.variant].coefficients.dropout
    lines = [f"model = EfficientNet(arch={arch}, dropout={dropout!r}{classes}{norms})"]
    warnings = list(_norm_warnings(need, f"NVIDIA's efficientnet-{need.variant}", 1e-3, 0.01))
    warnings.append(
        "squeeze-and-excitation is linear here, as NVIDIA's models have it by default; its models with trt=True need "
        "those weights as 1x1 convolutions, (out, in, 1, 1)"
    )
    if need.in_chans != 3:
        lines.append(f"model.stem.conv = {_stem_convolution(need)}")
        warnings.append(f"NVIDIA has no argument for {need.in_chans} image channels: build the model as shown")
    if need.num_classes == 0:
        lines.append("model.classifier.fc = nn.Identity()")
        warnings.append("NVIDIA has no argument for a model without classifier: build the model as shown")
    imports = ["from torch import nn"] if len(lines) > 1 else []
    imports = [f"from image_classification.models.efficientnet import EfficientNet, {arch}", *imports, ""]
    return Recipe("\n".join([*imports, *lines]), "", tuple(warnings))


_MAKERS: dict[str, Callable[[_Need], Recipe]] = {
    TIMM.name: _timm,
    TORCHVISION.name: _torchvision,
    LUKEMELAS.name: _lukemelas,
    HUGGING_FACE.name: _hugging_face,
    NVIDIA.name: _nvidia,
}

"""The names that each library gives to the parts of an EfficientNet, and what its weights mean.

A part (a convolution, a norm, a linear layer) has one canonical name here, for instance `Part("expand", stage=2,
block=0)`; a `Layout` says what a library calls it. Every library keeps PyTorch's names below that (`weight`,
`running_mean`, ...), so a table of module names is all that a state_dict needs to go from one library to another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from effkernels.models.architecture import Architecture
from effkernels.models.compound import PUBLISHED_LITE


class Part(NamedTuple):
    """A module that holds parameters: its role and, for the parts of a block, the position of the block (from 0)."""

    role: str
    stage: int = -1
    block: int = -1


@dataclass(frozen=True)
class Semantics:
    """The settings that a library's weights were trained with; None: the file does not say, the model's value stays.

    Attributes:
        pad_type: one of `effkernels.nn.PAD_TYPES`.
        bn_eps, bn_momentum: of the batch norms, in PyTorch's meaning.
        variant: "b0" to "b7", "lite0" to "lite4".
        native_size: height and width of the images that the variant was designed for, in pixels.
        build: Python that builds, as `model`, the target library's model that comes nearest to this meaning and takes
            the converted weights by `model.load_state_dict(...)`. Filled, as is `warnings`, by `convert_state_dict`.
        warnings: what to set or to know so that the weights keep their meaning in the target library, one each.
    """

    pad_type: str | None = None
    bn_eps: float | None = None
    bn_momentum: float | None = None
    variant: str | None = None
    native_size: int | None = None
    build: str | None = None
    warnings: tuple[str, ...] = ()


def _unchanged(key: str) -> str:
    return key


@dataclass(frozen=True)
class Layout:
    """The names one library uses.

    Attributes:
        name: of the library.
        marker: a key that every checkpoint of the library has and no other library's.
        outside: role -> module name, for stem, head and classifier.
        expanding, plain: role -> name inside a block, for blocks with an expand convolution and without.
        prefix: (stage, block, number of the block in the network), all from 0 -> name of the block, with its dot.
        semantics: variant ("b0" to "b7", "lite0" to "lite4") -> what the weights mean.
        rename: brings another spelling of a key (older files, a model without its classifier) to the usual one.
        headless: the library's spelling of a usual key in a network without classifier.
        linear_squeeze_excite: the two layers of squeeze-and-excitation are linear, (out, in), not 1x1 convolutions.
        lite: the library has the lite variants.
        normalization: variant -> what was subtracted from an image in [0, 1] and divided by, per channel, where the
            library's weights differ in it from timm's models of the name without "tf_"; else None.
    """

    name: str
    marker: str
    outside: Mapping[str, str]
    expanding: Mapping[str, str]
    plain: Mapping[str, str]
    prefix: Callable[[int, int, int], str]
    semantics: Callable[[str], Semantics]
    rename: Callable[[str], str] = _unchanged
    headless: Callable[[str], str] = _unchanged
    linear_squeeze_excite: bool = False
    lite: bool = False
    normalization: Callable[[str], tuple[float, float] | None] = lambda variant: None

    def module_names(self, architecture: Architecture) -> dict[Part, str]:
        """Return the library's name for each part of a network."""
        names = {Part(role): name for role, name in self.outside.items()}
        number = 0
        for stage, row in enumerate(architecture.stages):
            roles = self.plain if row.expansion == 1 else self.expanding
            if not architecture.se_ratio:
                roles = {role: name for role, name in roles.items() if role not in ("squeeze", "excite")}
            for block in range(row.layers):
                prefix = self.prefix(stage, block, number)
                names |= {Part(role, stage, block): prefix + name for role, name in roles.items()}
                number += 1
        return names


def _without_expand(expanding: Mapping[str, str]) -> dict[str, str]:
    return {role: name for role, name in expanding.items() if role not in ("expand", "expand_norm")}


TIMM = Layout(
    name="timm",
    marker="conv_stem.weight",
    outside={
        "stem": "conv_stem",
        "stem_norm": "bn1",
        "head": "conv_head",
        "head_norm": "bn2",
        "classifier": "classifier",
    },
    expanding={
        "expand": "conv_pw",
        "expand_norm": "bn1",
        "depthwise": "conv_dw",
        "depthwise_norm": "bn2",
        "squeeze": "se.conv_reduce",
        "excite": "se.conv_expand",
        "project": "conv_pwl",
        "project_norm": "bn3",
    },
    plain={
        "depthwise": "conv_dw",
        "depthwise_norm": "bn1",
        "squeeze": "se.conv_reduce",
        "excite": "se.conv_expand",
        "project": "conv_pw",
        "project_norm": "bn2",
    },
    prefix=lambda stage, block, number: f"blocks.{stage}.{block}.",
    # efficientnet_* and tf_efficientnet_* have the same keys: the name of the model decides.
    semantics=lambda variant: Semantics(),
    lite=True,
)

TORCHVISION = Layout(
    name="torchvision",
    marker="features.0.0.weight",
    outside={
        "stem": "features.0.0",
        "stem_norm": "features.0.1",
        "head": "features.8.0",
        "head_norm": "features.8.1",
        "classifier": "classifier.1",
    },
    expanding={
        "expand": "0.0",
        "expand_norm": "0.1",
        "depthwise": "1.0",
        "depthwise_norm": "1.1",
        "squeeze": "2.fc1",
        "excite": "2.fc2",
        "project": "3.0",
        "project_norm": "3.1",
    },
    plain={
        "depthwise": "0.0",
        "depthwise_norm": "0.1",
        "squeeze": "1.fc1",
        "excite": "1.fc2",
        "project": "2.0",
        "project_norm": "2.1",
    },
    prefix=lambda stage, block, number: f"features.{stage + 1}.{block}.block.",
    semantics=lambda variant: Semantics("", 1e-3, 0.01) if variant in ("b5", "b6", "b7") else Semantics("", 1e-5, 0.1),
)

_LUKEMELAS_BLOCK = {
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "squeeze": "_se_reduce",
    "excite": "_se_expand",
    "project": "_project_conv",
    "project_norm": "_bn2",
}

LUKEMELAS = Layout(
    name="lukemelas",
    marker="_conv_stem.weight",
    outside={"stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1", "classifier": "_fc"},
    expanding=_LUKEMELAS_BLOCK,
    plain=_without_expand(_LUKEMELAS_BLOCK),
    prefix=lambda stage, block, number: f"_blocks.{number}.",
    # Its models freeze SAME padding at the native size unless they are built with image_size=None ("same" here). The
    # native size of a lite variant is what it was designed for, which is not what timm's model of the name says.
    semantics=lambda variant: Semantics(
        "same_native",
        1e-3,
        0.01,
        native_size=PUBLISHED_LITE[variant].resolution if variant in PUBLISHED_LITE else None,
    ),
    # efficientnet_lite_pytorch, a fork of it, has the weights of TensorFlow's lite models.
    lite=True,
    normalization=lambda variant: (0.5, 0.5) if variant in PUBLISHED_LITE else None,
)

_HUGGING_FACE_BLOCK = {
    "expand": "expansion.expand_conv",
    "expand_norm": "expansion.expand_bn",
    "depthwise": "depthwise_conv.depthwise_conv",
    "depthwise_norm": "depthwise_conv.depthwise_norm",
    "squeeze": "squeeze_excite.reduce",
    "excite": "squeeze_excite.expand",
    "project": "projection.project_conv",
    "project_norm": "projection.project_bn",
}

HUGGING_FACE = Layout(
    name="huggingface",
    marker="efficientnet.embeddings.convolution.weight",
    outside={
        "stem": "efficientnet.embeddings.convolution",
        "stem_norm": "efficientnet.embeddings.batchnorm",
        "head": "efficientnet.encoder.top_conv",
        "head_norm": "efficientnet.encoder.top_bn",
        "classifier": "classifier",
    },
    expanding=_HUGGING_FACE_BLOCK,
    plain=_without_expand(_HUGGING_FACE_BLOCK),
    prefix=lambda stage, block, number: f"efficientnet.encoder.blocks.{number}.",
    # Its asymmetric padding, with the exceptions it lists per variant, is SAME frozen at the native size. It hands
    # TensorFlow's momentum 0.99 to PyTorch as it is; what was meant is PyTorch's 0.01.
    semantics=lambda variant: Semantics("same_native", 1e-3, 0.01),
    # EfficientNetForImageClassification holds an EfficientNetModel, whose own files lack the prefix.
    rename=lambda key: re.sub(r"^(embeddings|encoder)\.", r"efficientnet.\1.", key),
    headless=lambda key: key.removeprefix("efficientnet."),
)

_NVIDIA_BLOCK = {
    "expand": "expand.conv",
    "expand_norm": "expand.bn",
    "depthwise": "depsep.conv",
    "depthwise_norm": "depsep.bn",
    "squeeze": "se.squeeze",
    "excite": "se.expand",
    "project": "proj.conv",
    "project_norm": "proj.bn",
}

NVIDIA = Layout(
    name="nvidia",
    marker="stem.conv.weight",
    outside={
        "stem": "stem.conv",
        "stem_norm": "stem.bn",
        "head": "features.conv",
        "head_norm": "features.bn",
        "classifier": "classifier.fc",
    },
    expanding=_NVIDIA_BLOCK,
    plain=_without_expand(_NVIDIA_BLOCK),
    prefix=lambda stage, block, number: f"layers.{stage}.block{block}.",
    semantics=lambda variant: Semantics("", 1e-3, 0.01),
    # The files on NGC say layer1 where the published code says layers.0.
    rename=lambda key: re.sub(r"^layer(\d+)\.", lambda match: f"layers.{int(match[1]) - 1}.", key),
    linear_squeeze_excite=True,
)

LAYOUTS: tuple[Layout, ...] = (TIMM, TORCHVISION, LUKEMELAS, HUGGING_FACE, NVIDIA)


_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def tensor_shapes(
    architecture: Architecture, *, in_chans: int = 3, num_classes: int = 1000
) -> dict[tuple[Part, str], tuple[int, ...]]:
    """Return every tensor of a network with its shape, in the order of the forward, which is every library's order.

    Args:
        architecture: of the network.
        in_chans: channels of an image.
        num_classes: of the classifier; 0: none.

    Returns:
        (part, name of the tensor in it) -> shape. The layers of squeeze-and-excitation are 1x1 convolutions here.
    """
    shapes: dict[tuple[Part, str], tuple[int, ...]] = {}

    def convolution(part: Part, outputs: int, inputs: int, kernel_size: int = 1, bias: bool = False) -> None:
        shapes[part, "weight"] = (outputs, inputs, kernel_size, kernel_size)
        if bias:
            shapes[part, "bias"] = (outputs,)

    def norm(part: Part, channels: int) -> None:
        shapes.update({(part, name): () if name == "num_batches_tracked" else (channels,) for name in _NORM_TENSORS})

    channels = architecture.stem_channels
    convolution(Part("stem"), channels, in_chans, 3)
    norm(Part("stem_norm"), channels)
    for stage, row in enumerate(architecture.stages):
        for block in range(row.layers):
            expanded = channels * row.expansion
            squeezed = max(1, round(channels * architecture.se_ratio))
            if row.expansion != 1:
                convolution(Part("expand", stage, block), expanded, channels)
                norm(Part("expand_norm", stage, block), expanded)
            convolution(Part("depthwise", stage, block), expanded, 1, row.kernel_size)
            norm(Part("depthwise_norm", stage, block), expanded)
            if architecture.se_ratio:
                convolution(Part("squeeze", stage, block), squeezed, expanded, bias=True)
                convolution(Part("excite", stage, block), expanded, squeezed, bias=True)
            convolution(Part("project", stage, block), row.channels, expanded)
            norm(Part("project_norm", stage, block), row.channels)
            channels = row.channels
    convolution(Part("head"), architecture.head_channels, channels)
    norm(Part("head_norm"), architecture.head_channels)
    if num_classes > 0:
        shapes[Part("classifier"), "weight"] = (num_classes, architecture.head_channels)
        shapes[Part("classifier"), "bias"] = (num_classes,)
    return shapes


def recognise(keys: Collection[str]) -> Layout | None:
    """Return the library whose names these are, or None."""
    return next((layout for layout in LAYOUTS if layout.marker in keys), None)


def starts_network(key: str) -> bool:
    """Return whether a key is the marker of a library, in any spelling of it."""
    return key.endswith(".weight") and any(layout.rename(key) == layout.marker for layout in LAYOUTS)


def translation(source: Layout, target: Layout, architecture: Architecture) -> dict[str, str]:
    """Module names of `source` -> those of `target`, for every part of a network."""
    names = target.module_names(architecture)
    return {name: names[part] for part, name in source.module_names(architecture).items()}

"""The models of other libraries that `optimize_` is tested on, and how many blocks of each have to run fused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peer_models import lukemelas_model, randomise, timm_model, torchvision_model
from torch import Tensor, nn

from effkernels.models.peers import import_lukemelas, import_timm, import_torchvision

PAGE = Path(__file__).resolve().parents[1] / "docs" / "optimize.md"
BEGIN = "<!-- optimized models: written by tests/optimize_models.py -->\n"
END = "<!-- end of optimized models -->"


@dataclass(frozen=True)
class Peer:
    """A model of another library.

    Attributes:
        library: whose.
        name: there.
        fused: blocks, and convolutions outside of blocks, that run fused.
        left: lines of the report that do not.
        size: (H, W) of the image it is tested on; None: only its structure is looked at, on the meta device.
        options: for the library's constructor.
        thorough: made of the blocks of another one, at another width or depth: a thorough run alone looks at it.
    """

    library: str
    name: str
    fused: int
    left: int = 0
    size: tuple[int, int] | None = (65, 67)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    thorough: bool = False

    @property
    def id(self) -> str:
        return "-".join((self.library, self.name, *map(str, self.options.values())))


# Stem and head count one each. B0: 16 blocks; mobilenetv3 has a second convolution in its head.
PEERS: tuple[Peer, ...] = (
    Peer("timm", "efficientnet_b0", 18),
    Peer("timm", "efficientnet_b1", 25, size=None, thorough=True),
    Peer("timm", "efficientnet_b2", 25, size=None, thorough=True),
    Peer("timm", "efficientnet_b3", 28, size=None, thorough=True),
    Peer("timm", "efficientnet_b4", 34, size=None),
    Peer("timm", "efficientnet_b5", 41, size=None, thorough=True),
    Peer("timm", "efficientnet_b6", 47, size=None, thorough=True),
    Peer("timm", "efficientnet_b7", 57, size=None),
    Peer("timm", "efficientnet_b8", 63, size=None, thorough=True),
    Peer("timm", "tf_efficientnet_b0", 18, size=(61, 74)),
    Peer("timm", "efficientnet_lite0", 18, thorough=True),
    Peer("timm", "tf_efficientnet_lite0", 18),
    Peer("timm", "efficientnet_es", 20, size=(64, 64), thorough=True),
    Peer("timm", "tf_efficientnet_es", 20),
    Peer("timm", "tf_efficientnetv2_b0", 23),
    Peer("timm", "efficientnetv2_rw_t", 41, size=None, thorough=True),
    Peer("timm", "efficientnetv2_s", 42, size=None),
    Peer("timm", "test_efficientnet", 7, size=(96, 96)),
    Peer("timm", "mobilenetv1_100", 14),
    Peer("timm", "mobilenetv2_035", 19, size=(64, 64)),
    Peer("timm", "mobilenetv2_050", 19, thorough=True),
    Peer("timm", "mobilenetv2_100", 19, size=None),
    Peer("timm", "mobilenetv3_small_050", 14),
    Peer("timm", "mobilenetv3_small_075", 14, size=(64, 64), thorough=True),
    Peer("timm", "mobilenetv3_large_100", 18),
    Peer("timm", "tf_mobilenetv3_small_075", 14, size=(70, 57)),
    Peer("timm", "tf_mobilenetv3_small_minimal_100", 14),
    Peer("timm", "mobilenetv4_conv_small_035", 28),
    Peer("timm", "mobilenetv4_conv_small_050", 28, size=(64, 64), thorough=True),
    Peer("timm", "mnasnet_small", 17),
    Peer("timm", "semnasnet_075", 18),
    Peer("timm", "spnasnet_100", 23, size=(64, 64)),
    Peer("timm", "fbnetc_100", 23),
    Peer("timm", "fbnetv3_b", 32, size=None),
    Peer("timm", "lcnet_035", 15, size=(64, 64)),
    Peer("timm", "lcnet_050", 15, thorough=True),
    Peer("timm", "tinynet_d", 13, thorough=True),
    Peer("timm", "tinynet_e", 12),
    Peer("timm", "hardcorenas_a", 14),
    Peer("timm", "rexnet_100", 18),
    Peer("timm", "repvit_m0_9", 34, size=None),
    Peer("timm", "mixnet_s", 84),
    Peer("timm", "maxvit_rmlp_pico_rw_256", 12, size=(64, 64), options={"img_size": 64}),
    Peer("timm", "maxvit_tiny_tf_224", 12, size=None),
    Peer("timm", "coatnet_rmlp_0_rw_224", 8, size=None),
    Peer("torchvision", "efficientnet_b0", 18),
    Peer("torchvision", "efficientnet_b7", 57, size=None),
    Peer("torchvision", "efficientnet_v2_s", 42, size=None),
    Peer("torchvision", "efficientnet_v2_m", 59, size=None, thorough=True),
    Peer("torchvision", "mobilenet_v2", 19),
    Peer("torchvision", "mobilenet_v3_small", 13),
    Peer("torchvision", "mobilenet_v3_large", 17),
    Peer("torchvision", "mnasnet0_5", 20),
    Peer("torchvision", "shufflenet_v2_x0_5", 56, size=(64, 64)),
    Peer("torchvision", "maxvit_t", 12, left=1, size=None),
    Peer("lukemelas", "b0", 18),
    Peer("lukemelas", "b0", 18, options={"image_size": None}),
    Peer("lukemelas", "b1", 25, size=(64, 64), thorough=True),
    Peer("transformers", "EfficientNet B0", 18),
    Peer("transformers", "MobileNetV1", 27, size=(61, 74)),
    Peer("transformers", "MobileNetV2", 52),
    Peer("NVIDIA layout", "efficientnet-b0 in small", 6),
)


def build(peer: Peer) -> nn.Module:
    """A peer with random weights and statistics in eval mode; without them on the meta device where it has no size."""
    if peer.size is None:
        with torch.device("meta"):
            return structure(peer).eval()
    if peer.library == "timm" and "img_size" not in peer.options:
        return timm_model(peer.name, **peer.options)
    if peer.library == "torchvision":
        return torchvision_model(peer.name)
    if peer.library == "lukemelas":
        return lukemelas_model(peer.name, **peer.options)
    return randomise(structure(peer))


def structure(peer: Peer) -> nn.Module:
    if peer.library == "timm":
        return import_timm().create_model(peer.name, **peer.options)
    if peer.library == "torchvision":
        import_torchvision()
        from torchvision import models

        return getattr(models, peer.name)(weights=None)
    if peer.library == "lukemelas":
        return import_lukemelas().EfficientNet.from_name(f"efficientnet-{peer.name}", **peer.options)
    return _OTHERS[peer.library, peer.name]()


class Logits(nn.Module):
    """A Hugging Face model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def hugging_face_b0() -> nn.Module:
    """Hugging Face's EfficientNet-B0; its norms' eps is 1e-3 and its padding asymmetric."""
    import_torchvision()
    import transformers

    config = transformers.EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280, num_labels=10
    )
    return Logits(transformers.EfficientNetForImageClassification(config))


def hugging_face_mobilenet(version: int) -> nn.Module:
    """Hugging Face's MobileNetV1 or V2 of a quarter of the width, which pads SAME by numbers computed on the way."""
    import_torchvision()
    import transformers

    config = getattr(transformers, f"MobileNetV{version}Config")(depth_multiplier=0.25, num_labels=10)
    return Logits(getattr(transformers, f"MobileNetV{version}ForImageClassification")(config))


class _NvidiaExcite(nn.Module):
    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, reduced)
        self.expand = nn.Linear(reduced, channels)
        self.activation = nn.SiLU(inplace=True)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        out = self.squeeze(torch.mean(x, [2, 3]))
        out = self.sigmoid(self.expand(self.activation(out)))
        return out.unsqueeze(2).unsqueeze(3)


class _NvidiaScaledExcite(_NvidiaExcite):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x


def _nvidia_conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int, act: bool) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01))
    if act:
        layers.add_module("act", nn.SiLU(inplace=True))
    return layers


class _NvidiaBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = _nvidia_conv(inputs, hidden, 1, 1, 1, True) if expansion > 1 else None
        self.depsep = _nvidia_conv(hidden, hidden, kernel, stride, hidden, True)
        self.se = _NvidiaScaledExcite(hidden, max(1, inputs // 4))
        self.proj = _nvidia_conv(hidden, outputs, 1, 1, 1, False)
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.proj(self.se(self.depsep(y)))
        return self.drop(y) + x if self.residual else y


class NvidiaLayout(nn.Module):
    """The structure of NVIDIA DeepLearningExamples' EfficientNet, four blocks of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _nvidia_conv(3, 16, 3, 2, 1, True)
        plan = ((16, 8, 3, 1, 1), (8, 16, 3, 2, 6), (16, 16, 5, 1, 6), (16, 24, 5, 2, 6))
        self.layers = nn.Sequential()
        for index, block in enumerate(plan):
            stage = nn.Sequential()
            stage.add_module("block0", _NvidiaBlock(*block))
            self.layers.add_module(str(index), stage)
        self.features = _nvidia_conv(24, 64, 1, 1, 1, True)
        self.classifier = nn.Sequential()
        self.classifier.add_module("pooling", nn.AdaptiveAvgPool2d(1))
        self.classifier.add_module("squeeze", nn.Flatten())
        self.classifier.add_module("dropout", nn.Dropout(0.2))
        self.classifier.add_module("fc", nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.layers(self.stem(x))))


_OTHERS: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("transformers", "EfficientNet B0"): hugging_face_b0,
    ("transformers", "MobileNetV1"): functools.partial(hugging_face_mobilenet, 1),
    ("transformers", "MobileNetV2"): functools.partial(hugging_face_mobilenet, 2),
    ("NVIDIA layout", "efficientnet-b0 in small"): NvidiaLayout,
}


@functools.cache
def is_installed(library: str) -> bool:
    """Return whether the library of a peer can be imported."""
    import importlib.util

    package = {"lukemelas": "efficientnet_pytorch", "NVIDIA layout": "torch"}.get(library, library)
    return importlib.util.find_spec(package) is not None


def page_table() -> str:
    """Return the table of docs/optimize.md, from `PEERS`."""
    lines = ["| library | models (blocks that run fused, stem and head included) |", "|---|---|"]
    for library in dict.fromkeys(peer.library for peer in PEERS):
        models = dict.fromkeys(
            f"`{peer.name}` ({peer.fused}{f' of {peer.fused + peer.left}' if peer.left else ''})"
            for peer in PEERS
            if peer.library == library
        )
        lines.append(f"| {library} | {', '.join(models)} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """Return the text of docs/optimize.md with the table in its place."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE} has no lines {BEGIN.strip()} and {END}"
    return f"{before}{BEGIN}\n{page_table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

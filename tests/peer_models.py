"""Models with random weights and norm statistics: other libraries', ours with the same, and a small one of ours."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from parity import assert_parity, joined
from torch import Tensor, nn

import effkernels
from effkernels.models import Architecture, EfficientNet, EfficientNetFeatures, Stage
from effkernels.models.peers import import_lukemelas, import_timm, import_torchvision


def randomise(model: nn.Module, seed: int = 0, channels: int = 3) -> nn.Module:
    """Draw every parameter and every norm statistic, on the CPU; the model comes back in eval mode.

    The statistics are measured on random images and then jittered, so that every layer sees values of the size it
    would see after training: with free statistics the signal dies on its way, or grows until rounding errors rule,
    and then equal logits say nothing. A model on the meta device gets memory first: drawing once here is far quicker
    than a library's initialisation.
    """
    if next(model.parameters()).is_meta:
        model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, 1.0 / math.sqrt(fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0.0, 0.3, generator=generator)
        model.eval()
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3, generator=generator)
            norm.bias.normal_(0.0, 0.2, generator=generator)
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0)
            norm.train()
            norm.momentum = 1.0
        for norm in _norms_of_skipped_blocks(model):
            norm.weight.mul_(0.3)
        model(images(2, 64, 64, channels, seed))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            norm.num_batches_tracked.zero_()
            # One size for all channels: two images are too few for statistics of each channel in the last layers.
            size = float((norm.running_var + norm.running_mean.square()).mean())
            norm.running_var.uniform_(0.7 * size, 1.4 * size, generator=generator)
            norm.running_mean.normal_(0.0, 0.2 * math.sqrt(size), generator=generator)
    return model


def _norms_of_skipped_blocks(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the last norm of every block that adds its input: the one after a 1x1 convolution that narrows to as many
    channels as the block before gave. With small branches a deep network of random weights is no longer chaotic.
    """
    found = []
    width = 0
    conv: nn.Module | None = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.BatchNorm2d) and conv.groups == 1 and conv.out_channels < conv.in_channels:
            if conv.out_channels == width:
                found.append(module)
            width = conv.out_channels
    return found


SMALL = Architecture(
    stem_channels=8,
    stages=(Stage(1, 3, 1, 8, 2), Stage(4, 5, 2, 16, 2), Stage(4, 3, 2, 24, 1)),
    head_channels=32,
)


def small(**options: Any) -> EfficientNet:
    """Return a network of five blocks, randomised, in eval mode."""
    return randomise(EfficientNet(SMALL, num_classes=10, **options))


def timm_model(name: str, seed: int = 0, channels: int = 3, **options: Any) -> nn.Module:
    """timm's model of that name, for images of `channels` channels, randomised, in eval mode."""
    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model(name, in_chans=channels, **options)
    return randomise(model, seed, channels)


def torchvision_model(name: str, seed: int = 0) -> nn.Module:
    """torchvision's model of that name ("efficientnet_b0"), randomised, in eval mode."""
    import_torchvision()
    from torchvision import models

    with torch.device("meta"):
        model = getattr(models, name)(weights=None)
    return randomise(model, seed)


def lukemelas_model(variant: str, seed: int = 0, **options: Any) -> nn.Module:
    """lukemelas' model of a variant ("b0"), randomised, in eval mode; its padding is frozen at the native size."""
    model = import_lukemelas().EfficientNet.from_name(f"efficientnet-{variant}", **options)
    return randomise(model, seed)


def lukemelas_lite_model(variant: str, image_size: int | None, seed: int = 0) -> nn.Module:
    """Return a lite variant ("lite0") under lukemelas' names, randomised, in eval mode.

    Its fork efficientnet_lite_pytorch is lukemelas' own network built of other rows; here they come from timm's model.

    Args:
        image_size: of the frozen padding, in pixels; None: SAME padding for any size.
    """
    lukemelas = import_lukemelas()
    with torch.device("meta"):
        stages = import_timm().create_model(f"efficientnet_{variant}").blocks
    rows = []
    for stage in stages:
        first = stage[0]
        project = first.conv_pwl if hasattr(first, "conv_pwl") else first.conv_pw
        entering = first.conv_pw.in_channels if hasattr(first, "conv_pwl") else first.conv_dw.in_channels
        rows.append(
            lukemelas.utils.BlockArgs(
                num_repeat=len(stage),
                kernel_size=first.conv_dw.kernel_size[0],
                stride=[first.conv_dw.stride[0]],
                expand_ratio=first.conv_dw.in_channels // entering,
                input_filters=entering,
                output_filters=project.out_channels,
                se_ratio=None,
                id_skip=True,
            )
        )
    shape = lukemelas.utils.GlobalParams(
        image_size=image_size,
        dropout_rate=0.2,
        num_classes=1000,
        batch_norm_momentum=0.99,
        batch_norm_epsilon=1e-3,
        drop_connect_rate=0.2,
        depth_divisor=8,
        include_top=True,
    )
    model = lukemelas.EfficientNet(rows, shape)
    for part in model.modules():
        if hasattr(part, "_swish"):
            part._swish = nn.ReLU6()
    return randomise(model, seed)


def twin(name: str, peer: nn.Module, **options: Any) -> EfficientNet | EfficientNetFeatures:
    """Our model of that name with the weights of timm's `peer`, in eval mode."""
    model = effkernels.create_model(name, device="meta", **options)
    # Copies: with assign=True the two would share their tensors.
    model.load_state_dict({key: value.clone() for key, value in peer.state_dict().items()}, assign=True)
    return model.eval()


def images(batch: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """(batch, channels, height, width), normal, float32."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def in_both_layouts(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own results with NCHW and with channels_last tensors.

    A deep network multiplies rounding errors by chance: the float32 logits of a random timm B1 at 240 are off by 1.5e-6
    in one layout and by 8.1e-6 in the other. One of them alone would be a yardstick made of luck.
    """
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return model(x), other(x.contiguous(memory_format=torch.channels_last))


def in_float64(model: nn.Module, x: Tensor) -> Any:
    """Return the model's answer in float64, the truth of a parity test; the model itself keeps its dtype."""
    return copy.deepcopy(model).double()(x.double())


def assert_gradients_parity(ours: nn.Module, peer: nn.Module, exact: nn.Module) -> None:
    """The tolerance rule for the gradients of all parameters, as one long vector with each at its own scale: a norm of
    eight channels has too few numbers to be judged alone.
    """
    found, same_dtype, truth = ({name: p.grad for name, p in m.named_parameters()} for m in (ours, peer, exact))
    assert found.keys() == truth.keys()
    assert all(gradient is not None for gradient in found.values())
    scale = {name: float(gradient.norm()) for name, gradient in truth.items()}
    assert_parity(*(joined([g[name] / scale[name] for name in scale]) for g in (found, same_dtype, truth)), "gradients")


@functools.cache
def small_timm_b0(prefix: str = "") -> nn.Module:
    """timm's B0 (prefix "" or "tf_"), shared by tests that do not change it."""
    return timm_model(f"{prefix}efficientnet_b0")


def variants(names: Iterable[str]) -> list[Any]:
    """Return models as parameters of a test: beyond B3 they repeat its blocks, wider and deeper, for a thorough run."""
    return [pytest.param(name, marks=[pytest.mark.thorough] * (name[-1] in "4567")) for name in names]

"""Random weights for networks that are to be compared: activations of a realistic size in every layer."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effkernels.models.sources import find_model

# Images that the statistics are taken from.
_IMAGES = 4
# The smallest size of a channel's values, as a share of those of all channels.
_SMALLEST_SHARE = 0.25
# By which the branch of a block is multiplied that is to be small.
_SHARE_OF_BRANCH = 0.3


def _set_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Give a batch norm random parameters that bring the input it is about to see to a size of about 1."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    others = tuple(axis for axis in range(inputs[0].ndim) if axis != 1)
    size = inputs[0].square().mean(others).sqrt()
    # A channel that a ReLU shut for all of these few images would get a variance of 0, and blow up another image's.
    size = size.clamp(min=_SMALLEST_SHARE * float(size.square().mean().sqrt()))
    norm.running_mean.normal_(0, 0.1).mul_(size)
    norm.running_var.uniform_(0.8, 1.2).mul_(size.square())
    if norm.weight is not None:
        norm.weight.uniform_(0.8, 1.2)
        norm.bias.normal_(0, 0.1)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that keep statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_var is not None]


def _ends_of_branches(model: nn.Module) -> list[nn.Module]:
    """Return the last norm of every inverted bottleneck that adds its input.

    It is the one after a 1x1 convolution that narrows to as many channels as the block before gave.
    """
    found: list[nn.Module] = []
    width, conv = 0, None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            conv = module
        elif not isinstance(module, _BatchNorm) or conv is None or conv.groups > 1:
            continue
        elif conv.out_channels < conv.in_channels:
            if conv.out_channels == width:
                found.append(module)
            width = conv.out_channels
    return found


def _make_small(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(norm, _BatchNorm)
    if norm.weight is not None:
        norm.weight.mul_(_SHARE_OF_BRANCH)


def draw_weights_(model: nn.Module, channels: int, img_size: int, *, small_branches: bool = False) -> None:
    """Draw the weights of a model's convolutions, and parameters and statistics of its batch norms, in place.

    In a freshly initialised network, whose norms have statistics of 0 and 1, the signal dies out on the way, and then
    every implementation agrees. So each norm gets its statistics from what reaches it in one pass over noise. They
    are root mean squares: dividing by the small standard deviations of noise would make a network that multiplies
    every rounding error a thousandfold. So would squeeze-and-excitation with the usual initialisation, by fan-out:
    its gates would be open or shut.

    Args:
        model: float32 in eval mode.
        channels, img_size: of the images of the pass; height and width in pixels.
        small_branches: let the blocks that add their input add little to it. With ReLU6 and without
            squeeze-and-excitation a deep network multiplies rounding errors a thousandfold otherwise.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, 1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
    hooks = [norm.register_forward_pre_hook(_set_statistics) for norm in norms_of(model)]
    if small_branches:
        hooks += [norm.register_forward_pre_hook(_make_small) for norm in _ends_of_branches(model)]
    try:
        model(torch.randn(_IMAGES, channels, img_size, img_size))
    finally:
        for hook in hooks:
            hook.remove()


def _has_seen_images(model: nn.Module) -> bool:
    """Return whether a model is more than initialised, by its norms; without norms it is taken as it is."""
    norms = norms_of(model)
    return not norms or any(bool((norm.running_var != 1).any()) for norm in norms if norm.running_var is not None)


@functools.lru_cache(maxsize=2)
def sample_foreign(text: str, channels: int, img_size: int, seed: int = 0) -> nn.Module:
    """Return another library's model, or that of a user's function, float32 on the CPU, in eval mode.

    Its weights are those of `draw_weights_`, unless its norms have statistics already: a function may load weights.
    The result is shared: do not change it.

    Args:
        text: of `effkernels.models.sources.find_model`.
        channels, img_size: of the images that it is to be run with.

    Raises:
        ValueError, ImportError, OSError: as of `ModelSource.build`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = find_model(text).build().float()
        if not _has_seen_images(model):
            draw_weights_(model, channels, img_size, small_branches=True)
    return model

"""Modules built on the fused operators: they run fused, in eval mode and, the blocks, in training mode.

`torch.nn` modules hold every parameter, under timm's names; nothing is folded, copied or cached, so weights changed by
any means take effect at the next call and a state_dict never depends on how a module runs.
"""

from __future__ import annotations

from effkernels.nn.conv_bn_act import ConvBnAct, conv_bn_act
from effkernels.nn.drop_path import DropPath
from effkernels.nn.mbconv import DepthwiseSeparable, MBConv
from effkernels.nn.norm_act import BatchNormAct2d
from effkernels.nn.padding import PAD_TYPES, PaddedConv2d, explicit_padding, same_padding, symmetric_padding
from effkernels.nn.squeeze_excite import SqueezeExcite
from effkernels.nn.training import set_recompute, training_problem, training_report

__all__ = [
    "PAD_TYPES",
    "BatchNormAct2d",
    "ConvBnAct",
    "DepthwiseSeparable",
    "DropPath",
    "MBConv",
    "PaddedConv2d",
    "SqueezeExcite",
    "conv_bn_act",
    "explicit_padding",
    "same_padding",
    "set_recompute",
    "symmetric_padding",
    "training_problem",
    "training_report",
]

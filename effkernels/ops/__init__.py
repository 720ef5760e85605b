"""The fused operators. Each picks a backend, runs the compiled operator or the reference, and is differentiable."""

from __future__ import annotations

from effkernels._norm import Norm
from effkernels.ops.conv import conv_bn_act
from effkernels.ops.depthwise import depthwise_bn_act, depthwise_bn_act_squeeze
from effkernels.ops.expand_depthwise import expand_depthwise_squeeze
from effkernels.ops.mbconv import mbconv
from effkernels.ops.mbconv_stack import mbconv_stack
from effkernels.ops.pointwise import pointwise_bn_act, pointwise_bn_act_pool
from effkernels.ops.squeeze_excite import depthwise_bn_act_gate, depthwise_bn_act_se, squeeze_excite_gate

__all__ = [
    "Norm",
    "conv_bn_act",
    "depthwise_bn_act",
    "depthwise_bn_act_gate",
    "depthwise_bn_act_se",
    "depthwise_bn_act_squeeze",
    "expand_depthwise_squeeze",
    "mbconv",
    "mbconv_stack",
    "pointwise_bn_act",
    "pointwise_bn_act_pool",
    "squeeze_excite_gate",
]

"""Which blocks train as one fused operator, and how their modules are handed to it.

`effkernels.ops.training` has the operators. A block runs fused where its norms use the statistics of the batch (all of
them or some, the others frozen) and everything else is as a fused block in eval mode needs it: the rule of
`effkernels.nn.fusible`. Whatever else is found runs as written, and `training_problem` says why.
"""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkernels.nn.drop_path import DropPath
from effkernels.nn.fusible import (
    activation_after,
    calls_modules,
    conv_arguments,
    is_fusible_depthwise,
    is_fusible_pointwise,
    is_untouched,
    parameters_of,
)
from effkernels.nn.padding import explicit_padding
from effkernels.nn.squeeze_excite import fusible_squeeze_excite
from effkernels.nn.training_norm import (
    FLOATING,
    asked_backend,
    group_of,
    is_batch_norm,
    is_enough,
    needs_modules,
    norm_problem,
    running_statistics,
    update_norms,
)
from effkernels.ops import backends, training, training_flops  # noqa: F401  training_flops registers formulas

RECOMPUTE = (None, "expand")


class BlockParts:
    """The parts of an MBConv or a DepthwiseSeparable by what they do; `expand` and `norm1` are None without an
    expansion.
    """

    def __init__(self, block: nn.Module) -> None:
        parts = block._modules
        expands = "conv_pwl" in parts
        self.expand: Any = parts["conv_pw"] if expands else None
        self.norm1: Any = parts["bn1"] if expands else None
        self.depthwise: Any = parts["conv_dw"]
        self.norm2: Any = parts["bn2" if expands else "bn1"]
        self.squeeze_excite: Any = parts["se"]
        self.project: Any = parts["conv_pwl" if expands else "conv_pw"]
        self.norm3: Any = parts["bn3" if expands else "bn2"]
        self.drop_path: Any = parts["drop_path"]


def training_problem(block: Any) -> str | None:
    """Why a block cannot train fused, for people to read; None where it can.

    Args:
        block: an `MBConv` or a `DepthwiseSeparable`.
    """
    parts = BlockParts(block)
    if _backend_of(block) == "reference":
        return "backend 'reference' is plain PyTorch"
    names = ("norm before the depthwise convolution", "norm after it", "norm after the project")
    for name, norm in zip(names, (parts.norm1, parts.norm2, parts.norm3), strict=True):
        if norm is None and parts.expand is None and name == names[0]:
            continue
        problem = norm_problem(norm, block._activation if name != names[2] else "identity")
        if problem:
            return f"{name}: {problem}"
    if parts.expand is not None and not is_fusible_pointwise(parts.expand):
        return "the expand is not a plain 1x1 convolution"
    if not is_fusible_depthwise(parts.depthwise):
        return "the depthwise convolution is not one that the operators know, or something is attached to it"
    if not is_fusible_pointwise(parts.project):
        return "the project is not a plain 1x1 convolution"
    nothing = type(parts.squeeze_excite) is nn.Identity and is_untouched(parts.squeeze_excite)
    if not nothing and fusible_squeeze_excite(parts.squeeze_excite) is None:
        return "the squeeze-and-excitation is not one that the operators know, or something is attached to it"
    drop_path = parts.drop_path
    if type(drop_path) not in (DropPath, nn.Identity) or not is_untouched(drop_path):
        return "the stochastic depth is not a DropPath, or something is attached to it"
    return None


def training_report(model: nn.Module) -> dict[str, str]:
    """Of every block of `model` that would not train fused: its name and the reason."""
    found = {}
    for name, module in model.named_modules():
        if _is_block(module) and (problem := training_problem(module)):
            found[name] = problem
    return found


def set_recompute(model: nn.Module, recompute: str | None) -> None:
    """Choose what the fused blocks of `model` save for the backward.

    Args:
        model: of `create_model`, or one that `optimize_(model, mode="training")` has changed.
        recompute: None saves the block's input and the tensors before its norms; "expand" leaves out the expanded one
            and computes it again by one more 1x1 convolution.

    Raises:
        ValueError: recompute is neither.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r} is not known; allowed: None, 'expand'")
    module: Any
    for module in model.modules():
        if _is_block(module):
            module.recompute = recompute
        elif hasattr(type(module), "_effkernels_set_recompute"):  # a block that `optimize_` runs fused
            module._effkernels_set_recompute(recompute)


class Chain(NamedTuple):
    """What a fused training operator computes: [1x1, norm, activation,] depthwise, norm, activation, [gate,] 1x1, norm.

    Attributes:
        expand, norm1: convolution and batch norm, or None without an expansion.
        depthwise, norm2, project, norm3: convolutions and batch norms.
        activation, activation2: after norm 1 and norm 2; names in `effkernels.ops.reference.ACTIVATIONS`.
        excitation: w_reduce, b_reduce, w_expand, b_expand, se_activation and gate_activation, as `ops` takes them; {}
            without a gate.
    """

    expand: Any
    norm1: Any
    depthwise: Any
    norm2: Any
    project: Any
    norm3: Any
    activation: str
    activation2: str
    excitation: Mapping[str, Any]

    @property
    def norms(self) -> tuple[Any, Any, Any]:
        """The three norms; the first may be None."""
        return self.norm1, self.norm2, self.norm3

    @property
    def convolutions(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each convolution."""
        return [conv_arguments(conv) for conv in (self.expand, self.depthwise, self.project) if conv is not None]


def train_block(block: Any, x: Tensor) -> Tensor | None:
    """The block fused, with its norms' statistics updated; None where it has to run as written.

    Args:
        block: an `MBConv` or a `DepthwiseSeparable`.
        x: (N, C, H, W), or a proxy of a tracer.

    Returns:
        (N, C', H', W'), channels_last.
    """
    if calls_modules(x) or not _uses_batch(block) or training_problem(block) is not None:
        return None
    parts = BlockParts(block)
    chain = Chain(
        parts.expand,
        parts.norm1,
        parts.depthwise,
        parts.norm2,
        parts.project,
        parts.norm3,
        "identity" if parts.norm1 is None else str(activation_after(parts.norm1, block._activation)),
        str(activation_after(parts.norm2, block._activation)),
        dict(fusible_squeeze_excite(parts.squeeze_excite) or {}),
    )
    if x.dim() != 4:
        return None
    padding = explicit_padding(parts.depthwise, x.shape[2], x.shape[3])
    dtype = chain_dtype(chain, x, padding)
    if dtype is None:
        return None
    joins = block.has_skip and dtype == x.dtype
    factors = _sample_factors(parts.drop_path, x, dtype) if block.has_skip else None
    y = train_chain(chain, x, padding, dtype, joins, factors, block.recompute)
    return x + y if block.has_skip and not joins else y


def chain_dtype(chain: Chain, x: Tensor, padding: Sequence[int]) -> torch.dtype | None:
    """The dtype that a chain computes in; None where PyTorch has to run the modules, and perhaps raises.

    Args:
        chain: of plain modules.
        x: its input (N, C, H, W).
        padding: of the depthwise convolution at (top, bottom, left, right).
    """
    convolutions = chain.convolutions
    dtype = _dtype_of(x, [weight for weight, _ in convolutions])
    if dtype is None or x.dim() != 4 or x.shape[1] != convolutions[0][0].shape[0 if chain.expand is None else 1]:
        return None
    return dtype if _has_values(x, chain, padding) else None


def train_chain(
    chain: Chain,
    x: Tensor,
    padding: Sequence[int],
    dtype: torch.dtype,
    residual: bool,
    factors: Tensor | None,
    recompute: str | None = None,
) -> Tensor:
    """The chain's result for x as one operator, with the statistics of its norms updated.

    Args:
        chain, x, padding: as of `chain_dtype`, which gave `dtype`.
        dtype: to compute in.
        residual: whether x is added.
        factors: (N,), of each sample's result, before x is added; None: 1.
        recompute: as of `set_recompute`.

    Returns:
        (N, C', H', W') in `dtype`, channels_last.
    """
    image = x.to(dtype).contiguous(memory_format=torch.channels_last)
    settings, parameters = _arguments(chain, padding, image, recompute)
    constants: list[Tensor | None] = []
    for norm in chain.norms:
        constants += (None, None) if norm is None or is_batch_norm(norm) else running_statistics(norm)
    constants.append(factors)
    y, norms = training.train_block(image, parameters, tuple(constants), training.BlockSettings(residual, *settings))
    _update_norms(chain, norms)
    return y


def _is_block(module: nn.Module) -> bool:
    return hasattr(module, "recompute") and "conv_dw" in module._modules


def _backend_of(block: Any) -> str:
    return asked_backend(block.backend)


def _uses_batch(block: nn.Module) -> bool:
    """Whether the block has anything of training: a norm of the batch, or branches that are dropped."""
    parts = BlockParts(block)
    drops = isinstance(parts.drop_path, DropPath) and parts.drop_path.training and parts.drop_path.rate > 0.0
    return drops or any(is_batch_norm(norm) for norm in (parts.norm1, parts.norm2, parts.norm3))


def _dtype_of(x: Tensor, weights: list[Tensor]) -> torch.dtype | None:
    """What the block computes in; None where PyTorch decides, and perhaps raises."""
    if needs_modules(x) or not all(backends.is_readable(weight) for weight in weights):
        return None
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return dtype if dtype in FLOATING and x.dtype != torch.float64 else None
    same = x.dtype in FLOATING and all(weight.dtype == x.dtype for weight in weights)
    return x.dtype if same else None


def _has_values(x: Tensor, chain: Chain, padding: Sequence[int]) -> bool:
    kernel: Any = conv_arguments(chain.depthwise)[0].shape[2:]
    stride, dilation = chain.depthwise.stride[0], chain.depthwise.dilation[0]
    size = [
        (x.shape[2 + i] + padding[2 * i] + padding[2 * i + 1] - dilation * (kernel[i] - 1) - 1) // stride + 1
        for i in range(2)
    ]
    norms = [norm for norm in chain.norms if is_batch_norm(norm)]
    return size[0] > 0 and size[1] > 0 and is_enough((x.shape[0], 0, *size), norms)


def _arguments(chain: Chain, padding: Sequence[int], image: Tensor, recompute: str | None) -> tuple[Any, Any]:
    """The settings after the first, and the parameters, of `training.train_block`."""
    excitation = chain.excitation
    parameters: list[Tensor | None] = []
    eps: list[float] = []
    for conv, norm in (
        (chain.expand, chain.norm1),
        (chain.depthwise, chain.norm2),
        (chain.project, chain.norm3),
    ):
        if conv is chain.project:
            parameters += [excitation.get(n) for n in ("w_reduce", "b_reduce", "w_expand", "b_expand")]
        if conv is None or norm is None:
            parameters += [None] * 4
            eps.append(0.0)
            continue
        weight, bias = conv_arguments(conv)
        # As autocast of PyTorch: matrices in its dtype; vectors and depthwise weights are cast where they are used.
        parameters += [weight if conv is chain.depthwise else weight.to(image.dtype), bias]
        of_norm = parameters_of(norm)
        parameters += [of_norm["weight"], of_norm["bias"]]
        eps.append(norm.eps)
    settings = (
        tuple(eps),
        chain.depthwise.stride[0],
        list(padding),
        chain.depthwise.dilation[0],
        chain.activation,
        chain.activation2,
        excitation.get("se_activation", "identity"),
        excitation.get("gate_activation", "sigmoid"),
        recompute != "expand",
        [group_of(norm) for norm in chain.norms],
    )
    return settings, tuple(parameters)


def _sample_factors(drop_path: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(N,): 0 for a branch that is dropped, else 1 / (1 - rate), by the random numbers of `DropPath`."""
    if type(drop_path) is not DropPath or not drop_path.training or drop_path.rate == 0.0:
        return None
    keep = 1.0 - drop_path.rate
    return x.new_empty((x.shape[0], 1, 1, 1), dtype=dtype).bernoulli_(keep).div_(keep).flatten()


def _update_norms(chain: Chain, vectors: Sequence[Tensor]) -> None:
    norms = [norm for norm in chain.norms if norm is not None]
    update_norms([(norm, found) for norm, found in zip(norms, vectors, strict=True) if is_batch_norm(norm)])

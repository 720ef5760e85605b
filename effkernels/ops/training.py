"""A whole MBConv block, and a norm with its activation, as operators that train: forward and backward in one piece.

Plain PyTorch saves the result of every layer for the backward. These operators save the tensors before the norms alone
(the expanded one, the depthwise one and the projected one), the statistics and the gate; norm, activation, squeeze and
gating are computed again in the backward, element by element, where they are needed.

Both are operators of `torch.ops.effkernels_training`, opaque to torch.compile, so that a compiled step saves and
computes what an eager one does. The steps between the matrix products are those of `training_steps.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from effkernels.ops import training_kernels  # noqa: F401  registers shape functions
from effkernels.ops import training_steps as steps
from effkernels.ops.training_product import keeps_gradient, product_backward
from effkernels.ops.training_steps import Excitation, FoldedNorm, NormParameters, NormVectors, nchw, nhwc, wide
from effkernels.ops.training_sync import joint_statistics, joint_sums

NAMESPACE = "effkernels_training"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

KERNELS: dict[str, Any] = {}
"""The function behind each operator by its name, for the launch plan: it makes the calls of `training_steps`."""

# What differentiable arguments an operator takes, in the order of its schema: a gradient is found by its place here.
BLOCK_PARAMETERS = (
    *("expand_weight", "expand_bias", "norm1_weight", "norm1_bias"),
    *("weight", "bias", "norm2_weight", "norm2_bias"),
    *("w_reduce", "b_reduce", "w_expand", "b_expand"),
    *("project_weight", "project_bias", "norm3_weight", "norm3_bias"),
)
_OPTIONAL = frozenset(BLOCK_PARAMETERS) - {"weight", "project_weight"}
_PARAMETERS_SCHEMA = ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in BLOCK_PARAMETERS)
# The norms' running statistics where they are used (else None), and the factor of each sample's branch.
_CONSTANTS_SCHEMA = "".join(f"Tensor? norm{i}_mean, Tensor? norm{i}_var, " for i in (1, 2, 3)) + "Tensor? keep"
_SETTINGS_SCHEMA = (
    "bool residual, float[] eps, int stride, SymInt[4] padding, int dilation, str activation, str activation2, "
    "str se_activation, str gate_activation, bool keep_expanded, str[] groups"
)
_SECOND_DERIVATIVE = (
    "{0}: the fused training operators have no second derivative. Run the model in plain PyTorch where you need one: "
    'effkernels.backend("reference") around the forward, or model.backend = "reference"'
)


class BlockSettings(NamedTuple):
    """What of a block is no tensor.

    Attributes:
        residual: whether x is added.
        eps: of the three norms.
        keep_expanded: False computes the expanded tensor again in the backward.
        groups: of each norm the name of the process group that shares its statistics, "" for the process alone.
    """

    residual: bool
    eps: tuple[float, float, float]
    stride: int
    padding: Sequence[int]
    dilation: int
    activation: str
    activation2: str
    se_activation: str
    gate_activation: str
    keep_expanded: bool
    groups: Sequence[str]


Parameters: TypeAlias = "tuple[Tensor | None, ...]"
Constants: TypeAlias = "tuple[Tensor | None, ...]"
_PARAMETER_COUNT, _CONSTANT_COUNT = len(BLOCK_PARAMETERS), 7


class _Saved(NamedTuple):
    """What the backward of a block needs besides its arguments."""

    expanded: Tensor
    convolved: Tensor
    projected: Tensor
    gate: Tensor
    norm1: Tensor
    norm2: Tensor
    norm3: Tensor


def train_block(
    x: Tensor, parameters: Parameters, constants: Constants, settings: BlockSettings
) -> tuple[Tensor, list[Tensor]]:
    """A block with the statistics of its batch; differentiable once.

    Args:
        x: (N, C, H, W), floating; saved for the backward, so channels_last saves it a conversion there.
        parameters: of the names `BLOCK_PARAMETERS`; expand_weight None: no expansion, w_reduce None: no gate. Weights
            of convolutions are of x's dtype, those of norms of any.
        constants: mean and variance of norm 1, 2 and 3 where the norm uses its running statistics, else None, and
            the factors (N,) of the branch of each sample or None (stochastic depth).
        settings: see `BlockSettings`.

    Returns:
        y: (N, C', H', W') in x's dtype, channels_last.
        statistics: (6, C) of each of the norms that there are, as the rows of `NormVectors`, in float32 (float64 where
            x is).
    """
    y, _, _, _, _, *norms = torch.ops.effkernels_training.block(x, *parameters, *constants, *settings)
    return y, norms if parameters[0] is not None else norms[1:]


def train_norm_act(
    t: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float,
    activation: str, group: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """activation(norm(t)) with the statistics of the batch, or with mean and var where they are given.

    Args:
        t: (N, C, H, W), floating. Nothing else is saved for the backward.
        weight, bias: (C,) or None.
        group: name of the process group that shares the statistics, "" for the process alone.

    Returns:
        y as t in channels_last, and statistics (6, C) as of `train_block`.
    """
    y, statistics = torch.ops.effkernels_training.norm_act(t, weight, bias, mean, var, eps, activation, group)
    return y, statistics


# ------------------------------------------------------------------------------------------------------- the block
def _block_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    parameters = dict(zip(BLOCK_PARAMETERS, arguments[:_PARAMETER_COUNT], strict=True))
    constants, settings = _constants_and_settings(arguments)
    with torch._C._DisableAutocast():
        image = nhwc(x)
        expanded, norm1, vectors1 = image, None, x.new_empty(0, dtype=wide(x.dtype))
        if parameters["expand_weight"] is not None:
            own = _own(parameters, constants, settings, 1)
            expanded, vectors1 = steps.product(image, parameters["expand_weight"], parameters["expand_bias"], own=own)
            vectors1 = _joint(vectors1, expanded, parameters, constants, settings, 1)
            norm1 = steps.norm_of(vectors1)
        convolved, vectors2 = steps.depthwise(
            expanded,
            norm1,
            settings.activation,
            parameters["weight"],
            parameters["bias"],
            settings.stride,
            settings.padding,
            settings.dilation,
            _norm_parameters(parameters, settings, 2),
        )
        vectors2 = _joint(vectors2, convolved, parameters, constants, settings, 2)
        norm2 = steps.norm_of(vectors2)
        gate = None
        excitation = _excitation(parameters, settings)
        if excitation is not None:
            gate = steps.excite(steps.squeeze(convolved, norm2, settings.activation2), excitation).to(wide(x.dtype))
        projected, vectors3 = steps.product(
            convolved,
            parameters["project_weight"],
            parameters["project_bias"],
            norm2,
            settings.activation2,
            gate,
            _own(parameters, constants, settings, 3),
        )
        vectors3 = _joint(vectors3, projected, parameters, constants, settings, 3)
        factor = _factor(constants, projected)
        y = steps.norm_act(projected, steps.norm_of(vectors3), "identity", factor, image if settings.residual else None)
    nothing = x.new_empty(0)
    keeps = settings.keep_expanded and norm1 is not None
    return (
        nchw(y),
        expanded if keeps else nothing,
        convolved,
        projected,
        nothing.to(wide(x.dtype)) if gate is None else gate,
        vectors1,
        vectors2,
        vectors3,
    )


def _block_backward(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of x and of the parameters that `wanted`, the last argument, asks for; the others are empty."""
    *arguments, wanted = arguments  # type: ignore[assignment]
    count = len(_Saved._fields)
    saved, rest = _Saved(*arguments[:count]), arguments[count:]
    parameters = dict(zip(BLOCK_PARAMETERS, rest[:_PARAMETER_COUNT], strict=True))
    constants, settings = _constants_and_settings(rest)
    with torch._C._DisableAutocast():
        gradients = _block_gradients(nhwc(dy), nhwc(x), saved, parameters, constants, settings, wanted)
    results = []
    for name, wants in zip(("x", *BLOCK_PARAMETERS), wanted, strict=True):
        like = x if name == "x" else parameters[name]
        if not wants:
            results.append(x.new_empty(0))
        elif name == "x":
            results.append(nchw(gradients[name]))
        else:
            results.append(gradients[name].to(like.dtype).reshape(like.shape))
    return results


def _block_gradients(
    dy: Tensor,
    image: Tensor,
    saved: _Saved,
    parameters: dict[str, Any],
    constants: Constants,
    settings: BlockSettings,
    wanted: Sequence[bool],
) -> dict[str, Tensor]:
    needs = dict(zip(("x", *BLOCK_PARAMETERS), wanted, strict=True))
    gradients: dict[str, Tensor] = {}
    expand_weight, convolved, projected = parameters["expand_weight"], saved.convolved, saved.projected
    norm2, norm3 = steps.norm_of(saved.norm2), steps.norm_of(saved.norm3)
    frozen = [constants[0] is not None, constants[2] is not None, constants[4] is not None]

    # The project's norm, and its product.
    def norm_gradient(which: int, sums: Tensor, image: Tensor, *factors: Tensor | None) -> steps.Coefficients:
        norm = steps.norm_of((saved.norm1, saved.norm2, saved.norm3)[which - 1])
        own, group, is_frozen = (
            _norm_parameters(parameters, settings, which),
            settings.groups[which - 1],
            frozen[which - 1],
        )
        found = _norm_gradient(sums, norm, image, is_frozen, own, group, *factors)
        gradients[f"norm{which}_weight"], gradients[f"norm{which}_bias"] = found.weight, found.bias
        bias = ("expand_bias", "bias", "project_bias")[which - 1]
        if needs[bias]:
            gradients[bias] = (
                norm.scale * steps.totals(sums, *factors)[0] if is_frozen else torch.zeros_like(norm.scale)
            )
        return found.coefficients

    sums, _ = steps.gradient_sums(dy, projected, norm3, "identity")
    factor = _factor(constants, projected)
    coefficients = norm_gradient(3, sums, projected, factor, None)
    dprojected = steps.norm_backward(dy, projected, norm3, coefficients, factor)
    dgated = steps.pointwise_input_gradient(dprojected, parameters["project_weight"])
    gate = None if parameters["w_reduce"] is None else saved.gate

    # Squeeze-and-excitation, and the sums of the depthwise norm's gradient, from one pass.
    sums, gated = steps.gradient_sums(dgated, convolved, norm2, settings.activation2, gate, needs["project_weight"])
    if needs["project_weight"]:
        gradients["project_weight"] = steps.pointwise_weight_gradient(dprojected, gated)
    del gated, dprojected
    offset = None
    excitation = _excitation(parameters, settings)
    if excitation is not None:
        pixels = convolved.shape[1] * convolved.shape[2]
        offset, of_parameters = steps.excite_backward(sums, pixels, excitation)
        gradients.update(zip(("w_reduce", "b_reduce", "w_expand", "b_expand"), of_parameters, strict=True))
    coefficients = norm_gradient(2, sums, convolved, gate, offset)
    if not any(needs[name] for name in ("x", "weight", *BLOCK_PARAMETERS[:4])):
        return gradients

    # The depthwise convolution.
    norm1 = None if expand_weight is None else steps.norm_of(saved.norm1)
    expanded = saved.expanded
    if norm1 is None:
        expanded = image
    elif not settings.keep_expanded:
        expanded = steps.pointwise(image, expand_weight, parameters["expand_bias"])
    dexpanded, gradients["weight"], sums = steps.depthwise_backward(
        dgated,
        convolved,
        norm2,
        settings.activation2,
        gate,
        None if offset is None else offset.to(norm2.scale.dtype),
        coefficients,
        expanded,
        norm1,
        settings.activation,
        parameters["weight"],
        settings.stride,
        settings.padding,
        settings.dilation,
    )
    del dgated
    if norm1 is None:
        gradients["x"] = dexpanded + dy if settings.residual else dexpanded
        return gradients

    # The expansion.
    coefficients = norm_gradient(1, sums, expanded)
    if not needs["x"] and not needs["expand_weight"]:
        return gradients
    residual = dy if settings.residual else None
    if not keeps_gradient(image, expanded.shape[3]):
        found = product_backward(
            dexpanded,
            image,
            expand_weight,
            parameters["expand_bias"],
            norm1,
            coefficients,
            residual,
            frozen[0],
            (needs["x"], needs["expand_weight"]),
        )
        gradients |= {name: g for name, g in zip(("x", "expand_weight"), found, strict=True) if g is not None}
        return gradients
    dexpanded = steps.norm_backward(dexpanded, expanded, norm1, coefficients)
    if needs["expand_weight"]:
        gradients["expand_weight"] = steps.pointwise_weight_gradient(dexpanded, image)
    if needs["x"]:
        gradients["x"] = steps.pointwise_input_gradient(dexpanded, expand_weight, residual)
    return gradients


def _constants_and_settings(arguments: Sequence[Any]) -> tuple[Constants, BlockSettings]:
    end = _PARAMETER_COUNT + _CONSTANT_COUNT
    return tuple(arguments[_PARAMETER_COUNT:end]), BlockSettings(*arguments[end:])


def _norm_parameters(parameters: dict[str, Any], settings: BlockSettings, which: int) -> NormParameters:
    return NormParameters(parameters[f"norm{which}_weight"], parameters[f"norm{which}_bias"], settings.eps[which - 1])


def _frozen(constants: Constants, which: int) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of a norm that uses its running statistics."""
    mean, var = constants[2 * which - 2 : 2 * which]
    return None if mean is None or var is None else (mean, var)


def _own(
    parameters: dict[str, Any], constants: Constants, settings: BlockSettings, which: int
) -> NormParameters | None:
    """The parameters of a norm that uses the statistics of the batch."""
    return None if _frozen(constants, which) else _norm_parameters(parameters, settings, which)


def _joint(
    vectors: Tensor,
    image: Tensor,
    parameters: dict[str, Any],
    constants: Constants,
    settings: BlockSettings,
    which: int,
) -> Tensor:
    """The norm of `image` and of its parts in other processes from that of its own part, rows of `NormVectors`."""
    own = _norm_parameters(parameters, settings, which)
    return _used_norm(vectors, image, _frozen(constants, which), own, settings.groups[which - 1])


def _used_norm(
    vectors: Tensor, image: Tensor, frozen: tuple[Tensor, Tensor] | None, own: NormParameters, group: str
) -> Tensor:
    if frozen is not None:
        mean, var = (t.to(wide(image.dtype)) for t in frozen)
        return steps.fold(mean, var, var, own)
    if not group:
        return vectors
    found = NormVectors(*vectors.unbind())
    return steps.fold(*joint_statistics(_pixels(image), found.mean, found.variance, group), own)


def _norm_gradient(
    sums: Tensor,
    norm: FoldedNorm,
    image: Tensor,
    frozen: bool,
    own: NormParameters,
    group: str,
    factor: Tensor | None = None,
    offset: Tensor | None = None,
) -> steps.NormGradient:
    """`steps.norm_gradient` over all processes that share the norm's statistics."""
    pixels = _pixels(image)
    shares = bool(group) and not frozen

    def joint(dy: Tensor, dyh: Tensor) -> tuple[int | Tensor, Tensor, Tensor]:
        return joint_sums(pixels, dy, dyh, group)

    return steps.norm_gradient(sums, norm, pixels, not frozen, own, factor, offset, joint if shares else None)


def _excitation(parameters: dict[str, Any], settings: BlockSettings) -> Excitation | None:
    if parameters["w_reduce"] is None:
        return None
    return Excitation(
        parameters["w_reduce"],
        parameters["b_reduce"],
        parameters["w_expand"],
        parameters["b_expand"],
        settings.se_activation,
        settings.gate_activation,
    )


def _factor(constants: Constants, image: Tensor) -> Tensor | None:
    """The factor of each sample's branch as one of each sample and channel, (N, C)."""
    keep = constants[6]
    return None if keep is None else keep.to(wide(image.dtype))[:, None].expand(-1, image.shape[3]).contiguous()


def _pixels(image: Tensor) -> int:
    return image.shape[0] * image.shape[1] * image.shape[2]


def _block_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    parameters = dict(zip(BLOCK_PARAMETERS, arguments[:_PARAMETER_COUNT], strict=True))
    _, settings = _constants_and_settings(arguments)
    batch, _, height, width = x.shape
    weight, project_weight, expand_weight = (parameters[n] for n in ("weight", "project_weight", "expand_weight"))
    top, bottom, left, right = settings.padding
    window = [settings.dilation * (size - 1) + 1 for size in weight.shape[2:]]
    out_height = (height + top + bottom - window[0]) // settings.stride + 1
    out_width = (width + left + right - window[1]) // settings.stride + 1
    channels, out_channels = weight.shape[0], project_weight.shape[0]
    norms = 0 if expand_weight is None else channels, channels, out_channels
    nothing = x.new_empty(0)
    keeps = settings.keep_expanded and expand_weight is not None
    return (
        nchw(x.new_empty(batch, out_height, out_width, out_channels)),
        x.new_empty(batch, height, width, channels) if keeps else nothing,
        x.new_empty(batch, out_height, out_width, channels),
        x.new_empty(batch, out_height, out_width, out_channels),
        x.new_empty((0,) if parameters["w_reduce"] is None else (batch, channels), dtype=wide(x.dtype)),
        *(x.new_empty((6, c) if c else 0, dtype=wide(x.dtype)) for c in norms),
    )


def _block_backward_fake(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    parameters = arguments[len(_Saved._fields) :][:_PARAMETER_COUNT]
    results = []
    for wants, like in zip(arguments[-1], (x, *parameters), strict=True):
        if not wants:
            results.append(x.new_empty(0))
        elif like is x:
            batch, channels, height, width = x.shape
            results.append(nchw(x.new_empty(batch, height, width, channels)))
        else:
            results.append(like.new_empty(like.shape))
    return results


# ------------------------------------------------------------------------------------------- a norm with its activation
def _norm_act_forward(
    t: Tensor, weight: Any, bias: Any, mean: Any, var: Any, eps: float, activation: str, group: str
) -> tuple[Tensor, Tensor]:
    with torch._C._DisableAutocast():
        image = nhwc(t)
        own = NormParameters(weight, bias, eps)
        frozen = _frozen((mean, var), 1)
        vectors = _used_norm(image if frozen else steps.statistics(image, own), image, frozen, own, group)
        y = steps.norm_act(image, steps.norm_of(vectors), activation)
    return nchw(y), vectors


def _norm_act_backward(
    dy: Tensor, t: Tensor, statistics: Tensor, weight: Any, bias: Any, frozen: bool, eps: float, activation: str,
    group: str, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    with torch._C._DisableAutocast():
        image = nhwc(t)
        norm = steps.norm_of(statistics)
        gradient = nhwc(dy)
        sums, _ = steps.gradient_sums(gradient, image, norm, activation)
        own = NormParameters(weight, bias)
        found = _norm_gradient(sums, norm, image, frozen, own, group)
        results = [t.new_empty(0)] * 3
        if wanted[0]:
            results[0] = nchw(steps.norm_backward(gradient, image, norm, found.coefficients, None, activation))
        if wanted[1]:
            results[1] = found.weight
        if wanted[2]:
            results[2] = found.bias
    return [result.clone() if i and result is results[0] else result for i, result in enumerate(results)]


def _norm_act_fake(
    t: Tensor, weight: Any, bias: Any, mean: Any, var: Any, eps: float, activation: str, group: str
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = t.shape
    return nchw(t.new_empty(batch, height, width, channels)), t.new_empty(6, channels, dtype=wide(t.dtype))


def _norm_act_backward_fake(
    dy: Tensor, t: Tensor, statistics: Tensor, weight: Any, bias: Any, frozen: bool, eps: float, activation: str,
    group: str, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    batch, channels, height, width = t.shape
    made = nchw(t.new_empty(batch, height, width, channels)), weight, bias
    results = []
    for wants, like in zip(wanted, made, strict=True):
        results.append(t.new_empty(0) if not wants else like if like is made[0] else like.new_empty(like.shape))
    return results


# --------------------------------------------------------------------------------------------------- registration
def _define(name: str, schema: str, kernel: Any, fake: Any) -> None:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    KERNELS[f"{NAMESPACE}::{name}"] = kernel
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def _register_autograd(name: str, backward: Any, setup: Any) -> None:
    """Give an operator its backward, as torch.library.register_autograd does.

    That one fills in the default values of arguments, of which these operators have none, and takes 0.3 ms for the
    schema of a block: a tenth of a block's time where images are small.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def run(keys: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
        results = run(keys, *arguments)
        setup(ctx, arguments, results)
        return results

    def gradients(ctx: Any, *of_results: Any) -> Any:
        return (None, *backward(ctx, *of_results))

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(f"{NAMESPACE}_{name}", (torch.autograd.Function,), members)

    def kernel(keys: Any, *arguments: Any) -> Any:
        tracked = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        return function.apply(keys, *arguments) if tracked else run(keys, *arguments)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _block_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    tensors = inputs[: 1 + _PARAMETER_COUNT + _CONSTANT_COUNT]
    ctx.settings = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors, *output[1:])


def _block_autograd(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[1 : 2 + _PARAMETER_COUNT])
    nothing = (None,) * (_CONSTANT_COUNT + len(ctx.settings))
    if dy is None:
        return (None,) * len(wanted) + nothing
    tensors = ctx.saved_tensors
    end = 1 + _PARAMETER_COUNT + _CONSTANT_COUNT
    found = torch.ops.effkernels_training.block_backward(
        dy, tensors[0], *tensors[end:], *tensors[1:end], *ctx.settings, wanted
    )
    return (*(g if wants else None for g, wants in zip(found, wanted, strict=True)), *nothing)


def _norm_act_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    t, weight, bias, mean, _, eps, activation, group = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = mean is not None, eps, activation, group
    ctx.save_for_backward(t, output[1], weight, bias)


def _norm_act_autograd(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[1:4])
    if dy is None:
        return (None,) * 8
    found = torch.ops.effkernels_training.norm_act_backward(dy, *ctx.saved_tensors, *ctx.settings, wanted)
    return (*(g if wants else None for g, wants in zip(found, wanted, strict=True)), *(None,) * 5)


def _refuse_second_derivative(name: str) -> Any:
    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_SECOND_DERIVATIVE.format(name))

    return refuse


def _register() -> None:
    block = f"{_PARAMETERS_SCHEMA}, {_CONSTANTS_SCHEMA}, {_SETTINGS_SCHEMA}"
    saved = ", ".join(f"Tensor {name}" for name in _Saved._fields)
    norm = "Tensor? weight, Tensor? bias"
    saved_results = ", ".join(["Tensor"] * (1 + len(_Saved._fields)))
    _define("block", f"(Tensor x, {block}) -> ({saved_results})", _block_forward, _block_fake)
    _define(
        "block_backward",
        f"(Tensor dy, Tensor x, {saved}, {block}, bool[] wanted) -> Tensor[]",
        _block_backward,
        _block_backward_fake,
    )
    _define(
        "norm_act",
        f"(Tensor t, {norm}, Tensor? mean, Tensor? var, float eps, str activation, str group) -> (Tensor, Tensor)",
        _norm_act_forward,
        _norm_act_fake,
    )
    _define(
        "norm_act_backward",
        f"(Tensor dy, Tensor t, Tensor statistics, {norm}, bool frozen, float eps, str activation, "
        "str group, bool[] wanted) -> Tensor[]",
        _norm_act_backward,
        _norm_act_backward_fake,
    )
    differentiable = {"block": (_block_autograd, _block_setup), "norm_act": (_norm_act_autograd, _norm_act_setup)}
    for name, (backward, setup) in differentiable.items():
        _register_autograd(name, backward, setup)
        torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", _refuse_second_derivative(name), lib=_LIBRARY)


_register()

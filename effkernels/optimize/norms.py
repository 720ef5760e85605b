"""Batch norms of other people's models: folded into the convolutions in front, or made to count over all processes.

Both keep the activation of modules that are norm and activation in one (timm's `BatchNormAct2d`). PyTorch's own
`convert_sync_batchnorm` and `fuse_conv_bn_eval` know such a module as a batch norm only, and drop it in silence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.nn.norm_act import SyncBatchNormAct, activation_module
from effkernels.optimize.optimizer import as_it_was_on_failure, restore_
from effkernels.optimize.probing import activation_of, norm_activation_of
from effkernels.optimize.survey import Survey, Unit
from effkernels.optimize.unknown import Unknown
from effkernels.optimize.verifying import undisturbed


def fold_bn_(model: nn.Module) -> int:
    """Fold batch norms into the convolutions in front of them, in place, for inference.

    The weight of the convolution is multiplied by the scale of the norm, its bias takes the shift, and the norm gives
    way to `nn.Identity`, or to its activation where it has one. Equal to the model in eval mode up to rounding. The
    state dict loses the norms' entries, and training afterwards is another thing than before. The fused operators do
    not need this: they read the norm as it is. A convolution or a norm that the model uses more than once stays.

    Args:
        model: changed in place; `optimize_` is taken back first and may be called again afterwards.

    Returns:
        How many norms were folded.
    """
    with as_it_was_on_failure(model):
        restore_(model)
        return _fold_all(model)


def _fold_all(model: nn.Module) -> int:
    found: list[tuple[str, str]] = []

    def collect(unit: Unit) -> bool:
        for method in unit.methods:
            for step in method.match.steps:
                if step.norm is not None:
                    found.append((_join(unit.path, step.conv.path), _join(unit.path, step.norm)))
        return True

    with undisturbed(model):
        Survey(model, lambda name, module: True, collect).run()
        pairs = list(dict.fromkeys(found))  # one that two methods share counts once
        uses = Counter(path for pair in pairs for path in pair)
        shared = _used_more_than_once(model)
        folded: list[_Folded] = []
        for conv_path, norm_path in pairs:
            conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, BatchNorm)
            alone = uses[conv_path] == uses[norm_path] == 1 and not {id(conv), id(norm), id(conv.weight)} & shared
            if alone and not any(tensor.is_meta for tensor in conv.parameters()):
                folded.append(_folded(conv, norm, norm_path))
    # Nothing before this line has changed the model, and nothing after it can fail.
    for one in folded:
        owner, _, leaf = one.norm_path.rpartition(".")
        one.conv.weight, one.conv.bias = one.weight, one.bias
        model.get_submodule(owner)._modules[leaf] = one.left
    return len(folded)


def convert_sync_batchnorm(module: nn.Module, process_group: object = None) -> nn.Module:
    """Replace every batch norm by one that normalises over all processes of a group, its activation kept.

    Like `torch.nn.SyncBatchNorm.convert_sync_batchnorm`: parameters and buffers are the same objects under the same
    names. A norm with an activation of its own becomes a `SyncBatchNormAct`.

    Args:
        module: changed in place (`optimize_` is taken back first), unless it is itself a batch norm.
        process_group: as of `nn.SyncBatchNorm`; None: all processes.

    Returns:
        The module, or what replaces it.

    Raises:
        ValueError: a subclass of a batch norm whose activation is not one that is known; the message names it, and
            nothing has been changed.
    """
    restore_(module)
    activations = {}
    for path, norm in module.named_modules():
        if isinstance(norm, BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
            try:
                activations[id(norm)] = "identity" if _is_plain(norm) else norm_activation_of(norm)
            except Unknown as reason:
                raise ValueError(f"{path or 'module'}: {reason}; it cannot be converted") from reason
    return _convert(module, activations, process_group)


@dataclass(frozen=True)
class _Folded:
    """A convolution with the norm after it in its weights, and what is left of the norm."""

    conv: nn.Conv2d
    norm_path: str
    weight: nn.Parameter
    bias: nn.Parameter
    left: nn.Module


def _folded(conv: nn.Conv2d, norm: BatchNorm, norm_path: str) -> _Folded:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    trained = conv.weight.requires_grad
    weight = (conv.weight.double() * scale[:, None, None, None]).to(conv.weight)
    return _Folded(
        conv,
        norm_path,
        nn.Parameter(weight, requires_grad=trained),
        nn.Parameter(shift.to(conv.weight), requires_grad=trained),
        _activation_module(norm),
    )


def _activation_module(norm: BatchNorm) -> nn.Module:
    """Return what is left of a norm when it no longer normalises."""
    activation = norm_activation_of(norm)
    if activation == "identity":
        return nn.Identity().train(norm.training)
    own = next((child for child in norm.children() if activation_of(child) == activation), None)
    return activation_module(activation).train(norm.training) if own is None else own


def _used_more_than_once(model: nn.Module) -> set[int]:
    """Return the ids of the modules and parameters that are in several places of a model."""
    modules = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    parameters = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {found for found, count in (modules + parameters).items() if count > 1}


def _is_plain(norm: BatchNorm) -> bool:
    return type(norm).__module__.startswith("torch.nn.")


def _convert(module: nn.Module, activations: dict[int, str], process_group: object) -> nn.Module:
    activation = activations.get(id(module))
    if activation is not None:
        assert isinstance(module, BatchNorm)
        return _synchronised(module, activation, process_group)
    for name, child in module.named_children():
        module._modules[name] = _convert(child, activations, process_group)
    return module


def _synchronised(norm: BatchNorm, activation: str, process_group: object) -> nn.SyncBatchNorm:
    cls = nn.SyncBatchNorm if _is_plain(norm) else SyncBatchNormAct
    with torch.device("meta"):
        result: nn.SyncBatchNorm = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, process_group
        )
    result._parameters = dict(norm._parameters)
    result._buffers = dict(norm._buffers)
    result._modules = dict(norm._modules)
    result.train(norm.training)
    if activation != "identity" and norm_activation_of(result) != activation:
        # The activation is not one of its modules but written into its forward.
        result._modules["act"] = activation_module(activation).train(norm.training)
    return result


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name

"""A batch norm in training mode: fused with its activation, and how its running statistics change."""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.nn.fusible import activation_after, calls_modules, parameters_of
from effkernels.nn.norm_act import BatchNormAct2d, SyncBatchNormAct
from effkernels.ops import backends, training
from effkernels.ops import training_steps as steps
from effkernels.ops.training_steps import wide

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TRAINABLE_NORMS = (BatchNormAct2d, nn.BatchNorm2d, SyncBatchNormAct, nn.SyncBatchNorm)


def train_norm_act(norm: Any, t: Tensor, activation: str, backend: str) -> Tensor | None:
    """A batch norm in training mode with its activation, saving t alone; None where it has to run as written.

    Args:
        norm: the batch norm.
        t: (N, C, H, W), or a proxy of a tracer.
        activation: as of `norm_act`.
        backend: of the module around it; "reference" is plain PyTorch.
    """
    if calls_modules(t) or not is_batch_norm(norm) or asked_backend(backend) == "reference":
        return None
    if t.dim() != 4 or t.dtype not in FLOATING or needs_modules(t) or norm_problem(norm, activation):
        return None
    parameters: Any = parameters_of(norm)
    if _mixed_with_float64(t.dtype, [parameters["weight"], parameters["bias"]]) or not is_enough(t.shape, [norm]):
        return None
    if t.shape[1] != norm.num_features:
        return None
    found: Any = activation_after(norm, activation)
    y, statistics = training.train_norm_act(
        t.contiguous(memory_format=torch.channels_last), parameters["weight"], parameters["bias"], None, None,
        norm.eps, found, group_of(norm),
    )  # fmt: skip
    update_norms([(norm, statistics)])
    return y


def in_training_format(x: Tensor, norm: Any, backend: str) -> Tensor:
    """x in channels_last where the norm after its convolution trains fused, which then converts nothing; else x."""
    if calls_modules(x) or x.dim() != 4 or not is_batch_norm(norm) or asked_backend(backend) == "reference":
        return x
    return x if needs_modules(x) else x.contiguous(memory_format=torch.channels_last)


def asked_backend(backend: str) -> str:
    return backends.selected() if backend == "auto" else backend


def is_batch_norm(norm: Any) -> bool:
    """Whether a norm uses the statistics of the batch, as PyTorch's forward decides it."""
    return isinstance(norm, BatchNorm) and (
        norm.training or (norm._buffers.get("running_mean") is None and norm._buffers.get("running_var") is None)
    )


def norm_problem(norm: Any, activation: str) -> str | None:
    if type(norm) not in _TRAINABLE_NORMS:
        return f"{type(norm).__name__} is not a plain batch norm"
    if activation_after(norm, activation) is None:
        return "its activation is unknown, or something is attached to it"
    buffers = norm._buffers
    if (buffers.get("running_mean") is None) != (buffers.get("running_var") is None):
        return "it has a running mean or a running variance, and not both"
    return None


def needs_modules(x: Tensor) -> bool:
    """Whether PyTorch's own operators have to be seen: torch.func, forward-mode gradients, subclasses of Tensor."""
    if torch.compiler.is_compiling():
        return False
    return not backends.is_readable(x) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _mixed_with_float64(dtype: torch.dtype, parameters: list[Tensor | None]) -> bool:
    return any(p is not None and (p.dtype == torch.float64) != (dtype == torch.float64) for p in parameters)


def group_of(norm: Any) -> str:
    """Name of the process group that a norm shares its statistics with; "" where it does not.

    As `nn.SyncBatchNorm` decides it, which takes tensors on GPUs alone; the fused operators take those on CPUs too.
    """
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return ""
    group: Any = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def is_enough(shape: Any, norms: Sequence[Any]) -> bool:
    """Whether batch norms find more than one value of a channel; PyTorch refuses fewer, and says so.

    Args:
        shape: (N, C, H, W).
        norms: those that use the statistics of a batch. If all share them with other processes, those have values too.
    """
    count = shape[0] * shape[2] * shape[3]
    return bool(count > 1) or (bool(norms) and all(group_of(norm) for norm in norms))


def running_statistics(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return norm._buffers["running_mean"], norm._buffers["running_var"]


def _update_by_kernel(batches: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    """Update norms by one kernel, where there is one and it knows them all; return those that are left to do."""
    if torch.compiler.is_compiling():  # Inductor makes one kernel of PyTorch's operators
        return batches
    if not batches or len(batches) > 3 or not steps.has_running_kernel(batches[0][1]):
        return batches
    running: list[Tensor] = []
    for norm, _ in batches:
        of_norm = [t for t in running_statistics(norm) if t is not None and t.dtype in backends.DTYPES]
        if norm.momentum is None or len(of_norm) < 2:
            return batches
        running += of_norm
    counts = [norm._buffers["num_batches_tracked"] for norm, _ in batches]
    vectors, momenta = [found for _, found in batches], [norm.momentum for norm, _ in batches]
    steps.update_running(running, vectors, [count for count in counts if count is not None], momenta)
    return []


@torch.no_grad()
def update_norms(batches: Sequence[tuple[Any, Tensor]]) -> None:
    """Update the running statistics after a batch, as `nn.BatchNorm2d` does.

    Those of norms with the same momentum are updated by the same few launches.

    Args:
        batches: batch norms, each with its rows (6, C) of `effkernels.ops.training_steps.NormVectors`.
    """
    batches = [(norm, found.detach()) for norm, found in batches if norm.training and norm.track_running_stats]
    batches = _update_by_kernel(batches)
    tracked = [norm._buffers["num_batches_tracked"] for norm, _ in batches]
    if counted := [count for count in tracked if count is not None]:
        torch._foreach_add_(counted, 1)
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for (norm, vectors), count in zip(batches, tracked, strict=True):
        mean, _, var = vectors[:3].unbind()
        for running, new in zip(running_statistics(norm), (mean, var), strict=True):
            if running is None:
                continue
            if norm.momentum is not None and running.dtype == new.dtype:
                both = together.setdefault(norm.momentum, ([], []))
                both[0].append(running)
                both[1].append(new)
                continue
            momentum: Any = norm.momentum
            if momentum is None:  # the mean of all batches
                momentum = 0.0 if count is None else 1.0 / count.to(mean.dtype)
            dtype = wide(running.dtype)
            running.copy_(running.to(dtype) * (1.0 - momentum) + new.to(dtype) * momentum)
    for share, (running_tensors, new_tensors) in together.items():
        torch._foreach_mul_(running_tensors, 1.0 - share)
        torch._foreach_add_(running_tensors, new_tensors, alpha=share)

"""Statistics of a batch that several processes hold parts of, as `nn.SyncBatchNorm` takes them.

A group is given by its name (`ProcessGroup.group_name`), so that it can be an argument of an operator. Every process of
a group has to make the same calls in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def joint_statistics(count: int, mean: Tensor, var: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased and unbiased variance of the parts of all processes.

    The parts are joined in the order of the processes, in float64 (Chan, Golub and LeVeque 1979, equation 2.1): every
    process gets the same bits, and nothing cancels.

    Args:
        count: pixels of this process' part; it may be 0, and mean and var then say nothing.
        mean, var: (C,), of the part; var is divided by `count`.
        group: name of the processes' group.
    """
    own = torch.zeros(3, mean.numel(), dtype=torch.float64, device=mean.device)
    if count:
        own[0], own[1], own[2] = count, mean, var
    total, joint_mean, squares = (torch.zeros_like(own[0]) for _ in range(3))
    for n, part_mean, part_var in _gathered(own, group):
        total, before = total + n, total
        shift = part_mean - joint_mean
        share = n / total.clamp(min=1.0)
        joint_mean = joint_mean + shift * share
        squares = squares + part_var * n + shift * shift * before * share
    found = joint_mean, squares / total, squares / (total - 1.0)
    return tuple(t.to(mean.dtype) for t in found)  # type: ignore[return-value]


def joint_sums(count: int, dy: Tensor, dyh: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of pixels and both sums (C,), in float64, over all processes."""
    sums = torch.stack([torch.full_like(dy, count, dtype=torch.float64), dy.double(), dyh.double()])
    total: Any = sum(_gathered(sums, group))  # in order: a reduction may add in any
    return total[0], total[1], total[2]


def _gathered(own: Tensor, group: str) -> list[Tensor]:
    """Return the tensor of every process."""
    # Imported here: PyTorch can be built without it.
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    members: Any = _resolve_process_group(group)  # type: ignore[arg-type]
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(members))]
    dist.all_gather(parts, own, members)
    return parts

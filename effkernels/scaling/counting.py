"""Count the costs of a network by one training forward on the meta device, which allocates nothing.

The costs are those of a network in plain PyTorch, which do not depend on what runs fused here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from effkernels.ops.backends import backend

# A prime, so that what holds a whole number of images is distinguished from a layer's own (saved batch statistics).
_IMAGES = 97


@dataclass(frozen=True)
class Cost:
    """The costs of one image.

    Attributes:
        multiply_adds: of all convolutions and matrix products, half of what `torch.utils.flop_counter` counts; the
            paper's "FLOPS".
        parameters: trained numbers.
        activation_bytes: what a forward in training keeps for the backward in plain PyTorch, in float32: every tensor
            that autograd saves, the image included, counted once however many layers save it or views share it.
            Results computed in place and results that no gradient needs cost nothing. Parameters are not in it, nor
            are the batch statistics of a norm, which do not grow with the batch.
    """

    multiply_adds: int
    parameters: int
    activation_bytes: int


class _Kept:
    """Collects the memory that autograd saves."""

    def __init__(self, module: nn.Module) -> None:
        # The storages stay referenced, or another one could get the address of one that is gone.
        self.known = {
            t.untyped_storage()._cdata: t.untyped_storage() for t in (*module.parameters(), *module.buffers())
        }
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> None:
        """Count a tensor; nothing is handed back for the graph to hold, which is never run backward.

        A node that holds its own result through a hook is a cycle that nobody frees.
        """
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = storage
            if storage.nbytes() % _IMAGES == 0:
                self.bytes += storage.nbytes()


def _never_unpacked(packed: None) -> Tensor:
    raise AssertionError("a forward that is counted is not run backward")


def count(module: nn.Module, image: tuple[int, int, int]) -> Cost:
    """Count what one image costs.

    Args:
        module: on the meta device; it is called in training mode and left in it.
        image: (channels, height, width).

    Raises:
        ValueError: the module is not on the meta device, where nothing is computed.
    """
    off = next((name for name, t in module.state_dict().items() if t.device.type != "meta"), None)
    if off is not None:
        raise ValueError(f"count: {off} is not on the meta device; build the module with device='meta'")
    kept = _Kept(module.train())
    images = torch.empty(_IMAGES, *image, device="meta")
    keeping = saved_tensors_hooks(kept, _never_unpacked)
    with backend("reference"), torch.enable_grad(), FlopCounterMode(display=False) as flops, keeping:
        module(images)
    parameters = sum(p.numel() for p in module.parameters())
    return Cost(flops.get_total_flops() // (2 * _IMAGES), parameters, kept.bytes // _IMAGES)

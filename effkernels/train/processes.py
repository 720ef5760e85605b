"""The processes of a training, as torchrun starts them; one without it."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """Which process this is.

    Attributes:
        rank: of this process; 0 writes files and messages.
        count: of all.
        local_rank: among those of this machine, which is the number of its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Processes:
        """Return what torchrun noted in RANK, WORLD_SIZE and LOCAL_RANK; one process without them.

        Raises:
            ValueError: they are no numbers, or not all of them are there.
        """
        count = environment.get("WORLD_SIZE", "1")
        if count == "1":
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            rank, size, local = (int(environment[name]) for name in names)
        except (KeyError, ValueError) as error:
            raise ValueError(f"WORLD_SIZE={count}, but {', '.join(names)} are not all numbers; use torchrun") from error
        if not 0 <= rank < size:
            raise ValueError(f"RANK={rank}; allowed: 0 to WORLD_SIZE - 1 = {size - 1}")
        return cls(rank, size, local)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Let the processes talk to each other inside the block: by NCCL for GPUs, by gloo for CPUs.

        Whoever uses a wrapped model inside drops it before the end: the group's threads end with the last of those that
        hold the group, and a thread that still runs when Python ends takes the process with it.
        """
        if self.count == 1:
            yield
            return
        # Its functions have the group of all processes as a default, if there is one when they are first imported, and
        # would hold it to the end of Python.
        importlib.import_module("torch.distributed.nn.functional")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=self.rank, world_size=self.count)
        try:
            yield
        finally:
            gc.collect()  # a wrapped model refers to itself
            dist.destroy_process_group()

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model with gradients averaged over the processes."""
        if self.count == 1:
            return model
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give each process the statistics of the first, whose are kept."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait for all processes.

        Also needed before they part: a thread of gloo that still holds the tensors of the last exchange needs Python's
        lock to free them, and the end of the group waits for the thread with the lock held.
        """
        if self.count > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

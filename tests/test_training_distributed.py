"""Two processes with DistributedDataParallel train as one process whose gradients are their mean."""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from peer_models import images, small
from torch import nn

from effkernels.nn import training_report


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _train(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    model = small().train()
    assert training_report(model) == {}
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    x = images(4, 33, 31)[2 * rank : 2 * rank + 2]
    parallel(x).square().mean().backward()
    torch.save({n: p.grad for n, p in model.named_parameters()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_mean_of_their_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train, (_free_port(), str(tmp_path)), nprocs=2)
    model, x = small().train(), images(4, 33, 31)
    wanted: dict[str, torch.Tensor] = {}
    for part in (x[:2], x[2:]):
        one = copy.deepcopy(model)
        one(part).square().mean().backward()
        for name, p in one.named_parameters():
            wanted[name] = wanted.get(name, 0) + p.grad / 2
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.equal(gradient, wanted[name]), name  # halves of floats, and sums of two, do not round twice

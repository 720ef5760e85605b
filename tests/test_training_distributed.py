"""Two processes train as one does: with gradients averaged, and with SyncBatchNorm as on the joint batch."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parity import assert_parity
from peer_models import assert_gradients_parity, images, randomise, small
from torch import Tensor, nn

import effkernels
from effkernels.nn import MBConv, training_report


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _run(rank: int, work: Callable[[int], dict[str, Tensor]], port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def in_two_processes(work: Callable[[int], dict[str, Tensor]], folder: Path) -> list[dict[str, Tensor]]:
    """Return what `work(rank)` returns in each of two processes of one group."""
    torch.multiprocessing.spawn(_run, (work, _free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def _train(rank: int) -> dict[str, Tensor]:
    model = small().train()
    assert training_report(model) == {}
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    parallel(images(4, 33, 31)[2 * rank : 2 * rank + 2]).square().mean().backward()
    return _gradients(model)


def test_two_processes_have_the_mean_of_their_gradients(tmp_path: Path) -> None:
    model, x = small().train(), images(4, 33, 31)
    wanted: dict[str, Tensor] = {}
    for part in (x[:2], x[2:]):
        one = copy.deepcopy(model)
        one(part).square().mean().backward()
        for name, p in one.named_parameters():
            wanted[name] = wanted.get(name, 0) + p.grad / 2
    for found in in_two_processes(_train, tmp_path):
        for name, gradient in found.items():
            assert torch.equal(gradient, wanted[name]), name  # halves of floats, and sums of two, do not round twice


BATCH = images(7, 33, 31)
STEPS = 3


def _steps(model: nn.Module, x: Tensor, share: float) -> dict[str, Tensor]:
    """Gradients of the last of some training steps, logits and buffers; `share` of the loss is this process'."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(x)
        (logits.square().mean() * share).backward()
        optimizer.step()
    return {"logits": logits.detach()}


def _train_synchronised(rank: int) -> dict[str, Tensor]:
    # DistributedDataParallel refuses SyncBatchNorm on a CPU, because PyTorch's own has no code for it.
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
    model = effkernels.convert_sync_batchnorm(small().train())
    assert training_report(model) == {}
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    x = BATCH[:3] if rank == 0 else BATCH[3:]
    # The mean over processes of what each counts for twice its part of the joint batch.
    found = _steps(parallel, x, 2 * len(x) / len(BATCH))
    return found | _gradients(model) | dict(model.named_buffers())


def test_synchronised_norms_train_as_on_the_joint_batch(tmp_path: Path) -> None:
    plain = small().train()
    plain.backend = "reference"
    exact = copy.deepcopy(plain).double()
    _, truth = (_steps(m, BATCH.to(m.conv_stem.weight.dtype), 1.0) for m in (plain, exact))
    own = _steps(copy.deepcopy(small()).train(), BATCH, 1.0)
    results = in_two_processes(_train_synchronised, tmp_path)
    logits = torch.cat([found["logits"] for found in results])
    assert_parity(logits, own["logits"], truth["logits"], "logits")
    for found in results:
        model = small()
        for name, p in model.named_parameters():
            p.grad = found[name]
        assert_gradients_parity(model, plain, exact)
        for (name, value), wanted in zip(plain.named_buffers(), exact.buffers(), strict=True):
            if name.endswith("num_batches_tracked"):
                assert int(found[name]) == STEPS
            else:
                assert_parity(found[name], value, wanted, name)


def _block() -> MBConv:
    block = MBConv(8, 8, 3, se_channels=2)
    randomise(nn.Sequential(block), channels=8)
    return effkernels.convert_sync_batchnorm(block.train())


def _uneven(rank: int) -> dict[str, Tensor]:
    """One process has a single value of a channel and the other 32, then one has none."""
    block, found = _block(), {}
    x = images(33, 1, 1, 8)
    for name, first in (("one", 1), ("none", 0)):
        part = (x[:first] if rank == 0 else x[first:]).clone().requires_grad_()
        block.zero_grad()
        y = block(part)
        y.square().sum().backward()
        found |= {f"{name}.y": y.detach(), f"{name}.x": part.grad}
        found |= {f"{name}.{key}": p.grad.clone() for key, p in block.named_parameters()}
    return found


@pytest.mark.parametrize("case", ["one", "none"])
def test_a_process_with_one_value_or_none(case: str, tmp_path: Path) -> None:
    results = in_two_processes(_uneven, tmp_path)
    plain = _block()
    plain.backend = "reference"
    exact = copy.deepcopy(plain).double()
    x = images(33, 1, 1, 8)
    own, truth = {}, {}
    for one, found in ((plain, own), (exact, truth)):
        image = x.to(one.conv_pw.weight.dtype, copy=True).requires_grad_()
        y = one(image)
        y.square().sum().backward()
        found |= {"y": y.detach(), "x": image.grad} | _gradients(one)
    for name, wanted in truth.items():
        parts = [found[f"{case}.{name}"] for found in results]
        assert_parity(torch.cat(parts) if name in "yx" else sum(parts), own[name], wanted, name)

"""Parts of a training: the optimizer and its schedule, seeds, the processes of torchrun, what a checkpoint may hold."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effkernels.train import OptionError, TrainOptions
from effkernels.train.checkpoint import read_training, save_checkpoint
from effkernels.train.optimizers import DEFAULTS, make_optimizer, make_schedule
from effkernels.train.options import OPTIMIZERS
from effkernels.train.processes import Processes
from effkernels.train.random_numbers import cpu_generator, seed_for


def options(**values: Any) -> TrainOptions:
    return TrainOptions("digits", "run", **values)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_biases_and_norms_do_not_decay(opt: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = make_optimizer(model, options(opt=opt))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        wanted = DEFAULTS[opt].weight_decay if name in ("0.weight", "3.weight") else 0.0
        assert decays[id(parameter)] == wanted, name


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    groups = make_optimizer(model, options()).param_groups
    assert [parameter.shape for group in groups for parameter in group["params"]] == [(2, 2)]


@pytest.mark.parametrize("warmup", [0.0, 0.5, 2.0])
def test_the_learning_rate_grows_linearly_and_falls_as_a_cosine(warmup: float) -> None:
    chosen = options(lr=0.1, min_lr=0.01, epochs=10, warmup_epochs=warmup)
    optimizer = make_optimizer(nn.Linear(2, 2), chosen)
    schedule = make_schedule(optimizer, chosen, steps=20)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    first = round(20 * warmup)
    for step, rate in enumerate(rates):
        if step < first:
            wanted = 0.1 * (0.01 + 0.99 * step / first)
        else:
            wanted = 0.01 + 0.09 * (1 + math.cos(math.pi * (step - first) / (200 - first))) / 2
        assert rate == pytest.approx(wanted, rel=1e-6), step
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_seeds_differ_and_leave_the_generator() -> None:
    seeds = {seed_for("image", 0, epoch, index) for epoch in range(30) for index in range(1000)}
    assert len(seeds) > 29_900
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    with cpu_generator(5):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), wanted)
    assert not torch.equal(inside, wanted)


# A process that is joined with itself alone: what threads of the group it has inside, and after.
JOINED = """
import os, torch
from effkernels.train.processes import Processes

def of_group():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)

initialize = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda *of, **_: initialize(*of, rank=0, world_size=1)
processes = Processes(rank=0, count=2)
with processes.joined(torch.device("cpu")):
    model = processes.wrapped(torch.nn.Linear(2, 2), torch.device("cpu"))
    model(torch.ones(1, 2)).sum().backward()
    del model
    inside = of_group()
print(inside > 0, of_group())
"""


class TestProcesses:
    def test_without_torchrun_there_is_one(self) -> None:
        assert Processes.of_environment({}) == Processes(0, 1, 0)
        assert Processes.of_environment({"WORLD_SIZE": "1", "RANK": "0"}).is_first

    def test_as_torchrun_says(self) -> None:
        found = Processes.of_environment({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"})
        assert found == Processes(3, 4, 1)
        assert not found.is_first

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK, WORLD_SIZE, LOCAL_RANK are not all numbers; use torchrun"),
            ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "are not all numbers"),
            ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK=2; allowed: 0 to WORLD_SIZE - 1 = 1"),
        ],
    )
    def test_what_does_not_fit(self, environment: dict[str, str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Processes.of_environment(environment)

    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="names of threads are read from /proc")
    def test_no_thread_of_a_group_is_left(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run = [sys.executable, "-c", JOINED]
        assert subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout == "True 0\n"


class TestOptions:
    def test_survive_a_checkpoint(self, tmp_path: Path) -> None:
        chosen = options(lr=0.1, precision="amp", workers=0)
        save_checkpoint(tmp_path / "checkpoint.pt", {"options": chosen.to_dict()})
        assert TrainOptions.from_dict(read_training(tmp_path / "checkpoint.pt")["options"]) == chosen

    def test_of_another_version(self) -> None:
        with pytest.raises(ValueError, match="options 'magic' are not known to this version"):
            TrainOptions.from_dict({**options().to_dict(), "magic": 1})

    def test_name_the_value_and_what_is_allowed(self) -> None:
        with pytest.raises(OptionError, match=r"smoothing=1\.5: allowed: 0 to less than 1"):
            options(smoothing=1.5)

"""A small EfficientNet learns scikit-learn's digits: fused as in plain PyTorch, in bfloat16 too, and after a break."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from parity import assert_parity
from torch import Tensor, nn
from torch.nn import functional as F

from effkernels.models import Architecture, EfficientNet, Stage
from effkernels.nn import training_report

STEPS, BATCH, RATE = 200, 48, 5e-3
COMPARED = 80  # steps that plain PyTorch trains too, in float64 at three times the cost; the loss falls to a tenth
NETWORK = Architecture(16, (Stage(1, 3, 1, 16, 1), Stage(4, 5, 2, 24, 2), Stage(4, 3, 1, 32, 2)), 96)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits in a fixed random order, (N, 1, 16, 16) in [-1, 1], and their labels (N,)."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's")
    loaded = datasets.load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=(16, 16), mode="bilinear")[order], torch.as_tensor(loaded.target)[order]


TRAIN = slice(0, 1437)
TEST = slice(1437, 1797)


class Training:
    """A model with its optimizer, schedule and random numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, RATE, total_steps=STEPS)
        self.generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)

    def run(self, steps: int) -> Tensor:
        """The losses (steps,) of so many more steps."""
        images, labels = (t[TRAIN] for t in digits())
        weight = self.model.conv_stem.weight
        losses = []
        for _ in range(steps):
            chosen = torch.randint(len(images), (BATCH,), generator=self.generator)
            x = images[chosen].to(weight.dtype)
            if not weight.is_contiguous():
                x = x.contiguous(memory_format=torch.channels_last)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), labels[chosen])
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def state(self) -> bytes:
        parts = self.model, self.optimizer, self.schedule
        file = io.BytesIO()
        states = [part.state_dict() for part in parts]
        torch.save((states, self.generator.get_state(), torch.get_rng_state()), file)
        return file.getvalue()

    def load(self, state: bytes) -> None:
        states, own, every = torch.load(io.BytesIO(state))
        for part, one in zip((self.model, self.optimizer, self.schedule), states, strict=True):
            part.load_state_dict(one)
        self.generator.set_state(own)
        torch.set_rng_state(every)


def network(seed: int = 0) -> EfficientNet:
    torch.manual_seed(seed)
    return EfficientNet(NETWORK, num_classes=10, in_chans=1, drop_path_rate=0.1)


@torch.inference_mode()
def accuracy(model: nn.Module) -> float:
    images, labels = (t[TEST] for t in digits())
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def test_the_loss_falls_as_in_plain_pytorch_and_the_digits_are_learned() -> None:
    model = network()
    assert training_report(model.train()) == {}
    plain = copy.deepcopy(model)
    plain.backend = "reference"
    channels_last, exact = copy.deepcopy(plain).to(memory_format=torch.channels_last), copy.deepcopy(plain).double()
    losses = Training(model).run(STEPS)
    own, other, truth = (Training(one).run(COMPARED) for one in (plain, channels_last, exact))
    assert float(truth[-20:].mean()) < 0.1 * float(truth[0])
    assert_parity(losses[:COMPARED], [own, other], truth, "losses")
    assert float(losses[-20:].mean()) < 0.05 < 2 < float(losses[0])
    assert accuracy(model) >= 0.97


def test_a_resumed_training_has_the_bits_of_an_unbroken_one() -> None:
    unbroken = Training(network())
    losses = unbroken.run(8)
    first = Training(network())
    first.run(5)
    state = first.state()
    resumed = Training(network(seed=9))
    resumed.load(state)
    assert torch.equal(resumed.run(3), losses[5:])
    for (name, found), wanted in zip(
        resumed.model.state_dict().items(), unbroken.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
def test_a_batch_is_learned_by_heart_in_bfloat16(autocast: bool) -> None:
    images, labels = (t[:32] for t in digits())
    model = network().train()
    if not autocast:
        model, images = model.bfloat16(), images.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2
    assert max(losses[-5:]) < 0.05, losses

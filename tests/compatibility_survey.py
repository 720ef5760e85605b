"""Run `optimize_` on a list of models and check: values by the parity rule, copies, pickles and restore_.

    PYTHONPATH=tests python tests/compatibility_survey.py timm/resnet18 torchvision/mobilenet_v2

One line for each model: blocks fused and left, the error against float64 over PyTorch's own, and what does not hold.
docs/compatibility.md has the table of a run over some 100 models.
"""

from __future__ import annotations

import copy
import pickle
import sys

import torch
from parity import errors, rounding
from peer_models import images, randomise
from torch import Tensor, nn

import effkernels
from effkernels.models.peers import import_timm, import_torchvision


def build(name: str) -> nn.Module:
    """Return the model of a name like "timm/resnet18", randomised, in eval mode."""
    library, _, model = name.partition("/")
    if library == "timm":
        made = import_timm().create_model(model)
    else:
        import_torchvision()
        from torchvision import models

        made = models.get_model(model, weights=None)
    return randomise(made.eval())


def survey(name: str) -> str:
    """Return the line of a model."""
    model = build(name)
    config = getattr(model, "default_cfg", {})
    size = config["input_size"][-1] if config.get("fixed_input_size") else 64
    x = images(2, size, size)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        plain: Tensor = model(x)
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        other = channels_last(x.contiguous(memory_format=torch.channels_last))
        exact = copy.deepcopy(model).double()(x.double())
        report = effkernels.optimize_(model, input_size=size)
        found = model(x)
        ours, own = errors(found, exact), max(errors(plain, exact).l2, errors(other, exact).l2)
        holds = {
            "values": ours.l2 <= 2 * own + rounding(found.dtype),
            "deepcopy": torch.equal(copy.deepcopy(model)(x), found),
            "pickle": torch.equal(pickle.loads(pickle.dumps(model))(x), found),
        }
        effkernels.restore_(model)
        holds["restore_"] = [type(one) for one in model.modules()] == classes and torch.equal(model(x), plain)
    left = [block for block in report.blocks if not block.fused]
    wrong = ", ".join(what for what, fine in holds.items() if not fine)
    line = f"{name}: {report.fused} fused, {len(left)} left, {ours.l2 / own:.2f} of PyTorch's error"
    return f"{line}; WRONG: {wrong}" if wrong else line


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(survey(argument), flush=True)
